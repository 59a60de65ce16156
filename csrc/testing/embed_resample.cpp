#include "embed_resample/kernel.cuh"
#include "testing/arrays.h"

namespace flexvar::emulation {
namespace {

template <class T, class Real>
py::array run_forward(const py::array& indices, const py::array& codebook, int64_t height,
                      int64_t width, bool normalize, ResampleMode mode,
                      const EmulationOptions& options) {
  DeviceMemory memory(options);
  const int64_t batch = indices.shape(0), dim = codebook.shape(1);
  T* tokens = memory.output<T>("tokens", {batch, height * width, dim});
  const EmbedResampleCudaParams<T, Real, T> params{
      {memory.input<int64_t>("indices", indices), memory.input<T>("codebook", codebook),
       codebook.shape(0), normalize},
      tokens,
      batch,
      dim,
      {make_resample_axis<Real>(mode, indices.shape(1), height), false},
      {make_resample_axis<Real>(mode, indices.shape(2), width), false}};
  const auto blocks = static_cast<unsigned>(embed_resample_blocks(params));
  memory.launch(embed_resample_kernel<T, Real, T>, {{blocks, 1, 1}, {kEmbedThreads, 1, 1}, 0},
                params);
  return memory.fetch(tokens);
}

// The gradient of the codebook, as Real. `sorted` and `cells`: the flat indices stably sorted, and
// where they stood.
template <class T, class Real>
py::array run_backward(const py::array& grad, int64_t in_height, int64_t in_width,
                       const py::array& sorted, const py::array& cells, const py::array& codebook,
                       int64_t height, int64_t width, bool normalize, ResampleMode mode,
                       const EmulationOptions& options) {
  DeviceMemory memory(options);
  const int64_t batch = grad.shape(0), dim = codebook.shape(1), codes = codebook.shape(0);
  Real* grid = memory.output<Real>("grad_grid", {batch * in_height * in_width, dim});
  const EmbedResampleCudaParams<T, Real, Real> adjoint{
      {nullptr, memory.input<T>("grad", grad), 0, false},
      grid,
      batch,
      dim,
      {make_resample_axis<Real>(mode, in_height, height), true},
      {make_resample_axis<Real>(mode, in_width, width), true}};
  memory.launch(
      embed_resample_kernel<T, Real, Real>,
      {{static_cast<unsigned>(embed_resample_blocks(adjoint)), 1, 1}, {kEmbedThreads, 1, 1}, 0},
      adjoint);
  Real* grad_codebook = memory.output<Real>("grad_codebook", {codes, dim});
  const EmbedScatterCudaParams<T, Real> scatter{grid,
                                                memory.input<int64_t>("sorted", sorted),
                                                memory.input<int64_t>("cells", cells),
                                                memory.input<T>("codebook", codebook),
                                                grad_codebook,
                                                batch * in_height * in_width,
                                                codes,
                                                dim,
                                                normalize};
  const auto blocks = static_cast<unsigned>((codes + kEmbedWarps - 1) / kEmbedWarps);
  memory.launch(embed_scatter_kernel<T, Real>, {{blocks, 1, 1}, {kEmbedThreads, 1, 1}, 0}, scatter);
  return memory.fetch(grad_codebook);
}

}  // namespace

// Codebooks and gradients of float64, float32, float16 or uint16 (bfloat16); mode: a ResampleMode.
EMULATED_BINDINGS(embed_resample, module) {
  module.def("embed_resample",
             [](const py::array& indices, const py::array& codebook, int64_t height, int64_t width,
                bool normalize, int mode, const EmulationOptions& options) {
               const auto run = [&](auto function) {
                 return function(indices, codebook, height, width, normalize,
                                 static_cast<ResampleMode>(mode), options);
               };
               if (codebook.dtype().equal(numpy_type<double>()))
                 return run(run_forward<double, double>);
               if (codebook.dtype().equal(numpy_type<float>()))
                 return run(run_forward<float, float>);
               if (codebook.dtype().equal(numpy_type<__half>()))
                 return run(run_forward<__half, float>);
               return run(run_forward<__nv_bfloat16, float>);
             });
  module.def("embed_resample_backward",
             [](const py::array& grad, int64_t in_height, int64_t in_width, const py::array& sorted,
                const py::array& cells, const py::array& codebook, int64_t height, int64_t width,
                bool normalize, int mode, const EmulationOptions& options) {
               const auto run = [&](auto function) {
                 return function(grad, in_height, in_width, sorted, cells, codebook, height, width,
                                 normalize, static_cast<ResampleMode>(mode), options);
               };
               if (grad.dtype().equal(numpy_type<double>()))
                 return run(run_backward<double, double>);
               if (grad.dtype().equal(numpy_type<float>())) return run(run_backward<float, float>);
               if (grad.dtype().equal(numpy_type<__half>()))
                 return run(run_backward<__half, float>);
               return run(run_backward<__nv_bfloat16, float>);
             });
}

}  // namespace flexvar::emulation
