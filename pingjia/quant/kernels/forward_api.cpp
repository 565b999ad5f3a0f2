// The C ABI of the forward pass. Python fills the structs of forward.h in place (pingjia/engine/fused_abi.py).
#include <cstddef>

#include "forward.h"

#define PJ_API extern "C" __attribute__((visibility("default")))

using namespace pingjia;

// Python has a twin of each of these; should the compiler lay one out otherwise, nothing may start.
static_assert(sizeof(Matrix) == 64 && offsetof(Matrix, n) == 8 && offsetof(Matrix, tiles) == 32 &&
              offsetof(Matrix, scale_bits) == 48 && offsetof(Matrix, bias) == 56, "fused_abi.py: CMatrix");
static_assert(sizeof(Norm) == 24 && sizeof(Lora) == 40 && sizeof(Linear) == 24 && sizeof(LinearGroup) == 16, "fused_abi.py");
static_assert(sizeof(Piece) == 48 && sizeof(Step) == 96, "fused_abi.py");

namespace {

struct Forward {
  Network network;  // what it points to belongs to Python
  WorkspacePtr space = new_workspace();
};

}  // namespace

// Bytes of Layer and Network, for Python to compare with its own.
PJ_API int64_t pj_forward_layout() { return static_cast<int64_t>(sizeof(Layer) * 1000 + sizeof(Network)); }

PJ_API void* pj_forward_new(const Network* network) { return new Forward{*network}; }

PJ_API void pj_forward_free(void* forward) { delete static_cast<Forward*>(forward); }

// 1 when the step was computed; 0, and nothing was done, when a position lies outside the tables.
PJ_API int pj_forward_run(void* handle, const Step* step) {
  Forward* self = static_cast<Forward*>(handle);
  return forward(self->network, *step, *self->space);
}
