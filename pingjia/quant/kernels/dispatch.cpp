// Which instruction set is used, decided once when first asked: what the processor has, unless PINGJIA_KERNELS names one.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "kernel_set.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace pingjia {
namespace {

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }

// Leaf 7.1, EAX bit 4: older compilers have no name for it.
bool has_avx_vnni() {
  unsigned a = 7, b, c = 1, d;
  if (!has_avx2() || __builtin_cpu_supports("avx2") == 0) return false;
  asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return (a >> 4 & 1) != 0;
}

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}
#endif

#if defined(__aarch64__)
bool has_dot_product() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) & (1UL << 20)) != 0;  // HWCAP_ASIMDDP
#else
  return true;  // every Apple processor of this kind
#endif
}
#endif

// Those this processor has, best first.
int usable(const KernelSet* (&out)[6]) {
  int count = 0;
  const auto add = [&](const KernelSet* set, bool has) { if (set && has) out[count++] = set; };
#if defined(__x86_64__)
  add(kAvx512, has_avx512());
  add(kAvxVnni, has_avx_vnni());
  add(kAvx2, has_avx2());
#elif defined(__aarch64__)
  add(kNeonDot, has_dot_product());
  add(kNeon, true);
#endif
  add(kPortable, true);
  return count;
}

std::atomic<const KernelSet*> chosen{nullptr};

}  // namespace

bool choose_kernel_set(const char* name) {
  const KernelSet* found[6] = {};
  const int count = usable(found);
  for (int i = 0; i < count; ++i)
    if (std::strcmp(found[i]->name, name) == 0) return chosen.store(found[i]), true;
  return false;
}

const KernelSet& kernel_set() {
  if (const KernelSet* known = chosen.load(std::memory_order_acquire)) return *known;
  const char* asked = std::getenv("PINGJIA_KERNELS");
  if (!asked || !choose_kernel_set(asked)) {
    const KernelSet* found[6] = {};
    usable(found);
    chosen.store(found[0]);
  }
  return *chosen.load();
}

Isa isa() { return kernel_set().isa; }

const char* kernel_set_names() {
  static char names[96];
  const KernelSet* found[6] = {};
  const int count = usable(found);
  names[0] = 0;
  for (int i = 0; i < count; ++i) {
    if (i) std::strcat(names, ",");
    std::strcat(names, found[i]->name);
  }
  return names;
}

}  // namespace pingjia
