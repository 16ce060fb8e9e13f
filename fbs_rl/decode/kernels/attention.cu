// Attention of one token a row over its cache, with the rotation of its query and key and the new entry.
//
// Each block reads a part of the entries of a row's key head; the last one to finish a (row, key head) joins the
// parts. The block whose part holds the new entry writes it. A row that skips only leaves its
// entry (`project`) or nothing (`noop`: length_BG counts the entries that exist).

#define LANE_DIMS ((HEAD_DIM + 31) / 32)  // numbers of a head that a lane holds, side by side
#define KEYS_AT_ONCE 4

struct Attention {
  const num* qkv;  // a row: (query heads + 2 key heads)·HEAD_DIM, neither normed nor rotated
  long long qkv_stride;
  num* keys;       // [ROWS, key heads, capacity, HEAD_DIM], or of the first page
  num* values;
  const num* cos;  // [positions, HEAD_DIM]
  const num* sin;
  const num* query_norm;  // null: heads are not normed
  const num* key_norm;
  const int* position_B;
  int* length_BG;  // null: one entry for every position
  const int* skip_B;
  float* part_sums;  // [ROWS, key heads, splits, QUERY_GROUP, HEAD_DIM]
  float* part_state; // the same without HEAD_DIM, but (maximum, sum)
  int* arrived;      // [ROWS, key heads], zero between steps
  num* out;          // [ROWS, query heads·HEAD_DIM]
  int key_heads;
  int splits;
  int capacity;
  int leaves_entry;  // `project`
  float scale;
  float eps;
  int awaits;  // leave_entry: whether the token's keys and values are yet to be awaited
  const int* pages;  // where entries are PAGED: [ROWS, page_columns], 1 << page_shift entries each
  int page_columns;
  int page_shift;
  long long page_stride;  // numbers from a page, an entry, a key head to the next
  long long entry_stride;
  long long head_stride;
};

// Where the entries of one row's key head lie.
struct EntryRoom {
  num *keys, *values;
#if PAGED
  const int* pages;
  int shift;
  long long page_stride, entry_stride;

  __device__ __forceinline__ long long at(int entry) const {
    return pages[entry >> shift] * page_stride + (entry & ((1 << shift) - 1)) * entry_stride;
  }
#else
  __device__ __forceinline__ long long at(int entry) const { return (long long)entry * HEAD_DIM; }
#endif
};

__device__ __forceinline__ EntryRoom entries_of(const Attention& a, int b, int head) {
#if PAGED
  const long long first = head * a.head_stride;
  return {a.keys + first, a.values + first, a.pages + b * a.page_columns, a.page_shift, a.page_stride, a.entry_stride};
#else
  const long long first = (long long)(b * a.key_heads + head) * a.capacity * HEAD_DIM;
  return {a.keys + first, a.values + first};
#endif
}

// What the rotation needs that does not wait for the token's products.
struct Rotation {
  float norm[2][HEAD_DIM];  // of queries and of keys
  float cos[HEAD_DIM];
  float sin[HEAD_DIM];
};

__device__ __forceinline__ void load_rotation(const Attention& a, int position, Rotation& r) {
  ROLLED for (int i = threadIdx.x; i < HEAD_DIM; i += THREADS) {
    r.norm[0][i] = a.query_norm ? widen(a.query_norm[i]) : 1.f;
    r.norm[1][i] = a.key_norm ? widen(a.key_norm[i]) : 1.f;
    r.cos[i] = widen(a.cos[(long long)position * HEAD_DIM + i]);
    r.sin[i] = widen(a.sin[(long long)position * HEAD_DIM + i]);
  }
}

// One head, normed (null norm: not) and rotated, by one warp; rounded where the backbone rounds.
__device__ __forceinline__ void turn_head(const num* head, const float* norm, const Rotation& r, float eps, float* out) {
  const int lane = threadIdx.x % WARP;
  float square = 0.f;
  for (int i = lane; i < HEAD_DIM; i += WARP) {
    out[i] = read(head + i);
    square += out[i] * out[i];
  }
  if (norm) {
    const float inverse = rsqrtf(warp_sum(square) / HEAD_DIM + eps);
    ROLLED for (int i = lane; i < HEAD_DIM; i += WARP) out[i] = rounded(rounded(out[i] * inverse) * norm[i]);
  }
  __syncwarp();
  float turned[LANE_DIMS];
#pragma unroll
  for (int j = 0; j < LANE_DIMS; ++j) {
    const int i = lane + j * WARP;
    if (i < HEAD_DIM) {
      const float other = i < HEAD_DIM / 2 ? -out[i + HEAD_DIM / 2] : out[i - HEAD_DIM / 2];
      turned[j] = rounded(rounded(out[i] * r.cos[i]) + rounded(other * r.sin[i]));
    }
  }
  __syncwarp();
#pragma unroll
  for (int j = 0; j < LANE_DIMS; ++j)
    if (lane + j * WARP < HEAD_DIM) out[lane + j * WARP] = turned[j];
}

// LANE_DIMS numbers of a cache entry, from the second cache: this kernel may have written beside them.
__device__ __forceinline__ void load_lane(const num* entry, float* out) {
  const int at = threadIdx.x % WARP * LANE_DIMS;
#pragma unroll
  for (int j = 0; j < LANE_DIMS; ++j) out[j] = 0.f;
  if (at >= HEAD_DIM) return;
#if BF16 && LANE_DIMS == 4
  const uint2 v = __ldcg((const uint2*)(entry + at));
  out[0] = __uint_as_float(v.x << 16);
  out[1] = __uint_as_float(v.x & 0xffff0000u);
  out[2] = __uint_as_float(v.y << 16);
  out[3] = __uint_as_float(v.y & 0xffff0000u);
#elif BF16 && LANE_DIMS == 2
  const u32 v = __ldcg((const u32*)(entry + at));
  out[0] = __uint_as_float(v << 16);
  out[1] = __uint_as_float(v & 0xffff0000u);
#else
#pragma unroll
  for (int j = 0; j < LANE_DIMS; ++j) out[j] = read(entry + at + j);
#endif
}

#define SCORES (QUERY_GROUP * KEYS_AT_ONCE)
#define SCORE_LANES (SCORES > 16 ? 1 : SCORES > 8 ? 2 : SCORES > 4 ? 4 : 8)  // that hold the same score
#define HEAD_LANES (KEYS_AT_ONCE * SCORE_LANES)                              // that work for the same query head

// Running softmax of a warp. top, total: of the query head that a lane works for; mix: of all heads.
struct Softmax {
  float top, total, mix[QUERY_GROUP][LANE_DIMS];
};

// Some entries on their way: numbers of a lane.
struct Entries {
  float key[KEYS_AT_ONCE][LANE_DIMS], value[KEYS_AT_ONCE][LANE_DIMS];
};

// Entries from `from` on; behind `end` the last one again, which mix_entries leaves out.
__device__ __forceinline__ void load_entries(const EntryRoom& room, int from, int end, Entries& e) {
#pragma unroll
  for (int j = 0; j < KEYS_AT_ONCE; ++j) {
    const long long at = room.at(min(from + j, end - 1));
    load_lane(room.keys + at, e.key[j]);
    load_lane(room.values + at, e.value[j]);
  }
}

// `count` of the entries into the running softmax, at least one.
__device__ __forceinline__ void mix_entries(const Entries& e, int count, float scale,
                                            const float q[QUERY_GROUP][LANE_DIMS], Softmax& s) {
  float dot[32 / SCORE_LANES] = {};
#pragma unroll
  for (int g = 0; g < QUERY_GROUP; ++g)
#pragma unroll
    for (int j = 0; j < KEYS_AT_ONCE; ++j)
#pragma unroll
      for (int i = 0; i < LANE_DIMS; ++i) dot[g * KEYS_AT_ONCE + j] = fmaf(q[g][i], e.key[j][i], dot[g * KEYS_AT_ONCE + j]);
  const int mine = threadIdx.x % WARP / SCORE_LANES % KEYS_AT_ONCE;
  const float sum = sum_together(dot), score = mine < count ? sum * scale : MINUS_INFINITY;
  float top = fmaxf(s.top, score);
#pragma unroll
  for (int d = SCORE_LANES; d < HEAD_LANES; d *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, d));
  const float fade = expf(s.top - top), weight = expf(score - top);  // fade: 0 at first, when s.top is minus infinity
  float total = weight;
#pragma unroll
  for (int d = SCORE_LANES; d < HEAD_LANES; d *= 2) total += __shfl_xor_sync(0xffffffffu, total, d);
  s.total = s.total * fade + total;
  s.top = top;
#pragma unroll
  for (int g = 0; g < QUERY_GROUP; ++g) {
    const float fade_g = __shfl_sync(0xffffffffu, fade, g * HEAD_LANES);
#pragma unroll
    for (int i = 0; i < LANE_DIMS; ++i) s.mix[g][i] *= fade_g;
#pragma unroll
    for (int j = 0; j < KEYS_AT_ONCE; ++j) {
      const float share = __shfl_sync(0xffffffffu, weight, g * HEAD_LANES + j * SCORE_LANES);
#pragma unroll
      for (int i = 0; i < LANE_DIMS; ++i) s.mix[g][i] = fmaf(share, e.value[j][i], s.mix[g][i]);
    }
  }
}

// Weights of `count` (at most 32) running softmaxes, exp(top − common top), and the common total and top, for each
// query head. state: (top, total) of part p and head g at (p·QUERY_GROUP + g)·2; a part without entries weighs 0.
__device__ __forceinline__ void weigh_parts(const float* state, int count, float* weight, float* total_G) {
  const int lane = threadIdx.x % WARP;
  ROLLED for (int g = threadIdx.x / WARP; g < QUERY_GROUP; g += WARPS) {
    const float held = lane < count ? state[(lane * QUERY_GROUP + g) * 2 + 1] : 0.f;
    const float own = held > 0.f ? state[(lane * QUERY_GROUP + g) * 2] : MINUS_INFINITY;
    const float top = warp_max(own);
    const float share = held > 0.f ? expf(own - top) : 0.f;
    const float total = warp_sum(share * held);
    if (lane < count) weight[lane * QUERY_GROUP + g] = share;
    if (lane) continue;
    total_G[g] = total;
    total_G[QUERY_GROUP + g] = top;
  }
}

#define JOINED ((QUERY_GROUP * HEAD_DIM + THREADS - 1) / THREADS)  // outputs of a thread
#define MOST_PARTS 16  // of a (row, key head); no fewer than warps

struct AttentionShared {
  float query[QUERY_GROUP][HEAD_DIM];
  float fresh[2][HEAD_DIM];  // the token's key and value
  Rotation rotation;
  float sums[WARPS * QUERY_GROUP * HEAD_DIM];
  float state[MOST_PARTS * QUERY_GROUP * 2];
  float weight[MOST_PARTS * QUERY_GROUP];
  float total_G[2 * QUERY_GROUP];
  int last;
};

// The token's key and value, by one warp, into the cache and into m.fresh.
__device__ __forceinline__ void write_entry(const Attention& a, const num* token, int head, num* key, num* value,
                                            AttentionShared& m) {
  const int lane = threadIdx.x % WARP;
  const float* norm = a.key_norm ? m.rotation.norm[1] : nullptr;
  turn_head(token + (QUERY_GROUP * a.key_heads + head) * HEAD_DIM, norm, m.rotation, a.eps, m.fresh[0]);
  const num* source = token + ((QUERY_GROUP + 1) * a.key_heads + head) * HEAD_DIM;
  for (int i = lane; i < HEAD_DIM; i += WARP) {
    key[i] = narrow(m.fresh[0][i]);
    value[i] = __ldcg(source + i);
    m.fresh[1][i] = widen(value[i]);
  }
}

// A warp's running softmax over its share of the entries [low, high), the first of them loaded already.
__device__ __forceinline__ void mix_share(const Attention& a, const EntryRoom& room, int low, int high, Entries& e,
                                          const AttentionShared& m, bool has_fresh, Softmax& s) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, at = lane * LANE_DIMS;
  float q[QUERY_GROUP][LANE_DIMS];
  s.top = MINUS_INFINITY;
  s.total = 0.f;
#pragma unroll
  for (int g = 0; g < QUERY_GROUP; ++g) {
#pragma unroll
    for (int i = 0; i < LANE_DIMS; ++i) {
      s.mix[g][i] = 0.f;
      q[g][i] = at < HEAD_DIM ? m.query[g][at + i] : 0.f;
    }
  }
  ROLLED for (int from = low + warp * KEYS_AT_ONCE; from < high; from += WARPS * KEYS_AT_ONCE) {
    if (from >= low + WARPS * KEYS_AT_ONCE) load_entries(room, from, high, e);
    mix_entries(e, high - from, a.scale, q, s);
  }
  if (!has_fresh || warp) return;
#pragma unroll
  for (int i = 0; i < LANE_DIMS; ++i) {
    e.key[0][i] = at < HEAD_DIM ? m.fresh[0][at + i] : 0.f;
    e.value[0][i] = at < HEAD_DIM ? m.fresh[1][at + i] : 0.f;
#pragma unroll
    for (int j = 1; j < KEYS_AT_ONCE; ++j) e.key[j][i] = e.value[j][i] = 0.f;  // weighed with 0, which saves no NaN
  }
  mix_entries(e, 1, a.scale, q, s);
}

// The warps' softmaxes joined: the result where there is one part, else this part of it.
__device__ __forceinline__ void join_warps(const Attention& a, const Softmax& s, AttentionShared& m, long long part,
                                           bool only, num* out) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  if (lane % HEAD_LANES == 0 && lane / HEAD_LANES < QUERY_GROUP) {
    m.state[(warp * QUERY_GROUP + lane / HEAD_LANES) * 2] = s.top;
    m.state[(warp * QUERY_GROUP + lane / HEAD_LANES) * 2 + 1] = s.total;
  }
#pragma unroll
  for (int g = 0; g < QUERY_GROUP; ++g) {
#pragma unroll
    for (int i = 0; i < LANE_DIMS; ++i)
      if (lane * LANE_DIMS < HEAD_DIM)
        m.sums[(warp * QUERY_GROUP + g) * HEAD_DIM + lane * LANE_DIMS + i] = s.mix[g][i];
  }
  __syncthreads();
  weigh_parts(m.state, WARPS, m.weight, m.total_G);
  __syncthreads();
  ROLLED for (int i = threadIdx.x; i < QUERY_GROUP * HEAD_DIM; i += THREADS) {
    const int g = i / HEAD_DIM;
    float mix = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) mix += m.weight[w * QUERY_GROUP + g] * m.sums[w * QUERY_GROUP * HEAD_DIM + i];
    if (only) out[i] = narrow(mix / m.total_G[g]);
    else a.part_sums[part * QUERY_GROUP * HEAD_DIM + i] = mix;
    if (!only && i % HEAD_DIM == 0) {
      a.part_state[(part * QUERY_GROUP + g) * 2] = m.total_G[QUERY_GROUP + g];
      a.part_state[(part * QUERY_GROUP + g) * 2 + 1] = m.total_G[g];
    }
  }
}

// All parts of a (row, key head) joined, by the block that finished last.
__device__ __forceinline__ void join_parts(const Attention& a, AttentionShared& m, long long first, int splits, num* out) {
  const float* sums = a.part_sums + first * QUERY_GROUP * HEAD_DIM;
  float held[JOINED][MOST_PARTS];  // on their way while the weights are found
#pragma unroll
  for (int j = 0; j < JOINED; ++j) {
    const int i = j * THREADS + threadIdx.x;
#pragma unroll
    for (int p = 0; p < MOST_PARTS; ++p)
      held[j][p] = p < splits && i < QUERY_GROUP * HEAD_DIM ? __ldcg(sums + p * QUERY_GROUP * HEAD_DIM + i) : 0.f;
  }
  ROLLED for (int i = threadIdx.x; i < splits * QUERY_GROUP * 2; i += THREADS)
    m.state[i] = __ldcg(a.part_state + first * QUERY_GROUP * 2 + i);
  __syncthreads();
  weigh_parts(m.state, splits, m.weight, m.total_G);
  __syncthreads();
#pragma unroll
  for (int j = 0; j < JOINED; ++j) {
    const int i = j * THREADS + threadIdx.x, g = i / HEAD_DIM;
    if (i >= QUERY_GROUP * HEAD_DIM) continue;
    float mix = 0.f;
#pragma unroll
    for (int p = 0; p < MOST_PARTS; ++p)
      if (p < splits) mix += m.weight[p * QUERY_GROUP + g] * held[j][p];
    out[i] = narrow(mix / m.total_G[g]);
  }
}

// The softmax over a part of one row's entries for one key head.
__device__ __forceinline__ void attend(const Attention& a, int head, int split, int b, Team& team, AttentionShared& m) {
  const int warp = threadIdx.x / WARP, splits = a.splits;
  // All this was written by earlier steps, or before the last await.
  const bool skipped = skips(a.skip_B, b);
  const int position = __ldcg(a.position_B + b);
  const int before = a.length_BG ? __ldcg(a.length_BG + b * a.key_heads + head) : position;
  const int part = (before + splits) / splits;  // of before + 1 entries, rounded up
  const int low = split * part, high = min(before, low + part);
  const bool owner = before >= low && before < low + part;
  const EntryRoom room = entries_of(a, b, head);
  Entries e;
  if (!skipped && low + warp * KEYS_AT_ONCE < high) load_entries(room, low + warp * KEYS_AT_ONCE, high, e);
  load_rotation(a, position, m.rotation);
  await(team);
  __syncthreads();
  if (skipped && !(owner && a.leaves_entry)) return;
  const num* token = a.qkv + b * a.qkv_stride;
  if (owner && warp == WARPS - 1)
    write_entry(a, token, head, room.keys + room.at(before), room.values + room.at(before), m);
  if (skipped) return;
  ROLLED for (int g = warp; g < QUERY_GROUP; g += WARPS)
    turn_head(token + (head * QUERY_GROUP + g) * HEAD_DIM, a.query_norm ? m.rotation.norm[0] : nullptr, m.rotation,
              a.eps, m.query[g]);
  __syncthreads();
  Softmax s;
  mix_share(a, room, low, high, e, m, owner, s);
  const long long first = (long long)(b * a.key_heads + head) * splits;
  num* out = a.out + (long long)(b * a.key_heads + head) * QUERY_GROUP * HEAD_DIM;
  join_warps(a, s, m, first + split, splits == 1, out);
  if (!arrive_last(a.arrived + b * a.key_heads + head, splits, &m.last)) return;
  if (splits > 1) join_parts(a, m, first, splits, out);
  if (a.length_BG && threadIdx.x == 0) a.length_BG[b * a.key_heads + head] = before + 1;
}

__device__ __forceinline__ void attention(const Attention& a, Team& team, AttentionShared& m) {
  const int parts = a.key_heads * a.splits;
  ROLLED for (int i = blockIdx.x; i < parts * ROWS; i += gridDim.x) {
    attend(a, i % a.key_heads, i % parts / a.key_heads, i / parts, team, m);
    __syncthreads();
  }
}

// The token's entries in a layer that all rows skip, if attention is passed over. Nobody waits for them in this step.
__device__ __forceinline__ void leave_entry(const Attention& a, Team& team, AttentionShared& m) {
  if (a.awaits) await(team);
  ROLLED for (int i = gridDim.x - 1 - blockIdx.x; i < a.key_heads * ROWS; i += gridDim.x) {
    const int head = i % a.key_heads, b = i / a.key_heads, position = __ldcg(a.position_B + b);
    const EntryRoom room = entries_of(a, b, head);
    load_rotation(a, position, m.rotation);
    __syncthreads();
    if (threadIdx.x < WARP) write_entry(a, a.qkv + b * a.qkv_stride, head, room.keys + room.at(position),
                                        room.values + room.at(position), m);
    __syncthreads();
  }
}
