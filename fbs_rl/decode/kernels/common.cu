// Number formats, loads, reductions and launch order: what all kernels of a decoding step share.
//
// Compiled at run time with: ROWS (batch rows), BF16 (1: bfloat16 model, 0: float32), HEAD_DIM, QUERY_GROUP
// (query heads a key head), OUT_ROWS (output rows that a warp works on at once), PAGED (1: the cache lies in pages).
//
// TENSOR: products of several bfloat16 rows, by the tensor cores.
//
// Every call of a program has one struct of arguments; fbs_rl/decode/kernel_arguments.py reads their fields here.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

#if BF16
typedef u16 num;
#define LANE_NUMS 8
#else
typedef float num;
#define LANE_NUMS 4
#endif
// LANE_NUMS: numbers in the 16 bytes that a lane loads at once.

// A thread's registers: of those that work, and of those that ask for weights; together as many as 168 for each.
#define WORK_REGISTERS 216
#define ASK_REGISTERS 72

#define TENSOR (BF16 && ROWS > 1)
#if TENSOR
static_assert(OUT_ROWS == 8, "a tensor core takes so many rows of weights");
#endif

// Before a loop: a step runs most code once a layer, so what has to be fetched of it costs more than a jump.
#define ROLLED _Pragma("unroll 1")
// Before a function: its code is there once, for all that call it.
#ifdef EMULATED
#define ONE_COPY
#else
#define ONE_COPY __noinline__
#endif
// The same before what runs seldom: inlined it would take registers from what runs often.
#define APART ONE_COPY

#define WARP 32
#define WARPS 8   // of a block, that work on its calls
#define ASKERS 4  // that ask for their weights (asking.cu)
#define THREADS (WARP * WARPS)
#define ALL_THREADS (THREADS + WARP * ASKERS)

#ifndef EMULATED
// Calls are the business of the first THREADS threads: the other warps take no part in what they wait for.
__device__ __forceinline__ void sync_workers() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }
__device__ __forceinline__ void sync_all() { asm volatile("bar.sync 0;" ::: "memory"); }
#define __syncthreads() sync_workers()
#endif

#define MINUS_INFINITY (__int_as_float(0xff800000))

#if BF16
__device__ __forceinline__ float widen(num x) { return __uint_as_float((u32)x << 16); }
// Round to nearest even, as the framework does.
#ifndef EMULATED
__device__ __forceinline__ num narrow(float x) {
  num rounded_x;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded_x) : "f"(x));
  return rounded_x;
}
#else
__device__ __forceinline__ num narrow(float x) {
  u32 bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (num)0x7fc0;  // a NaN stays one
  return (num)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
#endif
#else
__device__ __forceinline__ float widen(num x) { return x; }
__device__ __forceinline__ num narrow(float x) { return x; }
#endif
__device__ __forceinline__ float rounded(float x) { return widen(narrow(x)); }

// What lies in a lane's 16 bytes, and back.
__device__ __forceinline__ void unpack(const uint4& v, float* out) {
#if BF16
  const u32 w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = __uint_as_float(w[i] << 16);
    out[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
  }
#else
  out[0] = __uint_as_float(v.x);
  out[1] = __uint_as_float(v.y);
  out[2] = __uint_as_float(v.z);
  out[3] = __uint_as_float(v.w);
#endif
}

__device__ __forceinline__ uint4 pack(const float* v) {
#if BF16
  u32 w[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) w[i] = (u32)narrow(v[2 * i]) | (u32)narrow(v[2 * i + 1]) << 16;
  return make_uint4(w[0], w[1], w[2], w[3]);
#else
  return make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]));
#endif
}
