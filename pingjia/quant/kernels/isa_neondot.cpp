// NEON with the dot product of ARMv8.2: one instruction multiplies four columns of four rows.
#include "kernel_set.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>

namespace pingjia {
namespace {

#include "neon_wide.h"

struct V : Wide {
  PJ_INLINE int32x4_t dot(int32x4_t acc, int8x16_t w, int8x16_t x) { return vdotq_s32(acc, w, x); }

  template <int BITS, int R, int TB>
  PJ_INLINE void dot32(I (&acc)[R][TB], const uint8_t* tiles, int64_t tile_stride, const uint8_t* next,
                       int64_t next_stride, const int8_t* x) {
    dot_columns<V, BITS>(acc, tiles, tile_stride, next, next_stride, x);
  }
};

#include "products.h"

constexpr KernelSet kSet = {"neondot", Isa::kNeonDot, kUpToFour, quantize_block, product_up_to_four};

}  // namespace

const KernelSet* const kNeonDot = &kSet;

}  // namespace pingjia
#else
namespace pingjia {
const KernelSet* const kNeonDot = nullptr;
}
#endif
