// AVX-512: 16 floats a register, products of bytes four at a time by VNNI.
#include "linear.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma"
#include "begin_target.inl"
#define LANES 16
#define WIDTH 4
#include "vectors.inl"

namespace graphprune {
namespace {

// 16 x 16 floats to their transpose, plus `residual` of the same place if there is one.
inline void transpose16(const float* from, int64_t stride, const float* residual, float* to, int64_t to_stride) {
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(from + i * stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(b[i]), _mm512_castps_pd(b[i + 2])));
    a[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(b[i]), _mm512_castps_pd(b[i + 2])));
    a[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(b[i + 1]), _mm512_castps_pd(b[i + 3])));
    a[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(b[i + 1]), _mm512_castps_pd(b[i + 3])));
  }
  // a[4 q + c] has, in quarter l, rows 4 q to 4 q + 3 of column 4 l + c.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 low = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x88), high = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xdd);
    const __m512 low2 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x88), high2 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xdd);
    b[c] = _mm512_shuffle_f32x4(low, low2, 0x88);
    b[8 + c] = _mm512_shuffle_f32x4(low, low2, 0xdd);
    b[4 + c] = _mm512_shuffle_f32x4(high, high2, 0x88);
    b[12 + c] = _mm512_shuffle_f32x4(high, high2, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    const __m512 x = residual == nullptr ? b[i] : _mm512_add_ps(b[i], _mm512_loadu_ps(residual + i * to_stride));
    _mm512_storeu_ps(to + i * to_stride, x);
  }
}

// 64 integers from 0 to 255 as bytes in the order of `byte_place`: both instructions take turns every 16 bytes.
inline void store_bytes(const Ints (&whole)[kPanel / LANES], uint8_t* to) {
  const __m512i first = _mm512_packs_epi32((__m512i)whole[0], (__m512i)whole[1]);
  const __m512i second = _mm512_packs_epi32((__m512i)whole[2], (__m512i)whole[3]);
  _mm512_storeu_si512(to, _mm512_packus_epi16(first, second));
}

// _mm512_dpbusd_epi32, for which GCC 12 copies the sum to another register and back.
inline void add_products(__m512i& sum, __m512i x, __m512i weight) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(weight)); }

// One block row over 64 tokens, in their order: four columns unpack into four registers of four bytes a token.
template <int R>
__attribute__((noinline)) void sum_groups(const uint8_t* panel, const int8_t* values, const uint16_t* columns, int64_t groups, const Rescale& rescale,
                       float* sums) {
  __m512i sum[R][4];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[r][j] = _mm512_setzero_si512();
  for (int64_t g = 0; g < groups; ++g) {
    const uint16_t* c = columns + g * kGroup;
    const __m512i x0 = _mm512_loadu_si512(panel + size_t{c[0]} * kPanel), x1 = _mm512_loadu_si512(panel + size_t{c[1]} * kPanel);
    const __m512i x2 = _mm512_loadu_si512(panel + size_t{c[2]} * kPanel), x3 = _mm512_loadu_si512(panel + size_t{c[3]} * kPanel);
    const __m512i low01 = _mm512_unpacklo_epi8(x0, x1), high01 = _mm512_unpackhi_epi8(x0, x1);
    const __m512i low23 = _mm512_unpacklo_epi8(x2, x3), high23 = _mm512_unpackhi_epi8(x2, x3);
    const __m512i x[4] = {_mm512_unpacklo_epi16(low01, low23), _mm512_unpackhi_epi16(low01, low23),
                          _mm512_unpacklo_epi16(high01, high23), _mm512_unpackhi_epi16(high01, high23)};
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      int32_t four;
      __builtin_memcpy(&four, values + (g * R + r) * kGroup, 4);
      const __m512i weight = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) add_products(sum[r][j], x[j], weight);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) store(sums + r * kPanel + 16 * j, rescale((Ints)sum[r][j], r));
}

}  // namespace
}  // namespace graphprune

#include "kernels.inl"
#include "attention.inl"

namespace graphprune {
namespace {

// Pairs of bfloat16, for CPUs that have AVX512_BF16 too: written out, so that the rest of this file does not need it.
struct Pairs {
  static constexpr int size = 2;

  static void add_products(Floats& sum, Floats values, Floats x) { asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(values), "v"(x)); }

  static __m256i rounded(Floats x) {
    __m256i halves;
    asm("vcvtneps2bf16 %1, %0" : "=v"(halves) : "v"(x));
    return halves;
  }

  static Floats join(Floats first, Floats second) {
    const __m512i low = _mm512_cvtepu16_epi32(rounded(first)), high = _mm512_cvtepu16_epi32(rounded(second));
    return (Floats)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }

  static void narrow(float* row, int64_t count) {
    for (int64_t t = 0; t < count; t += LANES) _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + t / 2), rounded(load(row + t)));
  }
};

}  // namespace

const Kernels& avx512_kernels() {
  static const bool pairs = __builtin_cpu_supports("avx512bf16");
  static const Kernels kernels{"avx512", pack, pack_bytes, linear, integer_linear, attention<Singles>, pairs ? attention<Pairs> : attention<Singles>};
  return kernels;
}
}  // namespace graphprune
#include "end_target.inl"
#endif
