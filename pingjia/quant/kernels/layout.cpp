// The byte order of tiles, both ways. No products here.
//
// A tile is 16 rows. Its bytes come in chunks of 64: four bytes of row 0, four of row 1, ..., four of row 15, which is
// one AVX-512 register, two of AVX2, four of NEON. An INT8 chunk holds columns 4j..4j+3. An INT4 chunk holds columns
// 8j..8j+7: the low nibbles 8j..8j+3, the high ones 8j+4..8j+7, each value + 8. Rows are padded to 16 and columns to 64
// with zero weights.
#include <cstring>

#include "half.h"
#include "kernels.h"

namespace pingjia {
namespace {

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

constexpr int64_t kChunk = 64;

struct Shape {
  int64_t n, m, stored;  // rows, columns, bytes of a plain row
  int64_t columns;       // of a chunk
  int64_t chunks;        // of a tile
  Shape(int bits, int64_t n, int64_t m)
      : n(n), m(m), stored(bits == 4 ? m / 2 : m), columns(bits == 4 ? 8 : 4), chunks(round_up(m, kColumnPad) / columns) {}
  int64_t tiles() const { return (n + kTileRows - 1) / kTileRows; }
};

// Four plain bytes (columns 8j..8j+7) <-> four tile bytes. Values + 8 on the tile's side.
void pack_int4(Nibbles order, const uint8_t* plain, uint8_t* tile) {
  uint8_t value[8];
  for (int i = 0; i < 4; ++i) {
    const uint8_t byte = order == Nibbles::kEvenHigh ? plain[i] ^ 0x88 : plain[i];
    value[2 * i] = order == Nibbles::kEvenHigh ? byte >> 4 : byte & 0xf;
    value[2 * i + 1] = order == Nibbles::kEvenHigh ? byte & 0xf : byte >> 4;
  }
  for (int i = 0; i < 4; ++i) tile[i] = static_cast<uint8_t>(value[i] | value[i + 4] << 4);
}

void unpack_int4(Nibbles order, const uint8_t* tile, uint8_t* plain) {
  uint8_t value[8];
  for (int i = 0; i < 4; ++i) value[i] = tile[i] & 0xf, value[i + 4] = tile[i] >> 4;
  for (int i = 0; i < 4; ++i) {
    const uint8_t even = value[2 * i], odd = value[2 * i + 1];
    const bool high = order == Nibbles::kEvenHigh;
    plain[i] = static_cast<uint8_t>(high ? (even << 4 | odd) ^ 0x88 : odd << 4 | even);
  }
}

void pack_tile(int bits, Nibbles order, const Shape& s, int64_t tile, const uint8_t* plain, uint8_t* out) {
  const uint8_t zero = bits == 8 || order == Nibbles::kEvenHigh ? 0x00 : 0x88;
  for (int64_t lane = 0; lane < kTileRows; ++lane) {
    const int64_t row = tile * kTileRows + lane;
    for (int64_t j = 0; j < s.chunks; ++j) {
      uint8_t four[4] = {zero, zero, zero, zero};
      const int64_t left = row < s.n ? s.stored - 4 * j : 0;
      if (left > 0) std::memcpy(four, plain + row * s.stored + 4 * j, static_cast<size_t>(left < 4 ? left : 4));
      uint8_t* to = out + j * kChunk + lane * 4;
      bits == 4 ? pack_int4(order, four, to) : static_cast<void>(std::memcpy(to, four, 4));
    }
  }
}

void unpack_tile(int bits, Nibbles order, const Shape& s, int64_t tile, const uint8_t* in, uint8_t* plain) {
  for (int64_t lane = 0; lane < kTileRows && tile * kTileRows + lane < s.n; ++lane) {
    for (int64_t j = 0; 4 * j < s.stored; ++j) {
      uint8_t four[4];
      const uint8_t* from = in + j * kChunk + lane * 4;
      bits == 4 ? unpack_int4(order, from, four) : static_cast<void>(std::memcpy(four, from, 4));
      const int64_t left = s.stored - 4 * j;
      std::memcpy(plain + (tile * kTileRows + lane) * s.stored + 4 * j, four, static_cast<size_t>(left < 4 ? left : 4));
    }
  }
}

float scale_at(const Matrix& w, int64_t row, int64_t group) {
  const int64_t groups = (w.m + w.group - 1) / w.group;
  const int64_t at = (row / kTileRows * groups + group) * kTileRows + row % kTileRows;
  if (w.scale_bits == 32) return static_cast<const float*>(w.scales)[at];
  return half_to_float(static_cast<const uint16_t*>(w.scales)[at]);
}

void dequantize_row(const Matrix& w, int64_t row, float* out) {
  const Shape s(w.bits, w.n, w.m);
  const uint8_t* in = w.tiles + row / kTileRows * s.chunks * kChunk + row % kTileRows * 4;
  for (int64_t first = 0, group = 0; first < w.m; first += w.group, ++group) {
    const float scale = scale_at(w, row, group);
    const int64_t last = first + w.group < w.m ? first + w.group : w.m;
    for (int64_t c = first; c < last; ++c) {
      const uint8_t byte = in[c / s.columns * kChunk + c % 4];
      const int nibble = (c % 8 < 4 ? byte & 0xf : byte >> 4) - 8;
      out[c] = scale * static_cast<float>(w.bits == 4 ? nibble : static_cast<int8_t>(byte));
    }
  }
}

}  // namespace

int64_t tile_bytes(int bits, int64_t n, int64_t m) {
  return round_up(n, kTileRows) * round_up(m, kColumnPad) * bits / 8;
}

int64_t scale_count(int64_t n, int64_t m, int64_t group) {
  return round_up(n, kTileRows) * ((m + group - 1) / group);
}

void pack_tiles(int bits, Nibbles order, int64_t n, int64_t m, const uint8_t* plain, uint8_t* tiles) {
  const Shape s(bits, n, m);
  parallel_for(s.tiles(), 4, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) pack_tile(bits, order, s, i, plain, tiles + i * s.chunks * kChunk);
  });
}

void unpack_tiles(int bits, Nibbles order, int64_t n, int64_t m, const uint8_t* tiles, uint8_t* plain) {
  const Shape s(bits, n, m);
  parallel_for(s.tiles(), 4, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) unpack_tile(bits, order, s, i, tiles + i * s.chunks * kChunk, plain);
  });
}

void dequantize_rows(const Matrix& w, const int64_t* ids, int64_t count, float* out, int64_t out_stride) {
  parallel_for(count, 8, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) dequantize_row(w, ids[i], out + i * out_stride);
  });
}

}  // namespace pingjia
