// Attention of one head: sixteen queries share a pass over the keys, 64 at a time, and one over the values.

namespace graphprune {
namespace {

// Numbers that are multiplied one at a time, in float. A struct for others has `size` of them side by side in the 32 bits of a lane.
struct Singles {
  static constexpr int size = 1;
  static void add_products(Floats& sum, Floats values, Floats x) { sum = fused(values, x, sum); }
  static Floats join(Floats first, Floats) { return first; }
  static void narrow(float*, int64_t) {}  // a row, in place
};

// Four rows of `values` times `count` rows of `x`, added to four rows of `from`; strides are in floats.
struct Product {
  const float* x;
  int64_t x_stride;
  const float* values;
  int64_t value_stride, next_value;  // from row to row, and along a row
  int64_t count;
  const float* from;
  int64_t from_stride;
  float* to;
  int64_t to_stride;
};

// T registers of its columns, from column `at` on.
template <class N, int T>
inline __attribute__((always_inline)) void multiply_columns(const Product& p, int64_t at) {
  Floats sum[4][T];
#pragma GCC unroll 16
  for (int r = 0; r < 4; ++r)
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) sum[r][t] = load(p.from + r * p.from_stride + at + t * LANES);
  for (int64_t k = 0; k < p.count; ++k) {
    Floats row[T];
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) row[t] = load(p.x + k * p.x_stride + at + t * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < 4; ++r) {
      const Floats value = fill(p.values[r * p.value_stride + k * p.next_value]);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) N::add_products(sum[r][t], value, row[t]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < 4; ++r)
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) store(p.to + r * p.to_stride + at + t * LANES, sum[r][t]);
}

// All of its columns, a multiple of 16.
template <class N>
inline void multiply(const Product& p, int64_t columns) {
  for (int64_t at = 0; at < columns; at += WIDTH * LANES) {
    const int64_t vectors = (columns - at) / LANES;
    switch (vectors < WIDTH ? vectors : WIDTH) {
      case 1: multiply_columns<N, 1>(p, at); break;
      case 2: multiply_columns<N, 2>(p, at); break;
#if WIDTH > 2
      case 3: multiply_columns<N, 3>(p, at); break;
      default: multiply_columns<N, 4>(p, at); break;
#endif
    }
  }
}

// Sixteen features of up to `tokens` tokens, feature by feature, times `scale`: [16 / size][width]; the rest is zeros.
template <class N>
inline void pack_features(const float* from, int64_t stride, int tokens, int width, float scale, float* to) {
  alignas(64) float columns[16 * kPanel];
  int t = 0;
  for (; t + 16 <= tokens; t += 16) transpose16(from + t * stride, stride, nullptr, columns + t, width);
  for (int f = 0; f < 16; ++f)
    for (int j = t; j < width; ++j) columns[f * width + j] = j < tokens ? from[j * stride + f] : 0.0f;
  for (int f = 0; f < 16; f += N::size)
    for (int j = 0; j < width; j += LANES) {
      const float* here = columns + f * width + j;
      store(to + f / N::size * width + j, N::join(load(here) * fill(scale), load(here + (N::size - 1) * width) * fill(scale)));
    }
}

// Keys of one head: [panels][features / size][64].
template <class N>
inline void pack_keys(const Attention& a, const float* k, float* to) {
  for (int64_t t = 0; t < a.keys; t += kPanel)
    for (int64_t f = 0; f < a.features; f += 16)
      pack_features<N>(k + t * a.k_strides.token + f, a.k_strides.token, tokens_in(a.keys, t / kPanel), kPanel, 1.0f,
                       to + (t * a.features + f * kPanel) / N::size);
}

// Values of one head side by side, [keys / size, features]: where they lie, rows of one head share few sets of the cache.
template <class N>
inline void pack_values(const Attention& a, const float* v, float* to) {
  for (int64_t t = 0; t < a.keys; t += N::size) {
    const float *first = v + t * a.v_strides.token, *second = first + (N::size - 1) * a.v_strides.token;
    const bool whole = t + N::size <= a.keys;
    for (int64_t f = 0; f < a.features; f += LANES)
      store(to + t / N::size * a.features + f, N::join(load(first + f), whole ? load(second + f) : Floats{}));
  }
}

// Scores of one query that it may not see become the lowest number, masks of floats are added.
inline void mask_scores(const Attention& a, int64_t batch, int64_t head, int64_t query, float* scores) {
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
}

// e^(x - largest x) in place. Returns one over their sum, 0 where nothing may be seen.
inline float exponentials(float* scores, int64_t keys) {
  Floats most = load(scores);
  for (int64_t t = LANES; t < keys; t += LANES) most = largest(most, load(scores + t));
  const float top = largest_of(most);
  if (top == -__builtin_inff()) return 0.0f;
  Floats sums = Floats{};
  const Floats shift = fill(top);
  for (int64_t t = 0; t < keys; t += LANES) {
    const Floats x = exponential(load(scores + t) - shift);
    sums += x;
    store(scores + t, x);
  }
  return 1.0f / sum_of(sums);
}

template <class N>
void attention(const Attention& a, int64_t batch, int64_t head, int64_t first, int64_t last, float* scratch) {
  const float lowest = -__builtin_inff();
  const int64_t all = (a.keys + kPanel - 1) / kPanel * kPanel;
  float* keys = scratch;                          // as pack_keys has them
  float* values = keys + all * a.features;        // as pack_values has them
  float* scores = values + all * a.features;      // [16, keys]
  float* mask = scores + kQueries * all;          // [keys], what all queries share
  float* queries = mask + all;                    // [features / size][16]
  float* rows = queries + kQueries * a.features;  // [16, features]
  const float* q = a.q + batch * a.q_strides.batch + head * a.q_strides.head;
  pack_keys<N>(a, a.k + batch * a.k_strides.batch + head * a.k_strides.head, keys);
  pack_values<N>(a, a.v + batch * a.v_strides.batch + head * a.v_strides.head, values);
  const bool shared = a.mask_strides[2] == 0;
  for (int64_t t = 0; t < all; ++t) mask[t] = t < a.keys ? 0.0f : lowest;
  if (shared) mask_scores(a, batch, head, 0, mask);
  for (int64_t query = first; query < last; query += kQueries) {
    const int count = static_cast<int>(last - query < kQueries ? last - query : kQueries), fours = (count + 3) / 4 * 4;
    const int64_t seen = a.causal && query + count < a.keys ? query + count : a.keys, padded = (seen + kPanel - 1) / kPanel * kPanel;
    for (int64_t f = 0; f < a.features; f += 16)
      pack_features<N>(q + query * a.q_strides.token + f, a.q_strides.token, count, kQueries, a.scale, queries + f * kQueries / N::size);
    for (int64_t t = 0; t < seen; t += kPanel)
      for (int r = 0; r < fours; r += 4)
        multiply<N>({keys + t * a.features / N::size, kPanel, queries + r, 1, kQueries, a.features / N::size, mask + t, 0,
                     scores + r * all + t, all}, kPanel);
    float parts[kQueries] = {};
    for (int r = 0; r < count; ++r) {
      float* row = scores + r * all;
      if (!shared) mask_scores(a, batch, head, query + r, row);
      if (a.causal)
        for (int64_t t = query + r + 1; t < padded; ++t) row[t] = lowest;
      parts[r] = exponentials(row, padded);
      N::narrow(row, padded);
    }
    for (int64_t at = 0; at < fours * a.features; at += LANES) store(rows + at, Floats{});
    for (int64_t t = 0; t < seen; t += kPanel)
      for (int r = 0; r < fours; r += 4) {
        const int64_t tokens = seen - t < kPanel ? seen - t : kPanel;
        float* to = rows + r * a.features;
        multiply<N>({values + t * a.features / N::size, a.features, scores + r * all + t / N::size, all, 1,
                     (tokens + N::size - 1) / N::size, to, a.features, to, a.features}, a.features);
      }
    for (int r = 0; r < count; ++r) {
      float* to = a.result + ((batch * a.queries + query + r) * a.heads + head) * a.features;
      for (int64_t f = 0; f < a.features; f += LANES)
        store(to + f, parts[r] == 0.0f ? Floats{} : load(rows + r * a.features + f) * fill(parts[r]));
    }
  }
}

}  // namespace
}  // namespace graphprune
