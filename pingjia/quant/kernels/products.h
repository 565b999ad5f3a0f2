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

// Where one slot of a block (a token, or a part of one) keeps its numbers; `width` slots lie side by side.
struct Slot {
  int width;
  int8_t* values;
  float* scales;
  int32_t* offsets;
};

inline void put_group(const int8_t* values, float scale, const Slot& to, int64_t c) {
  to.scales[c / kActGroup * to.width] = scale;
  for (int part = 0; part < kActGroup / 32; ++part) {
    int32_t sum = 0;
    for (int i = 0; i < 32; ++i) sum += values[part * 32 + i];
    to.offsets[(c / 32 + part) * to.width] = -8 * sum;
  }
  for (int i = 0; i < kActGroup; i += 4) __builtin_memcpy(to.values + (c + i) * to.width, values + i, 4);
}

// Rounds a group to multiples of the scale it returns, which its caller may refine: `rest` is what rounding left.
inline float round_group(const float* x, int8_t* values, float* rest) {
  const int32_t bits = largest_bits(x, kActGroup);
  float largest;
  __builtin_memcpy(&largest, &bits, 4);
  const bool finite = bits < 0x7f800000;
  // Below 2^-120 the reciprocal would overflow: such a group counts as zeros.
  const float inverse = finite && largest > 7.5e-37f ? 127.0f / largest : 0.0f, scale = largest / 127.0f;
  for (int i = 0; i < kActGroup; ++i) values[i] = rounded(finite ? x[i] * inverse : 0.0f);
  if (rest)
    for (int i = 0; i < kActGroup; ++i) rest[i] = inverse > 0 ? x[i] - scale * static_cast<float>(values[i]) : 0.0f;
  return finite ? scale : __builtin_nanf("");
}

// In two parts the rest, at most half a step, is rounded to 254ths of a step: 16 bits in all.
inline void quantize_group(const float* x, int64_t c, const Slot* slots, int parts) {
  int8_t values[kActGroup];
  float rest[kActGroup];
  const float scale = round_group(x, values, parts == 2 ? rest : nullptr);
  put_group(values, scale, slots[0], c);
  if (parts == 1) return;
  const float step = scale / 254.0f, inverse = step > 1e-38f ? 1.0f / step : 0.0f;
  for (int i = 0; i < kActGroup; ++i) values[i] = rounded(inverse > 0 ? rest[i] * inverse : 0.0f);
  put_group(values, inverse > 0 ? step : 0.0f, slots[1], c);
}

void quantize_token(const float* x, int64_t m, int64_t columns, const Slot* slots, int parts) {
  for (int64_t c = 0; c < columns; c += kActGroup) {
    float padded[kActGroup];
    const float* group = x + c;
    if (c + kActGroup > m) {
      for (int i = 0; i < kActGroup; ++i) padded[i] = c + i < m ? x[c + i] : 0.0f;
      group = padded;
    }
    quantize_group(group, c, slots, parts);
  }
}

void quantize_zeros(int64_t columns, const Slot& to) {
  const int8_t zeros[kActGroup] = {};
  for (int64_t c = 0; c < columns; c += kActGroup) put_group(zeros, 0.0f, to, c);
}

void quantize_block(const float* x, int64_t stride, const Block& b, QuantRows& q) {
  Slot slots[kMaxWidth];
  for (int i = 0; i < b.width; ++i)
    slots[i] = {b.width, const_cast<int8_t*>(q.values_of(b)) + 4 * i, const_cast<float*>(q.scales_of(b)) + i,
                const_cast<int32_t*>(q.offsets_of(b)) + i};
  for (int t = 0; t < b.count; ++t)
    quantize_token(x + (b.first + t) * stride, q.m, q.columns, slots + t * q.parts, q.parts);
  for (int i = b.count * q.parts; i < b.width; ++i) quantize_zeros(q.columns, slots[i]);
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
