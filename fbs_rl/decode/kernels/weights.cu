// Weights on their way: what a block asks the copy engine for, long before a product's turn.

#define MOST_PIECES 16  // of a warp, that are on their way or wait for their use
#define MOST_OPENED 4   // products that are asked for at a time

// What a block needs to know to ask for a product's weights.
struct Weights {
  const num* matrix[3];  // output rows come from up to three matrices, one behind the other
  int rows[3];
  int columns;
  int blocks;  // that share the output rows
  int splits;
  int chunk;  // columns of a piece
  int unit_chunks;
  int paired;  // 1: a block has the same rows of two matrices
  int kept_from;      // rows from here on are wanted although nobody runs the layer; -1: none are
  const int* skip_B;  // null: every row runs
  const int* slot_B;  // place of the chunk that a row closes, -1: it closes none; null: not asked
};

__device__ __forceinline__ int row_count(const Weights& w) { return w.rows[0] + w.rows[1] + w.rows[2]; }

// first, end: the block's rows. Where they are paired it has those of one matrix, then those of the other.
__device__ __forceinline__ const num* weight_row(const Weights& w, int row, int first, int end) {
  if (w.paired) {
    const int half = (end - first) / 2, place = row - first;
    row = first / 2 + (place < half ? place : w.rows[0] + place - half);
  }
  if (row < w.rows[0]) return w.matrix[0] + (long long)row * w.columns;
  row -= w.rows[0];
  if (row < w.rows[1]) return w.matrix[1] + (long long)row * w.columns;
  return w.matrix[2] + (long long)(row - w.rows[1]) * w.columns;
}

// The groups of output rows that this block has, [first, end).
__device__ __forceinline__ void share_of(const Weights& w, int& first, int& end) {
  const int step = w.paired && OUT_ROWS == 1 ? 2 : 1;  // a pair stays together
  const int groups = (row_count(w) + OUT_ROWS - 1) / OUT_ROWS / step, block = min((int)blockIdx.x, w.blocks);
  first = step * (int)((long long)groups * block / w.blocks);
  end = step * (int)((long long)groups * min(block + 1, w.blocks) / w.blocks);
}

// Whether a block whose groups end before `end` has nothing to multiply. runs: some row runs the layer.
__device__ __forceinline__ bool idle(const Weights& w, int end, bool runs) {
  if (w.slot_B) {
    ROLLED for (int b = 0; b < ROWS; ++b)
      if (__ldcg(w.slot_B + b) >= 0) return false;
    return true;
  }
  return !runs && (w.kept_from < 0 || min(end * OUT_ROWS, row_count(w)) <= w.kept_from);
}

// The weights of a program's products, one behind the other, come in pieces of a chunk of OUT_ROWS rows, each into the
// ring of shared memory of the warp that multiplies it. The last warps of the block ask the copy engine for them, each
// for a few rings, a lane for each: one warp for all would be slower than the weights. They ask as far ahead as there
// is room, across the bounds of products; but no more than a window at a time is on its way, and where a piece waits
// for its use one at a time, for small reads wait behind it. Which products run is a guess where flags are still those
// of the token before; who finds it wrong turns the stream (turn_to). Lanes count along: divisions cost more than
// products.

// What the warps that ask and those that multiply tell each other. Counts are those of the launch and never fall.
struct Orders {
  Weights weights[MOST_OPENED];
  int product[MOST_OPENED], first[MOST_OPENED], end[MOST_OPENED];  // whose, and of which groups
  u32 opened;        // products that were begun; by the first of those who ask
  u32 closed;        // products that are through, or given up
  u32 turns;         // of the stream; LEAVES: no more is wanted
  int turned_to;     // product that the stream goes on with
  int turned_first;  // group that it begins with there; -1: as the flags say
  u32 begun[WARPS];  // 2 · products that a ring's lane knows, + 1 if it has asked for all of them
  u32 answered[ASKERS];  // turns that the stream took, and where it stood then:
  u32 opened_then;
  u32 number_then[WARPS], at_then[WARPS], passed_then[WARPS];
  u64 taken[WARPS];  // pieces taken · 2^32 + bytes passed
};

#define LEAVES 0xffffffffu

// A place in a ring, as both sides count it.
struct Mark {
  u32 number;  // of the piece
  u32 at;      // where it lies
  u32 passed;  // bytes of the ring up to there, ever
};

// A piece lies in one part: what does not fit at the ring's end begins in front.
__device__ __forceinline__ void make_whole(Mark& m, u32 bytes, u32 ring_bytes) {
  if (m.at + bytes <= ring_bytes) return;
  m.passed += ring_bytes - m.at;
  m.at = 0;
}

__device__ __forceinline__ void step_over(Mark& m, u32 bytes) {
  ++m.number;
  m.at += bytes;
  m.passed += bytes;
}

__device__ __forceinline__ u32 parity_of(u32 number) { return number / MOST_PIECES & 1; }

// --- the warps that multiply ---

struct Stream {
  unsigned char* ring;  // of this warp
  u32 ring_bytes;
  u64* arrivals;  // of its pieces, in turns
  Orders* orders;
  Mark mark;   // the next piece
  u32 opened;  // products behind it
  u32 turns;
};

__device__ __forceinline__ const num* await_piece(Stream& s, u32 bytes) {
  make_whole(s.mark, bytes, s.ring_bytes);
  wait_barrier(s.arrivals + s.mark.number % MOST_PIECES, parity_of(s.mark.number));
  return (const num*)(s.ring + s.mark.at);
}

__device__ __forceinline__ void tell_taken(const Stream& s) {
  __syncwarp();
  if (threadIdx.x % WARP == 0) tell(s.orders->taken + threadIdx.x / WARP, (u64)s.mark.number << 32 | s.mark.passed);
}

__device__ __forceinline__ void leave_piece(Stream& s, u32 bytes) {
  step_over(s.mark, bytes);
  tell_taken(s);
}

// The stream goes on with another product: what is on its way is waited for and not used.
__device__ __forceinline__ void turn_to(Stream& s, int product, int first) {
  Orders& o = *s.orders;
  const int warp = threadIdx.x / WARP;
  ++s.turns;
  __syncthreads();
  if (threadIdx.x == 0) {
    o.turned_to = product;
    o.turned_first = first;
    tell(&o.turns, s.turns);
  }
  ROLLED for (int i = 0; i < ASKERS; ++i)
    while (heard(o.answered + i) != s.turns) look_again();
  ROLLED for (; s.mark.number != o.number_then[warp]; ++s.mark.number)
    wait_barrier(s.arrivals + s.mark.number % MOST_PIECES, parity_of(s.mark.number));
  s.mark.at = o.at_then[warp];
  s.mark.passed = o.passed_then[warp];
  s.opened = o.opened_then;
  tell_taken(s);
  if (threadIdx.x == 0) tell(&o.closed, s.opened);
}

// The product whose weights come next.
__device__ __forceinline__ int next_product(const Stream& s) {
  while (heard(&s.orders->opened) == s.opened) look_again();
  return s.orders->product[s.opened % MOST_OPENED];
}

// By all threads: what comes next are the weights of a product, from the group `first` on.
__device__ __forceinline__ void meet(Stream& s, int product, int first) {
  if (next_product(s) != product || s.orders->first[s.opened % MOST_OPENED] != first) turn_to(s, product, first);
}

// By all threads: the weights of the products [from, end) are not wanted.
__device__ __forceinline__ void pass(Stream& s, int from, int end) {
  if (from >= end) return;
  const int next = next_product(s);
  if (from <= next && next < end) turn_to(s, end, -1);
}

// All warps are through with a product's weights.
__device__ __forceinline__ void close_product(Stream& s) {
  ++s.opened;
  if (threadIdx.x == 0) tell(&s.orders->closed, s.opened);
}

// --- the warps that ask ---

// All products, and how to ask for them.
struct Supply {
  const Weights* products;
  int begin, end;  // of this launch
  u32 ring_bytes;  // of a warp
  u32 window;      // bytes of a ring that are on their way at a time
  u32 near_bytes;  // of a ring: so much waits in the second cache where the ring is full
  unsigned char* rings;
  u64* arrivals;
};

// A piece's rows, which part of their length it is of, and which chunk of that.
struct Place {
  int group, part, chunk;
};

#define RINGS (WARPS / ASKERS)  // of a warp that asks

// One ring's side of it.
struct Asking {
  int ring;
  Mark mark;
  u32 arrived;  // pieces
  u32 opened;   // products that it knows
  int left;     // pieces of the last of them
  u32 bytes;    // of each
  u32 most;     // on their way at a time
  int first, end;  // rows of the block
  Place next;
  int group_step, part_step;
  Place far;      // the first piece that was not brought near
  int near;       // pieces from `next` to there
  u32 near_since; // the clock when the last one was
};

__device__ __forceinline__ void begin_product(const Weights& w, int first, int end, u32 window, Asking& a) {
  a.near = 0;
  if (first == end) return;  // the end of all
  const int ring = a.ring, units = (end - first) * w.splits;
  a.left = units > ring ? ((units - ring - 1) / WARPS + 1) * w.unit_chunks : 0;
  a.bytes = OUT_ROWS * w.chunk * sizeof(num);
  a.most = min((u32)MOST_PIECES, max(1u, window / a.bytes));
  a.first = first * OUT_ROWS;
  a.end = min(end * OUT_ROWS, row_count(w));
  a.next = a.far = {first + ring / w.splits, ring % w.splits, 0};
  a.group_step = WARPS / w.splits;
  a.part_step = WARPS % w.splits;
}

// use(number of a row in the piece, its weights).
template <class Use>
__device__ __forceinline__ void each_row(const Weights& w, const Asking& a, const Place& place, Use use) {
  const int column = (place.part * w.unit_chunks + place.chunk) * w.chunk;
#pragma unroll
  for (int r = 0; r < OUT_ROWS; ++r)
    use(r, weight_row(w, min(place.group * OUT_ROWS + r, a.end - 1), a.first, a.end) + column);
}

__device__ __forceinline__ void step_on(const Weights& w, const Asking& a, Place& place) {
  if (++place.chunk < w.unit_chunks) return;
  place.chunk = 0;
  place.group += a.group_step;
  place.part += a.part_step;
  if (place.part < w.splits) return;
  place.part -= w.splits;
  ++place.group;
}

__device__ __forceinline__ void ask(const Weights& w, const Supply& p, Asking& a) {
  u64* barrier = p.arrivals + a.ring * MOST_PIECES + a.mark.number % MOST_PIECES;
  num* to = (num*)(p.rings + a.ring * p.ring_bytes + a.mark.at);
  expect_bytes(barrier, a.bytes);
  each_row(w, a, a.next, [&](int r, const num* row) { copy_ahead(to + r * w.chunk, row, w.chunk * sizeof(num), barrier); });
  step_over(a.mark, a.bytes);
  --a.left;
  step_on(w, a, a.next);
  if (a.near) --a.near;
  else a.far = a.next;
}

// No room in the ring: at the rate at which weights arrive the next pieces into the second cache.
__device__ __forceinline__ void bring_next_near(const Weights& w, const Supply& p, Asking& a) {
  if (a.near >= a.left || (a.near + 1) * a.bytes > p.near_bytes || (u32)clock64() - a.near_since < a.bytes * 5 / 8) return;
  a.near_since = (u32)clock64();
  each_row(w, a, a.far, [&](int, const num* row) { bring_near(row, w.chunk * sizeof(num)); });
  step_on(w, a, a.far);
  ++a.near;
}

// Ask for a ring's next pieces while there is room for them and little enough is on its way.
__device__ __forceinline__ void ask_along(const Orders& o, const Supply& p, u32 opened, Asking& a) {
  if (!a.left && a.opened != opened) {
    const int at = a.opened++ % MOST_OPENED;
    begin_product(o.weights[at], o.first[at], o.end[at], p.window, a);
  }
  u64* arrivals = p.arrivals + a.ring * MOST_PIECES;
  while (a.arrived != a.mark.number && has_arrived(arrivals + a.arrived % MOST_PIECES, parity_of(a.arrived))) ++a.arrived;
  const Weights& w = o.weights[(a.opened - 1) % MOST_OPENED];
  const u64 taken = heard(o.taken + a.ring);
  const u32 most = a.arrived != (u32)(taken >> 32) ? 1u : a.most;
  ROLLED while (a.left && a.mark.number - a.arrived < most) {
    Mark mark = a.mark;
    make_whole(mark, a.bytes, p.ring_bytes);
    const u32 kept = mark.number - (u32)(taken >> 32);  // pieces that are there or on their way
    // An empty ring has room for any piece, whatever was passed over at its end to make it whole.
    const bool full = kept && mark.passed + a.bytes - (u32)taken > p.ring_bytes;
    if (full) bring_next_near(w, p, a);
    if (full || kept >= MOST_PIECES) return;
    a.mark = mark;
    ask(w, p, a);
  }
}

// Which product comes next, in all lanes of the warp.
struct Outlook {
  int product;
  int first;  // group that it begins with; -1: as the flags say
  u32 word;   // of its Weights, this lane's
  const int* known_B;  // flags that were read last, and whether some row runs
  bool known;
};

#define WEIGHTS_WORDS ((int)sizeof(Weights) / 4)
static_assert(WEIGHTS_WORDS <= WARP, "a lane holds a word");

__device__ __forceinline__ void look_at_product(const Supply& p, Outlook& next, int product) {
  const int lane = threadIdx.x % WARP;
  next.product = product;
  if (product < p.end && lane < WEIGHTS_WORDS) next.word = ((const u32*)(p.products + product))[lane];
}

// The group that this block begins with in a product, -1 where it has nothing to multiply, as the flags are now.
__device__ __forceinline__ int guess_first(const Weights& w, int first, int end, Outlook& next) {
  if (w.skip_B != next.known_B) {
    next.known_B = w.skip_B;
    next.known = any_runs(w.skip_B);
  }
  if (idle(w, end, next.known)) return -1;
  return !next.known && w.kept_from > first * OUT_ROWS ? w.kept_from / OUT_ROWS : first;
}

// Begin the next product of which the block has a part, or the end of all; by the whole warp.
__device__ __forceinline__ void open_next(Orders& o, const Supply& p, u32& opened, Outlook& next) {
  const int lane = threadIdx.x % WARP, at = opened % MOST_OPENED;
  Weights& w = o.weights[at];
  int first = -1, end = 0;
  while (first < 0 && next.product < p.end) {
    if (lane < WEIGHTS_WORDS) ((u32*)&w)[lane] = next.word;
    __syncwarp();
    share_of(w, first, end);
    if (first == end) first = -1;
    else if (next.first >= 0) first = next.first;
    else first = __shfl_sync(0xffffffffu, guess_first(w, first, end, next), 0);
    next.first = -1;
    look_at_product(p, next, next.product + 1);
    __syncwarp();
  }
  if (lane == 0) {
    o.product[at] = first < 0 ? p.end : next.product - 1;
    o.first[at] = max(first, 0);
    o.end[at] = first < 0 ? 0 : end;
    tell(&o.opened, opened + 1);
  }
  if (first < 0) next.product = p.end + 1;
  ++opened;
  __syncwarp();
}

// Where the stream stands, for those who turn it.
__device__ __forceinline__ void answer(Orders& o, int asker, u32 turns, u32 opened, Asking& a) {
  const int lane = threadIdx.x % WARP;
  a.left = 0;
  a.opened = opened;
  if (lane < RINGS) {
    o.number_then[a.ring] = a.mark.number;
    o.at_then[a.ring] = a.mark.at;
    o.passed_then[a.ring] = a.mark.passed;
  }
  __syncwarp();
  if (lane) return;
  if (!asker) o.opened_then = opened;
  tell(o.answered + asker, turns);
}

// Some ring has asked for all that it knows of, and the place of the next product is free.
__device__ __forceinline__ bool more_wanted(const Orders& o, u32 opened) {
  const int lane = threadIdx.x % WARP;
  const u32 begun = lane < WARPS ? heard(o.begun + lane) : 2 * opened;
  const bool full = opened - begun / 2 >= MOST_OPENED || opened - heard(&o.closed) >= MOST_OPENED;
  return __any_sync(0xffffffffu, begun == 2 * opened + 1) && !__any_sync(0xffffffffu, full);
}

// What the last warps do all the time. The first of them begins products.
__device__ __forceinline__ void keep_asking(Orders& o, const Supply& p) {
  const int lane = threadIdx.x % WARP, asker = (threadIdx.x - THREADS) / WARP;
  Asking a = {};
  a.ring = asker * RINGS + lane;
  Outlook next = {};
  next.known = true;
  next.first = -1;
  if (!asker) look_at_product(p, next, p.begin);
  u32 opened = 0, turns = 0;
  for (;;) {
    const u32 wanted = __shfl_sync(0xffffffffu, heard(&o.turns), 0);
    if (wanted == LEAVES) return;
    if (wanted != turns) {
      turns = wanted;
      if (asker) {
        while (heard(o.answered) != turns) look_again();
        opened = o.opened_then;
      }
      answer(o, asker, turns, opened, a);
      if (!asker) look_at_product(p, next, o.turned_to);
      next.first = o.turned_first;
      next.known_B = nullptr;
      next.known = true;
    }
    if (asker) opened = heard(&o.opened);
    else if (next.product <= p.end && more_wanted(o, opened)) open_next(o, p, opened, next);
    if (lane < RINGS) {
      ask_along(o, p, opened, a);
      tell(o.begun + a.ring, 2 * a.opened + !a.left);
    }
    __syncwarp();
    rest();
  }
}
