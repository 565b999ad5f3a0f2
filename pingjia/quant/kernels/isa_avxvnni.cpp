// AVX-VNNI: the one instruction of AVX-512 VNNI in registers of AVX2.
#include "kernel_set.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && defined(__AVXVNNI__)
#include <immintrin.h>

namespace pingjia {
namespace {

#include "x86_wide.h"

struct V : Wide {
  static constexpr int kTiles = 1;
  static constexpr bool kInt8Offset = true;

  template <int TB>
  PJ_INLINE void dot4(I (&acc)[TB], const I& w, const int8_t* x) {
    PJ_UNROLL for (int t = 0; t < TB; ++t) {
      const __m256i token = four(x + t * 4);
      acc[t].lo = _mm256_dpbusd_avx_epi32(acc[t].lo, w.lo, token);
      acc[t].hi = _mm256_dpbusd_avx_epi32(acc[t].hi, w.hi, token);
    }
  }

  PJ_INLINE I flipped(const I& raw) {
    const __m256i flip = _mm256_set1_epi8(-128);
    return {_mm256_xor_si256(raw.lo, flip), _mm256_xor_si256(raw.hi, flip)};
  }

  template <int BITS, int R, int TB>
  PJ_INLINE void dot32(I (&acc)[R][TB], const uint8_t* tiles, int64_t tile_stride, const uint8_t* next,
                       int64_t next_stride, const int8_t* x) {
    PJ_UNROLL for (int i = 0; i < R * BITS; ++i) __builtin_prefetch(next + i * next_stride, 0, 3);
    PJ_UNROLL for (int r = 0; r < R; ++r) PJ_UNROLL for (int c = 0; c < BITS; ++c) {
      const I raw = load(tiles + r * tile_stride + c * 64);
      dot4(acc[r], BITS == 4 ? low(raw) : flipped(raw), x + c * (BITS == 4 ? 8 : 4) * TB);
      if (BITS == 4) dot4(acc[r], high(raw), x + (c * 8 + 4) * TB);
    }
  }
};

#include "products.h"

constexpr KernelSet kSet = {"avxvnni", Isa::kAvxVnni, kUpToFour, quantize_block, product_up_to_four};

}  // namespace

const KernelSet* const kAvxVnni = &kSet;

}  // namespace pingjia
#else
namespace pingjia {
const KernelSet* const kAvxVnni = nullptr;
}
#endif
