// The step's first and last call: the token's embedding, and the next token.

struct Embed {
  const num* table;
  const int* token_B;
  int width;
  num* state_Bd;
  float* motion_B2;  // null: no gate acts
};

__device__ APART void embed(const Embed& e) {
  ROLLED for (int b = blockIdx.x; b < ROWS; b += gridDim.x) {
    if (e.motion_B2 && threadIdx.x < 2) e.motion_B2[2 * b + threadIdx.x] = (float)threadIdx.x;  // δ = 0, cos = 1
    const uint4* row = (const uint4*)(e.table + (long long)__ldcg(e.token_B + b) * e.width);
#pragma unroll 2
    for (int k = threadIdx.x; k < e.width / LANE_NUMS; k += THREADS)
      ((uint4*)(e.state_Bd + (long long)b * e.width))[k] = row[k];
  }
}

struct Advance {
  const float* best;  // [blocks, ROWS] of the logits product
  const int* best_index;
  int offers;               // blocks that offer one; 0: token_B holds the choice already
  const int* forced_steps;  // [1]: how many steps take their token from forced
  const int* forced;        // [trace_steps, ROWS]
  int vocabulary;
  int* token_B;
  int* position_B;
  int* step;
  int trace_steps;
  int* token_trace;  // [trace_steps, ROWS]
  const int* skip_LB;  // null: no gate acts
  int* guess_LB;       // 1 where all rows skipped: what the next token is taken to do
  int* doubt_LB;       // the other way round
  int layers;
};

__device__ APART void advance(const Advance& a, Fixed& fixed, unsigned char* room) {
  float* best = (float*)room;
  int* best_at = (int*)(best + ROWS);
  if (blockIdx.x) return;
  ROLLED for (int b = 0; b < ROWS && a.offers; ++b) {
    float value = MINUS_INFINITY;
    int index = 0x7fffffff;
    ROLLED for (int i = threadIdx.x; i < a.offers; i += THREADS)
      better(value, index, __ldcg(a.best + i * ROWS + b), __ldcg(a.best_index + i * ROWS + b));
    block_best(value, index, fixed, best + b, best_at + b);
  }
  __syncthreads();
  const int step = __ldcg(a.step);
  __syncthreads();
  if (threadIdx.x < ROWS) {
    const int b = threadIdx.x;
    int token = a.offers ? best_at[b] : __ldcg(a.token_B + b);
    if (token >= a.vocabulary) token = 0;  // no logit was a number
    if (step < __ldcg(a.forced_steps)) token = __ldcg(a.forced + step * ROWS + b);
    if (step < a.trace_steps) a.token_trace[step * ROWS + b] = token;
    a.token_B[b] = token;
    a.position_B[b] = __ldcg(a.position_B + b) + 1;
  }
  ROLLED for (int i = threadIdx.x; a.skip_LB && i < a.layers * ROWS; i += THREADS) {
    a.guess_LB[i] = !any_runs(a.skip_LB + i / ROWS * ROWS);
    a.doubt_LB[i] = !a.guess_LB[i];
  }
  if (threadIdx.x == 0) *a.step = step + 1;
}
