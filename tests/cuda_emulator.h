// Enough of CUDA to run the decoder's programs on a CPU: one fiber a thread, all blocks side by side.
#include <setjmp.h>
#include <ucontext.h>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

using std::max;
using std::min;

struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define __align__(n) alignas(n)

static dim3 threadIdx, blockIdx, gridDim;
#define FENCE 1024  // bytes behind what a launch asked for, which must stay as they are
#define SHARED_BYTES (1 << 18)

template <class To, class From> inline To same_bits(From v) { To out; memcpy(&out, &v, sizeof(To)); return out; }
inline float __int_as_float(int v) { return same_bits<float>(v); }
inline float __uint_as_float(unsigned v) { return same_bits<float>(v); }
inline unsigned __float_as_uint(float v) { return same_bits<unsigned>(v); }
inline float rsqrtf(float v) { return 1.f / std::sqrt(v); }
template <class T> inline T __ldcg(const T* p) { return *p; }
inline int atomicAdd(int* p, int v) { int old = *p; *p += v; return old; }
inline void __threadfence() {}
inline unsigned long long clock64() { static unsigned long long calls; return ++calls; }

enum Wait { RUNS, AT_WARP, AT_BLOCK, AT_ALL, AT_GRID, DONE };

struct Fiber {
  ucontext_t context;  // where the fiber begins
  jmp_buf place;       // where it goes on
  bool begun = false;
  std::vector<char> stack = std::vector<char>(1 << 16);
  Wait wait = RUNS;
  int turn = 0;
};

#define MOST_FIBERS 1536
static std::vector<Fiber> fibers(MOST_FIBERS);
static jmp_buf scheduler;
static unsigned running;  // threads of a block lie side by side, blocks are whole warps
static float exchanged[2][MOST_FIBERS];
static void (*body)(unsigned char*);
static unsigned char* body_shared[MOST_FIBERS];

inline void yield_at(Wait wait) {
  fibers[running].wait = wait;
  if (!_setjmp(fibers[running].place)) _longjmp(scheduler, 1);
}
inline void __syncthreads() { yield_at(AT_BLOCK); }  // of those who work on calls
inline void sync_all() { yield_at(AT_ALL); }         // and the warps that ask for weights
inline void __syncwarp() { yield_at(AT_WARP); }

template <class T> inline T exchange(T value, int from) {
  const int turn = fibers[running].turn++ % 2;
  exchanged[turn][running] = same_bits<float>(value);
  yield_at(AT_WARP);
  return same_bits<T>(exchanged[turn][running / 32 * 32 + from]);
}
inline bool __any_sync(unsigned, bool v) {
  bool any = false;
  for (int i = 0; i < 32; ++i) any |= exchange((int)v, i) != 0;
  return any;
}
template <class T> inline T __shfl_xor_sync(unsigned, T v, int mask) { return exchange(v, (running % 32) ^ mask); }
template <class T> inline T __shfl_sync(unsigned, T v, int from) { return exchange(v, from); }
template <class T> inline T __shfl_up_sync(unsigned, T v, int by) {
  const int lane = running % 32;
  return exchange(v, lane < by ? lane : lane - by);
}

// Tensor cores: sum (16 x 8) += a (16 x 16) · b (16 x 8), in float32.
struct Factors {
  unsigned a[4], b[2];
};
static Factors factors[2][MOST_FIBERS];
inline float of_pair(unsigned pair, int which) { return same_bits<float>(which ? pair & 0xffff0000u : pair << 16); }
inline void multiply_matrices(float sum[4], const unsigned a[4], const unsigned b[2]) {
  const int turn = fibers[running].turn++ % 2, lane = running % 32;
  memcpy(factors[turn][running].a, a, 16);
  memcpy(factors[turn][running].b, b, 8);
  yield_at(AT_WARP);
  const Factors* all = factors[turn] + running - lane;
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 16; ++k) {
      const Factors& row = all[lane / 4 * 4 + k % 8 / 2];
      const Factors& column = all[(lane % 4 * 2 + i % 2) * 4 + k % 8 / 2];
      sum[i] += of_pair(row.a[i / 2 + k / 8 * 2], k % 2) * of_pair(column.b[k / 8], k % 2);
    }
}

// Copies that were asked for arrive some time later, in no order; what lies there meanwhile is NaN.
struct Copy {
  void* to;
  const void* from;
  unsigned bytes;
  unsigned long long* barrier;  // phases · 2^32 + arrivals · 2^24 + bytes that are still to come
};
static std::vector<Copy> on_their_way;

static unsigned arrivals_of_phase;
inline void end_phase(unsigned long long* barrier) {
  if (!(unsigned)*barrier) *barrier += (1ull << 32) + (arrivals_of_phase << 24);
}
inline void open_barrier(unsigned long long* barrier, unsigned arrivals) {
  arrivals_of_phase = arrivals;
  *barrier = arrivals << 24;
}
inline void arrive_at(unsigned long long* barrier, unsigned bytes) {
  *barrier += bytes - (1ull << 24);
  end_phase(barrier);
}
inline void post_copy(void* to, const void* from, unsigned bytes, unsigned long long* barrier) {
  memset(to, 0xff, bytes);
  on_their_way.push_back({to, from, bytes, barrier});
}

static void let_some_arrive() {
  static unsigned draw = 1;
  std::vector<Copy> left;
  for (const Copy& copy : on_their_way) {
    draw = draw * 1664525 + 1013904223;
    if (draw >> 30) {
      left.push_back(copy);
      continue;
    }
    memcpy(copy.to, copy.from, copy.bytes);
    *copy.barrier -= copy.bytes;
    end_phase(copy.barrier);
  }
  on_their_way.swap(left);
}

static void enter_fiber() {
  body(body_shared[blockIdx.x]);
  fibers[running].wait = DONE;
  _longjmp(scheduler, 1);
}

static void resume(Fiber& f) {
  if (_setjmp(scheduler)) return;
  if (f.begun) _longjmp(f.place, 1);
  f.begun = true;
  setcontext(&f.context);
}

// Lets the fibers of [from, to) go on if none of them runs and all that are left wait for `wait`.
static bool release(unsigned from, unsigned to, Wait wait) {
  bool any = false;
  for (unsigned i = from; i < to; ++i) {
    if (fibers[i].wait == RUNS) return false;
    if (fibers[i].wait == DONE) continue;
    if (fibers[i].wait != wait) return false;
    any = true;
  }
  if (any) for (unsigned i = from; i < to; ++i) if (fibers[i].wait == wait) fibers[i].wait = RUNS;
  return any;
}

static void begin(Fiber& f) {
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack.data();
  f.context.uc_stack.ss_size = f.stack.size();
  f.context.uc_link = nullptr;
  f.wait = RUNS;
  f.begun = false;
  f.turn = 0;
  makecontext(&f.context, enter_fiber, 0);
}

#define MOST_ROUNDS 1000  // without one in which somebody worked

// Of each block's threads the first `workers` work on calls.
static bool run_fibers(unsigned blocks, unsigned threads, unsigned workers) {
  const unsigned all = blocks * threads;
  for (unsigned i = 0; i < all; ++i) begin(fibers[i]);
  on_their_way.clear();
  for (int idle = 0; idle < MOST_ROUNDS; ++idle) {
    bool moved = false, left = false;
    for (running = 0; running < all; ++running) {
      if (fibers[running].wait != RUNS) continue;
      threadIdx.x = running % threads;
      blockIdx.x = running / threads;
      resume(fibers[running]);
      moved |= threadIdx.x < workers && fibers[running].wait != AT_GRID;
    }
    for (unsigned w = 0; w < all; w += 32) release(w, w + 32, AT_WARP);
    for (unsigned b = 0; b < all; b += threads) {
      release(b, b + workers, AT_BLOCK);
      release(b, b + threads, AT_ALL);
    }
    let_some_arrive();
    for (unsigned i = 0; i < all; ++i) left |= fibers[i].wait != DONE;
    if (!left) return true;
    if (moved) idle = 0;
    for (unsigned i = 0; i < all; ++i)
      if (fibers[i].wait == AT_GRID) fibers[i].wait = RUNS;
  }
  return false;  // threads wait for each other
}

static bool run_grid(void (*kernel)(unsigned char*), unsigned blocks, unsigned threads, unsigned workers, unsigned bytes) {
  if (blocks * threads > MOST_FIBERS || bytes + FENCE > SHARED_BYTES) return false;
  body = kernel;
  gridDim.x = blocks;
  for (unsigned b = 0; b < blocks; ++b) {
    body_shared[b] = (unsigned char*)aligned_alloc(128, SHARED_BYTES);
    memset(body_shared[b], 0xff, bytes);  // NaN: nothing may be read before it is written
    memset(body_shared[b] + bytes, 0x5a, FENCE);
  }
  bool right = run_fibers(blocks, threads, workers);
  for (unsigned b = 0; b < blocks; ++b) {
    for (int i = 0; i < FENCE; ++i) right &= body_shared[b][bytes + i] == 0x5a;
    free(body_shared[b]);
  }
  return right;
}
