// Linears that read the same rows, and what the adapters of those rows add to them. The team first rounds x and brings
// it down to the adapters' ranks, then computes y part by part, each with what the adapters add to it.
//
// Adapters are small: what they cost is waiting, for memory and for each other. Hence two calls of the team for all
// linears and adapters of a group, and every matrix is fetched while the product before it still computes.
#include <algorithm>

#include "pass.h"

namespace pingjia {
namespace {

constexpr int64_t kRanks = 8;  // of a unit of work; a pass over x takes 4
constexpr int64_t kLine = 64;  // bytes of a cache line

// One adapter on one linear, and the rows of the step that use it, ascending.
struct Job {
  const Lora* lora;
  const std::vector<int32_t>* rows;
  int64_t target;  // which linear of the group
  int64_t u_at;    // of its [rows, rank] in the buffer

  int64_t num_rows() const { return static_cast<int64_t>(rows->size()); }
  int64_t units() const { return (lora->rank + kRanks - 1) / kRanks; }
};

const std::vector<int32_t>* rows_of(const Plan& plan, int64_t adapter, bool last) {
  for (const Plan::Rows& rows : plan.adapters)
    if (rows.adapter == adapter) return last ? &rows.outputs : &rows.rows;
  return nullptr;
}

std::vector<Job> jobs_of(const LinearGroup& group, const Plan& plan, bool last) {
  std::vector<Job> jobs;
  int64_t u_at = 0;
  for (int64_t i = 0; i < group.count && !plan.adapters.empty(); ++i)
    for (int64_t j = 0; j < group.linears[i].num_loras; ++j) {
      const Lora& lora = group.linears[i].loras[j];
      const std::vector<int32_t>* rows = rows_of(plan, lora.adapter, last);
      if (!rows || rows->empty()) continue;
      jobs.push_back({&lora, rows, i, u_at});
      u_at += jobs.back().num_rows() * lora.rank;
    }
  return jobs;
}

void fetch(const void* from, int64_t first, int64_t last) {
  for (int64_t at = first; at < last; at += kLine) __builtin_prefetch(static_cast<const char*>(from) + at, 0, 2);
}

int64_t bytes_of_a(const Lora& lora, int64_t width) { return 2 * lora.rank * ((width + 15) / 16 * 16); }

class Adapters final : public Around {
 public:
  Adapters(const GroupCall& call, const Target* targets)
      : call_(call), targets_(targets), jobs_(jobs_of(call.group, call.plan, call.last)) {
    for (int64_t i = 0; i < call.group.count; ++i) starts_.push_back(columns_), columns_ += targets[i].matrix->n;
    for (const Job& job : jobs_) num_units_ += job.units();
    if (call.next) following_ = jobs_of(*call.next, call.plan, call.last);
    static thread_local std::vector<float> buffer;
    const int64_t size = jobs_.empty() ? 0 : jobs_.back().u_at + jobs_.back().num_rows() * jobs_.back().lora->rank;
    if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(static_cast<size_t>(size));
    u_ = buffer.data();
  }

  int64_t num_units() const { return num_units_; }

  // Some ranks of one job: u = factor * x a^T.
  void down(int64_t unit) const {
    const Job* job = jobs_.data();
    while (unit >= job->units()) unit -= job->units(), ++job;
    const Lora& lora = *job->lora;
    const LoraRows rows{job->rows->data(), job->num_rows(), call_.x, call_.x_stride, nullptr, 0};
    const int64_t width = targets_->matrix->m, last = std::min((unit + 1) * kRanks, lora.rank);
    for (int64_t rank = unit * kRanks; rank < last; rank += 4)
      pass_ops().lora_down(rows, lora.a, width, static_cast<float>(lora.factor), rank, u_ + job->u_at, lora.rank);
  }

  // Fetch what `after` will read, and this part's share of what the next group begins with.
  void before(const Patch& patch) const override {
    for (const Job& job : jobs_)
      if (job.target == patch.target) fetch(b_of(job, patch), 0, 2 * job.lora->rank * patch.num_columns);
    if (patch.first_row > 0) return;
    const int64_t first = starts_[static_cast<size_t>(patch.target)] + patch.first_column, last = first + patch.num_columns;
    for (const Job& job : following_) {
      const int64_t lines = bytes_of_a(*job.lora, call_.next->linears->matrix->m) / kLine;
      fetch(job.lora->a, lines * first / columns_ * kLine, lines * last / columns_ * kLine);
    }
  }

  void after(const Patch& patch) const override {
    for (const Job& job : jobs_)
      if (job.target == patch.target) up(job, patch);
  }

 private:
  void up(const Job& job, const Patch& patch) const {
    const auto begin = job.rows->begin(), end = job.rows->end();
    const int64_t first = std::lower_bound(begin, end, patch.first_row) - begin;
    const int64_t last = std::lower_bound(begin, end, patch.last_row) - begin;
    float* y = targets_[patch.target].y + patch.first_column;
    const LoraRows rows{job.rows->data() + first, last - first, nullptr, 0, y, call_.y_stride};
    const float* u = u_ + job.u_at + first * job.lora->rank;
    pass_ops().lora_up(rows, b_of(job, patch), u, job.lora->rank, patch.num_columns);
  }

  static const uint16_t* b_of(const Job& job, const Patch& patch) {
    return job.lora->b + patch.first_column * job.lora->rank;
  }

  const GroupCall& call_;
  const Target* targets_;
  std::vector<Job> jobs_, following_;
  std::vector<int64_t> starts_;  // of each linear in the columns of y
  int64_t columns_ = 0, num_units_ = 0;
  float* u_;
};

struct Nothing final : Around {};

// Round x; with adapters, the team shares that and their way down.
void prepare(const GroupCall& call, const Adapters* adapters) {
  const Matrix& first = *call.group.linears->matrix;
  const bool fine = first.bits == 8;
  if (!adapters) return quantize_activations(call.x, call.num_rows, first.m, call.x_stride, call.quantized, fine);
  const int64_t pieces = plan_activations(call.num_rows, first.m, call.quantized, fine);
  parallel_for(pieces + adapters->num_units(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      i < pieces ? quantize_piece(call.x, call.x_stride, i, call.quantized) : adapters->down(i - pieces);
  });
}

}  // namespace

void group_product(const GroupCall& call) {
  std::vector<Target> targets;
  float* y = call.y;
  for (int64_t i = 0; i < call.group.count; ++i) {
    targets.push_back({call.group.linears[i].matrix, y});
    y += targets.back().matrix->n;
  }
  if (call.plan.adapters.empty()) {
    prepare(call, nullptr);
    return matmul_all(targets.data(), call.group.count, call.quantized, call.y_stride, call.accumulate, Nothing());
  }
  const Adapters adapters(call, targets.data());
  prepare(call, adapters.num_units() > 0 ? &adapters : nullptr);
  matmul_all(targets.data(), call.group.count, call.quantized, call.y_stride, call.accumulate, adapters);
}

}  // namespace pingjia
