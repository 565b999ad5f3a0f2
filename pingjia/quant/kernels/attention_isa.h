// Attention of some query rows of one sequence over the pages of one key/value head. Included once per instruction set
// (pass_*.cpp).
//
// Keys are taken in blocks of about kBlockKeys, cut at fixed places of the sequence; every block gives its own maximum,
// sum and weighted values, and blocks are merged in order. So a row's result depends on its own keys only, in bits too:
// not on the piece it came in, nor on who shares the step.

// s[i][0..n) = q_i . k for n <= 16 keys of one page. k: [D, Z].
template <int ROWS, typename T>
static inline void score_rows(const float* q, int64_t d, const T* k, int64_t z, int64_t n, float* s, int64_t s_stride) {
  F16 acc[ROWS] = {};
  if (n == 16) {
    for (int64_t c = 0; c < d; ++c) {
      const F16 key = load(k + c * z);
      for (int i = 0; i < ROWS; ++i) acc[i] += q[i * d + c] * key;
    }
  } else {
    for (int64_t c = 0; c < d; ++c) {
      const F16 key = load_n(k + c * z, n);
      for (int i = 0; i < ROWS; ++i) acc[i] += q[i * d + c] * key;
    }
  }
  for (int i = 0; i < ROWS; ++i) store_n(s + i * s_stride, acc[i], n);
}

// Two pages of 16 keys together: twice the sums in flight where there are few rows.
template <int ROWS, typename T>
static inline void score_two(const float* q, int64_t d, const T* k0, const T* k1, float* s, int64_t s_stride) {
  F16 first[ROWS] = {}, second[ROWS] = {};
  for (int64_t c = 0; c < d; ++c) {
    const F16 a = load(k0 + c * 16), b = load(k1 + c * 16);
    for (int i = 0; i < ROWS; ++i) {
      first[i] += q[i * d + c] * a;
      second[i] += q[i * d + c] * b;
    }
  }
  for (int i = 0; i < ROWS; ++i) {
    store(s + i * s_stride, first[i]);
    store(s + i * s_stride + 16, second[i]);
  }
}

template <int ROWS, typename T>
static void score_block_rows(const BlockKeys& block, const float* q, int64_t d, int64_t z, float* s) {
  int64_t done = 0;
  if (z == 16 && ROWS <= 4) {
    for (; done + 32 <= block.num_keys; done += 32)
      score_two<ROWS>(q, d, (const T*)block.k[done / 16], (const T*)block.k[done / 16 + 1], s + done, block.stride);
  }
  while (done < block.num_keys) {
    const int64_t page = done / z, at = done % z;
    int64_t n = z - at < 16 ? z - at : 16;
    const T* k = (const T*)block.k[page] + at;
    score_rows<ROWS>(q, d, k, z, n, s + done, block.stride);
    done += n;
  }
}

template <typename T>
static void score_block(const BlockKeys& block, const float* q, int64_t rows, int64_t d, int64_t z, float* s) {
  int64_t r = 0;
#if defined(__AVX512F__)
  for (; r + 8 <= rows; r += 8) score_block_rows<8, T>(block, q + r * d, d, z, s + r * block.stride);
#endif
  for (; r + 4 <= rows; r += 4) score_block_rows<4, T>(block, q + r * d, d, z, s + r * block.stride);
  for (; r + 3 <= rows; r += 3) score_block_rows<3, T>(block, q + r * d, d, z, s + r * block.stride);
  for (; r + 2 <= rows; r += 2) score_block_rows<2, T>(block, q + r * d, d, z, s + r * block.stride);
  for (; r < rows; ++r) score_block_rows<1, T>(block, q + r * d, d, z, s + r * block.stride);
}

// o[i][c..c+16*COLS) = sum over keys of p[i][key] * v[key]
template <int ROWS, int COLS, typename T>
static inline void mix_rows(const BlockKeys& block, const float* p, int64_t d, int64_t z, int64_t c, int64_t tail,
                            float* o) {
  F16 acc[ROWS][COLS] = {};
  for (int64_t page = 0, key = 0; key < block.num_keys; ++page) {
    const T* v = (const T*)block.v[page] + c;
    const int64_t end = key + z < block.num_keys ? key + z : block.num_keys;
    for (; key < end; ++key, v += d) {
      for (int j = 0; j < COLS; ++j) {
        const F16 value = tail ? load_n(v + 16 * j, tail) : load(v + 16 * j);
        for (int i = 0; i < ROWS; ++i) acc[i][j] += p[i * block.stride + key] * value;
      }
    }
  }
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < COLS; ++j) {
      if (tail) store_n(o + i * d + c + 16 * j, acc[i][j], tail);
      else store(o + i * d + c + 16 * j, acc[i][j]);
    }
}

template <int ROWS, typename T>
static void mix_columns(const BlockKeys& block, const float* p, int64_t d, int64_t z, float* o) {
  int64_t c = 0;
#if defined(__AVX512F__)
  for (; c + 64 <= d; c += 64) mix_rows<ROWS, 4, T>(block, p, d, z, c, 0, o);
#endif
  for (; c + 32 <= d; c += 32) mix_rows<ROWS, 2, T>(block, p, d, z, c, 0, o);
  for (; c + 16 <= d; c += 16) mix_rows<ROWS, 1, T>(block, p, d, z, c, 0, o);
  if (c < d) mix_rows<ROWS, 1, T>(block, p, d, z, c, d - c, o);
}

template <typename T>
static void mix_block(const BlockKeys& block, const float* p, int64_t rows, int64_t d, int64_t z, float* o) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) mix_columns<4, T>(block, p + r * block.stride, d, z, o + r * d);
  for (; r + 3 <= rows; r += 3) mix_columns<3, T>(block, p + r * block.stride, d, z, o + r * d);
  for (; r + 2 <= rows; r += 2) mix_columns<2, T>(block, p + r * block.stride, d, z, o + r * d);
  for (; r < rows; ++r) mix_columns<1, T>(block, p + r * block.stride, d, z, o + r * d);
}

static void scale_scores(const float* const* scale, int64_t num_keys, int64_t z, float* s) {
  for (int64_t key = 0; key < num_keys; ++key) s[key] *= scale[key / z][key % z];
}

// Scores of one row -> e^(score - maximum); those from `visible` on become 0. Returns maximum and sum.
static void soften(float* s, int64_t num_keys, int64_t visible, float* maximum, float* sum) {
  const int64_t padded = (num_keys + 15) / 16 * 16;
  if (visible > num_keys) visible = num_keys;
  if (visible < 0) visible = 0;
  for (int64_t key = visible; key < padded; ++key) s[key] = kHidden;
  F16 top = splat(kHidden);
  for (int64_t key = 0; key < padded; key += 16) top = vmax(load(s + key), top);
  const float m = hmax(top);
  F16 total = {};
  for (int64_t key = 0; key < padded; key += 16) {
    const F16 score = load(s + key);
    const F16 e = score == splat(kHidden) ? splat(0.0f) : vexp(score - m);
    total += e;
    store(s + key, e);
  }
  *maximum = m;
  *sum = hsum(total);
}

// One block of keys for `rows` query rows: o [rows, D], maximum [rows], sum [rows] are overwritten.
template <typename T>
static void attend_block(const BlockKeys& block, const float* q, const int64_t* visible, int64_t rows, int64_t d,
                         int64_t z, float* s, float* o, float* maximum, float* sum) {
  score_block<T>(block, q, rows, d, z, s);
  for (int64_t r = 0; r < rows; ++r) {
    float* row = s + r * block.stride;
    if (sizeof(T) == 1) scale_scores(block.k_scale, block.num_keys, z, row);
    soften(row, block.num_keys, visible[r], maximum + r, sum + r);
    if (sizeof(T) == 1) scale_scores(block.v_scale, block.num_keys, z, row);
  }
  mix_block<T>(block, s, rows, d, z, o);
}

// Fold a block's result into what the blocks before it gave. The first call finds total 0 and top kHidden.
static void merge_block(const float* o, float maximum, float sum, int64_t d, float* total_o, float* top, float* total) {
  if (sum == 0.0f) return;  // nothing of this block is visible
  const float m = maximum > *top ? maximum : *top;
  const float keep = *total == 0.0f ? 0.0f : vexp(splat(*top - m))[0];
  const float add = vexp(splat(maximum - m))[0];
  int64_t c = 0;
  for (; c + 16 <= d; c += 16) store(total_o + c, load(total_o + c) * keep + load(o + c) * add);
  if (c < d) store_n(total_o + c, load_n(total_o + c, d - c) * keep + load_n(o + c, d - c) * add, d - c);
  *total = *total * keep + sum * add;
  *top = m;
}

static void attend(int64_t kind, const BlockKeys& block, const float* q, const int64_t* visible, int64_t rows, int64_t d,
                   int64_t z, float* s, float* o, float* maximum, float* sum) {
  if (kind == kKvInt8) return attend_block<int8_t>(block, q, visible, rows, d, z, s, o, maximum, sum);
  if (kind == kKvFloat16) return attend_block<uint16_t>(block, q, visible, rows, d, z, s, o, maximum, sum);
  attend_block<float>(block, q, visible, rows, d, z, s, o, maximum, sum);
}
