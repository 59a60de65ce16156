// CUDA's runtime as launchers call it (common/cuda_launch.h), on the CPU: a launch runs its kernel
// to the end, in the order, with the poison and on the device of the Options that opened the
// device.
#pragma once

#include "testing/cuda_on_cpu.h"
#include "testing/device.h"

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorNoKernelImageForDevice,
  cudaErrorInvalidDeviceFunction,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "invalid argument" : "an error that is not emulated";
}

// Every device that is opened is another one.
inline cudaError_t cudaGetDevice(int* device) {
  *device = flexvar::emulation::device_ordinal();
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  flexvar::emulation::count_question();
  const flexvar::emulation::Options& device = flexvar::emulation::device_options();
  *value = attribute == cudaDevAttrMultiProcessorCount ? device.multiprocessors
           : attribute == cudaDevAttrComputeCapabilityMajor
               ? (device.warpgroups ? 9 : 8)
               : static_cast<int>(device.shared_memory);
  return cudaSuccess;
}

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int bytes) {
  flexvar::emulation::count_question();
  const bool fits = flexvar::emulation::allow_dynamic_shared(reinterpret_cast<const void*>(kernel),
                                                             static_cast<size_t>(bytes));
  return fits ? cudaSuccess : cudaErrorInvalidValue;
}

// Blocks of more than a warp are taken by code for a device with products of warpgroups.
struct cudaFuncAttributes {
  int maxThreadsPerBlock = 0;
  int maxDynamicSharedSizeBytes = 0;
};
template <class... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*kernel)(Parameters...)) {
  flexvar::emulation::count_question();
  attributes->maxThreadsPerBlock = flexvar::emulation::device_options().warpgroups ? 1024 : 32;
  attributes->maxDynamicSharedSizeBytes = static_cast<int>(
      flexvar::emulation::allowed_dynamic_shared(reinterpret_cast<const void*>(kernel)));
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t stream) {
  flexvar::emulation::check_stream("cudaMemsetAsync", stream);
  flexvar::emulation::fill_from_host(data, value, bytes);
  return cudaSuccess;
}

namespace flexvar::emulation {

template <class... Parameters>
void launch_on_device(const char* op, cudaStream_t stream, bool overlaps,
                      void (*kernel)(Parameters...), dim3 grid, dim3 threads, size_t shared_bytes,
                      const std::type_identity_t<Parameters>&... arguments) {
  check_stream(op, stream);
  const Options options =
      begin_device_launch(op, reinterpret_cast<const void*>(kernel), shared_bytes);
  emulate(options, kernel,
          {{grid.x, grid.y, grid.z}, {threads.x, threads.y, threads.z}, shared_bytes, overlaps},
          arguments...);
}

}  // namespace flexvar::emulation
