// The inputs of a product, laid out as its vectors read them.
#pragma once
#include <new>
#include <type_traits>
#include <vector>

#include "lanes.h"

// Vectors of eight that lie across two lines of the cache are read in two goes.
template <class X>
struct Aligned {
  typedef X value_type;
  Aligned() = default;
  template <class Y>
  Aligned(const Aligned<Y>&) {}
  X* allocate(size_t n) { return (X*)::operator new(n * sizeof(X), std::align_val_t(64)); }
  void deallocate(X* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
  bool operator==(const Aligned&) const { return true; }
  bool operator!=(const Aligned&) const { return false; }
};
typedef std::vector<float, Aligned<float>> Floats;

// A block is made for WIDE rows, of which a vector holds ROWS: BYTES of each, side by side; VECTORS of them hold all rows.
// Few rows have vectors of their own, since weights are then read as they lie.
template <class T, int WIDE>
struct Layout {
  static const int ROWS = WIDE <= 4 ? 1 : WIDE > LANES ? LANES : WIDE, VECTORS = WIDE / ROWS;
  static const int BYTES = 4 * LANES / ROWS, NUMBERS = BYTES / sizeof(T);  // of one row
};
static const int WIDEST = 2 * LANES;

// Calls go with the width of a block of several rows as a constant.
template <class Do>
static inline void with_width(int wide, Do&& go) {
  switch (wide) {
    case 2: return go(std::integral_constant<int, 2>());
    case 4: return go(std::integral_constant<int, 4>());
    case 8: return go(std::integral_constant<int, 8>());
    case 16: return go(std::integral_constant<int, 16>());
    default: return go(std::integral_constant<int, WIDEST>());
  }
}

// Rows [0, rows) of inputs [rows, numbers], whole in blocks. One row alone is read where it lies.
template <class T>
struct Inputs {
  struct Block {
    int first, rows, wide;  // wide: how many rows it has room for
    size_t at;
  };
  const float* given = nullptr;
  int numbers = 0;
  std::vector<Block> blocks;
  Floats laid;

  void take(const float* x, int rows, int k) {
    given = x, numbers = k;
    blocks.clear();
    size_t room = 0;
    for (int first = 0; first < rows;) {
      const int left = rows - first, wide = width_for(left), some = wide < left ? wide : left;
      blocks.push_back({first, some, wide, room});
      room += wide > 1 ? (size_t)wide * k : 0;
      first += some;
    }
    if (laid.size() < room) laid.resize(room);
    for (const Block& block : blocks)
      if (block.wide > 1) with_width(block.wide, [&](auto wide) { lay<wide>(block); });
  }

 private:
  // Empty places cost a product what rows do; another block costs reading the weights again, out of a near cache.
  static int width_for(int left) {
    for (int wide = WIDEST; wide > 1; wide /= 2)
      if (wide > 8 ? 4 * left > 3 * wide : 2 * left > wide) return wide;
    return 1;
  }

  template <int WIDE>
  void lay(const Block& block) {
    typedef Layout<T, WIDE> L;
    const int steps = numbers / L::NUMBERS, stride = WIDE * L::NUMBERS;
    for (int r = 0; r < WIDE; r++) {
      T* to = (T*)(laid.data() + block.at) + r * L::NUMBERS;
      const float* row = given + (long)(block.first + r) * numbers;
      for (int j = 0; j < steps; j++)
        for (int i = 0; i < L::NUMBERS; i++)
          to[(long)j * stride + i] = r < block.rows ? cut<T>(row[j * L::NUMBERS + i]) : T{};
    }
  }
};
