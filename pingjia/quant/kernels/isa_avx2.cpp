// AVX2: bytes are multiplied in pairs into 16 bits (maddubs), and pairs of those into 32.
#include "kernel_set.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>

namespace pingjia {
namespace {

#include "x86_wide.h"

struct V : Wide {
  static constexpr int kTiles = 1;
  static constexpr bool kInt8Offset = false;

  PJ_INLINE __m256i widen(__m256i acc, __m256i pairs) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }

  // Nibbles are at most 15: eight products of pairs, at most 8 * 2 * 15 * 127 = 30480, fit 16 bits.
  template <int TB>
  PJ_INLINE void int4(I (&acc)[TB], const uint8_t* tile, const int8_t* x) {
    I pairs[TB];
    PJ_UNROLL for (int t = 0; t < TB; ++t) pairs[t] = splat(0);
    PJ_UNROLL for (int c = 0; c < 4; ++c) {
      const I raw = load(tile + c * 64);
      PJ_UNROLL for (int half = 0; half < 2; ++half) {
        const I w = half == 0 ? low(raw) : high(raw);
        PJ_UNROLL for (int t = 0; t < TB; ++t) {
          const __m256i token = four(x + ((2 * c + half) * TB + t) * 4);
          pairs[t].lo = _mm256_add_epi16(pairs[t].lo, _mm256_maddubs_epi16(w.lo, token));
          pairs[t].hi = _mm256_add_epi16(pairs[t].hi, _mm256_maddubs_epi16(w.hi, token));
        }
      }
    }
    PJ_UNROLL for (int t = 0; t < TB; ++t) acc[t] = {widen(acc[t].lo, pairs[t].lo), widen(acc[t].hi, pairs[t].hi)};
  }

  // |w| * (x with w's sign): at most 2 * 128 * 127 = 32512.
  template <int TB>
  PJ_INLINE void int8(I (&acc)[TB], const uint8_t* tile, const int8_t* x) {
    PJ_UNROLL for (int c = 0; c < 8; ++c) {
      const I w = load(tile + c * 64), size = {_mm256_abs_epi8(w.lo), _mm256_abs_epi8(w.hi)};
      PJ_UNROLL for (int t = 0; t < TB; ++t) {
        const __m256i token = four(x + (c * TB + t) * 4);
        acc[t].lo = widen(acc[t].lo, _mm256_maddubs_epi16(size.lo, _mm256_sign_epi8(token, w.lo)));
        acc[t].hi = widen(acc[t].hi, _mm256_maddubs_epi16(size.hi, _mm256_sign_epi8(token, w.hi)));
      }
    }
  }

  template <int BITS, int R, int TB>
  PJ_INLINE void dot32(I (&acc)[R][TB], const uint8_t* tiles, int64_t tile_stride, const uint8_t* next,
                       int64_t next_stride, const int8_t* x) {
    PJ_UNROLL for (int i = 0; i < R * BITS; ++i) __builtin_prefetch(next + i * next_stride, 0, 3);
    PJ_UNROLL for (int r = 0; r < R; ++r)
      BITS == 4 ? int4(acc[r], tiles + r * tile_stride, x) : int8(acc[r], tiles + r * tile_stride, x);
  }
};

#include "products.h"

constexpr KernelSet kSet = {"avx2", Isa::kAvx2, kUpToFour, quantize_block, product_up_to_four};

}  // namespace

const KernelSet* const kAvx2 = &kSet;

}  // namespace pingjia
#else
namespace pingjia {
const KernelSet* const kAvx2 = nullptr;
}
#endif
