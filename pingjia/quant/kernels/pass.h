// What a file of the forward pass that is written for one instruction set offers to the rest (pass_*.cpp), and what it
// is handed.
#pragma once

#include "forward.h"
#include "isa.h"
#include "rounding.h"

namespace pingjia {

constexpr int64_t kMaxBlockPages = 128;
constexpr float kHidden = -3.0e38f;  // the score of a key that must not be seen

// Some pages of one sequence, seen by one key/value head.
struct BlockKeys {
  const void* k[kMaxBlockPages];  // page of the block -> its keys and values of this head
  const void* v[kMaxBlockPages];
  const float* k_scale[kMaxBlockPages];
  const float* v_scale[kMaxBlockPages];
  int64_t num_keys;
  int64_t stride;  // floats between two rows of scores
};

// The rows of a step that belong to one adapter.
struct LoraRows {
  const int32_t* rows;
  int64_t count;
  const float* x;
  int64_t x_stride;
  float* y;
  int64_t y_stride;
};

struct PassOps {
  // One block of keys for `rows` query rows: o [rows, D], maximum [rows], sum [rows] are overwritten, s is scratch.
  void (*attend)(int64_t kind, const BlockKeys& block, const float* q, const int64_t* visible, int64_t rows, int64_t d,
                 int64_t z, float* s, float* o, float* maximum, float* sum);
  // Fold a block's row into what the blocks before it gave. The first call finds total 0 and top kHidden.
  void (*merge)(const float* o, float maximum, float sum, int64_t d, float* total_o, float* top, float* total);
  float (*dot)(const float*, const float*, int64_t);
  void (*scale)(const float*, float, float*, int64_t);
  void (*rms_norm)(const float*, const float*, float, float*, int64_t);
  void (*layer_norm)(const float*, const float*, const float*, float, float*, int64_t);
  void (*swiglu)(float*, int64_t);
  void (*gelu_tanh)(float*, int64_t);
  void (*rotate_halves)(float*, const float*, const float*, int64_t);
  void (*rotate_pairs)(float*, const float*, const float*, int64_t);
  float (*largest)(const float*, int64_t);
  void (*judge_row)(const float*, int64_t, int32_t*, int32_t*);
  void (*lora_down)(const LoraRows&, const uint16_t* a, int64_t width, float factor, int64_t first, float* u,
                    int64_t rank);
  void (*lora_up)(const LoraRows&, const uint16_t* b, const float* u, int64_t rank, int64_t n);
  void (*to_half)(const float*, uint16_t*, int64_t);
  void (*dots_float)(const float*, const float*, int64_t, int64_t, float*, int64_t);
  void (*dots_half)(const uint16_t*, const float*, int64_t, int64_t, float*, int64_t);
  void (*dots_bfloat)(const uint16_t*, const float*, int64_t, int64_t, float*, int64_t);
  void (*round_rows16)(const RoundBlock&, int64_t row);
  void (*search_scales16)(const ScaleSearch&, int64_t row);
};

// Null where the compiler did not build it.
extern const PassOps* const kPassPortable;
extern const PassOps* const kPassAvx2;
extern const PassOps* const kPassAvx512;

const PassOps& pass_ops();  // for the instruction set that the products use too

}  // namespace pingjia
