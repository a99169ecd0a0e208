// Any CPU: vectors of four floats, which the compiler maps to what there is.
#include "linear.h"

#define LANES 4
#define WIDTH 2
#include "vectors.inl"
#include "plain.inl"

namespace graphprune {
namespace {

// 64 integers from 0 to 255 as bytes in the order of `byte_place`.
inline void store_bytes(const Ints (&whole)[kPanel / LANES], uint8_t* to) {
  for (int t = 0; t < kPanel; ++t) to[byte_place(t)] = static_cast<uint8_t>(whole[t / LANES][t % LANES]);
}

// One block row over 64 tokens, in their order.
template <int R>
void sum_groups(const uint8_t* panel, const int8_t* values, const uint16_t* columns, int64_t groups, const Rescale& rescale, float* sums) {
  int32_t placed[R][kPanel] = {};
  for (int64_t k = 0; k < groups * kGroup; ++k) {
    const uint8_t* x = panel + static_cast<size_t>(columns[k]) * kPanel;
    for (int r = 0; r < R; ++r) {
      const int32_t weight = values[(k / kGroup * R + r) * kGroup + k % kGroup];
      for (int p = 0; p < kPanel; ++p) placed[r][p] += weight * x[p];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < kPanel; t += LANES) {
      Ints sum;
      for (int i = 0; i < LANES; ++i) sum[i] = placed[r][byte_place(t + i)];
      store(sums + r * kPanel + t, rescale(sum, r));
    }
}

}  // namespace
}  // namespace graphprune

#include "kernels.inl"
#include "attention.inl"

namespace graphprune {
const Kernels& portable_kernels() {
  static const Kernels kernels{"portable", pack, pack_bytes, linear, integer_linear, attention<Singles>, attention<Singles>};
  return kernels;
}
}  // namespace graphprune
