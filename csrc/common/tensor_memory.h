// Tensors past the dispatcher. `new_empty`, `contiguous`, `to` and the views of torch::stable look
// their op up by name and box its arguments, a microsecond and more each: as long as a small call's
// arithmetic, or as a launch. So here tensors are allocated without, and what is as it should be is
// not converted.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace flexvar {

struct DevicePlace {
  int32_t type = aoti_torch_device_type_cpu(), index = 0;
};
inline DevicePlace device_of(const torch::stable::Tensor& t) {
  DevicePlace place;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &place.type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &place.index));
  return place;
}

inline int32_t dtype_code(torch::headeronly::ScalarType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

// The tensor that torch made, or the error that it did not.
inline torch::stable::Tensor made_by_torch(AOTITorchError error, AtenTensorHandle handle,
                                           torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  if (error != AOTI_TORCH_SUCCESS) {
    int64_t elements = 1;
    for (const int64_t size : sizes) elements *= size;
    STD_TORCH_CHECK(false, "can't allocate memory for a tensor of ", elements, " elements");
  }
  return torch::stable::Tensor(handle);
}

// Uninitialised. On CUDA it is memory of torch's allocator for the device's current stream.
inline torch::stable::Tensor empty_strided(torch::headeronly::IntHeaderOnlyArrayRef sizes,
                                           torch::headeronly::IntHeaderOnlyArrayRef strides,
                                           torch::headeronly::ScalarType dtype, DevicePlace place) {
  AtenTensorHandle handle{};
  const AOTITorchError error =
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               dtype_code(dtype), place.type, place.index, &handle);
  return made_by_torch(error, handle, sizes);
}

inline std::vector<int64_t> contiguous_strides(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  return strides;
}

// Of [B, C, H, W] that lies in memory as [B, H, W, C].
inline std::vector<int64_t> channels_last_strides(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::vector<int64_t> strides(4);
  int64_t stride = 1;
  for (const int axis : {1, 3, 2, 0}) {
    strides[axis] = stride;
    stride *= std::max<int64_t>(sizes[axis], 1);
  }
  return strides;
}

inline torch::stable::Tensor empty_contiguous(torch::headeronly::IntHeaderOnlyArrayRef sizes,
                                              torch::headeronly::ScalarType dtype,
                                              DevicePlace place) {
  return empty_strided(sizes, contiguous_strides(sizes), dtype, place);
}

// With the strides of t, whose elements fill their memory.
inline torch::stable::Tensor empty_alike(const torch::stable::Tensor& t) {
  return empty_strided(t.sizes(), t.strides(), t.scalar_type(), device_of(t));
}

inline torch::stable::Tensor as_contiguous(const torch::stable::Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// [B, C, H, W], copied where it does not lie in memory as [B, H, W, C].
inline torch::stable::Tensor as_channels_last(const torch::stable::Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  bool is_so = true;
  int64_t stride = 1;
  for (const int axis : {1, 3, 2, 0}) {
    is_so = is_so && (sizes[axis] == 1 || strides[axis] == stride);
    stride *= sizes[axis];
  }
  return is_so ? t : torch::stable::contiguous(t, torch::headeronly::MemoryFormat::ChannelsLast);
}

inline torch::stable::Tensor as_dtype(const torch::stable::Tensor& t,
                                      torch::headeronly::ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

}  // namespace flexvar
