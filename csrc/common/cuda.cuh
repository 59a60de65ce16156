// What every kernel.cuh includes first, and the only place it takes CUDA from: under nvcc the CUDA
// headers, under any other compiler the emulation of csrc/testing, so that the same source runs on
// the CPU. See csrc/testing/README.md.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "testing/cuda_on_cpu.h"
#endif

namespace flexvar {

#ifdef __CUDACC__
// The block's static shared memory of type T (arrays, or a struct of arrays; trivial): one object
// per type and kernel. Kernels write this instead of `__shared__ T x`, so that the emulation can
// guard and poison it.
template <class T>
__device__ __forceinline__ T& shared_storage() {
  __shared__ T storage;
  return storage;
}

// The block's dynamic shared memory, aligned to what tiles with a swizzle need. Instead of `extern
// __shared__ char x[]`.
template <class T = unsigned char>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char flexvar_dynamic_shared[];
  return reinterpret_cast<T*>(flexvar_dynamic_shared);
}
#else
using emulation::dynamic_shared;
using emulation::shared_storage;
#endif

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

}  // namespace flexvar
