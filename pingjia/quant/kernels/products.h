// The product of tiles and activations, written once for every instruction set. A file isa_NAME.cpp includes it after
// defining its vectors `V` in an unnamed namespace: nothing here may be shared between files compiled with different
// flags, so it uses no function of the standard library.
//
// V offers: kTiles (tiles of one pass: 1 or 2), I (16 int32), F (16 floats), splat(int32), zero(), scales(ptr, index, bits), to_float(I), 
// fma(F, F, F), fma(F, float, F), store(float*, F), kInt8Offset (INT8 weights are taken as value + 128), and
// dot32<BITS, R, TB>(acc, tiles, tile_stride, next, next_stride, values): acc[r][t] += 32 columns of tile r times
// token t, while fetching every `next_stride` bytes from `next` into the cache.

template <int BITS, int R, int TB, int STEP>
struct ProductOf {
  using I = V::I;
  using F = V::F;

  PJ_INLINE void step(const Product& p, int64_t s, I (&acc)[R][TB]) {
    constexpr int kParts = STEP / 32;
    PJ_UNROLL for (int t = 0; t < TB; ++t) {
      int32_t offset = 0;
      if (BITS == 4 || V::kInt8Offset)
        for (int part = 0; part < kParts; ++part) offset += p.offsets[(s * kParts + part) * TB + t];
      const I start = V::splat(BITS == 4 ? offset : offset * 16);
      PJ_UNROLL for (int r = 0; r < R; ++r) acc[r][t] = start;
    }
    PJ_UNROLL for (int part = 0; part < kParts; ++part) {
      const int64_t at = s * kParts + part;
      V::template dot32<BITS, R, TB>(acc, p.tiles + at * 64 * BITS, p.tile_stride, p.next + at * BITS * R * p.next_stride,
                                      p.next_stride, p.values + at * 32 * TB);
    }
  }

  static void run(const Product& p, float* out) {
    const int64_t steps = (p.m + STEP - 1) / STEP, per_group = p.group >= p.m ? steps : p.group / STEP;
    F total[R][TB];
    PJ_UNROLL for (int r = 0; r < R; ++r) PJ_UNROLL for (int t = 0; t < TB; ++t) total[r][t] = V::zero();
    for (int64_t first = 0, group = 0; first < steps; first += per_group, ++group) {
      const int64_t last = first + per_group < steps ? first + per_group : steps;
      F sum[R][TB];
      PJ_UNROLL for (int r = 0; r < R; ++r) PJ_UNROLL for (int t = 0; t < TB; ++t) sum[r][t] = V::zero();
      for (int64_t s = first; s < last; ++s) {
        I acc[R][TB];
        step(p, s, acc);
        const float* x_scales = p.x_scales + s * STEP / kActGroup * TB;
        PJ_UNROLL for (int t = 0; t < TB; ++t) PJ_UNROLL for (int r = 0; r < R; ++r) {
          sum[r][t] = V::fma(V::to_float(acc[r][t]), x_scales[t], sum[r][t]);
        }
      }
      PJ_UNROLL for (int r = 0; r < R; ++r) {
        const F scale = V::scales(p.scales, r * p.scale_stride + group * kTileRows, p.scale_bits);
        PJ_UNROLL for (int t = 0; t < TB; ++t) total[r][t] = V::fma(sum[r][t], scale, total[r][t]);
      }
    }
    PJ_UNROLL for (int r = 0; r < R; ++r)
      PJ_UNROLL for (int t = 0; t < TB; ++t) V::store(out + (r * TB + t) * kTileRows, total[r][t]);
  }
};

template <int BITS, int TB>
void run_pass(const Product& p, float* out) {
  if (kActGroup == 32 || p.group % 64 == 0 || p.group >= p.m)
    ProductOf<BITS, V::kTiles, TB, kActGroup>::run(p, out);
  else
    ProductOf<BITS, V::kTiles, TB, 32>::run(p, out);
}

template <int BITS, int TB>
void run_product(Product p, float* out) {
  run_pass<BITS, TB>(p, out);
  if (V::kTiles == kUnitTiles || p.tile_stride == 0) return;
  p.tiles += p.tile_stride, p.next += p.tile_stride * p.next_stride / 64;
  p.scales = static_cast<const char*>(p.scales) + p.scale_stride * p.scale_bits / 8;
  run_pass<BITS, TB>(p, out + TB * kTileRows);
}

template <int TB>
void run_width(int bits, const Product& p, float* out) {
  bits == 4 ? run_product<4, TB>(p, out) : run_product<8, TB>(p, out);
}

// Round to nearest even without a library call: adding 1.5 * 2^23 leaves the integer in the low bits.
inline int8_t rounded(float value) {
  const float shifted = value + 12582912.0f;
  int32_t bits;
  __builtin_memcpy(&bits, &shifted, 4);
  return static_cast<int8_t>(bits - 0x4b400000);
}

// 32 or 64 columns of one token: values, and the largest magnitude as bits (which orders infinities and NaN last).
inline int32_t largest_bits(const float* x, int count) {
  int32_t largest = 0;
  for (int i = 0; i < count; ++i) {
    int32_t bits;
    __builtin_memcpy(&bits, x + i, 4);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

// One group of one token. `to`, `scale` and `offsets` point at the token's place in its block.
inline void quantize_group(const float* x, int width, int8_t* to, float* scale, int32_t* offsets) {
  const int32_t bits = largest_bits(x, kActGroup);
  float largest;
  __builtin_memcpy(&largest, &bits, 4);
  const bool finite = bits < 0x7f800000;
  // Below 2^-120 the reciprocal would overflow: such a group counts as zeros.
  const float inverse = finite && largest > 7.5e-37f ? 127.0f / largest : 0.0f;
  *scale = finite ? largest / 127.0f : __builtin_nanf("");
  int8_t values[kActGroup];
  for (int i = 0; i < kActGroup; ++i) values[i] = rounded(finite ? x[i] * inverse : 0.0f);
  for (int part = 0; part < kActGroup / 32; ++part) {
    int32_t sum = 0;
    for (int i = 0; i < 32; ++i) sum += values[part * 32 + i];
    offsets[part * width] = -8 * sum;
  }
  for (int i = 0; i < kActGroup; i += 4) __builtin_memcpy(to + i * width, values + i, 4);
}

void quantize_token(const float* x, int64_t m, int64_t columns, int width, int8_t* to, float* scales, int32_t* offsets) {
  for (int64_t c = 0; c < columns; c += kActGroup) {
    float padded[kActGroup];
    const float* group = x + c;
    if (c + kActGroup > m) {
      for (int i = 0; i < kActGroup; ++i) padded[i] = c + i < m ? x[c + i] : 0.0f;
      group = padded;
    }
    quantize_group(group, width, to + c * width, scales + c / kActGroup * width, offsets + c / 32 * width);
  }
}

void quantize_zeros(int64_t columns, int width, int8_t* to, float* scales, int32_t* offsets) {
  for (int64_t c = 0; c < columns; c += 4) __builtin_memset(to + c * width, 0, 4);
  for (int64_t c = 0; c < columns; c += kActGroup) scales[c / kActGroup * width] = 0.0f;
  for (int64_t c = 0; c < columns; c += 32) offsets[c / 32 * width] = 0;
}

void quantize_block(const float* x, int64_t stride, const Block& b, QuantRows& q) {
  int8_t* values = const_cast<int8_t*>(q.values_of(b));
  float* scales = const_cast<float*>(q.scales_of(b));
  int32_t* offsets = const_cast<int32_t*>(q.offsets_of(b));
  for (int t = 0; t < b.count; ++t)
    quantize_token(x + (b.first + t) * stride, q.m, q.columns, b.width, values + 4 * t, scales + t, offsets + t);
  for (int t = b.count; t < b.width; ++t) quantize_zeros(q.columns, b.width, values + 4 * t, scales + t, offsets + t);
}

// Registers of 256 bits or less hold the accumulators of four tokens.
constexpr int kUpToFour[] = {1, 2, 3, 4, 0};

inline void product_up_to_four(int bits, int width, const Product& p, float* out) {
  switch (width) {
    case 1: return run_width<1>(bits, p, out);
    case 2: return run_width<2>(bits, p, out);
    case 3: return run_width<3>(bits, p, out);
    default: return run_width<4>(bits, p, out);
  }
}
