// Checks the kernels of target sparse-cpu against plain loops, without torch. Call it with the name of an instruction set; it ends with
// 77 where this CPU has not got it. Buffers lie on the heap and have no byte to spare, so that sanitizers see each access outside.
#include "linear.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <random>
#include <vector>

namespace {

using namespace graphprune;

constexpr float kScale = 0.03f, kNan = std::numeric_limits<float>::quiet_NaN();
constexpr int kZero = 117;

std::mt19937 generator(1);
float uniform(float low, float high) { return std::uniform_real_distribution<float>(low, high)(generator); }

// Exactly `size` elements, at every other time at an address that is aligned to one element only.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t size, T value = T{}) : shift_(turn_++ % 2), size_(size), memory_(new T[size + shift_]) {
    for (size_t i = 0; i < size + shift_; ++i) memory_[i] = value;
  }
  T* data() { return memory_.get() + shift_; }
  const T* data() const { return memory_.get() + shift_; }
  size_t size() const { return size_; }
  T& operator[](size_t i) { return data()[i]; }
  const T& operator[](size_t i) const { return data()[i]; }

 private:
  static inline size_t turn_ = 0;
  size_t shift_, size_;
  std::unique_ptr<T[]> memory_;
};

struct Shape {
  int64_t tokens, rows, features;
  int block;
  float density;

  int64_t panels() const { return (tokens + kPanel - 1) / kPanel; }
  int64_t units() const { return (rows + kUnit - 1) / kUnit; }
};

void expect(bool right, const Shape& s, const char* what, double have, double want) {
  if (right) return;
  std::printf("%s: %.9g is not %.9g; %lld tokens, %lld rows, %lld features, blocks of %d, density %g\n", what, have, want,
              static_cast<long long>(s.tokens), static_cast<long long>(s.rows), static_cast<long long>(s.features), s.block, s.density);
  std::exit(1);
}

// Blocks that have a weight, in the order of block rows and columns; integers in groups of four. T is the type of a weight.
template <class T>
struct Packed {
  Buffer<T> values{0};
  Buffer<uint16_t> columns{0};
  Buffer<int32_t> starts{0};

  Packed(const Shape& s, const Buffer<T>& weight, int group) {
    std::vector<T> kept;
    std::vector<uint16_t> places;
    std::vector<int32_t> begins{0};
    for (int64_t row = 0; row < s.units() * kUnit; row += s.block) {
      const auto at = [&](int64_t r, int64_t f) { return row + r < s.rows ? weight[(row + r) * s.features + f] : T{}; };
      std::vector<uint16_t> here;
      for (int64_t f = 0; f < s.features; ++f)
        for (int r = 0; r < s.block; ++r)
          if (at(r, f) != T{}) {
            here.push_back(static_cast<uint16_t>(f));
            break;
          }
      const size_t count = here.size();
      while (here.size() % group != 0) here.push_back(0);
      for (size_t first = 0; first < here.size(); first += group)
        for (int r = 0; r < s.block; ++r)
          for (int i = 0; i < group; ++i) kept.push_back(first + i < count ? at(r, here[first + i]) : T{});
      places.insert(places.end(), here.begin(), here.end());
      begins.push_back(static_cast<int32_t>(places.size() / group));
    }
    values = copy(kept);
    columns = copy(places);
    starts = copy(begins);
  }

  Blocks blocks(const Shape& s) const { return {columns.data(), starts.data(), s.block, s.rows, s.features}; }

 private:
  template <class U>
  static Buffer<U> copy(const std::vector<U>& from) {
    Buffer<U> to(from.size());
    for (size_t i = 0; i < from.size(); ++i) to[i] = from[i];
    return to;
  }
};

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

uint8_t quantize(float x) {
  const float whole = std::nearbyint(x / kScale) + kZero;
  return static_cast<uint8_t>(whole < 0 ? 0 : whole > 255 ? 255 : whole);
}

double activate(double x, Activation activation) {
  switch (activation) {
    case Activation::relu: return x > 0 ? x : 0;
    case Activation::gelu: return x / 2 * (1 + std::erf(x / std::sqrt(2.0)));
    case Activation::gelu_tanh: return x / 2 * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
    default: return x;
  }
}

// Calls work(panel, first, last) for all of `pieces`, in two parts.
template <class Work>
void in_parts(const Shape& s, int64_t pieces, const Work& work) {
  for (int64_t panel = 0; panel < s.panels(); ++panel) {
    work(panel, 0, pieces / 2);
    work(panel, pieces / 2, pieces);
  }
}

void check_packing(const Kernels& kernels, const Shape& s, const Buffer<float>& x, Buffer<float>& panels, Buffer<uint8_t>& bytes) {
  const Pack problem{x.data(), s.tokens, s.features, kScale, kZero};
  in_parts(s, (s.features + kUnit - 1) / kUnit, [&](int64_t panel, int64_t first, int64_t last) {
    const int64_t at = panel * s.features * kPanel, end = last * kUnit < s.features ? last * kUnit : s.features;
    kernels.pack(problem, panel, first * kUnit, end, panels.data() + at);
    kernels.pack_bytes(problem, panel, first * kUnit, end, bytes.data() + at);
  });
  for (int64_t t = 0; t < s.panels() * kPanel; ++t)
    for (int64_t f = 0; f < s.features; ++f) {
      const float want = t < s.tokens ? x[t * s.features + f] : 0.0f;
      const int64_t row = (t / kPanel * s.features + f) * kPanel;
      const float have = panels[row + t % kPanel];
      const uint8_t byte = bytes[row + byte_place(static_cast<int>(t % kPanel))];
      expect(have == want, s, "pack", have, want);
      expect(byte == quantize(want), s, "pack_bytes", byte, quantize(want));
      if (t >= s.tokens) panels[row + t % kPanel] = kNan;  // must not be seen in a result
    }
}

// One problem in the three forms of a result; want(token, row, residual) checks what it is given against plain loops.
template <class Problem, class Check>
void check_results(const Shape& s, Problem problem, void (*kernel)(const Problem&, int64_t, int64_t, int64_t), const Check& check) {
  Buffer<float> bias(s.rows), residual(s.tokens * s.rows), in_panels(s.panels() * s.rows * kPanel, kNan);
  for (size_t i = 0; i < bias.size(); ++i) bias[i] = uniform(-1, 1);
  for (int64_t t = 0; t < s.tokens; ++t)
    for (int64_t r = 0; r < s.rows; ++r)
      in_panels[(t / kPanel * s.rows + r) * kPanel + t % kPanel] = residual[t * s.rows + r] = uniform(-1, 1);
  static int turn = 0;
  const auto activation = static_cast<Activation>(turn++ % 4);
  const float* of_rows = turn % 3 == 0 ? bias.data() : nullptr;
  const bool added = turn % 5 < 2;
  const auto run = [&](Out out, const float* more, void* result) {
    problem.epilogue = {of_rows, more, activation, out, result, kScale, kZero};
    in_parts(s, s.units(), [&](int64_t panel, int64_t first, int64_t last) { kernel(problem, panel, first, last); });
  };
  Buffer<float> rows(s.tokens * s.rows, kNan), plain(s.tokens * s.rows, kNan), panels(s.panels() * s.rows * kPanel, kNan);
  Buffer<uint8_t> bytes(s.panels() * s.rows * kPanel);
  run(Out::rows, added ? residual.data() : nullptr, rows.data());
  run(Out::rows, nullptr, plain.data());
  run(Out::panels, added ? in_panels.data() : nullptr, panels.data());
  run(Out::bytes, nullptr, bytes.data());
  for (int64_t t = 0; t < s.tokens; ++t)
    for (int64_t r = 0; r < s.rows; ++r) {
      const int64_t at = t * s.rows + r, row = (t / kPanel * s.rows + r) * kPanel;
      const int place = static_cast<int>(t % kPanel);
      check(t, r, of_rows == nullptr ? 0.0f : bias[r], activation, plain[at]);
      const float want = added ? plain[at] + residual[at] : plain[at];
      expect(rows[at] == want, s, "residual", rows[at], want);
      expect(panels[row + place] == want, s, "panels", panels[row + place], want);
      const uint8_t byte = bytes[row + byte_place(place)];
      expect(byte == quantize(plain[at]), s, "bytes", byte, quantize(plain[at]));
    }
}

// With `half`, weights are stored in bfloat16, which they must be exact in.
void check_floats(const Kernels& kernels, const Shape& s, const Buffer<float>& x, const Buffer<float>& panels, const Buffer<float>& weight,
                  bool half) {
  const Packed<float> packed(s, weight, 1);
  Buffer<uint16_t> halves(half ? packed.values.size() : 0);
  for (size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<uint16_t>(bits_of(packed.values[i]) >> 16);
  FloatLinear problem{};
  problem.blocks = packed.blocks(s);
  problem.values = half ? nullptr : packed.values.data();
  problem.halves = half ? halves.data() : nullptr;
  problem.panels = panels.data();
  problem.tokens = s.tokens;
  check_results(s, problem, kernels.linear, [&](int64_t t, int64_t r, float bias, Activation activation, float have) {
    double sum = bias, size = std::fabs(bias);
    for (int64_t f = 0; f < s.features; ++f) {
      const double product = double{x[t * s.features + f]} * weight[r * s.features + f];
      sum += product;
      size += std::fabs(product);
    }
    const double want = activate(sum, activation);
    expect(std::fabs(have - want) <= 2e-6 * size + 1e-30, s, "floats", have, want);
  });
}

void check_integers(const Kernels& kernels, const Shape& s, const Buffer<uint8_t>& panels, const Buffer<float>& weight) {
  Buffer<int8_t> grid(weight.size());
  for (size_t i = 0; i < weight.size(); ++i) grid[i] = static_cast<int8_t>(std::lround(weight[i] * 127));
  Buffer<int32_t> correction(s.rows);
  Buffer<float> scales(s.rows);
  for (int64_t r = 0; r < s.rows; ++r) {
    scales[r] = uniform(1e-4f, 1e-3f);
    for (int64_t f = 0; f < s.features; ++f) correction[r] += kZero * grid[r * s.features + f];
  }
  const Packed<int8_t> packed(s, grid, kGroup);
  IntegerLinear problem{};
  problem.blocks = packed.blocks(s);
  problem.values = packed.values.data();
  problem.correction = correction.data();
  problem.scales = scales.data();
  problem.panels = panels.data();
  problem.tokens = s.tokens;
  check_results(s, problem, kernels.integer_linear, [&](int64_t t, int64_t r, float bias, Activation activation, float have) {
    int32_t sum = -correction[r];
    const int place = byte_place(static_cast<int>(t % kPanel));
    for (int64_t f = 0; f < s.features; ++f)
      sum += grid[r * s.features + f] * panels[(t / kPanel * s.features + f) * kPanel + place];
    const float scaled = static_cast<float>(sum) * scales[r], before = scaled + bias;
    const double want = activate(before, activation);
    const bool exact = activation == Activation::none || activation == Activation::relu;
    expect(exact ? have == want : std::fabs(have - want) <= 2e-6 * std::fabs(before) + 1e-30, s, "integers", have, want);
  });
}

void check(const Kernels& kernels, const Shape& s) {
  Buffer<float> x(s.tokens * s.features), weight(s.rows * s.features);
  for (size_t i = 0; i < x.size(); ++i) x[i] = uniform(-5, 5);
  static int turn = 0;
  const bool half = turn++ % 3 == 0;
  for (int64_t r = 0; r < s.rows; r += s.block)
    for (int64_t f = 0; f < s.features; ++f)
      if (uniform(0, 1) < s.density)
        for (int64_t row = r; row < r + s.block && row < s.rows; ++row) {
          const float value = uniform(-1, 1);
          weight[row * s.features + f] = half ? float_of(bits_of(value) & 0xffff0000u) : value;
        }
  Buffer<float> panels(s.panels() * s.features * kPanel, kNan);
  Buffer<uint8_t> bytes(s.panels() * s.features * kPanel);
  check_packing(kernels, s, x, panels, bytes);
  check_floats(kernels, s, x, panels, weight, half);
  check_integers(kernels, s, bytes, weight);
}

}  // namespace

int main(int count, char** words) {
  const Kernels* kernels = find_kernels(count > 1 ? words[1] : "");
  if (kernels == nullptr) return 77;
  int shapes = 0;
  for (const int64_t tokens : {0, 1, 7, 15, 16, 17, 48, 63, 64, 65, 130})
    for (const int64_t rows : {1, 3, 4, 15, 16, 17, 37})
      for (const int64_t features : {1, 3, 4, 16, 21, 50})
        for (const int block : {1, 4})
          for (const float density : {0.0f, 0.3f, 1.0f}) {
            check(*kernels, {tokens, rows, features, block, density});
            ++shapes;
          }
  std::printf("%s: %d shapes\n", kernels->name, shapes);
  return 0;
}
