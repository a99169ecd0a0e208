// Which kernels run here.
#include <cstdlib>
#include <cstring>

#include "linear.h"

namespace graphprune {
namespace {

bool runs(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (std::strcmp(name, "avx2") == 0) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (std::strcmp(name, "avx512") == 0) return avx512 && __builtin_cpu_supports("avx512vnni");
#endif
  return std::strcmp(name, "portable") == 0;
}

}  // namespace

const Kernels* find_kernels(const char* name) {
  if (name == nullptr || *name == '\0') name = runs("avx512") ? "avx512" : runs("avx2") ? "avx2" : "portable";
  if (!runs(name)) return nullptr;
#if defined(__x86_64__)
  if (std::strcmp(name, "avx512") == 0) return &avx512_kernels();
  if (std::strcmp(name, "avx2") == 0) return &avx2_kernels();
#endif
  return &portable_kernels();
}

}  // namespace graphprune
