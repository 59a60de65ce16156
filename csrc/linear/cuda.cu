#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "common/cuda_launch.h"
#include "common/divide_up.h"
#include "common/tensor_checks.h"
#include "common/tensor_memory.h"
#include "linear/kernel_few_rows.cuh"

namespace flexvar {
namespace {

constexpr const char* kOp = "linear_few_rows";

// Copies of 16 bytes need numbers that begin at a multiple of that.
Tensor as_aligned(const Tensor& t) {
  const Tensor rows = as_contiguous(t);
  if (reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0) return rows;
  Tensor copy = empty_alike(rows);
  torch::stable::copy_(copy, rows);
  return copy;
}

template <class T, int kRowTiles, int kFeatures>
void launch(const LinearFewRowsCudaParams<T>& params, cudaStream_t stream) {
  const auto kernel = linear_few_rows_kernel<T, kRowTiles, kFeatures>;
  const int64_t shared = few_rows_shared_bytes<kRowTiles, kFeatures>(params.depth);
  allow_shared_memory(kernel, shared, kOp);
  const dim3 grid(grid_size(divide_up(int64_t{params.columns}, int64_t{kFeatures} * 8), kOp),
                  static_cast<unsigned>(divide_up(params.rows, kRowTiles * 16)));
  launch_overlapping(kOp, stream, kernel, grid, kFewRowsThreads, static_cast<size_t>(shared),
                     params);
}

// As many features a block as leave one block for every multiprocessor, and fit beside the next
// kernel's.
template <class T, int kRowTiles>
void launch(const LinearFewRowsCudaParams<T>& params, cudaStream_t stream) {
  const int64_t multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, kOp);
  const int64_t wanted = divide_up(divide_up(int64_t{params.columns}, int64_t{8}), multiprocessors);
  const auto fits = [&](int64_t features) {
    return features * few_rows_shared_bytes<1, 1>(params.depth) <= kFewRowsMostShared;
  };
  if (wanted >= 4 && fits(4)) {
    launch<T, kRowTiles, 4>(params, stream);
  } else if (wanted >= 3 && fits(3)) {
    launch<T, kRowTiles, 3>(params, stream);
  } else if (wanted >= 2 && fits(2)) {
    launch<T, kRowTiles, 2>(params, stream);
  } else {
    launch<T, kRowTiles, 1>(params, stream);
  }
}

Tensor linear_few_rows_cuda(const Tensor& x_in, const Tensor& weight_in,
                            std::optional<Tensor> bias_in, const std::string& activation,
                            bool constant) {
  const ScalarType dtype = x_in.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16, kOp,
                  ": x must have dtype float16 or bfloat16");
  check_rank(weight_in, 2, kOp, "weight");
  check_dtype(weight_in, dtype, kOp, "weight");
  check_same_device(x_in, weight_in, kOp, "weight");
  const int64_t columns = weight_in.size(0), depth = weight_in.size(1);
  STD_TORCH_CHECK(x_in.dim() >= 1 && x_in.size(-1) == depth, kOp, ": x must have shape [..., ",
                  depth, "]");
  STD_TORCH_CHECK(columns % 8 == 0 && columns < (int64_t{1} << 31) - 64, kOp,
                  ": weight must have a multiple of 8 rows, got ", columns);
  const bool fits = few_rows_shared_bytes<1, 1>(depth) <= kFewRowsMostShared;
  STD_TORCH_CHECK(depth >= kFewRowsChunk && depth % kFewRowsChunk == 0 && fits, kOp,
                  ": weight must have a multiple of 32 columns up to 6400, got ", depth);
  STD_TORCH_CHECK(activation == "none" || activation == "gelu_tanh", kOp,
                  ": activation must be none or gelu_tanh, got ", activation);
  if (bias_in) {
    check_rank(*bias_in, 1, kOp, "bias");
    check_dtype(*bias_in, dtype, kOp, "bias");
    check_same_device(x_in, *bias_in, kOp, "bias");
    STD_TORCH_CHECK(bias_in->size(0) == columns, kOp, ": bias must have shape [", columns, "]");
  }
  const int64_t rows = x_in.numel() / depth;
  STD_TORCH_CHECK(rows < int64_t{16} * 65535, kOp, ": x must have few rows, got ", rows);
  const CudaScope scope(x_in);
  std::vector<int64_t> shape(x_in.sizes().begin(), x_in.sizes().end());
  shape.back() = columns;
  Tensor out = empty_contiguous(shape, dtype, device_of(x_in));
  if (out.numel() == 0) return out;
  const Tensor x = as_aligned(x_in), weight = as_aligned(weight_in);
  std::optional<Tensor> bias;
  if (bias_in) bias = as_contiguous(*bias_in);
  const auto run = [&]<class T>(T) {
    LinearFewRowsCudaParams<T> params{};
    params.x = static_cast<const T*>(x.const_data_ptr());
    params.weight = static_cast<const T*>(weight.const_data_ptr());
    if (bias) params.bias = static_cast<const T*>(bias->const_data_ptr());
    params.out = static_cast<T*>(out.mutable_data_ptr());
    params.rows = static_cast<int>(rows);
    params.columns = static_cast<int>(columns);
    params.depth = static_cast<int>(depth);
    params.gelu = activation == "gelu_tanh";
    params.constant = constant;
    if (rows <= 16) {
      launch<T, 1>(params, scope.stream());
    } else {
      launch<T, 2>(params, scope.stream());
    }
  };
  if (dtype == ScalarType::Half) {
    run(__half{});
  } else {
    run(__nv_bfloat16{});
  }
  return out;
}

FLEXVAR_LAUNCHERS(m) { m.impl("linear_few_rows", TORCH_BOX(&linear_few_rows_cuda)); }

}  // namespace
}  // namespace flexvar
