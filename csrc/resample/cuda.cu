#include <torch/csrc/stable/library.h>

#include <string>

#include "common/cuda_launch.h"
#include "common/tensor_checks.h"
#include "common/tensor_memory.h"
#include "resample/arguments.h"
#include "resample/kernel.cuh"

namespace flexvar {
namespace {

// Launches what choose(params, plan) returns, a kernel whose threads have `vector` pixels of a row.
template <class T, class Real, class Choose>
void launch(const Tensor& in, Tensor& out, const ResampleAxis<Real>& y, const ResampleAxis<Real>& x,
            bool adjoint, int vector, const char* op, cudaStream_t stream, const Choose& choose) {
  Resample2dCudaParams<T, Real> params{};
  params.in = static_cast<const T*>(in.const_data_ptr());
  params.out = static_cast<T*>(out.mutable_data_ptr());
  params.planes = in.size(0) * in.size(1);
  params.adjoint = adjoint;
  params.axes[0] = y;
  params.axes[1] = x;
  const Resample2dPlan plan =
      plan_resample2d(params, vector, device_attribute(cudaDevAttrMultiProcessorCount, op));
  launch_overlapping(op, stream, choose(plan), grid_size(plan.blocks, op), kResampleThreads, 0,
                     params);
}

Tensor run(const Tensor& t, int64_t height, int64_t width, const std::string& mode_name,
           bool antialias, bool adjoint, const char* op) {
  check_rank(t, 4, op, "the tensor");
  const ResampleMode mode = parse_resample_mode(mode_name, antialias, op);
  const Element element = element_of(t, op, "the tensor");
  const int64_t in_height = t.size(2), in_width = t.size(3);
  for (const int64_t side : {in_height, in_width, height, width}) check_side(side, op, "a side");
  const CudaScope scope(t);
  Tensor out =
      empty_contiguous({t.size(0), t.size(1), height, width}, t.scalar_type(), device_of(t));
  if (out.numel() == 0) return out;
  const Tensor in = as_contiguous(t);
  const auto launch_as = [&]<class T, class Real>(T, Real, int vector, const auto& choose) {
    const auto axis = [&](int64_t from, int64_t to) {
      return adjoint ? make_resample_axis<Real>(mode, to, from)
                     : make_resample_axis<Real>(mode, from, to);
    };
    launch<T, Real>(in, out, axis(in_height, height), axis(in_width, width), adjoint, vector, op,
                    scope.stream(), choose);
  };
  const auto copy = [&]<class T, class Real>(T element, Real real) {
    constexpr int vector = 16 / sizeof(T);
    const bool whole = width % vector == 0;
    launch_as(element, real, whole ? vector : 1, [whole](const Resample2dPlan&) {
      return whole ? resample2d_nearest_kernel<T, Real, vector>
                   : resample2d_nearest_kernel<T, Real, 1>;
    });
  };
  const auto sum = [&]<class T, class Real>(T element, Real real) {
    launch_as(element, real, 1, [](const Resample2dPlan& plan) {
      return plan.is_long ? resample2d_kernel<T, Real, true> : resample2d_kernel<T, Real, false>;
    });
  };
  const bool copies = mode == ResampleMode::nearest && !adjoint;
  switch (element) {
    case Element::float32:
      copies ? copy(uint32_t(), float()) : sum(float(), float());
      break;
    case Element::float64:
      copies ? copy(uint64_t(), double()) : sum(double(), double());
      break;
    case Element::float16:
      copies ? copy(uint16_t(), float()) : sum(__half(), float());
      break;
    case Element::bfloat16:
      copies ? copy(uint16_t(), float()) : sum(__nv_bfloat16(), float());
      break;
  }
  return out;
}

Tensor resample2d_cuda(const Tensor& x, int64_t height, int64_t width, std::string mode,
                       bool antialias) {
  return run(x, height, width, mode, antialias, false, "resample2d");
}

Tensor resample2d_backward_cuda(const Tensor& grad, int64_t height, int64_t width, std::string mode,
                                bool antialias) {
  return run(grad, height, width, mode, antialias, true, "resample2d_backward");
}

FLEXVAR_LAUNCHERS(m) {
  m.impl("resample2d", TORCH_BOX(&resample2d_cuda));
  m.impl("resample2d_backward", TORCH_BOX(&resample2d_backward_cuda));
}

}  // namespace
}  // namespace flexvar
