// What every CUDA launcher does around its kernels: device guard, current stream, checked launches,
// registration. Under any other compiler than nvcc the launchers become the ops
// flexvar_emulated::*, which the tests run on the CPU (csrc/testing).
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_runtime.h>

#define FLEXVAR_LAUNCHERS(m) STABLE_TORCH_LIBRARY_IMPL(flexvar, CUDA, m)
#else
#include "testing/cuda_runtime_on_cpu.h"

#define FLEXVAR_LAUNCHERS(m) STABLE_TORCH_LIBRARY_IMPL(flexvar_emulated, CPU, m)
#endif

namespace flexvar {

#ifdef __CUDACC__
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
#else
class CudaScope : public emulation::DeviceScope {
 public:
  explicit CudaScope(const torch::stable::Tensor&) {}
};
#endif

// `call` is what returned the error. Whichever call is the first to name a kernel notices that the
// build has no code for the GPU, and CUDA has two errors for that.
inline void check_cuda(cudaError_t error, const char* op, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // keeps errors until they are asked for: the next launch would report it
  const bool no_code =
      error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction;
  STD_TORCH_CHECK(false, op, ": ", call, " failed: ", cudaGetErrorString(error),
                  no_code ? " (this build has no code for this GPU; rebuild with CUDAARCHS set to "
                            "it, see `flexvar doctor`)"
                          : "");
}

// CUDA counts the blocks of a launch in 31 bits.
inline unsigned grid_size(int64_t blocks, const char* op) {
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), op, ": the tensors are too large, they take ",
                  blocks, " blocks");
  return static_cast<unsigned>(blocks);
}

// kernel<<<grid, threads, shared_bytes, stream>>>(arguments...), checked.
template <class... Parameters>
void launch_kernel(const char* op, cudaStream_t stream, void (*kernel)(Parameters...), dim3 grid,
                   dim3 threads, size_t shared_bytes,
                   const std::type_identity_t<Parameters>&... arguments) {
#ifdef __CUDACC__
  kernel<<<grid, threads, shared_bytes, stream>>>(arguments...);
  check_cuda(cudaGetLastError(), op, "CUDA launch");
#else
  emulation::launch_on_device(op, stream, false, kernel, grid, threads, shared_bytes, arguments...);
#endif
}

// kernel<<<grid, threads, shared_bytes, stream>>>(arguments...), checked, which may begin before
// the kernel launched just before it has ended: see ptx::griddepcontrol_wait. Code compiled for
// less than sm_90 does not wait there, so it begins afterwards.
template <class... Parameters>
void launch_overlapping(const char* op, cudaStream_t stream, void (*kernel)(Parameters...),
                        dim3 grid, dim3 threads, size_t shared_bytes,
                        const std::type_identity_t<Parameters>&... arguments) {
#ifdef __CUDACC__
  cudaFuncAttributes code{};
  check_cuda(cudaFuncGetAttributes(&code, kernel), op, "cudaFuncGetAttributes");
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = code.ptxVersion >= 90 ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), op, "CUDA launch");
#else
  emulation::launch_on_device(op, stream, true, kernel, grid, threads, shared_bytes, arguments...);
#endif
}

inline int device_attribute(cudaDeviceAttr which, const torch::stable::Tensor& tensor,
                            const char* op) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, which, tensor.get_device_index()), op,
             "cudaDeviceGetAttribute");
  return value;
}

// Whether the device's code of a kernel takes blocks of so many threads. A kernel that needs
// products of warpgroups says so by that, since sm_90 has them in code for sm_90a alone.
template <class... Parameters>
bool takes_threads(void (*kernel)(Parameters...), int threads, const char* op) {
  cudaFuncAttributes code{};
  check_cuda(cudaFuncGetAttributes(&code, kernel), op, "cudaFuncGetAttributes");
  return code.maxThreadsPerBlock >= threads;
}

// Dynamic shared memory beyond 48 KB needs leave, once for each kernel and device.
template <class... Parameters>
void allow_shared_memory(void (*kernel)(Parameters...), int64_t bytes, const char* op) {
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(bytes)),
             op, "cudaFuncSetAttribute");
}

}  // namespace flexvar
