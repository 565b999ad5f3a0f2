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

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "tiles are defined by the bytes of little-endian words");

// Eight nibbles of a word, first half a0..a3, second half b0..b3 -> a0 b0 a1 b1 a2 b2 a3 b3, and back.
uint32_t interleave(uint32_t x) {
  x = (x & 0xff0000ff) | (x & 0x00ff0000) >> 8 | (x & 0x0000ff00) << 8;
  return (x & 0xf00ff00f) | (x & 0x0f000f00) >> 4 | (x & 0x00f000f0) << 4;
}

uint32_t separate(uint32_t x) {
  x = (x & 0xf00ff00f) | (x & 0x0f000f00) >> 4 | (x & 0x00f000f0) << 4;
  return (x & 0xff0000ff) | (x & 0x00ff0000) >> 8 | (x & 0x0000ff00) << 8;
}

// The published form of a word <-> columns in order, low nibble first, value + 8.
uint32_t swap_form(uint32_t x) {
  x ^= 0x88888888;
  return (x & 0x0f0f0f0f) << 4 | (x & 0xf0f0f0f0) >> 4;
}

// Four plain bytes <-> four bytes of a tile.
uint32_t pack_word(int bits, Nibbles order, uint32_t plain) {
  if (bits == 8) return plain;
  return interleave(order == Nibbles::kEvenHigh ? swap_form(plain) : plain);
}

uint32_t unpack_word(int bits, Nibbles order, uint32_t tile) {
  if (bits == 8) return tile;
  return order == Nibbles::kEvenHigh ? swap_form(separate(tile)) : separate(tile);
}

uint32_t load_word(const uint8_t* from, int64_t bytes, uint32_t word) {
  if (bytes >= 4)
    std::memcpy(&word, from, 4);
  else if (bytes > 0)
    std::memcpy(&word, from, static_cast<size_t>(bytes));
  return word;
}

void store_word(uint8_t* to, int64_t bytes, uint32_t word) {
  if (bytes >= 4)
    std::memcpy(to, &word, 4);
  else
    std::memcpy(to, &word, static_cast<size_t>(bytes));
}

// Calls `body(chunk, lane)` in an order that reads and writes whole cache lines on both sides.
template <class Body>
void each_word(int64_t chunks, int64_t lanes, const Body& body) {
  for (int64_t first = 0; first < chunks; first += kChunk / 4)
    for (int64_t lane = 0; lane < lanes; ++lane)
      for (int64_t j = first; j < chunks && j < first + kChunk / 4; ++j) body(j, lane);
}

void pack_tile(int bits, Nibbles order, const Shape& s, int64_t tile, const uint8_t* plain, uint8_t* out) {
  const uint32_t zero = bits == 8 || order == Nibbles::kEvenHigh ? 0 : 0x88888888;
  each_word(s.chunks, kTileRows, [&](int64_t j, int64_t lane) {
    const int64_t row = tile * kTileRows + lane;
    const uint8_t* from = plain + row * s.stored + 4 * j;
    store_word(out + j * kChunk + lane * 4, 4, pack_word(bits, order, load_word(from, row < s.n ? s.stored - 4 * j : 0, zero)));
  });
}

void unpack_tile(int bits, Nibbles order, const Shape& s, int64_t tile, const uint8_t* in, uint8_t* plain) {
  const int64_t row = tile * kTileRows, rows = s.n - row < kTileRows ? s.n - row : kTileRows;
  each_word((s.stored + 3) / 4, rows, [&](int64_t j, int64_t lane) {
    const uint32_t word = unpack_word(bits, order, load_word(in + j * kChunk + lane * 4, 4, 0));
    store_word(plain + (row + lane) * s.stored + 4 * j, s.stored - 4 * j, word);
  });
}

float scale_at(const Matrix& w, int64_t row, int64_t group) {
  const int64_t groups = (w.m + w.group - 1) / w.group;
  const int64_t at = (row / kTileRows * groups + group) * kTileRows + row % kTileRows;
  if (w.scale_bits == 32) return static_cast<const float*>(w.scales)[at];
  return half_to_float(static_cast<const uint16_t*>(w.scales)[at]);
}

// Columns [first, last) of one row, all under one scale. `in` is the row's first four bytes.
void dequantize_columns(const Matrix& w, const uint8_t* in, int64_t first, int64_t last, float scale, float* out) {
  float values[16];  // of a nibble
  for (int i = 0; i < 16; ++i) values[i] = scale * static_cast<float>(i - 8);
  for (int64_t c = first; c < last; c += 4) {
    const uint8_t* four = w.bits == 4 ? in + c / 8 * kChunk : in + c / 4 * kChunk;
    const int shift = c % 8, columns = last - c < 4 ? static_cast<int>(last - c) : 4;  // high nibbles: columns 4..7
    for (int k = 0; k < columns; ++k)
      out[c + k] = w.bits == 4 ? values[four[k] >> shift & 0xf] : scale * static_cast<float>(static_cast<int8_t>(four[k]));
  }
}

void dequantize_row(const Matrix& w, int64_t row, float* out) {
  const Shape s(w.bits, w.n, w.m);
  const uint8_t* in = w.tiles + row / kTileRows * s.chunks * kChunk + row % kTileRows * 4;
  for (int64_t first = 0, group = 0; first < w.m; first += w.group, ++group)
    dequantize_columns(w, in, first, first + w.group < w.m ? first + w.group : w.m, scale_at(w, row, group), out);
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
