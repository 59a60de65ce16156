// What every CUDA launcher does around its kernels: device guard, current stream, launch check.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

namespace flexvar {

// Makes the tensor's device current for the scope, and holds that device's current stream.
class CudaScope {
 public:
  explicit CudaScope(const torch::stable::Tensor& tensor)
      : guard_(tensor.get_device_index()), stream_(nullptr) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, op, ": CUDA launch failed: ", cudaGetErrorString(error),
                  error == cudaErrorNoKernelImageForDevice
                      ? " (this build has no code for this GPU; rebuild with CUDAARCHS set to it, "
                        "see `flexvar doctor`)"
                      : "");
}

}  // namespace flexvar
