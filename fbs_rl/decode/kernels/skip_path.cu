// What a row has that skips a layer: the skip path's output instead of the layer's.

// state + up·silu(down); null up: the state.
struct SkipPath {
  const num* state_Bd;
  const num* up;    // [width, rank]
  const num* down;  // what the front product made of it
  long long down_stride;
  int rank;
  int width;
};

// Of one row and column, where it is one of few.
__device__ __forceinline__ float skipped_output(const SkipPath& p, int b, int n) {
  const float state = read(p.state_Bd + b * p.width + n);
  if (!p.up) return state;
  float sum = 0.f;
#pragma unroll 8
  for (int j = 0; j < p.rank; ++j)
    sum += widen(p.up[(long long)n * p.rank + j]) * rounded(silu(read(p.down + b * p.down_stride + j)));
  return state + rounded(sum);
}

// Shared memory of a block that makes its columns of all rows.
struct PathRoom {
  float* down;  // [ROWS, rank], silu(A_1 x̂)
  num* up;      // the block's columns
};

// The block's columns of the weights, from before anything is awaited.
__device__ __forceinline__ void bring_up(const SkipPath& p, const PathRoom& room, int first, int end) {
  if (!p.up) return;
  const num* up = p.up + (long long)first * p.rank;
  const int count = (end - first) * p.rank, whole = p.rank % LANE_NUMS ? 0 : count / LANE_NUMS;
  ROLLED for (int k = threadIdx.x; k < whole; k += THREADS) copy_aside((uint4*)room.up + k, (const uint4*)up + k);
  ROLLED for (int i = whole * LANE_NUMS + threadIdx.x; i < count; i += THREADS) room.up[i] = up[i];
}

__device__ __forceinline__ void stage_down(const SkipPath& p, const PathRoom& room) {
  ROLLED for (int i = threadIdx.x; i < ROWS * p.rank; i += THREADS)
    room.down[i] = rounded(silu(read(p.down + i / p.rank * p.down_stride + i % p.rank)));
}

#define PATH_LANES 4  // neighbouring threads that share an output

// The state of this thread's first output.
__device__ __forceinline__ float first_state(const SkipPath& p, int first, int end) {
  const int i = threadIdx.x / PATH_LANES, b = i % ROWS;
  const bool mine = threadIdx.x % PATH_LANES == 0 && i < (end - first) * ROWS;
  return mine ? read(p.state_Bd + b * p.width + first + i / ROWS) : 0.f;
}

// The block's columns of the next layer's h where all rows skip this one. state: first_state.
__device__ __forceinline__ void pass_by(const SkipPath& p, const PathRoom& room, num* next_Bd, int first, int end,
                                        float state) {
  const int lane = threadIdx.x % PATH_LANES;
  const int count = (end - first) * ROWS;
  ROLLED for (int from = 0; from < count; from += THREADS / PATH_LANES) {
    const int i = from + threadIdx.x / PATH_LANES, b = i % ROWS, n = first + i / ROWS;
    if (from) state = i < count && lane == 0 ? read(p.state_Bd + b * p.width + n) : 0.f;
    float sum = 0.f;
    if (i < count)
#pragma unroll 4
      for (int j = lane; j < p.rank; j += PATH_LANES)
        sum += widen(room.up[(n - first) * p.rank + j]) * room.down[b * p.rank + j];
    ROLLED for (int k = PATH_LANES / 2; k; k /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, k);
    if (i < count && lane == 0) next_Bd[b * p.width + n] = narrow(state + rounded(sum));
  }
}

// The end of a layer that all rows skip.
struct SkipEnd {
  SkipPath path;
  num* out_Bd;
};

__device__ __forceinline__ void skip_end(const SkipEnd& s, Team& team, unsigned char* shared) {
  const PathRoom room = {(float*)shared, (num*)((float*)shared + (ROWS * s.path.rank + 3) / 4 * 4)};
  int first, end;
  columns_of(s.path.width, first, end);
  bring_up(s.path, room, first, end);
  await(team);
  const float state = first_state(s.path, first, end);
  stage_down(s.path, room);
  await_copies();
  __syncthreads();
  pass_by(s.path, room, s.out_Bd, first, end, state);
}
