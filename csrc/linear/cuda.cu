#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "common/cuda_launch.h"
#include "common/tensor_checks.h"
#include "linear/kernel.cuh"

namespace flexvar {
namespace {

constexpr const char* kOp = "linear";

// How many blocks share the depth of a tile: so many that no multiprocessor is idle, if the depth
// allows it, and that each one's part fits into its shared memory.
int64_t depth_parts(int64_t tiles, int64_t steps, int64_t multiprocessors) {
  int64_t parts = 1;
  while (parts < kLinearCudaMostParts && parts * 2 <= steps &&
         (steps > parts * kLinearCudaMostSteps || tiles * parts < multiprocessors)) {
    parts *= 2;
  }
  return parts;
}

// Contiguous, and where asynchronous copies of 16 bytes can begin.
Tensor aligned_contiguous(const Tensor& t) {
  const Tensor contiguous = torch::stable::contiguous(t);
  if (reinterpret_cast<uintptr_t>(contiguous.const_data_ptr()) % 16 == 0) return contiguous;
  Tensor copy = torch::stable::empty_like(contiguous);
  torch::stable::copy_(copy, contiguous);
  return copy;
}

template <class T>
void run(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool gelu,
         Tensor& out, cudaStream_t stream) {
  const int64_t columns = weight.size(0), depth = weight.size(1), rows = x.numel() / depth;
  const LinearCudaParams<T> params{static_cast<const T*>(x.const_data_ptr()),
                                   static_cast<const T*>(weight.const_data_ptr()),
                                   bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr,
                                   static_cast<T*>(out.mutable_data_ptr()),
                                   static_cast<int>(rows),
                                   static_cast<int>(columns),
                                   static_cast<int>(depth),
                                   gelu};
  const int64_t column_tiles = (columns + kLinearCudaTile - 1) / kLinearCudaTile;
  const int64_t steps = depth / kLinearCudaTile;
  const int64_t row_tiles = (rows + kLinearCudaTile - 1) / kLinearCudaTile;
  const int64_t parts = depth_parts(column_tiles * row_tiles, steps,
                                    device_attribute(cudaDevAttrMultiProcessorCount, x, kOp));
  const int64_t steps_of_part = (steps + parts - 1) / parts;
  STD_TORCH_CHECK(steps_of_part <= kLinearCudaMostSteps, kOp, ": on CUDA x must have at most ",
                  kLinearCudaMostParts * kLinearCudaMostSteps * kLinearCudaTile, " columns, got ",
                  depth);
  const size_t shared_bytes = linear_cuda_shared_bytes(static_cast<int>(steps_of_part));
  allow_shared_memory(&linear_few_rows_kernel<T>, static_cast<int64_t>(shared_bytes), kOp);
  const dim3 grid(static_cast<unsigned>(parts), static_cast<unsigned>(column_tiles),
                  static_cast<unsigned>(row_tiles));
  launch_clusters(kOp, stream, &linear_few_rows_kernel<T>, grid, kLinearCudaThreads, shared_bytes,
                  params);
}

// What flexvar_ext.linear gives to CUDA: few rows in 16 bits, activation and bias.
Tensor linear_cuda(const Tensor& x_in, const Tensor& weight_in, std::optional<Tensor> bias_in,
                   std::string activation, std::optional<Tensor> gate,
                   std::optional<Tensor> residual) {
  STD_TORCH_CHECK(!gate && !residual, kOp, ": on CUDA there is no gate and no residual");
  STD_TORCH_CHECK(activation == "none" || activation == "gelu_tanh", kOp,
                  ": activation must be none or gelu_tanh, got ", activation);
  check_rank(weight_in, 2, kOp, "weight");
  STD_TORCH_CHECK(x_in.dim() >= 1 && x_in.size(x_in.dim() - 1) == weight_in.size(1), kOp,
                  ": x must have the last dimension of weight");
  const ScalarType type = x_in.scalar_type();
  STD_TORCH_CHECK(
      (type == ScalarType::Half || type == ScalarType::BFloat16) && weight_in.scalar_type() == type,
      kOp, ": on CUDA x and weight must both be float16 or both bfloat16");
  STD_TORCH_CHECK(weight_in.size(0) % 4 == 0 && weight_in.size(1) % kLinearCudaTile == 0 &&
                      weight_in.size(1) > 0,
                  kOp, ": on CUDA the rows of weight must be a multiple of 4, its columns of ",
                  kLinearCudaTile);
  STD_TORCH_CHECK(!bias_in || (bias_in->dim() == 1 && bias_in->size(0) == weight_in.size(0)), kOp,
                  ": bias must have shape [N]");
  const CudaScope scope(x_in);
  const Tensor x = aligned_contiguous(x_in), weight = aligned_contiguous(weight_in);
  std::optional<Tensor> bias;
  if (bias_in) bias = torch::stable::contiguous(torch::stable::to(*bias_in, type));
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = weight.size(0);
  Tensor out = torch::stable::new_empty(x, shape);
  if (out.numel() == 0) return out;
  STD_TORCH_CHECK(x.numel() / weight.size(1) <= int64_t{65535} * kLinearCudaTile, kOp,
                  ": on CUDA x must have at most ", 65535 * kLinearCudaTile, " rows");
  const bool gelu = activation == "gelu_tanh";
  if (type == ScalarType::Half) {
    run<__half>(x, weight, bias, gelu, out, scope.stream());
  } else {
    run<__nv_bfloat16>(x, weight, bias, gelu, out, scope.stream());
  }
  return out;
}

FLEXVAR_LAUNCHERS(m) { m.impl("linear", TORCH_BOX(&linear_cuda)); }

}  // namespace
}  // namespace flexvar
