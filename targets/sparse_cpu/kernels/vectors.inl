// Vectors of LANES floats, by the extension that GCC and clang share, and the functions of them that the kernels need.

namespace graphprune {
namespace {

using Floats = float __attribute__((vector_size(4 * LANES)));
using Ints = int32_t __attribute__((vector_size(4 * LANES)));
using FloatsAnywhere = float __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
using IntsAnywhere = int32_t __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
using Bytes = uint8_t __attribute__((vector_size(LANES)));
using BytesAnywhere = uint8_t __attribute__((vector_size(LANES), aligned(1), may_alias));

inline Floats load(const float* from) { return *reinterpret_cast<const FloatsAnywhere*>(from); }
inline Ints load_ints(const int32_t* from) { return *reinterpret_cast<const IntsAnywhere*>(from); }
inline void store(float* to, Floats x) { *reinterpret_cast<FloatsAnywhere*>(to) = x; }
inline void store_bytes(uint8_t* to, Ints x) { *reinterpret_cast<BytesAnywhere*>(to) = __builtin_convertvector(x, Bytes); }
inline Floats fill(float x) { return x - Floats{}; }
inline Floats largest(Floats a, Floats b) { return a > b ? a : b; }  // b where a is not a number
inline Floats smallest(Floats a, Floats b) { return a < b ? a : b; }

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
  const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
  return y * (Floats)power;  // the bits of it
}

// x / 2 (1 + erf(x / sqrt(2))), by Abramowitz and Stegun 7.1.26: within 1.5e-7 of erf.
inline Floats gelu(Floats x) {
  const Floats positive = x > Floats{} ? x : -x;
  const Floats z = positive * 0.70710678f;
  const Floats t = 1.0f / fused(z, fill(0.3275911f), fill(1.0f));
  Floats tail = fill(1.061405429f);
  tail = fused(tail, t, fill(-1.453152027f));
  tail = fused(tail, t, fill(1.421413741f));
  tail = fused(tail, t, fill(-0.284496736f));
  tail = fused(tail, t, fill(0.254829592f));
  tail = tail * t * exponential(-z * z);  // 1 - erf(|x| / sqrt(2))
  const Floats half = positive * 0.5f * tail;
  return x > Floats{} ? x - half : -half;
}

// x / (1 + e^(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3): the form with tanh, written as a logistic function.
inline Floats gelu_tanh(Floats x) {
  const Floats u = x * fused(x * x, fill(0.044715f), fill(1.0f)) * -1.5957691216f;
  return x / (exponential(u) + 1.0f);
}

}  // namespace
}  // namespace graphprune
