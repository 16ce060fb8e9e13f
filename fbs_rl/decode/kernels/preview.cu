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
    multiply_rows(s.mean_map_RR, s.rank, s.rank, asked, query);
    __syncthreads();
    multiply_rows(table, share, s.rank, query, score);
    __syncthreads();
    float value = MINUS_INFINITY, v;
    int index = 0x7fffffff;
    ROLLED for (int i = threadIdx.x; i < share; i += THREADS) {
      s.score_BN[(long long)b * s.count + from + i] = v = score[i] + s.prior_N[from + i];
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
__device__ APART void shortlist(const Shortlist& s, Fixed& fixed, unsigned char* room) {
  u32* key = (u32*)room;
  int* index = (int*)(key + FOUND_KEYS);
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
  float* seen_BKR;  // α_h times the expected embedding
  float* weight_BK; // α
  float* entropy_B;
};

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

#define SCORE_THREADS 4  // neighbours that share a candidate

// One block's shared memory.
struct LookRoom {
  num* table;     // [M, pitch]
  float* asked;   // [R]
  float* query;   // [R]
  float* score;   // [M]
  float* prob;    // [WARPS, M]
  float* part;    // [THREADS, 2]
  float* weight;  // of the horizon
  int pitch;      // rows begin half the banks apart
};

// The candidates' embeddings into the table, 16 bytes at a time.
__device__ __forceinline__ void gather(const Look& l, int b, const LookRoom& m) {
  const int parts = l.rank / LANE_NUMS, rows = THREADS / parts, part = threadIdx.x % parts * LANE_NUMS;
#pragma unroll 4
  for (int c = threadIdx.x / parts; c < l.candidates && (int)threadIdx.x < rows * parts; c += rows) {
    const long long row = __ldcg(l.index_BM + b * l.candidates + c);
    *(uint4*)(m.table + c * m.pitch + part) = *(const uint4*)(l.table_NR + row * l.rank + part);
  }
}

// score[m] = q · E_m, rounded.
__device__ __forceinline__ void score_candidates(const Look& l, const LookRoom& m) {
  const int part = threadIdx.x % SCORE_THREADS * LANE_NUMS;
  ROLLED for (int from = 0; from < l.candidates; from += THREADS / SCORE_THREADS) {
    const int c = from + threadIdx.x / SCORE_THREADS;
    float sum = 0.f;
#pragma unroll 4
    for (int r = part; r < l.rank && c < l.candidates; r += SCORE_THREADS * LANE_NUMS) {
      float e[LANE_NUMS];
      unpack(*(const uint4*)(m.table + c * m.pitch + r), e);
#pragma unroll
      for (int i = 0; i < LANE_NUMS; ++i) sum = fmaf(m.query[r + i], e[i], sum);
    }
#pragma unroll
    for (int d = SCORE_THREADS / 2; d; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
    if (part == 0 && c < l.candidates) m.score[c] = rounded(sum);
  }
}

// Softmax of the scores, rounded, by each warp for itself; its entropy, of the first horizon.
__device__ __forceinline__ void normalise(const Look& l, int b, int h, const LookRoom& m) {
  const int lane = threadIdx.x % WARP;
  float* prob = m.prob + threadIdx.x / WARP * l.candidates;
  float top = MINUS_INFINITY, total = 0.f, entropy = 0.f;
  ROLLED for (int c = lane; c < l.candidates; c += WARP) top = fmaxf(top, m.score[c]);
  top = warp_max(top);
  ROLLED for (int c = lane; c < l.candidates; c += WARP) total += prob[c] = expf(m.score[c] - top);
  total = warp_sum(total);
  ROLLED for (int c = lane; c < l.candidates; c += WARP) {
    const float share = prob[c] / total;
    if (h == 0 && share > 0.f) entropy -= share * logf(share);
    prob[c] = rounded(share);
  }
  __syncwarp();
  if (h) return;
  entropy = warp_sum(entropy);
  if (threadIdx.x == 0) l.entropy_B[b] = entropy;
}

// Σ_m prob[m]·E_m, some candidates and two columns a thread.
__device__ __forceinline__ void expect(const Look& l, const LookRoom& m) {
  const int pairs = l.rank / 2, shares = THREADS / pairs, share = threadIdx.x / pairs, r = threadIdx.x % pairs * 2;
  const float* prob = m.prob + threadIdx.x / WARP * l.candidates;
  float sum[2] = {};
#pragma unroll 8
  for (int c = share; c < l.candidates && share < shares; c += shares) {
    float e[2];
    widen_pair(*(const pair*)(m.table + c * m.pitch + r), e);
    sum[0] = fmaf(prob[c], e[0], sum[0]);
    sum[1] = fmaf(prob[c], e[1], sum[1]);
  }
  if (share >= shares) return;
  m.part[share * l.rank + r] = sum[0];
  m.part[share * l.rank + r + 1] = sum[1];
}

// One horizon of one row. The call in front is awaited here.
__device__ __forceinline__ void look_at(const Look& l, int b, int h, Team& team, unsigned char* room) {
  LookRoom m;
  m.pitch = l.rank + 4 * LANE_NUMS;
  m.table = (num*)room;
  m.asked = (float*)(m.table + l.candidates * m.pitch);
  m.query = m.asked + l.rank;
  m.part = m.query + l.rank;
  m.weight = m.part + 2 * THREADS;
  m.score = m.weight + 4;
  m.prob = m.score + l.candidates;
  const num* map = l.maps_KRR + (long long)h * l.rank * l.rank;
  if (threadIdx.x == 0) bring_near(map, l.rank * l.rank * sizeof(num));
  if (l.early) gather(l, b, m);
  await(team);
  if (!l.early) gather(l, b, m);
  if ((int)threadIdx.x < l.rank) m.asked[threadIdx.x] = read(l.front + b * l.front_stride + l.query_at + threadIdx.x);
  if (threadIdx.x >= THREADS - WARP) {
    const float weight = rounded(inclusion(l, predict_window(l, b), h));
    if (threadIdx.x == THREADS - WARP) *m.weight = l.weight_BK[b * l.horizons + h] = weight;
  }
  __syncthreads();
  multiply_rows(map, l.rank, l.rank, m.asked, m.query);
  __syncthreads();
  score_candidates(l, m);
  __syncthreads();
  normalise(l, b, h, m);
  expect(l, m);
  __syncthreads();
  if ((int)threadIdx.x >= l.rank) return;
  float sum = 0.f;
  ROLLED for (int share = 0; share < 2 * THREADS / l.rank; ++share) sum += m.part[share * l.rank + threadIdx.x];
  l.seen_BKR[((long long)b * l.horizons + h) * l.rank + threadIdx.x] = rounded(rounded(sum) * *m.weight);
}

__device__ __forceinline__ void look(const Look& l, Team& team, unsigned char* room) {
  ROLLED for (int i = blockIdx.x; i < l.horizons * ROWS; i += gridDim.x) {
    look_at(l, i / l.horizons, i % l.horizons, team, room);
    __syncthreads();
  }
}
