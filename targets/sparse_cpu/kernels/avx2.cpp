// AVX2 and FMA: 8 floats a register. Bytes are widened to 16 bits, whose products add up in 32 bits without loss.
#include "linear.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET "avx2,fma"
#include "begin_target.inl"
#define LANES 8
#define WIDTH 2
#include "vectors.inl"
#include "plain.inl"

namespace graphprune {
namespace {

// 64 integers from 0 to 255 as bytes in the order of `byte_place`: both instructions take turns every 16 bytes.
inline void store_bytes(const Ints (&whole)[kPanel / LANES], uint8_t* to) {
  for (int odd = 0; odd < 2; ++odd) {
    const __m256i first = _mm256_packs_epi32((__m256i)whole[odd], (__m256i)whole[2 + odd]);
    const __m256i second = _mm256_packs_epi32((__m256i)whole[4 + odd], (__m256i)whole[6 + odd]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to) + odd, _mm256_packus_epi16(first, second));
  }
}

// One block row over 64 tokens, in their order; see linear.h for the order of bytes.
template <int R>
inline void sum_groups(const uint8_t* panel, const int8_t* values, const uint16_t* columns, int64_t groups, const Rescale& rescale,
                       float* sums) {
  for (int place = 0; place < kPanel; place += 16) {
    __m256i sum[R][2];
    for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
    for (int64_t g = 0; g < groups; ++g) {
      for (int half = 0; half < 2; ++half) {
        const uint16_t* pair = columns + g * kGroup + half * 2;
        const __m256i a = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(panel + size_t{pair[0]} * kPanel + place)));
        const __m256i b = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(panel + size_t{pair[1]} * kPanel + place)));
        const __m256i low = _mm256_unpacklo_epi16(a, b), high = _mm256_unpackhi_epi16(a, b);
        for (int r = 0; r < R; ++r) {
          const int8_t* w = values + (g * R + r) * kGroup + half * 2;
          const __m256i weight = _mm256_set1_epi32((static_cast<int32_t>(w[1]) << 16) | (static_cast<int32_t>(w[0]) & 0xffff));
          sum[r][0] = _mm256_add_epi32(sum[r][0], _mm256_madd_epi16(low, weight));
          sum[r][1] = _mm256_add_epi32(sum[r][1], _mm256_madd_epi16(high, weight));
        }
      }
    }
    // Register 0 has places 0-3 and 8-11, register 1 has 4-7 and 12-15; place 4 j of a sixteen is token 16 j of each quarter.
    for (int r = 0; r < R; ++r)
      for (int half = 0; half < 2; ++half) {
        const __m256 x = (__m256)rescale((Ints)sum[r][half], r);
        float* to = sums + r * kPanel + place / 4 + half * 16;
        _mm_storeu_ps(to, _mm256_castps256_ps128(x));
        _mm_storeu_ps(to + 32, _mm256_extractf128_ps(x, 1));
      }
  }
}

}  // namespace
}  // namespace graphprune

#include "kernels.inl"
#include "attention.inl"

namespace graphprune {
const Kernels& avx2_kernels() {
  static const Kernels kernels{"avx2", pack, pack_bytes, linear, integer_linear, attention<Singles>, attention<Singles>};
  return kernels;
}
}  // namespace graphprune
#include "end_target.inl"
#endif
