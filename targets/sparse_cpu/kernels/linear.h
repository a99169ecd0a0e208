// Sparse linear layers on panels: what the kernels of every instruction set take.
//
// A panel holds 64 tokens, feature by feature: [features][64]. The last panel of a tensor is padded with whatever is there; nothing
// that is computed for its padding is ever read. Panels of bytes have their 64 tokens in the order of `byte_place`, in which
// four features unpack into products of four without another shuffle.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention.h"
#include "panel.h"

namespace graphprune {

constexpr int kUnit = 16;   // rows that a thread takes at once: a whole number of blocks
constexpr int kGroup = 4;   // products that an integer dot instruction adds up

// Place of a token in a row of a panel of bytes: after unpacking, vector j has the tokens 16 j to 16 j + 15 in their order.
constexpr int byte_place(int token) { return (token / 4 % 4) * 16 + token / 16 * 4 + token % 4; }

enum class Activation : int { none, relu, gelu, gelu_tanh };
enum class Out : int { rows, panels, bytes };

// Blocks of `block` rows by one column; block rows are in order, and so are the columns of one.
struct Blocks {
  const uint16_t* columns;
  const int32_t* starts;  // of each block row, in columns; of int8 in groups
  int block;              // 4 or 1
  int64_t rows;
  int64_t features;
};

// What happens to a sum before it is stored: bias, activation, residual, in this order.
struct Epilogue {
  const float* bias;      // [rows], or null
  const float* residual;  // of the layout of a float result, or null
  Activation activation;
  Out out;
  void* result;           // float [tokens, rows], float [panels, rows, 64] or bytes [panels, rows, 64]
  float scale;            // of bytes
  int32_t zero_point;
};

struct FloatLinear {
  Blocks blocks;
  const float* values;     // [columns, block], or null
  const uint16_t* halves;  // the same in bfloat16
  const float* panels;
  int64_t tokens;
  Epilogue epilogue;
};

struct IntegerLinear {
  Blocks blocks;
  const int8_t* values;       // [groups, block, 4]
  const int32_t* correction;  // [rows]: zero-point of the input times the sum of the row
  const float* scales;        // [rows]: scale of the input times that of the row
  const uint8_t* panels;
  int64_t tokens;
  Epilogue epilogue;
};

// Rows of floats into one panel.
struct Pack {
  const float* rows;  // [tokens, features]
  int64_t tokens;
  int64_t features;
  float scale;         // of bytes
  int32_t zero_point;
};

// The kernels of one instruction set. Each call works on one panel or head, so that threads share nothing but what they read.
struct Kernels {
  const char* name;
  void (*pack)(const Pack&, int64_t panel, int64_t first, int64_t last, float* result);  // features first to last
  void (*pack_bytes)(const Pack&, int64_t panel, int64_t first, int64_t last, uint8_t* result);
  void (*linear)(const FloatLinear&, int64_t panel, int64_t first_unit, int64_t last_unit);
  void (*integer_linear)(const IntegerLinear&, int64_t panel, int64_t first_unit, int64_t last_unit);
  void (*attention)(const Attention&, int64_t batch, int64_t head, int64_t first, int64_t last, float* scratch);  // queries first to last
  void (*bfloat16_attention)(const Attention&, int64_t batch, int64_t head, int64_t first, int64_t last, float* scratch);  // in bfloat16, where that is faster
};

const Kernels& portable_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

// The best that this CPU runs, or the one that the environment variable GRAPHPRUNE_SPARSE_CPU_ISA names; null if it does not run here.
const Kernels* find_kernels(const char* name);

}  // namespace graphprune
