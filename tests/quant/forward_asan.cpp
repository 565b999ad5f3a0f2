// Random small networks through the compiled forward pass, on every instruction set of this processor: a prompt whole and
// token by token must give the same bits, with adapters, every page size and number format. No Python: compiled by
// test_forward_asan.py with sanitizers. Every buffer has exactly the size the header promises to use.
// Usage: forward_asan CASES SEED. Exit code 1 and a line per failure.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "forward.h"
#include "kernel_set.h"

using namespace pingjia;

namespace {

std::mt19937 rng;

int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(rng); }

std::vector<float> floats(int64_t count, float spread) {
  std::vector<float> out(count);
  for (float& x : out) x = std::uniform_real_distribution<float>(-spread, spread)(rng);
  return out;
}

// Halves between -1 and 1: any sign, an exponent below that of 1, any mantissa.
std::vector<uint16_t> halves(int64_t count) {
  std::vector<uint16_t> out(count);
  for (uint16_t& x : out) x = static_cast<uint16_t>(between(0, 1) << 15 | between(8, 13) << 10 | between(0, 1023));
  return out;
}

struct Weights {
  std::vector<uint8_t> tiles;
  std::vector<float> scales, bias;
  Matrix matrix;
};

void fill(Weights& w, int64_t n, int64_t m) {
  const int bits = between(0, 1) ? 4 : 8;
  std::vector<uint8_t> plain(n * ((m * bits + 7) / 8));
  for (uint8_t& byte : plain) byte = static_cast<uint8_t>(between(0, 255));
  w.tiles.resize(tile_bytes(bits, n, m));
  pack_tiles(bits, Nibbles::kEvenLow, n, m, plain.data(), w.tiles.data());
  w.scales = floats(scale_count(n, m, m), 0.5f / static_cast<float>(m) / (bits == 4 ? 4 : 64));
  w.bias = floats(n, 0.1f);
  w.matrix = {bits, n, m, m, w.tiles.data(), w.scales.data(), 32, between(0, 1) ? w.bias.data() : nullptr};
}

struct Adapter {
  std::vector<uint16_t> a, b;
  Lora lora;
};

struct House {
  Network net{};
  std::vector<Layer> layers{2};
  std::vector<Weights> weights{9};
  std::vector<Adapter> adapters{8};
  std::vector<Linear> linears{8};
  std::vector<float> norm, norm_bias, cos, sin, table;
  std::vector<std::vector<char>> pages;
  std::vector<std::vector<float>> scales;
  int64_t num_pages = 12;

  void add_linear(int64_t at, int64_t n, int64_t m) {
    fill(weights[at], n, m);
    Adapter& adapter = adapters[at];
    const int64_t rank = 4 * between(1, 3);
    adapter.a = halves(rank * ((m + 15) / 16 * 16)), adapter.b = halves(rank * ((n + 15) / 16 * 16));
    adapter.lora = {0, rank, adapter.a.data(), adapter.b.data(), 0.01};
    linears[at] = {&weights[at].matrix, &adapter.lora, between(0, 1)};
  }

  House() {
    net.head_dim = 4 * between(1, 12), net.num_kv_heads = between(1, 3), net.num_heads = net.num_kv_heads * between(1, 5);
    net.hidden = 2 * between(8, 40), net.inner = 2 * between(8, 50), net.vocab = between(3, 60), net.num_layers = 2;
    net.rope = between(0, 2), net.num_frequencies = net.head_dim / (net.rope == kRopeHalves ? 2 : 4);
    net.num_positions = 64, net.activation = between(0, 1), net.residual = between(0, 1) * 2.0, net.scaling = 0.3;
    net.page_size = between(0, 1) ? 16 : between(8, 24), net.kv_kind = between(0, 2), net.qk_eps = 1e-5;
    const int64_t wide = net.num_heads * net.head_dim, narrow = net.num_kv_heads * net.head_dim;
    net.qkv_width = wide + 2 * narrow, net.q_stride = net.k_stride = net.v_stride = net.head_dim;
    net.k_offset = wide, net.v_offset = wide + narrow;
    cos = floats(64 * net.num_frequencies, 1), sin = floats(64 * net.num_frequencies, 1);
    net.cos = cos.data(), net.sin = sin.data();
    norm = floats(std::max(net.hidden, net.head_dim), 1), norm_bias = norm;
    net.last_norm = {norm.data(), between(0, 1) ? norm_bias.data() : nullptr, 1e-5};
    add_linear(0, wide, net.hidden), add_linear(1, narrow, net.hidden), add_linear(2, narrow, net.hidden);
    add_linear(3, net.hidden, wide), add_linear(4, net.inner, net.hidden), add_linear(5, net.inner, net.hidden);
    add_linear(6, net.hidden, net.inner);
    fill(weights[8], net.vocab, net.hidden);
    table = floats(net.vocab * net.hidden, 1);
    net.hidden % 16 || between(0, 1) ? void(net.head = &weights[8].matrix) : void(net.head_table = table.data());
    for (Layer& layer : layers) add_layer(layer);
    net.layers = layers.data();
  }

  void add_layer(Layer& layer) {
    layer = {};
    layer.attention_norm = layer.mlp_norm = net.last_norm;
    layer.qkv = {&linears[0], 3}, layer.out = {&linears[3], 1}, layer.down = {&linears[6], 1};
    layer.up = {&linears[4], net.activation == kSwiGlu ? 2 : 1};
    if (between(0, 1)) layer.q_norm = layer.k_norm = norm.data();
    const int64_t heads = num_pages * net.num_kv_heads * net.page_size, size = net.kv_kind == kKvFloat32 ? 4 : 3 - net.kv_kind;
    for (void** to : {&layer.k_pages, &layer.v_pages}) {
      pages.emplace_back(heads * net.head_dim * size);
      *to = pages.back().data();
    }
    for (float** to : {&layer.k_scales, &layer.v_scales}) {
      scales.emplace_back(heads);
      *to = scales.back().data();
    }
  }

  // Logits after tokens first..last-1 of a sequence on `pages_of`; adapter 0 or none.
  std::vector<float> run(const std::vector<float>& x, const std::vector<int32_t>& pages_of, int64_t first, int64_t last,
                         int64_t adapter) {
    std::vector<float> rows(x.begin() + first * net.hidden, x.begin() + last * net.hidden);
    std::vector<int32_t> positions(2 * (last - first)), outputs{static_cast<int32_t>(last - first - 1)};
    for (int64_t t = 0; t < last - first; ++t) positions[t] = positions[last - first + t] = static_cast<int32_t>(first + t);
    std::vector<float> hidden(net.hidden), logits(net.vocab);
    int32_t best, finite;
    const Piece piece = {0, last - first, first, 0, 0, adapter};
    const Step step = {last - first, 1, 1, rows.data(), positions.data(), &piece, pages_of.data(), outputs.data(),
                       hidden.data(), logits.data(), &best, &finite};
    static WorkspacePtr space = new_workspace();
    if (!forward(net, step, *space) || !finite) std::printf("not computed, or not a number\n"), std::exit(1);
    return logits;
  }
};

bool passes() {
  House house;
  const int64_t length = between(1, 60);
  const std::vector<float> x = floats(length * house.net.hidden, 1);
  const std::vector<int32_t> one = {3, 0, 7, 2, 9, 11, 5, 1}, two = {8, 4, 6, 10, 3, 0, 7, 2};
  const int64_t adapter = between(-1, 0);
  const std::vector<float> whole = house.run(x, one, 0, length, adapter);
  std::vector<float> last;
  for (int64_t at = 0; at < length;) {
    const int64_t stop = std::min(at + between(1, 5), length);
    last = house.run(x, two, at, stop, adapter), at = stop;
  }
  return std::memcmp(whole.data(), last.data(), whole.size() * sizeof(float)) == 0;
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 20;
  int failures = 0;
  std::string names = kernel_set_names();
  for (size_t at = 0; at != std::string::npos;) {
    const size_t comma = names.find(',', at);
    const std::string name = names.substr(at, comma == std::string::npos ? comma : comma - at);
    at = comma == std::string::npos ? comma : comma + 1;
    choose_kernel_set(name.c_str());
    rng.seed(argc > 2 ? std::atoi(argv[2]) : 0);
    for (int i = 0; i < cases; ++i)
      if (!passes()) std::printf("%s: case %d: pieces differ from the whole\n", name.c_str(), i), ++failures;
    std::printf("%s done\n", name.c_str());
  }
  return failures != 0;
}
