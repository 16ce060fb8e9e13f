// Products of a few rows with a weight matrix that is read once: the bulk of a decoding step.
//
// A block holds the input rows in shared memory and has a contiguous share of the output rows. A warp takes
// OUT_ROWS of them at a time, or one of `splits` parts of their length: a unit. The copy engine brings its
// weights, the first of them while the kernel in front still runs (await), if the layer looks as if it ran.
// Sums meet in shared memory, where the output stage finds them.

#define PRODUCT_WARPS 8
#define MOST_SLOTS 8

struct Product {
  const num* weight[3];  // output rows come from up to three matrices, one behind the other
  int rows[3];
  int columns;
  int splits;
  int chunk;  // columns of a slot
  int unit_chunks;
  int slots;  // of a warp
  int kept_from;      // rows from here on are wanted although nobody runs the layer; -1: none are
  const int* skip_B;  // null: every row runs
  const num* input;
  long long input_stride;
  const num* norm;
  float eps;
  num* out;
  long long out_stride;
  const num* residual_Bd;
  const num* bias_N;
  const num* scale_N;
  const num* strength;
  // skip path of the rows that skip: state + up·silu(down); null up: the state
  const num* state_Bd;
  const num* adapter_up;
  const num* adapter_down;
  long long down_stride;
  int adapter_rank;
  const float* prior_N;
  float* wide_out;  // SCORED: the scores; LOGITS: the best of each block, [blocks, ROWS]
  int* best_index;
  const int* slot_B;  // place of the chunk that a row closes, -1: it closes none; null: not asked
  const int* size_B;
  const float* sum_Bd;
  num* ring[2];
  int ring_length;
};

// NORMED: weight * round(x / rms), as the backbone norms; PRENORMED: round(weight * x / rms), as nn.RMSNorm;
// UNIT: without weight; MEAN: sum / size.
enum Input { PLAIN, NORMED, UNIT, PRENORMED, MEAN };
// STORE: W·x + b. AFFINE: b + s·W·x. RESIDUAL: r + W·x. LAYER_END: that, or the skip path. GATED: silu(W_1·x)·W_2·x.
// INJECT: r + s·W·x, or r where the row skips. SCORED: float32, plus a prior. LOGITS: with the best of each
// block. RING: into the ring of closed chunks.
enum Output { STORE, AFFINE, RESIDUAL, LAYER_END, GATED, INJECT, SCORED, LOGITS, RING };

__device__ __forceinline__ int row_count(const Product& p) { return p.rows[0] + p.rows[1] + p.rows[2]; }

__device__ __forceinline__ const num* weight_row(const Product& p, int row) {
  if (row < p.rows[0]) return p.weight[0] + (long long)row * p.columns;
  row -= p.rows[0];
  if (row < p.rows[1]) return p.weight[1] + (long long)row * p.columns;
  return p.weight[2] + (long long)(row - p.rows[1]) * p.columns;
}

// --- input --------------------------------------------------------------------------------------------

template <int INPUT>
__device__ __forceinline__ void norm_row(const Product& p, num* x, const num* norm, int from, int stride, float square) {
  if (INPUT == PLAIN || INPUT == MEAN) return;
  const float inverse = rsqrtf(square / p.columns + p.eps);
  for (int k = from; k < p.columns; k += stride) {
    float v = widen(x[k]) * inverse;
    if (INPUT == NORMED) v = rounded(v) * widen(norm[k]);
    if (INPUT == PRENORMED) v = v * widen(norm[k]);
    x[k] = narrow(v);
  }
}

// The input rows into x; one or more warps a row.
template <int INPUT>
__device__ __forceinline__ void stage(const Product& p, num* x, const num* norm, float* scratch) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
  const int each = max(1, warps / ROWS), at_once = warps / each;
  for (int b0 = 0; b0 < ROWS; b0 += at_once) {
    const int b = b0 + warp / each;
    const bool mine = b < ROWS && warp / each < at_once;
    const int from = (warp % each) * WARP + lane, stride = each * WARP;
    num* row = x + b * p.columns;
    float square = 0.f;
    if (mine && INPUT == MEAN) {
      const float size = fmaxf((float)__ldcg(p.size_B + b), 1.f);
      for (int k = from; k < p.columns; k += stride)
        row[k] = narrow(__ldcg(p.sum_Bd + (long long)b * p.columns + k) / size);
    } else if (mine) {
      const uint4* source = (const uint4*)(p.input + b * p.input_stride);
      for (int k = from; k < p.columns / LANE_NUMS; k += stride) {
        const uint4 v = __ldcg(source + k);
        float wide[LANE_NUMS];
        unpack(v, wide);
#pragma unroll
        for (int i = 0; i < LANE_NUMS; ++i) square += wide[i] * wide[i];
        *(uint4*)(row + k * LANE_NUMS) = v;
      }
    }
    square = warp_sum(square);
    if (lane == 0) scratch[warp] = square;
    __syncthreads();
    square = 0.f;
    for (int w = warp / each * each; w < warp / each * each + each && w < warps; ++w) square += scratch[w];
    if (mine) norm_row<INPUT>(p, row, norm, from, stride, square);
    __syncthreads();
  }
}

// --- output -------------------------------------------------------------------------------------------

// What a row that skips has at place n.
__device__ __forceinline__ float skipped_output(const Product& p, int b, int n) {
  const float state = read(p.state_Bd + b * p.out_stride + n);
  if (!p.adapter_up) return state;
  float sum = 0.f;
  for (int j = 0; j < p.adapter_rank; ++j)
    sum += widen(p.adapter_up[(long long)n * p.adapter_rank + j]) *
           rounded(silu(read(p.adapter_down + b * p.down_stride + j)));
  return state + rounded(sum);
}

// sum: of output row n; second: GATED only, of the other matrix.
template <int OUTPUT>
__device__ __forceinline__ void finish(const Product& p, int b, int n, float sum, float second) {
  const long long at = b * p.out_stride + n;
  if (OUTPUT == LAYER_END && skips(p.skip_B, b)) {
    p.out[at] = narrow(skipped_output(p, b, n));
    return;
  }
  const float v = rounded(OUTPUT == AFFINE || !p.bias_N ? sum : sum + widen(p.bias_N[n]));
  if (OUTPUT == STORE || OUTPUT == LOGITS) p.out[at] = narrow(v);
  if (OUTPUT == AFFINE) p.out[at] = narrow(widen(p.bias_N[n]) + v * widen(p.scale_N[n]));
  if (OUTPUT == RESIDUAL || OUTPUT == LAYER_END) p.out[at] = narrow(read(p.residual_Bd + at) + v);
  if (OUTPUT == GATED) p.out[at] = narrow(rounded(silu(v)) * rounded(second));
  if (OUTPUT == SCORED) p.wide_out[at] = v + p.prior_N[n];
  if (OUTPUT == INJECT) {
    const float state = read(p.residual_Bd + at);
    p.out[at] = skips(p.skip_B, b) ? narrow(state) : narrow(state + v * widen(p.strength[0]));
  }
  if (OUTPUT == RING && __ldcg(p.slot_B + b) >= 0) {
    const int half = n >= p.rows[0], column = n - half * p.rows[0];
    p.ring[half][((long long)b * p.ring_length + __ldcg(p.slot_B + b)) * p.rows[0] + column] = narrow(v);
  }
}

// The sum of a block's output row j (counted from its first), over its parts.
__device__ __forceinline__ float part_sum(const Product& p, const float* sums, int j, int b) {
  const int group = j / OUT_ROWS, r = j % OUT_ROWS;
  float sum = 0.f;
  for (int s = 0; s < p.splits; ++s) sum += sums[((group * p.splits + s) * OUT_ROWS + r) * ROWS + b];
  return sum;
}

// Keep the better of two (value, index); of equal values the lower index.
__device__ __forceinline__ void better(float& value, int& index, float other, int other_index) {
  if (other > value || (other == value && other_index < index)) {
    value = other;
    index = other_index;
  }
}

__device__ __forceinline__ void block_best(float value, int index, float* best, int* best_at) {
  __shared__ float values[32];
  __shared__ int indices[32];
#pragma unroll
  for (int d = 16; d; d >>= 1) {
    const float other = __shfl_xor_sync(0xffffffffu, value, d);
    better(value, index, other, __shfl_xor_sync(0xffffffffu, index, d));
  }
  __syncthreads();
  if (threadIdx.x % WARP == 0) {
    values[threadIdx.x / WARP] = value;
    indices[threadIdx.x / WARP] = index;
  }
  __syncthreads();
  if (threadIdx.x) return;
  for (int w = 1; w < (int)(blockDim.x / WARP); ++w) better(value, index, values[w], indices[w]);
  *best = value;
  *best_at = index;
}

template <int OUTPUT>
__device__ __forceinline__ void output_stage(const Product& p, const float* sums, int first_row, int count) {
  if (OUTPUT == GATED) {
    for (int i = threadIdx.x; i < count / 2 * ROWS; i += blockDim.x) {
      const int pair = i / ROWS, b = i % ROWS;
      finish<OUTPUT>(p, b, first_row / 2 + pair, part_sum(p, sums, 2 * pair, b), part_sum(p, sums, 2 * pair + 1, b));
    }
  } else if (OUTPUT == LOGITS) {
    for (int b = 0; b < ROWS; ++b) {
      float value = MINUS_INFINITY;
      int index = 0x7fffffff;
      for (int j = threadIdx.x; j < count; j += blockDim.x) {
        const float sum = part_sum(p, sums, j, b);
        finish<OUTPUT>(p, b, first_row + j, sum, 0.f);
        better(value, index, rounded(sum), first_row + j);
      }
      block_best(value, index, p.wide_out + blockIdx.x * ROWS + b, p.best_index + blockIdx.x * ROWS + b);
    }
  } else {
    for (int i = threadIdx.x; i < count * ROWS; i += blockDim.x)
      finish<OUTPUT>(p, i % ROWS, first_row + i / ROWS, part_sum(p, sums, i / ROWS, i % ROWS), 0.f);
  }
}

// --- weights on their way -----------------------------------------------------------------------------

// A warp's weights come through its own ring of slots in shared memory, a chunk of OUT_ROWS rows in each. Lane 0
// asks the copy engine for them, as far ahead as there are slots, across the bounds of units. Both ends count
// along: divisions for every chunk cost more than its products.

struct Cursor {
  int unit;
  int chunk;  // of the unit
  int slot;
  int phase;  // of the slot's barrier
};

__device__ __forceinline__ void move_on(const Product& p, Cursor& c) {
  if (++c.slot == p.slots) {
    c.slot = 0;
    c.phase ^= 1;
  }
  if (++c.chunk == p.unit_chunks) {
    c.chunk = 0;
    c.unit += PRODUCT_WARPS;
  }
}

struct Stream {
  num* slots;                   // of this warp
  u64* arrivals;                // one barrier a slot
  int first;                    // group of output rows that the block begins with
  int units;                    // of the block
  int count;                    // chunks that the warp reads in all
  int to_ask;                   // of them
  Cursor asked;                 // where lane 0 is
  const num* source[OUT_ROWS];  // what it asks for next
};

// Ask for the next chunk. Lane 0 only.
template <int OUTPUT>
__device__ __forceinline__ void ask(const Product& p, Stream& s) {
  Cursor& c = s.asked;
  if (c.chunk == 0) {
    const int total = row_count(p), group = s.first + c.unit / p.splits;
    const int column = c.unit % p.splits * p.unit_chunks * p.chunk;
#pragma unroll
    for (int r = 0; r < OUT_ROWS; ++r) {
      int row = min(group * OUT_ROWS + r, total - 1);
      if (OUTPUT == GATED) row = row % 2 * p.rows[0] + row / 2;  // a gate row, then its up row
      s.source[r] = weight_row(p, row) + column;
    }
  }
  num* slot = s.slots + c.slot * OUT_ROWS * p.chunk;
  expect_bytes(s.arrivals + c.slot, OUT_ROWS * p.chunk * sizeof(num));
#pragma unroll
  for (int r = 0; r < OUT_ROWS; ++r) {
    copy_ahead(slot + r * p.chunk, s.source[r], p.chunk * sizeof(num), s.arrivals + c.slot);
    s.source[r] += p.chunk;
  }
  move_on(p, c);
  --s.to_ask;
}

// Begin a stream over the groups [first, end), with barriers that were not used before.
template <int OUTPUT>
__device__ __forceinline__ Stream open(const Product& p, num* slots, u64* arrivals, int first, int end) {
  const int warp = threadIdx.x / WARP;
  Stream s;
  s.slots = slots + warp * p.slots * OUT_ROWS * p.chunk;
  s.arrivals = arrivals + warp * MOST_SLOTS;
  s.first = first;
  s.units = (end - first) * p.splits;
  s.count = s.units > warp ? ((s.units - warp - 1) / PRODUCT_WARPS + 1) * p.unit_chunks : 0;
  s.to_ask = s.count;
  s.asked = {warp, 0, 0, 0};
  if (threadIdx.x % WARP == 0) {
    for (int i = 0; i < p.slots; ++i) make_barrier(s.arrivals + i);
    show_barriers();
    for (int i = 0; i < p.slots && s.to_ask > 0; ++i) ask<OUTPUT>(p, s);
  }
  __syncwarp();
  return s;
}

// Wait for what was asked for and is not wanted: copies must not arrive in the memory of a later block.
__device__ __forceinline__ void drop(const Product& p, const Stream& s) {
  for (int q = 0; q < min(p.slots, s.count); ++q) wait_barrier(s.arrivals + q, 0);
}

__device__ __forceinline__ void multiply(const Product& p, const num* x, const num* weight, int column,
                                         float acc[OUT_ROWS][ROWS]) {
  for (int k = threadIdx.x % WARP * LANE_NUMS; k < p.chunk; k += WARP * LANE_NUMS) {
    float w[OUT_ROWS][LANE_NUMS];
#pragma unroll
    for (int r = 0; r < OUT_ROWS; ++r) unpack(*(const uint4*)(weight + r * p.chunk + k), w[r]);
#pragma unroll
    for (int b = 0; b < ROWS; ++b) {
      float v[LANE_NUMS];
      unpack(*(const uint4*)(x + b * p.columns + column + k), v);
#pragma unroll
      for (int r = 0; r < OUT_ROWS; ++r)
#pragma unroll
        for (int i = 0; i < LANE_NUMS; ++i) acc[r][b] = fmaf(w[r][i], v[i], acc[r][b]);
    }
  }
}

// All of a warp's units; their sums into sums[(unit, OUT_ROWS, ROWS)].
template <int OUTPUT>
__device__ __forceinline__ void run_stream(const Product& p, Stream& s, const num* x, float* sums) {
  const int lane = threadIdx.x % WARP;
  float acc[OUT_ROWS][ROWS] = {};
  Cursor c = {(int)threadIdx.x / WARP, 0, 0, 0};
  int column = 0;
  if (s.count == 0) allow_next();
  for (int left = s.count; left > 0; --left) {
    // All is asked for: from here on the next kernel's weights can fill the gap between the two.
    if (left == min(p.slots, s.count)) allow_next();
    if (c.chunk == 0) column = c.unit % p.splits * p.unit_chunks * p.chunk;
    wait_barrier(s.arrivals + c.slot, c.phase);
    multiply(p, x, s.slots + c.slot * OUT_ROWS * p.chunk, column, acc);
    __syncwarp();
    if (lane == 0 && s.to_ask > 0) ask<OUTPUT>(p, s);
    column += p.chunk;
    const int unit = c.unit;
    move_on(p, c);
    if (c.chunk) continue;
#pragma unroll
    for (int r = 0; r < OUT_ROWS; ++r)
#pragma unroll
      for (int b = 0; b < ROWS; ++b) {
        const float sum = warp_sum(acc[r][b]);
        acc[r][b] = 0.f;
        if (lane == (r * ROWS + b) % WARP) sums[(unit * OUT_ROWS + r) * ROWS + b] = sum;
      }
  }
}

// --- the product --------------------------------------------------------------------------------------

// Whether a block whose rows end before end_row has nothing to multiply.
__device__ __forceinline__ bool idle(const Product& p, int end_row) {
  if (p.slot_B) {
    for (int b = 0; b < ROWS; ++b)
      if (__ldcg(p.slot_B + b) >= 0) return false;
    return true;
  }
  return !any_runs(p.skip_B) && (p.kept_from < 0 || end_row <= p.kept_from);
}

template <int INPUT, int OUTPUT>
__device__ __forceinline__ void product(const Product& p) {
  __shared__ float scratch[32];
  __shared__ u64 arrivals[2 * PRODUCT_WARPS * MOST_SLOTS];
  num* slots = (num*)shared;
  num* x = slots + PRODUCT_WARPS * p.slots * OUT_ROWS * p.chunk;
  num* norm = x + ROWS * p.columns;
  float* sums = (float*)(norm + (p.norm ? p.columns : 0));
  const int total = row_count(p), groups = (total + OUT_ROWS - 1) / OUT_ROWS;
  int first = (int)((long long)groups * blockIdx.x / gridDim.x);
  const int end = (int)((long long)groups * (blockIdx.x + 1) / gridDim.x);
  const int end_row = min(end * OUT_ROWS, total);
  // The flag may still be that of the token before: then this asks for what is not wanted, or for nothing.
  const bool opened = !idle(p, end_row);
  Stream s;
  if (opened) s = open<OUTPUT>(p, slots, arrivals, first, end);
  if (p.norm)
    for (int k = threadIdx.x; k < p.columns; k += blockDim.x) norm[k] = p.norm[k];
  await();
  if (idle(p, end_row)) {
    if (OUTPUT == LAYER_END || OUTPUT == INJECT)
      for (int i = threadIdx.x; i < (end_row - first * OUT_ROWS) * ROWS; i += blockDim.x)
        finish<OUTPUT>(p, i % ROWS, first * OUT_ROWS + i / ROWS, 0.f, 0.f);
    if (opened) drop(p, s);
    return;
  }
  const bool kept_only = p.kept_from > first * OUT_ROWS && !any_runs(p.skip_B);
  if (opened && kept_only) drop(p, s);
  if (kept_only) first = p.kept_from / OUT_ROWS;
  if (kept_only || !opened) s = open<OUTPUT>(p, slots, arrivals + PRODUCT_WARPS * MOST_SLOTS, first, end);
  stage<INPUT>(p, x, norm, scratch);
  run_stream<OUTPUT>(p, s, x, sums);
  __syncthreads();
  output_stage<OUTPUT>(p, sums, first * OUT_ROWS, end_row - first * OUT_ROWS);
}

#define PRODUCT(name, INPUT, OUTPUT) \
  extern "C" __global__ void __launch_bounds__(WARP * PRODUCT_WARPS, 2) name(Product p) { product<INPUT, OUTPUT>(p); }

PRODUCT(product_front, UNIT, AFFINE)
PRODUCT(product_qkv, NORMED, STORE)
PRODUCT(product_attention_out, PLAIN, RESIDUAL)
PRODUCT(product_gate_up, NORMED, GATED)
PRODUCT(product_down, PLAIN, LAYER_END)
PRODUCT(product_logits, NORMED, LOGITS)
PRODUCT(product_plain, PLAIN, STORE)
PRODUCT(product_scores, PLAIN, SCORED)
PRODUCT(product_inject_preview, PRENORMED, INJECT)
PRODUCT(product_inject_chunks, PLAIN, INJECT)
PRODUCT(product_summary, MEAN, STORE)
PRODUCT(product_ring, PLAIN, RING)
