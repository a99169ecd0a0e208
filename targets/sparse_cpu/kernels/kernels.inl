// The kernels, written once with vectors of LANES floats. Including files define
//   LANES  floats of a register
//   WIDTH  registers of tokens that are computed together; LANES * WIDTH divides 64
// and, before they include this, their own transpose16() and sum_groups() in terms of `vectors.inl`.

namespace graphprune {
namespace {

// Sums of one block row over WIDTH or fewer registers of tokens.
template <int R, int T>
inline __attribute__((always_inline)) void multiply(const float* panel, const float* values, const uint16_t* columns, int64_t count,
                                                    float* sums) {
  Floats sum[R][T];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) sum[r][t] = Floats{};
  for (int64_t k = 0; k < count; ++k) {
    const float* row = panel + static_cast<size_t>(columns[k]) * kPanel;
    Floats x[T];
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) x[t] = load(row + t * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Floats weight = fill(values[k * R + r]);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) sum[r][t] = fused(weight, x[t], sum[r][t]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) store(sums + r * kPanel + t * LANES, sum[r][t]);
}

// One block row over the tokens that there are; `vectors` registers of them.
template <int R>
inline void multiply_row(const float* panel, const float* values, const uint16_t* columns, int64_t count, int vectors, float* sums) {
  for (int v = 0; v < vectors; v += WIDTH) {
    const float* here = panel + v * LANES;
    float* there = sums + v * LANES;
    switch (vectors - v < WIDTH ? vectors - v : WIDTH) {
      case 1: multiply<R, 1>(here, values, columns, count, there); break;
      case 2: multiply<R, 2>(here, values, columns, count, there); break;
#if WIDTH > 2
      case 3: multiply<R, 3>(here, values, columns, count, there); break;
      default: multiply<R, 4>(here, values, columns, count, there); break;
#endif
    }
  }
}

inline Floats activate(Floats x, Activation activation) {
  switch (activation) {
    case Activation::relu: return largest(x, Floats{});
    case Activation::gelu: return gelu(x);
    case Activation::gelu_tanh: return gelu_tanh(x);
    default: return x;
  }
}

// 64 floats to bytes in the order of `byte_place`: round half to even, then add the zero-point and clamp.
inline void quantize(const float* from, float scale, int32_t zero_point, uint8_t* to) {
  alignas(64) uint8_t bytes[kPanel];
  const Floats step = fill(scale), low = fill(static_cast<float>(-zero_point)), high = fill(static_cast<float>(255 - zero_point));
  for (int t = 0; t < kPanel; t += LANES) {
    Floats x = load(from + t) / step;
    x = smallest(largest(x, low), high);  // both are whole, so that rounding after it is the same
    const Floats magic = fill(12582912.0f);  // 1.5 * 2^23: what lies behind the point falls away
    const Ints whole = __builtin_convertvector((x + magic) - magic, Ints) + zero_point;
    store_bytes(bytes + t, whole);
  }
  reorder_bytes(bytes, to);
}

// Bias, activation and residual of 16 rows of one panel, and the way to where they go.
inline void finish(const Epilogue& e, float (&sums)[kUnit][kPanel], int64_t panel, int64_t first, int rows, int64_t all_rows, int tokens,
                   int vectors) {
  for (int r = 0; r < rows; ++r) {
    const Floats bias = fill(e.bias != nullptr ? e.bias[first + r] : 0.0f);
    const float* residual = e.out == Out::rows || e.residual == nullptr ? nullptr : e.residual + (panel * all_rows + first + r) * kPanel;
    float* to = e.out == Out::panels ? static_cast<float*>(e.result) + (panel * all_rows + first + r) * kPanel : sums[r];
    for (int v = 0; v < vectors; ++v) {
      Floats x = activate(load(sums[r] + v * LANES) + bias, e.activation);
      if (residual != nullptr) x += load(residual + v * LANES);
      store(to + v * LANES, x);
    }
    if (e.out == Out::bytes)
      quantize(sums[r], e.scale, e.zero_point, static_cast<uint8_t*>(e.result) + (panel * all_rows + first + r) * kPanel);
  }
  if (e.out != Out::rows) return;
  float* to = static_cast<float*>(e.result) + panel * kPanel * all_rows + first;
  const float* residual = e.residual == nullptr ? nullptr : e.residual + panel * kPanel * all_rows + first;
  int t = 0;
  if (rows == kUnit)
    for (; t + 16 <= tokens; t += 16) {
      const int64_t at = t * all_rows;
      transpose16(sums[0] + t, kPanel, residual == nullptr ? nullptr : residual + at, to + at, all_rows);
    }
  for (; t < tokens; ++t)
    for (int r = 0; r < rows; ++r) {
      const int64_t at = t * all_rows + r;
      to[at] = residual == nullptr ? sums[r][t] : sums[r][t] + residual[at];
    }
}

inline int tokens_in(int64_t tokens, int64_t panel) {
  const int64_t left = tokens - panel * kPanel;
  return static_cast<int>(left < kPanel ? left : kPanel);
}

template <int R>
void linear_of(const FloatLinear& p, int64_t panel, int64_t first_unit, int64_t last_unit) {
  const Blocks& b = p.blocks;
  const int tokens = tokens_in(p.tokens, panel), vectors = (tokens + LANES - 1) / LANES;
  const float* x = p.panels + panel * b.features * kPanel;
  alignas(64) float sums[kUnit][kPanel];
  for (int64_t unit = first_unit; unit < last_unit; ++unit) {
    const int64_t first = unit * kUnit;
    const int rows = static_cast<int>(b.rows - first < kUnit ? b.rows - first : kUnit);
    for (int r = 0; r < rows; r += R) {
      const int64_t row = (first + r) / R, start = b.starts[row], count = b.starts[row + 1] - start;
      multiply_row<R>(x, p.values + start * R, b.columns + start, count, vectors, sums[r]);
    }
    finish(p.epilogue, sums, panel, first, rows, b.rows, tokens, vectors);
  }
}

void linear(const FloatLinear& p, int64_t panel, int64_t first_unit, int64_t last_unit) {
  if (p.blocks.block == 4) linear_of<4>(p, panel, first_unit, last_unit);
  else linear_of<1>(p, panel, first_unit, last_unit);
}

template <int R>
void integer_linear_of(const IntegerLinear& p, int64_t panel, int64_t first_unit, int64_t last_unit) {
  const Blocks& b = p.blocks;
  const int tokens = tokens_in(p.tokens, panel), vectors = (tokens + LANES - 1) / LANES;
  const uint8_t* x = p.panels + panel * b.features * kPanel;
  alignas(64) float sums[kUnit][kPanel];
  alignas(64) int32_t whole[R][kPanel];
  for (int64_t unit = first_unit; unit < last_unit; ++unit) {
    const int64_t first = unit * kUnit;
    const int rows = static_cast<int>(b.rows - first < kUnit ? b.rows - first : kUnit);
    for (int r = 0; r < rows; r += R) {
      const int64_t row = (first + r) / R, start = b.starts[row], count = b.starts[row + 1] - start;
      sum_groups<R>(x, p.values + start * R * kGroup, b.columns + start * kGroup, count, whole);
      for (int i = 0; i < R && r + i < rows; ++i) {
        const Ints correction = Ints{} + p.correction[first + r + i];
        const Floats scale = fill(p.scales[first + r + i]);
        for (int v = 0; v < vectors; ++v)
          store(sums[r + i] + v * LANES, __builtin_convertvector(load_ints(whole[i] + v * LANES) - correction, Floats) * scale);
      }
    }
    finish(p.epilogue, sums, panel, first, rows, b.rows, tokens, vectors);
  }
}

void integer_linear(const IntegerLinear& p, int64_t panel, int64_t first_unit, int64_t last_unit) {
  if (p.blocks.block == 4) integer_linear_of<4>(p, panel, first_unit, last_unit);
  else integer_linear_of<1>(p, panel, first_unit, last_unit);
}

// Features `first` to `last` of one panel; both are multiples of 16, or the end.
void pack(const Pack& p, int64_t panel, int64_t first, int64_t last, float* result) {
  const int tokens = tokens_in(p.tokens, panel);
  const float* from = p.rows + panel * kPanel * p.features;
  for (int64_t f = first; f < last; f += 16) {
    const int features = static_cast<int>(last - f < 16 ? last - f : 16);
    int t = 0;
    if (features == 16)
      for (; t + 16 <= tokens; t += 16) transpose16(from + t * p.features + f, p.features, nullptr, result + f * kPanel + t, kPanel);
    for (int i = 0; i < features; ++i) {
      float* to = result + (f + i) * kPanel;
      for (int j = t; j < tokens; ++j) to[j] = from[j * p.features + f + i];
      for (int j = tokens; j < kPanel; ++j) to[j] = 0.0f;
    }
  }
}

void pack_bytes(const Pack& p, int64_t panel, int64_t first, int64_t last, uint8_t* result) {
  alignas(64) float sixteen[16 * kPanel];
  const int tokens = tokens_in(p.tokens, panel);
  const float* from = p.rows + panel * kPanel * p.features;
  for (int64_t f = first; f < last; f += 16) {
    const int features = static_cast<int>(last - f < 16 ? last - f : 16);
    int t = 0;
    if (features == 16)
      for (; t + 16 <= tokens; t += 16) transpose16(from + t * p.features + f, p.features, nullptr, sixteen + t, kPanel);
    for (int i = 0; i < features; ++i) {
      float* row = sixteen + i * kPanel;
      for (int j = t; j < tokens; ++j) row[j] = from[j * p.features + f + i];
      for (int j = tokens; j < kPanel; ++j) row[j] = 0.0f;
      quantize(row, p.scale, p.zero_point, result + (f + i) * kPanel);
    }
  }
}

}  // namespace
}  // namespace graphprune
