// The small operations between the matrix products, one row at a time. Included once per instruction set (pass_*.cpp).

static float dot(const float* a, const float* b, int64_t n) {
  F16 first = {}, second = {};
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    first += load(a + i) * load(b + i);
    second += load(a + i + 16) * load(b + i + 16);
  }
  for (; i + 16 <= n; i += 16) first += load(a + i) * load(b + i);
  if (i < n) second += load_n(a + i, n - i) * load_n(b + i, n - i);
  return hsum(first + second);
}

static float sum(const float* x, int64_t n) {
  F16 total = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) total += load(x + i);
  if (i < n) total += load_n(x + i, n - i);
  return hsum(total);
}

static void scale(const float* x, float factor, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store(y + i, load(x + i) * factor);
  for (; i < n; ++i) y[i] = x[i] * factor;
}

static void rms_norm(const float* x, const float* weight, float eps, float* y, int64_t n) {
  const float factor = 1.0f / __builtin_sqrtf(dot(x, x, n) / static_cast<float>(n) + eps);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store(y + i, load(x + i) * factor * load(weight + i));
  for (; i < n; ++i) y[i] = x[i] * factor * weight[i];
}

static void layer_norm(const float* x, const float* weight, const float* bias, float eps, float* y, int64_t n) {
  const float mean = sum(x, n) / static_cast<float>(n);
  F16 squares = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const F16 off = load(x + i) - mean;
    squares += off * off;
  }
  float variance = hsum(squares);
  for (; i < n; ++i) variance += (x[i] - mean) * (x[i] - mean);
  const float factor = 1.0f / __builtin_sqrtf(variance / static_cast<float>(n) + eps);
  for (i = 0; i + 16 <= n; i += 16) store(y + i, (load(x + i) - mean) * factor * load(weight + i) + load(bias + i));
  for (; i < n; ++i) y[i] = (x[i] - mean) * factor * weight[i] + bias[i];
}

// x * sigmoid(t)
static inline F16 gate(F16 x, F16 t) { return x / (vexp(-t) + 1.0f); }

// h[i] = silu(h[i]) * h[n + i]
static void swiglu(float* h, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const F16 x = load(h + i);
    store(h + i, gate(x, x) * load(h + n + i));
  }
  if (i < n) {
    const F16 x = load_n(h + i, n - i);
    store_n(h + i, gate(x, x) * load_n(h + n + i, n - i), n - i);
  }
}

// 0.5 x (1 + tanh(u)) = x * sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
static void gelu_tanh(float* h, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    const int64_t left = n - i < 16 ? n - i : 16;
    const F16 x = left == 16 ? load(h + i) : load_n(h + i, left);
    const F16 y = gate(x, (x + x * x * x * 0.044715f) * 1.5957691216f);
    left == 16 ? store(h + i, y) : store_n(h + i, y, left);
  }
}

// Pairs (i, i + f) of x, i < f.
static void rotate_halves(float* x, const float* cos, const float* sin, int64_t f) {
  int64_t i = 0;
  for (; i + 16 <= f; i += 16) {
    const F16 a = load(x + i), b = load(x + f + i), c = load(cos + i), s = load(sin + i);
    store(x + i, a * c - b * s);
    store(x + f + i, b * c + a * s);
  }
  for (; i < f; ++i) {
    const float a = x[i], b = x[f + i];
    x[i] = a * cos[i] - b * sin[i];
    x[f + i] = b * cos[i] + a * sin[i];
  }
}

// Pairs (2i, 2i + 1) of x, i < f.
static void rotate_pairs(float* x, const float* cos, const float* sin, int64_t f) {
  for (int64_t i = 0; i < f; ++i) {
    const float a = x[2 * i], b = x[2 * i + 1];
    x[2 * i] = a * cos[i] - b * sin[i];
    x[2 * i + 1] = b * cos[i] + a * sin[i];
  }
}

// Largest |x|; not-a-numbers do not count.
static float largest(const float* x, int64_t n) {
  F16 top = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) top = vmax(load(x + i), vmax(-load(x + i), top));
  if (i < n) top = vmax(load_n(x + i, n - i), vmax(-load_n(x + i, n - i), top));
  return hmax(top);
}

static inline F16 load_table(const float* p) { return load(p); }
static inline F16 load_table(const uint16_t* p) { return load(p); }
struct BFloat {
  uint16_t bits;
};
static inline F16 load_table(const BFloat* p) {
  H16 h;
  __builtin_memcpy(&h, p, sizeof h);
  const U16 wide = __builtin_convertvector(h, U16) << 16;
  F16 v;
  __builtin_memcpy(&v, &wide, sizeof v);
  return v;
}

// y[t * y_stride] = x_t . w for `rows` rows; width is a multiple of 16 here.
template <typename T>
static void table_dots(const T* w, const float* x, int64_t rows, int64_t width, float* y, int64_t y_stride) {
  int64_t t = 0;
  for (; t + 4 <= rows; t += 4) {
    F16 acc[4] = {};
    for (int64_t i = 0; i < width; i += 16) {
      const F16 weight = load_table(w + i);
      for (int j = 0; j < 4; ++j) acc[j] += weight * load(x + (t + j) * width + i);
    }
    for (int j = 0; j < 4; ++j) y[(t + j) * y_stride] = hsum(acc[j]);
  }
  for (; t < rows; ++t) {
    F16 acc = {};
    for (int64_t i = 0; i < width; i += 16) acc += load_table(w + i) * load(x + t * width + i);
    y[t * y_stride] = hsum(acc);
  }
}

// Index of the first largest value, and whether all are finite.
static void judge_row(const float* logits, int64_t n, int32_t* best, int32_t* finite) {
  F16 top = splat(-__builtin_inff()), odd = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const F16 x = load(logits + i);
    top = vmax(x, top);
    odd += x * 0.0f;  // infinity and not-a-number give not-a-number
  }
  float most = hmax(top), rest = hsum(odd);
  for (; i < n; ++i) {
    most = logits[i] > most ? logits[i] : most;
    rest += logits[i] * 0.0f;
  }
  int64_t at = 0;
  while (at < n - 1 && !(logits[at] == most)) ++at;
  *best = static_cast<int32_t>(at);
  *finite = rest == 0.0f;
}

// ---- adapters. A row's numbers are added up in the same order whatever rows and ranks it is computed with.

// u[row * rank + r] = x_row . a_r, for four ranks, whose weights lie together 16 columns at a time.
template <int ROWS>
static inline void down_tile(const LoraRows& call, int64_t t0, const uint16_t* a, int64_t width, float factor, float* u,
                             int64_t rank) {
  const float* x[ROWS];
  for (int t = 0; t < ROWS; ++t) x[t] = call.x + call.rows[t0 + t] * call.x_stride;
  F16 acc[ROWS][4] = {};
  for (int64_t i = 0; i < width; i += 16, a += 64) {
    const int64_t left = width - i < 16 ? width - i : 16;
    F16 weight[4];
    for (int r = 0; r < 4; ++r) weight[r] = load(a + r * 16);
    for (int t = 0; t < ROWS; ++t) {
      const F16 value = left == 16 ? load(x[t] + i) : load_n(x[t] + i, left);
      for (int r = 0; r < 4; ++r) acc[t][r] += value * weight[r];
    }
  }
  for (int t = 0; t < ROWS; ++t) {
    const F4 sums = hsum4(acc[t][0], acc[t][1], acc[t][2], acc[t][3]) * factor;
    __builtin_memcpy(u + (t0 + t) * rank, &sums, sizeof sums);
  }
}

// u [count, rank]: ranks first..first+3 of it. a: [rank / 4][width / 16][4][16].
static void lora_down(const LoraRows& call, const uint16_t* a, int64_t width, float factor, int64_t first, float* u,
                      int64_t rank) {
  const uint16_t* four = a + first * ((width + 15) / 16 * 16);
  int64_t t = 0;
  for (; t + 4 <= call.count; t += 4) down_tile<4>(call, t, four, width, factor, u + first, rank);
  for (; t + 2 <= call.count; t += 2) down_tile<2>(call, t, four, width, factor, u + first, rank);
  if (t < call.count) down_tile<1>(call, t, four, width, factor, u + first, rank);
}

// 16 columns at a time, COLUMNS times. Even and odd ranks are summed apart, so that an addition need not wait for the
// one before it.
template <int ROWS, int COLUMNS>
static inline void up_tile(const LoraRows& call, int64_t t0, int64_t c, const uint16_t* b, const float* u, int64_t rank,
                           int64_t n) {
  F16 even[ROWS][COLUMNS] = {}, odd[ROWS][COLUMNS] = {};
  for (int64_t r = 0; r < rank; r += 2)
    for (int k = 0; k < COLUMNS; ++k) {
      const uint16_t* at = b + (k * rank + r) * 16;
      const F16 first = load(at), second = load(at + 16);
      for (int t = 0; t < ROWS; ++t) {
        even[t][k] += u[(t0 + t) * rank + r] * first;
        odd[t][k] += u[(t0 + t) * rank + r + 1] * second;
      }
    }
  for (int t = 0; t < ROWS; ++t)
    for (int k = 0; k < COLUMNS; ++k) {
      float* to = call.y + call.rows[t0 + t] * call.y_stride + c + 16 * k;
      const int64_t left = n - 16 * k < 16 ? n - 16 * k : 16;
      const F16 sum = even[t][k] + odd[t][k];
      left == 16 ? store(to, load(to) + sum) : store_n(to, load_n(to, left) + sum, left);
    }
}

template <int COLUMNS>
static void up_columns(const LoraRows& call, int64_t c, const uint16_t* b, const float* u, int64_t rank, int64_t n) {
  int64_t t = 0;
  for (; t + 4 <= call.count; t += 4) up_tile<4, COLUMNS>(call, t, c, b, u, rank, n);
  for (; t + 2 <= call.count; t += 2) up_tile<2, COLUMNS>(call, t, c, b, u, rank, n);
  if (t < call.count) up_tile<1, COLUMNS>(call, t, c, b, u, rank, n);
}

// y[row][0..n) += sum over r of u[row][r] * b_r[0..n). b: [n / 16][rank][16].
static void lora_up(const LoraRows& call, const uint16_t* b, const float* u, int64_t rank, int64_t n) {
  int64_t c = 0;
  for (; c + 16 < n; c += 32) up_columns<2>(call, c, b + c * rank, u, rank, n - c);
  if (c < n) up_columns<1>(call, c, b + c * rank, u, rank, n - c);
}

#if !defined(__F16C__)
// Nearest half, ties to even; what does not fit becomes the largest half.
static uint16_t nearest_half(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (size >= 0x477fe000) return static_cast<uint16_t>(sign | 0x7bff);
  if (size < 0x38800000) {  // subnormal: a multiple of 2^-24
    float small;
    __builtin_memcpy(&small, &size, 4);
    small = small * 16777216.0f + 12582912.0f;
    __builtin_memcpy(&bits, &small, 4);
    return static_cast<uint16_t>(sign | (bits & 0x7fff));
  }
  return static_cast<uint16_t>(sign | (size + 0xfff + (size >> 13 & 1) - 0x38000000) >> 13);
}
#endif

static void to_half(const float* x, uint16_t* out, int64_t n) {
#if defined(__F16C__)
  for (int64_t i = 0; i < n; i += 8) {
    float part[8] = {};
    const int64_t left = n - i < 8 ? n - i : 8;
    for (int64_t j = 0; j < left; ++j) part[j] = x[i + j] > 65504.0f ? 65504.0f : x[i + j] < -65504.0f ? -65504.0f : x[i + j];
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(part), 0);
    __builtin_memcpy(out + i, &half, left * sizeof(uint16_t));
  }
#else
  for (int64_t i = 0; i < n; ++i) out[i] = nearest_half(x[i]);
#endif
}

static void table_dots_bfloat(const uint16_t* w, const float* x, int64_t rows, int64_t width, float* y, int64_t y_stride) {
  table_dots<BFloat>(reinterpret_cast<const BFloat*>(w), x, rows, width, y, y_stride);
}
