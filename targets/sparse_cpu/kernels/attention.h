// Attention, as the other kernels take it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "panel.h"

namespace graphprune {

// Where a [batch, heads, tokens, features] tensor has its entries; features lie side by side.
struct Strides {
  int64_t batch, head, token;
};

// softmax(scale q k^T + mask) v. A query that may see nothing gives zeros.
struct Attention {
  const float *q, *k, *v;
  Strides q_strides, k_strides, v_strides;
  const uint8_t* seen;     // bool, true = may be seen; or null
  const float* added;      // added to the scores; or null
  int64_t mask_strides[4]; // of either, in batch, heads, queries, keys; 0 where it is broadcast
  int64_t batch, heads, queries, keys, features;  // features: a multiple of 16
  float scale;
  bool causal;             // a query sees keys up to its own place
  float* result;           // [batch, queries, heads, features]
};

constexpr int kQueries = 16;  // that are computed together

// Floats of working memory that one call of a kernel needs.
inline int64_t attention_scratch(const Attention& a) {
  const int64_t keys = (a.keys + kPanel - 1) / kPanel * kPanel;
  return 2 * keys * a.features + (kQueries + 1) * keys + 2 * kQueries * a.features;
}

}  // namespace graphprune
