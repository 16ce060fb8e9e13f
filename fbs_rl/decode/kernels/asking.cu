// The last warps of a block: they ask the copy engine for the weights of all products, in order, as weights.cu has it.

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

// A piece's rows, which part of their length it is of, which split of that, and which chunk of that.
struct Place {
  int group, split, chunk, part;
};

// One lane's side of it.
struct Asking {
  int line;
  Mark mark;
  u32 arrived;  // pieces
  u32 opened;   // products that it knows
  u32 told;     // what others know of that: Orders::begun
  int left;     // pieces of the last of them
  u32 bytes;    // of each, in the ring
  u32 most;     // on their way at a time
  int first, end;  // rows of the block
  int groups;      // of these
  Place next;
  int group_step, split_step;
  Place far;      // the first piece that was not brought near
  int near;       // pieces from `next` to there
  u32 near_since; // the clock when the last one was
};

__device__ __forceinline__ int ring_of(int line) { return TENSOR ? 0 : line; }

__device__ __forceinline__ void begin_product(const Weights& w, int first, int end, u32 window, Asking& a) {
  a.near = 0;
  if (first == end) return;  // the end of all
  const int ring = ring_of(a.line), groups = groups_of(w, end - first);
  const int units = groups * w.splits * (TENSOR ? w.parts : 1);
  a.left = units > ring ? ((units - ring - 1) / RINGS + 1) * w.unit_chunks : 0;
  a.bytes = OUT_ROWS * row_bytes(w.chunk);
  a.most = min((u32)MOST_PIECES, max(1u, window / a.bytes));
  a.first = first;
  a.end = end;
  a.groups = groups;
  a.next = a.far = {ring / w.splits, ring % w.splits, 0, 0};
  a.group_step = RINGS / w.splits;
  a.split_step = RINGS % w.splits;
}

// use(number of a row in the piece, its weights), for the rows that this lane asks for.
template <class Use>
__device__ __forceinline__ void each_row(const Weights& w, const Asking& a, const Place& place, Use use) {
  const int column = ((place.part * w.splits + place.split) * w.unit_chunks + place.chunk) * w.chunk;
  int row;
  const int count = rows_of_group(w, a.first, a.end, place.group, row);
  ROLLED for (int r = TENSOR ? a.line : 0; r < count; r += ARRIVALS) use(r, weight_row(w, row + r) + column);
}

__device__ __forceinline__ void step_on(const Weights& w, const Asking& a, Place& place) {
  if (++place.chunk < w.unit_chunks) return;
  place.chunk = 0;
  place.group += a.group_step;
  place.split += a.split_step;
  if (place.split >= w.splits) {
    place.split -= w.splits;
    ++place.group;
  }
  if (TENSOR && place.group == a.groups) {
    place.group = 0;
    ++place.part;
  }
}

__device__ __forceinline__ void ask(const Weights& w, const Supply& p, Asking& a) {
  u64* barrier = p.arrivals + ring_of(a.line) * MOST_PIECES + a.mark.number % MOST_PIECES;
  unsigned char* to = p.rings + ring_of(a.line) * p.ring_bytes + a.mark.at;
  const u32 bytes = w.chunk * sizeof(num), apart = row_bytes(w.chunk);
  int row;
  const int count = rows_of_group(w, a.first, a.end, a.next.group, row);
  expect_bytes(barrier, (TENSOR ? (count - a.line + ASKERS - 1) / ASKERS : count) * bytes);
  each_row(w, a, a.next, [&](int r, const num* row) { copy_ahead(to + r * apart, row, bytes, barrier); });
  step_over(a.mark, a.bytes);
  --a.left;
  step_on(w, a, a.next);
  if (a.near) --a.near;
  else a.far = a.next;
}

// No room in the ring: at the rate at which weights arrive the next pieces into the second cache.
__device__ __forceinline__ void bring_next_near(const Weights& w, const Supply& p, Asking& a) {
  const u32 apart = a.bytes * 5 / 8 * RINGS / WARPS;
  if (a.near >= a.left || (a.near + 1) * a.bytes > p.near_bytes || (u32)clock64() - a.near_since < apart) return;
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
  u64* arrivals = p.arrivals + ring_of(a.line) * MOST_PIECES;
  while (a.arrived != a.mark.number && has_arrived(arrivals + a.arrived % MOST_PIECES, parity_of(a.arrived))) ++a.arrived;
  const Weights& w = o.weights[(a.opened - 1) % MOST_OPENED];
  const u64 taken = TENSOR ? least_heard(o.taken, WARPS) : heard(o.taken + a.line);
  const u32 most = !TENSOR && a.arrived != (u32)(taken >> 32) ? 1u : a.most;
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
  int first;  // row that it begins with; -1: as the flags say
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

// The row that this block begins with in a product, -1 where it has nothing to multiply, as the flags are now.
__device__ __forceinline__ int guess_first(const Weights& w, int first, int end, Outlook& next) {
  if (w.skip_B != next.known_B) {
    next.known_B = w.skip_B;
    next.known = any_runs(w.skip_B);
  }
  if (idle(w, end, next.known)) return -1;
  return !next.known && w.kept_from > first ? w.kept_from : first;
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
  if (lane < LINES / ASKERS) {
    o.number_then[a.line] = a.mark.number;
    o.at_then[a.line] = a.mark.at;
    o.passed_then[a.line] = a.mark.passed;
  }
  __syncwarp();
  if (lane) return;
  if (!asker) o.opened_then = opened;
  tell(o.answered + asker, turns);
}

// The lines of one ring go on from the furthest: of pieces that a line did not ask for before the turn it takes no part.
__device__ __forceinline__ void settle(Orders& o, const Supply& p, u32 turns, Asking& a) {
  ROLLED for (int i = 0; i < ASKERS; ++i)
    while (heard(o.answered + i) != turns) look_again();
  const int line = furthest(o);
  ROLLED for (; a.mark.number != o.number_then[line]; ++a.mark.number)
    expect_bytes(p.arrivals + a.mark.number % MOST_PIECES, 0);
  a.mark.at = o.at_then[line];
  a.mark.passed = o.passed_then[line];
  tell(o.settled + a.line, turns);
}

// Some lane has asked for all that it knows of, and the place of the next product is free.
__device__ __forceinline__ bool more_wanted(const Orders& o, u32 opened) {
  const int lane = threadIdx.x % WARP;
  const u32 begun = lane < LINES ? heard(o.begun + lane) : 2 * opened;
  const bool full = opened - begun / 2 >= MOST_OPENED || opened - heard(&o.closed) >= MOST_OPENED;
  return __any_sync(0xffffffffu, begun == 2 * opened + 1) && !__any_sync(0xffffffffu, full);
}

// What the last warps do all the time. The first of them begins products.
__device__ __forceinline__ void keep_asking(Orders& o, const Supply& p) {
  const int lane = threadIdx.x % WARP, asker = (threadIdx.x - THREADS) / WARP;
  Asking a = {};
  a.line = asker * (LINES / ASKERS) + lane;
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
      if (TENSOR && lane == 0) settle(o, p, turns, a);
      __syncwarp();
      if (!asker) look_at_product(p, next, o.turned_to);
      next.first = o.turned_first;
      next.known_B = nullptr;
      next.known = true;
    }
    if (asker) opened = heard(&o.opened);
    else if (next.product <= p.end && more_wanted(o, opened)) open_next(o, p, opened, next);
    if (lane < LINES / ASKERS) {
      ask_along(o, p, opened, a);
      const u32 begun = 2 * a.opened + !a.left;
      if (begun != a.told) tell(o.begun + a.line, begun);  // seldom: others wait for a fence
      a.told = begun;
    }
    __syncwarp();
    rest();
  }
}
