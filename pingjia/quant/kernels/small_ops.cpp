// What happens between the matrix products: norms, rotation, storing keys and values, activations, the head that is kept
// in floats. The arithmetic of a row is in small_ops_isa.h, once per instruction set.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "pass.h"

namespace pingjia {

const PassOps& pass_ops() {
  const Isa in_use = isa();
  if (in_use == Isa::kAvx512 && kPassAvx512) return *kPassAvx512;
  if ((in_use == Isa::kAvx2 || in_use == Isa::kAvxVnni) && kPassAvx2) return *kPassAvx2;
  return *kPassPortable;
}

void share(int64_t count, int64_t work_each, const std::function<void(int64_t, int64_t)>& body) {
  constexpr int64_t kWorthWaking = 50'000;  // multiplications: about 5 microseconds of one core
  if (count <= 1 || count * work_each < kWorthWaking) return body(0, count);
  parallel_for(count, std::max<int64_t>(count / (8 * num_threads()), 1), body);
}

void normalize(const Norm& norm, const float* x, float* y, int64_t num_rows, int64_t width) {
  const PassOps& op = pass_ops();
  const float eps = static_cast<float>(norm.eps);
  share(num_rows, width, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      if (norm.bias) op.layer_norm(x + t * width, norm.weight, norm.bias, eps, y + t * width, width);
      else op.rms_norm(x + t * width, norm.weight, eps, y + t * width, width);
    }
  });
}

void scale_rows(const float* x, float factor, float* y, int64_t count) {
  constexpr int64_t kPiece = 4096;
  share((count + kPiece - 1) / kPiece, kPiece / 4, [&](int64_t first, int64_t last) {
    const int64_t from = first * kPiece, to = std::min(last * kPiece, count);
    pass_ops().scale(x + from, factor, y + from, to - from);
  });
}

void activate(int64_t activation, float* h, int64_t num_rows, int64_t inner, int64_t stride) {
  const PassOps& op = pass_ops();
  share(num_rows, 8 * inner, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t)
      activation == kSwiGlu ? op.swiglu(h + t * stride, inner) : op.gelu_tanh(h + t * stride, inner);
  });
}

// ---- rotation and the pages

namespace {

void rotate(const Network& net, const Plan& plan, int64_t num_rows, int64_t t, float* head) {
  const int64_t f = net.num_frequencies;
  const float* cos = net.cos + plan.positions[t] * f;
  const float* sin = net.sin + plan.positions[t] * f;
  if (net.rope == kRopePairs) return pass_ops().rotate_pairs(head, cos, sin, f);
  pass_ops().rotate_halves(head, cos, sin, f);
  if (net.rope != kRopeTwoHalves) return;
  const int64_t second = plan.positions[num_rows + t];
  pass_ops().rotate_halves(head + net.head_dim / 2, net.cos + second * f, net.sin + second * f, f);
}

// One head of one token; a step of `stride` elements between its numbers in the page.
template <typename T>
void put(const T* from, int64_t d, int64_t stride, T* to) {
  for (int64_t c = 0; c < d; ++c) to[c * stride] = from[c];
}

float quantize_head(const float* x, int64_t d, int8_t* out) {
  const float top = pass_ops().largest(x, d);
  const float inverse = top > 0.0f ? 127.0f / top : 0.0f;
  for (int64_t c = 0; c < d; ++c) {
    const float value = x[c] * inverse;
    out[c] = static_cast<int8_t>(static_cast<int>(value + (value < 0.0f ? -0.5f : 0.5f)));
  }
  // A not-a-number must not vanish in the rounding: it then sits in the scale.
  float odd = 0.0f;
  for (int64_t c = 0; c < d; ++c) odd += x[c] * 0.0f;
  return odd == 0.0f ? top / 127.0f : NAN;
}

struct Place {
  int64_t page_head;  // page * K + head
  int64_t at;         // place in the page
};

void store_head(const Network& net, const Layer& layer, Place place, const float* k, const float* v) {
  const int64_t d = net.head_dim, z = net.page_size, base = place.page_head * z * d;
  const int64_t k_at = base + place.at, v_at = base + place.at * d;
  if (net.kv_kind == kKvFloat32) {
    put(k, d, z, static_cast<float*>(layer.k_pages) + k_at);
    std::memcpy(static_cast<float*>(layer.v_pages) + v_at, v, d * sizeof(float));
  } else if (net.kv_kind == kKvFloat16) {
    uint16_t half[512];
    pass_ops().to_half(k, half, d);
    put(half, d, z, static_cast<uint16_t*>(layer.k_pages) + k_at);
    pass_ops().to_half(v, static_cast<uint16_t*>(layer.v_pages) + v_at, d);
  } else {
    int8_t byte[512];
    const int64_t scale_at = place.page_head * z + place.at;
    layer.k_scales[scale_at] = quantize_head(k, d, byte);
    put(byte, d, z, static_cast<int8_t*>(layer.k_pages) + k_at);
    layer.v_scales[scale_at] = quantize_head(v, d, static_cast<int8_t*>(layer.v_pages) + v_at);
  }
}

void rotate_row(const Network& net, const Layer& layer, const Plan& plan, int64_t num_rows, int64_t t, float* row) {
  const int64_t d = net.head_dim, z = net.page_size;
  const float eps = static_cast<float>(net.qk_eps);
  for (int64_t h = 0; h < net.num_heads; ++h) {
    float* q = row + net.q_offset + h * net.q_stride;
    if (layer.q_norm) pass_ops().rms_norm(q, layer.q_norm, eps, q, d);
    rotate(net, plan, num_rows, t, q);
  }
  const int64_t page = plan.slots[t] / z, at = plan.slots[t] % z;
  for (int64_t h = 0; h < net.num_kv_heads; ++h) {
    float* k = row + net.k_offset + h * net.k_stride;
    if (layer.k_norm) pass_ops().rms_norm(k, layer.k_norm, eps, k, d);
    rotate(net, plan, num_rows, t, k);
    store_head(net, layer, {page * net.num_kv_heads + h, at}, k, row + net.v_offset + h * net.v_stride);
  }
}

}  // namespace

void rotate_and_store(const Network& net, const Layer& layer, const Plan& plan, int64_t num_rows, float* qkv) {
  share(num_rows, 4 * net.qkv_width, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) rotate_row(net, layer, plan, num_rows, t, qkv + t * net.qkv_width);
  });
}

// ---- the head kept in floats, and what is said of the logits

void table_product(const Network& net, const float* x, float* y, int64_t num_rows) {
  const int64_t width = net.hidden;
  share(net.vocab, width * num_rows, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      const uint16_t* half = static_cast<const uint16_t*>(net.head_table) + n * width;
      const float* full = static_cast<const float*>(net.head_table) + n * width;
      if (net.head_table_kind == kTableFloat32) pass_ops().dots_float(full, x, num_rows, width, y + n, net.vocab);
      else if (net.head_table_kind == kTableFloat16) pass_ops().dots_half(half, x, num_rows, width, y + n, net.vocab);
      else pass_ops().dots_bfloat(half, x, num_rows, width, y + n, net.vocab);
      if (net.head_bias)
        for (int64_t t = 0; t < num_rows; ++t) y[t * net.vocab + n] += net.head_bias[n];
    }
  });
}

void judge(const Step& step, int64_t vocab) {
  share(step.num_outputs, vocab, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r)
      pass_ops().judge_row(step.logits + r * vocab, vocab, step.best + r, step.finite + r);
  });
}

}  // namespace pingjia
