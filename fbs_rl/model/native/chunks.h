// Part of Walk: boundaries, and what a token reads of the chunks closed before it (fbs_rl/model/chunk_head.py).

// The closing rule; each thread for itself. Labels are B, I, O, S.
void find_chunks() {
  for (int r = 0; r < rows; r++) {
    float logit[5];
    whole_product(m.boundary, normed.data() + (long)r * m.width, logit, 1, 5, m.width);
    if (me == 0) std::copy(logit, logit + 5, s.boundary + 5l * r);
    if (me == 0 && s.close_prob) s.close_prob[r] = close_probability(logit);
    int label = 0;
    for (int i = 1; i < 4; i++)
      if (logit[i] > logit[label]) label = i;
    closes[r] = label != 1 || !s.continuable[r];
    finishes[r] = closes[r] && s.open_size[r] > 0;
    labels[r] = label;
  }
}
int labels[MOST_ROWS];

// 1 - p(I), of B, I, O, S.
static float close_probability(const float* logit) {
  float most = *std::max_element(logit, logit + 4), sum = 0.0f;
  for (int i = 0; i < 4; i++) sum += expf(logit[i] - most);
  return 1.0f - expf(logit[1] - most) / sum;
}

// Moves the rows' counts on, once nobody reads them any more.
void count_chunks() {
  for (int r = 0; r < rows; r++) {
    s.closes[r] = closes[r];
    s.closed[r] += finishes[r];
    s.open_size[r] = (closes[r] ? 0 : s.open_size[r]) + 1;
    if (closes[r]) s.continuable[r] = labels[r] == 0;
  }
}

const ChunkArguments& memory(int l) const { return s.chunks[l]; }
T* ring(void* rows_of, int l, int r) const { return (T*)rows_of + s.chunk_row[r] * memory(l).ring_stride; }

// What the running rows read, mixed; their addition to the state is made by add_chunks.
void read_chunks(int l, const LayerArguments& w) {
  const int width = m.chunk_width, dim = width / m.chunk_heads, count = run.size();
  Floats chosen((long)count * m.width);
  for (int j = 0; j < count; j++)
    std::copy_n(normed.data() + (long)run[j] * m.width, m.width, chosen.data() + (long)j * m.width);
  product(w.chunk_query, chosen.data(), room.chunk_query.data(), count, width, m.width);
  wait();
  for (int item = first(count * m.chunk_heads); item < last(count * m.chunk_heads); item++) {
    const int j = item / m.chunk_heads, head = item % m.chunk_heads, r = run[j];
    const long long closed = s.closed[r], used = std::min<long long>(closed, m.chunk_places);
    const T *keys = ring(memory(l).keys, l, r), *values = ring(memory(l).values, l, r);
    const T* bias = (const T*)w.distance_bias + (long)head * m.buckets;
    const float* query = room.chunk_query.data() + (long)j * width + head * dim;
    const float scale = 1.0f / sqrtf((float)dim);
    score.resize(std::max<size_t>(score.size(), used + 1));
    score[0] = rounded<T>(rounded<T>(dot((const T*)w.null_key + head * dim, query, dim)) * scale);
    for (long long c = 0; c < used; c++) {
      const float one = rounded<T>(rounded<T>(dot(keys + c * width + head * dim, query, dim)) * scale);
      const long long distance = (closed - 1 - c) % m.chunk_places;
      score[c + 1] = rounded<T>(one + widen(bias[m.bucket_of[distance]]));
    }
    softmax(score.data(), used + 1);
    float* out = room.chunk_mixed.data() + (long)j * width + head * dim;
    for (int i = 0; i < dim; i++) {
      float sum = rounded<T>(score[0]) * widen(((const T*)w.null_value)[head * dim + i]);
      for (long long c = 0; c < used; c++) sum += rounded<T>(score[c + 1]) * widen(values[c * width + head * dim + i]);
      out[i] = rounded<T>(sum);
    }
  }
  wait();
}

// My columns of the addition.
void add_chunks(const LayerArguments& w) {
  const int count = run.size(), from = first(m.width), to = last(m.width);
  Floats made((long)count * m.width);
  product(w.chunk_out, room.chunk_mixed.data(), made.data(), count, m.width, m.chunk_width);
  const float strength = widen(*(const T*)w.chunk_strength);
  for (int j = 0; j < count; j++)
    for (int i = from; i < to; i++) {
      float& x = room.injected[(long)j * m.width + i];
      x = rounded<T>(x + rounded<T>(strength * made[(long)j * m.width + i]));
    }
}

// Close the open chunk of the rows that close it, then add this token to the (new) open one.
void extend_chunks(int l, const LayerArguments& w) {
  std::vector<int> done;
  for (int r = 0; r < rows; r++)
    if (finishes[r]) done.push_back(r);
  const int width = m.chunk_width, count = done.size();
  if (count) {
    Floats mean((long)count * m.width);
    for (int j = 0; j < count; j++) {
      const float* sum = memory(l).open_sum + s.chunk_row[done[j]] * m.width;
      for (int i = 0; i < m.width; i++)
        mean[(long)j * m.width + i] = rounded<T>(sum[i] / (float)s.open_size[done[j]]);
    }
    product(w.summarise, mean.data(), room.summary.data(), count, width, m.width);
    wait();
    Floats made((long)count * width);
    for (int which = 0; which < 2; which++) {
      product(which ? w.chunk_value : w.chunk_key, room.summary.data(), made.data(), count, width, width);
      for (int j = 0; j < count; j++) {
        T* to = ring(which ? memory(l).values : memory(l).keys, l, done[j]);
        to += s.closed[done[j]] % m.chunk_places * width;
        for (int i = first(width); i < last(width); i++) narrow(made[(long)j * width + i], to + i);
      }
    }
  }
  for (int r = 0; r < rows; r++) {
    float* sum = memory(l).open_sum + s.chunk_row[r] * m.width;
    for (int i = first(m.width); i < last(m.width); i++)
      sum[i] = normed[(long)r * m.width + i] + (closes[r] ? 0.0f : sum[i]);
  }
}
