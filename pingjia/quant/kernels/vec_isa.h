// Sixteen floats at a time, in GCC's and Clang's own vector types. A file pass_NAME.cpp includes it in
// its unnamed namespace: nothing here is shared between files compiled with different flags.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // about passing such vectors between files, which nothing does
#endif

typedef float F16 __attribute__((vector_size(64)));
typedef float F8 __attribute__((vector_size(32)));
typedef float F4 __attribute__((vector_size(16)));
typedef int32_t I16 __attribute__((vector_size(64)));
typedef int8_t B16 __attribute__((vector_size(16)));
typedef uint16_t H16 __attribute__((vector_size(32)));
typedef uint32_t U16 __attribute__((vector_size(64)));

static inline F16 load(const float* p) {
  F16 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

static inline void store(float* p, F16 v) { __builtin_memcpy(p, &v, sizeof v); }

static inline F16 load_n(const float* p, int64_t n) {
  F16 v = {};
  __builtin_memcpy(&v, p, n * sizeof(float));
  return v;
}

static inline void store_n(float* p, F16 v, int64_t n) { __builtin_memcpy(p, &v, n * sizeof(float)); }

static inline F16 load(const int8_t* p) {
#if defined(__AVX512F__)
  return (F16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#else
  B16 v;
  __builtin_memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, F16);
#endif
}

static inline F16 load_n(const int8_t* p, int64_t n) {
  B16 v = {};
  __builtin_memcpy(&v, p, n);
  return __builtin_convertvector(v, F16);
}

static inline F16 widen(H16 h) {
#if defined(__AVX512F__)
  return (F16)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
  __m128i parts[2];
  __m256 wide[2];
  __builtin_memcpy(parts, &h, sizeof parts);
  wide[0] = _mm256_cvtph_ps(parts[0]);
  wide[1] = _mm256_cvtph_ps(parts[1]);
  F16 v;
  __builtin_memcpy(&v, wide, sizeof v);
  return v;
#else
  F16 v;
  for (int i = 0; i < 16; ++i) v[i] = half_to_float(h[i]);
  return v;
#endif
}

static inline F16 load(const uint16_t* p) {
  H16 h;
  __builtin_memcpy(&h, p, sizeof h);
  return widen(h);
}

static inline F16 load_n(const uint16_t* p, int64_t n) {
  H16 h = {};
  __builtin_memcpy(&h, p, n * sizeof(uint16_t));
  return widen(h);
}

static inline F16 splat(float x) { return F16{} + x; }

static inline F16 vmax(F16 a, F16 b) { return a > b ? a : b; }

// Fixed order, so that a row gives the same bits wherever it is computed.
static inline float hsum(F16 v) {
  F8 half[2];
  __builtin_memcpy(half, &v, sizeof v);
  const F8 eight = half[0] + half[1];
  F4 quarter[2];
  __builtin_memcpy(quarter, &eight, sizeof eight);
  const F4 four = quarter[0] + quarter[1];
  return (four[0] + four[2]) + (four[1] + four[3]);
}

#if defined(__clang__)
#define PJ_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int32_t I4 __attribute__((vector_size(16)));
#define PJ_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, I4{i, j, k, l})
#endif

static inline F4 fold(F16 v) {
  F4 quarter[4];
  __builtin_memcpy(quarter, &v, sizeof v);
  return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

// The sums of four vectors, each in the order of hsum.
static inline F4 hsum4(F16 a, F16 b, F16 c, F16 d) {
  const F4 wa = fold(a), wb = fold(b), wc = fold(c), wd = fold(d);
  const F4 ab = PJ_SHUFFLE(wa, wb, 0, 1, 4, 5) + PJ_SHUFFLE(wa, wb, 2, 3, 6, 7);
  const F4 cd = PJ_SHUFFLE(wc, wd, 0, 1, 4, 5) + PJ_SHUFFLE(wc, wd, 2, 3, 6, 7);
  return PJ_SHUFFLE(ab, cd, 0, 2, 4, 6) + PJ_SHUFFLE(ab, cd, 1, 3, 5, 7);
}

static inline float hmax(F16 v) {
  F8 half[2];
  __builtin_memcpy(half, &v, sizeof v);
  const F8 eight = half[0] > half[1] ? half[0] : half[1];
  F4 quarter[2];
  __builtin_memcpy(quarter, &eight, sizeof eight);
  const F4 four = quarter[0] > quarter[1] ? quarter[0] : quarter[1];
  const float a = four[0] > four[2] ? four[0] : four[2], b = four[1] > four[3] ? four[1] : four[3];
  return a > b ? a : b;
}

// e^x to 2 units in the last place for x in [-87, 88]; clamped outside, not-a-number stays one.
static inline F16 vexp(F16 x) {
  x = x < splat(-87.0f) ? splat(-87.0f) : x;
  x = x > splat(88.0f) ? splat(88.0f) : x;
  const F16 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  F16 n = x * 1.44269504f + magic;
  n -= magic;
  F16 r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  F16 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  I16 bits = (__builtin_convertvector(n, I16) + 127) << 23;
  F16 power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return p * power;
}
