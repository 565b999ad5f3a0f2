// What the C++ files of this folder share. The C ABI that Python calls is in api.cpp; this header is ours alone.
//
// Shapes: T rows of activations (tokens), N output rows of a weight matrix, M input columns, G columns per group.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

namespace pingjia {

// ---- threads (team.cpp): a fixed team that spins briefly for the next piece of work, then sleeps.

// Threads of the team, the caller included: PINGJIA_THREADS, else the cores this process may use, at most
// OMP_NUM_THREADS. `set_num_threads` replaces the team (tests, and callers that share a machine).
int num_threads();
void set_num_threads(int count);

// Call `body(first, last)` on the team so that [0, count) is covered once, in pieces of `grain` (the last may be
// shorter). Returns when all pieces are done; the order is not promised. Safe from several threads at once and from
// inside a body: whoever finds the team busy does its pieces alone. Survives fork (the child starts a team of its own).
void parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body);

// ---- a packed weight matrix in the kernels' own tile order (layout.cpp). Owns nothing.
struct Matrix {
  int bits;              // 4 or 8
  int64_t n, m;          // output rows, input columns
  int64_t group;         // weight columns per scale: a multiple of 32; anything >= m: one scale per row
  const uint8_t* tiles;  // tile_bytes(bits, n, m) bytes, as written by pack_tiles
  const void* scales;    // [ceil(n/16)][ceil(m/group)][16] floats or halves
  int scale_bits;        // 32 or 16
  const float* bias;     // [n] or null
};

constexpr int64_t kTileRows = 16;    // rows side by side in a tile
constexpr int64_t kColumnPad = 64;   // columns are padded to a multiple of this
constexpr int64_t kActGroup = 32;    // columns per activation scale

int64_t tile_bytes(int bits, int64_t n, int64_t m);
int64_t scale_count(int64_t n, int64_t m, int64_t group);  // numbers in `scales`, padding rows included

// How plain rows store two 4-bit weights in a byte. INT8 rows are plain int8 either way.
enum class Nibbles : int {
  kEvenHigh = 0,  // published ChatGLM: high nibble = even column, two's complement
  kEvenLow = 1,   // group-wise: low nibble = even column, value + 8
};

// plain [n][m] (INT8) or [n][m/2] (INT4) <-> tiles. Exactly inverse to each other; padding bytes are zero weights.
void pack_tiles(int bits, Nibbles order, int64_t n, int64_t m, const uint8_t* plain, uint8_t* tiles);
void unpack_tiles(int bits, Nibbles order, int64_t n, int64_t m, const uint8_t* tiles, uint8_t* plain);

// out[i][m] = row ids[i] of the matrix as floats: an embedding look-up, or the blocks of a gradient.
void dequantize_rows(const Matrix& w, const int64_t* ids, int64_t count, float* out, int64_t out_stride);

// ---- activations of T rows, quantised to int8 with one scale per `kActGroup` columns (symmetric, max|x|/127).
struct QuantRows;  // opaque; reused between products so that nothing is allocated in a step
struct QuantRowsDeleter { void operator()(QuantRows*) const; };
using QuantRowsPtr = std::unique_ptr<QuantRows, QuantRowsDeleter>;
QuantRowsPtr new_quant_rows();

// x: T rows of M floats, `stride` floats apart. A group that holds an infinity or NaN makes its row's results NaN.
// `fine` keeps what rounding left in a second int8: 16 bits in all, the error of a product falls 250 times, and the
// arithmetic doubles. Nothing at batch 1 or 2, where memory is the limit; twice the time of a long prompt. Use it where
// rounding x would be most of the error: INT8 weights (`matrix.bits == 8`), and a head of any width.
void quantize_activations(const float* x, int64_t t, int64_t m, int64_t stride, QuantRows& out, bool fine = false);

// The same in two steps, for a caller that gives the team other work beside it: how many pieces there are, and one.
int64_t plan_activations(int64_t t, int64_t m, QuantRows& out, bool fine);
void quantize_piece(const float* x, int64_t stride, int64_t piece, QuantRows& out);

// y[t][n] = sum_m x[t][m] * W[n][m] (+ bias[n]); rows of y are `y_stride` floats apart. `accumulate` adds to y.
// int32 inside a group, float32 across groups. The result of a row does not depend on the other rows of the batch.
void matmul(const Matrix& w, const QuantRows& x, float* y, int64_t y_stride, bool accumulate = false);

// A part of a product: these columns of y for these tokens.
struct Patch {
  int64_t target, first_column, num_columns, first_row, last_row;
};

// What a caller does around the parts of `matmul_all`, on the thread that computes the part. `before` may fetch what
// `after` will need; `after` finds the part of y complete.
struct Around {
  virtual void before(const Patch&) const {}
  virtual void after(const Patch&) const {}

 protected:
  ~Around() = default;
};

struct Target {
  const Matrix* matrix;
  float* y;
};

// Several products of the same x at once, every y with the same stride.
void matmul_all(const Target* targets, int64_t count, const QuantRows& x, int64_t y_stride, bool accumulate,
                const Around& around);

// Read `bytes` (in whole pieces of 64 KB) with the team and return a sum: what memory can do at best (probe.cpp).
uint64_t read_all(const void* at, int64_t bytes);

}  // namespace pingjia
