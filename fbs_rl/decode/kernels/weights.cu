// Weights on their way: what a block asks the copy engine for, long before a product's turn.

#define MOST_PIECES 16  // of a warp, that are on their way or wait for their use
#define MOST_OPENED 4   // products that are asked for at a time
#define SHARE_ROWS (TENSOR ? 1 : OUT_ROWS)  // what a block's share of the output rows is a multiple of, but for the last
#define RINGS (TENSOR ? 1 : WARPS)  // of weights: one for each warp, or one whose pieces all warps share
#define LINES (TENSOR ? ASKERS : RINGS)  // lanes that ask: one for each ring, or a few for one, each for some of its rows
#define ARRIVALS (LINES / RINGS)         // of those who ask for a piece

// What a block needs to know to ask for a product's weights.
struct Weights {
  const num* matrix[4];  // output rows come from up to four matrices, one behind the other
  int rows[4];
  int columns;
  u32 blocks;  // that share the output rows
  int parts;   // of the columns, of whose inputs a block has one at a time; 1: all at once
  int splits;  // of a part, of which each is a unit for one of the rings
  int chunk;   // columns of a piece
  int unit_chunks;
  int paired;  // 1: a block has the same rows of two matrices
  int kept_from;      // rows from here on are wanted although nobody runs the layer; -1: none are
  const int* skip_B;  // null: every row runs
  const int* slot_B;  // place of the chunk that a row closes, -1: it closes none; null: not asked
};

__device__ __forceinline__ int row_count(const Weights& w) {
  return w.rows[0] + w.rows[1] + w.rows[2] + w.rows[3];
}

// An output row's weights.
__device__ __forceinline__ const num* weight_row(const Weights& w, int row) {
  if (row < w.rows[0]) return w.matrix[0] + (long long)row * w.columns;
  row -= w.rows[0];
  if (row < w.rows[1]) return w.matrix[1] + (long long)row * w.columns;
  row -= w.rows[1];
  if (row < w.rows[2]) return w.matrix[2] + (long long)row * w.columns;
  return w.matrix[3] + (long long)(row - w.rows[2]) * w.columns;
}

// The output rows that this block has, [first, end).
__device__ __forceinline__ void share_of(const Weights& w, int& first, int& end) {
  const int step = w.paired && SHARE_ROWS == 1 ? 2 : SHARE_ROWS;  // a pair stays together
  const u32 shares = (row_count(w) + step - 1) / step, block = min(blockIdx.x, w.blocks);
  first = step * (int)(shares * block / w.blocks);  // of 64 bits it would take as long as a piece
  end = min(step * (int)(shares * min(block + 1, w.blocks) / w.blocks), row_count(w));
}

// A block's rows come in groups of OUT_ROWS, of which the last may be smaller. Where they are paired they are rows of one
// matrix and the same rows of the other, a group of each in turns; single rows first all of one, then those of the other.
__device__ __forceinline__ int groups_of(const Weights& w, int rows) {
  const int sides = OUT_ROWS > 1 && w.paired ? 2 : 1;
  return (rows / sides + OUT_ROWS - 1) / OUT_ROWS * sides;
}

// Rows of a group of the block's rows [first, end); row: the first of them.
__device__ __forceinline__ int rows_of_group(const Weights& w, int first, int end, int group, int& row) {
  int begin = group * OUT_ROWS, count = end - first;
  row = first + begin;
  if (w.paired) {
    count /= 2;
    const int side = OUT_ROWS > 1 ? group % 2 : begin >= count;
    begin = OUT_ROWS > 1 ? group / 2 * OUT_ROWS : begin - side * count;
    row = side * w.rows[0] + first / 2 + begin;
  }
  return OUT_ROWS == 1 ? 1 : min(OUT_ROWS, count - begin);
}

// Bytes from a row to the next where several of `columns` numbers lie in shared memory. An odd number of 64 bytes: four
// lanes a row read two rows at once.
__device__ __forceinline__ int row_bytes(int columns) {
  const int bytes = columns * (int)sizeof(num);
  return TENSOR ? ((bytes + 63) / 64 | 1) * 64 : bytes;
}

// Whether a block whose rows end before `end` has nothing to multiply. runs: some row runs the layer.
__device__ __forceinline__ bool idle(const Weights& w, int end, bool runs) {
  if (w.slot_B) {
    ROLLED for (int b = 0; b < ROWS; ++b)
      if (__ldcg(w.slot_B + b) >= 0) return false;
    return true;
  }
  return !runs && (w.kept_from < 0 || end <= w.kept_from);
}

// The weights of a program's products, one behind the other, come in pieces of a chunk of OUT_ROWS rows, each into the
// ring of shared memory of the warp that multiplies it; tensor cores take so little time that all warps share each piece
// of one ring, whose rows are longer then. The last warps of the block ask the copy engine for them, each for a few rings,
// a lane for each: one warp for all would be slower than the weights. They ask as far ahead as there is room, across the
// bounds of products; but no more than a window at a time is on its way, and where a piece waits for its use one at a
// time, for small reads wait behind it. Which products run is a guess where flags are still those of the token before;
// who finds it wrong turns the stream (turn_to). Lanes count along: divisions cost more than products.

// What the warps that ask and those that multiply tell each other. Counts are those of the launch and never fall.
struct Orders {
  Weights weights[MOST_OPENED];
  int product[MOST_OPENED], first[MOST_OPENED], end[MOST_OPENED];  // whose, and of which rows
  u32 opened;        // products that were begun; by the first of those who ask
  u32 closed;        // products that are through, or given up
  u32 turns;         // of the stream; LEAVES: no more is wanted
  int turned_to;     // product that the stream goes on with
  int turned_first;  // row that it begins with there; -1: as the flags say
  u32 begun[LINES];  // 2 · products that a lane knows, + 1 if it has asked for all of them
  u32 answered[ASKERS];  // turns that the stream took, and where it stood then:
  u32 opened_then;
  u32 number_then[LINES], at_then[LINES], passed_then[LINES];
  u32 settled[ASKERS];  // turns behind which the lines of a ring stand at the same piece, the last one of them
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

// --- the side of those who multiply ---

struct Stream {
  unsigned char* ring;  // of this warp, or of all
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
  if (threadIdx.x % WARP == 0) note(s.orders->taken + threadIdx.x / WARP, (u64)s.mark.number << 32 | s.mark.passed);
}

__device__ __forceinline__ void leave_piece(Stream& s, u32 bytes) {
  step_over(s.mark, bytes);
  tell_taken(s);
}

// Of the lines of one ring, when they have answered, the one that had asked for most.
__device__ __forceinline__ int furthest(const Orders& o) {
  int line = 0;
  ROLLED for (int i = 1; i < LINES; ++i)
    if (o.number_then[i] > o.number_then[line]) line = i;
  return line;
}

// The stream goes on with another product: what is on its way is waited for and not used.
__device__ __forceinline__ void turn_to(Stream& s, int product, int first) {
  Orders& o = *s.orders;
  ++s.turns;
  __syncthreads();
  if (threadIdx.x == 0) {
    o.turned_to = product;
    o.turned_first = first;
    tell(&o.turns, s.turns);
  }
  ROLLED for (int i = 0; i < ASKERS; ++i)
    while (heard((TENSOR ? o.settled : o.answered) + i) != s.turns) look_again();
  const int line = TENSOR ? furthest(o) : threadIdx.x / WARP;
  ROLLED for (; s.mark.number != o.number_then[line]; ++s.mark.number)
    wait_barrier(s.arrivals + s.mark.number % MOST_PIECES, parity_of(s.mark.number));
  s.mark.at = o.at_then[line];
  s.mark.passed = o.passed_then[line];
  s.opened = o.opened_then;
  tell_taken(s);
  if (threadIdx.x == 0) tell(&o.closed, s.opened);
}

// The product whose weights come next.
__device__ __forceinline__ int next_product(const Stream& s) {
  while (heard(&s.orders->opened) == s.opened) look_again();
  return s.orders->product[s.opened % MOST_OPENED];
}

// By all threads: what comes next are the weights of a product, from the row `first` on.
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
