// Half precision to float, for code without an instruction for it.
#pragma once

#include <cstdint>
#include <cstring>

namespace pingjia {
namespace {

inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, magnitude = half & 0x7fff;
  uint32_t bits = (magnitude << 13) + 0x38000000;              // rebias the exponent: 127 - 15
  if (magnitude >= 0x7c00) bits = (magnitude << 13) | 0x7f800000;  // infinity, NaN
  float value;
  if (magnitude < 0x0400) {  // zero and subnormals: a multiple of 2^-24
    value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &value, 4);
  }
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
}

}  // namespace
}  // namespace pingjia
