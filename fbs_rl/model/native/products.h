// Products of a few rows with matrices that are read once: a token costs the bytes of its weights.
#pragma once
#include "arguments.h"
#include "inputs.h"

// Bytes by which weights are asked for ahead, into the second cache: where several rows are multiplied, the processor
// does not see far enough ahead by itself.
static const long AHEAD = 64 << 10;
// Outputs whose weights stay near until all rows have read them.
static const int TOGETHER = LANES == 16 ? 8 : 6;
// Outputs of a block that are made in one go: as many sums as registers hold beside what is multiplied.
template <int WIDE>
static constexpr int in_one_go() {
  return WIDE > 4 ? TOGETHER : WIDE / 2;
}

// OUTS outputs, whose weights lie behind each other, of a block of rows, which come back in sum[OUTS][WIDE] without the
// numbers that do not fill a vector. ahead: what to ask for meanwhile.
template <class T, int OUTS, int WIDE>
static inline void sum_products(const T* w, const float* laid, float* sum, int k, const char* ahead) {
  typedef Layout<T, WIDE> L;
  Sums acc[OUTS][L::VECTORS] = {};
  for (int j = 0; j < k / L::NUMBERS; j++) {
    Words input[L::VECTORS];
    for (int v = 0; v < L::VECTORS; v++) input[v] = load_words(laid + (long)(j * L::VECTORS + v) * LANES);
    for (int byte = 0; byte < OUTS * L::BYTES; byte += 64)
      __builtin_prefetch(ahead + (long)j * OUTS * L::BYTES + byte, 0, 2);
    for (int o = 0; o < OUTS; o++) {
      const Words weight = spread<L::BYTES>(w + (long)o * k + j * L::NUMBERS);
      for (int v = 0; v < L::VECTORS; v++) add_products(acc[o][v], weight, input[v], w);
    }
  }
  const int share = LANES / L::ROWS;
  for (int o = 0; o < OUTS; o++) {
    float lane[WIDE][share];
    memcpy(lane, acc[o], sizeof(lane));
    for (int r = 0; r < WIDE; r++) {
      for (int half = share / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lane[r][i] += lane[r][i + half];
      sum[o * WIDE + r] = lane[r][0];
    }
  }
}

// y[r][o] of a block's rows for outputs of [first, last), at most TOGETHER, with their bias, rounded.
template <class T, int WIDE>
static __attribute__((noinline)) void multiply_block(
    const Linear& m, const Inputs<T>& x, const typename Inputs<T>::Block& block, int rows, float* y, int ldy, int first,
    int last, const char* ahead) {
  const T *w = (const T*)m.weight + (long)first * x.numbers, *bias = (const T*)m.bias;
  const int k = x.numbers, done = k - k % Layout<T, WIDE>::NUMBERS;
  const float* laid = x.laid.data() + block.at;
  const int outs = last - first, many = in_one_go<WIDE>();
  float sum[TOGETHER * WIDE];
  int o = 0;
  for (; o + many <= outs; o += many)
    sum_products<T, many, WIDE>(w + (long)o * k, laid, sum + o * WIDE, k, ahead + (long)o * k * sizeof(T));
  for (; o < outs; o++) sum_products<T, 1, WIDE>(w + (long)o * k, laid, sum + o * WIDE, k, (const char*)w);
  for (int r = 0; r < rows; r++) {
    const float* given = x.given + (long)(block.first + r) * k;
    float* to = y + (long)(block.first + r) * ldy;
    for (int o = first; o < last; o++) {
      float made = sum[(o - first) * WIDE + r];
      for (int t = done; t < k; t++) made += widen(w[(long)(o - first) * k + t]) * given[t];
      to[o] = rounded<T>(bias ? made + widen(bias[o]) : made);
    }
  }
}

// y[r][o] of the first `rows` rows of x for outputs o of [first, last): the products, with their bias, rounded.
template <class T>
static void multiply(const Linear& m, const Inputs<T>& x, int rows, float* y, int ldy, int first, int last) {
  const T *w = (const T*)m.weight, *bias = (const T*)m.bias;
  const int k = x.numbers;
  const char* ends = (const char*)(w + (long)last * k);
  for (int i = first; i < last; i += TOGETHER) {
    const int stop = i + TOGETHER < last ? i + TOGETHER : last;
    const char *near = (const char*)(w + (long)i * k), *far = near + AHEAD;
    for (const auto& block : x.blocks) {
      const int some = rows - block.first < block.rows ? rows - block.first : block.rows;
      if (some <= 0) break;
      const char* ahead = block.first || far >= ends ? near : far;
      if (block.wide > 1) {
        with_width(block.wide, [&](auto wide) { multiply_block<T, wide>(m, x, block, some, y, ldy, i, stop, ahead); });
        continue;
      }
      for (int o = i; o < stop; o++) {
        const float made = dot(w + (long)o * k, x.given + (long)block.first * k, k);
        y[(long)block.first * ldy + o] = rounded<T>(bias ? made + widen(bias[o]) : made);
      }
    }
  }
}
