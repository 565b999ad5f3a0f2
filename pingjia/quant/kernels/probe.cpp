// How fast this machine reads memory: the limit of a product with one token. For benchmarks.
#include <atomic>

#include "kernels.h"

namespace pingjia {
namespace {

constexpr int64_t kPiece = 64 * 1024, kAhead = 4096;

uint64_t sum_piece(const uint64_t* at, int64_t words) {
  uint64_t sums[8] = {};
  for (int64_t i = 0; i + 8 <= words; i += 8) {
    __builtin_prefetch(at + i + kAhead / 8);
    for (int k = 0; k < 8; ++k) sums[k] += at[i + k];
  }
  uint64_t total = 0;
  for (uint64_t sum : sums) total += sum;
  return total;
}

}  // namespace

uint64_t read_all(const void* at, int64_t bytes) {
  std::atomic<uint64_t> total{0};
  const int64_t pieces = bytes / kPiece;
  parallel_for(pieces, 8, [&](int64_t first, int64_t last) {
    total += sum_piece(static_cast<const uint64_t*>(at) + first * (kPiece / 8), (last - first) * (kPiece / 8));
  });
  return total;
}

}  // namespace pingjia
