// The C ABI that Python calls by ctypes: plain pointers and integers, no exceptions, nothing allocated for the caller.
#include "kernel_set.h"

#define PJ_API extern "C" __attribute__((visibility("default")))

using namespace pingjia;

namespace {

// As ctypes passes it; the same fields as Matrix with fixed sizes.
struct CMatrix {
  int32_t bits, scale_bits;
  int64_t n, m, group;
  const uint8_t* tiles;
  const void* scales;
  const float* bias;

  Matrix matrix() const { return {bits, n, m, group, tiles, scales, scale_bits, bias}; }
};

QuantRows& own_rows() {
  thread_local QuantRowsPtr rows = new_quant_rows();
  return *rows;
}

}  // namespace

PJ_API int pj_version() { return 3; }
PJ_API const char* pj_isa() { return kernel_set().name; }
PJ_API const char* pj_isa_names() { return kernel_set_names(); }
PJ_API int pj_choose_isa(const char* name) { return choose_kernel_set(name); }
PJ_API int pj_num_threads() { return num_threads(); }
PJ_API void pj_set_num_threads(int count) { set_num_threads(count); }
PJ_API int64_t pj_tile_bytes(int bits, int64_t n, int64_t m) { return tile_bytes(bits, n, m); }
PJ_API int64_t pj_scale_count(int64_t n, int64_t m, int64_t group) { return scale_count(n, m, group); }

PJ_API void pj_pack(int bits, int order, int64_t n, int64_t m, const uint8_t* plain, uint8_t* tiles) {
  pack_tiles(bits, static_cast<Nibbles>(order), n, m, plain, tiles);
}

PJ_API void pj_unpack(int bits, int order, int64_t n, int64_t m, const uint8_t* tiles, uint8_t* plain) {
  unpack_tiles(bits, static_cast<Nibbles>(order), n, m, tiles, plain);
}

PJ_API void pj_rows(const CMatrix* w, const int64_t* ids, int64_t count, float* out, int64_t out_stride) {
  dequantize_rows(w->matrix(), ids, count, out, out_stride);
}

PJ_API void pj_matmul(const CMatrix* w, const float* x, int64_t t, int64_t x_stride, int fine, float* y,
                      int64_t y_stride) {
  quantize_activations(x, t, w->m, x_stride, own_rows(), fine != 0);
  matmul(w->matrix(), own_rows(), y, y_stride);
}

PJ_API uint64_t pj_read_all(const void* at, int64_t bytes) { return read_all(at, bytes); }
