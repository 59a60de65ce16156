// What every CUDA launcher does around its kernels: device guard, current stream, checked launches,
// registration. Under any other compiler than nvcc the launchers become the ops
// flexvar_emulated::*, which the tests run on the CPU (csrc/testing).
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <type_traits>
#include <utility>

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

// What CUDA says about the current device, and about the code that it has for a kernel. That stays
// as it is while the process lives, and a question takes a good part of a launch's time, so each is
// asked once. It is a cache of facts: no result depends on what is in it.
class DeviceFacts {
 public:
  static DeviceFacts& of_process() {
    static DeviceFacts& facts = *new DeviceFacts;  // never destroyed: threads may outlive main
    return facts;
  }

  int attribute(cudaDeviceAttr which, const char* op) {
    const std::lock_guard lock(mutex_);
    const std::pair key(current_device(op), which);
    if (const auto known = attributes_.find(key); known != attributes_.end()) return known->second;
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, which, key.first), op, "cudaDeviceGetAttribute");
    attributes_.emplace(key, value);
    return value;
  }

  template <class... Parameters>
  cudaFuncAttributes code(void (*kernel)(Parameters...), const char* op) {
    const std::lock_guard lock(mutex_);
    return known_code(kernel, op);
  }

  // Dynamic shared memory beyond 48 KB needs leave.
  template <class... Parameters>
  void allow_shared_memory(void (*kernel)(Parameters...), int bytes, const char* op) {
    const std::lock_guard lock(mutex_);
    cudaFuncAttributes& code = known_code(kernel, op);
    if (bytes <= code.maxDynamicSharedSizeBytes) return;
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), op,
               "cudaFuncSetAttribute");
    code.maxDynamicSharedSizeBytes = bytes;
  }

 private:
  static int current_device(const char* op) {
    int device = 0;
    check_cuda(cudaGetDevice(&device), op, "cudaGetDevice");
    return device;
  }

  template <class... Parameters>
  cudaFuncAttributes& known_code(void (*kernel)(Parameters...), const char* op) {
    const std::pair key(current_device(op), reinterpret_cast<const void*>(kernel));
    if (const auto known = codes_.find(key); known != codes_.end()) return known->second;
    cudaFuncAttributes code{};
    check_cuda(cudaFuncGetAttributes(&code, kernel), op, "cudaFuncGetAttributes");
    return codes_.emplace(key, code).first->second;
  }

  std::mutex mutex_;
  std::map<std::pair<int, cudaDeviceAttr>, int> attributes_;
  std::map<std::pair<int, const void*>, cudaFuncAttributes> codes_;
};

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
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = DeviceFacts::of_process().code(kernel, op).ptxVersion >= 90 ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), op, "CUDA launch");
#else
  emulation::launch_on_device(op, stream, true, kernel, grid, threads, shared_bytes, arguments...);
#endif
}

// Within a CudaScope these speak of its device.

inline int device_attribute(cudaDeviceAttr which, const char* op) {
  return DeviceFacts::of_process().attribute(which, op);
}

// Whether the device's code of a kernel takes blocks of so many threads. A kernel that needs
// products of warpgroups says so by that, since sm_90 has them in code for sm_90a alone.
template <class... Parameters>
bool takes_threads(void (*kernel)(Parameters...), int threads, const char* op) {
  return DeviceFacts::of_process().code(kernel, op).maxThreadsPerBlock >= threads;
}

template <class... Parameters>
void allow_shared_memory(void (*kernel)(Parameters...), int64_t bytes, const char* op) {
  DeviceFacts::of_process().allow_shared_memory(kernel, static_cast<int>(bytes), op);
}

}  // namespace flexvar
