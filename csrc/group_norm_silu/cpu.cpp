#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "common/cpu_memory.h"
#include "common/divide_up.h"
#include "group_norm_silu/arguments.h"
#include "group_norm_silu/cpu_kernel.h"

namespace flexvar {
namespace {

// Elements below which a second thread costs more than it brings.
constexpr int64_t kElementsPerTask = 16'384;
// Elements of a chunk, which is what a cache close by should hold of x and of grad_out.
constexpr int64_t kRunElements = 4'096;
constexpr int64_t kChannelsLastElements = 32'768;
constexpr int64_t kChannelsLastPixels = 256;  // at most: what a sum in float32 takes

GroupNormShape shape_of(const FeatureMaps& maps) {
  GroupNormShape shape{};
  shape.images = maps.images();
  shape.channels = maps.channels();
  shape.groups = maps.groups();
  shape.pixels = maps.pixels();
  shape.channels_last = maps.channels_last();
  shape.chunk_pixels =
      shape.channels_last
          ? std::clamp<int64_t>(kChannelsLastElements / shape.channels, 1, kChannelsLastPixels)
          : kRunElements;
  shape.chunks = divide_up(shape.pixels, shape.chunk_pixels);
  shape.run_elements = kRunElements;
  shape.runs = divide_up(elements_per_group(shape), kRunElements);
  return shape;
}

// f(begin, end, scratch) over parts of [0, count).
template <class F>
void in_parallel(const GroupNormShape& shape, int64_t count, const F& f) {
  const int64_t elements = shape.images * shape.channels * shape.pixels;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t tasks =
      std::clamp<int64_t>(elements / kElementsPerTask, 1, std::min(count, threads));
  const int64_t scratch_size = group_norm_scratch(shape.channels);
  Scratch<float> scratch(tasks * scratch_size);
  float* const memory = scratch.data();
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      f(count * task / tasks, count * (task + 1) / tasks, memory + task * scratch_size);
    }
  });
}

// The three steps of either direction: first(begin, end, scratch) over so many units an image,
// between(i) for every group i of every image, second(begin, end, scratch, has_next) over units,
// where the group behind them may be the next of the same thread.
template <class First, class Between, class Second>
void run(const GroupNormShape& shape, int64_t first_units, const First& first,
         const Between& between, const Second& second) {
  const int64_t groups = shape.images * shape.groups, second_units = units_per_image(shape);
  const int64_t threads = torch::stable::get_num_threads();
  if (!shape.channels_last && (groups % threads == 0 || groups >= 4 * threads)) {
    // Group by group, so that the second step finds in the cache what the first one read.
    const int64_t of_first = first_units / shape.groups, of_second = second_units / shape.groups;
    in_parallel(shape, groups, [&](int64_t begin, int64_t end, float* scratch) {
      for (int64_t group = begin; group < end; ++group) {
        first(group * of_first, (group + 1) * of_first, scratch);
        between(group);
        second(group * of_second, (group + 1) * of_second, scratch, group + 1 < end);
      }
    });
    return;
  }
  in_parallel(shape, shape.images * first_units, first);
  in_parallel(shape, groups, [&](int64_t begin, int64_t end, float*) {
    for (int64_t group = begin; group < end; ++group) between(group);
  });
  in_parallel(shape, shape.images * second_units, [&](int64_t begin, int64_t end, float* scratch) {
    second(begin, end, scratch, false);
  });
}

// f(part, elements in it) for the parts of a group, in their order.
template <class F>
void for_each_part(const GroupNormShape& shape, const float* parts, const F& f) {
  for (int64_t part = 0; part < parts_per_group(shape); ++part) {
    f(parts + 2 * part, static_cast<double>(elements_of_part(shape, part)));
  }
}

// Of one group of one image, from its parts.
void put_together(const GroupNormSiluParams& params, double eps, int64_t group) {
  const GroupNormShape& shape = params.shape;
  const float* const parts = params.parts + group * parts_per_group(shape) * 2;
  const double elements = static_cast<double>(elements_per_group(shape));
  double sum = 0, squares = 0;
  for_each_part(shape, parts, [&](const float* part, double count) { sum += count * part[0]; });
  const double mean = sum / elements;
  for_each_part(shape, parts, [&](const float* part, double count) {
    const double difference = part[0] - mean;
    squares += part[1] + count * difference * difference;
  });
  params.statistics[2 * group] = static_cast<float>(mean);
  params.statistics[2 * group + 1] = static_cast<float>(1 / std::sqrt(squares / elements + eps));
}

std::tuple<Tensor, Tensor> group_norm_silu_cpu(const Tensor& x_in, int64_t num_groups,
                                               const Tensor& weight_in, const Tensor& bias_in,
                                               double eps, bool silu, ScalarType dtype) {
  const char* op = "group_norm_silu";
  FeatureMaps maps(x_in, num_groups, op);
  float_element(dtype, op, "the result");
  if (dtype != maps.dtype()) maps.widen();
  const Tensor weight = maps.vector(weight_in, "weight"), bias = maps.vector(bias_in, "bias");
  const Tensor& x = maps.tensor();
  Tensor out = empty_cpu_alike(x);
  Tensor statistics = empty_cpu({maps.images(), maps.groups(), 2}, ScalarType::Float);
  if (out.numel() == 0) {
    std::fill_n(statistics.mutable_data_ptr<float>(), statistics.numel(), 0.0f);
  } else {
    GroupNormSiluParams params{};
    params.shape = shape_of(maps);
    Scratch<float> parts(maps.images() * maps.groups() * parts_per_group(params.shape) * 2);
    params.x = x.const_data_ptr();
    params.weight = weight.const_data_ptr<float>();
    params.bias = bias.const_data_ptr<float>();
    params.parts = parts.data();
    params.statistics = statistics.mutable_data_ptr<float>();
    params.out = out.mutable_data_ptr();
    params.element = float_element(x.scalar_type(), op, "x");
    params.silu = silu;
    const auto moments = FLEXVAR_SELECT_CPU_KERNEL(group_norm_moments);
    const auto apply = FLEXVAR_SELECT_CPU_KERNEL(group_norm_silu_apply);
    run(
        params.shape, moment_units_per_image(params.shape),
        [&](int64_t begin, int64_t end, float* scratch) { moments(params, scratch, begin, end); },
        [&](int64_t group) { put_together(params, eps, group); },
        [&](int64_t begin, int64_t end, float* scratch, bool has_next) {
          apply(params, scratch, begin, end, has_next);
        });
  }
  return {as_dtype(out, dtype), statistics};
}

// The sums of a group's channels over the chunks of its image, in their order: to channel_sums
// [images, 2, channels], and to the group's means.
void put_sums_together(const GroupNormSiluBackwardParams& params, double* channel_sums,
                       int64_t group) {
  const GroupNormShape& shape = params.shape;
  const int64_t size = channels_per_group(shape), row = group_norm_row(shape.channels);
  const int64_t image = group / shape.groups, first = group % shape.groups * size;
  const float* const sums = params.sums + image * shape.chunks * 2 * row;
  for (int64_t which = 0; which < 2; ++which) {
    double* const total = channel_sums + (image * 2 + which) * shape.channels + first;
    std::fill(total, total + size, 0.0);
    for (int64_t chunk = 0; chunk < shape.chunks; ++chunk) {
      const float* const part = sums + (chunk * 2 + which) * row + first;
      for (int64_t c = 0; c < size; ++c) total[c] += part[c];
    }
    double weighted = 0;
    for (int64_t c = 0; c < size; ++c) weighted += params.weight[first + c] * total[c];
    params.group_means[2 * group + which] =
        static_cast<float>(weighted / static_cast<double>(size * shape.pixels));
  }
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_backward_cpu(
    const Tensor& grad_in, const Tensor& x_in, int64_t num_groups, const Tensor& weight_in,
    const Tensor& bias_in, const Tensor& statistics_in, bool silu) {
  const char* op = "group_norm_silu_backward";
  FeatureMaps maps(x_in, num_groups, op);
  const ScalarType dtype = maps.dtype();
  if (grad_in.scalar_type() != dtype) maps.widen();
  const Tensor& x = maps.tensor();
  const Tensor grad = as_dtype(maps.like(grad_in, "grad_out"), x.scalar_type());
  const Tensor weight = maps.vector(weight_in, "weight"), bias = maps.vector(bias_in, "bias");
  const Tensor statistics = maps.statistics(statistics_in);
  const int64_t channels = maps.channels();
  Tensor grad_x = empty_cpu_alike(x);
  Tensor grad_weight = empty_cpu({channels}, ScalarType::Float);
  Tensor grad_bias = empty_cpu({channels}, ScalarType::Float);
  float* const grads_of_vectors[] = {grad_weight.mutable_data_ptr<float>(),
                                     grad_bias.mutable_data_ptr<float>()};
  if (grad_x.numel() == 0) {
    for (float* const grad : grads_of_vectors) std::fill_n(grad, channels, 0.0f);
    return {as_dtype(grad_x, dtype), grad_weight, grad_bias};
  }

  GroupNormSiluBackwardParams params{};
  params.shape = shape_of(maps);
  Scratch<float> sums(maps.images() * params.shape.chunks * 2 * group_norm_row(channels));
  Scratch<float> group_means(maps.images() * maps.groups() * 2);
  // Zeros until the sums are there: kernels read them with the rest of a channel.
  std::fill_n(group_means.data(), maps.images() * maps.groups() * 2, 0.0f);
  Scratch<double> channel_sums(maps.images() * 2 * channels);
  params.grad_out = grad.const_data_ptr();
  params.x = x.const_data_ptr();
  params.weight = weight.const_data_ptr<float>();
  params.bias = bias.const_data_ptr<float>();
  params.statistics = statistics.const_data_ptr<float>();
  params.sums = sums.data();
  params.group_means = group_means.data();
  params.grad_x = grad_x.mutable_data_ptr();
  params.element = float_element(x.scalar_type(), op, "x");
  params.silu = silu;
  double* const of_channels = channel_sums.data();
  const auto sum = FLEXVAR_SELECT_CPU_KERNEL(group_norm_silu_backward_sums);
  const auto apply = FLEXVAR_SELECT_CPU_KERNEL(group_norm_silu_backward_apply);
  run(
      params.shape, units_per_image(params.shape),
      [&](int64_t begin, int64_t end, float* scratch) { sum(params, scratch, begin, end); },
      [&](int64_t group) { put_sums_together(params, of_channels, group); },
      [&](int64_t begin, int64_t end, float* scratch, bool) {
        apply(params, scratch, begin, end);
      });

  // In the order of the images, whatever the number of threads.
  for (int64_t which = 0; which < 2; ++which) {
    for (int64_t c = 0; c < channels; ++c) {
      double total = 0;
      for (int64_t image = 0; image < maps.images(); ++image) {
        total += of_channels[(image * 2 + which) * channels + c];
      }
      grads_of_vectors[which][c] = static_cast<float>(total);
    }
  }
  return {as_dtype(grad_x, dtype), grad_weight, grad_bias};
}

STABLE_TORCH_LIBRARY_IMPL(flexvar, CPU, m) {
  m.impl("group_norm_silu", TORCH_BOX(&group_norm_silu_cpu));
  m.impl("group_norm_silu_backward", TORCH_BOX(&group_norm_silu_backward_cpu));
}

}  // namespace
}  // namespace flexvar
