// Number formats, loads, reductions and launch order: what all kernels of a decoding step share.
//
// Compiled at run time with: ROWS (batch rows), BF16 (1: bfloat16 model, 0: float32), HEAD_DIM, QUERY_GROUP
// (query heads a key head), OUT_ROWS (output rows that a warp works on at once).
//
// Every kernel takes one struct by value; its fields are named in fbs_rl/decode/kernel_arguments.py.

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

#define WARP 32

#ifndef EMULATED
extern __shared__ __align__(16) unsigned char shared[];  // as much as the launch asks for
#endif
#define MINUS_INFINITY (__int_as_float(0xff800000))

#if BF16
__device__ __forceinline__ float widen(num x) { return __uint_as_float((u32)x << 16); }
// Round to nearest even, as the framework does.
__device__ __forceinline__ num narrow(float x) {
  u32 bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (num)0x7fc0;  // a NaN stays one
  return (num)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
#else
__device__ __forceinline__ float widen(num x) { return x; }
__device__ __forceinline__ num narrow(float x) { return x; }
#endif
__device__ __forceinline__ float rounded(float x) { return widen(narrow(x)); }

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

// --- launch order -------------------------------------------------------------------------------------
// A kernel starts while the one before it still runs (programmatic dependent launch), so that it can load
// weights early. It must await() before it reads what a kernel before it wrote, and every block must await(),
// or the kernel after it would not know that all is done. allow_next() comes after await(): then whatever
// was written two kernels back is visible to a kernel from its first instruction. A kernel that streams weights
// calls it when it has asked for its last ones, so that the next one's early loads fill the gap between them.

#ifdef EMULATED
__device__ __forceinline__ void await() {}
__device__ __forceinline__ void allow_next() {}
__device__ __forceinline__ void make_barrier(u64*) {}
__device__ __forceinline__ void show_barriers() {}
__device__ __forceinline__ void expect_bytes(u64*, u32) {}
__device__ __forceinline__ void copy_ahead(void* to, const void* from, u32 bytes, u64*) { memcpy(to, from, bytes); }
__device__ __forceinline__ void wait_barrier(u64*, int) { __syncwarp(); }
#else
__device__ __forceinline__ void await() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void allow_next() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Copies by the copy engine, and the barriers that tell when all bytes of a slot are there.
__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void make_barrier(u64* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void show_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void expect_bytes(u64* barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void copy_ahead(void* to, const void* from, u32 bytes, u64* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
__device__ __forceinline__ void wait_barrier(u64* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra AGAIN;\n}" ::"r"(shared_address(barrier)), "r"(parity)
      : "memory");
}
#endif

// What other kernels write is read past the first cache (__ldcg): with overlapping kernels it may hold old lines.
__device__ __forceinline__ float read(const num* p) { return widen(__ldcg(p)); }

// --- reductions ---------------------------------------------------------------------------------------

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(0xffffffffu, v, d);
  return v;
}

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int d = 16; d; d >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, d));
  return v;
}

// Sum over the block, the same in every thread. scratch: one float a warp, free to use again afterwards.
__device__ __forceinline__ float block_sum(float v, float* scratch) {
  v = warp_sum(v);
  if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = v;
  __syncthreads();
  float total = 0.f;
  for (int w = 0; w < (int)(blockDim.x / WARP); ++w) total += scratch[w];
  __syncthreads();
  return total;
}

// True in all threads of the last block that gets here; what the others wrote before is then visible to it.
__device__ __forceinline__ bool arrive_last(int* counter, int blocks, int* scratch) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    *scratch = atomicAdd(counter, 1) == blocks - 1;
    if (*scratch) *counter = 0;  // for the next step
  }
  __syncthreads();
  bool last = *scratch;
  if (last) __threadfence();
  return last;
}

// --- who skips ----------------------------------------------------------------------------------------

__device__ __forceinline__ bool skips(const int* skip_B, int row) { return skip_B && __ldcg(skip_B + row); }

// Whether some row runs the layer. skip_B is null where nobody may skip.
__device__ __forceinline__ bool any_runs(const int* skip_B) {
  if (!skip_B) return true;
  bool runs = false;
#pragma unroll
  for (int b = 0; b < ROWS; ++b) runs |= !__ldcg(skip_B + b);
  return runs;
}

__device__ __forceinline__ float silu(float x) { return x / (1.f + expf(-x)); }
