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

extern "C" __global__ void __launch_bounds__(32) boundary(Boundary c) {
  await();
  allow_next();
  const int b = threadIdx.x;
  if (b >= ROWS) return;
  const num* logit = c.front + b * c.front_stride + c.label_at;
  int label = 0;
  for (int i = 1; i < 4; ++i)
    if (read(logit + i) > read(logit + label)) label = i;
  const bool opens = label != I_LABEL || !__ldcg(c.continuable_B + b);
  const int closed = __ldcg(c.closed_B + b), size = __ldcg(c.open_size_B + b);
  const bool closes = opens && size > 0;
  if (opens) c.continuable_B[b] = label == B_LABEL;
  c.before_B[b] = closed;
  c.slot_B[b] = closes ? closed % c.ring_length : -1;
  c.size_B[b] = size;
  c.kept_B[b] = !opens;
  c.closed_B[b] = closed + closes;
  c.open_size_B[b] = opens ? 1 : size + 1;
  const int step = __ldcg(c.step);
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

// Score of one chunk, or of the null slot, for the head whose query is in shared memory.
__device__ __forceinline__ float chunk_score(const ChunkRead& c, const float* query, const num* key) {
  float sum = 0.f;
#pragma unroll 4
  for (int i = 0; i < c.width / c.heads; i += LANE_NUMS) {
    float k[LANE_NUMS];
    unpack(__ldcg((const uint4*)(key + i)), k);
#pragma unroll
    for (int j = 0; j < LANE_NUMS; ++j) sum = fmaf(query[i + j], k[j], sum);
  }
  return rounded(rounded(sum) * c.scale);
}

// Softmax of the scores by one warp, rounded, in place.
__device__ __forceinline__ void normalise_scores(float* score, int slots) {
  const int lane = threadIdx.x;
  float top = MINUS_INFINITY, total = 0.f;
  for (int s = lane; s < slots; s += WARP) top = fmaxf(top, score[s]);
  top = warp_max(top);
  for (int s = lane; s < slots; s += WARP) total += expf(score[s] - top);
  total = warp_sum(total);
  for (int s = lane; s < slots; s += WARP) score[s] = rounded(expf(score[s] - top) / total);
}

// grid (heads, 1, ROWS). Slot 0 of the scores is the null slot.
extern "C" __global__ void __launch_bounds__(256) chunk_read(ChunkRead c) {
  const int h = blockIdx.x, b = blockIdx.z, size = c.width / c.heads;
  float* query = (float*)shared;              // [size]
  float* partial = query + size;              // [256]
  float* score = partial + 256;               // [1 + used]
  await();
  allow_next();
  if (skips(c.skip_B, b)) return;
  const int before = __ldcg(c.before_B + b), slots = 1 + min(before, c.ring_length);
  const num* keys = c.keys + (long long)b * c.ring_length * c.width + h * size;
  const num* values = c.values + (long long)b * c.ring_length * c.width + h * size;
  for (int i = threadIdx.x; i < size; i += blockDim.x)
    query[i] = read(c.front + b * c.front_stride + c.query_at + h * size + i);
  __syncthreads();
  for (int s = threadIdx.x; s < slots; s += blockDim.x) {
    float v = chunk_score(c, query, s ? keys + (long long)(s - 1) * c.width : c.null_key + h * size);
    if (s) {
      const int distance = (before - s + c.ring_length) % c.ring_length;  // of slot s − 1
      v = rounded(v + widen(c.bias_HC[h * c.buckets + c.bucket_C[distance]]));
    }
    score[s] = v;
  }
  __syncthreads();
  if (threadIdx.x < WARP) normalise_scores(score, slots);
  __syncthreads();
  const int bands = blockDim.x / size, band = threadIdx.x / size, i = threadIdx.x % size;
  float sum = 0.f;
  if (band < bands) {
#pragma unroll 8
    for (int s = 1 + band; s < slots; s += bands) sum += score[s] * read(values + (long long)(s - 1) * c.width + i);
    partial[threadIdx.x] = sum;
  }
  __syncthreads();
  if (threadIdx.x >= size) return;
  sum = score[0] * widen(c.null_value[h * size + i]);
  for (int k = 0; k < bands; ++k) sum += partial[k * size + i];
  c.out[b * c.width + h * size + i] = narrow(sum);
}

// Add x̂ to the open chunk's sum, or begin a new one. One block a row.
struct ChunkExtend {
  const num* state_Bd;
  int width;
  float eps;
  const int* kept_B;
  float* sum_Bd;
};

extern "C" __global__ void __launch_bounds__(256) chunk_extend(ChunkExtend c) {
  __shared__ float scratch[32];
  const int b = blockIdx.x;
  await();
  allow_next();
  const num* state = c.state_Bd + (long long)b * c.width;
  float* sum = c.sum_Bd + (long long)b * c.width;
  float square = 0.f;
  for (int k = threadIdx.x; k < c.width; k += blockDim.x) square += read(state + k) * read(state + k);
  const float inverse = rsqrtf(block_sum(square, scratch) / c.width + c.eps);
  const float kept = (float)__ldcg(c.kept_B + b);
  for (int k = threadIdx.x; k < c.width; k += blockDim.x)
    sum[k] = rounded(read(state + k) * inverse) + __ldcg(sum + k) * kept;
}
