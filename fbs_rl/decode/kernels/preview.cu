// PAW, after its products: the shortlist's best candidates, and what a PAW layer sees (SPEC 2).

// Scores of all candidates: the mean horizon's query with each, and the prior. A share of them a block.
struct Scores {
  const num* front;
  long long front_stride;
  int query_at;
  const num* mean_map_RR;
  const num* table_NR;
  const float* prior_N;
  int count, rank;  // N, R
  float* score_BN;
  float* best;  // of each block, [blocks, ROWS]
};

// out = W·x, rounded; W has `count` rows.
__device__ __forceinline__ void map_query(const num* weight, int count, int rank, const float* x, float* out) {
  multiply_rows(weight, weight + rank, rank, count, rank, x, out);
  __syncthreads();
  ROLLED for (int r = threadIdx.x; r < count; r += THREADS) out[r] = rounded(out[r]);
  __syncthreads();
}

__device__ __forceinline__ void scores(const Scores& s, Team& team, Fixed& fixed, unsigned char* room) {
  float *asked = (float*)room, *query = asked + s.rank, *score = query + s.rank;
  const int from = (int)((long long)s.count * blockIdx.x / gridDim.x);
  const int share = (int)((long long)s.count * (blockIdx.x + 1) / gridDim.x) - from;
  const num* table = s.table_NR + (long long)from * s.rank;
  if (threadIdx.x == 0 && share) bring_near(table, share * s.rank * sizeof(num));
  await(team);
  ROLLED for (int b = 0; b < ROWS; ++b) {
    const num* front = s.front + b * s.front_stride + s.query_at;
    ROLLED for (int r = threadIdx.x; r < s.rank; r += THREADS) asked[r] = read(front + r);
    __syncthreads();
    map_query(s.mean_map_RR, s.rank, s.rank, asked, query);
    multiply_rows(table, table + s.rank, s.rank, share, s.rank, query, score);
    __syncthreads();
    float value = MINUS_INFINITY, v;
    int index = 0x7fffffff;
    ROLLED for (int i = threadIdx.x; i < share; i += THREADS) {
      s.score_BN[(long long)b * s.count + from + i] = v = rounded(score[i]) + s.prior_N[from + i];
      better(value, index, v, from + i);
    }
    block_best(value, index, fixed, s.best + blockIdx.x * ROWS + b, nullptr);
    __syncthreads();
  }
}

struct Shortlist {
  const float* score_BN;
  int count;  // N
  int wanted; // M
  const float* best;  // of each block's scores, [offers, ROWS]
  int offers;
  u32* key_BF;  // scores that may be among the highest, in no order: FOUND_KEYS a row
  int* place_BF;
  int* found_B;    // how many, zero between steps
  int* arrived_B;
  int* index_BM;
};

// Larger numbers have larger keys.
__device__ __forceinline__ u32 order_key(float v) {
  const u32 bits = __float_as_uint(v);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

#define FOUND_KEYS 1024  // that are compared with each other

// The `wanted`-th largest of THREADS keys, one a thread; 0 if there are fewer. keys: room for them.
__device__ __forceinline__ u32 nth_largest(u32 key, int wanted, u32* keys, int* answer) {
  keys[threadIdx.x] = key;
  if (threadIdx.x == 0) *answer = 0;
  __syncthreads();
  int above = 0, level = 0;
#pragma unroll 8
  for (int i = 0; i < THREADS; ++i) {
    above += keys[i] > key;
    level += keys[i] == key;
  }
  if (above < wanted && wanted <= above + level) *answer = (int)key;  // the same from all that are level
  __syncthreads();
  return wanted > THREADS ? 0 : (u32)*answer;
}

// Of this block's share of the keys those that are at least `least`, to what other blocks find.
__device__ __forceinline__ void offer_keys(const Shortlist& s, int b, const float* score_N, u32 least) {
  const int from = (int)((long long)s.count * blockIdx.x / gridDim.x);
  const int end = (int)((long long)s.count * (blockIdx.x + 1) / gridDim.x);
  ROLLED for (int i = from + threadIdx.x; i < end; i += THREADS) {
    const u32 k = order_key(__ldcg(score_N + i));
    if (k < least) continue;
    const int place = atomicAdd(s.found_B + b, 1);
    if (place >= FOUND_KEYS) continue;
    s.key_BF[b * FOUND_KEYS + place] = k;
    s.place_BF[b * FOUND_KEYS + place] = i;
  }
}

// How many keys are at least `least`.
__device__ __forceinline__ int count_keys(const Shortlist& s, const float* score_N, u32 least, float* scratch) {
  int reach = 0;
  ROLLED for (int i = threadIdx.x; i < s.count; i += THREADS) reach += order_key(__ldcg(score_N + i)) >= least;
  return (int)block_sum((float)reach, scratch);  // exact below 2^24
}

// The largest key such that at least `wanted` are no smaller, bit by bit: slow, for scores that are much alike.
__device__ __forceinline__ u32 find_threshold(const Shortlist& s, const float* score_N, float* scratch) {
  u32 threshold = 0;
  ROLLED for (int bit = 31; bit >= 0; --bit)
    if (count_keys(s, score_N, threshold | 1u << bit, scratch) >= s.wanted) threshold |= 1u << bit;
  return threshold;
}

// The first of the keys that are above `bound` (level 0) or equal it (level 1), in order, up to `wanted` in all.
__device__ __forceinline__ int collect(const Shortlist& s, const float* score_N, u32 bound, int level, int placed, u32* key,
                                       int* index) {
  int* flag = index + FOUND_KEYS;
  ROLLED for (int from = 0; from < s.count && placed < s.wanted; from += THREADS) {
    const int i = from + threadIdx.x;
    const u32 k = i < s.count ? order_key(__ldcg(score_N + i)) : 0;
    flag[threadIdx.x] = i < s.count && (level ? k == bound : k > bound);
    __syncthreads();
    int before = placed, all = 0;
    ROLLED for (int j = 0; j < THREADS; ++j) {
      before += j < (int)threadIdx.x && flag[j];
      all += flag[j];
    }
    if (flag[threadIdx.x] && before < s.wanted) {
      key[before] = k;
      index[before] = i;
    }
    placed = min(placed + all, s.wanted);
    __syncthreads();
  }
  return placed;
}

// What all blocks have found, by the last of them; the slow way if that was too much.
__device__ __forceinline__ int take_found(const Shortlist& s, int b, const float* score_N, Fixed& fixed, u32* key, int* index) {
  const int found = __ldcg(s.found_B + b);
  __syncthreads();
  if (threadIdx.x == 0) s.found_B[b] = 0;  // for the next step
  if (found <= FOUND_KEYS) {
    ROLLED for (int i = threadIdx.x; i < found; i += THREADS) {
      key[i] = __ldcg(s.key_BF + b * FOUND_KEYS + i);
      index[i] = __ldcg(s.place_BF + b * FOUND_KEYS + i);
    }
    __syncthreads();
    return found;
  }
  const u32 bound = find_threshold(s, score_N, fixed.scratch);
  return collect(s, score_N, bound, 1, collect(s, score_N, bound, 0, 0, key, index), key, index);
}

// The places of the highest scores of each row, the best first; of equal ones the lower place. At least `wanted` of
// the blocks' best are among the best, so the `wanted`-th best of those is a bound that few keys reach.
__device__ __forceinline__ void shortlist(const Shortlist& s, Team& team, Fixed& fixed, unsigned char* room) {
  u32* key = (u32*)room;
  int* index = (int*)(key + FOUND_KEYS);
  await(team);
  ROLLED for (int b = 0; b < ROWS; ++b) {
    const float* score_N = s.score_BN + (long long)b * s.count;
    const u32 best = (int)threadIdx.x < s.offers ? order_key(__ldcg(s.best + threadIdx.x * ROWS + b)) : 0;
    offer_keys(s, b, score_N, nth_largest(best, s.wanted, key, fixed.counts));
    if (arrive_last(s.arrived_B + b, gridDim.x, fixed.counts)) {
      const int found = take_found(s, b, score_N, fixed, key, index);
      ROLLED for (int i = threadIdx.x; i < found; i += THREADS) {
        int before = 0;
        ROLLED for (int j = 0; j < found; ++j) before += key[j] > key[i] || (key[j] == key[i] && index[j] < index[i]);
        if (before < s.wanted) s.index_BM[b * s.wanted + before] = index[i];
      }
    }
    __syncthreads();
  }
}

struct Look {
  const num* front;
  long long front_stride;
  int query_at;
  int window_at;
  int window_hidden;
  const num* window_out;
  const num* window_bias;
  float fixed_window;  // below 0: predicted
  int hard;
  float temperature;
  const num* maps_KRR;  // of the query, for each horizon
  const int* index_BM;
  const num* table_NR;
  int early;  // the shortlist was there before the call in front
  int horizons, candidates, rank;
  const num* mix;  // [rank, 16, 3]; null: a plain mean
  const num* mix_bias;
  float* mixed_BKR;
  int* arrived_B;
  num* pooled_BR;
  float* entropy_B;
};

#define CONV_GROUP 16
#define MOST_HORIZONS 64
#define SEEN 3  // horizons that the convolution joins
#define TAP_WORDS (CONV_GROUP * SEEN * (int)sizeof(num) / 4)  // of one output; in shared memory one more, an odd number

// ŵ, in all lanes of a warp.
__device__ __forceinline__ float predict_window(const Look& l, int b) {
  if (l.fixed_window >= 0.f) return l.fixed_window;
  const num* hidden = l.front + b * l.front_stride + l.window_at;
  float sum = 0.f;
#pragma unroll 2
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

// One block's shared memory: of up to SEEN horizons, the first of them `low`.
struct LookRoom {
  float* table;   // [M, pitch]
  float* asked;   // [R]
  float* query;   // [SEEN, R]
  float* value;   // [SEEN, R]
  float* score;   // [SEEN, M]
  float* weight;  // [K], of all horizons
  u32* taps;      // [R, TAP_WORDS + 1]
  int pitch, low, seen;
};

// The candidates' embeddings into the table, whole 16 bytes at a time.
__device__ __forceinline__ void gather(const Look& l, int b, const LookRoom& m) {
  const int parts = l.rank / LANE_NUMS, rows = THREADS / parts, part = threadIdx.x % parts * LANE_NUMS;
#pragma unroll 4
  for (int c = threadIdx.x / parts; c < l.candidates && (int)threadIdx.x < rows * parts; c += rows) {
    const long long row = __ldcg(l.index_BM + b * l.candidates + c);
    unpack(*(const uint4*)(l.table_NR + row * l.rank + part), m.table + c * m.pitch + part);
  }
}

// score[h][m] = q_h · E_m, rounded.
__device__ __forceinline__ void score_candidates(const Look& l, const LookRoom& m) {
  ROLLED for (int i = threadIdx.x; i < m.seen * l.candidates; i += THREADS) {
    const int h = i / l.candidates, c = i % l.candidates;
    float sum[2] = {};
#pragma unroll 4
    for (int r = 0; r < l.rank; r += 4) {
      const float4 e = *(const float4*)(m.table + c * m.pitch + r), q = *(const float4*)(m.query + h * l.rank + r);
      sum[0] += q.x * e.x + q.y * e.y;
      sum[1] += q.z * e.z + q.w * e.w;
    }
    m.score[i] = rounded(sum[0] + sum[1]);
  }
}

// Softmax of each horizon's scores, in place and rounded; the first one's entropy.
__device__ __forceinline__ void normalise(const Look& l, int b, const LookRoom& m) {
  const int h = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  if (h >= m.seen) return;
  float* score = m.score + h * l.candidates;
  float top = MINUS_INFINITY, total = 0.f, entropy = 0.f;
  ROLLED for (int c = lane; c < l.candidates; c += WARP) top = fmaxf(top, score[c]);
  top = warp_max(top);
  ROLLED for (int c = lane; c < l.candidates; c += WARP) total += expf(score[c] - top);
  total = warp_sum(total);
  ROLLED for (int c = lane; c < l.candidates; c += WARP) {
    const float prob = expf(score[c] - top) / total;
    if (prob > 0.f) entropy -= prob * logf(prob);
    score[c] = rounded(prob);
  }
  entropy = warp_sum(entropy);
  if (m.low + h == 0 && lane == 0) l.entropy_B[b] = entropy;  // the same from every block that sees it
}

// value[h][r] = α_h · Σ_m prob[h][m]·E_m[r], rounded after the sum and after the weight.
__device__ __forceinline__ void expect(const Look& l, const LookRoom& m) {
  ROLLED for (int i = threadIdx.x; i < m.seen * l.rank; i += THREADS) {
    const int h = i / l.rank, r = i % l.rank;
    float sum = 0.f;
#pragma unroll 8
    for (int c = 0; c < l.candidates; ++c) sum += m.score[h * l.candidates + c] * m.table[c * m.pitch + r];
    m.value[i] = rounded(rounded(sum) * m.weight[m.low + h]);
  }
}

// The grouped convolution's output r for horizon h, SiLU and weight included.
__device__ __forceinline__ float convolve(const Look& l, const LookRoom& m, int h, int r) {
  const num* taps = (const num*)(m.taps + r * (TAP_WORDS + 1));
  const float* value = m.value + r / CONV_GROUP * CONV_GROUP;
  float sum = widen(l.mix_bias[r]);
#pragma unroll 4
  for (int i = 0; i < CONV_GROUP; ++i)
#pragma unroll
    for (int t = 0; t < SEEN; ++t) {
      const int at = h + t - 1 - m.low;
      if (at >= 0 && at < m.seen) sum = fmaf(widen(taps[i * SEEN + t]), value[at * l.rank + i], sum);
    }
  return rounded(rounded(silu(rounded(sum))) * m.weight[h]);
}

// Σ_h value_h / Σ_h α_h, by the block that comes last.
__device__ __forceinline__ void pool(const Look& l, int b, const LookRoom& m) {
  ROLLED for (int r = threadIdx.x; r < l.rank; r += THREADS) {
    float sum = 0.f, total = 0.f;
#pragma unroll 16
    for (int h = 0; h < l.horizons; ++h) sum += __ldcg(l.mixed_BKR + ((long long)b * l.horizons + h) * l.rank + r);
    ROLLED for (int h = 0; h < l.horizons; ++h) total += m.weight[h];
    l.pooled_BR[b * l.rank + r] = narrow(rounded(sum) / rounded(rounded(total) + 1e-6f));
  }
}

// One horizon of one row, and its neighbours where the convolution needs them. The call in front is awaited here.
__device__ __forceinline__ void look_at(const Look& l, int b, int h, Team& team, Fixed& fixed, unsigned char* room) {
  LookRoom m;
  m.pitch = l.rank + 4;
  m.table = (float*)room;
  m.asked = m.table + l.candidates * m.pitch;
  m.query = m.asked + l.rank;
  m.value = m.query + SEEN * l.rank;
  m.score = m.value + SEEN * l.rank;
  m.weight = m.score + SEEN * l.candidates;
  m.low = l.mix ? max(h - 1, 0) : h;
  m.seen = (l.mix ? min(h + 2, l.horizons) : h + 1) - m.low;
  m.taps = (u32*)(m.weight + MOST_HORIZONS);
  const int r = threadIdx.x;
  if (l.mix)
#pragma unroll 4
    for (int k = threadIdx.x; k < l.rank * TAP_WORDS; k += THREADS)
      m.taps[k / TAP_WORDS * (TAP_WORDS + 1) + k % TAP_WORDS] = ((const u32*)l.mix)[k];
  const num* maps = l.maps_KRR + (long long)m.low * l.rank * l.rank;
  if (threadIdx.x == 0) bring_near(maps, m.seen * l.rank * l.rank * sizeof(num));
  if (l.early) gather(l, b, m);
  await(team);
  if (r < l.rank) m.asked[r] = read(l.front + b * l.front_stride + l.query_at + r);
  if (!l.early) gather(l, b, m);
  if (threadIdx.x >= THREADS - WARP) {
    const float window = predict_window(l, b);
    ROLLED for (int k = threadIdx.x % WARP; k < l.horizons; k += WARP) m.weight[k] = rounded(inclusion(l, window, k));
  }
  __syncthreads();
  map_query(maps, m.seen * l.rank, l.rank, m.asked, m.query);
  score_candidates(l, m);
  __syncthreads();
  normalise(l, b, m);
  __syncthreads();
  expect(l, m);
  __syncthreads();
  if (r < l.rank)
    l.mixed_BKR[((long long)b * l.horizons + h) * l.rank + r] = l.mix ? convolve(l, m, h, r) : m.value[r];
  if (arrive_last(l.arrived_B + b, l.horizons, fixed.counts)) pool(l, b, m);
}

__device__ __forceinline__ void look(const Look& l, Team& team, Fixed& fixed, unsigned char* room) {
  ROLLED for (int i = blockIdx.x; i < l.horizons * ROWS; i += gridDim.x) {
    look_at(l, i / l.horizons, i % l.horizons, team, fixed, room);
    __syncthreads();
  }
}
