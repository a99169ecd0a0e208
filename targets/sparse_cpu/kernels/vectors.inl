// Vectors of LANES floats, by the extension that GCC and clang share, and the functions of them that the kernels need.

namespace graphprune {
namespace {

using Floats = float __attribute__((vector_size(4 * LANES)));
using Ints = int32_t __attribute__((vector_size(4 * LANES)));
using FloatsAnywhere = float __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
using BytesAnywhere = uint8_t __attribute__((vector_size(LANES), aligned(1), may_alias));

inline Floats load(const float* from) { return *reinterpret_cast<const FloatsAnywhere*>(from); }
inline void store(float* to, Floats x) { *reinterpret_cast<FloatsAnywhere*>(to) = x; }
inline Floats fill(float x) { return x - Floats{}; }

// The second where one is not a number.
#if LANES == 16
inline Floats largest(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats smallest(Floats a, Floats b) { return _mm512_min_ps(a, b); }
#elif LANES == 8
inline Floats largest(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats smallest(Floats a, Floats b) { return _mm256_min_ps(a, b); }
#else
inline Floats largest(Floats a, Floats b) { return a > b ? a : b; }
inline Floats smallest(Floats a, Floats b) { return a < b ? a : b; }
#endif

inline float largest_of(Floats x) {
#if LANES == 16
  return _mm512_reduce_max_ps(x);
#else
  float found = x[0];
  for (int i = 1; i < LANES; ++i) found = x[i] > found ? x[i] : found;
  return found;
#endif
}

inline float sum_of(Floats x) {
#if LANES == 16
  return _mm512_reduce_add_ps(x);
#else
  float sum = 0.0f;
  for (int i = 0; i < LANES; ++i) sum += x[i];
  return sum;
#endif
}

// The next whole number, half to even; x within 2^22 of 0.
inline Ints nearest(Floats x) {
#if LANES == 16
  return (Ints)_mm512_cvtps_epi32(x);
#elif LANES == 8
  return (Ints)_mm256_cvtps_epi32(x);
#else
  const Floats magic = fill(12582912.0f);  // 1.5 * 2^23: what lies behind the point falls away
  return __builtin_convertvector((x + magic) - magic, Ints);
#endif
}

// Integer sums to floats: (sum - correction) * scale + bias, each operation rounded.
struct Rescale {
  const int32_t* correction;
  const float* scales;
  const float* bias;

  Floats operator()(Ints sum, int row) const {
    return __builtin_convertvector(sum - correction[row], Floats) * fill(scales[row]) + fill(bias[row]);
  }
};

// a b + c, rounded once where the instruction set can. Nothing else is fused: the sources are compiled with -ffp-contract=off.
inline Floats fused(Floats a, Floats b, Floats c) {
#if LANES == 16
  return _mm512_fmadd_ps(a, b, c);
#elif LANES == 8
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// e^x, to 2 units in the last place; x from -87 to 88.
inline Floats exponential(Floats x) {
  x = smallest(largest(x, fill(-87.0f)), fill(88.0f));
  const Floats magic = fill(12582912.0f);
  const Floats n = fused(x, fill(1.44269504f), magic) - magic;
  const Floats f = fused(n, fill(2.12194440e-4f), fused(n, fill(-0.693359375f), x));  // Cody and Waite: log(2) in two parts
  Floats y = fill(1.9875691500e-4f);  // Cephes, expf
  y = fused(y, f, fill(1.3981999507e-3f));
  y = fused(y, f, fill(8.3334519073e-3f));
  y = fused(y, f, fill(4.1665795894e-2f));
  y = fused(y, f, fill(1.6666665459e-1f));
  y = fused(y, f, fill(5.0000001201e-1f));
  y = fused(y * f, f, f) + 1.0f;
#if LANES == 16
  return _mm512_scalef_ps(y, n);
#else
  const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
  return y * (Floats)power;  // the bits of it
#endif
}

// x / 2 (1 + erf(x / sqrt(2))), with erf as an odd polynomial over an even one, as Eigen and MLAS have it: within 2e-7 of erf.
inline Floats gelu(Floats x) {
  const Floats z = smallest(largest(x * 0.70710678f, fill(-4.0f)), fill(4.0f));
  const Floats s = z * z;
  Floats above = fill(-2.72614225801306e-10f);
  above = fused(above, s, fill(2.77068142495902e-08f));
  above = fused(above, s, fill(-2.10102402082508e-06f));
  above = fused(above, s, fill(-5.69250639462346e-05f));
  above = fused(above, s, fill(-7.34990630326855e-04f));
  above = fused(above, s, fill(-2.95459980854025e-03f));
  above = fused(above, s, fill(-1.60960333262415e-02f));
  Floats below = fill(-1.45660718464996e-05f);
  below = fused(below, s, fill(-2.13374055278905e-04f));
  below = fused(below, s, fill(-1.68282697438203e-03f));
  below = fused(below, s, fill(-7.37332916720468e-03f));
  below = fused(below, s, fill(-1.42647390514189e-02f));
  const Floats half = x * 0.5f;
  return fused(half, z * above / below, half);
}

// x / (1 + e^(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3): the form with tanh, written as a logistic function.
inline Floats gelu_tanh(Floats x) {
  const Floats u = x * fused(x * x, fill(0.044715f), fill(1.0f)) * -1.5957691216f;
  return x / (exponential(u) + 1.0f);
}

}  // namespace
}  // namespace graphprune
