// Rounding weights to few bits (GPTQ): what Python hands over. Filled through ctypes, so plain C layout, 8-byte fields
// but for the last floats. The method is in pingjia/quant/gptq.py, Python's twins in pingjia/quant/rounding.py.
//
// Columns lie together ([columns][rows]), and rows are a multiple of 16.
#pragma once

#include <cstdint>

namespace pingjia {

// A block of columns, rounded one after the other.
struct RoundBlock {
  int64_t num_rows, num_columns;
  const float* weights;
  const float* owed;    // what errors of earlier blocks have put into these components of e R
  const float* root;    // [columns][columns]: row j is column j of the block of R on the diagonal
  const float* scales;  // of each weight
  float* values;        // integers
  float* errors;        // weight - value * scale
  float low, high;
};

// Which scale of a few loses least, for the rows of a group.
struct ScaleSearch {
  int64_t num_rows, num_columns;
  const float* targets;
  const float* importance;  // [columns]
  const float* ratios;      // of the largest weight / -low
  int64_t num_ratios;
  float* best;              // [rows], exact in half precision
  float low, high;
};

}  // namespace pingjia
