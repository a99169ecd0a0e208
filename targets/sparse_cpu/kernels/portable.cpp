// Any CPU: vectors of four floats, which the compiler maps to what there is.
#include "linear.h"

#define LANES 4
#define WIDTH 2
#include "vectors.inl"
#include "plain.inl"

namespace graphprune {
namespace {

// Integer sums of one block row over 64 tokens, in their order.
template <int R>
void sum_groups(const uint8_t* panel, const int8_t* values, const uint16_t* columns, int64_t groups, int32_t (&sums)[R][kPanel]) {
  int32_t placed[R][kPanel] = {};
  for (int64_t k = 0; k < groups * kGroup; ++k) {
    const uint8_t* x = panel + static_cast<size_t>(columns[k]) * kPanel;
    for (int r = 0; r < R; ++r) {
      const int32_t weight = values[(k / kGroup * R + r) * kGroup + k % kGroup];
      for (int p = 0; p < kPanel; ++p) placed[r][p] += weight * x[p];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < kPanel; ++t) sums[r][t] = placed[r][byte_place(t)];
}

}  // namespace
}  // namespace graphprune

#include "kernels.inl"

namespace graphprune {
const Kernels& portable_kernels() {
  static const Kernels kernels{"portable", pack, pack_bytes, linear, integer_linear};
  return kernels;
}
}  // namespace graphprune
