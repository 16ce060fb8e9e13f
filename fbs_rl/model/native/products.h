// Products of a few rows with matrices that are read once: a token costs the bytes of its weights.
#pragma once
#include "arguments.h"
#include "numbers.h"

template <class T>
static inline float dot(const T* w, const float* x, int k) {
  f8 a = all8(0.0f), b = a, c = a, d = a;
  int j = 0;
  for (; j + 32 <= k; j += 32) {
    a += load8(w + j) * load8(x + j);
    b += load8(w + j + 8) * load8(x + j + 8);
    c += load8(w + j + 16) * load8(x + j + 16);
    d += load8(w + j + 24) * load8(x + j + 24);
  }
  for (; j + 8 <= k; j += 8) a += load8(w + j) * load8(x + j);
  float sum = sum8((a + b) + (c + d));
  for (; j < k; j++) sum += widen(w[j]) * x[j];
  return sum;
}

// One output for ROWS rows: weights come in one stream, which memory serves fastest, and stay in registers for all rows.
template <class T, int ROWS>
static inline void dots(const T* w, const float* x, int ldx, float* sum, int k) {
  f8 acc[ROWS];
  for (int r = 0; r < ROWS; r++) acc[r] = all8(0.0f);
  int j = 0;
  for (; j + 8 <= k; j += 8) {
    const f8 weight = load8(w + j);
    for (int r = 0; r < ROWS; r++) acc[r] += weight * load8(x + (long)r * ldx + j);
  }
  for (int r = 0; r < ROWS; r++) {
    sum[r] = sum8(acc[r]);
    for (int t = j; t < k; t++) sum[r] += widen(w[t]) * x[(long)r * ldx + t];
  }
}

// y[r][i] for outputs i of [first, last): the products, with their bias, rounded.
template <class T>
static void multiply(const Linear& m, const float* x, int ldx, float* y, int ldy, int rows, int k, int first, int last) {
  const T *w = (const T*)m.weight, *b = (const T*)m.bias;
  const auto leave = [&](int r, int i, float s) {
    y[(long)r * ldy + i] = rounded<T>(b ? s + widen(b[i]) : s);
  };
  float sum[8];
  // Of many rows some inputs at a time, which then stay near for several outputs.
  const int together = rows > 8 ? 16 : 1;
  for (int i = first; i < last; i += together) {
    const int end = i + together < last ? i + together : last;
    for (int r = 0; r < rows;) {
      const float* from = x + (long)r * ldx;
      const int some = rows - r >= 8 ? 8 : rows - r >= 4 ? 4 : rows - r >= 2 ? 2 : 1;
      for (int o = i; o < end; o++) {
        const T* row = w + (long)o * k;
        if (some == 8) dots<T, 8>(row, from, ldx, sum, k);
        if (some == 4) dots<T, 4>(row, from, ldx, sum, k);
        if (some == 2) dots<T, 2>(row, from, ldx, sum, k);
        if (some == 1) sum[0] = dot(row, from, k);
        for (int q = 0; q < some; q++) leave(r + q, o, sum[q]);
      }
      r += some;
    }
  }
}
