// NEON as every 64-bit ARM processor has it: bytes are multiplied into 16 bits, summed by pairs into 32.
#include "kernel_set.h"

#if defined(__aarch64__)
#include <arm_neon.h>

namespace pingjia {
namespace {

#include "neon_wide.h"

struct V : Wide {
  // Four rows: the sum of four products each.
  PJ_INLINE int32x4_t dot(int32x4_t acc, int8x16_t w, int8x16_t x) {
    const int32x4_t first = vpaddlq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(x)));
    const int32x4_t second = vpaddlq_s16(vmull_high_s8(w, x));
    return vaddq_s32(acc, vpaddq_s32(first, second));
  }

  template <int BITS, int R, int TB>
  PJ_INLINE void dot32(I (&acc)[R][TB], const uint8_t* tiles, int64_t tile_stride, const uint8_t* next,
                       int64_t next_stride, const int8_t* x) {
    dot_columns<V, BITS>(acc, tiles, tile_stride, next, next_stride, x);
  }
};

#include "products.h"

constexpr KernelSet kSet = {"neon", Isa::kNeon, kUpToFour, quantize_block, product_up_to_four};

}  // namespace

const KernelSet* const kNeon = &kSet;

}  // namespace pingjia
#else
namespace pingjia {
const KernelSet* const kNeon = nullptr;
}
#endif
