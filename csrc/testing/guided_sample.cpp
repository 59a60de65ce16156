#include "guided_sample/kernel.cuh"
#include "testing/arrays.h"

namespace flexvar::emulation {
namespace {

template <class T>
py::array run(const py::array& logits, const py::array& seeds, const py::array& image_ids,
              int64_t top_k, double top_p, int64_t step, bool in_shared, unsigned blocks,
              const EmulationOptions& options) {
  DeviceMemory memory(options);
  const py::ssize_t batch = logits.shape(0), length = logits.shape(1), rows = batch * length;
  const auto vocabulary = static_cast<int32_t>(logits.shape(2));
  const auto kept = static_cast<int32_t>(top_k < vocabulary ? top_k : 0);
  const int32_t pivot_rank = guided_sample_pivot_rank(vocabulary, kept);
  auto* tokens = memory.output<int64_t>("tokens", {batch, length});
  const GuidedSampleCudaParams<T> params{memory.input<T>("logits", logits),
                                         memory.input<int64_t>("seeds", seeds),
                                         memory.input<int64_t>("image_ids", image_ids),
                                         tokens,
                                         rows,
                                         length,
                                         step,
                                         top_p,
                                         vocabulary,
                                         kept,
                                         pivot_rank};
  const int64_t bytes = in_shared ? guided_sample_shared_bytes<T>(vocabulary, pivot_rank) : 0;
  const LaunchShape shape{{blocks, 1, 1}, {kSampleThreads, 1, 1}, static_cast<size_t>(bytes)};
  if (in_shared) {
    memory.launch(guided_sample_kernel<T, true>, shape, params);
  } else {
    memory.launch(guided_sample_kernel<T, false>, shape, params);
  }
  return memory.fetch(tokens);
}

}  // namespace

EMULATED_BINDINGS(guided_sample, module) {
  module.def("guided_sample_float32", &run<float>);
  module.def("guided_sample_float16", &run<__half>);
  module.def("guided_sample_bfloat16", &run<__nv_bfloat16>);
  // By the size of a logit.
  module.def("guided_sample_shared_bytes", [](int64_t vocabulary, int64_t top_k) {
    const int32_t rank = guided_sample_pivot_rank(vocabulary, top_k);
    return std::map<int, int64_t>{{2, guided_sample_shared_bytes<__half>(vocabulary, rank)},
                                  {4, guided_sample_shared_bytes<float>(vocabulary, rank)}};
  });
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
