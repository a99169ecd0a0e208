// The kernels, written once with vectors of LANES floats. Including files define
//   LANES  floats of a register
//   WIDTH  registers of tokens that are computed together; LANES * WIDTH divides 64
// and, before they include this, their own transpose16(), store_bytes() and sum_groups() in terms of `vectors.inl`.

namespace graphprune {
namespace {

inline Floats weight_at(const float* values, int64_t at) { return fill(values[at]); }

// A bfloat16 is the upper half of a float.
inline Floats weight_at(const uint16_t* values, int64_t at) { return (Floats)(Ints{} + static_cast<int32_t>(uint32_t{values[at]} << 16)); }

// One block row over T registers of tokens, from its biases on. Not inlined, so that all registers are its own.
template <int R, int T, class V>
__attribute__((noinline)) void multiply(const float* panel, const V* values, const uint16_t* columns, int64_t count,
                                                    const float* bias, float* sums) {
  Floats sum[R][T];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) sum[r][t] = fill(bias[r]);
  for (int64_t k = 0; k < count; ++k) {
    const float* row = panel + static_cast<size_t>(columns[k]) * kPanel;
    Floats x[T];
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) x[t] = load(row + t * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Floats weight = weight_at(values, k * R + r);
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
template <int R, class V>
inline void multiply_row(const float* panel, const V* values, const uint16_t* columns, int64_t count, int vectors, const float* bias,
                         float* sums) {
  for (int v = 0; v < vectors; v += WIDTH) {
    const float* here = panel + v * LANES;
    float* there = sums + v * LANES;
    switch (vectors - v < WIDTH ? vectors - v : WIDTH) {
      case 1: multiply<R, 1>(here, values, columns, count, bias, there); break;
      case 2: multiply<R, 2>(here, values, columns, count, bias, there); break;
#if WIDTH > 2
      case 3: multiply<R, 3>(here, values, columns, count, bias, there); break;
      default: multiply<R, 4>(here, values, columns, count, bias, there); break;
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
  const Floats step = fill(scale), low = fill(static_cast<float>(-zero_point)), high = fill(static_cast<float>(255 - zero_point));
  Ints whole[kPanel / LANES];
#pragma GCC unroll 16
  for (int v = 0; v < kPanel / LANES; ++v) {
    const Floats x = load(from + v * LANES) / step;
    whole[v] = nearest(smallest(largest(x, low), high)) + zero_point;  // both ends are whole, so that rounding after it is the same
  }
  store_bytes(whole, to);
}

// A unit: up to 16 rows of one panel.
struct Unit {
  int64_t panel;
  int64_t first;  // row
  int rows;
  int tokens;
  int vectors;  // registers of tokens
  int64_t place;  // of its first row, in a result of panels

  Unit(const Blocks& b, int64_t panel, int64_t unit, int tokens)
      : panel(panel), first(unit * kUnit), rows(static_cast<int>(b.rows - first < kUnit ? b.rows - first : kUnit)), tokens(tokens),
        vectors((tokens + LANES - 1) / LANES), place((panel * b.rows + first) * kPanel) {}

  // Its entries of a vector that has one for each row, and zeros behind the last row.
  template <class T>
  void entries(const T* of_rows, T (&to)[kUnit]) const {
    for (int r = 0; r < kUnit; ++r) to[r] = of_rows != nullptr && r < rows ? of_rows[first + r] : T{};
  }

  // Where sums go: to the result itself if that is possible.
  float* target(const Epilogue& e, float* sums) const {
    return e.out == Out::panels && rows == kUnit ? static_cast<float*>(e.result) + place : sums;
  }
};

// Activation and residual of a unit's sums, and their way to the result.
inline void finish(const Epilogue& e, const Unit& u, int64_t all_rows, float* sums) {
  const bool in_panels = e.out == Out::panels;
  if (e.activation != Activation::none || (in_panels && (e.residual != nullptr || u.rows < kUnit)))
    for (int r = 0; r < u.rows; ++r) {
      float* row = sums + r * kPanel;
      float* to = in_panels ? static_cast<float*>(e.result) + u.place + r * kPanel : row;
      const float* residual = in_panels && e.residual != nullptr ? e.residual + u.place + r * kPanel : nullptr;
      for (int v = 0; v < u.vectors; ++v) {
        Floats x = activate(load(row + v * LANES), e.activation);
        if (residual != nullptr) x += load(residual + v * LANES);
        store(to + v * LANES, x);
      }
    }
  if (e.out == Out::bytes)
    for (int r = 0; r < u.rows; ++r)
      quantize(sums + r * kPanel, e.scale, e.zero_point, static_cast<uint8_t*>(e.result) + u.place + r * kPanel);
  if (e.out != Out::rows) return;
  const int64_t start = u.panel * kPanel * all_rows + u.first;
  float* to = static_cast<float*>(e.result) + start;
  const float* residual = e.residual == nullptr ? nullptr : e.residual + start;
  int t = 0;
  if (u.rows == kUnit)
    for (; t + 16 <= u.tokens; t += 16) {
      const int64_t at = t * all_rows;
      transpose16(sums + t, kPanel, residual == nullptr ? nullptr : residual + at, to + at, all_rows);
    }
  for (; t < u.tokens; ++t)
    for (int r = 0; r < u.rows; ++r) {
      const int64_t at = t * all_rows + r;
      to[at] = residual == nullptr ? sums[r * kPanel + t] : sums[r * kPanel + t] + residual[at];
    }
}

inline int tokens_in(int64_t tokens, int64_t panel) {
  const int64_t left = tokens - panel * kPanel;
  return static_cast<int>(left < kPanel ? left : kPanel);
}

// Ask for a panel that another core may have written: columns are read in leaps that no hardware foresees.
template <class T>
inline void fetch(const T* panel, int64_t features) {
  const char* from = reinterpret_cast<const char*>(panel);
  for (int64_t at = 0; at < features * kPanel * static_cast<int64_t>(sizeof(T)); at += 64) __builtin_prefetch(from + at, 0, 2);
}

template <int R, class V>
void linear_of(const FloatLinear& p, const V* values, int64_t panel, int64_t first_unit, int64_t last_unit) {
  const Blocks& b = p.blocks;
  const float* x = p.panels + panel * b.features * kPanel;
  alignas(64) float buffer[kUnit * kPanel];
  float bias[kUnit];
  fetch(x, b.features);
  for (int64_t unit = first_unit; unit < last_unit; ++unit) {
    const Unit u(b, panel, unit, tokens_in(p.tokens, panel));
    u.entries(p.epilogue.bias, bias);
    float* sums = u.target(p.epilogue, buffer);
    for (int r = 0; r < u.rows; r += R) {
      const int64_t row = (u.first + r) / R, start = b.starts[row];
      multiply_row<R>(x, values + start * R, b.columns + start, b.starts[row + 1] - start, u.vectors, bias + r, sums + r * kPanel);
    }
    finish(p.epilogue, u, b.rows, sums);
  }
}

void linear(const FloatLinear& p, int64_t panel, int64_t first_unit, int64_t last_unit) {
  const bool four = p.blocks.block == 4;
  if (p.halves != nullptr) (four ? linear_of<4, uint16_t> : linear_of<1, uint16_t>)(p, p.halves, panel, first_unit, last_unit);
  else (four ? linear_of<4, float> : linear_of<1, float>)(p, p.values, panel, first_unit, last_unit);
}

template <int R>
void integer_linear_of(const IntegerLinear& p, int64_t panel, int64_t first_unit, int64_t last_unit) {
  const Blocks& b = p.blocks;
  const uint8_t* x = p.panels + panel * b.features * kPanel;
  alignas(64) float buffer[kUnit * kPanel];
  float bias[kUnit], scales[kUnit];
  int32_t correction[kUnit];
  fetch(x, b.features);
  for (int64_t unit = first_unit; unit < last_unit; ++unit) {
    const Unit u(b, panel, unit, tokens_in(p.tokens, panel));
    u.entries(p.epilogue.bias, bias);
    u.entries(p.scales, scales);
    u.entries(p.correction, correction);
    float* sums = u.target(p.epilogue, buffer);
    for (int r = 0; r < u.rows; r += R) {
      const int64_t row = (u.first + r) / R, start = b.starts[row];
      sum_groups<R>(x, p.values + start * R * kGroup, b.columns + start * kGroup, b.starts[row + 1] - start,
                    Rescale{correction + r, scales + r, bias + r}, sums + r * kPanel);
    }
    finish(p.epilogue, u, b.rows, sums);
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
