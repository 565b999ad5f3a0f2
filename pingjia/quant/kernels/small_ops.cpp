// What happens between the matrix products: norms, rotation, storing keys and values, activations, adapters, the head
// that is kept in floats. The arithmetic of a row is in small_ops_isa.h, once per instruction set.
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

// ---- adapters

namespace {

struct Job {
  const Lora* lora;
  const std::vector<int32_t>* rows;
  int64_t y_at, n;  // columns of y
  int64_t u_at;     // of its [rows, rank] in the buffer
  int64_t first_unit;
};

const std::vector<int32_t>* rows_of(const Plan& plan, int64_t adapter, bool last) {
  for (const Plan::Rows& rows : plan.adapters)
    if (rows.adapter == adapter) return last ? &rows.outputs : &rows.rows;
  return nullptr;
}

std::vector<Job> jobs_of(const LinearGroup& group, const Plan& plan, bool last, int64_t* u_size) {
  std::vector<Job> jobs;
  int64_t y_at = 0;
  for (int64_t i = 0; i < group.count; ++i) {
    const Linear& linear = group.linears[i];
    for (int64_t j = 0; j < linear.num_loras; ++j) {
      const std::vector<int32_t>* rows = rows_of(plan, linear.loras[j].adapter, last);
      if (!rows || rows->empty()) continue;
      jobs.push_back({linear.loras + j, rows, y_at, linear.matrix->n, *u_size, 0});
      *u_size += static_cast<int64_t>(rows->size()) * linear.loras[j].rank;
    }
    y_at += linear.matrix->n;
  }
  return jobs;
}

// Give every job its units (ranks, or pieces of columns), call body(job, unit) for all of them.
void each_unit(std::vector<Job>& jobs, int64_t (*units)(const Job&), int64_t work_each,
               const std::function<void(const Job&, int64_t)>& body) {
  int64_t count = 0;
  for (Job& job : jobs) job.first_unit = count, count += units(job);
  share(count, work_each, [&](int64_t first, int64_t last) {
    size_t at = 0;
    for (int64_t unit = first; unit < last; ++unit) {
      while (at + 1 < jobs.size() && jobs[at + 1].first_unit <= unit) ++at;
      body(jobs[at], unit - jobs[at].first_unit);
    }
  });
}

constexpr int64_t kRanks = 4;  // of a unit
constexpr int64_t kLoraColumns = 128;

int64_t down_units(const Job& job) { return job.lora->rank / kRanks; }
int64_t up_units(const Job& job) { return (job.n + kLoraColumns - 1) / kLoraColumns; }

int64_t most_rows(const std::vector<Job>& jobs) {
  int64_t most = 0;
  for (const Job& job : jobs) most = std::max(most, static_cast<int64_t>(job.rows->size()));
  return most;
}

}  // namespace

void add_loras(const LinearGroup& group, const Plan& plan, bool last, const float* x, int64_t x_stride, float* y,
               int64_t y_stride) {
  if (plan.adapters.empty()) return;
  static thread_local std::vector<float> buffer;
  int64_t u_size = 0;
  std::vector<Job> jobs = jobs_of(group, plan, last, &u_size);
  if (jobs.empty()) return;
  if (static_cast<int64_t>(buffer.size()) < u_size) buffer.resize(u_size);
  float* u = buffer.data();
  const int64_t width = group.linears->matrix->m, rows = most_rows(jobs);
  const auto call = [&](const Job& job, int64_t at) {
    return LoraRows{job.rows->data(), static_cast<int64_t>(job.rows->size()), x, x_stride, y + job.y_at + at, y_stride};
  };
  each_unit(jobs, down_units, rows * kRanks * width / 2, [&](const Job& job, int64_t unit) {
    const Lora& lora = *job.lora;
    pass_ops().lora_down(call(job, 0), lora.a, width, static_cast<float>(lora.factor), unit * kRanks, u + job.u_at, lora.rank);
  });
  each_unit(jobs, up_units, rows * kLoraColumns * 8, [&](const Job& job, int64_t unit) {
    const int64_t from = unit * kLoraColumns, count = std::min(kLoraColumns, job.n - from);
    pass_ops().lora_up(call(job, from), job.lora->b + from * job.lora->rank, u + job.u_at, job.lora->rank, count);
  });
}

}  // namespace pingjia
