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

// Bytes by which weights are asked for ahead, into the second cache: where several rows are multiplied, the processor
// does not see far enough ahead by itself.
static const long AHEAD = 16 << 10;
// Rows that two outputs at a time are made for: a weight and an input then serve as many products as registers hold.
static const int PAIRED = 8;
// Outputs whose weights stay near until all rows have read them.
static const int GROUP = 16;

// OUTS outputs, whose weights lie behind each other, for ROWS rows: sum[o * ROWS + r]. ahead: what to ask for meanwhile.
template <class T, int OUTS, int ROWS>
static inline void dots(const T* w, const float* x, int ldx, float* sum, int k, const char* ahead) {
  f8 acc[OUTS][ROWS];
  for (int o = 0; o < OUTS; o++)
    for (int r = 0; r < ROWS; r++) acc[o][r] = all8(0.0f);
  int j = 0;
  for (; j + 8 <= k; j += 8) {
    f8 weight[OUTS];
    for (int o = 0; o < OUTS; o++) weight[o] = load8(w + (long)o * k + j);
    __builtin_prefetch(ahead + (long)OUTS * j * sizeof(T), 0, 2);
    for (int r = 0; r < ROWS; r++) {
      const f8 given = load8(x + (long)r * ldx + j);
      for (int o = 0; o < OUTS; o++) acc[o][r] += weight[o] * given;
    }
  }
  for (int o = 0; o < OUTS; o++) {
    if (ROWS == 8)
      store8(sum + o * ROWS, sums8(acc[o]));
    else
      for (int r = 0; r < ROWS; r++) sum[o * ROWS + r] = sum8(acc[o][r]);
    for (int r = 0; r < ROWS && j < k; r++)
      for (int t = j; t < k; t++) sum[o * ROWS + r] += widen(w[(long)o * k + t]) * x[(long)r * ldx + t];
  }
}

// y[r][o] of ROWS rows for outputs of [first, last), with their bias, rounded. ends: where the caller's weights do.
template <class T, int ROWS>
static __attribute__((noinline)) void multiply_rows(
    const Linear& m, const float* x, int ldx, float* y, int ldy, int k, int first, int last, const char* ends) {
  const T *w = (const T*)m.weight, *b = (const T*)m.bias;
  const auto leave = [&](int o, int r, float made) {
    y[(long)r * ldy + o] = rounded<T>(b ? made + widen(b[o]) : made);
  };
  float sum[2 * ROWS];
  int o = first;
  const auto ahead = [&](const T* row) {
    const char* far = (const char*)row + AHEAD;
    return far < ends ? far : (const char*)row;
  };
  if (ROWS == 1)
    for (; o < last; o++) leave(o, 0, dot(w + (long)o * k, x, k));
  for (; ROWS == PAIRED && o + 2 <= last; o += 2) {
    const T* row = w + (long)o * k;
    dots<T, 2, ROWS>(row, x, ldx, sum, k, ahead(row));
    for (int r = 0; r < ROWS; r++) leave(o, r, sum[r]), leave(o + 1, r, sum[ROWS + r]);
  }
  for (; o < last; o++) {
    const T* row = w + (long)o * k;
    dots<T, 1, ROWS>(row, x, ldx, sum, k, ahead(row));
    for (int r = 0; r < ROWS; r++) leave(o, r, sum[r]);
  }
}

// y[r][i] for outputs i of [first, last): the products, with their bias, rounded.
template <class T>
static void multiply(const Linear& m, const float* x, int ldx, float* y, int ldy, int rows, int k, int first, int last) {
  const char* ends = (const char*)((const T*)m.weight + (long)last * k);
  const int group = rows <= PAIRED ? last - first : GROUP;
  for (int i = first; i < last; i += group) {
    const int stop = i + group < last ? i + group : last;
    for (int r = 0; r < rows;) {
      const float* from = x + (long)r * ldx;
      float* to = y + (long)r * ldy;
      const int left = rows - r, some = left >= PAIRED ? PAIRED : left >= 4 ? 4 : left >= 2 ? 2 : 1;
      if (some == PAIRED)
        multiply_rows<T, PAIRED>(m, from, ldx, to, ldy, k, i, stop, ends);
      else if (some == 4)
        multiply_rows<T, 4>(m, from, ldx, to, ldy, k, i, stop, ends);
      else if (some == 2)
        multiply_rows<T, 2>(m, from, ldx, to, ldy, k, i, stop, ends);
      else
        multiply_rows<T, 1>(m, from, ldx, to, ldy, k, i, stop, ends);
      r += some;
    }
  }
}
