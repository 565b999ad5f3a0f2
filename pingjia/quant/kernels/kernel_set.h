// What a file written for one instruction set offers to the rest (isa_*.cpp), and what it is handed.
#pragma once

#include <cstddef>
#include <vector>

#include "isa.h"
#include "kernels.h"

#define PJ_INLINE static inline __attribute__((always_inline))
#define PJ_UNROLL _Pragma("GCC unroll 16")

namespace pingjia {

// A few tokens whose activations are interleaved, so that one pass over a tile serves them all. A token takes one slot,
// or two side by side when it is kept in two parts.
struct Block {
  int64_t first;  // first token
  int count;      // tokens
  int width;      // slots, rounded up to a width the kernels are built for; the rest is zeros
  int64_t slot;   // widths of the blocks before it
};

struct QuantRows {
  int64_t t = 0, m = 0;
  int parts = 1;                  // slots of a token
  int64_t columns = 0;            // m, padded
  std::vector<Block> blocks;
  std::vector<int8_t> values;     // per block [columns/4][width][4]
  std::vector<float> scales;      // per block [columns/kActGroup][width]
  std::vector<int32_t> offsets;   // per block [columns/32][width]: -8 times the sum of 32 values

  const int8_t* values_of(const Block& b) const { return values.data() + b.slot * columns; }
  const float* scales_of(const Block& b) const { return scales.data() + b.slot * (columns / kActGroup); }
  const int32_t* offsets_of(const Block& b) const { return offsets.data() + b.slot * (columns / 32); }
};

constexpr int kMaxWidth = 16;   // of a block, on any instruction set
constexpr int kUnitTiles = 2;   // tiles that share one pass over the activations

// A pair of tiles (or a single one twice) times one block of tokens.
struct Product {
  const uint8_t* tiles;
  int64_t tile_stride;        // bytes to the second tile; 0: there is none
  const uint8_t* next;        // tiles of the next unit: each block of tokens fetches its share of them meanwhile,
  int64_t next_stride;        // this many bytes for each 64 it reads
  const void* scales;
  int64_t scale_stride;       // numbers to the second tile's scales
  int scale_bits;
  int64_t m, group;
  const int8_t* values;
  const float* x_scales;
  const int32_t* offsets;
};

struct KernelSet {
  const char* name;
  Isa isa;
  const int* widths;  // widths of blocks, ascending, closed by 0
  // Quantise the tokens of one block: x is the whole matrix.
  void (*quantize)(const float* x, int64_t stride, const Block& block, QuantRows& out);
  // out[kUnitTiles][width][kTileRows] = the product, without bias.
  void (*product)(int bits, int width, const Product& p, float* out);
};

// One per file isa_NAME.cpp; null where the compiler did not build it.
extern const KernelSet* const kPortable;
extern const KernelSet* const kAvx2;
extern const KernelSet* const kAvxVnni;
extern const KernelSet* const kAvx512;
extern const KernelSet* const kNeon;
extern const KernelSet* const kNeonDot;

const KernelSet& kernel_set();             // the one in use: PINGJIA_KERNELS, else the best this processor has
bool choose_kernel_set(const char* name);  // false: unknown, or this processor lacks it
const char* kernel_set_names();            // those this processor has, separated by commas, best first

}  // namespace pingjia
