// The Skip-Gate's decision for all rows: motion, features, probability, who skips (SPEC 4). Every block decides by
// itself, from the same numbers in the same order, so that none has to wait for another.

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
                                            int width, float* motion_B2, float (*sums)[4]) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const int each = max(1, WARPS / ROWS), at_once = WARPS / each;
  ROLLED for (int b0 = 0; b0 < ROWS; b0 += at_once) {
    const int b = b0 + warp / each;
    const bool mine = b < ROWS && warp / each < at_once;
    float sum[4] = {};
    if (mine)
#pragma unroll 2
      for (int k = warp % each * WARP + lane; k < width / LANE_NUMS; k += each * WARP) {
        float old[LANE_NUMS], now[LANE_NUMS];
        unpack(__ldcg((const uint4*)(before_Bd + (long long)b * width) + k), old);
        unpack(__ldcg((const uint4*)(after_Bd + (long long)b * width) + k), now);
#pragma unroll
        for (int i = 0; i < LANE_NUMS; ++i) {
          sum[0] += (now[i] - old[i]) * (now[i] - old[i]);
          sum[1] += now[i] * old[i];
          sum[2] += old[i] * old[i];
          sum[3] += now[i] * now[i];
        }
      }
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = warp_sum(sum[i]);
    if (lane == 0)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[warp][i] = sum[i];
    __syncthreads();
    if (mine && warp % each == 0 && lane == 0 && !skips(left_skip_B, b)) {
      ROLLED for (int w = 1; w < each; ++w)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] += sums[warp + w][i];
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

// The gate's weights and inputs in shared memory; the weights come before the front product is done.
struct GateRoom {
  num *preview, *hidden, *hidden_bias, *out, *reduce_norm;
  float out_bias;
  float* feature;  // [WARPS, MOST_FEATURES], a line for each row of a round
  float* pooled;   // [WARPS, pooled_width]
};

// fbs_rl.decode.module_calls.gate_bytes counts what this takes.
__device__ __forceinline__ num* bring(const num* from, int count, num*& free) {
  num* to = free;
  const bool whole = ((unsigned long long)from & 15) == 0;
  const int parts = whole ? count / LANE_NUMS : 0;
  ROLLED for (int k = threadIdx.x; k < parts; k += THREADS) copy_aside((uint4*)to + k, (const uint4*)from + k);
  ROLLED for (int i = parts * LANE_NUMS + threadIdx.x; i < count; i += THREADS) to[i] = from[i];
  free += (count + LANE_NUMS - 1) / LANE_NUMS * LANE_NUMS;
  return to;
}

__device__ __forceinline__ GateRoom bring_gate(const Decision& d, unsigned char* room) {
  GateRoom g;
  g.feature = (float*)room;
  g.pooled = g.feature + WARPS * MOST_FEATURES;
  num* free = (num*)(g.pooled + WARPS * ((d.pooled_width + 3) / 4 * 4));
  g.hidden = bring(d.hidden, d.hidden_width * feature_count(d), free);
  g.preview = bring(d.preview, d.preview_width * d.pooled_width, free);
  g.hidden_bias = bring(d.hidden_bias, d.hidden_width, free);
  g.out = bring(d.out, d.hidden_width, free);
  g.reduce_norm = bring(d.reduce_norm, d.reduce_width, free);
  g.out_bias = widen(d.out_bias[0]);
  return g;
}

// use(j, W[j]·x) for every output j, by `team` threads (whole warps), of which this is number `me`; several a row of W.
template <class Use>
__device__ __forceinline__ void small_product(const num* weight, int outputs, int columns, const float* x, int me, int team,
                                              Use use) {
  int lanes = 1;
  while (lanes < WARP && lanes * 2 * outputs <= team) lanes *= 2;
  ROLLED for (int first = 0; first < outputs; first += team / lanes) {
    const int j = first + me / lanes;
    float sum = 0.f;
    if (j < outputs)
#pragma unroll 4
      for (int i = me % lanes; i < columns; i += lanes) sum += widen(weight[j * columns + i]) * x[i];
    ROLLED for (int d = lanes / 2; d; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
    if (j < outputs && me % lanes == 0) use(j, sum);
  }
}

#define HELD 4  // numbers of a preview that a thread holds at once

// g of one row: [RMSNorm(W_1 x̂); δ; cos; W_2 ṽ; H₁], by `team` threads. Others may pass: row < 0.
__device__ __forceinline__ void gather_features(const Decision& d, const GateRoom& g, int b, int me, int team, float* feature,
                                                float* pooled) {
  const int at = d.reduce_width ? d.reduce_width + 2 : 0;
  if (b >= 0) {
    // All is asked for before anything is used.
    float held[HELD], entropy = 0.f, motion = 0.f;
    if (d.preview_width) {
#pragma unroll
      for (int j = 0; j < HELD; ++j) {
        const int i = me + j * team;
        held[j] = i < d.pooled_width ? read(d.pooled_B + b * d.pooled_width + i) : 0.f;
      }
      if (me == 0) entropy = __ldcg(d.entropy_B + b);
    }
    if (d.reduce_width && me < 2) motion = __ldcg(d.motion_B2 + 2 * b + me);
    if (d.reduce_width)
      ROLLED for (int i = me; i < d.reduce_width; i += team) feature[i] = read(d.front + b * d.front_stride + d.reduce_at + i);
    if (d.reduce_width && me < 2) feature[d.reduce_width + me] = motion;
    if (d.preview_width) {
#pragma unroll
      for (int j = 0; j < HELD; ++j)
        if (me + j * team < d.pooled_width) pooled[me + j * team] = held[j];
      ROLLED for (int i = me + HELD * team; i < d.pooled_width; i += team) pooled[i] = read(d.pooled_B + b * d.pooled_width + i);
      if (me == 0) feature[at + d.preview_width] = entropy;
    }
  }
  __syncthreads();
  if (b >= 0 && d.preview_width)
    small_product(g.preview, d.preview_width, d.pooled_width, pooled, me, team,
                  [&](int j, float sum) { feature[at + j] = rounded(sum); });
  if (b >= 0 && d.reduce_width && me >= team - WARP) {  // by the row's last warp
    float square = 0.f;
    ROLLED for (int i = me % WARP; i < d.reduce_width; i += WARP) square += feature[i] * feature[i];
    const float inverse = rsqrtf(warp_sum(square) / d.reduce_width + d.eps);
    ROLLED for (int i = me % WARP; i < d.reduce_width; i += WARP)
      feature[i] = rounded(feature[i] * inverse * widen(g.reduce_norm[i]));
  }
  __syncthreads();
}

// p = σ(clip(w·SiLU(W_3 g) + b)) of every row, one or more warps a row.
__device__ __forceinline__ void find_probabilities(const Decision& d, const GateRoom& g, Fixed& fixed) {
  const int warp = threadIdx.x / WARP;
  const int each = max(1, WARPS / ROWS), at_once = WARPS / each, team = each * WARP;
  ROLLED for (int b0 = 0; b0 < ROWS; b0 += at_once) {
    const int place = warp / each, me = threadIdx.x % team;
    const int b = place < at_once && b0 + place < ROWS ? b0 + place : -1;
    float* feature = g.feature + place * MOST_FEATURES;
    gather_features(d, g, b, me, team, feature, g.pooled + place * ((d.pooled_width + 3) / 4 * 4));
    float logit = 0.f;
    if (b >= 0)
      small_product(g.hidden, d.hidden_width, feature_count(d), feature, me, team, [&](int j, float sum) {
        logit += silu(sum + widen(g.hidden_bias[j])) * widen(g.out[j]);
      });
    logit = warp_sum(logit);
    if (me % WARP == 0) fixed.scratch[warp] = logit;
    __syncthreads();
    if (b >= 0 && me == 0) {
      logit = g.out_bias;
      ROLLED for (int w = warp; w < warp + each; ++w) logit += fixed.scratch[w];
      fixed.prob_B[b] = 1.f / (1.f + expf(-fminf(fmaxf(logit, -d.clip), d.clip)));
    }
    __syncthreads();
  }
}

// What decisions are compared with; it stays as it is for a step.
__device__ __forceinline__ void bring_bars(const Decision& d, Fixed& fixed) {
  const int b = threadIdx.x;
  if (b >= ROWS) return;
  fixed.tau_B[b] = __ldcg(d.tau_B + b);
  fixed.seed_B2[2 * b] = __ldcg(d.seed_B2 + 2 * b);
  fixed.seed_B2[2 * b + 1] = __ldcg(d.seed_B2 + 2 * b + 1);
  fixed.position_B[b] = __ldcg(d.position_B + b);
}

__device__ __forceinline__ bool wants_skip(const Decision& d, int b, const Fixed& f) {
  if (d.sampled)
    return gate_noise(f.seed_B2[2 * b], f.seed_B2[2 * b + 1], (u32)f.position_B[b], (u32)d.leader) < f.prob_B[b];
  if (!d.consensus) return f.prob_B[b] >= f.tau_B[b];
  float prob = 0.f, bar = 0.f;
  ROLLED for (int i = 0; i < ROWS; ++i) {
    prob += f.prob_B[i];
    bar += f.tau_B[i];
  }
  return prob / ROWS >= bar / ROWS;
}

__device__ __forceinline__ void decide(const Decision& d, Team& team, Fixed& fixed, unsigned char* room) {
  const GateRoom g = bring_gate(d, room);
  const int step = __ldcg(d.step);
  bring_bars(d, fixed);
  // What the layer in front left is visible already: that was awaited before the front product.
  if (d.before_Bd) note_motion(d.before_Bd, d.after_Bd, d.left_skip_B, d.width, d.motion_B2, fixed.sums);
  await_copies();
  await(team);
  __syncthreads();
  find_probabilities(d, g, fixed);
  ROLLED for (int i = threadIdx.x; i < d.members * ROWS; i += THREADS) {
    const int member = i / ROWS, b = i % ROWS, layer = d.leader + member;
    if (!(d.free_mask >> member & 1)) continue;
    const bool skip = wants_skip(d, b, fixed);
    d.skip_LB[layer * ROWS + b] = skip;
    if (blockIdx.x || step >= d.trace_steps) continue;
    const long long at = ((long long)step * d.layers + layer) * ROWS + b;
    d.prob_trace[at] = fixed.prob_B[b];
    d.skip_trace[at] = skip;
  }
  forget(team);
  if (!(d.free_mask & 1)) return;
  team.known_B = d.skip_LB + d.leader * ROWS;
  team.known = false;
  ROLLED for (int b = 0; b < ROWS; ++b) team.known |= !wants_skip(d, b, fixed);
}

// Motion after a layer whose successor asks no gate.
struct Move {
  const num* before_Bd;
  const num* after_Bd;
  const int* left_skip_B;
  int width;
  float* motion_B2;
};

__device__ __forceinline__ void move(const Move& m, Team& team, Fixed& fixed) {
  await(team);
  note_motion(m.before_Bd, m.after_Bd, m.left_skip_B, m.width, m.motion_B2, fixed.sums);
}
