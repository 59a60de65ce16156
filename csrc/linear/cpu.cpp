#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "common/cpu_memory.h"
#include "common/cpu_shares.h"
#include "common/divide_up.h"
#include "common/tensor_checks.h"
#include "common/tensor_memory.h"
#include "linear/cpu_amx.h"
#include "linear/cpu_kernel.h"

namespace flexvar {
namespace {

constexpr const char* kOp = "linear";
// Multiply-adds below which a second thread costs more than it brings.
constexpr int64_t kWorkPerTask = 200'000;

FloatElement element_of(const Tensor& t, const char* name) {
  return float_element(t.scalar_type(), kOp, name);
}

// A small factor, contiguous and in float32.
std::optional<Tensor> floats(const std::optional<Tensor>& t, const char* name) {
  if (!t) return std::nullopt;
  element_of(*t, name);
  return as_contiguous(as_dtype(*t, ScalarType::Float));
}

const float* data_or_null(const std::optional<Tensor>& t) {
  return t ? t->const_data_ptr<float>() : nullptr;
}

#ifdef FLEXVAR_X86
void run_on_tiles(const LinearParams& params) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t panel_bytes = amx::linear_amx_panel_bytes(params);
  const int64_t most_tiles = divide_up(std::min(params.rows, amx::kLinearAmxMaxRows), 16);
  const int64_t groups = divide_up(params.columns, 32);  // of columns
  const int64_t work = params.columns * params.depth / kWorkPerTask;
  const int64_t runs = std::clamp<int64_t>(work, 1, std::min(groups, threads));
  Scratch<char> panels(most_tiles * panel_bytes), scratch(runs * amx::kLinearAmxScratchBytes);
  for (int64_t begin = 0; begin < params.rows; begin += amx::kLinearAmxMaxRows) {
    const amx::LinearAmxRows rows{begin, std::min(begin + amx::kLinearAmxMaxRows, params.rows)};
    // Fewer numbers are packed sooner than another thread wakes up.
    const int64_t grain = std::max<int64_t>(1, 4096 / params.depth);
    torch::stable::parallel_for(0, divide_up(rows.end - rows.begin, 16), grain,
                                [&](int64_t from, int64_t to) {
                                  amx::linear_amx_pack(params, rows, from, to, panels.data());
                                });
    torch::stable::parallel_for(0, runs, 1, [&](int64_t first_run, int64_t last_run) {
      for (int64_t run = first_run; run < last_run; ++run) {
        const int64_t last = groups * (run + 1) / runs * 32;
        for (int64_t column = groups * run / runs * 32; column < last;
             column += amx::kLinearAmxColumns) {
          amx::linear_amx_block(params,
                                {rows, column, std::min(column + amx::kLinearAmxColumns, last)},
                                panels.data(), scratch.data() + run * amx::kLinearAmxScratchBytes);
        }
      }
    });
  }
}
#endif

void multiply_rows(const LinearParams& params, const LinearRows& rows) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t work = rows.count * params.columns * params.depth / kWorkPerTask;
  const int64_t panels = divide_up(params.columns, kLinearColumns);
  // Few panels are shared out by rows.
  const int64_t tasks = std::clamp<int64_t>(work, 1, 2 * threads);
  const int64_t groups = divide_up(rows.count, kLinearGroup);
  const int64_t block_groups =
      divide_up(groups, std::clamp<int64_t>(divide_up(tasks, panels), 1, groups));
  const int64_t block_rows = block_groups * kLinearGroup,
                row_blocks = divide_up(groups, block_groups);
  const int64_t blocks = row_blocks * panels;
  const int64_t runs = std::clamp<int64_t>(work, 1, std::min(blocks, threads));

  Scratch<float> scratch(runs * kLinearScratchSize);
  const auto kernel = FLEXVAR_SELECT_CPU_KERNEL(linear_block);
  Shares shares(blocks, runs);
  torch::stable::parallel_for(0, runs, 1, [&](int64_t run, int64_t) {
    shares.take([&](int64_t begin, int64_t end) {
      // All rows meet a panel of the weight before the next: it is read from memory once.
      for (int64_t b = begin; b < end; ++b) {
        const int64_t row = b % row_blocks * block_rows, column = b / row_blocks * kLinearColumns;
        kernel(params, rows,
               {row, std::min(row + block_rows, rows.count), column,
                std::min(column + kLinearColumns, params.columns)},
               scratch.data() + run * kLinearScratchSize);
      }
    });
  });
}

void run(const LinearParams& params) {
#ifdef FLEXVAR_X86
  if (selected_cpu_isa() == CpuIsa::amx) return run_on_tiles(params);
#endif
  const int64_t chunks = divide_up(params.rows, kLinearRows);
  const int64_t most_rows = divide_up(params.rows, chunks);
  Scratch<float> entries(LinearRows::packed_size(most_rows, params.depth));
  for (int64_t first = 0; first < params.rows; first += most_rows) {
    const LinearRows rows{first, std::min(most_rows, params.rows - first), entries.data()};
    const auto pack = FLEXVAR_SELECT_CPU_KERNEL(linear_pack);
    // Fewer numbers are packed sooner than another thread wakes up.
    const int64_t grain = std::max<int64_t>(1, 65536 / params.depth);
    torch::stable::parallel_for(
        0, rows.count, grain, [&](int64_t begin, int64_t end) { pack(params, rows, begin, end); });
    multiply_rows(params, rows);
  }
}

Tensor linear_cpu(const Tensor& x_in, const Tensor& weight_in, std::optional<Tensor> bias_in,
                  std::string activation, std::optional<Tensor> gate_in,
                  std::optional<Tensor> residual_in) {
  check_rank(weight_in, 2, kOp, "weight");
  STD_TORCH_CHECK(x_in.dim() >= 1 && x_in.size(x_in.dim() - 1) == weight_in.size(1), kOp,
                  ": x must have the last dimension of weight");
  STD_TORCH_CHECK(weight_in.size(1) > 0, kOp, ": weight must have at least one column");
  const Tensor x = as_contiguous(x_in), weight = as_contiguous(weight_in);
  const auto bias = floats(bias_in, "bias"), gate = floats(gate_in, "gate");
  LinearParams params{};
  params.columns = weight.size(0);
  params.depth = weight.size(1);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = params.columns;
  params.rows = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) params.rows *= shape[i];

  params.x_element = element_of(x, "x");
  params.weight_element = element_of(weight, "weight");
  STD_TORCH_CHECK(
      params.weight_element == params.x_element || params.weight_element == FloatElement::float32,
      kOp, ": weight must have the dtype of x, or float32");
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == params.columns), kOp,
                  ": bias must have shape [N]");
  params.bias = data_or_null(bias);
  params.rows_per_gate = params.rows;
  if (gate) {
    STD_TORCH_CHECK(gate->dim() >= 1 && gate->size(gate->dim() - 1) == params.columns, kOp,
                    ": gate must have N columns");
    int64_t gates = 1;
    for (int64_t i = 0; i + 1 < gate->dim(); ++i) gates *= gate->size(i);
    STD_TORCH_CHECK(gates > 0 ? params.rows % gates == 0 : params.rows == 0, kOp,
                    ": gate must divide the rows of x");
    params.rows_per_gate = params.rows / std::max<int64_t>(gates, 1);
    params.gate = data_or_null(gate);
  }
  STD_TORCH_CHECK(activation == "none" || activation == "gelu_tanh", kOp,
                  ": activation must be none or gelu_tanh, got ", activation);
  params.gelu = activation == "gelu_tanh";

  std::optional<Tensor> residual;
  if (residual_in) {
    residual = as_contiguous(*residual_in);
    STD_TORCH_CHECK(
        std::equal(shape.begin(), shape.end(), residual->sizes().begin(), residual->sizes().end()),
        kOp, ": residual must have the shape of the result");
    params.residual = residual->const_data_ptr();
  }
  Tensor out = empty_cpu(shape, residual ? residual->scalar_type() : x.scalar_type());
  params.out_element = element_of(out, "residual");
  params.x = x.const_data_ptr();
  params.weight = weight.const_data_ptr();
  params.out = out.mutable_data_ptr();
  if (out.numel() > 0) run(params);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(flexvar, CPU, m) { m.impl("linear", TORCH_BOX(&linear_cpu)); }

}  // namespace
}  // namespace flexvar
