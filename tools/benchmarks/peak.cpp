// What this machine can do at most: products of floats and of bytes a second in registers, and bytes a second out of memory.
//
//     peak THREADS
//
// prints JSON, the best of several rounds: {"isa", "floats": operations a second, "bytes": the same, "memory": bytes a second}.
// A product and its sum are two operations.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int kRounds = 7;
constexpr int64_t kSteps = 1'000'000;
constexpr size_t kWords = size_t{24} << 20;  // of 8 bytes, for each thread: more than a cache holds

// Work that is done in registers: a function of steps, and the operations of one step.
struct Loop {
  int64_t (*run)(int64_t steps);
  double operations;
};

struct Machine {
  const char* isa;
  Loop floats;
  Loop bytes;
};

// Without vector instructions that are known here, whatever the compiler makes of plain loops.
int64_t plain_floats(int64_t steps) {
  float sums[32], factor = 1.0f + 1e-7f * static_cast<float>(steps % 3);
  for (int j = 0; j < 32; ++j) sums[j] = static_cast<float>(steps % (j + 2));
  for (int64_t i = 0; i < steps; ++i)
    for (float& sum : sums) sum = sum * factor + 1.0f;
  return static_cast<int64_t>(sums[steps % 32]);
}

int64_t plain_bytes(int64_t steps) {
  int32_t sums[32] = {};
  int8_t weights[32];
  for (int j = 0; j < 32; ++j) weights[j] = static_cast<int8_t>(steps % (j + 2));
  for (int64_t i = 0; i < steps; ++i)
    for (int j = 0; j < 32; ++j) sums[j] = sums[j] * 3 + static_cast<int32_t>(weights[j]) * static_cast<uint8_t>(i);
  return sums[steps % 32];
}

#if defined(__x86_64__)
// Makes the compiler believe that a value has changed, so that nothing is computed once that should be computed often.
#define UNKNOWN(x) __asm__ volatile("" : "+v"(x))

__attribute__((target("avx512f"))) int64_t wide_floats(int64_t steps) {
  __m512 sums[16], factor = _mm512_set1_ps(0.999f), one = _mm512_set1_ps(1.0f);
#pragma GCC unroll 16
  for (__m512& sum : sums) {
    sum = one;
    UNKNOWN(sum);
  }
  for (int64_t i = 0; i < steps; ++i)
#pragma GCC unroll 16
    for (__m512& sum : sums) sum = _mm512_fmadd_ps(sum, factor, one);
  float total = 0;
#pragma GCC unroll 16
  for (__m512& sum : sums) total += _mm512_cvtss_f32(sum);
  return static_cast<int64_t>(total);
}

__attribute__((target("avx512f,avx512vnni"))) int64_t wide_bytes(int64_t steps) {
  __m512i sums[16], left = _mm512_set1_epi8(3), right = _mm512_set1_epi8(-2);
#pragma GCC unroll 16
  for (__m512i& sum : sums) {
    sum = _mm512_set1_epi32(static_cast<int>(steps));
    UNKNOWN(sum);
  }
  for (int64_t i = 0; i < steps; ++i)
#pragma GCC unroll 16
    for (__m512i& sum : sums) sum = _mm512_dpbusd_epi32(sum, left, right);
  int64_t total = 0;
#pragma GCC unroll 16
  for (__m512i& sum : sums) total += _mm512_cvtsi512_si32(sum);
  return total;
}

__attribute__((target("avx2,fma"))) int64_t narrow_floats(int64_t steps) {
  __m256 sums[12], factor = _mm256_set1_ps(0.999f), one = _mm256_set1_ps(1.0f);
#pragma GCC unroll 12
  for (__m256& sum : sums) {
    sum = one;
    UNKNOWN(sum);
  }
  for (int64_t i = 0; i < steps; ++i)
#pragma GCC unroll 12
    for (__m256& sum : sums) sum = _mm256_fmadd_ps(sum, factor, one);
  float total = 0;
#pragma GCC unroll 12
  for (__m256& sum : sums) total += _mm256_cvtss_f32(sum);
  return static_cast<int64_t>(total);
}

// Bytes without VNNI: pairs to 16 bits, pairs of those to 32, and a sum.
__attribute__((target("avx2"))) int64_t narrow_bytes(int64_t steps) {
  __m256i sums[6], left = _mm256_set1_epi8(3), right = _mm256_set1_epi8(-2), ones = _mm256_set1_epi16(1);
#pragma GCC unroll 6
  for (__m256i& sum : sums) {
    sum = _mm256_set1_epi32(static_cast<int>(steps));
    UNKNOWN(sum);
  }
  for (int64_t i = 0; i < steps; ++i)
#pragma GCC unroll 6
    for (__m256i& sum : sums) {
      UNKNOWN(left);
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(left, right), ones));
    }
  int64_t total = 0;
#pragma GCC unroll 6
  for (__m256i& sum : sums) total += _mm256_extract_epi32(sum, 0);
  return total;
}
#endif

Machine machine() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool wide = __builtin_cpu_supports("avx512f"), vnni = wide && __builtin_cpu_supports("avx512vnni");
  const Loop bytes = vnni ? Loop{wide_bytes, 16 * 64 * 2.0} : Loop{narrow_bytes, 6 * 32 * 2.0};
  if (wide) return {vnni ? "avx512 vnni" : "avx512", {wide_floats, 16 * 16 * 2.0}, bytes};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {"avx2", {narrow_floats, 12 * 8 * 2.0}, bytes};
#endif
  return {"portable", {plain_floats, 32 * 2.0}, {plain_bytes, 32 * 2.0}};
}

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
int64_t sum_words(const int64_t* words, size_t count) {
  int64_t total = 0;
  for (size_t i = 0; i < count; ++i) total += words[i];
  return total;
}

volatile int64_t kept;  // results are used, so that no loop is left out

// The shortest of some rounds, in seconds; in each all threads do the same work.
double shortest(int threads, const std::function<int64_t(int)>& work) {
  double best = 1e30;
  for (int round = 0; round < kRounds; ++round) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back([&, i] { kept = work(i); });
    kept = work(0);
    for (std::thread& other : others) other.join();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

}  // namespace

int main(int count, char** arguments) {
  const int threads = count > 1 ? std::atoi(arguments[1]) : 1;
  if (threads < 1) {
    std::fprintf(stderr, "peak: %s is no number of threads\n", arguments[1]);
    return 2;
  }
  const Machine here = machine();
  const double floats = shortest(threads, [&](int) { return here.floats.run(kSteps); });
  const double bytes = shortest(threads, [&](int) { return here.bytes.run(kSteps); });
  std::vector<std::vector<int64_t>> words(threads, std::vector<int64_t>(kWords, 1));
  const double memory = shortest(threads, [&](int thread) { return sum_words(words[thread].data(), kWords); });
  const double steps = static_cast<double>(kSteps) * threads;
  std::printf("{\"isa\": \"%s\", \"floats\": %.6g, \"bytes\": %.6g, \"memory\": %.6g}\n", here.isa, steps * here.floats.operations / floats,
              steps * here.bytes.operations / bytes, 8.0 * kWords * threads / memory);
  return 0;
}
