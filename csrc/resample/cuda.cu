#include <torch/csrc/stable/library.h>

#include <string>

#include "common/cuda_launch.h"
#include "common/tensor_checks.h"
#include "common/tensor_memory.h"
#include "resample/arguments.h"
#include "resample/kernel.cuh"

namespace flexvar {
namespace {

// With this many blocks a thread can take several planes and compute the weights once for them.
constexpr int64_t kManyBlocks = 1024;
constexpr int kPlanesPerThread = 4;

template <class T, class Real>
void launch(const Tensor& in, Tensor& out, const TapAxis<Real>& y, const TapAxis<Real>& x,
            cudaStream_t stream, const char* op) {
  Resample2dCudaParams<T, Real> params{static_cast<const T*>(in.const_data_ptr()),
                                       static_cast<T*>(out.mutable_data_ptr()),
                                       in.size(0) * in.size(1),
                                       y,
                                       x,
                                       0,
                                       0};
  constexpr int planes = sizeof(Real) == sizeof(double) ? 1 : kPlanesPerThread;
  int64_t blocks = plan_resample2d(params, planes);
  const bool many = blocks >= kManyBlocks;
  if (!many) blocks = plan_resample2d(params, 1);
  const auto kernel = many ? resample2d_kernel<T, Real, planes> : resample2d_kernel<T, Real, 1>;
  launch_kernel(op, stream, kernel, grid_size(blocks, op), kResampleThreads, 0, params);
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
  const auto axis = [&]<class Real>(Real, int64_t from, int64_t to) {
    return TapAxis<Real>{adjoint ? make_resample_axis<Real>(mode, to, from)
                                 : make_resample_axis<Real>(mode, from, to),
                         adjoint};
  };
  const auto launch_as = [&]<class T, class Real>(T, Real real) {
    launch<T, Real>(in, out, axis(real, in_height, height), axis(real, in_width, width),
                    scope.stream(), op);
  };
  switch (element) {
    case Element::float32:
      launch_as(float(), float());
      break;
    case Element::float64:
      launch_as(double(), double());
      break;
    case Element::float16:
      launch_as(__half(), float());
      break;
    case Element::bfloat16:
      launch_as(__nv_bfloat16(), float());
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
