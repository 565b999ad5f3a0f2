// The C ABI of rounding: lots of sixteen rows, which do not depend on each other, over the team.
#include "rounding.h"

#include "pass.h"

#define PJ_API extern "C" __attribute__((visibility("default")))

using namespace pingjia;

// Python has a twin of each.
static_assert(sizeof(RoundBlock) == 72 && sizeof(ScaleSearch) == 64, "quant/rounding.py");

PJ_API void pj_round_block(const RoundBlock* block) {
  const auto op = pass_ops().round_rows16;
  parallel_for(block->num_rows / 16, 4, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) op(*block, 16 * i);
  });
}

PJ_API void pj_search_scales(const ScaleSearch* search) {
  const auto op = pass_ops().search_scales16;
  parallel_for(search->num_rows / 16, 4, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) op(*search, 16 * i);
  });
}
