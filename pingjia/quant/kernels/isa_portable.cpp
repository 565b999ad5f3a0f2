// Plain C++: for processors without a file of their own, and the reference of the others.
#include "half.h"
#include "kernel_set.h"

namespace pingjia {
namespace {

struct V {
  struct I { int32_t v[16]; };
  struct F { float v[16]; };
  static constexpr int kTiles = 1;
  static constexpr bool kInt8Offset = false;

  static I splat(int32_t value) { I r; for (int32_t& v : r.v) v = value; return r; }
  static F zero() { F r; for (float& v : r.v) v = 0; return r; }
  static F scales(const void* at, int64_t index, int bits) {
    F r;
    for (int i = 0; i < 16; ++i)
      r.v[i] = bits == 32 ? static_cast<const float*>(at)[index + i] : half_to_float(static_cast<const uint16_t*>(at)[index + i]);
    return r;
  }
  static F to_float(const I& a) { F r; for (int i = 0; i < 16; ++i) r.v[i] = static_cast<float>(a.v[i]); return r; }
  static F fma(const F& a, float b, const F& c) { F r; for (int i = 0; i < 16; ++i) r.v[i] = a.v[i] * b + c.v[i]; return r; }
  static F fma(const F& a, const F& b, const F& c) { F r; for (int i = 0; i < 16; ++i) r.v[i] = a.v[i] * b.v[i] + c.v[i]; return r; }
  static void store(float* to, const F& a) { for (int i = 0; i < 16; ++i) to[i] = a.v[i]; }

  // Four columns of 16 rows, from the low nibbles (shift 0), the high ones (4) or whole bytes.
  template <int BITS>
  static void dot4(I& acc, const uint8_t* w, int shift, const int8_t* x) {
    for (int i = 0; i < 16; ++i)
      for (int k = 0; k < 4; ++k)
        acc.v[i] += (BITS == 4 ? (w[4 * i + k] >> shift) & 0xf : static_cast<int8_t>(w[4 * i + k])) * x[k];
  }

  template <int BITS, int R, int TB>
  static void dot32(I (&acc)[R][TB], const uint8_t* tiles, int64_t tile_stride, const uint8_t*, int64_t, const int8_t* x) {
    for (int c = 0; c < 8; ++c)
      for (int r = 0; r < R; ++r)
        for (int t = 0; t < TB; ++t)
          dot4<BITS>(acc[r][t], tiles + r * tile_stride + (BITS == 4 ? c / 2 : c) * 64, c % 2 * 4, x + (c * TB + t) * 4);
  }
};

#include "products.h"

void product(int bits, int width, const Product& p, float* out) {
  width == 1 ? run_width<1>(bits, p, out) : run_width<4>(bits, p, out);
}

constexpr int kWidths[] = {1, 4, 0};
constexpr KernelSet kSet = {"portable", Isa::kPortable, kWidths, quantize_block, product};

}  // namespace

const KernelSet* const kPortable = &kSet;

}  // namespace pingjia
