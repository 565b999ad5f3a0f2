// Rounding weights to few bits, sixteen rows at a time. Included once per instruction set (pass_*.cpp).

// To the nearest integer, halves to even, for |x| below 2^22.
static inline F16 nearest(F16 x) { return (x + 12582912.0f) - 12582912.0f; }

static inline F16 clamped(F16 x, F16 low, F16 high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

static inline F16 or_one(F16 scale) { return scale == 0.0f ? splat(1.0f) : scale; }

// Sixteen rows of a block through the columns, each making up for the errors of those before it.
static void round_rows16(const RoundBlock& b, int64_t row) {
  const F16 low = splat(b.low), high = splat(b.high);
  const int64_t n = b.num_rows;
  for (int64_t j = 0; j < b.num_columns; ++j) {
    const float* root = b.root + j * b.num_columns;  // column j of R
    F16 owed = load(b.owed + j * n + row), more = {};
    int64_t k = 0;
    for (; k + 2 <= j; k += 2) {
      owed += load(b.errors + k * n + row) * root[k];
      more += load(b.errors + (k + 1) * n + row) * root[k + 1];
    }
    if (k < j) owed += load(b.errors + k * n + row) * root[k];
    const F16 weight = load(b.weights + j * n + row), scale = load(b.scales + j * n + row);
    const F16 value = nearest(clamped((weight + (owed + more) / root[j]) / or_one(scale), low, high));
    store(b.values + j * n + row, value);
    store(b.errors + j * n + row, weight - value * scale);
  }
}

// What rounding to multiples of `scale` loses, squares weighted by the columns' importance.
static inline F16 loss_of(const ScaleSearch& s, int64_t row, F16 scale) {
  const F16 divisor = or_one(scale), low = splat(s.low), high = splat(s.high);
  F16 loss = {};
  for (int64_t c = 0; c < s.num_columns; ++c) {
    const F16 target = load(s.targets + c * s.num_rows + row);
    const F16 off = nearest(clamped(target / divisor, low, high)) * scale - target;
    loss += off * off * s.importance[c];
  }
  return loss;
}

static inline F16 as_half(F16 scale) {
  float full[16];
  uint16_t half[16];
  store(full, scale);
  to_half(full, half, 16);
  return load(half);
}

// Where this scale loses less than the best so far, it becomes the best.
static inline void try_scale(const ScaleSearch& s, int64_t row, F16 scale, F16& best, F16& least) {
  scale = as_half(scale);
  const F16 loss = loss_of(s, row, scale);
  best = loss < least ? scale : best;
  least = loss < least ? loss : least;
}

// The scale that fits the integers which `scale` gave, by least squares.
static inline F16 fitted(const ScaleSearch& s, int64_t row, F16 scale) {
  const F16 divisor = or_one(scale), low = splat(s.low), high = splat(s.high);
  F16 products = {}, squares = {};
  for (int64_t c = 0; c < s.num_columns; ++c) {
    const F16 target = load(s.targets + c * s.num_rows + row), value = nearest(clamped(target / divisor, low, high));
    products += value * s.importance[c] * target;
    squares += value * s.importance[c] * value;
  }
  return products / or_one(squares);
}

static void search_scales16(const ScaleSearch& s, int64_t row) {
  F16 largest = {};
  for (int64_t c = 0; c < s.num_columns; ++c) {
    const F16 target = load(s.targets + c * s.num_rows + row);
    largest = vmax(target, vmax(-target, largest));
  }
  F16 best = {}, least = splat(__builtin_inff());
  for (int64_t i = 0; i < s.num_ratios; ++i) try_scale(s, row, largest / -s.low * s.ratios[i], best, least);
  try_scale(s, row, fitted(s, row, best), best, least);
  store(s.best + row, best);
}
