// One step through the whole network: the order of things. What happens in between is in small_ops.cpp, attention.cpp
// and the files of the matrix products.
#include "forward.h"

#include <algorithm>
#include <cstring>

namespace pingjia {

// Grows, never shrinks, never keeps its content.
class Buffer {
 public:
  float* get(int64_t count) {
    if (count > size_) {
      delete[] data_;
      data_ = new Line[(count + 15) / 16];
      size_ = (count + 15) / 16 * 16;
    }
    return reinterpret_cast<float*>(data_);
  }
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { delete[] data_; }

 private:
  struct alignas(64) Line {
    float x[16];
  };
  Line* data_ = nullptr;
  int64_t size_ = 0;
};

struct Workspace {
  Buffer normed, qkv, mixed, inner, x_out, mixed_out;
  QuantRowsPtr quantized = new_quant_rows();
};

void WorkspaceDeleter::operator()(Workspace* space) const { delete space; }

WorkspacePtr new_workspace() { return WorkspacePtr(new Workspace); }

namespace {

Plan::Rows& rows_of(Plan& plan, int64_t adapter) {
  for (Plan::Rows& rows : plan.adapters)
    if (rows.adapter == adapter) return rows;
  plan.adapters.push_back({adapter, {}, {}});
  return plan.adapters.back();
}

bool fill_positions(const Network& net, const Step& step, Plan& plan) {
  const int64_t count = step.num_rows * (net.rope == kRopeTwoHalves ? 2 : 1);
  plan.positions.resize(count);
  if (step.positions) std::copy(step.positions, step.positions + count, plan.positions.begin());
  for (int64_t p = 0; p < step.num_pieces && !step.positions; ++p)
    for (int64_t t = 0; t < step.pieces[p].num_rows; ++t)
      plan.positions[step.pieces[p].first_row + t] = static_cast<int32_t>(step.pieces[p].start + t);
  return std::all_of(plan.positions.begin(), plan.positions.end(),
                     [&](int32_t position) { return position >= 0 && position < net.num_positions; });
}

bool make_plan(const Network& net, const Step& step, Plan& plan) {
  if (!fill_positions(net, step, plan)) return false;
  plan.slots.resize(step.num_rows);
  std::vector<int64_t> adapter_of(step.num_rows, -1);
  for (int64_t p = 0; p < step.num_pieces; ++p) {
    const Piece& piece = step.pieces[p];
    for (int64_t t = 0; t < piece.num_rows; ++t) {
      const int64_t at = piece.start + t, row = piece.first_row + t;
      plan.slots[row] = step.pages[piece.first_page + at / net.page_size] * net.page_size + at % net.page_size;
      adapter_of[row] = piece.adapter;
      if (piece.adapter >= 0) rows_of(plan, piece.adapter).rows.push_back(static_cast<int32_t>(row));
    }
  }
  for (int32_t r = 0; r < step.num_outputs; ++r)
    if (const int64_t adapter = adapter_of[step.outputs[r]]; adapter >= 0) rows_of(plan, adapter).outputs.push_back(r);
  plan.items = attention_items(net, step);
  return true;
}

int64_t width_of(const LinearGroup& group) {
  int64_t width = 0;
  for (int64_t i = 0; i < group.count; ++i) width += group.linears[i].matrix->n;
  return width;
}

struct Pass {
  const Network& net;
  const Step& step;
  const Plan& plan;
  Workspace& space;
  int64_t num_rows;  // that the layer in progress computes
  bool last;         // they are the step's outputs
};

// y [rows, all outputs of the group] (+)= group(x). `next`: the group after it.
void product(const Pass& pass, const LinearGroup& group, const LinearGroup* next, const float* x, int64_t x_stride,
             float* y, bool accumulate) {
  group_product({group, next, pass.plan, pass.last, pass.num_rows, x, x_stride, y, width_of(group), accumulate,
                 *pass.space.quantized});
}

// The residual that x keeps when `normed` was made from it.
void keep_residual(const Pass& pass, const float* normed, float* x) {
  if (pass.net.residual != 0.0)
    scale_rows(normed, static_cast<float>(pass.net.residual), x, pass.num_rows * pass.net.hidden);
}

void gather_rows(const float* from, const int32_t* rows, int64_t count, int64_t width, float* to) {
  for (int64_t r = 0; r < count; ++r) std::memcpy(to + r * width, from + rows[r] * width, width * sizeof(float));
}

// After the last layer's attention only the rows whose logits are wanted go on.
void narrow(Pass& pass, float** x, float** mixed) {
  const Step& step = pass.step;
  const int64_t hidden = pass.net.hidden, wide = pass.net.num_heads * pass.net.head_dim;
  float* x_out = pass.space.x_out.get(step.num_outputs * hidden);
  float* mixed_out = pass.space.mixed_out.get(step.num_outputs * wide);
  gather_rows(*x, step.outputs, step.num_outputs, hidden, x_out);
  gather_rows(*mixed, step.outputs, step.num_outputs, wide, mixed_out);
  *x = x_out, *mixed = mixed_out;
  pass.num_rows = step.num_outputs, pass.last = true;
}

// Attention and what it adds to x. Returns x: in the last layer another buffer with the output rows only.
float* attention_part(Pass& pass, const Layer& layer, bool last_layer, float* x) {
  const Network& net = pass.net;
  float* normed = pass.space.normed.get(pass.num_rows * net.hidden);
  float* qkv = pass.space.qkv.get(pass.num_rows * net.qkv_width);
  float* mixed = pass.space.mixed.get(pass.num_rows * net.num_heads * net.head_dim);
  normalize(layer.attention_norm, x, normed, pass.num_rows, net.hidden);
  product(pass, layer.qkv, &layer.out, normed, net.hidden, qkv, false);
  rotate_and_store(net, layer, pass.plan, pass.num_rows, qkv);
  attend(net, layer, pass.step, pass.plan, qkv, mixed);
  keep_residual(pass, normed, x);
  if (last_layer) narrow(pass, &x, &mixed);
  product(pass, layer.out, &layer.up, mixed, net.num_heads * net.head_dim, x, true);
  return x;
}

void mlp_part(const Pass& pass, const Layer& layer, const Layer* next, float* x) {
  const Network& net = pass.net;
  const int64_t wide = width_of(layer.up);
  float* normed = pass.space.normed.get(pass.num_rows * net.hidden);
  float* inner = pass.space.inner.get(pass.num_rows * wide);
  normalize(layer.mlp_norm, x, normed, pass.num_rows, net.hidden);
  product(pass, layer.up, &layer.down, normed, net.hidden, inner, false);
  activate(net.activation, inner, pass.num_rows, net.inner, wide);
  keep_residual(pass, normed, x);
  product(pass, layer.down, next ? &next->qkv : nullptr, inner, wide, x, true);
}

void head(const Pass& pass, const float* x) {
  const Network& net = pass.net;
  const Step& step = pass.step;
  normalize(net.last_norm, x, step.hidden_out, step.num_outputs, net.hidden);
  if (net.head) {
    const bool fine = net.head->bits == 8;
    quantize_activations(step.hidden_out, step.num_outputs, net.hidden, net.hidden, *pass.space.quantized, fine);
    matmul(*net.head, *pass.space.quantized, step.logits, net.vocab);
  } else {
    table_product(net, step.hidden_out, step.logits, step.num_outputs);
  }
  judge(step, net.vocab);
}

}  // namespace

bool forward(const Network& net, const Step& step, Workspace& space) {
  Plan plan;
  if (!make_plan(net, step, plan)) return false;
  Pass pass{net, step, plan, space, step.num_rows, false};
  float* x = step.x;
  for (int64_t i = 0; i < net.num_layers; ++i) {
    const bool last = i + 1 == net.num_layers;
    x = attention_part(pass, net.layers[i], last, x);
    mlp_part(pass, net.layers[i], last ? nullptr : net.layers + i + 1, x);
  }
  head(pass, x);
  return true;
}

}  // namespace pingjia
