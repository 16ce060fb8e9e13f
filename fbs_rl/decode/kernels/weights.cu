// Weights on their way: what a block asks the copy engine for, long before a product's turn.

#define MOST_SLOTS 16

// What a block needs to know to ask for a product's weights.
struct Weights {
  const num* matrix[3];  // output rows come from up to three matrices, one behind the other
  int rows[3];
  int columns;
  int blocks;  // that share the output rows
  int splits;
  int chunk;  // columns of a slot
  int unit_chunks;
  int slots;   // of a warp
  int paired;  // 1: the rows of two matrices in turns
  int kept_from;      // rows from here on are wanted although nobody runs the layer; -1: none are
  const int* skip_B;  // null: every row runs
  const int* slot_B;  // place of the chunk that a row closes, -1: it closes none; null: not asked
};

__device__ __forceinline__ int row_count(const Weights& w) { return w.rows[0] + w.rows[1] + w.rows[2]; }

__device__ __forceinline__ const num* weight_row(const Weights& w, int row) {
  if (w.paired) row = row % 2 * w.rows[0] + row / 2;  // a gate row, then its up row
  if (row < w.rows[0]) return w.matrix[0] + (long long)row * w.columns;
  row -= w.rows[0];
  if (row < w.rows[1]) return w.matrix[1] + (long long)row * w.columns;
  return w.matrix[2] + (long long)(row - w.rows[1]) * w.columns;
}

// A warp's weights come through its own ring of slots in shared memory, a chunk of OUT_ROWS rows in each. Each slot
// has a lane that asks the copy engine for what comes into it, so that the first chunks are all asked for at once; as far
// ahead as there are slots, across the bounds of units. Lanes count along: divisions cost more than products.

struct Stream {
  num* ring;      // of this warp
  u64* arrivals;  // one barrier a slot
  u32 parities;   // of the barriers, a bit each: what their next arrival is
  int call;       // whose weights these are; -1: nobody's
  int first;      // group of output rows that the block begins with
  int count;      // chunks that the warp reads in all
  int slots;      // in use
  // of this lane's slot: the next chunk's number, its unit, its place in the unit, and what they rise by
  int number, unit, chunk;
  int unit_step, chunk_step;
};

// Ask for the next chunk of this lane's slot, if there is one.
__device__ __forceinline__ void ask(const Weights& w, Stream& s) {
  if (s.number >= s.count) return;
  const int slot = threadIdx.x % WARP, last = row_count(w) - 1, group = s.first + s.unit / w.splits;
  const int column = (s.unit % w.splits * w.unit_chunks + s.chunk) * w.chunk;
  num* to = s.ring + slot * OUT_ROWS * w.chunk;
  expect_bytes(s.arrivals + slot, OUT_ROWS * w.chunk * sizeof(num));
#pragma unroll
  for (int r = 0; r < OUT_ROWS; ++r)
    copy_ahead(to + r * w.chunk, weight_row(w, min(group * OUT_ROWS + r, last)) + column, w.chunk * sizeof(num),
               s.arrivals + slot);
  s.number += s.slots;
  s.unit += s.unit_step;
  s.chunk += s.chunk_step;
  if (s.chunk >= w.unit_chunks) {
    s.chunk -= w.unit_chunks;
    s.unit += WARPS;
  }
}

__device__ __forceinline__ void await_slot(Stream& s, int slot) {
  wait_barrier(s.arrivals + slot, s.parities >> slot & 1);
  s.parities ^= 1u << slot;
}

// Begin a stream over the groups [first, end).
__device__ __forceinline__ void open(const Weights& w, Stream& s, int call, int first, int end) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, units = (end - first) * w.splits;
  s.call = call;
  s.first = first;
  s.count = units > warp ? ((units - warp - 1) / WARPS + 1) * w.unit_chunks : 0;
  s.slots = w.slots;
  s.number = lane;
  s.unit = warp + lane / w.unit_chunks * WARPS;
  s.chunk = lane % w.unit_chunks;
  s.unit_step = w.slots / w.unit_chunks * WARPS;
  s.chunk_step = w.slots % w.unit_chunks;
  __syncwarp();
  if (lane < w.slots) ask(w, s);
  __syncwarp();
}

// Wait for what was asked for and is not wanted.
__device__ __forceinline__ void drop(Stream& s) {
  ROLLED for (int slot = 0; slot < min(s.slots, s.count); ++slot) await_slot(s, slot);
  s.call = -1;
}

// The groups of output rows that this block has, [first, end).
__device__ __forceinline__ void share_of(const Weights& w, int& first, int& end) {
  const int step = w.paired && OUT_ROWS == 1 ? 2 : 1;  // a pair stays together
  const int groups = (row_count(w) + OUT_ROWS - 1) / OUT_ROWS / step, block = min((int)blockIdx.x, w.blocks);
  first = step * (int)((long long)groups * block / w.blocks);
  end = step * (int)((long long)groups * min(block + 1, w.blocks) / w.blocks);
}

// Whether a block whose groups end before `end` has nothing to multiply. runs: some row runs the layer.
__device__ __forceinline__ bool idle(const Weights& w, int end, bool runs) {
  if (w.slot_B) {
    ROLLED for (int b = 0; b < ROWS; ++b)
      if (__ldcg(w.slot_B + b) >= 0) return false;
    return true;
  }
  return !runs && (w.kept_from < 0 || min(end * OUT_ROWS, row_count(w)) <= w.kept_from);
}

// Ask for the first weights of a call whose turn comes later. The flags may still be those of the token before: then
// this asks for what is not wanted, or for nothing.
__device__ __forceinline__ void look_ahead(const Weights& w, int call, Stream& s, Team& team) {
  int first, end;
  share_of(w, first, end);
  if (first < end && !idle(w, end, layer_runs(w.skip_B, team))) open(w, s, call, first, end);
}

// The beginning of a block's share of a product whose turn comes still later, into the second cache.
__device__ __forceinline__ void bring_share_near(const Weights& w, int most_bytes, Team& team) {
  int first, end;
  share_of(w, first, end);
  if (first == end || idle(w, end, layer_runs(w.skip_B, team))) return;
  const int bytes = w.columns * sizeof(num), last = min(end * OUT_ROWS, row_count(w));
  const int near = min(last, first * OUT_ROWS + most_bytes / bytes);
  ROLLED for (int row = first * OUT_ROWS + threadIdx.x; row < near; row += THREADS) bring_near(weight_row(w, row), bytes);
}
