// PAW, after its products: the shortlist's best candidates, and what a PAW layer sees (SPEC 2).

struct Shortlist {
  const float* score_BN;
  int count;  // N
  int wanted; // M
  int* index_BM;
};

// Larger numbers have larger keys.
__device__ __forceinline__ u32 order_key(float v) {
  const u32 bits = __float_as_uint(v);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ int warp_total(int v) {
#pragma unroll
  for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(0xffffffffu, v, d);
  return v;
}

// Sum of v over the threads in front of this one.
__device__ __forceinline__ int block_scan(int v, int* scratch) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  int upto = v;
#pragma unroll
  for (int d = 1; d < WARP; d <<= 1) {
    const int other = __shfl_up_sync(0xffffffffu, upto, d);
    if (lane >= d) upto += other;
  }
  __syncthreads();
  if (lane == WARP - 1) scratch[warp] = upto;
  __syncthreads();
  for (int w = 0; w < warp; ++w) upto += scratch[w];
  return upto - v;
}

#define HELD_KEYS 32  // of a thread

// The largest t such that at least `wanted` keys are >= t, bit by bit from the top.
__device__ __forceinline__ u32 find_threshold(const u32* key, int wanted, int* counts) {
  u32 threshold = 0;
  for (int bit = 31; bit >= 0; --bit) {
    const u32 tried = threshold | 1u << bit;
    int reach = 0;
#pragma unroll
    for (int j = 0; j < HELD_KEYS; ++j) reach += key[j] >= tried;
    reach = warp_total(reach);
    if (threadIdx.x % WARP == 0) atomicAdd(counts + bit, reach);
    __syncthreads();
    if (counts[bit] >= wanted) threshold = tried;
    if (counts[bit] == wanted) break;
  }
  return threshold;
}

// The places of the `wanted` highest keys, in a fixed order; of equal ones the first seen stay.
__device__ __forceinline__ void write_highest(const u32* key, u32 threshold, int wanted, int* index_M, int* scratch) {
  int above = 0, level = 0;
#pragma unroll
  for (int j = 0; j < HELD_KEYS; ++j) {
    above += key[j] > threshold;
    level += key[j] == threshold;
  }
  int place = block_scan(above, scratch);
  int level_place = block_scan(level, scratch);
  __syncthreads();
  if (threadIdx.x == blockDim.x - 1) scratch[0] = place + above;
  __syncthreads();
  level_place += scratch[0];
#pragma unroll
  for (int j = 0; j < HELD_KEYS; ++j) {
    const int i = j * blockDim.x + threadIdx.x;
    if (key[j] > threshold) index_M[place++] = i;
    if (key[j] == threshold && level_place < wanted) index_M[level_place++] = i;
  }
}

// One block a row.
extern "C" __global__ void __launch_bounds__(1024) shortlist(Shortlist s) {
  __shared__ int counts[32], scratch[32];
  const float* score_N = s.score_BN + (long long)blockIdx.x * s.count;
  if (threadIdx.x < 32) counts[threadIdx.x] = 0;
  await();
  allow_next();
  u32 key[HELD_KEYS];
#pragma unroll
  for (int j = 0; j < HELD_KEYS; ++j) {
    const int i = j * blockDim.x + threadIdx.x;
    key[j] = i < s.count ? order_key(__ldcg(score_N + i)) : 0;  // below every number
  }
  __syncthreads();
  const u32 threshold = find_threshold(key, s.wanted, counts);
  write_highest(key, threshold, s.wanted, s.index_BM + blockIdx.x * s.wanted, scratch);
}

struct Look {
  const num* front;
  long long front_stride;
  int window_at;
  int window_hidden;
  const num* window_out;
  const num* window_bias;
  float fixed_window;  // below 0: predicted
  int hard;
  float temperature;
  const num* query_BKR;
  long long query_stride;
  const int* index_BM;
  const num* table_NR;
  int early;  // the shortlist was there before the kernel in front began
  int horizons, candidates, rank;
  const num* mix;  // [rank, 16, 3]; null: a plain mean
  const num* mix_bias;
  num* pooled_BR;
  float* entropy_B;
};

#define CONV_GROUP 16
#define HORIZONS_AT_ONCE 4

// ŵ, in all lanes of a warp.
__device__ __forceinline__ float predict_window(const Look& l, int b) {
  if (l.fixed_window >= 0.f) return l.fixed_window;
  const num* hidden = l.front + b * l.front_stride + l.window_at;
  float sum = 0.f;
  for (int i = threadIdx.x % WARP; i < l.window_hidden; i += WARP)
    sum += rounded(silu(read(hidden + i))) * widen(l.window_out[i]);
  const float logit = rounded(warp_sum(sum) + widen(l.window_bias[0]));
  return l.horizons / (1.f + expf(-logit));
}

__device__ __forceinline__ float inclusion(const Look& l, float window, int h) {
  const float margin = window - (h + 0.5f);
  if (l.fixed_window >= 0.f) return margin > 0.f;
  if (l.hard) return margin > 0.f || h == 0;
  return 1.f / (1.f + expf(-margin / l.temperature));
}

// scores[h][m] = q_h · E_m, rounded; entries of the table lie `pitch` apart.
__device__ __forceinline__ void score_candidates(const Look& l, const float* query, const float* table, int pitch,
                                                 float* score) {
  const int bands = (l.horizons + HORIZONS_AT_ONCE - 1) / HORIZONS_AT_ONCE;
  for (int i = threadIdx.x; i < bands * l.candidates; i += blockDim.x) {
    const int m = i % l.candidates, h0 = i / l.candidates * HORIZONS_AT_ONCE;
    float sum[HORIZONS_AT_ONCE] = {};
    for (int r = 0; r < l.rank; r += 4) {
      const float4 e = *(const float4*)(table + m * pitch + r);
#pragma unroll
      for (int j = 0; j < HORIZONS_AT_ONCE; ++j) {
        const float4 q = *(const float4*)(query + min(h0 + j, l.horizons - 1) * l.rank + r);
        sum[j] += q.x * e.x + q.y * e.y + q.z * e.z + q.w * e.w;
      }
    }
    for (int j = 0; j < HORIZONS_AT_ONCE && h0 + j < l.horizons; ++j)
      score[(h0 + j) * l.candidates + m] = rounded(sum[j]);
  }
}

// Softmax of each horizon's scores, in place and rounded; the first one's entropy.
__device__ __forceinline__ void normalise(const Look& l, int b, float* score) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  for (int h = warp; h < l.horizons; h += blockDim.x / WARP) {
    float top = MINUS_INFINITY, total = 0.f, entropy = 0.f;
    for (int m = lane; m < l.candidates; m += WARP) top = fmaxf(top, score[h * l.candidates + m]);
    top = warp_max(top);
    for (int m = lane; m < l.candidates; m += WARP) total += expf(score[h * l.candidates + m] - top);
    total = warp_sum(total);
    for (int m = lane; m < l.candidates; m += WARP) {
      const float prob = expf(score[h * l.candidates + m] - top) / total;
      if (prob > 0.f) entropy -= prob * logf(prob);
      score[h * l.candidates + m] = rounded(prob);
    }
    if (h == 0) {
      entropy = warp_sum(entropy);
      if (lane == 0) l.entropy_B[b] = entropy;
    }
  }
}

// value[h][r] = α_h · Σ_m prob[h][m]·E_m[r], rounded after the sum and after the weight.
__device__ __forceinline__ void expect(const Look& l, const float* prob, const float* table, int pitch,
                                       const float* weight, float* value) {
  const int bands = (l.horizons + HORIZONS_AT_ONCE - 1) / HORIZONS_AT_ONCE;
  for (int i = threadIdx.x; i < bands * l.rank; i += blockDim.x) {
    const int r = i % l.rank, h0 = i / l.rank * HORIZONS_AT_ONCE;
    float sum[HORIZONS_AT_ONCE] = {};
    for (int m = 0; m < l.candidates; ++m) {
      const float e = table[m * pitch + r];
#pragma unroll
      for (int j = 0; j < HORIZONS_AT_ONCE; ++j)
        sum[j] += prob[min(h0 + j, l.horizons - 1) * l.candidates + m] * e;
    }
    for (int j = 0; j < HORIZONS_AT_ONCE && h0 + j < l.horizons; ++j)
      value[(h0 + j) * l.rank + r] = rounded(rounded(sum[j]) * weight[h0 + j]);
  }
}

// The grouped convolution over horizons, SiLU and weight included. taps: [16, 3, rank].
__device__ __forceinline__ void convolve(const Look& l, const float* value, const float* weight, const float* taps,
                                         float* out) {
  const int bands = (l.horizons + HORIZONS_AT_ONCE - 1) / HORIZONS_AT_ONCE;
  for (int k = threadIdx.x; k < bands * l.rank; k += blockDim.x) {
    const int r = k % l.rank, h0 = k / l.rank * HORIZONS_AT_ONCE, group = r / CONV_GROUP * CONV_GROUP;
    float sum[HORIZONS_AT_ONCE];
#pragma unroll
    for (int j = 0; j < HORIZONS_AT_ONCE; ++j) sum[j] = widen(l.mix_bias[r]);
    for (int i = 0; i < CONV_GROUP; ++i) {
      float seen[HORIZONS_AT_ONCE + 2];
#pragma unroll
      for (int j = 0; j < HORIZONS_AT_ONCE + 2; ++j) {
        const int h = h0 + j - 1;
        seen[j] = h >= 0 && h < l.horizons ? value[h * l.rank + group + i] : 0.f;
      }
#pragma unroll
      for (int t = 0; t < 3; ++t) {
        const float tap = taps[(i * 3 + t) * l.rank + r];
#pragma unroll
        for (int j = 0; j < HORIZONS_AT_ONCE; ++j) sum[j] = fmaf(tap, seen[j + t], sum[j]);
      }
    }
    for (int j = 0; j < HORIZONS_AT_ONCE && h0 + j < l.horizons; ++j)
      out[(h0 + j) * l.rank + r] = rounded(rounded(silu(rounded(sum[j]))) * weight[h0 + j]);
  }
}

// The candidates' embeddings into table, whole 16 bytes at a time.
__device__ __forceinline__ void gather(const Look& l, int b, float* table, int pitch) {
  const int parts = l.rank / LANE_NUMS;
#pragma unroll 2
  for (int k = threadIdx.x; k < l.candidates * parts; k += blockDim.x) {
    const int m = k / parts, part = k % parts * LANE_NUMS;
    const long long row = __ldcg(l.index_BM + b * l.candidates + m);
    unpack(*(const uint4*)(l.table_NR + row * l.rank + part), table + m * pitch + part);
  }
}

extern "C" __global__ void __launch_bounds__(512) look(Look l) {
  __shared__ float weight[64];
  const int b = blockIdx.x, pitch = l.rank + 4;
  float* table = (float*)shared;                 // [M, pitch]
  float* query = table + l.candidates * pitch;   // [K, R], later the expectations
  float* value = query + l.horizons * l.rank;    // [K, R]
  float* score = value + l.horizons * l.rank;    // [K, M]
  float* taps = score + l.horizons * l.candidates;
  if (l.mix)
#pragma unroll 4
    for (int i = threadIdx.x; i < l.rank * CONV_GROUP * 3; i += blockDim.x)
      taps[i % (CONV_GROUP * 3) * l.rank + i / (CONV_GROUP * 3)] = widen(l.mix[i]);
  if (l.early) gather(l, b, table, pitch);
  await();
  allow_next();
#pragma unroll 4
  for (int i = threadIdx.x; i < l.horizons * l.rank; i += blockDim.x)
    query[i] = read(l.query_BKR + b * l.query_stride + i);
  if (!l.early) gather(l, b, table, pitch);
  if (threadIdx.x < WARP) {
    const float window = predict_window(l, b);
    for (int h = threadIdx.x; h < l.horizons; h += WARP) weight[h] = rounded(inclusion(l, window, h));
  }
  __syncthreads();
  score_candidates(l, query, table, pitch, score);
  __syncthreads();
  normalise(l, b, score);
  __syncthreads();
  expect(l, score, table, pitch, weight, value);
  __syncthreads();
  if (l.mix) {
    convolve(l, value, weight, taps, query);
    value = query;
    __syncthreads();
  }
  for (int r = threadIdx.x; r < l.rank; r += blockDim.x) {
    float sum = 0.f, total = 0.f;
    for (int h = 0; h < l.horizons; ++h) {
      sum += value[h * l.rank + r];
      total += weight[h];
    }
    l.pooled_BR[b * l.rank + r] = narrow(rounded(sum) / rounded(rounded(total) + 1e-6f));
  }
}
