// The driver of a product: tokens into blocks, tiles into pieces for the team, results to their place.
#include "kernel_set.h"

#include <cstdlib>
namespace pingjia {
namespace {

constexpr int64_t kSmall = 16384;  // numbers that one thread quantises sooner than the team is told
constexpr int64_t kLine = 64;      // bytes of a cache line

int width_of(const int* widths, int64_t left) {
  while (widths[1] != 0 && widths[0] < left) ++widths;
  return widths[0];
}

// Blocks as wide as can be and as equal as can be: the widest kernel is the fastest per token, a lone token the slowest.
void make_blocks(int64_t t, std::vector<Block>& blocks) {
  const int* widths = kernel_set().widths;
  int widest = 0;
  while (*widths != 0) widest = *widths++;
  blocks.clear();
  const int64_t count = (t + widest - 1) / widest;
  int64_t slot = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t first = i * t / count, tokens = (i + 1) * t / count - first;
    const int width = width_of(kernel_set().widths, tokens);
    blocks.push_back({first, static_cast<int>(tokens), width, slot});
    slot += width;
  }
}

template <class T>
void grow(std::vector<T>& v, int64_t size) {
  if (static_cast<int64_t>(v.size()) < size) v.resize(static_cast<size_t>(size));
}

// Results of one unit and one block -> y.
void write_rows(const Matrix& w, int64_t tile, const Block& b, const float* from, float* y, int64_t y_stride, bool accumulate) {
  const int64_t row = tile * kTileRows, rows = w.n - row < kTileRows ? w.n - row : kTileRows;
  for (int t = 0; t < b.count; ++t) {
    float* to = y + (b.first + t) * y_stride + row;
    const float* in = from + t * kTileRows;
    for (int64_t i = 0; i < rows; ++i) {
      const float value = w.bias ? in[i] + w.bias[row + i] : in[i];
      to[i] = accumulate ? to[i] + value : value;
    }
  }
}

struct Call {
  const Matrix& w;
  const QuantRows& x;
  float* y;
  int64_t y_stride;
  bool accumulate;
  int64_t tiles, tile_size, scale_size;

  void unit(int64_t index) const {
    const int64_t first = index * kUnitTiles, count = tiles - first < kUnitTiles ? tiles - first : kUnitTiles;
    const int64_t size = w.scale_bits / 8;
    const int64_t blocks = static_cast<int64_t>(x.blocks.size()), share = kUnitTiles * tile_size / blocks;
    alignas(64) float out[kUnitTiles * kMaxWidth * kTileRows];
    for (const Block& b : x.blocks) {
      const Product p = {w.tiles + first * tile_size, count > 1 ? tile_size : 0,
                         w.tiles + (first + kUnitTiles) * tile_size + (&b - x.blocks.data()) * share, kLine / blocks,
                         static_cast<const char*>(w.scales) + first * scale_size * size, count > 1 ? scale_size : 0,
                         w.scale_bits, w.m, w.group, x.values_of(b), x.scales_of(b), x.offsets_of(b)};
      kernel_set().product(w.bits, b.width, p, out);
      for (int64_t i = 0; i < count; ++i)
        write_rows(w, first + i, b, out + i * b.width * kTileRows, y, y_stride, accumulate);
    }
  }
};

}  // namespace

void QuantRowsDeleter::operator()(QuantRows* rows) const { delete rows; }
QuantRowsPtr new_quant_rows() { return QuantRowsPtr(new QuantRows); }

void quantize_activations(const float* x, int64_t t, int64_t m, int64_t stride, QuantRows& out) {
  out.t = t, out.m = m, out.columns = (m + kColumnPad - 1) / kColumnPad * kColumnPad;
  make_blocks(t, out.blocks);
  const int64_t slots = out.blocks.empty() ? 0 : out.blocks.back().slot + out.blocks.back().width;
  grow(out.values, slots * out.columns);
  grow(out.scales, slots * (out.columns / kActGroup));
  grow(out.offsets, slots * (out.columns / 32));
  const int64_t count = static_cast<int64_t>(out.blocks.size());
  parallel_for(count, t * m <= kSmall ? count : 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) kernel_set().quantize(x, stride, out.blocks[static_cast<size_t>(i)], out);
  });
}

void matmul(const Matrix& w, const QuantRows& x, float* y, int64_t y_stride, bool accumulate) {
  if (x.t == 0) return;
  const int64_t tiles = (w.n + kTileRows - 1) / kTileRows, units = (tiles + kUnitTiles - 1) / kUnitTiles;
  const Call call = {w, x, y, y_stride, accumulate, tiles, tile_bytes(w.bits, kTileRows, w.m),
                     scale_count(kTileRows, w.m, w.group)};
  const int64_t pieces = num_threads() * (x.t > 4 ? 32 : 8);
  parallel_for(units, units / pieces, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) call.unit(i);
  });
}

}  // namespace pingjia
