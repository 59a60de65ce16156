#include "scale_attention/kernel.cuh"
#include "testing/arrays.h"

namespace flexvar::emulation {
namespace {

// (forward, backward) for an element type and head dim; backward without products of warpgroups,
// which have one stage more.
template <class T, int kDim>
std::pair<size_t, size_t> shared_bytes() {
  if constexpr (kOnTensorCores<T>) {
    return {sizeof(TensorCoreForwardShared<T, kDim>),
            TensorCoreBackwardShared<T, kDim>::bytes(false)};
  } else {
    using A = AttentionArithmetic<T>;
    return {sizeof(PlainForwardShared<A, kDim>), sizeof(PlainBackwardShared<A, kDim>)};
  }
}
template <class T>
void add_shared_bytes(py::dict& bytes, const char* type) {
  bytes[py::make_tuple(type, 32)] = shared_bytes<T, 32>();
  bytes[py::make_tuple(type, 64)] = shared_bytes<T, 64>();
  bytes[py::make_tuple(type, 96)] = shared_bytes<T, 96>();
  bytes[py::make_tuple(type, 128)] = shared_bytes<T, 128>();
}

}  // namespace

EMULATED_BINDINGS(scale_attention, module) {
  // Dynamic shared memory, which no compiler reports: {(type, head dim): (forward, backward)}.
  module.def("scale_attention_shared_bytes", [] {
    py::dict bytes;
    add_shared_bytes<float>(bytes, "float");
    add_shared_bytes<double>(bytes, "double");
    add_shared_bytes<__half>(bytes, "__half");
    add_shared_bytes<__nv_bfloat16>(bytes, "__nv_bfloat16");
    return bytes;
  });
}

}  // namespace flexvar::emulation
