#include "resample/kernel.cuh"
#include "testing/arrays.h"

namespace flexvar::emulation {
namespace {

template <class T, class Real, int kPlanes>
py::array run_resample2d(const py::array& in, int64_t height, int64_t width, ResampleMode mode,
                         bool adjoint, const EmulationOptions& options) {
  DeviceMemory memory(options);
  const int64_t in_height = in.shape(1), in_width = in.shape(2);
  const auto axis = [&](int64_t from, int64_t to) {
    return TapAxis<Real>{adjoint ? make_resample_axis<Real>(mode, to, from)
                                 : make_resample_axis<Real>(mode, from, to),
                         adjoint};
  };
  T* out = memory.output<T>("out", {in.shape(0), height, width});
  Resample2dCudaParams<T, Real> params{memory.input<T>("in", in),
                                       out,
                                       in.shape(0),
                                       axis(in_height, height),
                                       axis(in_width, width),
                                       0,
                                       0};
  const auto blocks = static_cast<unsigned>(plan_resample2d(params, kPlanes));
  memory.launch(resample2d_kernel<T, Real, kPlanes>, {{blocks, 1, 1}, {kResampleThreads, 1, 1}, 0},
                params);
  return memory.fetch(out);
}

}  // namespace

EMULATED_BINDINGS(resample, module) {
  // in: planes [planes, H, W] of float64, float32, float16 or uint16 (bfloat16); mode: a
  // ResampleMode
  module.def("resample2d", [](const py::array& in, int64_t height, int64_t width, int mode,
                              bool adjoint, bool many_planes, const EmulationOptions& options) {
    const auto run = [&](auto function) {
      return function(in, height, width, static_cast<ResampleMode>(mode), adjoint, options);
    };
    if (in.dtype().equal(numpy_type<double>())) return run(run_resample2d<double, double, 1>);
    if (in.dtype().equal(numpy_type<float>())) {
      return many_planes ? run(run_resample2d<float, float, 4>)
                         : run(run_resample2d<float, float, 1>);
    }
    if (in.dtype().equal(numpy_type<__half>())) return run(run_resample2d<__half, float, 4>);
    return run(run_resample2d<__nv_bfloat16, float, 1>);
  });
}

}  // namespace flexvar::emulation
