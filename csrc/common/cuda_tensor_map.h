// How launchers make the maps by which a kernel's copy engine finds its tensors.
#pragma once

#include "common/cuda_launch.h"
#include "common/tensor_map.h"

#ifdef __CUDACC__
#include <cuda.h>
#endif

namespace flexvar {

// [images, heads, rows, elements] of 2 bytes each, rows contiguous and at multiples of 16 bytes;
// the other strides in elements. A box is `box_rows` rows of 64 elements.
struct MappedTensor {
  const void* data;
  int64_t images, heads, rows, elements;
  int64_t image_stride, head_stride, row_stride;
  int box_rows;
};

#ifdef __CUDACC__
inline TensorMap tensor_map_of(const MappedTensor& tensor, const char* op) {
  // The driver is not linked: CUDA's runtime knows where it is.
  static const auto encode = [op] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result{};
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                cudaEnableDefault, &result),
               op, "cudaGetDriverEntryPointByVersion");
    STD_TORCH_CHECK(result == cudaDriverEntryPointSuccess, op,
                    ": the CUDA driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));
  const auto size = [](int64_t n) { return static_cast<cuuint64_t>(n); };
  // The stride of a lone image or head may be anything.
  const auto bytes = [](int64_t n, int64_t stride) {
    return n == 1 ? 0 : static_cast<cuuint64_t>(stride) * 2;
  };
  const cuuint64_t sizes[4] = {size(tensor.elements), size(tensor.rows), size(tensor.heads),
                               size(tensor.images)};
  const cuuint64_t strides[3] = {bytes(tensor.rows, tensor.row_stride),
                                 bytes(tensor.heads, tensor.head_stride),
                                 bytes(tensor.images, tensor.image_stride)};
  const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(tensor.box_rows), 1, 1};
  const cuuint32_t every[4] = {1, 1, 1, 1};
  TensorMap map;
  const CUresult result =
      encode(reinterpret_cast<CUtensorMap*>(&map), CU_TENSOR_MAP_DATA_TYPE_UINT16, 4,
             const_cast<void*>(tensor.data), sizes, strides, box, every,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, op, ": cuTensorMapEncodeTiled failed with error ",
                  static_cast<int>(result));
  return map;
}
#else
inline TensorMap tensor_map_of(const MappedTensor& tensor, const char*) {
  return {static_cast<const char*>(tensor.data),
          tensor.images,
          tensor.heads,
          tensor.rows,
          tensor.elements,
          tensor.image_stride * 2,
          tensor.head_stride * 2,
          tensor.row_stride * 2,
          tensor.box_rows};
}
#endif

}  // namespace flexvar
