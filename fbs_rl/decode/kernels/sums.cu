// Sums of a product: the weights that arrive times the input rows in shared memory.

#define PIECES_AT_ONCE (ROWS * OUT_ROWS == 1 ? 5 : 1)  // of 16 bytes a lane

#if TENSOR
#define LOADED 5  // times 16 bytes of a lane, of a row's chunk

// A piece's products with the input rows, of which lane l gets rows l / 4 and l / 4 + 8 with the weights of rows 2 (l % 4)
// and the next. Columns go to the warps by 32 in turns, and in any order into a product of matrices, as long as both sides
// have the same: so a lane loads eight of them at once. What lies where there is no row spoils no other row's product.
__device__ __forceinline__ void multiply(int chunk, const num* x, int apart, const num* weight, float sum[2][4]) {
  const int lane = threadIdx.x % WARP, row = lane / 4, own = lane % 4 * 8;
  weight += row * (row_bytes(chunk) / (int)sizeof(num));
  const num* upper_x = x + min(row, ROWS - 1) * apart;
  const num* lower_x = x + min(row + 8, ROWS - 1) * apart;
  ROLLED for (int k = threadIdx.x / WARP * 32; k < chunk; k += LOADED * WARPS * 32) {
    uint4 w[LOADED], upper[LOADED], lower[LOADED];
#pragma unroll
    for (int i = 0; i < LOADED; ++i) {
      const int at = k + i * WARPS * 32 + own;
      w[i] = upper[i] = lower[i] = make_uint4(0, 0, 0, 0);
      if (at >= chunk) continue;
      w[i] = *(const uint4*)(weight + at);
      upper[i] = *(const uint4*)(upper_x + at);
      if (ROWS > 8) lower[i] = *(const uint4*)(lower_x + at);
    }
#pragma unroll
    for (int i = 0; i < LOADED; ++i) {
      const uint4 u = upper[i], l = lower[i];
      const u32 a[2][4] = {{u.x, l.x, u.y, l.y}, {u.z, l.z, u.w, l.w}}, b[2][2] = {{w[i].x, w[i].y}, {w[i].z, w[i].w}};
      multiply_matrices(sum[0], a[0], b[0]);
      multiply_matrices(sum[1], a[1], b[1]);
    }
  }
}

// What a warp's share of a group's columns gave, to what it kept of other parts; from the group's row `cut` on what
// the other inputs gave.
__device__ __forceinline__ void keep_sums(const float sum[2][4], const float other[2][4], int cut, bool adds, float* sums) {
  const int lane = threadIdx.x % WARP;
#pragma unroll
  for (int i = 0; i < (ROWS > 8 ? 4 : 2); ++i) {
    const int b = lane / 4 + i / 2 * 8, r = lane % 4 * 2 + i % 2;
    const float made = r < cut ? sum[0][i] + sum[1][i] : other[0][i] + other[1][i];
    float& kept = sums[r * ROWS + b];
    if (b < ROWS) kept = adds ? kept + made : made;
  }
}

// A warp's share of a part of the groups [begin, end); their sums into sums[(group, warp, OUT_ROWS, ROWS)]. From the block's
// row `bare` on the inputs are those behind the first ones.
__device__ __forceinline__ void run_stream(const Weights& given, int begin, int end, int part, int bare, Stream& s,
                                           const num* x, int apart, float* sums) {
  const Weights w = given;  // in registers
  const int bytes = OUT_ROWS * row_bytes(w.chunk);
  sums += (begin * WARPS + threadIdx.x / WARP) * OUT_ROWS * ROWS;
  ROLLED for (int group = begin; group < end; ++group, sums += WARPS * OUT_ROWS * ROWS) {
    const int cut = bare - group * OUT_ROWS;
    float sum[2][4] = {}, other[2][4] = {};
    ROLLED for (int chunk = 0; chunk < w.unit_chunks; ++chunk) {
      const num* weight = await_piece(s, bytes);
      const num* from = x + chunk * w.chunk;
      if (cut > 0) multiply(w.chunk, from, apart, weight, sum);
      if (cut < OUT_ROWS) multiply(w.chunk, from + ROWS * apart, apart, weight, other);
      leave_piece(s, bytes);
    }
    keep_sums(sum, other, cut, part, sums);
  }
}
#else
struct Sum {
  float made[OUT_ROWS][ROWS];
};

__device__ __forceinline__ void multiply(const Weights& w, const num* x, const num* weight, Sum& sum) {
#pragma unroll PIECES_AT_ONCE
  for (int k = threadIdx.x % WARP * LANE_NUMS; k < w.chunk; k += WARP * LANE_NUMS) {
    float v[OUT_ROWS][LANE_NUMS];
#pragma unroll
    for (int r = 0; r < OUT_ROWS; ++r) unpack(*(const uint4*)(weight + r * w.chunk + k), v[r]);
#pragma unroll
    for (int b = 0; b < ROWS; ++b) {
      float u[LANE_NUMS];
      unpack(*(const uint4*)(x + b * w.columns + k), u);
#pragma unroll
      for (int r = 0; r < OUT_ROWS; ++r)
#pragma unroll
        for (int i = 0; i < LANE_NUMS; ++i) sum.made[r][b] = fmaf(v[r][i], u[i], sum.made[r][b]);
    }
  }
}

__device__ __forceinline__ void leave_sum(const Sum& sum, float* sums) {
  const int lane = threadIdx.x % WARP;
#pragma unroll
  for (int r = 0; r < OUT_ROWS; ++r)
#pragma unroll
    for (int b = 0; b < ROWS; ++b) {
      const float whole = warp_sum(sum.made[r][b]);
      if (lane == (r * ROWS + b) % WARP) sums[r * ROWS + b] = whole;
    }
}

// A warp's share of the units [begin, end); their sums into sums[(unit, OUT_ROWS, ROWS)]. From the block's row `bare` on
// the inputs are those behind the first ones.
__device__ __forceinline__ void run_stream(const Weights& given, int begin, int end, int bare, Stream& s, const num* x,
                                           float* sums) {
  const Weights w = given;  // in registers
  const int bytes = OUT_ROWS * w.chunk * sizeof(num), length = w.unit_chunks * w.chunk;
  const int at = begin + threadIdx.x / WARP, group_step = WARPS / w.splits, split_step = WARPS % w.splits;
  int group = at / w.splits, split = at % w.splits;
  ROLLED for (int unit = at; unit < end; unit += WARPS) {
    const num* from = x + split * length + (group * OUT_ROWS >= bare ? ROWS * w.columns : 0);
    Sum sum = {};
    ROLLED for (int chunk = 0; chunk < w.unit_chunks; ++chunk, from += w.chunk) {
      multiply(w, from, await_piece(s, bytes), sum);
      leave_piece(s, bytes);
    }
    leave_sum(sum, sums + unit * OUT_ROWS * ROWS);
    group += group_step;
    split += split_step;
    if (split >= w.splits) {
      split -= w.splits;
      ++group;
    }
  }
}
#endif
