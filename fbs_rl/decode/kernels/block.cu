// What the threads of a block do together: waiting for the other blocks, sums, who skips.

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
