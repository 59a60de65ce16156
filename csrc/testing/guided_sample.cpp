#include "guided_sample/kernel.cuh"
#include "testing/arrays.h"

namespace flexvar::emulation {

EMULATED_BINDINGS(guided_sample, module) {
  // The arithmetic that CPU and CUDA share, for comparison with the specification.
  module.def("philox4x32", [](const std::array<uint32_t, 4>& counter, uint64_t key) {
    const PhiloxWords random = philox4x32({{counter[0], counter[1], counter[2], counter[3]}}, key);
    return std::array{random.word[0], random.word[1], random.word[2], random.word[3]};
  });
  module.def("token_weights", [](const py::array_t<float>& logits, float maximum) {
    py::array_t<uint32_t> weights(logits.size());
    for (py::ssize_t i = 0; i < logits.size(); ++i) {
      weights.mutable_at(i) = token_weight(logits.at(i), maximum);
    }
    return weights;
  });
}

}  // namespace flexvar::emulation
