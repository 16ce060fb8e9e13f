// What the host tells a decoding step. arguments.py reads these structures, so fields are pointers, Linear, int,
// float and long long, one declaration a line or several of one type.
#pragma once

struct Linear {  // a matrix [outputs, inputs], row after row, in the model's type; no bias: null
  const void *weight, *bias;
};

struct LayerArguments {
  Linear query, key, value, out, gate, up, down;
  const void *input_norm, *post_norm, *query_norm, *key_norm;
  int looks, reads, asks, is_protected, adapts;
  Linear window_in, window_out, preview_up;
  const void *query_scale, *query_bias, *mix, *mix_bias, *up_norm, *strength;
  Linear summarise, chunk_query, chunk_key, chunk_value, chunk_out;
  const void *null_key, *null_value, *distance_bias, *chunk_strength;
  Linear reduce, preview, hidden, decide;
  const void *reduce_norm;
  Linear adapter_down, adapter_up;
};

struct ModelArguments {
  int layers, width, inner, heads, groups, head_dim;
  float eps, scale;
  // PAW. fixed_window: 0 if it is predicted. mixes: compression by convolution, else by the mean alone.
  int horizons, rank, candidates, shortlist, window_hidden, fixed_window, hard, mixes;
  Linear state_map;
  const void *horizon_maps, *mean_map, *reduced;
  const float *prior;
  // Chunk-Head. boundary_layer: -1 without one. bucket_of: of each distance below the ring's size.
  int boundary_layer, chunk_width, chunk_heads, chunk_places, buckets;
  Linear boundary;
  const int *bucket_of;
  // Skip-Gate and what a skipped layer does.
  int gate_residual, gate_preview, gate_hidden, reads_residual, reads_preview, block, ahead;
  float clip;
  int adapter_rank, projects;
  const LayerArguments *layer;
};

// One layer's cache. Contiguous: keys and values [rows, groups, places, head_dim] by the strides, in numbers;
// exists marks entries that count, null: all. Paged: blocks of `page` places, found through StepArguments.pages, a
// value's numbers side by side, a key's too or, with page_columns, `page` apart. owed: how many of the newest places are
// not written yet, and their normed inputs [places, rows, width] with cosines and sines [places, rows, head_dim / 2].
struct CacheArguments {
  void *keys, *values;
  unsigned char *exists;
  long long row_stride, head_stride, exists_stride, block_stride;
  float *owed_input, *owed_cosine, *owed_sine;
  int owed;
};

// A chunk layer's memory, in which StepArguments.chunk_row says where each row's is: rings [.., places, width], sums
// [.., width of a state].
struct ChunkArguments {
  void *keys, *values;
  float *open_sum;
  long long ring_stride;
};

// mode: 0 nothing skips, 1 p >= bar, 2 bar < p, 3 given. asks: gates are computed; without, 1 skips where bar is
// -inf. bar: [layers, rows], or one row of it for all (bar_stride 0); null in mode 2: drawn from the rows' seed and
// position, 1 where gated says that no gate acts. never: layers that always run in this call.
// entries: places in use of each layer and row before this token, [layers, rows]. most_owed: places for which a layer that
// all rows skip may leave keys and values to a step that needs them. added: 1 for layers in which the step left an entry
// (and wrote all that was owed), 2 where it owes it. prob, skip: [layers, rows]. windows: [looks, rows]; queries,
// inclusions likewise. boundary: [rows, 5]; close_prob: [rows], or null.
// closes: the token opens a chunk. closed, open_size, continuable: of the rows' chunks, before and after.
struct StepArguments {
  int rows, threads, mode, asks, consensus, page, page_columns, most_owed;
  float temperature;
  long long bar_stride, pages_stride;
  const float *bar, *cosine, *sine;
  const unsigned char *given, *never, *gated;
  const long long *entries, *seed, *position;
  const int *pages;
  const CacheArguments *cache;
  const ChunkArguments *chunks;
  const long long *chunk_row;
  long long *closed, *open_size;
  unsigned char *continuable, *closes, *added, *skip;
  const void *input;
  void *output;
  float *prob, *windows, *queries, *inclusions, *boundary, *close_prob;
};
