// The operators of graphprune/ir/sparse_operators.py on the CPU, in torch's threads.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <vector>

#include "linear.h"
#include "results.h"

namespace graphprune {
namespace {

// Those that GRAPHPRUNE_SPARSE_CPU_ISA asks for, or the best; null where they do not run here.
const Kernels* chosen() {
  static const Kernels* found = find_kernels(std::getenv("GRAPHPRUNE_SPARSE_CPU_ISA"));
  return found;
}

const Kernels& kernels() {
  TORCH_CHECK(chosen() != nullptr, "GRAPHPRUNE_SPARSE_CPU_ISA names an instruction set that this CPU does not run; choose avx512, avx2 or "
              "portable, or unset it");
  return *chosen();
}

void expect(const at::Tensor& x, at::ScalarType type, int64_t dims, const char* name) {
  TORCH_CHECK(x.device().is_cpu() && x.scalar_type() == type && x.dim() == dims && x.is_contiguous(), name, " must be contiguous ", type,
              " with ", dims, " dimensions on the CPU, and is ", x.scalar_type(), " ", x.sizes());
}

int64_t panels_of(int64_t tokens) { return (tokens + kPanel - 1) / kPanel; }

at::Tensor rows_of(const at::Tensor& x) {
  TORCH_CHECK(x.device().is_cpu() && x.scalar_type() == at::kFloat && x.dim() > 0, "activations must be float32 on the CPU, and are ",
              x.scalar_type(), " ", x.sizes());
  return x.contiguous();
}

// Runs work(panel, part, parts) over all panels (or heads), each in as many parts as give every thread the same number of them.
template <class Work>
void over_panels(int64_t panels, int64_t pieces, const Work& work) {
  if (panels == 0 || pieces == 0) return;
  const int64_t threads = at::get_num_threads();
  const int64_t parts = std::min(pieces, threads / std::gcd(panels, threads));
  at::parallel_for(0, panels * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) work(task / parts, task % parts, parts);
  });
}

template <class T, class Function>
at::Tensor packed(const at::Tensor& x, at::ScalarType type, float scale, int64_t zero_point, Function function) {
  const at::Tensor rows = rows_of(x);
  const int64_t features = rows.size(-1), tokens = features == 0 ? 0 : rows.numel() / features, panels = panels_of(tokens);
  at::Tensor result = make_result({panels, features, kPanel}, type);
  const Pack pack{rows.const_data_ptr<float>(), tokens, features, scale, static_cast<int32_t>(zero_point)};
  T* to = result.mutable_data_ptr<T>();
  const int64_t pieces = (features + kUnit - 1) / kUnit;
  over_panels(panels, pieces, [&](int64_t panel, int64_t part, int64_t parts) {
    const int64_t first = pieces * part / parts * kUnit, last = std::min(pieces * (part + 1) / parts * kUnit, features);
    function(pack, panel, first, last, to + panel * features * kPanel);
  });
  return result;
}

at::Tensor pack(const at::Tensor& x) { return packed<float>(x, at::kFloat, 1.0f, 0, kernels().pack); }

at::Tensor pack_bytes(const at::Tensor& x, double scale, int64_t zero_point) {
  return packed<uint8_t>(x, at::kByte, static_cast<float>(scale), zero_point, kernels().pack_bytes);
}

Activation activation_of(c10::string_view name) {
  if (name == "none") return Activation::none;
  if (name == "relu") return Activation::relu;
  if (name == "gelu") return Activation::gelu;
  TORCH_CHECK(name == "gelu_tanh", "there is no activation ", name);
  return Activation::gelu_tanh;
}

// What both kinds of products share: shapes, the result, and the division of work by the number of stored blocks.
struct Call {
  int64_t tokens;
  int64_t features;
  at::Tensor result, added;
  Epilogue epilogue;

  Call(const at::Tensor& panels, at::ScalarType type, const at::Tensor& columns, const at::Tensor& starts,
       const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual, at::IntArrayRef sizes, int64_t rows,
       c10::string_view activation, c10::string_view form, double scale, int64_t zero_point) {
    expect(panels, type, 3, "panels");
    expect(starts, at::kInt, 1, "starts");
    TORCH_CHECK(columns.scalar_type() == at::kShort && columns.is_contiguous(), "columns must be contiguous int16");
    tokens = std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<>());
    features = panels.size(1);
    TORCH_CHECK(panels.size(0) == panels_of(tokens) && panels.size(2) == kPanel, "panels ", panels.sizes(), " do not hold ", tokens,
                " tokens");
    Out out = Out::rows;
    std::vector<int64_t> shape(sizes.begin(), sizes.end());
    shape.push_back(rows);
    if (form != "rows") {
      TORCH_CHECK(form == "panels" || form == "bytes", "there is no result ", form);
      out = form == "bytes" ? Out::bytes : Out::panels;
      shape = {panels.size(0), rows, kPanel};
    }
    result = make_result(shape, out == Out::bytes ? at::kByte : at::kFloat);
    if (bias) {
      expect(*bias, at::kFloat, 1, "bias");
      TORCH_CHECK(bias->size(0) == rows, "bias has ", bias->size(0), " entries for ", rows, " rows");
    }
    if (residual) {
      TORCH_CHECK(out != Out::bytes && residual->scalar_type() == at::kFloat && residual->sizes() == result.sizes(), "the residual ",
                  residual->scalar_type(), " ", residual->sizes(), " does not fit the result ", form, " ", result.sizes());
      added = residual->contiguous();
    }
    epilogue = {bias ? bias->const_data_ptr<float>() : nullptr, residual ? added.const_data_ptr<float>() : nullptr,
                activation_of(activation), out, result.mutable_data_ptr(), static_cast<float>(scale), static_cast<int32_t>(zero_point)};
  }
};

Blocks blocks_of(const at::Tensor& columns, const at::Tensor& starts, int64_t stored, int64_t block, int64_t rows, int64_t features) {
  const int64_t units = (rows + kUnit - 1) / kUnit;
  TORCH_CHECK(block == 4 || block == 1, "blocks of ", block, " rows have no kernel");
  TORCH_CHECK(starts.size(0) == units * kUnit / block + 1, "starts has ", starts.size(0), " entries, which is not of ", rows, " rows");
  const int32_t* first = starts.const_data_ptr<int32_t>();
  const int32_t* last = first + starts.size(0) - 1;
  TORCH_CHECK(*first == 0 && *last == stored && std::is_sorted(first, last + 1), "starts do not divide ", stored, " blocks into rows");
  return {reinterpret_cast<const uint16_t*>(columns.const_data_ptr<int16_t>()), starts.const_data_ptr<int32_t>(), static_cast<int>(block),
          rows, features};
}

// The unit at which the first `part` of `parts` equal shares of the stored blocks ends.
int64_t cut(const Blocks& blocks, int64_t units, int64_t part, int64_t parts) {
  if (part == 0 || part == parts) return part == 0 ? 0 : units;
  const int64_t rows = kUnit / blocks.block, empty = 8;  // a block row costs as much as so many blocks even where it has none
  const int64_t total = blocks.starts[units * rows] + units * rows * empty;
  int64_t low = 0, high = units;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if ((blocks.starts[middle * rows] + middle * rows * empty) * parts < total * part) low = middle + 1;
    else high = middle;
  }
  return low;
}

template <class Problem>
void run(const Problem& problem, void (*kernel)(const Problem&, int64_t, int64_t, int64_t)) {
  const int64_t units = (problem.blocks.rows + kUnit - 1) / kUnit;
  over_panels(panels_of(problem.tokens), units, [&](int64_t panel, int64_t part, int64_t parts) {
    kernel(problem, panel, cut(problem.blocks, units, part, parts), cut(problem.blocks, units, part + 1, parts));
  });
}

at::Tensor sparse_linear(const at::Tensor& panels, const at::Tensor& values, const at::Tensor& columns, const at::Tensor& starts,
                         const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual, at::IntArrayRef sizes,
                         int64_t rows, c10::string_view activation, c10::string_view form, double scale, int64_t zero_point) {
  Call call(panels, at::kFloat, columns, starts, bias, residual, sizes, rows, activation, form, scale, zero_point);
  const bool half = values.scalar_type() == at::kBFloat16;
  expect(values, half ? at::kBFloat16 : at::kFloat, 2, "values");
  TORCH_CHECK(columns.numel() == values.size(0), "there are ", values.size(0), " blocks and ", columns.numel(), " columns");
  run(FloatLinear{blocks_of(columns, starts, values.size(0), values.size(1), rows, call.features), half ? nullptr : values.const_data_ptr<float>(),
                  half ? reinterpret_cast<const uint16_t*>(values.const_data_ptr<at::BFloat16>()) : nullptr, panels.const_data_ptr<float>(),
                  call.tokens, call.epilogue},
      kernels().linear);
  return call.result;
}

at::Tensor sparse_linear_int8(const at::Tensor& panels, const at::Tensor& values, const at::Tensor& columns, const at::Tensor& starts,
                              const at::Tensor& correction, const at::Tensor& scales, const std::optional<at::Tensor>& bias,
                              const std::optional<at::Tensor>& residual, at::IntArrayRef sizes, int64_t rows,
                              c10::string_view activation, c10::string_view form, double scale, int64_t zero_point) {
  Call call(panels, at::kByte, columns, starts, bias, residual, sizes, rows, activation, form, scale, zero_point);
  expect(values, at::kChar, 3, "values");
  expect(correction, at::kInt, 1, "correction");
  expect(scales, at::kFloat, 1, "scales");
  TORCH_CHECK(correction.size(0) == rows && scales.size(0) == rows, "correction and scales must have ", rows, " entries");
  TORCH_CHECK(columns.numel() == values.size(0) * kGroup && values.size(2) == kGroup, "there are ", values.size(0), " groups and ",
              columns.numel(), " columns");
  run(IntegerLinear{blocks_of(columns, starts, values.size(0), values.size(1), rows, call.features), values.const_data_ptr<int8_t>(),
                    correction.const_data_ptr<int32_t>(), scales.const_data_ptr<float>(), panels.const_data_ptr<uint8_t>(), call.tokens,
                    call.epilogue},
      kernels().integer_linear);
  return call.result;
}

at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& mask, double scale,
                     bool causal, bool bfloat16) {
  for (const at::Tensor& x : {q, k, v})
    TORCH_CHECK(x.device().is_cpu() && x.scalar_type() == at::kFloat && x.dim() == 4 && (x.stride(3) == 1 || x.size(3) == 1),
                "queries, keys and values must be float32 [batch, heads, tokens, features] on the CPU, features side by side");
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), features = q.size(3), keys = k.size(2);
  TORCH_CHECK(features % kUnit == 0, "attention takes features in multiples of 16, not ", features);
  TORCH_CHECK(k.sizes() == v.sizes() && k.size(0) == batch && k.size(1) == heads && k.size(3) == features, "keys ", k.sizes(),
              " and values ", v.sizes(), " do not fit queries ", q.sizes());
  at::Tensor result = make_result({batch, queries, heads, features}, at::kFloat);
  const auto strides = [](const at::Tensor& x) { return Strides{x.stride(0), x.stride(1), x.stride(2)}; };
  Attention a{q.const_data_ptr<float>(), k.const_data_ptr<float>(), v.const_data_ptr<float>(), strides(q), strides(k), strides(v),
              nullptr, nullptr, {}, batch, heads, queries, keys, features, static_cast<float>(scale), causal,
              result.mutable_data_ptr<float>()};
  at::Tensor spread;
  if (mask) {
    TORCH_CHECK(mask->device().is_cpu() && (mask->scalar_type() == at::kBool || mask->scalar_type() == at::kFloat),
                "the mask must be bool or float32 on the CPU, and is ", mask->scalar_type());
    spread = mask->expand({batch, heads, queries, keys});
    if (mask->scalar_type() == at::kBool) a.seen = reinterpret_cast<const uint8_t*>(spread.const_data_ptr<bool>());
    else a.added = spread.const_data_ptr<float>();
    std::copy_n(spread.strides().begin(), 4, a.mask_strides);
  }
  if (result.numel() == 0) return result.transpose(1, 2);
  if (keys == 0) return result.zero_().transpose(1, 2);
  const int64_t pieces = (queries + kQueries - 1) / kQueries;
  const auto kernel = bfloat16 ? kernels().bfloat16_attention : kernels().attention;
  over_panels(batch * heads, pieces, [&](int64_t head, int64_t part, int64_t parts) {
    constexpr size_t line = 64 / sizeof(float);  // registers are loaded from two lines of the cache where they do not begin at one
    thread_local std::vector<float> scratch;
    scratch.resize(attention_scratch(a) + line);
    const size_t behind = reinterpret_cast<uintptr_t>(scratch.data()) / sizeof(float) % line;
    kernel(a, head / heads, head % heads, pieces * part / parts * kQueries, std::min(pieces * (part + 1) / parts * kQueries, queries),
           scratch.data() + (line - behind) % line);
  });
  return result.transpose(1, 2);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(graphprune, m) {
  m.def("sparse_cpu_isa() -> str", [] { return std::string(chosen() == nullptr ? "" : chosen()->name); });
}

TORCH_LIBRARY_IMPL(graphprune, CPU, m) {
  m.impl("pack", pack);
  m.impl("pack_bytes", pack_bytes);
  m.impl("sparse_linear", sparse_linear);
  m.impl("sparse_linear_int8", sparse_linear_int8);
  m.impl("attention", attention);
}

}  // namespace graphprune
