// One query a head over a row's cached entries and its own new one.
#pragma once
#include "arguments.h"
#include "numbers.h"

// Scores of `count` entries whose keys lie side by side.
template <class T>
static void score_rows(const T* keys, const float* q, float* score, int count, int dim) {
  int s = 0;
  if (dim % 8) {
    for (; s < count; s++) {
      score[s] = 0.0f;
      for (int j = 0; j < dim; j++) score[s] += widen(keys[(long)s * dim + j]) * q[j];
    }
    return;
  }
  for (; s + 8 <= count; s += 8) {
    f8 acc[8];
    for (int e = 0; e < 8; e++) acc[e] = all8(0.0f);
    for (int j = 0; j < dim; j += 8) {
      const f8 query = load8(q + j);
      for (int e = 0; e < 8; e++) acc[e] += load8(keys + (long)(s + e) * dim + j) * query;
    }
    store8(score + s, sums8(acc));
  }
  for (; s < count; s++) {
    f8 acc = all8(0.0f);
    for (int j = 0; j < dim; j += 8) acc += load8(keys + (long)s * dim + j) * load8(q + j);
    score[s] = sum8(acc);
  }
}

// Scores of eight times VECTORS entries where a key's numbers lie `page` apart.
template <class T, int VECTORS>
static inline void score_some_columns(const T* keys, const float* q, float* score, int dim, int page) {
  f8 sum[VECTORS] = {};
  for (int j = 0; j < dim; j++)
    for (int v = 0; v < VECTORS; v++) sum[v] += load8(keys + (long)j * page + 8 * v) * q[j];
  for (int v = 0; v < VECTORS; v++) store8(score + 8 * v, sum[v]);
}

// The same as score_rows for keys in columns; keys: that of the first entry. Up to seven entries behind the last are
// read and scored too, whatever lies there: the numbers of the next column, or values.
template <class T>
static void score_columns(const T* keys, const float* q, float* score, int count, int dim, int page) {
  for (int s = 0; s < count;) {
    const int left = count - s;
    if (left > 24) {
      score_some_columns<T, 4>(keys + s, q, score + s, dim, page);
      s += 32;
    } else if (left > 8) {
      score_some_columns<T, 2>(keys + s, q, score + s, dim, page);
      s += 16;
    } else {
      score_some_columns<T, 1>(keys + s, q, score + s, dim, page);
      s += 8;
    }
  }
}

// out += weighed values, of eight times VECTORS numbers of each entry.
template <class T, int VECTORS>
static inline void weigh_some(const T* values, const float* weight, float* out, int count, int dim) {
  f8 sum[VECTORS];
  for (int v = 0; v < VECTORS; v++) sum[v] = load8(out + 8 * v);
  for (int s = 0; s < count; s++)
    for (int v = 0; v < VECTORS; v++) sum[v] += load8(values + (long)s * dim + 8 * v) * weight[s];
  for (int v = 0; v < VECTORS; v++) store8(out + 8 * v, sum[v]);
}

template <class T>
static void weigh_values(const T* values, const float* weight, float* out, int count, int dim) {
  int j = 0;
  for (; j + 64 <= dim; j += 64) weigh_some<T, 8>(values + j, weight, out + j, count, dim);
  for (; j + 16 <= dim; j += 16) weigh_some<T, 2>(values + j, weight, out + j, count, dim);
  for (; j + 8 <= dim; j += 8) weigh_some<T, 1>(values + j, weight, out + j, count, dim);
  for (; j < dim; j++)
    for (int s = 0; s < count; s++) out[j] += widen(values[(long)s * dim + j]) * weight[s];
}

// Where a row's entries lie: runs of neighbours.
template <class T>
struct Entries {
  const T *keys, *values;
  const unsigned char* exists;
  const int* pages;
  long long block_stride, head_offset;
  int page, columns, count, dim;

  template <class Do>
  void each_run(Do&& run) const {
    if (!pages) return run(keys, values, 0, count);
    for (int first = 0; first < count; first += page) {
      const long long at = pages[first / page] * block_stride + head_offset;
      run(keys + at, values + at, first, count - first < page ? count - first : page);
    }
  }
};

// One head's mixture of values, rounded; score: room for all entries and one more.
template <class T>
static void attend(
    const Entries<T>& in, const float* query, const float* own_key, const float* own_value, float scale, float* score,
    float* out) {
  const int dim = in.dim, count = in.count;
  in.each_run([&](const T* keys, const T*, int first, int run) {
    if (in.columns)
      score_columns(keys, query, score + first, run, dim, in.page);
    else
      score_rows(keys, query, score + first, run, dim);
  });
  score[count] = dot(own_key, query, dim);
  for (int s = 0; s <= count; s++) score[s] *= scale;
  if (in.exists)
    for (int s = 0; s < count; s++)
      if (!in.exists[s]) score[s] = -INFINITY;
  softmax(score, count + 1);
  for (int j = 0; j < dim; j++) out[j] = own_value[j] * score[count];
  in.each_run([&](const T*, const T* values, int first, int run) {
    weigh_values(values, score + first, out, run, dim);
  });
  for (int j = 0; j < dim; j++) out[j] = rounded<T>(out[j]);
}
