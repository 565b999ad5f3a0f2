// Which instruction set this process uses: what the processor has, unless PINGJIA_KERNELS or a test chose less.
#pragma once

#if defined(__x86_64__)
#define PINGJIA_X86 1
#endif

namespace pingjia {

// kAvxVnni is AVX2 with one instruction more: what has no form for it uses that for AVX2.
enum class Isa { kPortable, kAvx2, kAvxVnni, kAvx512, kNeon, kNeonDot };

Isa isa();

}  // namespace pingjia
