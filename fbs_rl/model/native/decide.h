// Part of Walk: who skips the layer (fbs_rl/model/skip_gate.py and decision.py).

void decide(int l, const LayerArguments& w) {
  const bool gates_act = s.mode == 1 || s.mode == 2;
  if (m.ahead) decided = prob, is_decided = has_prob;
  if ((l + m.ahead) % m.block == 0) {
    has_prob = gates_act && s.asks && w.asks;
    if (has_prob) ask(w);
  }
  if (!m.ahead) decided = prob, is_decided = has_prob;
  const bool never = w.is_protected || s.never[l];
  float mean = 0.0f, bar = 0.0f;
  for (int r = 0; r < rows && s.consensus; r++) mean += decided[r] / rows, bar += bar_of(l, r) / rows;
  for (int r = 0; r < rows; r++) {
    bool skip = false;
    if (s.mode == 3) skip = s.given[(long)l * rows + r];
    if (gates_act && is_decided) {
      const float p = s.consensus ? mean : decided[r], b = s.consensus ? bar : bar_of(l, r);
      skip = s.mode == 1 ? p >= b : b < p;
    } else if (s.mode == 1) {
      skip = bar_of(l, r) == -INFINITY;
    }
    skips[r] = skip && !never;
    if (me == 0) {
      s.skip[(long)l * rows + r] = skips[r];
      s.prob[(long)l * rows + r] = is_decided && !never ? decided[r] : 0.0f;
    }
  }
}

float bar_of(int l, int r) const { return s.bar ? s.bar[l * s.bar_stride + r] : drawn(l - l % m.block, r); }

// The layer's uniform number, bit for bit that of fbs_rl/model/skip_gate.py.
float drawn(int l, int r) const {
  if (!s.gated[r]) return 1.0f;
  const uint64_t seed = s.seed[r];
  uint32_t word = stir(seed) ^ stir(uint32_t(seed >> 32) ^ 0x9E3779B9u);
  word = stir(word ^ stir(uint32_t(s.position[r]) ^ 0x85EBCA6Bu));
  return (stir(word + l * 0xC2B2AE35u) >> 8) * 0x1p-24f;
}
static uint32_t stir(uint32_t word) {
  word = (word ^ (word >> 16)) * 0x85EBCA6Bu;
  word = (word ^ (word >> 13)) * 0xC2B2AE35u;
  return word ^ (word >> 16);
}

void ask(const LayerArguments& w) {
  const int wide = m.gate_residual + m.gate_preview;
  float* reduced = room.reduced.data();
  if (m.reads_residual) product(w.reduce, normed.data(), reduced, rows, m.gate_residual, m.width, wide);
  if (m.reads_preview)
    product(w.preview, room.pooled.data(), reduced + m.gate_residual, rows, m.gate_preview, m.rank, wide);
  wait();
  for (int r = 0; r < rows; r++) prob[r] = answer(w, r);
  wait();  // before the next gate writes where others still read
}

float answer(const LayerArguments& w, int r) {
  const float* reduced = room.reduced.data() + (long)r * (m.gate_residual + m.gate_preview);
  float* g = features.data();
  int n = 0;
  if (m.reads_residual) {
    norm(reduced, w.reduce_norm, g, m.gate_residual);
    n = m.gate_residual;
    g[n++] = motion[r][0], g[n++] = motion[r][1];
  }
  if (m.reads_preview) {
    std::copy(reduced + m.gate_residual, reduced + m.gate_residual + m.gate_preview, g + n);
    n += m.gate_preview;
    g[n++] = room.entropy[r];
  }
  // From here on in float32 whatever the model's type.
  const T *hidden = (const T*)w.hidden.weight, *bias = (const T*)w.hidden.bias, *out = (const T*)w.decide.weight;
  float logit = widen(*(const T*)w.decide.bias);
  for (int i = 0; i < m.gate_hidden; i++) {
    const float x = dot(hidden + (long)i * n, g, n) + widen(bias[i]);
    logit += widen(out[i]) * (x * sigmoid(x));
  }
  return sigmoid(std::min(std::max(logit, -m.clip), m.clip));
}

void take_skips() {
  run.clear(), idle.clear();
  for (int r = 0; r < rows; r++) (skips[r] ? idle : run).push_back(r);
}

// How the layer moved a row's state: relative length of the step, and the cosine.
void move(int r) {
  const float *a = state() + (long)r * m.width, *b = after() + (long)r * m.width;
  f8 step = all8(0.0f), dots = step, from = step, to = step;
  int i = 0;
  for (; i + 8 <= m.width; i += 8) {
    const f8 x = load8(a + i), y = load8(b + i), d = y - x;
    step += d * d, dots += x * y, from += x * x, to += y * y;
  }
  float sums[4] = {sum8(step), sum8(dots), sum8(from), sum8(to)};
  for (; i < m.width; i++) {
    const float x = a[i], y = b[i], d = y - x;
    sums[0] += d * d, sums[1] += x * y, sums[2] += x * x, sums[3] += y * y;
  }
  const float length = std::max(sqrtf(sums[2]), 1e-10f);
  motion[r][0] = sqrtf(sums[0]) / length;
  motion[r][1] = sums[1] / std::max(sqrtf(sums[3]), 1e-10f) / length;
}
