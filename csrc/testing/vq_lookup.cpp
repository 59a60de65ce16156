#include "testing/arrays.h"
#include "vq_lookup/kernel.cuh"

namespace flexvar::emulation {

EMULATED_BINDINGS(vq_lookup, module) {
  module.def("vq_lookup", [](const py::array& latents, const py::array& codebook,
                             const EmulationOptions& options) {
    DeviceMemory memory(options);
    const auto n = latents.shape(0);
    auto* indices = memory.output<int64_t>("indices", {n});
    const VqLookupCudaParams params{memory.input<float>("latents", latents),
                                    memory.input<float>("codebook", codebook),
                                    indices,
                                    n,
                                    codebook.shape(0),
                                    codebook.shape(1)};
    const auto blocks = static_cast<unsigned>((n + 127) / 128);
    memory.launch(vq_lookup_kernel, {{blocks, 1, 1}, {128, 1, 1}, 0}, params);
    return memory.fetch(indices);
  });
}

}  // namespace flexvar::emulation
