// Two registers of AVX2 as one chunk of a tile: what isa_avx2.cpp and isa_avxvnni.cpp share. Included in an unnamed
// namespace, once per file.
#pragma once

struct Wide {
  struct I { __m256i lo, hi; };  // rows 0..7, rows 8..15
  struct F { __m256 lo, hi; };

  PJ_INLINE I splat(int32_t value) { return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }
  PJ_INLINE F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  PJ_INLINE F scales(const void* at, int64_t index, int bits) {
    if (bits == 32) {
      const float* from = static_cast<const float*>(at) + index;
      return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
    }
    const __m128i* from = reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(at) + index);
    return {_mm256_cvtph_ps(_mm_loadu_si128(from)), _mm256_cvtph_ps(_mm_loadu_si128(from + 1))};
  }
  PJ_INLINE F to_float(const I& a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
  PJ_INLINE F fma(const F& a, float b, const F& c) {
    const __m256 wide = _mm256_set1_ps(b);
    return {_mm256_fmadd_ps(a.lo, wide, c.lo), _mm256_fmadd_ps(a.hi, wide, c.hi)};
  }
  PJ_INLINE F fma(const F& a, const F& b, const F& c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
  }
  PJ_INLINE void store(float* to, const F& a) { _mm256_storeu_ps(to, a.lo), _mm256_storeu_ps(to + 8, a.hi); }

  PJ_INLINE I load(const uint8_t* at) {
    const __m256i* from = reinterpret_cast<const __m256i*>(at);
    return {_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)};
  }
  PJ_INLINE __m256i four(const int8_t* at) {
    int32_t value;
    __builtin_memcpy(&value, at, 4);
    return _mm256_set1_epi32(value);
  }
  PJ_INLINE I low(const I& raw) {
    const __m256i nibble = _mm256_set1_epi8(0xf);
    return {_mm256_and_si256(raw.lo, nibble), _mm256_and_si256(raw.hi, nibble)};
  }
  PJ_INLINE I high(const I& raw) { return low({_mm256_srli_epi16(raw.lo, 4), _mm256_srli_epi16(raw.hi, 4)}); }
};
