// ṽ of a PAW layer: what it saw at each horizon, mixed over neighbouring ones and pooled (SPEC 2).

// Of one row by every block for itself.
struct Pool {
  const float* seen_BKR;
  const float* weight_BK;
  const num* mix;  // [16, 3, rank]; null: a plain mean
  const num* mix_bias;
  int horizons, rank;
  num* pooled_BR;
};

#define CONV_GROUP 16
#define SEEN 3    // horizons that the convolution joins
#define BATCH 8  // horizons of a thread

// One block's shared memory. A row of zeros lies in front of the horizons, others behind, up to whole batches.
struct PoolRoom {
  float* seen;    // [1 + batches·BATCH + 1, R]
  float* part;    // [batches, R]
  float* weight;  // [batches·BATCH], zeros behind the horizons
  num* taps;      // [16, 3, R]
};

__device__ __forceinline__ int pool_batches(const Pool& p) { return (p.horizons + BATCH - 1) / BATCH; }

__device__ __forceinline__ PoolRoom lay_out(const Pool& p, unsigned char* room) {
  const int batches = pool_batches(p);
  PoolRoom m;
  m.seen = (float*)room;
  m.part = m.seen + (batches * BATCH + 2) * p.rank;
  m.weight = m.part + batches * p.rank;
  m.taps = (num*)(m.weight + batches * BATCH);
  return m;
}

// Output r of some neighbouring horizons by the grouped convolution, SiLU and weights included, summed. seen: of the
// output's group, one horizon in front of them; weight: from the first on.
__device__ __forceinline__ float convolve(const Pool& p, const num* taps, float bias, const float* seen, const float* weight) {
  float sum[BATCH], total = 0.f;
#pragma unroll
  for (int h = 0; h < BATCH; ++h) sum[h] = bias;
  ROLLED for (int i = 0; i < CONV_GROUP; ++i) {
    float tap[SEEN];
#pragma unroll
    for (int t = 0; t < SEEN; ++t) tap[t] = widen(taps[(i * SEEN + t) * p.rank]);
#pragma unroll
    for (int at = 0; at < BATCH + SEEN - 1; ++at) {
      const float v = seen[at * p.rank + i];
#pragma unroll
      for (int t = 0; t < SEEN; ++t)
        if (at >= t && at - t < BATCH) sum[at - t] = fmaf(tap[t], v, sum[at - t]);
    }
  }
#pragma unroll
  for (int h = 0; h < BATCH; ++h) total += rounded(rounded(quick_silu(rounded(sum[h]))) * weight[h]);
  return total;
}

// Σ_h value_h / Σ_h α_h of one row. It lays the room out for itself: addresses handed to a function lie in memory.
__device__ APART void pool_row(const Pool& p, int b, unsigned char* room) {
  const PoolRoom m = lay_out(p, room);
  const int batches = pool_batches(p), before = p.rank, count = p.horizons * p.rank;
  const float4 zeros = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 2
  for (int k = threadIdx.x * 4; k < (batches * BATCH + 2) * p.rank; k += THREADS * 4)
    *(float4*)(m.seen + k) = k >= before && k < before + count
                                 ? __ldcg((const float4*)(p.seen_BKR + (long long)b * count + k - before)) : zeros;
  ROLLED for (int h = threadIdx.x; h < batches * BATCH; h += THREADS)
    m.weight[h] = h < p.horizons ? __ldcg(p.weight_BK + b * p.horizons + h) : 0.f;
  await_copies();
  __syncthreads();
  ROLLED for (int k = threadIdx.x; k < batches * p.rank; k += THREADS) {
    const int batch = k / p.rank, r = k % p.rank;
    const float* seen = m.seen + batch * BATCH * p.rank;
    float sum = 0.f;
    if (p.mix) sum = convolve(p, m.taps + r, widen(p.mix_bias[r]), seen + r / CONV_GROUP * CONV_GROUP, m.weight + batch * BATCH);
    else
      ROLLED for (int h = 1; h <= BATCH; ++h) sum += seen[h * p.rank + r];
    m.part[k] = sum;
  }
  __syncthreads();
  ROLLED for (int r = threadIdx.x; r < p.rank; r += THREADS) {
    float sum = 0.f, total = 0.f;
    ROLLED for (int i = 0; i < batches; ++i) sum += m.part[i * p.rank + r];
#pragma unroll 8
    for (int h = 0; h < batches * BATCH; ++h) total += m.weight[h];
    p.pooled_BR[b * p.rank + r] = narrow(rounded(sum) / rounded(rounded(total) + 1e-6f));
  }
}

__device__ __forceinline__ void pool(const Pool& p, Team& team, unsigned char* room) {
  const PoolRoom m = lay_out(p, room);
  if (p.mix)
    ROLLED for (int k = threadIdx.x; k < CONV_GROUP * SEEN * p.rank / LANE_NUMS; k += THREADS)
      copy_aside((uint4*)m.taps + k, (const uint4*)p.mix + k);
  await(team);
  ROLLED for (int b = ROWS == 1 ? 0 : blockIdx.x; b < ROWS; b += ROWS == 1 ? 1 : gridDim.x) {
    pool_row(p, b, room);
    __syncthreads();
  }
  await_copies();
}
