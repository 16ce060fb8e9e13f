// Number formats, loads, reductions and launch order: what all kernels of a decoding step share.
//
// Compiled at run time with: ROWS (batch rows), BF16 (1: bfloat16 model, 0: float32), HEAD_DIM, QUERY_GROUP
// (query heads a key head), OUT_ROWS (output rows that a warp works on at once).
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

// --- order within a program ---------------------------------------------------------------------------
// A step is one launch: a program of calls that all blocks walk through together, one block a multiprocessor.
// After a call that others may depend on, a block arrives; before it reads what others wrote, it awaits the
// arrival of all. In between it may load what never changes, and does: the next product's weights above all.

struct Team {
  u32* arrived;  // arrivals of all blocks, ever
  u32 epoch;     // of this block
  bool pending;  // it has arrived and not yet awaited the others
  const int* known_B;  // flags that were read last, and whether some row runs
  bool known;
  const int* other_B;  // the ones before
  bool other;
};

#ifdef EMULATED
__device__ __forceinline__ void signal(u32* arrived) { ++*arrived; }
__device__ __forceinline__ void wait_for(u32* arrived, u32 count) {
  while ((int)(*arrived - count) < 0) yield_at(AT_GRID);
}
template <int COUNT> __device__ __forceinline__ void take_registers() {}
template <int COUNT> __device__ __forceinline__ void leave_registers() {}
__device__ __forceinline__ int count_one(int* counter) { return (*counter)++; }
__device__ __forceinline__ void bring_near(const void*, u32) {}
__device__ __forceinline__ void copy_aside(void* to, const void* from) { memcpy(to, from, 16); }
__device__ __forceinline__ void await_copies() {}
__device__ __forceinline__ void make_barrier(u64* barrier, u32 arrivals) { open_barrier(barrier, arrivals); }
__device__ __forceinline__ void show_barriers() {}
__device__ __forceinline__ void expect_bytes(u64* barrier, u32 bytes) { arrive_at(barrier, bytes); }
__device__ __forceinline__ void copy_ahead(void* to, const void* from, u32 bytes, u64* barrier) {
  post_copy(to, from, bytes, barrier);
}
__device__ __forceinline__ bool has_arrived(const u64* barrier, u32 parity) { return (*barrier >> 32 & 1) != parity; }
__device__ __forceinline__ void wait_barrier(u64* barrier, u32 parity) {
  while (!has_arrived(barrier, parity)) yield_at(AT_GRID);
}
template <class T> __device__ __forceinline__ void tell(T* to, T value) { *(volatile T*)to = value; }
__device__ __forceinline__ void note(u64* to, u64 value) { tell(to, value); }
template <class T> __device__ __forceinline__ T heard(const T* from) { return *(const volatile T*)from; }
__device__ __forceinline__ u64 least_heard(const u64* from, int count) { return *std::min_element(from, from + count); }
__device__ __forceinline__ void look_again() { yield_at(AT_GRID); }
__device__ __forceinline__ void rest() { yield_at(AT_GRID); }
#else
__device__ __forceinline__ void signal(u32* arrived) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrived) : "memory");
}
__device__ __forceinline__ void wait_for(u32* arrived, u32 count) {
  u32 seen;
  do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrived) : "memory");
  while ((int)(seen - count) < 0);
}
// By all warps of four that follow each other: of what a launch gives every thread the same of, some need more.
template <int COUNT> __device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ __forceinline__ void leave_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
__device__ __forceinline__ int count_one(int* counter) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

// Copies by the copy engine, and the barriers that tell when all bytes of a slot are there.
__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void make_barrier(u64* barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void show_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void expect_bytes(u64* barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void copy_ahead(void* to, const void* from, u32 bytes, u64* barrier) {
  // Read once a step: what is read more often stays in the second cache.
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
          shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}
// 16 bytes into shared memory, there after await_copies() and a __syncthreads(); nobody waits meanwhile.
__device__ __forceinline__ void copy_aside(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// sum (16 x 8) += a (16 x 16) · b (16 x 8); a: of the upper rows, of the lower ones, then of both what lies 8 columns on.
__device__ __forceinline__ void multiply_matrices(float sum[4], const u32 a[4], const u32 b[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Into the second cache.
__device__ __forceinline__ void bring_near(const void* from, u32 bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ bool has_arrived(u64* barrier, u32 parity) {
  u32 done;
  asm volatile(
      "{\n.reg .pred done;\nmbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\nselp.u32 %0, 1, 0, done;\n}"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done;
}
__device__ __forceinline__ void wait_barrier(u64* barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra AGAIN;\n}" ::"r"(shared_address(barrier)), "r"(parity)
      : "memory");
}
// What warps of a block tell each other in shared memory: whoever hears it sees what was done before.
__device__ __forceinline__ void tell(u32* to, u32 value) {
  asm volatile("st.release.cta.shared::cta.u32 [%0], %1;" ::"r"(shared_address(to)), "r"(value) : "memory");
}
// That shared memory was read: a warp's accesses to it happen in order, so no fence is needed, which would take as long as
// the multiplications of a piece.
__device__ __forceinline__ void note(u64* to, u64 value) {
  asm volatile("st.relaxed.cta.shared::cta.u64 [%0], %1;" ::"r"(shared_address(to)), "l"(value) : "memory");
}
__device__ __forceinline__ u32 heard(const u32* from) {
  u32 value;
  asm volatile("ld.acquire.cta.shared::cta.u32 %0, [%1];" : "=r"(value) : "r"(shared_address(from)) : "memory");
  return value;
}
__device__ __forceinline__ u64 heard(const u64* from) {
  u64 value;
  asm volatile("ld.acquire.cta.shared::cta.u64 %0, [%1];" : "=l"(value) : "r"(shared_address(from)) : "memory");
  return value;
}
// The least of several.
__device__ __forceinline__ u64 least_heard(const u64* from, int count) {
  u64 least = ~0ull;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const u64 value = heard(from + i);
    least = value < least ? value : least;
  }
  return least;
}
__device__ __forceinline__ void look_again() {}
__device__ __forceinline__ void rest() { __nanosleep(20); }
#endif

// By all threads of the block, behind a __syncthreads().
__device__ __forceinline__ void arrive(Team& team) {
  ++team.epoch;
  team.pending = true;
  if (threadIdx.x == 0) signal(team.arrived);
}

__device__ __forceinline__ void await(Team& team) {
  if (!team.pending) return;
  team.pending = false;
  if (threadIdx.x == 0) wait_for(team.arrived, team.epoch * gridDim.x);
  __syncthreads();
}

// What other blocks write is read past the first cache (__ldcg), which may hold old lines.
__device__ __forceinline__ float read(const num* p) { return widen(__ldcg(p)); }

// The block's share of a row's columns, [first, end).
__device__ __forceinline__ void columns_of(int width, int& first, int& end) {
  first = width * (int)blockIdx.x / (int)gridDim.x;
  end = width * ((int)blockIdx.x + 1) / (int)gridDim.x;
}

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

// One round and all that follow: a lane gives one half of its 2·LEFT values and takes its own half from the lane across.
// Unrolled by its type, for values in an array that is counted through lie in memory.
template <int LEFT, int COUNT>
__device__ __forceinline__ void fold(float (&value)[COUNT]) {
  if constexpr (LEFT > 0) {
    const int across = LEFT * (WARP / COUNT);
    const bool upper = threadIdx.x & across;
#pragma unroll
    for (int i = 0; i < LEFT; ++i) {
      const float low = value[i], high = value[i + LEFT];
      value[i] = (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, across);
    }
    fold<LEFT / 2>(value);
  }
}

// Sums over the warp of COUNT values at once: a lane gets that of value lane / (WARP / COUNT).
template <int COUNT>
__device__ __forceinline__ float sum_together(float (&value)[COUNT]) {
  fold<COUNT / 2>(value);
#pragma unroll
  for (int d = WARP / COUNT / 2; d; d /= 2) value[0] += __shfl_xor_sync(0xffffffffu, value[0], d);
  return value[0];
}

// Sum over the block, the same in every thread. scratch: one float a warp, free to use again afterwards.
__device__ __forceinline__ float block_sum(float v, float* scratch) {
  v = warp_sum(v);
  if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = v;
  __syncthreads();
  float total = 0.f;
  ROLLED for (int w = 0; w < WARPS; ++w) total += scratch[w];
  __syncthreads();
  return total;
}

// True in all threads of the last block that gets here; what the others wrote before is then visible to it.
__device__ __forceinline__ bool arrive_last(int* counter, int blocks, int* scratch) {
  __syncthreads();
  if (threadIdx.x == 0) {
    *scratch = count_one(counter) == blocks - 1;
    if (*scratch) *counter = 0;  // for the next step
  }
  __syncthreads();
  return *scratch;
}

#define ROWS_AT_ONCE 8  // rows of a thread

// out[r] = row r · x, rounded; `count` rows of `size` numbers behind each other. Several threads a row.
__device__ ONE_COPY void multiply_rows(const num* weight, int count, int size, const float* x, float* out) {
  int lanes = 1;
  while (lanes * 2 * LANE_NUMS <= size && lanes < WARP) lanes *= 2;
  const int lane = threadIdx.x % lanes, step = THREADS / lanes;
  ROLLED for (int mine = threadIdx.x / lanes; mine - (int)threadIdx.x / lanes < count; mine += ROWS_AT_ONCE * step) {
    float sum[ROWS_AT_ONCE] = {};
    ROLLED for (int i = lane * LANE_NUMS; i < size; i += lanes * LANE_NUMS) {
      uint4 held[ROWS_AT_ONCE];
#pragma unroll
      for (int r = 0; r < ROWS_AT_ONCE; ++r)
        held[r] = __ldcg((const uint4*)(weight + min(mine + r * step, count - 1) * size + i));
#pragma unroll
      for (int r = 0; r < ROWS_AT_ONCE; ++r) {
        float v[LANE_NUMS];
        unpack(held[r], v);
#pragma unroll
        for (int j = 0; j < LANE_NUMS; ++j) sum[r] = fmaf(x[i + j], v[j], sum[r]);
      }
    }
    ROLLED for (int d = lanes / 2; d; d /= 2)
#pragma unroll
      for (int r = 0; r < ROWS_AT_ONCE; ++r) sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], d);
#pragma unroll
    for (int r = 0; r < ROWS_AT_ONCE; ++r)
      if (lane == 0 && mine + r * step < count) out[mine + r * step] = rounded(sum[r]);
  }
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

// What flags say, for later calls.
__device__ __forceinline__ void know(Team& team, const int* skip_B, bool runs) {
  team.other_B = team.known_B;
  team.other = team.known;
  team.known_B = skip_B;
  team.known = runs;
}

// The same, read once for the calls of a layer.
__device__ __forceinline__ bool layer_runs(const int* skip_B, Team& team) {
  if (!skip_B) return true;
  if (skip_B == team.known_B) return team.known;
  if (skip_B == team.other_B) return team.other;
  know(team, skip_B, any_runs(skip_B));
  return team.known;
}

__device__ __forceinline__ float silu(float x) { return x / (1.f + expf(-x)); }

// The same within some last bits, in less code.
#ifdef EMULATED
__device__ __forceinline__ float quick_silu(float x) { return silu(x); }
#else
__device__ __forceinline__ float quick_silu(float x) { return __fdividef(x, 1.f + expf(-x)); }
#endif

// --- a block ------------------------------------------------------------------------------------------

#define DECISION_BYTES 384

// Its shared memory: Fixed, then each warp's ring of weights, then room for the call that runs.
struct Fixed {
  __align__(16) unsigned char decision[DECISION_BYTES];  // that a product takes along
  float scratch[32];
  float sums[32][4];
  float values[32];
  int indices[32];
  int counts[4];
};
