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
  int fresh;   // the call in front made these two
  int behind;  // 1: the front product was awaited by an earlier call
  int hidden_width;
  const num* weights;  // of the gate, as fbs_rl.decode.gate_rows lays them out
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
  int* skip_LB;  // all members read the leader's
  int* stay_LB;  // the other way round: 1 where a row runs
  int* guess_LB;  // 1 in all rows where all skip: where the decision is ahead of its layer, nothing is guessed. Or null
  int* doubt_LB;  // the other way round
  int layers;
  const int* step;
  int trace_steps;
  float* prob_trace;  // [trace_steps, layers, ROWS]
  unsigned char* skip_trace;
  int held_bytes;  // of the room: not to be touched
  SkipPath path;
  num* next_Bd;  // the next layer's h, written here where all rows skip this one; null: not here
  int ends;      // 1: they do; so it is written first, and others need not wait for the decision
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

// A gate's matrices have zeros behind their rows and columns, up to whole panels: a warp takes eight rows at once, a lane
// two columns of each.
#define PANEL 64
#define WARP_ROWS (PANEL / WARPS)

__device__ __forceinline__ int span(int count) { return (count + PANEL - 1) / PANEL * PANEL; }

// A lane's columns of a warp's rows.
struct Slice {
  pair weight[WARP_ROWS];
};

__device__ __forceinline__ void load_slice(const num* panel, int width, int row, int column, Slice& s) {
#pragma unroll
  for (int r = 0; r < WARP_ROWS; ++r) s.weight[r] = *(const pair*)(panel + (row + r) * width + column);
}

__device__ __forceinline__ void add_slice(const Slice& s, const float x[2], float acc[WARP_ROWS]) {
#pragma unroll
  for (int r = 0; r < WARP_ROWS; ++r) {
    float weight[2];
    widen_pair(s.weight[r], weight);
    acc[r] += weight[0] * x[0] + weight[1] * x[1];
  }
}

#define ROW_LANES (WARP / WARP_ROWS)  // that hold the same sum

// A gate's weights in memory, and what a decision works on in shared memory. Features are [RMSNorm(W_1 x̂); δ; cos;
// W_2 ṽ; H₁]: those behind the first reduce_width are known before the front product is done.
struct GateRoom {
  int hidden_span, reduce_span, known_span, pooled_span, known_count;
  const num *reduced, *known, *preview, *hidden_bias, *out, *reduce_norm, *out_bias;  // W_3 in two parts, W_2, ...
  float* feature;  // [ROWS, known_span] of the known ones, but δ and cos
  float* logit;    // [ROWS, WARPS]
  num* front;      // [ROWS, reduce_span], of several rows
  PathRoom path;
};

// fbs_rl.decode.module_calls.gate_bytes counts what this takes, fbs_rl.decode.gate_rows lays the weights out.
__device__ __forceinline__ GateRoom lay_out(const Decision& d, unsigned char* room) {
  GateRoom g;
  g.known_count = (d.reduce_width ? 2 : 0) + (d.preview_width ? d.preview_width + 1 : 0);
  g.hidden_span = span(d.hidden_width);
  g.reduce_span = span(d.reduce_width);
  g.known_span = span(g.known_count);
  g.pooled_span = span(d.pooled_width);
  g.reduced = d.weights;
  g.known = g.reduced + g.hidden_span * g.reduce_span;
  g.preview = g.known + g.hidden_span * g.known_span;
  g.hidden_bias = g.preview + span(d.preview_width) * g.pooled_span;
  g.out = g.hidden_bias + g.hidden_span;
  g.reduce_norm = g.out + g.hidden_span;
  g.out_bias = g.reduce_norm + g.reduce_span;
  g.feature = (float*)room;
  g.logit = g.feature + ROWS * g.known_span;
  g.path.down = g.logit + ROWS * WARPS;
  g.front = (num*)(g.path.down + (ROWS * d.path.rank + 3) / 4 * 4);
  g.path.up = g.front + (ROWS > 1 ? ROWS * g.reduce_span : 0);
  return g;
}

// W_2 ṽ and H₁ of every row.
__device__ __forceinline__ void weigh_preview(const Decision& d, const GateRoom& g) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, at = d.reduce_width ? 2 : 0;
  ROLLED for (int b = 0; b < ROWS && d.preview_width; ++b) {
    float* feature = g.feature + b * g.known_span;
    if (threadIdx.x == 0) feature[g.known_count - 1] = __ldcg(d.entropy_B + b);
    ROLLED for (int row = warp * WARP_ROWS; row < d.preview_width; row += PANEL) {
      float acc[WARP_ROWS] = {};
#pragma unroll 2
      for (int c = 2 * lane; c < g.pooled_span; c += PANEL) {
        float x[2] = {};
        Slice s;
        load_slice(g.preview, g.pooled_span, row, c, s);
        if (c < d.pooled_width) widen_pair(__ldcg((const pair*)(d.pooled_B + b * d.pooled_width + c)), x);
        add_slice(s, x, acc);
      }
      const float sum = sum_together(acc);
      const int j = row + lane / ROW_LANES;
      if (lane % ROW_LANES == 0 && j < d.preview_width) feature[at + j] = rounded(sum);
    }
  }
}

// Two numbers of a lane of what the front product made for the gate; 0 behind them, as the front's rows are filled up.
__device__ __forceinline__ void read_front(const Decision& d, const GateRoom& g, int b, int column, float out[2]) {
  out[0] = out[1] = 0.f;
  if (column >= d.reduce_width) return;
  if (ROWS > 1) widen_pair(*(const pair*)(g.front + b * g.reduce_span + column), out);
  else widen_pair(__ldcg((const pair*)(d.front + d.reduce_at + column)), out);
}

// That of several rows into shared memory at once.
__device__ __forceinline__ void stage_front(const Decision& d, const GateRoom& g) {
  ROLLED for (int i = threadIdx.x; i < ROWS * g.reduce_span; i += THREADS) {
    const int b = i / g.reduce_span, k = i % g.reduce_span;
    g.front[i] = k < d.reduce_width ? __ldcg(d.front + b * d.front_stride + d.reduce_at + k) : (num)0;
  }
  __syncthreads();
}

// What a decision is compared with: of the row that a lane decides for.
struct Bar {
  float tau;
  u32 seed[2];
  int position;
};

__device__ __forceinline__ Bar load_bar(const Decision& d) {
  const int b = threadIdx.x % WARP % ROWS;
  return {__ldcg(d.tau_B + b), {__ldcg(d.seed_B2 + 2 * b), __ldcg(d.seed_B2 + 2 * b + 1)}, __ldcg(d.position_B + b)};
}

// Whether a lane's row skips, whose probability it holds.
__device__ __forceinline__ bool wants_skip(const Decision& d, float prob, const Bar& bar) {
  if (d.sampled) return gate_noise(bar.seed[0], bar.seed[1], (u32)bar.position, (u32)d.leader) < prob;
  if (!d.consensus) return prob >= bar.tau;
  float probs = 0.f, taus = 0.f;
  ROLLED for (int i = 0; i < ROWS; ++i) {
    probs += __shfl_sync(0xffffffffu, prob, i);
    taus += __shfl_sync(0xffffffffu, bar.tau, i);
  }
  return probs / ROWS >= taus / ROWS;
}

// A lane's share of W_3 and what belongs to it, of the first panel.
struct Held {
  Slice known, reduced;
  float norm[2], bias, out;
};

__device__ __forceinline__ void load_held(const GateRoom& g, int row, Held& h) {
  const int lane = threadIdx.x % WARP;
  load_slice(g.known, g.known_span, row, 2 * lane, h.known);
  if (g.reduce_span) {
    load_slice(g.reduced, g.reduce_span, row, 2 * lane, h.reduced);
    widen_pair(*(const pair*)(g.reduce_norm + 2 * lane), h.norm);
  }
  h.bias = widen(g.hidden_bias[row + lane / ROW_LANES]);
  h.out = widen(g.out[row + lane / ROW_LANES]);
}

// w·SiLU(W_3 g) of every row, each warp's share of it into g.logit. Each warp norms W_1 x̂ for itself, so that none waits
// for another. Here the front product is awaited, if it was not before.
__device__ __forceinline__ void find_logits(const Decision& d, const GateRoom& g, Held& h, Team& team, Fixed& fixed) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const bool once = g.hidden_span == PANEL && g.known_span == PANEL && g.reduce_span <= PANEL;
  float seen[2];  // of the first row, if that is there already
  if (ROWS == 1) read_front(d, g, 0, 2 * lane, seen);
  ROLLED for (int b = 0; b < ROWS; ++b) {
    float logit = 0.f, inverse = 0.f;
    ROLLED for (int row = warp * WARP_ROWS; row < g.hidden_span; row += PANEL) {
      float acc[WARP_ROWS] = {};
      ROLLED for (int c = 2 * lane; c < g.known_span; c += PANEL) {
        float x[2] = {};
        if (c == 0 && d.reduce_width) find_motion(b, fixed, warp == 0 && row == 0, d.motion_B2, x);
        else
#pragma unroll
          for (int i = 0; i < 2; ++i) x[i] = c + i < g.known_count ? g.feature[b * g.known_span + c + i] : 0.f;
        if (!once) load_slice(g.known, g.known_span, row, c, h.known);
        add_slice(h.known, x, acc);
      }
      if (b == 0 && row < PANEL) {
        if (!d.fresh && !d.behind) {
          await(team);
          if (ROWS == 1) read_front(d, g, 0, 2 * lane, seen);
        }
        if (d.next_Bd && !d.ends) stage_down(d.path, g.path);
        if (ROWS > 1) stage_front(d, g);
      }
      if (row < PANEL) {
        float square = 0.f;
        ROLLED for (int c = 2 * lane; c < g.reduce_span; c += PANEL) {
          if (ROWS > 1 || c >= PANEL) read_front(d, g, b, c, seen);
          square += seen[0] * seen[0] + seen[1] * seen[1];
        }
        inverse = rsqrtf(warp_sum(square) / max(1, d.reduce_width) + d.eps);
      }
      ROLLED for (int c = 2 * lane; c < g.reduce_span; c += PANEL) {
        if (!once) {
          read_front(d, g, b, c, seen);
          widen_pair(*(const pair*)(g.reduce_norm + c), h.norm);
          load_slice(g.reduced, g.reduce_span, row, c, h.reduced);
        }
        float x[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) x[i] = rounded(seen[i] * inverse * h.norm[i]);
        add_slice(h.reduced, x, acc);
      }
      if (!once) {
        h.bias = widen(g.hidden_bias[row + lane / ROW_LANES]);
        h.out = widen(g.out[row + lane / ROW_LANES]);
      }
      logit += quick_silu(sum_together(acc) + h.bias) * h.out;
    }
#pragma unroll
    for (int k = ROW_LANES; k < WARP; k *= 2) logit += __shfl_xor_sync(0xffffffffu, logit, k);
    if (lane == 0) g.logit[b * WARPS + warp] = logit;
  }
}

// p = σ(clip(logit)) of a lane's row.
__device__ __forceinline__ float find_probability(const Decision& d, const GateRoom& g, float bias) {
  float logit = bias;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) logit += g.logit[threadIdx.x % WARP % ROWS * WARPS + w];
  return 1.f / (1.f + expf(-fminf(fmaxf(logit, -d.clip), d.clip)));
}

// The rows' flags, by one warp; block 0 notes them for the trace.
__device__ __forceinline__ void note_decision(const Decision& d, float prob, bool skip, bool runs, int step) {
  const int b = threadIdx.x;
  if (b >= ROWS) return;
  d.skip_LB[d.leader * ROWS + b] = skip;
  if (d.stay_LB) d.stay_LB[d.leader * ROWS + b] = !skip;
  if (d.guess_LB) {
    d.guess_LB[d.leader * ROWS + b] = !runs;
    d.doubt_LB[d.leader * ROWS + b] = runs;
  }
  if (blockIdx.x || step >= d.trace_steps) return;
  ROLLED for (int member = 0; member < d.members; ++member) {
    if (!(d.free_mask >> member & 1)) continue;
    const long long at = ((long long)step * d.layers + d.leader + member) * ROWS + b;
    d.prob_trace[at] = prob;
    d.skip_trace[at] = skip;
  }
}

__device__ __forceinline__ void decide(const Decision& d, Team& team, Fixed& fixed, unsigned char* room) {
  const GateRoom g = lay_out(d, room + d.held_bytes);
  int first, end;
  columns_of(d.path.width, first, end);
  Held held;
  load_held(g, threadIdx.x / WARP * WARP_ROWS, held);
  const int step = __ldcg(d.step);
  const float out_bias = widen(g.out_bias[0]), state = d.next_Bd ? first_state(d.path, first, end) : 0.f;
  const Bar bar = load_bar(d);
  if (d.later && blockIdx.x == 0 && threadIdx.x == 0) bring_near(d.later, d.later_bytes);  // what the next gate asks for
  if (d.next_Bd) bring_up(d.path, g.path, first, end);
  if (d.fresh) await(team);  // for its numbers are asked for here
  weigh_preview(d, g);
  // What the layer in front left is visible already: that was awaited before the front product.
  if (d.reduce_width) measure_motion(d.before_Bd, d.after_Bd, d.left_skip_B, d.width, d.motion_B2, fixed);
  await_copies();
  if (d.ends) {
    await(team);
    stage_down(d.path, g.path);
  }
  __syncthreads();
  if (d.ends) {
    pass_by(d.path, g.path, d.next_Bd, first, end, state);
    __syncthreads();
    arrive(team);
  }
  find_logits(d, g, held, team, fixed);
  __syncthreads();
  const float prob = find_probability(d, g, out_bias);
  const bool skip = wants_skip(d, prob, bar);
  const bool runs = __any_sync(0xffffffffu, !skip);
  note_decision(d, prob, skip, runs, step);
  know(team, d.skip_LB + d.leader * ROWS, runs);
  if (d.next_Bd && !d.ends && !team.known) pass_by(d.path, g.path, d.next_Bd, first, end, state);
}

static_assert(sizeof(Decision) <= DECISION_BYTES, "Fixed has room for it");
