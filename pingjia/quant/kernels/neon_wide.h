// Four registers of NEON as one chunk of a tile: what isa_neon.cpp and isa_neondot.cpp share. Included in an unnamed
// namespace, once per file.
#pragma once

struct Wide {
  struct I { int32x4_t v[4]; };  // rows 0..3, 4..7, 8..11, 12..15
  struct F { float32x4_t v[4]; };

  static constexpr int kTiles = 1;
  static constexpr bool kInt8Offset = false;

  PJ_INLINE I splat(int32_t value) {
    const int32x4_t four = vdupq_n_s32(value);
    return {{four, four, four, four}};
  }
  PJ_INLINE F zero() {
    const float32x4_t four = vdupq_n_f32(0);
    return {{four, four, four, four}};
  }
  PJ_INLINE F scales(const void* at, int64_t index, int bits) {
    F r;
    for (int i = 0; i < 4; ++i) r.v[i] = bits == 32 ? floats(at, index + 4 * i) : halves(at, index + 4 * i);
    return r;
  }
  PJ_INLINE float32x4_t floats(const void* at, int64_t index) { return vld1q_f32(static_cast<const float*>(at) + index); }
  PJ_INLINE float32x4_t halves(const void* at, int64_t index) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(static_cast<const uint16_t*>(at) + index)));
  }
  PJ_INLINE F to_float(const I& a) {
    F r;
    PJ_UNROLL for (int i = 0; i < 4; ++i) r.v[i] = vcvtq_f32_s32(a.v[i]);
    return r;
  }
  PJ_INLINE F fma(const F& a, float b, const F& c) {
    F r;
    PJ_UNROLL for (int i = 0; i < 4; ++i) r.v[i] = vfmaq_n_f32(c.v[i], a.v[i], b);
    return r;
  }
  PJ_INLINE F fma(const F& a, const F& b, const F& c) {
    F r;
    PJ_UNROLL for (int i = 0; i < 4; ++i) r.v[i] = vfmaq_f32(c.v[i], a.v[i], b.v[i]);
    return r;
  }
  PJ_INLINE void store(float* to, const F& a) {
    PJ_UNROLL for (int i = 0; i < 4; ++i) vst1q_f32(to + 4 * i, a.v[i]);
  }
  PJ_INLINE int8x16_t four(const int8_t* at) {
    int32_t value;
    __builtin_memcpy(&value, at, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(value));
  }

  // Four columns of a chunk: the four registers of one tile times each token.
  template <class V, int TB>
  PJ_INLINE void dot_tokens(I (&acc)[TB], const int8x16_t (&w)[4], const int8_t* x) {
    PJ_UNROLL for (int t = 0; t < TB; ++t) {
      const int8x16_t token = four(x + 4 * t);
      PJ_UNROLL for (int i = 0; i < 4; ++i) acc[t].v[i] = V::dot(acc[t].v[i], w[i], token);
    }
  }

  template <class V, int BITS, int R, int TB>
  PJ_INLINE void dot_columns(I (&acc)[R][TB], const uint8_t* tiles, int64_t tile_stride, const uint8_t* next,
                             int64_t next_stride, const int8_t* x) {
    PJ_UNROLL for (int i = 0; i < R * BITS; ++i) __builtin_prefetch(next + i * next_stride, 0, 3);
    PJ_UNROLL for (int r = 0; r < R; ++r) PJ_UNROLL for (int c = 0; c < BITS; ++c) {
      const uint8_t* chunk = tiles + r * tile_stride + c * 64;
      int8x16_t w[4];
      PJ_UNROLL for (int i = 0; i < 4; ++i) w[i] = BITS == 4 ? low(chunk + 16 * i) : vreinterpretq_s8_u8(vld1q_u8(chunk + 16 * i));
      dot_tokens<V>(acc[r], w, x + c * (BITS == 4 ? 8 : 4) * TB);
      if (BITS == 8) continue;
      PJ_UNROLL for (int i = 0; i < 4; ++i) w[i] = high(chunk + 16 * i);
      dot_tokens<V>(acc[r], w, x + (c * 8 + 4) * TB);
    }
  }
  PJ_INLINE int8x16_t low(const uint8_t* at) { return vreinterpretq_s8_u8(vandq_u8(vld1q_u8(at), vdupq_n_u8(0xf))); }
  PJ_INLINE int8x16_t high(const uint8_t* at) { return vreinterpretq_s8_u8(vshrq_n_u8(vld1q_u8(at), 4)); }
};
