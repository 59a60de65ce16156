#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <type_traits>

#include "common/cpu_memory.h"
#include "common/tensor_checks.h"
#include "resample/arguments.h"
#include "resample/cpu_kernel.h"
#include "resample/table.h"

namespace flexvar {
namespace {

// Multiply-adds below which a second thread costs more than it brings.
constexpr int64_t kWorkPerTask = 100'000;

template <typename Real>
void resample_planes(const Tensor& in, Tensor& out, Element element,
                     const ResampleTable<Real>& y_table, const ResampleTable<Real>& x_table) {
  Resample2dParams<Real> params{};
  params.in = in.const_data_ptr();
  params.out = out.mutable_data_ptr();
  params.element = element;
  params.planes = in.size(0) * in.size(1);
  params.y = y_table.taps();
  params.x = x_table.taps();
  const auto kernel = [] {
    if constexpr (std::is_same_v<Real, double>) {
      return FLEXVAR_SELECT_CPU_KERNEL(resample2d_rows_double);
    } else {
      return FLEXVAR_SELECT_CPU_KERNEL(resample2d_rows);
    }
  }();

  const int64_t rows = params.planes * params.y.out_size;
  const int64_t row_work = params.x.in_size * params.y.stride + params.x.out_size * params.x.stride;
  const int64_t row_blocks = (rows + kResampleMaxLanes - 1) / kResampleMaxLanes;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t tasks =
      std::clamp<int64_t>(rows * row_work / kWorkPerTask, 1, std::min(row_blocks, threads));
  const int64_t scratch_size = (params.x.in_size + kResampleMaxLanes) * kResampleMaxLanes;
  Scratch<Real> scratch(tasks * scratch_size);
  Real* const scratch_data = scratch.data();
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = row_blocks * task / tasks * kResampleMaxLanes;
      const int64_t last = row_blocks * (task + 1) / tasks * kResampleMaxLanes;
      kernel(params, scratch_data + task * scratch_size, first, std::min(last, rows));
    }
  });
}

// Resamples [B, C, in_height, in_width] to [B, C, height, width], or, with `adjoint`, applies the
// transpose of the resampling that goes the other way.
Tensor run(const Tensor& t, int64_t height, int64_t width, const std::string& mode_name,
           bool antialias, bool adjoint, const char* op) {
  check_rank(t, 4, op, "the tensor");
  const ResampleMode mode = parse_resample_mode(mode_name, antialias, op);
  const Element element = element_of(t, op, "the tensor");
  const int64_t in_height = t.size(2), in_width = t.size(3);
  for (const int64_t side : {in_height, in_width, height, width}) check_side(side, op, "a side");
  Tensor out = empty_cpu({t.size(0), t.size(1), height, width}, t.scalar_type());
  if (out.numel() == 0) return out;
  const Tensor in = as_contiguous(t);
  const auto launch = [&](auto real) {
    using Table = ResampleTable<decltype(real)>;
    if (adjoint) {
      resample_planes(in, out, element, Table(mode, height, in_height).transposed(),
                      Table(mode, width, in_width).transposed());
    } else {
      resample_planes(in, out, element, Table(mode, in_height, height),
                      Table(mode, in_width, width));
    }
  };
  element == Element::float64 ? launch(double()) : launch(float());
  return out;
}

Tensor resample2d_cpu(const Tensor& x, int64_t height, int64_t width, std::string mode,
                      bool antialias) {
  return run(x, height, width, mode, antialias, false, "resample2d");
}

Tensor resample2d_backward_cpu(const Tensor& grad, int64_t height, int64_t width, std::string mode,
                               bool antialias) {
  return run(grad, height, width, mode, antialias, true, "resample2d_backward");
}

STABLE_TORCH_LIBRARY_IMPL(flexvar, CPU, m) {
  m.impl("resample2d", TORCH_BOX(&resample2d_cpu));
  m.impl("resample2d_backward", TORCH_BOX(&resample2d_backward_cpu));
}

}  // namespace
}  // namespace flexvar
