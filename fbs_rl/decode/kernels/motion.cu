// How a layer moved the residual stream: δ and cos of the states around it, which the gates read (SPEC 4).

// Two neighbouring numbers.
#if BF16
typedef u32 pair;
__device__ __forceinline__ void widen_pair(pair v, float out[2]) {
  out[0] = __uint_as_float(v << 16);
  out[1] = __uint_as_float(v & 0xffff0000u);
}
#else
typedef uint2 pair;
__device__ __forceinline__ void widen_pair(pair v, float out[2]) {
  out[0] = __uint_as_float(v.x);
  out[1] = __uint_as_float(v.y);
}
#endif

// That find what a row's motion is made of. Of one row half of them: the others weigh the preview meanwhile.
#define MOTION_WARPS (ROWS == 1 ? WARPS / 2 : ROWS < WARPS ? WARPS / ROWS : 1)

#define PAIRS_AT_ONCE 10

// What motion is made of, into fixed: sums of every row by one or more warps; what it was, and whether that stays so, as
// of rows that skipped the layer in front.
__device__ __forceinline__ void measure_motion(const num* before_Bd, const num* after_Bd, const int* left_skip_B, int width,
                                               const float* motion_B2, Fixed& fixed) {
  const int lane = threadIdx.x % WARP;
  const int each = MOTION_WARPS, at_once = max(1, (ROWS == 1 ? WARPS / 2 : WARPS) / each);
  const int warp = (int)(threadIdx.x / WARP) - (ROWS == 1 ? WARPS - each : 0);
  ROLLED for (int b0 = 0; b0 < ROWS; b0 += at_once) {
    const int b = b0 + warp / each;
    if (warp < 0 || b >= ROWS || warp / each >= at_once) continue;
    float sum[4] = {};
    if (warp % each == 0 && lane < 2) {
      fixed.values[2 * b + lane] = __ldcg(motion_B2 + 2 * b + lane);
      fixed.indices[b] = !before_Bd || skips(left_skip_B, b);
    }
    if (before_Bd)
      ROLLED for (int k = warp % each * WARP + lane; k < width / 2; k += PAIRS_AT_ONCE * each * WARP) {
        const pair *before = (const pair*)(before_Bd + b * width) + k, *after = (const pair*)(after_Bd + b * width) + k;
        pair held[PAIRS_AT_ONCE][2] = {};
#pragma unroll
        for (int j = 0; j < PAIRS_AT_ONCE; ++j)
          if (k + j * each * WARP < width / 2) {
            held[j][0] = __ldcg(before + j * each * WARP);
            held[j][1] = __ldcg(after + j * each * WARP);
          }
#pragma unroll
        for (int j = 0; j < PAIRS_AT_ONCE; ++j) {
          float old[2], now[2];
          widen_pair(held[j][0], old);
          widen_pair(held[j][1], now);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            sum[0] += (now[i] - old[i]) * (now[i] - old[i]);
            sum[1] += now[i] * old[i];
            sum[2] += old[i] * old[i];
            sum[3] += now[i] * now[i];
          }
        }
      }
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = warp_sum(sum[i]);
    if (lane == 0)
#pragma unroll
      for (int i = 0; i < 4; ++i) fixed.sums[b * each + warp % each][i] = sum[i];
  }
}

// A row's (δ, cos), by one thread, behind a __syncthreads(). One of a block keeps it for later layers.
__device__ __forceinline__ void find_motion(int b, const Fixed& fixed, bool keeps, float* motion_B2, float motion[2]) {
  motion[0] = fixed.values[2 * b];
  motion[1] = fixed.values[2 * b + 1];
  if (fixed.indices[b]) return;
  float sum[4] = {};
#pragma unroll
  for (int w = 0; w < MOTION_WARPS; ++w)
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += fixed.sums[b * MOTION_WARPS + w][i];
  const float old = rsqrtf(fmaxf(sum[2], 1e-20f)), now = rsqrtf(fmaxf(sum[3], 1e-20f));  // 1 / length
  motion[0] = sum[0] * rsqrtf(fmaxf(sum[0], 1e-30f)) * old;
  motion[1] = sum[1] * now * old;
  if (!keeps) return;
  motion_B2[2 * b] = motion[0];
  motion_B2[2 * b + 1] = motion[1];
}

// Motion after a layer whose successor asks no gate.
struct Move {
  const num* before_Bd;
  const num* after_Bd;
  const int* left_skip_B;
  int width;
  float* motion_B2;
};

__device__ APART void move(const Move& m, Fixed& fixed) {
  measure_motion(m.before_Bd, m.after_Bd, m.left_skip_B, m.width, m.motion_B2, fixed);
  __syncthreads();
  float motion[2];
  if (threadIdx.x < ROWS) find_motion(threadIdx.x, fixed, true, m.motion_B2, motion);
}
