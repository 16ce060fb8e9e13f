// Part of Walk: the preview (fbs_rl/model/preview.py has the mathematics).

void look(int l, const LayerArguments& w) {
  const int looks = look_number(l);
  product(m.state_map, normed.data(), room.preview_query.data(), rows, m.rank, m.width);
  const T *scale = (const T*)w.query_scale, *bias = (const T*)w.query_bias;
  for (int r = 0; r < rows; r++)
    for (int i = first(m.rank); i < last(m.rank); i++) {
      float& q = room.preview_query[(long)r * m.rank + i];
      q = rounded<T>(widen(bias[i]) + q * widen(scale[i]));
    }
  if (!m.fixed_window) product_of_taken(w.window_in, room.window.data(), rows, m.window_hidden);
  wait();
  if (!shortlisted) find_shortlist();
  shortlisted = true;
  const Linear maps = {m.horizon_maps, nullptr};
  product(maps, room.preview_query.data(), room.wide_query.data(), rows, m.horizons * m.rank, m.rank);
  include(w, looks);
  wait();
  for (int r = 0; r < rows; r++)
    for (int h = first(m.horizons); h < last(m.horizons); h++) expect(r, h);
  wait();
  const int groups = m.rank / 16;
  for (int g = first(groups); g < last(groups) && m.mixes; g++) pool_mixed(w, g);
  for (int r = 0; r < rows && !m.mixes; r++) pool_plain(r, first(m.rank), last(m.rank));
  wait();
  if (me == 0)
    std::copy(room.preview_query.begin(), room.preview_query.begin() + (long)rows * m.rank,
              s.queries + (long)looks * rows * m.rank);
}

int look_number(int l) const {
  int count = 0;
  for (int i = 0; i < l; i++) count += m.layer[i].looks;
  return count;
}

// How much each horizon counts; each thread for itself.
void include(const LayerArguments& w, int looks) {
  Floats hidden(m.window_hidden);
  for (int r = 0; r < rows; r++) {
    float window = (float)m.fixed_window;
    if (!m.fixed_window) {
      for (int i = 0; i < m.window_hidden; i++) hidden[i] = silu<T>(room.window[(long)r * m.window_hidden + i]);
      float logit;
      whole_product(w.window_out, hidden.data(), &logit, 1, 1, m.window_hidden);
      window = m.horizons * sigmoid(logit);
    }
    float* alpha = inclusion.data() + (long)r * m.horizons;
    for (int h = 0; h < m.horizons; h++) {
      const float margin = window - (h + 0.5f);
      const bool inside = margin > 0.0f || (h == 0 && !m.fixed_window);
      alpha[h] = m.hard || m.fixed_window ? (float)inside : sigmoid(margin / s.temperature);
    }
    if (me == 0) {
      s.windows[(long)looks * rows + r] = window;
      std::copy(alpha, alpha + m.horizons, s.inclusions + ((long)looks * rows + r) * m.horizons);
    }
  }
}

// The candidates of the highest score: the best of each thread's share, then of those.
void find_shortlist() {
  const int n = m.candidates, count = m.shortlist;
  Floats token((long)rows * m.rank);
  const int from = first(n), to = last(n);
  whole_product({m.mean_map, nullptr}, room.preview_query.data(), token.data(), rows, m.rank, m.rank);
  product({m.reduced, nullptr}, token.data(), room.scores.data(), rows, n, m.rank);
  std::vector<int> order;
  for (int r = 0; r < rows; r++) {
    float* score = room.scores.data() + (long)r * n;
    for (int i = from; i < to; i++) score[i] += m.prior[i];
    best_of_share(score, from, to, order);
    const long at = ((long)r * many + me) * count;
    for (int i = 0; i < count; i++) {
      const bool there = i < (int)order.size();
      room.found[at + i] = there ? order[i] : -1;
      room.found_score[at + i] = there ? score[order[i]] : -INFINITY;
    }
  }
  wait();
  for (int r = 0; r < rows; r++) {
    const long at = (long)r * many * count;
    order.resize((long)many * count);
    std::iota(order.begin(), order.end(), 0);
    keep_best(order, count, [&](int a) { return room.found_score[at + a]; });
    for (int i = 0; i < count; i++) shortlist[(long)r * count + i] = room.found[at + order[i]];
    std::sort(shortlist.begin() + (long)r * count, shortlist.begin() + (long)(r + 1) * count);
  }
}

template <class Score>
static void keep_best(std::vector<int>& order, int count, Score&& score) {
  if ((int)order.size() <= count) return;
  const auto better = [&](int a, int b) { return score(a) != score(b) ? score(a) > score(b) : a < b; };
  std::nth_element(order.begin(), order.begin() + count - 1, order.end(), better);
  order.resize(count);
}

// Indices of the best of [from, to): they lie in the groups of the highest maxima.
void best_of_share(const float* score, int from, int to, std::vector<int>& order) const {
  const int size = 32, groups = (to - from) / size, count = m.shortlist;
  order.clear();
  if (groups <= 2 * count) {
    for (int i = from; i < to; i++) order.push_back(i);
  } else {
    Floats top(groups);
    for (int g = 0; g < groups; g++) {
      const float* in = score + from + g * size;
      f8 best = load8(in);
      for (int j = 8; j < size; j += 8) {
        const f8 next = load8(in + j);
        best = next > best ? next : best;
      }
      float one = best[0];
      for (int j = 1; j < 8; j++) one = best[j] > one ? best[j] : one;
      top[g] = one;
    }
    std::vector<int> chosen(groups);
    std::iota(chosen.begin(), chosen.end(), 0);
    keep_best(chosen, count, [&](int g) { return top[g]; });
    for (int g : chosen)
      for (int j = 0; j < size; j++) order.push_back(from + g * size + j);
    for (int i = from + groups * size; i < to; i++) order.push_back(i);
  }
  keep_best(order, count, [&](int i) { return score[i]; });
}

// The expected embedding at one horizon, and at the first one the entropy.
void expect(int r, int h) {
  const T* reduced = (const T*)m.reduced;
  const float* query = room.wide_query.data() + ((long)r * m.horizons + h) * m.rank;
  Floats share(m.shortlist);
  const int* names = shortlist.data() + (long)r * m.shortlist;
  for (int i = 0; i < m.shortlist; i++) share[i] = rounded<T>(dot(reduced + (long)names[i] * m.rank, query, m.rank));
  softmax(share.data(), m.shortlist);
  if (h == 0) {
    float entropy = 0.0f;
    for (float p : share) entropy -= p > 0.0f ? p * logf(p) : 0.0f;
    room.entropy[r] = entropy;
  }
  float* out = room.expected.data() + ((long)r * m.horizons + h) * m.rank;
  std::fill(out, out + m.rank, 0.0f);
  for (int i = 0; i < m.shortlist; i++) {
    const float p = rounded<T>(share[i]);
    const T* row = reduced + (long)names[i] * m.rank;
    for (int j = 0; j < m.rank; j++) out[j] += p * widen(row[j]);
  }
  for (int j = 0; j < m.rank; j++) out[j] = rounded<T>(out[j]);
}

// Channels [from, to) of a row through the mean over horizons, where nothing mixes them.
void pool_plain(int r, int from, int to) {
  const float* alpha = inclusion.data() + (long)r * m.horizons;
  const float total = weight_of(alpha);
  for (int c = from; c < to; c++) {
    float sum = 0.0f;
    for (int h = 0; h < m.horizons; h++) sum += rounded<T>(expected_of(r, h)[c] * rounded<T>(alpha[h]));
    room.pooled[(long)r * m.rank + c] = rounded<T>(rounded<T>(sum) / total);
  }
}

// A group of 16 channels of all rows through the convolution over horizons, then the mean.
void pool_mixed(const LayerArguments& w, int group) {
  const int size = 16, horizons = m.horizons, at = group * size;
  const T *mix = (const T*)w.mix + (long)at * size * 3, *bias = (const T*)w.mix_bias + at;
  float taps[size][3][size], start[size];  // by input, place and output
  for (int o = 0; o < size; o++) {
    start[o] = widen(bias[o]);
    for (int i = 0; i < size; i++)
      for (int t = 0; t < 3; t++) taps[i][t][o] = widen(mix[((long)o * size + i) * 3 + t]);
  }
  Floats weighed((long)horizons * size);
  for (int r = 0; r < rows; r++) {
    const float* alpha = inclusion.data() + (long)r * horizons;
    const float total = weight_of(alpha);
    for (int h = 0; h < horizons; h++)
      for (int i = 0; i < size; i++)
        weighed[h * size + i] = rounded<T>(expected_of(r, h)[at + i] * rounded<T>(alpha[h]));
    float sum[size] = {};
    for (int h = 0; h < horizons; h++) {
      f8 low = load8(start), high = load8(start + 8);
      for (int i = 0; i < size; i++)
        for (int t = std::max(0, 1 - h); t < std::min(3, horizons + 1 - h); t++) {
          const float given = weighed[(h + t - 1) * size + i];
          low += load8(taps[i][t]) * given, high += load8(taps[i][t] + 8) * given;
        }
      float one[size];
      store8(one, low), store8(one + 8, high);
      for (int o = 0; o < size; o++) sum[o] += rounded<T>(silu<T>(rounded<T>(one[o])) * rounded<T>(alpha[h]));
    }
    for (int o = 0; o < size; o++) room.pooled[(long)r * m.rank + at + o] = rounded<T>(rounded<T>(sum[o]) / total);
  }
}

float weight_of(const float* alpha) const {
  float total = 0.0f;
  for (int h = 0; h < m.horizons; h++) total += rounded<T>(alpha[h]);
  return rounded<T>(rounded<T>(total) + 1e-6f);
}
const float* expected_of(int r, int h) const { return room.expected.data() + ((long)r * m.horizons + h) * m.rank; }
