// The Chunk-Head's side of a step: where chunks close, and attention to the closed ones (SPEC 3).

#define B_LABEL 0
#define I_LABEL 1

struct Boundary {
  const num* front;
  long long front_stride;
  int label_at;  // four logits, B I O S
  int ring_length;
  int* closed_B;       // chunks closed so far
  int* open_size_B;    // tokens of the open chunk
  int* continuable_B;  // it began with a B
  int* before_B;       // chunks closed before this token
  int* slot_B;         // place of the chunk that this token closes, -1: none
  int* size_B;         // its tokens
  int* kept_B;         // 0 where a new chunk begins
  const int* step;
  int trace_steps;
  int* closed_trace;  // [trace_steps, ROWS]
  unsigned char* opens_trace;
};

__device__ APART void boundary(const Boundary& c) {
  const int b = threadIdx.x;
  if (blockIdx.x || b >= ROWS) return;
  float logit[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) logit[i] = read(c.front + b * c.front_stride + c.label_at + i);
  const int closed = __ldcg(c.closed_B + b), size = __ldcg(c.open_size_B + b), step = __ldcg(c.step);
  const int continuable = __ldcg(c.continuable_B + b);
  int label = 0;
  float best = logit[0];
#pragma unroll
  for (int i = 1; i < 4; ++i)
    if (logit[i] > best) {
      best = logit[i];
      label = i;
    }
  const bool opens = label != I_LABEL || !continuable;
  const bool closes = opens && size > 0;
  if (opens) c.continuable_B[b] = label == B_LABEL;
  c.before_B[b] = closed;
  c.slot_B[b] = closes ? closed % c.ring_length : -1;
  c.size_B[b] = size;
  c.kept_B[b] = !opens;
  c.closed_B[b] = closed + closes;
  c.open_size_B[b] = opens ? 1 : size + 1;
  if (step < c.trace_steps) {
    c.closed_trace[step * ROWS + b] = closed;
    c.opens_trace[step * ROWS + b] = opens;
  }
}

struct ChunkRead {
  const num* front;
  long long front_stride;
  int query_at;
  const num* null_key;
  const num* null_value;
  const num* keys;  // [ROWS, ring, width]
  const num* values;
  const num* bias_HC;  // [heads, buckets]
  const int* bucket_C; // of a distance in chunks
  int heads, width, buckets, ring_length;
  float scale;
  const int* before_B;
  const int* skip_B;
  float* score_BHC;  // [ROWS, heads, 1 + ring]: of the null slot, then of the ring's
  num* out;          // [ROWS, width]
};

__device__ __forceinline__ bool reads_none(const ChunkRead& c, int b) { return ROWS > 1 && skips(c.skip_B, b); }

// Scores of some slots of a head, several threads a slot; those of all heads over the blocks.
__device__ APART void chunk_scores(const ChunkRead& c) {
  const int size = c.width / c.heads;
  int lanes = 1;
  while (lanes * 2 * LANE_NUMS <= size && lanes < WARP) lanes *= 2;
  const int each = THREADS / lanes, parts = c.ring_length / each + 1, lane = threadIdx.x % lanes;
  ROLLED for (int i = blockIdx.x; i < parts * c.heads * ROWS; i += gridDim.x) {
    const int h = i % c.heads, b = i / c.heads % ROWS, slot = i / c.heads / ROWS * each + (int)threadIdx.x / lanes;
    const int before = __ldcg(c.before_B + b), slots = 1 + min(before, c.ring_length);
    if (reads_none(c, b)) continue;
    const int s = min(slot, slots - 1), gap = before % c.ring_length - s;  // slot s − 1 lies so many chunks back,
    const int back = gap < 0 ? gap + c.ring_length : gap;                  // in turns of the ring
    const float bias = widen(c.bias_HC[h * c.buckets + c.bucket_C[s ? back : 0]]);
    const num* key = s ? c.keys + ((long long)b * c.ring_length + s - 1) * c.width : c.null_key;
    const num* query = c.front + b * c.front_stride + c.query_at;
    float sum = 0.f;
#pragma unroll 2
    for (int k = lane * LANE_NUMS; k < size; k += lanes * LANE_NUMS) {
      float q[LANE_NUMS], v[LANE_NUMS];
      unpack(__ldcg((const uint4*)(query + h * size + k)), q);
      unpack(__ldcg((const uint4*)(key + h * size + k)), v);
#pragma unroll
      for (int j = 0; j < LANE_NUMS; ++j) sum = fmaf(q[j], v[j], sum);
    }
    ROLLED for (int d = lanes / 2; d; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
    const float score = rounded(rounded(sum) * c.scale);
    if (lane == 0 && slot < slots)
      c.score_BHC[((long long)b * c.heads + h) * (1 + c.ring_length) + s] = s ? rounded(score + bias) : score;
  }
}

// LANE_NUMS columns of a head: what the values of all slots are, weighed by the softmax of their scores. score: [ring], of
// which a thread touches its own.
__device__ __forceinline__ void mix_chunks(const ChunkRead& c, int h, int b, int column, Fixed& fixed, float* score) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const int used = min(__ldcg(c.before_B + b), c.ring_length);
  const num* values = c.values + (long long)b * c.ring_length * c.width + column;
  const float* scores = c.score_BHC + ((long long)b * c.heads + h) * (1 + c.ring_length);
  const float null_score = __ldcg(scores);
  float top = null_score, total = 0.f, sum[WARP_ROWS] = {};  // LANE_NUMS of them
#pragma unroll 2
  for (int s = threadIdx.x; s < used; s += THREADS) top = fmaxf(top, score[s] = __ldcg(scores + 1 + s));
  top = warp_max(top);
  if (lane == 0) fixed.values[warp] = top;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < WARPS; ++w) top = fmaxf(top, fixed.values[w]);
  ROLLED for (int s = threadIdx.x; s < used; s += THREADS) total += score[s] = expf(score[s] - top);
  const float null_weight = expf(null_score - top);
  total = block_sum(total, fixed.scratch) + null_weight;
#pragma unroll 2
  for (int s = threadIdx.x; s < used; s += THREADS) {
    float v[LANE_NUMS];
    unpack(__ldcg((const uint4*)(values + (long long)s * c.width)), v);
    const float prob = rounded(score[s] / total);
#pragma unroll
    for (int i = 0; i < LANE_NUMS; ++i) sum[i] = fmaf(prob, v[i], sum[i]);
  }
  float* part = &fixed.sums[0][0];  // [WARP_ROWS, WARPS]
  const float mine = sum_together(sum);
  if (lane % ROW_LANES == 0) part[lane / ROW_LANES * WARPS + warp] = mine;
  __syncthreads();
  if (threadIdx.x >= LANE_NUMS) return;
  float all = rounded(null_weight / total) * widen(c.null_value[column + threadIdx.x]);
#pragma unroll
  for (int w = 0; w < WARPS; ++w) all += part[threadIdx.x * WARPS + w];
  c.out[b * c.width + column + threadIdx.x] = narrow(all);
}

__device__ APART void chunk_mix(const ChunkRead& c, Fixed& fixed, unsigned char* room) {
  const int wide = c.width / LANE_NUMS;
  ROLLED for (int i = blockIdx.x; i < wide * ROWS; i += gridDim.x) {
    const int b = i / wide, column = i % wide * LANE_NUMS;
    if (!reads_none(c, b)) mix_chunks(c, column / (c.width / c.heads), b, column, fixed, (float*)room);
    __syncthreads();
  }
}

// Add x̂ to the open chunk's sum, or begin a new one.
struct ChunkExtend {
  const num* state_Bd;
  int width;
  float eps;
  const int* kept_B;
  float* sum_Bd;
};

// Every block finds the row's norm by itself and adds to its own columns.
__device__ APART void chunk_extend(const ChunkExtend& c, Fixed& fixed) {
  int first, end;
  columns_of(c.width, first, end);
  ROLLED for (int b = 0; b < ROWS; ++b) {
    const num* state = c.state_Bd + (long long)b * c.width;
    float* sum = c.sum_Bd + (long long)b * c.width;
    const float kept = (float)__ldcg(c.kept_B + b);
    float square = 0.f;
#pragma unroll 2
    for (int k = threadIdx.x; k < c.width / LANE_NUMS; k += THREADS) {
      float v[LANE_NUMS];
      unpack(__ldcg((const uint4*)state + k), v);
#pragma unroll
      for (int i = 0; i < LANE_NUMS; ++i) square += v[i] * v[i];
    }
    const float inverse = rsqrtf(block_sum(square, fixed.scratch) / c.width + c.eps);
    ROLLED for (int k = first + threadIdx.x; k < end; k += THREADS)
      sum[k] = rounded(read(state + k) * inverse) + __ldcg(sum + k) * kept;
  }
}
