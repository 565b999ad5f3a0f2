// The forward pass of one step: what Python describes, and what the files of the pass share. Filled through ctypes, so
// plain C layout, 8-byte fields only. Python's twin of every struct is in pingjia/engine/fused_abi.py.
//
// Shapes: T rows of the step (tokens), H query heads, K key/value heads, D head size, F rotary frequencies, I inner
// width of the MLP, Z tokens per page, P pages, S keys of a sequence, R rank of an adapter.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace pingjia {

enum Rope : int64_t { kRopeHalves = 0, kRopePairs = 1, kRopeTwoHalves = 2 };
enum Activation : int64_t { kSwiGlu = 0, kGeluTanh = 1 };
enum KvKind : int64_t { kKvFloat32 = 0, kKvFloat16 = 1, kKvInt8 = 2 };
enum TableKind : int64_t { kTableFloat32 = 0, kTableFloat16 = 1, kTableBFloat16 = 2 };

// bias null: RMSNorm.
struct Norm {
  const float* weight;
  const float* bias;
  double eps;
};

// One adapter's delta on one linear: y += factor * x a^T b. In half precision, brought to about 1 by the factor, in the
// order they are read; the rank is padded to a multiple of 4, columns to one of 16, with zeros.
struct Lora {
  int64_t adapter;  // the number a Piece names it by
  int64_t rank;
  const uint16_t* a;  // [R / 4][M / 16][4][16]
  const uint16_t* b;  // [N / 16][R][16]
  double factor;
};

// One linear: a packed matrix and the adapters on it.
struct Linear {
  const Matrix* matrix;
  const Lora* loras;
  int64_t num_loras;
};

// Linears that read the same rows and write side by side: q, k, v; gate, up.
struct LinearGroup {
  const Linear* linears;
  int64_t count;
};

struct Layer {
  Norm attention_norm;
  Norm mlp_norm;
  LinearGroup qkv;
  LinearGroup out;
  LinearGroup up;  // gate then up, or one matrix with both; for gelu the one matrix
  LinearGroup down;
  const float* q_norm;  // [D] or null: RMSNorm of every head before it is turned
  const float* k_norm;
  // Pages of this layer. Keys [P, K, D, Z], values [P, K, Z, D], both of KvKind; scales [P, K, Z] for int8.
  void* k_pages;
  void* v_pages;
  float* k_scales;
  float* v_scales;
};

struct Network {
  int64_t hidden, num_heads, num_kv_heads, head_dim, inner, vocab, num_layers;
  // Where head h of q, k, v starts in a row of the qkv product: offset + h * stride.
  int64_t qkv_width;
  int64_t q_offset, q_stride, k_offset, k_stride, v_offset, v_stride;
  int64_t rope;           // Rope
  int64_t num_frequencies;  // F
  int64_t num_positions;  // rows of the tables
  const float* cos;       // [num_positions, F]
  const float* sin;
  int64_t activation;  // Activation
  double residual;     // 0: the residual is the unnormed input; else the normed one times this
  double scaling;      // of the attention scores
  double qk_eps;
  int64_t page_size, kv_kind;
  Norm last_norm;
  const Matrix* head;      // or null, then
  const void* head_table;  // [V, hidden] floats of TableKind
  int64_t head_table_kind;
  const float* head_bias;
  const Layer* layers;
};

// Some consecutive tokens of one sequence. Its rows lie together in the step.
struct Piece {
  int64_t first_row, num_rows;
  int64_t start;       // index of its first token in the sequence
  int64_t prefix_len;  // leading tokens of the sequence that all see each other
  int64_t first_page;  // where its page numbers begin in Step::pages
  int64_t adapter;     // number, or -1
};

struct Step {
  int64_t num_rows, num_pieces, num_outputs;
  float* x;                  // [T, hidden]: embedded tokens; overwritten
  const int32_t* positions;  // [T], or [2, T] for kRopeTwoHalves
  const Piece* pieces;
  const int32_t* pages;
  const int32_t* outputs;  // rows whose logits are wanted
  float* hidden_out;       // [num_outputs, hidden]: what the head saw
  float* logits;           // [num_outputs, vocab]
  int32_t* best;           // [num_outputs]: index of the largest logit
  int32_t* finite;         // [num_outputs]: 1 when all of the row's logits are finite
};

// What a step comes to, worked out once and used by every layer.
struct Plan {
  std::vector<int64_t> slots;       // [T] token slot of the pool: page * Z + place in the page
  std::vector<int32_t> positions;   // [T] or [2, T]
  struct Rows {
    int64_t adapter;
    std::vector<int32_t> rows;     // among the rows of the step
    std::vector<int32_t> outputs;  // among its outputs
  };
  std::vector<Rows> adapters;
  struct Item {
    int32_t piece, first, last;  // tokens first..last-1 of the piece
  };
  std::vector<Item> items;
};

// ---- small_ops.cpp; each spreads over the team when there is enough to do

void normalize(const Norm& norm, const float* x, float* y, int64_t num_rows, int64_t width);
void scale_rows(const float* x, float factor, float* y, int64_t count);  // y = x * factor
void activate(int64_t activation, float* h, int64_t num_rows, int64_t inner, int64_t stride);
// Turn q and k of every row in place, and put k and v on their pages.
void rotate_and_store(const Network& net, const Layer& layer, const Plan& plan, int64_t num_rows, float* qkv);
void table_product(const Network& net, const float* x, float* y, int64_t num_rows);
void judge(const Step& step, int64_t vocab);

// ---- group.cpp

struct GroupCall {
  const LinearGroup& group;
  const LinearGroup* next;  // the group that is computed after this one, or null
  const Plan& plan;
  bool last;  // rows are the step's outputs, not all its rows
  int64_t num_rows;
  const float* x;
  int64_t x_stride;
  float* y;  // [rows, outputs of the group side by side]
  int64_t y_stride;
  bool accumulate;
  QuantRows& quantized;
};

// y (+)= the group's linears of x, and what the adapters of each row add.
void group_product(const GroupCall& call);

// ---- attention.cpp

std::vector<Plan::Item> attention_items(const Network& net, const Step& step);
// o [T, H * D] from the queries in qkv and the pages, which already hold the keys and values of this step.
void attend(const Network& net, const Layer& layer, const Step& step, const Plan& plan, const float* qkv, float* o);

// Call the body on the team, or in place when it is not worth waking anyone. `work`: multiplications, about.
void share(int64_t count, int64_t work_each, const std::function<void(int64_t, int64_t)>& body);

// ---- forward.cpp

struct Workspace;  // buffers that grow to the largest step seen
struct WorkspaceDeleter {
  void operator()(Workspace*) const;
};
using WorkspacePtr = std::unique_ptr<Workspace, WorkspaceDeleter>;
WorkspacePtr new_workspace();

// Compute the step. False, and nothing done, when a position lies outside the tables.
bool forward(const Network& net, const Step& step, Workspace& space);

}  // namespace pingjia
