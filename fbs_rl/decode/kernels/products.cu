// Products of a few rows with a weight matrix that is read once: the bulk of a decoding step.
//
// A block holds the input rows in shared memory, all columns or a part of them at a time, and has a contiguous share of
// the output rows. A warp takes OUT_ROWS of them at a time, or one of `splits` of their columns: a unit; with tensor
// cores all warps take OUT_ROWS rows together, each some of the columns. Weights are on their way long before
// (asking.cu), if the layer looked as if it ran. Sums meet in shared memory, where the output stage finds them.

struct Product {
  Weights weights;
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
  SkipPath path;  // LAYER_END: of the rows that skip
  float* best;  // LOGITS: the best of each block, [blocks, ROWS]
  int* best_index;
  const int* size_B;
  const float* sum_Bd;
  num* ring[2];
  int ring_length;
  int bare_from;  // BOTH: output rows from here on read the input without the norm's weight
  int keeps;      // 1: every block leaves its input in the room for a product behind, whose input is HELD
  const unsigned char* decision;  // a Decision that is taken when most weights are through; null: none
  int early;      // 1: what it reads was awaited before the call in front
};

// NORMED: weight * round(x / rms), as the backbone norms; PRENORMED: round(weight * x / rms), as nn.RMSNorm;
// UNIT: without weight; MEAN: sum / size. BOTH: NORMED, and UNIT for the last rows. HELD: what a product in front left in
// the room, for a call that is void where nobody runs.
enum Input { PLAIN, NORMED, UNIT, PRENORMED, MEAN, BOTH, HELD };
// STORE: W·x + b. AFFINE: b + s·W·x. RESIDUAL: r + W·x. LAYER_END: that, or the skip path. GATED: silu(W_1·x)·W_2·x.
// INJECT: r + s·W·x, or r where the row skips. LOGITS: with the best of each block. RING: into the ring of closed chunks.
enum Output { STORE, AFFINE, RESIDUAL, LAYER_END, GATED, INJECT, LOGITS, RING };

// --- input --------------------------------------------------------------------------------------------

// What a thread staged of a row, normed in place; BOTH: and without weight into `bare`.
__device__ __forceinline__ void norm_row(int input, num* x, num* bare, const num* norm, int columns, int from, int stride,
                                         float inverse) {
#pragma unroll 2
  for (int k = from; k < columns / LANE_NUMS; k += stride) {
    float v[LANE_NUMS], weight[LANE_NUMS];
    unpack(((const uint4*)x)[k], v);
    if (input != UNIT) unpack(((const uint4*)norm)[k], weight);
#pragma unroll
    for (int i = 0; i < LANE_NUMS; ++i) {
      v[i] *= inverse;
      if (input == NORMED || input == BOTH) v[i] = rounded(v[i]);
    }
    if (input == BOTH) ((uint4*)bare)[k] = pack(v);
    if (input != UNIT)
#pragma unroll
      for (int i = 0; i < LANE_NUMS; ++i) v[i] *= weight[i];
    ((uint4*)x)[k] = pack(v);
  }
}

#define WARPS_A_ROW (ROWS < WARPS ? WARPS / ROWS : 1)
#define ROWS_STAGED (WARPS / WARPS_A_ROW)  // at once
#define STAGED_AT_ONCE (WARPS_A_ROW == 1 ? 10 : 5)  // times 16 bytes of a lane

// A thread's part of a row into x; the sum of its squares.
__device__ __forceinline__ float stage_row(const Product& p, int b, num* row, int from, int stride) {
  const int columns = p.weights.columns;
  const uint4* source = (const uint4*)(p.input + b * p.input_stride);
  float square = 0.f;
#pragma unroll STAGED_AT_ONCE
  for (int k = from; k < columns / LANE_NUMS; k += stride) {
    const uint4 v = __ldcg(source + k);
    float wide[LANE_NUMS];
    unpack(v, wide);
#pragma unroll
    for (int i = 0; i < LANE_NUMS; ++i) square += wide[i] * wide[i];
    ((uint4*)row)[k] = v;
  }
  return square;
}

__device__ __forceinline__ void stage_mean(const Product& p, int b, num* row, int from, int stride) {
  const float size = fmaxf((float)__ldcg(p.size_B + b), 1.f);
#pragma unroll 4
  for (int k = from; k < p.weights.columns; k += stride)
    row[k] = narrow(__ldcg(p.sum_Bd + (long long)b * p.weights.columns + k) / size);
}

// The columns of one part of the input rows into x, `apart` numbers from row to row.
__device__ __forceinline__ void stage_part(const Product& p, int part, num* x, int apart) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, columns = p.weights.columns / p.weights.parts;
  ROLLED for (int b = warp / WARPS_A_ROW; b < ROWS; b += ROWS_STAGED) {
    const uint4* source = (const uint4*)(p.input + b * p.input_stride + part * columns);
#pragma unroll 4
    for (int k = warp % WARPS_A_ROW * WARP + lane; k < columns / LANE_NUMS; k += WARPS_A_ROW * WARP)
      copy_aside((uint4*)(x + b * apart) + k, source + k);
  }
  await_copies();
  __syncthreads();
}

// The input rows into x; one or more warps a row.
__device__ __forceinline__ void stage(const Product& p, int input, num* x, int apart, const num* norm, float* scratch) {
  if (TENSOR && input == PLAIN) {
    stage_part(p, 0, x, apart);
    return;
  }
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, columns = p.weights.columns;
  const int each = WARPS_A_ROW, at_once = ROWS_STAGED;
  ROLLED for (int b0 = 0; b0 < ROWS; b0 += at_once) {
    const int b = b0 + warp / each, from = warp % each * WARP + lane, stride = each * WARP;
    const bool mine = b < ROWS && warp / each < at_once;
    num* row = x + b * apart;
    float square = 0.f;
    if (mine && input == MEAN) stage_mean(p, b, row, from, stride);
    else if (mine) square = stage_row(p, b, row, from, stride);
    if (input == PLAIN || input == MEAN) continue;
    square = warp_sum(square);
    if (lane == 0) scratch[warp] = square;
    __syncthreads();
    square = 0.f;
    ROLLED for (int w = warp / each * each; w < warp / each * each + each && w < WARPS; ++w) square += scratch[w];
    if (mine) norm_row(input, row, row + ROWS * apart, norm, columns, from, stride, rsqrtf(square / columns + p.eps));
    __syncthreads();
  }
  __syncthreads();
}

// --- output -------------------------------------------------------------------------------------------

// What an output is added to and multiplied with; asked for before the weights are through.
struct Terms {
  float residual, bias, scale;
};

__device__ __forceinline__ Terms terms_of(const Product& p, int output, int b, int n) {
  Terms t = {};
  if (output == RESIDUAL || output == LAYER_END || output == INJECT) t.residual = read(p.residual_Bd + b * p.out_stride + n);
  if (p.bias_N) t.bias = widen(p.bias_N[n]);
  if (output == AFFINE) t.scale = widen(p.scale_N[n]);
  if (output == INJECT) t.scale = widen(p.strength[0]);
  return t;
}

// sum: of output row n; second: GATED only, of the other matrix. runs: some row runs.
__device__ __forceinline__ void finish(const Product& p, int output, int b, int n, float sum, float second,
                                       bool runs, const Terms& terms) {
  const long long at = b * p.out_stride + n;
  const bool skipped = !runs || (ROWS > 1 && (output == LAYER_END || output == INJECT) && skips(p.weights.skip_B, b));
  if (output == LAYER_END && skipped) {
    p.out[at] = narrow(skipped_output(p.path, b, n));
    return;
  }
  const float v = rounded(output == AFFINE || !p.bias_N ? sum : sum + terms.bias);
  if (output == STORE || output == LOGITS) p.out[at] = narrow(v);
  if (output == AFFINE) p.out[at] = narrow(terms.bias + v * terms.scale);
  if (output == RESIDUAL || output == LAYER_END) p.out[at] = narrow(terms.residual + v);
  if (output == GATED) p.out[at] = narrow(rounded(silu(v)) * rounded(second));
  if (output == INJECT) p.out[at] = narrow(skipped ? terms.residual : terms.residual + v * terms.scale);
  if (output == RING && __ldcg(p.weights.slot_B + b) >= 0) {
    const int half = n >= p.weights.rows[0], column = n - half * p.weights.rows[0];
    p.ring[half][((long long)b * p.ring_length + __ldcg(p.weights.slot_B + b)) * p.weights.rows[0] + column] = narrow(v);
  }
}

#define SUMS_AT_ONCE (TENSOR ? 4 : 1)

// The sum of row j of the groups (counted from the first), over its splits.
__device__ __forceinline__ float split_sum(int splits, const float* sums, int j, int b) {
  const int group = j / OUT_ROWS, r = j % OUT_ROWS;
  float sum = 0.f;
#pragma unroll SUMS_AT_ONCE
  for (int s = 0; s < splits; ++s) sum += sums[((group * splits + s) * OUT_ROWS + r) * ROWS + b];
  return sum;
}

// Keep the better of two (value, index); of equal values the lower index.
__device__ __forceinline__ void better(float& value, int& index, float other, int other_index) {
  if (other > value || (other == value && other_index < index)) {
    value = other;
    index = other_index;
  }
}

__device__ __forceinline__ void block_best(float value, int index, Fixed& fixed, float* best, int* best_at) {
#pragma unroll
  for (int d = 16; d; d >>= 1) {
    const float other = __shfl_xor_sync(0xffffffffu, value, d);
    better(value, index, other, __shfl_xor_sync(0xffffffffu, index, d));
  }
  __syncthreads();
  if (threadIdx.x % WARP == 0) {
    fixed.values[threadIdx.x / WARP] = value;
    fixed.indices[threadIdx.x / WARP] = index;
  }
  __syncthreads();
  if (threadIdx.x) return;
  ROLLED for (int w = 1; w < WARPS; ++w) better(value, index, fixed.values[w], fixed.indices[w]);
  *best = value;
  if (best_at) *best_at = index;
}

// goes_on: rows in front of these are done already.
__device__ __forceinline__ void output_stage(const Product& p, int output, const float* sums, int first_row, int count,
                                             bool goes_on, const Terms& early, Fixed& fixed) {
  const int splits = TENSOR ? WARPS : p.weights.splits;
  if (output == GATED) {
    ROLLED for (int i = threadIdx.x; i < count / 2 * ROWS; i += THREADS) {
      const int pair = i / ROWS, b = i % ROWS;
      // Groups of both sides in turns, or single rows of one and then of the other.
      const int one = OUT_ROWS > 1 ? pair / OUT_ROWS * OUT_ROWS + pair : pair;
      const int other = one + (OUT_ROWS > 1 ? OUT_ROWS : count / 2);
      finish(p, output, b, first_row / 2 + pair, split_sum(splits, sums, one, b), split_sum(splits, sums, other, b), true,
             early);
    }
  } else if (output == LOGITS) {
    ROLLED for (int b = 0; b < ROWS; ++b) {
      const int at = blockIdx.x * ROWS + b;
      const bool keeps = goes_on && threadIdx.x == 0;  // the best so far, which it wrote itself
      float value = keeps ? p.best[at] : MINUS_INFINITY;
      int index = keeps ? p.best_index[at] : 0x7fffffff;
      ROLLED for (int j = threadIdx.x; j < count; j += THREADS) {
        const float sum = split_sum(splits, sums, j, b);
        finish(p, output, b, first_row + j, sum, 0.f, true, terms_of(p, output, b, first_row + j));
        better(value, index, rounded(sum), first_row + j);
      }
      block_best(value, index, fixed, p.best + at, p.best_index + at);
    }
  } else {
    ROLLED for (int i = threadIdx.x; i < count * ROWS; i += THREADS) {
      const int b = i % ROWS, n = first_row + i / ROWS;
      const Terms terms = i < THREADS && !goes_on ? early : terms_of(p, output, b, n);
      finish(p, output, b, n, split_sum(splits, sums, i / ROWS, b), 0.f, true, terms);
    }
  }
}

// --- the product --------------------------------------------------------------------------------------

#define KEPT_ROWS (1024 / ROWS / 16 * 16)  // of a block, whose sums are kept at a time where each warp leaves one

// Units, or groups, in front of a decision: by then what lay in the rings at the start is used up, and as much as is read
// while nobody multiplies finds room.
__device__ __forceinline__ int before_deciding(int all) { return all * 5 / 8 / WARPS * WARPS; }

// The sums of the block's rows [first, end), whose weights come next. takes: the decision that the product takes along.
__device__ __forceinline__ void multiply_share(const Product& p, int first, int end, int bare, bool takes, Stream& s,
                                               num* x, int apart, float* sums, Team& team, Fixed& fixed,
                                               unsigned char* room) {
  const int groups = groups_of(p.weights, end - first), all = TENSOR ? groups : groups * p.weights.splits;
  ROLLED for (int part = 0; part < (TENSOR ? p.weights.parts : 1); ++part) {
#if TENSOR
    if (part) {
      __syncthreads();
      stage_part(p, part, x, apart);
    }
#endif
    int begin = 0, to = takes ? before_deciding(all) : all;
    ROLLED for (;;) {
#if TENSOR
      run_stream(p.weights, begin, to, part, bare, s, x, apart, sums);
#else
      run_stream(p.weights, begin, to, bare, s, x, sums);
#endif
      if (!takes) break;
      decide(*(const Decision*)fixed.decision, team, fixed, room);
      __syncthreads();
      takes = false;
      begin = to;
      to = all;
    }
  }
  __syncthreads();
}

__device__ __forceinline__ void product(const Product& p, int input, int output, int number, Stream& s, Team& team,
                                        Fixed& fixed, unsigned char* room) {
  const Weights& w = p.weights;
  num* x = (num*)room;
  const int apart = row_bytes(w.columns / (TENSOR ? w.parts : 1)) / (int)sizeof(num);
  num* norm = x + (input == BOTH ? 2 : 1) * ROWS * apart;
  float* sums = (float*)(norm + (p.norm ? w.columns : 0));
  int first, end;
  share_of(w, first, end);
  if (p.norm)
    ROLLED for (int k = threadIdx.x; k < w.columns / LANE_NUMS; k += THREADS)
      copy_aside((uint4*)norm + k, (const uint4*)p.norm + k);
  if (p.decision)
    ROLLED for (int k = threadIdx.x; k < DECISION_BYTES / 16; k += THREADS)
      copy_aside((uint4*)fixed.decision + k, (const uint4*)p.decision + k);
  await_copies();
  if (!p.early) await(team);
  bool takes = p.decision;  // also a block that has no part in the product
  if (first == end && !p.keeps && !takes) return;
  const bool runs = input == HELD || layer_runs(w.skip_B, team);
  if (idle(w, end, runs)) {
    pass(s, number, number + 1);
    if (output == INJECT)
      ROLLED for (int i = threadIdx.x; i < (end - first) * ROWS; i += THREADS) {
        const int b = i % ROWS, n = first + i / ROWS;
        finish(p, output, b, n, 0.f, 0.f, false, terms_of(p, output, b, n));
      }
    return;
  }
  if (!runs && w.kept_from > first) first = w.kept_from;
  if (first != end) meet(s, number, first);
  Terms early = {};
  if (output != LOGITS && output != GATED && (int)threadIdx.x < (end - first) * ROWS)
    early = terms_of(p, output, threadIdx.x % ROWS, first + threadIdx.x / ROWS);
  if (input != HELD) stage(p, input, x, apart, norm, fixed.scratch);
  if (first == end && !takes) return;
  const int bare = input == BOTH ? p.bare_from : 0x7fffffff;
  const int at_once = TENSOR && w.parts == 1 ? KEPT_ROWS : end - first;
  ROLLED for (int from = first, to; from < end || takes; from = to) {
    to = min(from + at_once, end);
    if (TENSOR && from != first) __syncthreads();
    multiply_share(p, from, to, bare - from, takes, s, x, apart, sums, team, fixed, room);
    takes = false;
    if (first == end) return;
    if (to == end) close_product(s);
    output_stage(p, output, sums, from, to - from, from != first, early, fixed);
  }
}
