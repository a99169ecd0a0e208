// Shuffles in plain loops, for instruction sets that have none of their own here.

namespace graphprune {
namespace {

// 16 x 16 floats to their transpose, plus `residual` of the same place if there is one.
inline void transpose16(const float* from, int64_t stride, const float* residual, float* to, int64_t to_stride) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) {
      const float x = from[j * stride + i];
      to[i * to_stride + j] = residual == nullptr ? x : x + residual[i * to_stride + j];
    }
}

}  // namespace
}  // namespace graphprune
