// The forward pass's own arithmetic with what every processor of this kind has (NEON on ARM).
#include "half.h"
#include "pass.h"

namespace pingjia {
namespace {

#include "vec_isa.h"
// (in this order)
#include "attention_isa.h"
#include "small_ops_isa.h"
#include "rounding_isa.h"
#include "pass_ops_isa.h"

}  // namespace

const PassOps* const kPassPortable = &kOps;

}  // namespace pingjia
