// A step, or a part of one, as one launch: every block walks through the same calls.

#define ARGUMENT_BYTES 448

struct Call {
  int kernel;
  int quiet;         // no arrival behind it, 1: ever; 2: where the rows of quiet_B all skip; 3: where one of them runs
  int product;       // the number of the first product from this call on
  int void_where;    // 0: nobody of void_B runs; 1: no row closes a chunk in void_B; 2: somebody of void_B runs
  int past_call;     // where it goes on if the call is void,
  int past_product;  // and the first product from there on
  int also_where;    // the same for a second reason
  int also_call;
  int also_product;
  int next_where;    // the same of the next call, whose flags are known before this one is done
  int next_call;
  int next_product;
  const int* quiet_B;
  const int* void_B; // null: the call is never void
  const int* also_B; // null: for no second reason
  const int* next_B; // null: or not known yet
  __align__(16) unsigned char arguments[ARGUMENT_BYTES];
};

struct Program {
  const Call* calls;
  int first;
  int end;
  const Weights* products;
  int first_product;  // of these calls
  int end_product;
  int ring_bytes;     // of each
  int window_bytes;   // of a ring's weights that are on their way at a time
  int near_bytes;     // of a ring's weights that wait in the second cache
  u32* arrived;    // of all blocks, ever
  u32* epochs;     // of each block
  u64* cycles;     // [calls] the first block's clock when it was through with each, 0 of void ones; null: not asked
};

// Number, name, what it reads and what it writes. fbs_rl/decode/kernel_arguments.py reads them, and those of the other
// calls in make_call.
#define PRODUCTS(PRODUCT)                            \
  PRODUCT(16, product_front, UNIT, AFFINE)           \
  PRODUCT(17, product_qkv, NORMED, STORE)            \
  PRODUCT(18, product_attention_out, PLAIN, RESIDUAL) \
  PRODUCT(19, product_gate_up, NORMED, GATED)        \
  PRODUCT(20, product_down, PLAIN, LAYER_END)        \
  PRODUCT(21, product_logits, NORMED, LOGITS)        \
  PRODUCT(22, product_plain, PLAIN, STORE)           \
  PRODUCT(24, product_inject_preview, PRENORMED, INJECT) \
  PRODUCT(25, product_inject_chunks, PLAIN, INJECT)  \
  PRODUCT(26, product_summary, MEAN, STORE)          \
  PRODUCT(27, product_ring, PLAIN, RING)             \
  PRODUCT(28, product_entry, BOTH, STORE)            \
  PRODUCT(29, product_held, HELD, STORE)             \
  PRODUCT(30, product_qkv_front, BOTH, STORE)

struct Block {
  Team team;
  Stream stream;
  Fixed* fixed;
  unsigned char* room;
};

// What lies in front of the rings in a block's shared memory.
struct Front {
  Call call[2];  // the one that runs, and the next
  u64 arrivals[RINGS * MOST_PIECES];
  Orders orders;
  Fixed fixed;
};

#define FRONT_BYTES 4608
static_assert(sizeof(Front) <= FRONT_BYTES, "fbs_rl/decode/program.py leaves this much");

__device__ __forceinline__ Block open_block(const Program& p, unsigned char* shared) {
  Front& front = *(Front*)shared;
  const int ring = threadIdx.x / WARP % RINGS;
  Block b;
  b.team = {p.arrived, __ldcg(p.epochs + blockIdx.x), false, nullptr, true, nullptr, true};
  b.fixed = &front.fixed;
  b.room = shared + FRONT_BYTES + RINGS * p.ring_bytes;
  b.stream = {shared + FRONT_BYTES + ring * p.ring_bytes, (u32)p.ring_bytes, front.arrivals + ring * MOST_PIECES,
              &front.orders, {}, 0, 0};
  return b;
}

// By one warp, before anything else.
__device__ __forceinline__ void lay_out(Front& front) {
  const int lane = threadIdx.x % WARP;
  ROLLED for (int i = lane; i < RINGS * MOST_PIECES; i += WARP) make_barrier(front.arrivals + i, ARRIVALS);
  ROLLED for (int i = lane; i < (int)sizeof(Orders) / 4; i += WARP) ((u32*)&front.orders)[i] = 0;
  show_barriers();
}

// Whether flags say that there is nothing to do; where as in Call::void_where.
__device__ __forceinline__ bool excuses(const int* flags_B, int where, Team& team) {
  if (!flags_B) return false;
  if (where != 1) return layer_runs(flags_B, team) == (where == 2);
  ROLLED for (int b = 0; b < ROWS; ++b)
    if (__ldcg(flags_B + b) >= 0) return false;
  return true;
}

// Whether a call is void, and for which of its reasons: 0, it is not.
__device__ __forceinline__ int why_void(const Call& c, Team& team) {
  return excuses(c.void_B, c.void_where, team) ? 1 : excuses(c.also_B, c.also_where, team) ? 2 : 0;
}

__device__ __forceinline__ bool is_quiet(const Call& c, Team& team) {
  return c.quiet == 1 || (c.quiet && layer_runs(c.quiet_B, team) == (c.quiet == 3));
}

#define FIRST_PRODUCT 16

// Where it goes on behind a call, or, where that is void, behind all that are void for the same reason. Their weights
// are not wanted.
__device__ __forceinline__ int next_of(const Call& c, int at, int reason, int end_product, Block& b) {
  const bool passes = !reason && c.next_B && layer_runs(c.next_B, b.team) == (c.next_where == 2);
  if (!reason && !passes) return at + 1;
  pass(b.stream, c.product + (!reason && c.kernel >= FIRST_PRODUCT),
       min(!reason ? c.next_product : reason == 1 ? c.past_product : c.also_product, end_product));
  return !reason ? c.next_call : reason == 1 ? c.past_call : c.also_call;
}

// Calls that have nothing to do before they await the others: embed, advance, move, shortlist, boundary, chunk_*.
#define AWAITS (1 << 0 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 9 | 1 << 14)

__device__ __forceinline__ void make_call(const Call& c, Block& b) {
  int input = -1, output = -1;
  if (AWAITS >> c.kernel & 1) await(b.team);
  switch (c.kernel) {
    case 0: embed(*(const Embed*)c.arguments); break;
    case 1: advance(*(const Advance*)c.arguments, *b.fixed, b.room); break;
    case 2: attention(*(const Attention*)c.arguments, b.team, *(AttentionShared*)b.room); break;
    case 3: decide(*(const Decision*)c.arguments, b.team, *b.fixed, b.room); break;
    case 10: skip_end(*(const SkipEnd*)c.arguments, b.team, b.room); break;
    case 11: leave_entry(*(const Attention*)c.arguments, b.team, *(AttentionShared*)b.room); break;
    case 4: move(*(const Move*)c.arguments, *b.fixed); break;
    case 12: scores(*(const Scores*)c.arguments, b.team, *b.fixed, b.room); break;
    case 5: shortlist(*(const Shortlist*)c.arguments, *b.fixed, b.room); break;
    case 6: look(*(const Look*)c.arguments, b.team, b.room); break;
    case 13: pool(*(const Pool*)c.arguments, b.team, b.room); break;
    case 7: boundary(*(const Boundary*)c.arguments); break;
    case 8: chunk_scores(*(const ChunkRead*)c.arguments); break;
    case 14: chunk_mix(*(const ChunkRead*)c.arguments, *b.fixed, b.room); break;
    case 9: chunk_extend(*(const ChunkExtend*)c.arguments, *b.fixed); break;
#define PRODUCT(number, name, reads, writes) \
    case number: input = reads; output = writes; break;
    PRODUCTS(PRODUCT)
  }
  if (output >= 0)
    product(*(const Product*)c.arguments, input, output, c.product, b.stream, b.team, *b.fixed, b.room);
}

__device__ __forceinline__ void copy_call(const Call* from, Call* to) {
  const int lane = threadIdx.x % WARP;
  ROLLED for (int i = lane; i < (int)(sizeof(Call) / 16); i += WARP) ((uint4*)to)[i] = ((const uint4*)from)[i];
}

__device__ __forceinline__ void work(const Program& p, unsigned char* shared) {
  Call* held = ((Front*)shared)->call;
  Block b = open_block(p, shared);
  if (threadIdx.x < WARP) copy_call(p.calls + p.first, held);
  __syncthreads();
  int place = 0;
  ROLLED for (int at = p.first, next; at < p.end; at = next) {
    const Call& c = held[place];
    const int reason = why_void(c, b.team);
    next = next_of(c, at, reason, p.end_product, b);
    place ^= 1;
    const bool more = next < p.end;
    if (more && threadIdx.x >= THREADS - WARP) copy_call(p.calls + next, held + place);
    if (reason) {
      __syncthreads();
    } else {
      make_call(c, b);
      const bool quiet = more && is_quiet(c, b.team);
      if (!quiet) await(b.team);  // a block that had no part in the call
      __syncthreads();  // from here on nobody looks at c
      if (more && !quiet) arrive(b.team);
    }
    if (p.cycles && blockIdx.x == 0 && threadIdx.x == 0)
      ROLLED for (int passed = at; passed < min(next, p.end); ++passed)
        p.cycles[passed] = reason || passed > at ? 0 : clock64();
  }
  if (threadIdx.x == 0) {
    p.epochs[blockIdx.x] = b.team.epoch;
    tell(&((Front*)shared)->orders.turns, LEAVES);
  }
}

__device__ __forceinline__ void walk(const Program& p, unsigned char* shared) {
  Front& front = *(Front*)shared;
  if (threadIdx.x >= ALL_THREADS - WARP) lay_out(front);
  sync_all();
  if (threadIdx.x < THREADS) {
    take_registers<WORK_REGISTERS>();
    work(p, shared);
  } else {
    leave_registers<ASK_REGISTERS>();
    keep_asking(front.orders, {p.products, p.first_product, p.end_product, (u32)p.ring_bytes, (u32)p.window_bytes,
                               (u32)p.near_bytes, shared + FRONT_BYTES, front.arrivals});
  }
}

#ifndef EMULATED
extern __shared__ __align__(128) unsigned char shared[];
extern "C" __global__ void __launch_bounds__(ALL_THREADS, 1) run(Program p) { walk(p, shared); }
#endif
