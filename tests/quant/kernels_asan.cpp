// Random shapes through every instruction set of this processor, against arithmetic in double. No Python: compiled by
// test_kernels_build.py with sanitizers, and for ARM. Every buffer has exactly the size the header promises to use.
// Usage: kernels_asan CASES SEED. Prints the sets it tried; exit code 1 and a line per failure otherwise.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "half.h"
#include "kernel_set.h"

using namespace pingjia;

namespace {

std::mt19937 rng;
int failures = 0;

int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(rng); }
double real() { return std::uniform_real_distribution<double>(-1, 1)(rng); }

struct Case {
  int bits, scale_bits;
  Nibbles order;
  int64_t n, m, group, t;
  bool bias, accumulate, fine;
};

Case random_case() {
  Case c;
  c.bits = between(0, 1) ? 4 : 8;
  c.order = between(0, 1) ? Nibbles::kEvenHigh : Nibbles::kEvenLow;
  c.n = between(1, 90), c.m = between(1, 300), c.t = between(0, 20);
  if (c.bits == 4) c.m += c.m % 2;
  c.group = between(0, 1) ? c.m : 32 << between(0, 2);
  c.scale_bits = between(0, 1) ? 16 : 32;
  c.bias = between(0, 1), c.accumulate = between(0, 1), c.fine = between(0, 1);
  return c;
}

void fail(const Case& c, const char* what, double got, double wanted) {
  ++failures;
  std::printf("%s: %s: bits %d order %d scale %d n %ld m %ld group %ld t %ld bias %d accumulate %d fine %d: %g, not %g\n",
              kernel_set().name, what, c.bits, static_cast<int>(c.order), c.scale_bits, static_cast<long>(c.n),
              static_cast<long>(c.m), static_cast<long>(c.group), static_cast<long>(c.t), c.bias, c.accumulate,
              c.fine, got, wanted);
}

int value_at(const Case& c, const std::vector<uint8_t>& plain, int64_t row, int64_t column) {
  if (c.bits == 8) return static_cast<int8_t>(plain[row * c.m + column]);
  const uint8_t byte = plain[row * (c.m / 2) + column / 2];
  const bool upper = (column % 2 == 0) == (c.order == Nibbles::kEvenHigh);
  const int nibble = upper ? byte >> 4 : byte & 0xf;
  return c.order == Nibbles::kEvenHigh ? (nibble ^ 8) - 8 : nibble - 8;
}

// Half precision of 2^-e, which is exact: the scales of a test.
uint16_t half_power(int e) { return static_cast<uint16_t>((15 - e) << 10); }

struct Scales {
  std::vector<float> wide;
  std::vector<uint16_t> half;
};

Scales random_scales(const Case& c) {
  Scales s;
  for (int64_t i = 0; i < scale_count(c.n, c.m, c.group); ++i) {
    const int e = static_cast<int>(between(0, 9));
    s.wide.push_back(std::ldexp(1.0f, -e)), s.half.push_back(half_power(e));
  }
  return s;
}

double weight_at(const Case& c, const std::vector<uint8_t>& plain, const Scales& s, int64_t row, int64_t column) {
  const int64_t groups = (c.m + c.group - 1) / c.group;
  return value_at(c, plain, row, column) * s.wide[(row / 16 * groups + column / c.group) * 16 + row % 16];
}

// The error that rounding x to 8 bits may cause: half a step per column, or a 254th of that; and float32 sums.
void check_row(const Case& c, const std::vector<double>& w, const float* x, double start, double got) {
  double wanted = start, bound = 1e-6;
  for (int64_t first = 0; first < c.m; first += kActGroup) {
    double largest = 0, weights = 0;
    for (int64_t i = first; i < std::min(first + kActGroup, c.m); ++i) {
      wanted += w[i] * x[i];
      largest = std::max(largest, std::fabs(static_cast<double>(x[i]))), weights += std::fabs(w[i]);
    }
    bound += weights * largest * (0.5 / 127 / (c.fine ? 254 : 1) + 1e-6);
  }
  if (!(std::fabs(got - wanted) <= bound + 1e-5 * std::fabs(wanted))) fail(c, "product", got, wanted);
}

void check(const Case& c) {
  std::vector<uint8_t> plain(c.n * c.m * c.bits / 8), back(plain.size());
  for (uint8_t& byte : plain) byte = static_cast<uint8_t>(between(0, 255));
  std::vector<uint8_t> tiles(tile_bytes(c.bits, c.n, c.m));
  pack_tiles(c.bits, c.order, c.n, c.m, plain.data(), tiles.data());
  unpack_tiles(c.bits, c.order, c.n, c.m, tiles.data(), back.data());
  if (plain != back) fail(c, "unpack", 0, 0);

  const Scales s = random_scales(c);
  std::vector<float> bias(c.n), x(c.t * c.m), y(c.t * c.n, 0.5f), wide(c.n * c.m);
  for (float& b : bias) b = static_cast<float>(real());
  for (float& v : x) v = static_cast<float>(real() * std::pow(10.0, between(-3, 1)));
  const void* scales = c.scale_bits == 32 ? static_cast<const void*>(s.wide.data()) : s.half.data();
  const Matrix w = {c.bits, c.n, c.m, c.group, tiles.data(), scales, c.scale_bits, c.bias ? bias.data() : nullptr};
  std::vector<int64_t> ids(c.n);
  for (int64_t i = 0; i < c.n; ++i) ids[i] = c.n - 1 - i;
  dequantize_rows(w, ids.data(), c.n, wide.data(), c.m);

  static const QuantRowsPtr rows = new_quant_rows();
  quantize_activations(x.data(), c.t, c.m, c.m, *rows, c.fine);
  matmul(w, *rows, y.data(), c.n, c.accumulate);
  std::vector<double> row(c.m);
  for (int64_t n = 0; n < c.n; ++n) {
    for (int64_t m = 0; m < c.m; ++m) {
      row[m] = weight_at(c, plain, s, n, m);
      if (wide[(c.n - 1 - n) * c.m + m] != row[m]) fail(c, "row", wide[(c.n - 1 - n) * c.m + m], row[m]);
    }
    const double start = (c.bias ? bias[n] : 0) + (c.accumulate ? 0.5 : 0);
    for (int64_t t = 0; t < c.t; ++t) check_row(c, row, x.data() + t * c.m, start, y[t * c.n + n]);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 50;
  const std::string names = std::string(kernel_set_names()) + ",";
  for (size_t first = 0, comma; (comma = names.find(',', first)) != std::string::npos; first = comma + 1) {
    const std::string name = names.substr(first, comma - first);
    if (!choose_kernel_set(name.c_str())) return std::printf("%s cannot be chosen\n", name.c_str()), 1;
    rng.seed(argc > 2 ? static_cast<unsigned>(std::atoi(argv[2])) : 0);
    for (int i = 0; i < cases && failures < 20; ++i) {
      set_num_threads(1 + i % 3);
      check(random_case());
    }
    std::printf("%s: %d cases\n", name.c_str(), cases);
  }
  return failures != 0;
}
