// Part of Walk: the backbone's layer for the rows that run it, the skip path for the others.

// Inputs, queries, keys and values; skipped rows leave theirs where the model says so, or nothing. Where all rows skip,
// they are left to the next step that runs the layer, which reads the weights anyway.
void write_keys(int l, const LayerArguments& w) {
  const int width = m.width, count = run.size();
  skip_path(w);
  if (count) inject(l, w);
  const int with_keys = m.projects ? rows : count;
  if (!with_keys) return;
  const CacheArguments& c = s.cache[l];
  if (!count && c.owed < s.most_owed) return owe(l, w);
  for (int j = 0; j < count; j++) {
    float* to = input.data() + (long)j * width;
    if (w.looks || w.reads)
      norm(room.injected.data() + (long)j * width, w.input_norm, to, width);
    else
      weigh(normed.data() + (long)run[j] * width, w.input_norm, to);
  }
  for (int j = count; j < with_keys; j++)
    weigh(normed.data() + (long)idle[j - count] * width, w.input_norm, input.data() + (long)j * width);
  const int owed = c.owed * rows, all = with_keys + owed;
  std::copy_n(c.owed_input, (long)owed * width, input.data() + (long)with_keys * width);
  const int heads = m.heads * m.head_dim, groups = m.groups * m.head_dim;
  taken.take(input.data(), all, width);
  product_of_taken(w.query, room.query.data(), count, heads);
  product_of_taken(w.key, room.key.data(), all, groups);
  product_of_taken(w.value, room.value.data(), all, groups);
  wait();
  for (int j = 0; j < with_keys; j++)
    for (int g = 0; g < m.groups; g++)
      rotate(room.key.data() + (long)j * groups + g * m.head_dim, w.key_norm, turn_of(row_of(j)),
             key.data() + (long)j * groups + g * m.head_dim);
  if (me == 0) store(l, with_keys);
  if (owed) pay(l, w, with_keys);
  if (!count || owed) wait();  // where a layer runs, others wait in execute() before these are written again
}

// Keep what keys and values will be made of; the next step reads it.
void owe(int l, const LayerArguments& w) {
  const CacheArguments& c = s.cache[l];
  const int half = m.head_dim / 2;
  if (me == 0) s.added[l] = 2;
  for (int r = me; r < rows; r += many) {
    const long at = (long)c.owed * rows + r;
    weigh(normed.data() + (long)r * m.width, w.input_norm, c.owed_input + at * m.width);
    std::copy_n(s.cosine + (long)r * half, half, c.owed_cosine + at * half);
    std::copy_n(s.sine + (long)r * half, half, c.owed_sine + at * half);
  }
}

// Entries of earlier steps, which stand behind those of this one in room.key and room.value.
void pay(int l, const LayerArguments& w, int with_keys) {
  const CacheArguments& c = s.cache[l];
  const int owed = c.owed * rows, groups = m.groups * m.head_dim, half = m.head_dim / 2;
  Floats turned(groups);
  for (int i = first(owed); i < last(owed); i++) {
    const int r = i % rows;
    const long from = (long)(with_keys + i) * groups;
    const Turn turn = {c.owed_cosine + (long)i * half, c.owed_sine + (long)i * half};
    for (int g = 0; g < m.groups; g++)
      rotate(room.key.data() + from + g * m.head_dim, w.key_norm, turn, turned.data() + g * m.head_dim);
    put(c, r, s.entries[(long)l * rows + r] - c.owed + i / rows, turned.data(), room.value.data() + from);
  }
}

int row_of(int j) const { return j < (int)run.size() ? run[j] : idle[j - run.size()]; }

struct Turn {  // of a position
  const float *cosine, *sine;
};
Turn turn_of(int r) const { return {s.cosine + (long)r * (m.head_dim / 2), s.sine + (long)r * (m.head_dim / 2)}; }

// Norm of a head, where the family has one, and rotation.
void rotate(const float* in, const void* weight, const Turn& turn, float* out) const {
  const int half = m.head_dim / 2;
  const float *cosine = turn.cosine, *sine = turn.sine;
  float normed_head[512];
  if (weight) {
    norm(in, weight, normed_head, m.head_dim);
    in = normed_head;
  }
  for (int i = 0; i < half; i++) {
    const float a = in[i], b = in[i + half];
    out[i] = rounded<T>(rounded<T>(a * cosine[i]) - rounded<T>(b * sine[i]));
    out[i + half] = rounded<T>(rounded<T>(b * cosine[i]) + rounded<T>(a * sine[i]));
  }
}

// The token's entries. Where rows share columns (not paged), one that leaves nothing is marked absent.
void store(int l, int with_keys) {
  const CacheArguments& c = s.cache[l];
  const int dim = m.head_dim, groups = m.groups * dim;
  s.added[l] = 1;
  if (!s.page && with_keys < rows)
    for (int r : idle) {
      const long long at = s.entries[(long)l * rows + r];
      c.exists[r * c.exists_stride + at] = 0;
      for (int g = 0; g < m.groups; g++)
        for (int i = 0; i < dim; i++) {
          narrow(0.0f, (T*)c.keys + r * c.row_stride + g * c.head_stride + at * dim + i);
          narrow(0.0f, (T*)c.values + r * c.row_stride + g * c.head_stride + at * dim + i);
        }
    }
  for (int j = 0; j < with_keys; j++) {
    const int r = row_of(j);
    put(c, r, s.entries[(long)l * rows + r], key.data() + (long)j * groups, room.value.data() + (long)j * groups);
  }
}

// Keys and values of one row's entry, all groups.
void put(const CacheArguments& c, int r, long long at, const float* keys, const float* values) const {
  const int dim = m.head_dim;
  if (!s.page && c.exists) c.exists[r * c.exists_stride + at] = 1;
  for (int g = 0; g < m.groups; g++) {
    const float *k = keys + g * dim, *v = values + g * dim;
    long long start = r * c.row_stride + g * c.head_stride, place = at;
    if (s.page) {
      start = page_of(r, at) * c.block_stride + g * c.head_stride;
      place = at % s.page;
    }
    for (int i = 0; i < dim; i++) {
      const long long key_at = s.page && s.page_columns ? i * (long long)s.page + place : place * dim + i;
      narrow(k[i], (T*)c.keys + start + key_at);
      narrow(v[i], (T*)c.values + start + place * dim + i);
    }
  }
}

long long page_of(int r, long long at) const { return s.pages[(long)r * s.pages_stride + at / s.page]; }

// h̃ of the running rows, compact.
void inject(int l, const LayerArguments& w) {
  const int width = m.width, count = run.size(), from = first(width), to = last(width);
  for (int j = 0; j < count; j++)
    std::copy(state() + (long)run[j] * width + from, state() + (long)run[j] * width + to,
              room.injected.data() + (long)j * width + from);
  if (w.looks) {
    Floats unit((long)count * m.rank), made((long)count * width);
    for (int j = 0; j < count; j++)
      norm(room.pooled.data() + (long)run[j] * m.rank, w.up_norm, unit.data() + (long)j * m.rank, m.rank);
    product(w.preview_up, unit.data(), made.data(), count, width, m.rank);
    const float strength = widen(*(const T*)w.strength);
    for (int j = 0; j < count; j++)
      for (int i = from; i < to; i++) {
        float& x = room.injected[(long)j * width + i];
        x = rounded<T>(x + made[(long)j * width + i] * strength);
      }
  }
  if (w.reads) {
    read_chunks(l, w);
    add_chunks(w);
  }
  if (w.looks || w.reads) wait();
}

// Attention and MLP of the running rows, and how they moved.
void execute(int l, const LayerArguments& w) {
  const int width = m.width, count = run.size(), heads = m.heads * m.head_dim, inner = m.inner;
  for (int item = first(count * m.heads); item < last(count * m.heads); item++) attend_head(l, w, item);
  wait();
  product(w.out, room.attended.data(), room.middle.data(), count, width, heads);
  for (int j = 0; j < count; j++)
    for (int i = first(width); i < last(width); i++) {
      float& x = room.middle[(long)j * width + i];
      x = rounded<T>(room.injected[(long)j * width + i] + x);
    }
  wait();
  for (int j = 0; j < count; j++)
    norm(room.middle.data() + (long)j * width, w.post_norm, input.data() + (long)j * width, width);
  gate_up(w);
  wait();
  Floats& made = down;
  made.resize((long)count * width);
  product(w.down, room.active.data(), made.data(), count, width, inner);
  for (int j = 0; j < count; j++)
    for (int i = first(width); i < last(width); i++)
      after()[(long)run[j] * width + i] =
          rounded<T>(room.middle[(long)j * width + i] + made[(long)j * width + i]);
  wait();
  if (s.mode == 1 || s.mode == 2) {
    for (int r : run) move(r);
    wait();  // the state before is written over in the next layer
  }
}
Floats down, gate_room, up_room;

void attend_head(int l, const LayerArguments& w, int item) {
  const CacheArguments& c = s.cache[l];
  const int j = item / m.heads, head = item % m.heads, group = head / (m.heads / m.groups), dim = m.head_dim;
  const int r = run[j], groups = m.groups * dim;
  const long long count = s.entries[(long)l * rows + r];
  float query[512];
  rotate(room.query.data() + (long)j * m.heads * dim + head * dim, w.query_norm, turn_of(r), query);
  const long long start = s.page ? 0 : r * c.row_stride + group * c.head_stride;
  const Entries<T> in = {
      (const T*)c.keys + start, (const T*)c.values + start,
      !s.page && c.exists ? c.exists + r * c.exists_stride : nullptr,
      s.page ? s.pages + (long)r * s.pages_stride : nullptr,
      c.block_stride, group * c.head_stride, s.page, s.page ? s.page_columns : 0, (int)count, dim};
  score.resize(std::max<size_t>(score.size(), count + 8));
  attend(in, query, key.data() + (long)j * groups + group * dim, room.value.data() + (long)j * groups + group * dim,
         m.scale, score.data(), room.attended.data() + (long)j * m.heads * dim + head * dim);
}

// SiLU(gate) times up, my columns.
void gate_up(const LayerArguments& w) {
  const int count = run.size(), inner = m.inner, from = first(inner), to = last(inner);
  gate_room.resize((long)count * inner), up_room.resize((long)count * inner);
  product(w.gate, input.data(), gate_room.data(), count, inner, m.width);
  product_of_taken(w.up, up_room.data(), count, inner);
  for (int j = 0; j < count; j++) {
    const float *gate = gate_room.data() + (long)j * inner, *up = up_room.data() + (long)j * inner;
    float* active = room.active.data() + (long)j * inner;
    int i = from;
    for (; i + 8 <= to; i += 8) store8(active + i, silu8(load8(gate + i)));
    for (; i < to; i++) active[i] = silu<T>(gate[i]);
    for (i = from; i < to; i++) active[i] = rounded<T>(rounded<T>(active[i]) * up[i]);
  }
}

// The skipped rows' states after the layer.
void skip_path(const LayerArguments& w) {
  const int width = m.width, rank = m.adapter_rank, count = idle.size();
  if (!count) return;
  if (!w.adapts) {
    for (int r : idle)
      for (int i = first(width); i < last(width); i++) after()[(long)r * width + i] = state()[(long)r * width + i];
    if (run.empty()) wait();
    return;
  }
  Floats chosen((long)count * width), made((long)count * width), active((long)count * rank);
  for (int j = 0; j < count; j++)
    std::copy_n(normed.data() + (long)idle[j] * width, width, chosen.data() + (long)j * width);
  product(w.adapter_down, chosen.data(), room.adapter.data(), count, rank, width);
  wait();
  for (long i = 0; i < (long)count * rank; i++) active[i] = silu<T>(room.adapter[i]);
  product(w.adapter_up, active.data(), made.data(), count, width, rank);
  for (int j = 0; j < count; j++)
    for (int i = first(width); i < last(width); i++)
      after()[(long)idle[j] * width + i] =
          rounded<T>(state()[(long)idle[j] * width + i] + made[(long)j * width + i]);
  wait();
}
