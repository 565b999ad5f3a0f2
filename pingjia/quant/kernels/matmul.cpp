// The driver of a product: tokens into blocks, tiles into pieces for the team, results to their place.
#include "kernel_set.h"

#include <algorithm>

namespace pingjia {
namespace {

constexpr int64_t kSmall = 16384;  // numbers that one thread quantises sooner than the team is told
constexpr int64_t kChunkBytes = 768 * 1024;  // of activations: most of a second-level cache
constexpr int64_t kLine = 64;      // bytes of a cache line

int width_of(const int* widths, int64_t left) {
  while (widths[1] != 0 && widths[0] < left) ++widths;
  return widths[0];
}

// Blocks as wide as can be and as equal as can be: the widest kernel is the fastest per token, a lone token the slowest.
void make_blocks(int64_t t, int parts, std::vector<Block>& blocks) {
  const int* widths = kernel_set().widths;
  int widest = 0;
  while (*widths != 0) widest = *widths++;
  const int64_t most = widest / parts, count = (t + most - 1) / most;
  blocks.clear();
  int64_t slot = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t first = i * t / count, tokens = (i + 1) * t / count - first;
    const int width = width_of(kernel_set().widths, tokens * parts);
    blocks.push_back({first, static_cast<int>(tokens), width, slot});
    slot += width;
  }
}

template <class T>
void grow(std::vector<T>& v, int64_t size) {
  if (static_cast<int64_t>(v.size()) < size) v.resize(static_cast<size_t>(size));
}

// Results of one tile and one block -> y. Parts of a token are added up.
void write_rows(const Matrix& w, int64_t tile, const Block& b, int parts, const float* from, float* y, int64_t y_stride, bool accumulate) {
  const int64_t row = tile * kTileRows, rows = w.n - row < kTileRows ? w.n - row : kTileRows;
  for (int t = 0; t < b.count; ++t) {
    float* to = y + (b.first + t) * y_stride + row;
    const float* in = from + t * parts * kTileRows;
    for (int64_t i = 0; i < rows; ++i) {
      float value = parts == 2 ? in[i] + in[i + kTileRows] : in[i];
      if (w.bias) value += w.bias[row + i];
      to[i] = accumulate ? to[i] + value : value;
    }
  }
}

// One product, cut into items: a unit of tiles times a chunk of tokens whose activations stay in the second cache.
struct Call {
  const Matrix& w;
  const QuantRows& x;
  float* y;
  int64_t y_stride;
  bool accumulate;
  int64_t index;  // among the targets
  const Around& around;
  int64_t tiles, units, tile_size, scale_size, blocks, chunks;

  Call(const Matrix& w, const QuantRows& x, float* y, int64_t y_stride, bool accumulate, int64_t index, const Around& around)
      : w(w), x(x), y(y), y_stride(y_stride), accumulate(accumulate), index(index), around(around) {
    tiles = (w.n + kTileRows - 1) / kTileRows, units = (tiles + kUnitTiles - 1) / kUnitTiles;
    tile_size = tile_bytes(w.bits, kTileRows, w.m), scale_size = scale_count(kTileRows, w.m, w.group);
    blocks = static_cast<int64_t>(x.blocks.size());
    chunks = (x.t * x.parts * x.columns + kChunkBytes - 1) / kChunkBytes;
    if (chunks > blocks) chunks = blocks;
  }

  int64_t items() const { return units * chunks; }

  void item(int64_t number) const {
    const int64_t chunk = number / units, first = chunk * blocks / chunks, last = (chunk + 1) * blocks / chunks;
    alignas(64) float out[kUnitTiles * kMaxWidth * kTileRows];
    const Patch patch = patch_of(number % units, first, last);
    around.before(patch);
    for (int64_t i = first; i < last; ++i) block(number % units, x.blocks[static_cast<size_t>(i)], i - first, last - first, out);
    around.after(patch);
  }

  Patch patch_of(int64_t unit, int64_t first, int64_t last) const {
    const int64_t column = unit * kUnitTiles * kTileRows, columns = std::min(kUnitTiles * kTileRows, w.n - column);
    const Block& end = x.blocks[static_cast<size_t>(last - 1)];
    return {index, column, columns, x.blocks[static_cast<size_t>(first)].first, end.first + end.count};
  }

  // The unit times block `i` of the chunk's `count`, which fetches its share of the next unit.
  void block(int64_t unit, const Block& b, int64_t i, int64_t count, float* out) const {
    const int64_t first = unit * kUnitTiles;
    const bool pair = tiles - first > 1;
    const uint8_t* next = w.tiles + (first + kUnitTiles) * tile_size + i * (kUnitTiles * tile_size / count);
    const char* scales = static_cast<const char*>(w.scales) + first * scale_size * (w.scale_bits / 8);
    const Product p = {w.tiles + first * tile_size, pair ? tile_size : 0, next, kLine / count, scales,
                       pair ? scale_size : 0, w.scale_bits, w.m, w.group, x.values_of(b), x.scales_of(b), x.offsets_of(b)};
    kernel_set().product(w.bits, b.width, p, out);
    for (int64_t k = 0; k < (pair ? 2 : 1); ++k)
      write_rows(w, first + k, b, x.parts, out + k * b.width * kTileRows, y, y_stride, accumulate);
  }
};

struct Nothing final : Around {};

}  // namespace

void QuantRowsDeleter::operator()(QuantRows* rows) const { delete rows; }
QuantRowsPtr new_quant_rows() { return QuantRowsPtr(new QuantRows); }

int64_t plan_activations(int64_t t, int64_t m, QuantRows& out, bool fine) {
  out.t = t, out.m = m, out.parts = fine ? 2 : 1, out.columns = (m + kColumnPad - 1) / kColumnPad * kColumnPad;
  make_blocks(t, out.parts, out.blocks);
  const int64_t slots = out.blocks.empty() ? 0 : out.blocks.back().slot + out.blocks.back().width;
  grow(out.values, slots * out.columns);
  grow(out.scales, slots * (out.columns / kActGroup));
  grow(out.offsets, slots * (out.columns / 32));
  return static_cast<int64_t>(out.blocks.size());
}

void quantize_piece(const float* x, int64_t stride, int64_t piece, QuantRows& out) {
  kernel_set().quantize(x, stride, out.blocks[static_cast<size_t>(piece)], out);
}

void quantize_activations(const float* x, int64_t t, int64_t m, int64_t stride, QuantRows& out, bool fine) {
  const int64_t count = plan_activations(t, m, out, fine);
  parallel_for(count, t * m <= kSmall ? count : 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) quantize_piece(x, stride, i, out);
  });
}

void matmul_all(const Target* targets, int64_t count, const QuantRows& x, int64_t y_stride, bool accumulate,
                const Around& around) {
  if (x.t == 0) return;
  std::vector<Call> calls;
  std::vector<int64_t> ends;  // of each call's items
  for (int64_t i = 0; i < count; ++i) {
    calls.emplace_back(*targets[i].matrix, x, targets[i].y, y_stride, accumulate, i, around);
    ends.push_back((ends.empty() ? 0 : ends.back()) + calls.back().items());
  }
  const int64_t items = ends.back(), pieces = num_threads() * (x.t > 4 ? 32 : 8);
  parallel_for(items, items / pieces, [&](int64_t first, int64_t last) {
    size_t at = 0;
    for (int64_t i = first; i < last; ++i) {
      while (ends[at] <= i) ++at;
      calls[at].item(i - ends[at] + calls[at].items());
    }
  });
}

void matmul(const Matrix& w, const QuantRows& x, float* y, int64_t y_stride, bool accumulate) {
  const Target target{&w, y};
  matmul_all(&target, 1, x, y_stride, accumulate, Nothing());
}

}  // namespace pingjia
