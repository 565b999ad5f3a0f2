// The forward pass's own arithmetic with AVX-512.
#include "half.h"
#include "pass.h"

#if defined(__AVX512F__)
#include <immintrin.h>

namespace pingjia {
namespace {

#include "vec_isa.h"
// (in this order)
#include "attention_isa.h"
#include "small_ops_isa.h"
#include "rounding_isa.h"
#include "pass_ops_isa.h"

}  // namespace

const PassOps* const kPassAvx512 = &kOps;

}  // namespace pingjia
#else
namespace pingjia {
const PassOps* const kPassAvx512 = nullptr;
}
#endif
