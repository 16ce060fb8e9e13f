// Numbers of the model's type and vectors of eight of them; sums are taken in float32, and what an operation of the
// model leaves is rounded to its type.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

typedef float f8 __attribute__((vector_size(32)));
typedef int32_t i8 __attribute__((vector_size(32)));
typedef uint32_t u8 __attribute__((vector_size(32)));
typedef uint16_t h8 __attribute__((vector_size(16)));

struct bf16 {
  uint16_t bits;
};

static inline float widen(float x) { return x; }
static inline float widen(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float wide;
  memcpy(&wide, &bits, 4);
  return wide;
}

static inline void narrow(float x, float* out) { *out = x; }
static inline void narrow(float x, bf16* out) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  out->bits = x != x ? 0x7FC0 : uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// A number that is of the type already, whatever it is kept in.
template <class T>
static inline T cut(float x);
template <>
inline float cut<float>(float x) {
  return x;
}
template <>
inline bf16 cut<bf16>(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return {uint16_t(bits >> 16)};
}

template <class T>
static inline float rounded(float x) {
  T kept;
  narrow(x, &kept);
  return widen(kept);
}

static inline f8 load8(const float* p) {
  f8 v;
  memcpy(&v, p, 32);
  return v;
}
static inline f8 load8(const bf16* p) {
  h8 raw;
  memcpy(&raw, p, 16);
  const u8 wide = __builtin_convertvector(raw, u8) << 16;
  f8 v;
  memcpy(&v, &wide, 32);
  return v;
}
static inline void store8(float* p, f8 v) { memcpy(p, &v, 32); }
static inline f8 all8(float x) { return f8{x, x, x, x, x, x, x, x}; }

static inline float sum8(f8 v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

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

// Sums of eight vectors, side by side.
static inline f8 sums8(const f8* v) {
  const u8 even = {0, 8, 2, 10, 4, 12, 6, 14}, odd = {1, 9, 3, 11, 5, 13, 7, 15};
  f8 a[4], b[2];
  for (int i = 0; i < 4; i++)
    a[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], even) + __builtin_shuffle(v[2 * i], v[2 * i + 1], odd);
  const u8 low = {0, 1, 8, 9, 4, 5, 12, 13}, high = {2, 3, 10, 11, 6, 7, 14, 15};
  for (int i = 0; i < 2; i++)
    b[i] = __builtin_shuffle(a[2 * i], a[2 * i + 1], low) + __builtin_shuffle(a[2 * i], a[2 * i + 1], high);
  const u8 first = {0, 1, 2, 3, 8, 9, 10, 11}, second = {4, 5, 6, 7, 12, 13, 14, 15};
  return __builtin_shuffle(b[0], b[1], first) + __builtin_shuffle(b[0], b[1], second);
}

// exp, within 2 units in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2].
static inline f8 exp8(f8 x) {
  const f8 low = all8(-87.0f), high = all8(88.0f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const f8 shift = all8(12582912.0f);  // adding it rounds to a whole number
  const f8 n = (x * 1.44269504f + shift) - shift;
  const f8 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  f8 p = all8(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const i8 power = (__builtin_convertvector(n, i8) + 127) << 23;
  f8 scale;
  memcpy(&scale, &power, 32);
  return p * scale;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

template <class T>
static inline float silu(float x) {
  return rounded<T>(x * sigmoid(x));
}

static inline f8 silu8(f8 x) { return x / (1.0f + exp8(-x)); }

// Softmax in place; returns nothing that was not finite before.
static inline void softmax(float* x, int count) {
  float top = x[0];
  for (int i = 1; i < count; i++) top = x[i] > top ? x[i] : top;
  int i = 0;
  f8 sums = all8(0.0f);
  for (; i + 8 <= count; i += 8) {
    const f8 e = exp8(load8(x + i) - top);
    store8(x + i, e);
    sums += e;
  }
  float sum = sum8(sums);
  if (i < count) {  // as a whole vector too: expf takes as long for one
    float last[8] = {};
    memcpy(last, x + i, (count - i) * sizeof(float));
    store8(last, exp8(load8(last) - top));
    memcpy(x + i, last, (count - i) * sizeof(float));
    for (; i < count; i++) sum += x[i];
  }
  const float share = 1.0f / sum;
  for (i = 0; i < count; i++) x[i] *= share;
}
