// Vectors as a product reads weights and inputs: lanes of four bytes, each a float or two bf16 beside each other.
#pragma once
#include "numbers.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
static const int LANES = 16;
#else
static const int LANES = 8;
#endif
typedef float Sums __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint64_t Pairs __attribute__((vector_size(4 * LANES)));

static inline Words load_words(const void* p) {
  Words v;
  memcpy(&v, p, sizeof(Words));
  return v;
}

// BYTES of a weight's row, the same for each row of inputs that a vector holds.
template <int BYTES>
static inline Words spread(const void* p) {
  if (BYTES == 4) {
    uint32_t one;
    memcpy(&one, p, 4);
    return Words{} + one;
  }
  if (BYTES == 8) {
    uint64_t two;
    memcpy(&two, p, 8);
    return (Words)(Pairs{} + two);
  }
  return load_words(p);
}

// sum += weight * input of each lane; of two bf16 both products, in float32.
static inline void add_products(Sums& sum, Words weight, Words input, const float*) { sum += (Sums)weight * (Sums)input; }
static inline void add_products(Sums& sum, Words weight, Words input, const bf16*) {
#ifdef __AVX512BF16__
  sum = (Sums)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weight, (__m512bh)input);
#else
  sum += (Sums)(weight << 16) * (Sums)(input << 16);
  sum += (Sums)(weight & 0xFFFF0000u) * (Sums)(input & 0xFFFF0000u);
#endif
}
