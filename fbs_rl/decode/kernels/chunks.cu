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

__device__ __forceinline__ void boundary(const Boundary& c, Team& team) {
  await(team);
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
  num* out;  // [ROWS, width]
};

// Softmax of the scores by the whole block, rounded, in place.
__device__ __forceinline__ void normalise_scores(float* score, int slots, float* scratch) {
  const int warp = threadIdx.x / WARP;
  float top = MINUS_INFINITY, total = 0.f;
  ROLLED for (int s = threadIdx.x; s < slots; s += THREADS) top = fmaxf(top, score[s]);
  top = warp_max(top);
  if (threadIdx.x % WARP == 0) scratch[warp] = top;
  __syncthreads();
  ROLLED for (int w = 0; w < WARPS; ++w) top = fmaxf(top, scratch[w]);
  __syncthreads();
  ROLLED for (int s = threadIdx.x; s < slots; s += THREADS) total += expf(score[s] - top);
  total = block_sum(total, scratch);
  ROLLED for (int s = threadIdx.x; s < slots; s += THREADS) score[s] = rounded(expf(score[s] - top) / total);
  __syncthreads();
}

// Scores of the slots, of which 0 is the null slot, from what a query gave with their keys.
__device__ __forceinline__ void score_chunks(const ChunkRead& c, int before, int slots, const float* bias_C, float* score) {
  const int turn = before % c.ring_length;
  ROLLED for (int s = threadIdx.x; s < slots; s += THREADS) {
    const int gap = turn - s;  // slot s − 1 lies so many chunks back, in turns of the ring
    const float v = rounded(rounded(score[s]) * c.scale);
    score[s] = s ? rounded(v + bias_C[gap < 0 ? gap + c.ring_length : gap]) : v;
  }
}

// One head of one row.
__device__ __forceinline__ void read_chunks(const ChunkRead& c, int h, int b, Fixed& fixed, unsigned char* room) {
  const int size = c.width / c.heads;
  float* query = (float*)room;       // [size]
  float* partial = query + size;     // [bands, size]
  float* bias_C = partial + THREADS * LANE_NUMS;  // [ring]
  float* score = bias_C + c.ring_length;          // [1 + used]
  if (ROWS > 1 && skips(c.skip_B, b)) return;
  const int before = __ldcg(c.before_B + b), slots = 1 + min(before, c.ring_length);
  const num* whole = c.front + b * c.front_stride + c.query_at + h * size;
  const float asked = (int)threadIdx.x < size ? read(whole + threadIdx.x) : 0.f;  // a head has at most 256 numbers
#pragma unroll 2
  for (int i = threadIdx.x; i < c.ring_length; i += THREADS) bias_C[i] = widen(c.bias_HC[h * c.buckets + c.bucket_C[i]]);
  const num* keys = c.keys + (long long)b * c.ring_length * c.width + h * size;
  const num* values = c.values + (long long)b * c.ring_length * c.width + h * size;
  if ((int)threadIdx.x < size) query[threadIdx.x] = asked;
  __syncthreads();
  multiply_rows(c.null_key + h * size, keys, c.width, slots, size, query, score);
  __syncthreads();
  score_chunks(c, before, slots, bias_C, score);
  __syncthreads();
  normalise_scores(score, slots, fixed.scratch);
  const int wide = size / LANE_NUMS, bands = THREADS / wide, band = threadIdx.x / wide, at = threadIdx.x % wide * LANE_NUMS;
  float sum[LANE_NUMS] = {};
  if (band < bands) {
#pragma unroll 8
    for (int s = 1 + band; s < slots; s += bands) {
      float v[LANE_NUMS];
      unpack(__ldcg((const uint4*)(values + (long long)(s - 1) * c.width + at)), v);
#pragma unroll
      for (int j = 0; j < LANE_NUMS; ++j) sum[j] = fmaf(score[s], v[j], sum[j]);
    }
#pragma unroll
    for (int j = 0; j < LANE_NUMS; ++j) partial[band * size + at + j] = sum[j];
  }
  __syncthreads();
  ROLLED for (int i = threadIdx.x; i < size; i += THREADS) {
    float all = score[0] * widen(c.null_value[h * size + i]);
    ROLLED for (int k = 0; k < bands; ++k) all += partial[k * size + i];
    c.out[b * c.width + h * size + i] = narrow(all);
  }
}

__device__ __forceinline__ void chunk_read(const ChunkRead& c, Team& team, Fixed& fixed,
                                           unsigned char* room) {
  await(team);
  if (!layer_runs(c.skip_B, team)) return;
  ROLLED for (int i = blockIdx.x; i < c.heads * ROWS; i += gridDim.x) {
    read_chunks(c, i % c.heads, i / c.heads, fixed, room);
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
__device__ __forceinline__ void chunk_extend(const ChunkExtend& c, Team& team, Fixed& fixed) {
  await(team);
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
