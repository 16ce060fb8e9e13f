// The Skip-Gate's decision for all rows: motion, features, probability, who skips (SPEC 4). Every block decides by
// itself, from the same numbers in the same order, so that none has to wait for another.

struct Decision {
  const num* front;  // what the front product made of this token, one row a batch row
  long long front_stride;
  int reduce_at;     // where W_1·x̂ lies in it
  int reduce_width;  // 0: the gate does not read the residual stream
  int preview_width;  // 0: the gate does not read the preview
  int pooled_width;
  const num* pooled_B;
  const float* entropy_B;
  int fresh;  // the call in front made these two
  int hidden_width;
  const num* weights;  // of the gate, as fbs_rl.decode.gate_rows lays them out
  int weight_count;
  const num* later;  // of the next gate
  int later_bytes;
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
  int held_bytes;  // of the room: not to be touched
  SkipPath path;
  num* next_Bd;  // the next layer's h, written here where all rows skip this one; null: not here
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

// Motion (δ, cos) of every row into held_B2, one or more warps a row: of those that ran the layer in front
// what it is now, of the others what it was.
__device__ __forceinline__ void note_motion(const num* before_Bd, const num* after_Bd, const int* left_skip_B, int width,
                                            float* motion_B2, float (*sums)[4], float* held_B2) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const int each = max(1, WARPS / ROWS), at_once = WARPS / each;
  ROLLED for (int b0 = 0; b0 < ROWS; b0 += at_once) {
    const int b = b0 + warp / each;
    const bool mine = b < ROWS && warp / each < at_once, first = mine && warp % each == 0 && lane == 0;
    float motion[2] = {}, sum[4] = {};
    bool kept = true;
    if (first) {
      motion[0] = __ldcg(motion_B2 + 2 * b);
      motion[1] = __ldcg(motion_B2 + 2 * b + 1);
      kept = !before_Bd || skips(left_skip_B, b);
    }
    if (mine && before_Bd)
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
    if (first && !kept) {
      ROLLED for (int w = 1; w < each; ++w)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] += sums[warp + w][i];
      const float old = fmaxf(sqrtf(sum[2]), 1e-10f), now = fmaxf(sqrtf(sum[3]), 1e-10f);
      motion_B2[2 * b] = motion[0] = sqrtf(sum[0]) / old;
      motion_B2[2 * b + 1] = motion[1] = sum[1] / now / old;
    }
    if (first) {
      held_B2[2 * b] = motion[0];
      held_B2[2 * b + 1] = motion[1];
    }
    __syncthreads();
  }
}

#define LINE (512 + 256)  // features and a preview

__device__ __forceinline__ int feature_count(const Decision& d) {
  return (d.reduce_width ? d.reduce_width + 2 : 0) + (d.preview_width ? d.preview_width + 1 : 0);
}

// What a decision works on in shared memory. Features are [RMSNorm(W_1 x̂); δ; cos; W_2 ṽ; H₁]: those behind the first
// reduce_width are known before the front product is done, and so is their part of W_3 g.
struct GateRoom {
  num *hidden, *preview, *hidden_bias, *out, *reduce_norm, *out_bias;  // W_3, W_2, ...
  num* pooled;  // [ROWS, pooled_width]
  num* up;      // of the skip path, the block's columns
  float* feature;  // [WARPS, LINE]
  float* known;    // [ROWS, hidden_width]
  float* sums;     // [ROWS, hidden_width] of what the front product adds
  float* down;     // [ROWS, rank]
};

__device__ __forceinline__ num* take(num*& free, int count) {
  num* taken = free;
  free += (count + 7) / 8 * 8;
  return taken;
}

// fbs_rl.decode.module_calls.gate_bytes counts what this takes.
__device__ __forceinline__ GateRoom lay_out(const Decision& d, unsigned char* room) {
  GateRoom g;
  g.feature = (float*)room;
  g.known = g.feature + WARPS * LINE;
  g.sums = g.known + ROWS * d.hidden_width;
  g.down = g.sums + ROWS * d.hidden_width;
  num* free = (num*)room + (WARPS * LINE + (ROWS * (2 * d.hidden_width + d.path.rank) + 3) / 4 * 4) * (4 / sizeof(num));
  g.pooled = take(free, ROWS * d.pooled_width);
  g.hidden = take(free, d.hidden_width * feature_count(d));
  g.preview = take(free, d.preview_width * d.pooled_width);
  g.hidden_bias = take(free, d.hidden_width);
  g.out = take(free, d.hidden_width);
  g.reduce_norm = take(free, d.reduce_width);
  g.out_bias = take(free, 1);
  g.up = free;
  return g;
}

// What does not depend on this token; and what the next gate will ask for, into the second cache.
__device__ __forceinline__ void bring_gate(const Decision& d, const GateRoom& g) {
  ROLLED for (int k = threadIdx.x; k < d.weight_count / LANE_NUMS; k += THREADS)
    copy_aside((uint4*)g.hidden + k, (const uint4*)d.weights + k);
  if (d.later && blockIdx.x == 0 && threadIdx.x == 0) bring_near(d.later, d.later_bytes);
  if (!d.next_Bd || !d.path.up) return;
  int first, end;
  columns_of(d.path.width, first, end);
  const num* up = d.path.up + (long long)first * d.path.rank;
  const int count = (end - first) * d.path.rank, whole = d.path.rank % LANE_NUMS ? 0 : count / LANE_NUMS;
  ROLLED for (int k = threadIdx.x; k < whole; k += THREADS) copy_aside((uint4*)g.up + k, (const uint4*)up + k);
  ROLLED for (int i = whole * LANE_NUMS + threadIdx.x; i < count; i += THREADS) g.up[i] = up[i];
}

// W·x into out, by `team` threads (whole warps), of which this is number `me`; several a row of W, whose
// rows are `stride` apart.
__device__ ONE_COPY void small_product(const num* weight, int stride, int outputs, int columns, const float* x,
                                       float* out, int me, int team) {
  int lanes = 1;
  while (lanes < WARP && lanes * 2 * outputs <= team) lanes *= 2;
  ROLLED for (int first = 0; first < outputs; first += team / lanes) {
    const int j = first + me / lanes;
    float sum = 0.f;
    if (j < outputs)
#pragma unroll 4
      for (int i = me % lanes; i < columns; i += lanes) sum += widen(weight[j * stride + i]) * x[i];
    ROLLED for (int d = lanes / 2; d; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
    if (j < outputs && me % lanes == 0) out[j] = sum;
  }
}

// The threads that a row has, whole warps, in rounds of as many rows as there are warps for.
struct RowTeam {
  int each, at_once, size, me, place;
};

__device__ __forceinline__ RowTeam row_team() {
  RowTeam t;
  t.each = max(1, WARPS / ROWS);
  t.at_once = WARPS / t.each;
  t.size = t.each * WARP;
  t.me = threadIdx.x % t.size;
  t.place = threadIdx.x / t.size;
  return t;
}

// The part of W_3 g that does not wait for the front product.
__device__ __forceinline__ void weigh_known(const Decision& d, const GateRoom& g, const float* motion_B2) {
  const RowTeam t = row_team();
  const int count = feature_count(d) - d.reduce_width, at = d.reduce_width ? 2 : 0;
  ROLLED for (int b0 = 0; b0 < ROWS; b0 += t.at_once) {
    const int b = b0 + t.place;
    const bool mine = t.place < t.at_once && b < ROWS;
    float* feature = g.feature + t.place * t.each * LINE;
    float* pooled = feature + count;
    if (mine && d.reduce_width && t.me < 2) feature[t.me] = motion_B2[2 * b + t.me];
    if (mine && d.preview_width) {
      ROLLED for (int i = t.me; i < d.pooled_width; i += t.size) pooled[i] = widen(g.pooled[b * d.pooled_width + i]);
      if (t.me == 0) feature[count - 1] = __ldcg(d.entropy_B + b);
    }
    __syncthreads();
    if (mine && d.preview_width)
      small_product(g.preview, d.pooled_width, d.preview_width, d.pooled_width, pooled, feature + at, t.me, t.size);
    __syncthreads();
    if (mine)
      ROLLED for (int j = t.me; j < d.preview_width; j += t.size) feature[at + j] = rounded(feature[at + j]);
    __syncthreads();
    if (mine)
      small_product(g.hidden + d.reduce_width, feature_count(d), d.hidden_width, count, feature,
                    g.known + b * d.hidden_width, t.me, t.size);
    __syncthreads();
  }
}

#define AT_ONCE 4  // numbers of a row that a lane holds at once

// p = σ(clip(w·SiLU(W_3 g) + b)) of every row. Each warp norms W_1 x̂ for itself, so that none waits for another.
// there: 0 while the front product may not be done; then this only brings its own code near.
__device__ __forceinline__ void find_probabilities(const Decision& d, const GateRoom& g, Fixed& fixed, int there) {
  const RowTeam t = row_team();
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, asked = there ? d.reduce_width : 0;
  float* feature = g.feature + warp * LINE;
  ROLLED for (int b0 = 0; b0 < ROWS; b0 += t.at_once) {
    const int b = b0 + t.place;
    const bool mine = t.place < t.at_once && b < ROWS;
    if (mine) {
      const num* reduced = d.front + b * d.front_stride + d.reduce_at;
      float square = 0.f, held[AT_ONCE];
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j) held[j] = lane + j * WARP < asked ? read(reduced + lane + j * WARP) : 0.f;
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j) {
        square += held[j] * held[j];
        if (lane + j * WARP < d.reduce_width) feature[lane + j * WARP] = held[j];
      }
      ROLLED for (int i = lane + AT_ONCE * WARP; i < asked; i += WARP) {
        feature[i] = read(reduced + i);
        square += feature[i] * feature[i];
      }
      const float inverse = rsqrtf(warp_sum(square) / max(1, d.reduce_width) + d.eps);
      ROLLED for (int i = lane; i < asked; i += WARP) feature[i] = rounded(feature[i] * inverse * widen(g.reduce_norm[i]));
      __syncwarp();
      small_product(g.hidden, feature_count(d), d.hidden_width, asked, feature, g.sums + b * d.hidden_width, t.me, t.size);
    }
    __syncthreads();
    float logit = 0.f;
    if (mine)
      ROLLED for (int j = t.me; j < d.hidden_width; j += t.size)
        logit += silu(g.sums[b * d.hidden_width + j] + g.known[b * d.hidden_width + j] + widen(g.hidden_bias[j])) * widen(g.out[j]);
    logit = warp_sum(logit);
    if (mine && lane == 0) fixed.scratch[b * t.each + warp % t.each] = logit;
  }
  __syncthreads();
  if (threadIdx.x < ROWS) {
    float logit = widen(g.out_bias[0]);
    ROLLED for (int w = 0; w < t.each; ++w) logit += fixed.scratch[threadIdx.x * t.each + w];
    fixed.prob_B[threadIdx.x] = 1.f / (1.f + expf(-fminf(fmaxf(logit, -d.clip), d.clip)));
  }
  __syncthreads();
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

// A row's skip path, A_1 x̂ at first: number `i` of all rows'.
__device__ __forceinline__ float read_down(const Decision& d, int i) {
  return i < ROWS * d.path.rank ? read(d.path.down + i / d.path.rank * d.path.down_stride + i % d.path.rank) : 0.f;
}

#define PATH_LANES 4  // neighbouring threads that share an output

// The block's columns of the next layer's h where all rows skip this one. down: read_down of this thread's number.
__device__ __forceinline__ void pass_by(const Decision& d, const GateRoom& g, float down) {
  const int lane = threadIdx.x % PATH_LANES;
  int first, end;
  columns_of(d.path.width, first, end);
  ROLLED for (int i = threadIdx.x; i < ROWS * d.path.rank; i += THREADS)
    g.down[i] = rounded(silu(i == (int)threadIdx.x ? down : read_down(d, i)));
  __syncthreads();
  const int count = (end - first) * ROWS;
  ROLLED for (int from = 0; from < count; from += THREADS / PATH_LANES) {
    const int i = from + threadIdx.x / PATH_LANES, b = i % ROWS, n = first + i / ROWS;
    const float state = i < count && lane == 0 ? read(d.path.state_Bd + b * d.path.width + n) : 0.f;
    float sum = 0.f;
    if (i < count)
#pragma unroll 4
      for (int j = lane; j < d.path.rank; j += PATH_LANES)
        sum += widen(g.up[(n - first) * d.path.rank + j]) * g.down[b * d.path.rank + j];
    ROLLED for (int k = PATH_LANES / 2; k; k /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, k);
    if (i < count && lane == 0) d.next_Bd[b * d.path.width + n] = narrow(state + rounded(sum));
  }
}

__device__ __forceinline__ void decide(const Decision& d, Team& team, Fixed& fixed, unsigned char* room) {
  const GateRoom g = lay_out(d, room + d.held_bytes);
  bring_gate(d, g);
  const int step = __ldcg(d.step);
  bring_bars(d, fixed);
  if (d.fresh) await(team);  // for its numbers are asked for here
  ROLLED for (int k = threadIdx.x; k < ROWS * d.pooled_width / LANE_NUMS; k += THREADS)
    copy_aside((uint4*)g.pooled + k, (const uint4*)d.pooled_B + k);
  // What the layer in front left is visible already: that was awaited before the front product.
  if (d.reduce_width)
    note_motion(d.before_Bd, d.after_Bd, d.left_skip_B, d.width, d.motion_B2, fixed.sums, fixed.values);
  await_copies();
  __syncthreads();
  weigh_known(d, g, fixed.values);
  float down = 0.f;
  ROLLED for (int there = d.fresh; there <= 1; ++there) {
    if (there) await(team);
    if (there && d.next_Bd) down = read_down(d, threadIdx.x);
    find_probabilities(d, g, fixed, there);
  }
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
  if (d.next_Bd && !team.known) pass_by(d, g, down);
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
  note_motion(m.before_Bd, m.after_Bd, m.left_skip_B, m.width, m.motion_B2, fixed.sums, fixed.values);
}
