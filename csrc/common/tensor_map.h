// How a kernel's copy engine finds a tensor: made by a launcher (common/cuda_tensor_map.h), handed
// to the kernel by value as a __grid_constant__ parameter.
#pragma once

#include <cstdint>

namespace flexvar {

#ifdef __CUDACC__
struct alignas(64) TensorMap {
  uint64_t words[16];  // CUDA's CUtensorMap, which its driver writes and its hardware reads
};
#else
// What the emulated engine takes instead: [image, head, row, element] with elements of 2 bytes.
struct TensorMap {
  const char* data;
  int64_t images, heads, rows, elements;
  int64_t image_bytes, head_bytes, row_bytes;
  int box_rows;
};
#endif

}  // namespace flexvar
