// The Skip-Gate's decision for all rows, by one block: motion, features, probability, who skips (SPEC 4).

struct Decision {
  const num* front;  // what the front product made of this token, one row a batch row
  long long front_stride;
  int reduce_at;     // where W_1·x̂ lies in it
  int reduce_width;  // 0: the gate does not read the residual stream
  const num* reduce_norm;
  const num* preview;  // W_2 [preview_width, pooled_width]
  int preview_width;   // 0: the gate does not read the preview
  int pooled_width;
  const num* pooled_B;
  const float* entropy_B;
  const num* hidden;  // W_3 [hidden_width, features]
  const num* hidden_bias;
  const num* out;
  const num* out_bias;
  int hidden_width;
  float clip;
  float eps;
  const num* before_Bd;  // the state around the layer in front; null: none
  const num* after_Bd;
  const int* left_skip_B;  // who skipped that layer
  int width;
  float* motion_B2;
  int sampled;  // 1: skip where the noise is below p; 0: where p reaches the threshold
  int consensus;
  const float* tau_B;
  const u32* seed_B2;
  const int* position_B;
  int leader;
  int members;   // layers of the block
  u32 free_mask; // which of them may skip
  int* skip_LB;
  int layers;
  const int* step;
  int trace_steps;
  float* prob_trace;  // [trace_steps, layers, ROWS]
  unsigned char* skip_trace;
};

__device__ __forceinline__ u32 mix_word(u32 word) {
  word = (word ^ (word >> 16)) * 0x85EBCA6Bu;
  word = (word ^ (word >> 13)) * 0xC2B2AE35u;
  return word ^ (word >> 16);
}

// fbs_rl.model.skip_gate.gate_uniform.
__device__ __forceinline__ float gate_noise(u32 low, u32 high, u32 position, u32 layer) {
  u32 word = mix_word(low) ^ mix_word(high ^ 0x9E3779B9u);
  word = mix_word(word ^ mix_word(position ^ 0x85EBCA6Bu));
  return (float)(mix_word(word + layer * 0xC2B2AE35u) >> 8) * 5.9604644775390625e-8f;
}

// Motion of the rows that ran the layer in front (δ, cos), one or more warps a row; the others keep theirs.
__device__ __forceinline__ void note_motion(const num* before_Bd, const num* after_Bd, const int* left_skip_B,
                                            int width, float* motion_B2, float (*scratch)[4]) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
  const int each = max(1, warps / ROWS), at_once = warps / each;
  for (int b0 = 0; b0 < ROWS; b0 += at_once) {
    const int b = b0 + warp / each;
    const bool mine = b < ROWS && warp / each < at_once;
    float sum[4] = {};
    if (mine)
#pragma unroll 5
      for (int k = warp % each * WARP + lane; k < width; k += each * WARP) {
        const float old = read(before_Bd + b * width + k), now = read(after_Bd + b * width + k);
        sum[0] += (now - old) * (now - old);
        sum[1] += now * old;
        sum[2] += old * old;
        sum[3] += now * now;
      }
    for (int i = 0; i < 4; ++i) sum[i] = warp_sum(sum[i]);
    if (lane == 0)
      for (int i = 0; i < 4; ++i) scratch[warp][i] = sum[i];
    __syncthreads();
    if (mine && warp % each == 0 && lane == 0 && !skips(left_skip_B, b)) {
      for (int w = 1; w < each; ++w)
        for (int i = 0; i < 4; ++i) sum[i] += scratch[warp + w][i];
      const float old = fmaxf(sqrtf(sum[2]), 1e-10f), now = fmaxf(sqrtf(sum[3]), 1e-10f);
      motion_B2[2 * b] = sqrtf(sum[0]) / old;
      motion_B2[2 * b + 1] = sum[1] / now / old;
    }
    __syncthreads();
  }
}

#define MOST_FEATURES 512

__device__ __forceinline__ int feature_count(const Decision& d) {
  return (d.reduce_width ? d.reduce_width + 2 : 0) + (d.preview_width ? d.preview_width + 1 : 0);
}

// The gate's weights in shared memory, brought before the front product is done.
struct GateWeights {
  num *preview, *hidden, *hidden_bias, *out, *reduce_norm;
  float out_bias;
};

__device__ __forceinline__ num* bring(const num* from, int count, num* to) {
#pragma unroll 8
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = from[i];
  return to;
}

__device__ __forceinline__ GateWeights bring_gate(const Decision& d) {
  GateWeights w;
  w.hidden = bring(d.hidden, d.hidden_width * feature_count(d), (num*)shared);
  w.preview = bring(d.preview, d.preview_width * d.pooled_width, w.hidden + d.hidden_width * feature_count(d));
  w.hidden_bias = bring(d.hidden_bias, d.hidden_width, w.preview + d.preview_width * d.pooled_width);
  w.out = bring(d.out, d.hidden_width, w.hidden_bias + d.hidden_width);
  w.reduce_norm = bring(d.reduce_norm, d.reduce_width, w.out + d.hidden_width);
  w.out_bias = widen(d.out_bias[0]);
  return w;
}

// g of one row: [RMSNorm(W_1 x̂); δ; cos; W_2 ṽ; H₁].
__device__ __forceinline__ void gather_features(const Decision& d, const GateWeights& w, int b, float* g) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
  int at = 0;
  if (d.reduce_width) {
    if (warp == 0) {
      const num* reduced = d.front + b * d.front_stride + d.reduce_at;
      float square = 0.f;
      for (int i = lane; i < d.reduce_width; i += WARP) {
        g[i] = read(reduced + i);
        square += g[i] * g[i];
      }
      const float inverse = rsqrtf(warp_sum(square) / d.reduce_width + d.eps);
      for (int i = lane; i < d.reduce_width; i += WARP)
        g[i] = rounded(g[i] * inverse * widen(w.reduce_norm[i]));
    }
    at = d.reduce_width + 2;
    if (threadIdx.x < 2) g[d.reduce_width + threadIdx.x] = __ldcg(d.motion_B2 + 2 * b + threadIdx.x);
  }
  for (int j = warp; j < d.preview_width; j += warps) {
    float sum = 0.f;
    for (int i = lane; i < d.pooled_width; i += WARP)
      sum += widen(w.preview[j * d.pooled_width + i]) * read(d.pooled_B + b * d.pooled_width + i);
    sum = warp_sum(sum);
    if (lane == 0) g[at + j] = rounded(sum);
  }
  if (d.preview_width && threadIdx.x == 0) g[at + d.preview_width] = __ldcg(d.entropy_B + b);
  __syncthreads();
}

// σ(clip(w·SiLU(W_3 g) + b)), in every thread.
__device__ __forceinline__ float skip_probability(const Decision& d, const GateWeights& w, const float* g, float* scratch) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
  const int features = feature_count(d);
  float logit = 0.f;
  for (int j = warp; j < d.hidden_width; j += warps) {
    float sum = 0.f;
    for (int i = lane; i < features; i += WARP) sum += widen(w.hidden[j * features + i]) * g[i];
    sum = warp_sum(sum) + widen(w.hidden_bias[j]);
    if (lane == 0) logit += silu(sum) * widen(w.out[j]);
  }
  logit = block_sum(logit, scratch) + w.out_bias;
  return 1.f / (1.f + expf(-fminf(fmaxf(logit, -d.clip), d.clip)));
}

__device__ __forceinline__ bool wants_skip(const Decision& d, int b, const float* prob_B) {
  if (d.sampled) {
    const u32 position = (u32)__ldcg(d.position_B + b);
    return gate_noise(__ldcg(d.seed_B2 + 2 * b), __ldcg(d.seed_B2 + 2 * b + 1), position, (u32)d.leader) < prob_B[b];
  }
  if (!d.consensus) return prob_B[b] >= __ldcg(d.tau_B + b);
  float prob = 0.f, bar = 0.f;
  for (int i = 0; i < ROWS; ++i) {
    prob += prob_B[i];
    bar += __ldcg(d.tau_B + i);
  }
  return prob / ROWS >= bar / ROWS;
}

extern "C" __global__ void __launch_bounds__(256) decide(Decision d) {
  __shared__ float g[MOST_FEATURES], scratch[32], partial[32][4], prob_B[ROWS];
  const GateWeights w = bring_gate(d);
  const int step = __ldcg(d.step);
  // What the layer in front left is visible already: it finished before the front product did.
  if (d.before_Bd) note_motion(d.before_Bd, d.after_Bd, d.left_skip_B, d.width, d.motion_B2, partial);
  __syncthreads();
  await();
  allow_next();
  for (int b = 0; b < ROWS; ++b) {
    gather_features(d, w, b, g);
    const float prob = skip_probability(d, w, g, scratch);
    if (threadIdx.x == 0) prob_B[b] = prob;
    __syncthreads();
  }
  for (int i = threadIdx.x; i < d.members * ROWS; i += blockDim.x) {
    const int member = i / ROWS, b = i % ROWS, layer = d.leader + member;
    if (!(d.free_mask >> member & 1)) continue;
    const bool skip = wants_skip(d, b, prob_B);
    d.skip_LB[layer * ROWS + b] = skip;
    if (step >= d.trace_steps) continue;
    const long long at = ((long long)step * d.layers + layer) * ROWS + b;
    d.prob_trace[at] = prob_B[b];
    d.skip_trace[at] = skip;
  }
}

// Motion after a layer whose successor asks no gate.
struct Move {
  const num* before_Bd;
  const num* after_Bd;
  const int* left_skip_B;
  int width;
  float* motion_B2;
};

extern "C" __global__ void __launch_bounds__(256) move(Move m) {
  __shared__ float partial[32][4];
  await();
  allow_next();
  note_motion(m.before_Bd, m.after_Bd, m.left_skip_B, m.width, m.motion_B2, partial);
}
