// Attention of one head, by the same products as linear layers: four queries at a time, against 64 keys, then against all values.

namespace graphprune {
namespace {

// R rows of `values` times the rows of `x`, into R rows of T registers.
template <int R, int T>
inline __attribute__((always_inline)) void products(const float* x, int64_t x_stride, const float* values, int64_t value_stride,
                                                    int64_t next_value, int64_t count, float* to, int64_t to_stride) {
  Floats sum[R][T];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) sum[r][t] = Floats{};
  for (int64_t k = 0; k < count; ++k) {
    Floats row[T];
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) row[t] = load(x + k * x_stride + t * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Floats value = fill(values[r * value_stride + k * next_value]);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) sum[r][t] = fused(value, row[t], sum[r][t]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) store(to + r * to_stride + t * LANES, sum[r][t]);
}

// The same for `columns` floats, a multiple of 16.
inline void products_of(const float* x, int64_t x_stride, const float* values, int64_t value_stride, int64_t next_value, int64_t count,
                        int64_t columns, float* to, int64_t to_stride) {
  int64_t at = 0;
  for (; at + WIDTH * LANES <= columns; at += WIDTH * LANES)
    products<4, WIDTH>(x + at, x_stride, values, value_stride, next_value, count, to + at, to_stride);
  for (; at < columns; at += LANES) products<4, 1>(x + at, x_stride, values, value_stride, next_value, count, to + at, to_stride);
}

// Keys of one head, feature by feature: [panels][features][64].
inline void pack_keys(const Attention& a, const float* k, float* to) {
  for (int64_t panel = 0; panel * kPanel < a.keys; ++panel) {
    const int tokens = tokens_in(a.keys, panel);
    const float* from = k + panel * kPanel * a.k_strides.token;
    float* here = to + panel * kPanel * a.features;
    for (int64_t f = 0; f < a.features; f += 16) {
      int t = 0;
      for (; t + 16 <= tokens; t += 16)
        transpose16(from + t * a.k_strides.token + f, a.k_strides.token, nullptr, here + f * kPanel + t, kPanel);
      for (int i = 0; i < 16; ++i) {
        float* row = here + (f + i) * kPanel;
        for (int j = t; j < kPanel; ++j) row[j] = j < tokens ? from[j * a.k_strides.token + f + i] : 0.0f;
      }
    }
  }
}

// Scores of one query that it may not see become the lowest number, masks of floats are added; `keys` is rounded up to 64.
inline void mask_scores(const Attention& a, int64_t batch, int64_t head, int64_t query, int64_t keys, float* scores) {
  const float lowest = -__builtin_inff();
  const int64_t at = batch * a.mask_strides[0] + head * a.mask_strides[1] + query * a.mask_strides[2], next = a.mask_strides[3];
  int64_t t = 0;
  if (a.seen != nullptr) {
    if (next == 1)
      for (; t + LANES <= a.keys; t += LANES) {
        const Ints seen = __builtin_convertvector(*reinterpret_cast<const BytesAnywhere*>(a.seen + at + t), Ints);
        store(scores + t, seen != 0 ? load(scores + t) : fill(lowest));
      }
    for (; t < a.keys; ++t)
      if (!a.seen[at + t * next]) scores[t] = lowest;
  } else if (a.added != nullptr) {
    for (; t < a.keys; ++t) scores[t] += a.added[at + t * next];
  }
  for (t = a.causal && query + 1 < a.keys ? query + 1 : a.keys; t < keys; ++t) scores[t] = lowest;
}

// e^(x - largest x) in place. Returns one over their sum, 0 where nothing may be seen.
inline float exponentials(float* scores, int64_t keys) {
  Floats most = load(scores);
  for (int64_t t = LANES; t < keys; t += LANES) most = largest(most, load(scores + t));
  float top = most[0];
  for (int i = 1; i < LANES; ++i) top = most[i] > top ? most[i] : top;
  if (top == -__builtin_inff()) return 0.0f;
  Floats sums = Floats{};
  const Floats shift = fill(top);
  for (int64_t t = 0; t < keys; t += LANES) {
    const Floats x = exponential(load(scores + t) - shift);
    sums += x;
    store(scores + t, x);
  }
  float sum = 0.0f;
  for (int i = 0; i < LANES; ++i) sum += sums[i];
  return 1.0f / sum;
}

void attention(const Attention& a, int64_t batch, int64_t head, int64_t first, int64_t last, float* scratch) {
  const int64_t keys = (a.keys + kPanel - 1) / kPanel * kPanel;
  float* packed = scratch;
  float* scores = packed + keys * a.features;  // [4, keys]
  float* queries = scores + 4 * keys;          // [features, 4]
  float* rows = queries + 4 * a.features;      // [4, features]
  const float* q = a.q + batch * a.q_strides.batch + head * a.q_strides.head;
  const float* v = a.v + batch * a.v_strides.batch + head * a.v_strides.head;
  pack_keys(a, a.k + batch * a.k_strides.batch + head * a.k_strides.head, packed);
  for (int64_t query = first; query < last; query += 4) {
    const int count = static_cast<int>(last - query < 4 ? last - query : 4);
    for (int r = 0; r < 4; ++r)
      for (int64_t f = 0; f < a.features; ++f)
        queries[f * 4 + r] = r < count ? q[(query + r) * a.q_strides.token + f] * a.scale : 0.0f;
    for (int64_t t = 0; t < keys; t += kPanel)
      products_of(packed + t * a.features, kPanel, queries, 1, 4, a.features, kPanel, scores + t, keys);
    float parts[4] = {};
    for (int r = 0; r < count; ++r) {
      mask_scores(a, batch, head, query + r, keys, scores + r * keys);
      parts[r] = exponentials(scores + r * keys, keys);
    }
    float* to = a.result + ((batch * a.queries + query) * a.heads + head) * a.features;
    const int64_t stride = a.heads * a.features;
    products_of(v, a.v_strides.token, scores, keys, 1, a.keys, a.features, count == 4 ? to : rows, count == 4 ? stride : a.features);
    for (int r = 0; r < count; ++r) {
      const float* from = count == 4 ? to + r * stride : rows + r * a.features;
      for (int64_t f = 0; f < a.features; f += LANES)
        store(to + r * stride + f, parts[r] == 0.0f ? Floats{} : load(from + f) * fill(parts[r]));
    }
  }
}

}  // namespace
}  // namespace graphprune
