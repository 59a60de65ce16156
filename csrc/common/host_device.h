// FLEXVAR_HOST_DEVICE marks arithmetic that CPU and CUDA kernels share. It is `static`, since CPU
// kernels are compiled once per instruction set and the linker must not merge their copies.
#pragma once

#ifdef __CUDACC__
#define FLEXVAR_HOST_DEVICE static inline __host__ __device__
#else
#define FLEXVAR_HOST_DEVICE static inline
#endif
