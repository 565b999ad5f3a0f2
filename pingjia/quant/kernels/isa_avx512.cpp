// AVX-512 with VNNI: one register is a chunk of a tile, one instruction multiplies it by four columns of a token.
#include "kernel_set.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>

namespace pingjia {
namespace {

struct V {
  using I = __m512i;
  using F = __m512;
  static constexpr int kTiles = 2;
  static constexpr bool kInt8Offset = true;

  static I splat(int32_t value) { return _mm512_set1_epi32(value); }
  static F zero() { return _mm512_setzero_ps(); }
  static F scales(const void* at, int64_t index, int bits) {
    if (bits == 32) return _mm512_loadu_ps(static_cast<const float*>(at) + index);
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(at) + index)));
  }
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static F fma(F a, float b, F c) { return _mm512_fmadd_ps(a, _mm512_set1_ps(b), c); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static void store(float* to, F a) { _mm512_storeu_ps(to, a); }

  static I load(const uint8_t* at) { return _mm512_loadu_si512(at); }
  static I four(const int8_t* at) {
    int32_t value;
    __builtin_memcpy(&value, at, 4);
    return _mm512_set1_epi32(value);
  }

  template <int R, int TB>
  PJ_INLINE void dot4(I (&acc)[R][TB], const I (&w)[R], const int8_t* x) {
    PJ_UNROLL for (int t = 0; t < TB; ++t) {
      const I token = four(x + 4 * t);
      PJ_UNROLL for (int r = 0; r < R; ++r) acc[r][t] = _mm512_dpbusd_epi32(acc[r][t], w[r], token);
    }
  }

  template <int BITS, int R, int TB>
  PJ_INLINE void dot32(I (&acc)[R][TB], const uint8_t* tiles, int64_t tile_stride, const uint8_t* next, int64_t next_stride, const int8_t* x) {
    const I nibble = _mm512_set1_epi8(0xf), flip = _mm512_set1_epi8(-128);
    PJ_UNROLL for (int c = 0; c < BITS; ++c) {
      I raw[R], w[R];
      PJ_UNROLL for (int r = 0; r < R; ++r) {
        raw[r] = load(tiles + r * tile_stride + c * 64);
        __builtin_prefetch(next + (c * R + r) * next_stride, 0, 3);
        w[r] = BITS == 4 ? _mm512_and_si512(raw[r], nibble) : _mm512_xor_si512(raw[r], flip);
      }
      dot4(acc, w, x + c * (BITS == 4 ? 8 : 4) * TB);
      if (BITS == 8) continue;
      PJ_UNROLL for (int r = 0; r < R; ++r) w[r] = _mm512_and_si512(_mm512_srli_epi16(raw[r], 4), nibble);
      dot4(acc, w, x + (c * 8 + 4) * TB);
    }
  }
};

#include "products.h"

void product(int bits, int width, const Product& p, float* out) {
  switch (width) {
    case 1: return run_width<1>(bits, p, out);
    case 2: return run_width<2>(bits, p, out);
    case 3: return run_width<3>(bits, p, out);
    case 4: return run_width<4>(bits, p, out);
    case 5: return run_width<5>(bits, p, out);
    default: return run_width<6>(bits, p, out);
  }
}

constexpr int kWidths[] = {1, 2, 3, 4, 5, 6, 0};
constexpr KernelSet kSet = {"avx512", Isa::kAvx512, kWidths, quantize_block, product};

}  // namespace

const KernelSet* const kAvx512 = &kSet;

}  // namespace pingjia
#else
namespace pingjia {
const KernelSet* const kAvx512 = nullptr;
}
#endif
