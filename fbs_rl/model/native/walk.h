// A decoding step: all layers for a few rows of one token each. Every thread walks through it; a product's outputs
// are shared out, what is small each thread makes for itself, and a barrier stands where one reads what others made.
#pragma once
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <vector>

#include "attention.h"
#include "products.h"

static const int MOST_ROWS = 32;

// Threads wait awake: one that slept would lose its processor to others for longer than a whole step takes.
struct Barrier {
  std::atomic<int> arrived{0}, turn{0};

  void wait(int many) {
    const int now = turn.load(std::memory_order_acquire);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == many) {
      arrived.store(0, std::memory_order_relaxed);
      turn.store(now + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; turn.load(std::memory_order_acquire) == now; spins++) {
      if (spins > 1 << 14) sched_yield();  // more threads than processors
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  }
};

// What threads hand to each other.
struct Room {
  Barrier barrier;
  Floats state[2], injected, query, key, value, attended, middle, active, reduced, adapter;
  Floats preview_query, window, scores, wide_query, expected, pooled, entropy, chunk_query, chunk_mixed, summary;
  std::vector<int> found;
  std::vector<float> found_score;

  Room(const ModelArguments& m, int rows, int threads, int most_owed) {
    const long heads = (long)m.heads * m.head_dim, groups = (long)m.groups * m.head_dim;
    for (Floats* one : {&state[0], &state[1], &injected, &middle}) one->resize(rows * m.width);
    query.resize((long)rows * heads), attended.resize((long)rows * heads);
    for (Floats* one : {&key, &value}) one->resize((long)rows * (1 + most_owed) * groups);
    active.resize((long)rows * m.inner);
    reduced.resize((long)rows * (m.gate_residual + m.gate_preview + 1)), adapter.resize((long)rows * (m.adapter_rank + 1));
    preview_query.resize((long)rows * m.rank), window.resize((long)rows * m.window_hidden);
    scores.resize((long)rows * m.candidates), wide_query.resize((long)rows * m.horizons * m.rank);
    expected.resize((long)rows * m.horizons * m.rank), pooled.resize((long)rows * m.rank), entropy.resize(rows);
    chunk_query.resize((long)rows * m.chunk_width), chunk_mixed.resize((long)rows * m.chunk_width);
    summary.resize((long)rows * m.chunk_width);
    found.resize((long)rows * threads * m.shortlist), found_score.resize((long)rows * threads * m.shortlist);
  }
};

template <class T>
struct Walk {
  const ModelArguments& m;
  const StepArguments& s;
  Room& room;
  const int me, many, rows;
  int here = 0;  // which of the two states is the current one
  // What each thread makes for itself.
  bool shortlisted = false;
  Floats normed, input, features, inclusion, key, score;
  std::vector<int> shortlist, run, idle;
  std::vector<float> prob, decided;  // of the gate that was asked last; of the layer's block
  std::vector<unsigned char> skips, closes, finishes;
  float motion[MOST_ROWS][2];
  bool has_prob = false, is_decided = false;

  Walk(const ModelArguments& m, const StepArguments& s, Room& room, int me, int many)
      : m(m), s(s), room(room), me(me), many(many), rows(s.rows) {
    normed.resize((long)rows * m.width), input.resize((long)rows * (1 + s.most_owed) * m.width);
    features.resize(m.gate_residual + m.gate_preview + 3 + m.gate_hidden);
    inclusion.resize((long)rows * m.horizons), shortlist.resize((long)rows * m.shortlist);
    key.resize((long)rows * m.groups * m.head_dim);
    prob.assign(rows, 0.0f), skips.assign(rows, 0), closes.assign(rows, 0), finishes.assign(rows, 0);
    for (int r = 0; r < rows; r++) motion[r][0] = 0.0f, motion[r][1] = 1.0f;
  }

  void wait() const {
    if (many > 1) room.barrier.wait(many);
  }
  int first(int n) const { return (long)n * me / many; }
  int last(int n) const { return (long)n * (me + 1) / many; }
  float* state() const { return room.state[here].data(); }
  float* after() const { return room.state[1 - here].data(); }

  // My share of the n outputs of a product of `count` rows of k inputs; of the inputs taken last; all of them.
  void product(const Linear& w, const float* x, float* y, int count, int n, int k, int ldy = 0) {
    taken.take(x, count, k);
    product_of_taken(w, y, count, n, ldy);
  }
  void product_of_taken(const Linear& w, float* y, int count, int n, int ldy = 0) const {
    multiply(w, taken, count, y, ldy ? ldy : n, first(n), last(n));
  }
  void whole_product(const Linear& w, const float* x, float* y, int count, int n, int k) {
    taken.take(x, count, k);
    multiply(w, taken, count, y, n, 0, n);
  }
  Inputs<T> taken;

  void walk() {
    const T* given = (const T*)s.input;
    for (long i = me; i < (long)rows * m.width; i += many) state()[i] = widen(given[i]);
    wait();
    for (int l = 0; l < m.layers; l++) pass(l, m.layer[l]);
    T* out = (T*)s.output;
    for (long i = me; i < (long)rows * m.width; i += many) narrow(state()[i], out + i);
    if (me == 0 && m.boundary_layer >= 0) count_chunks();
  }

  void pass(int l, const LayerArguments& w) {
    for (int r = 0; r < rows; r++) norm_unit(state() + (long)r * m.width, normed.data() + (long)r * m.width);
    if (w.looks) look(l, w);
    if (l == m.boundary_layer) find_chunks();
    decide(l, w);
    take_skips();
    write_keys(l, w);
    if (!run.empty()) execute(l, w);
    if (w.reads) extend_chunks(l, w);
    here = 1 - here;
  }

  // --- norms ------------------------------------------------------------------------------------

  float inverse_rms(const float* x, int n, float eps) const {
    f8 sums = all8(0.0f);
    int i = 0;
    for (; i + 8 <= n; i += 8) sums += load8(x + i) * load8(x + i);
    float sum = sum8(sums);
    for (; i < n; i++) sum += x[i] * x[i];
    return 1.0f / sqrtf(sum / n + eps);
  }
  void norm_unit(const float* x, float* out) const {
    const float scale = inverse_rms(x, m.width, m.eps);
    for (int i = 0; i < m.width; i++) out[i] = rounded<T>(x[i] * scale);
  }
  void norm(const float* x, const void* weight, float* out, int n) const {
    const T* w = (const T*)weight;
    const float scale = inverse_rms(x, n, m.eps);
    for (int i = 0; i < n; i++) out[i] = rounded<T>(widen(w[i]) * rounded<T>(x[i] * scale));
  }
  void weigh(const float* unit, const void* weight, float* out) const {
    const T* w = (const T*)weight;
    for (int i = 0; i < m.width; i++) out[i] = rounded<T>(widen(w[i]) * unit[i]);
  }

#include "look.h"
#include "decide.h"
#include "chunks.h"
#include "execute.h"
};
