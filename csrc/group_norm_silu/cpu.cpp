#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "common/cpu_memory.h"
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
  shape.chunks = (shape.pixels + shape.chunk_pixels - 1) / shape.chunk_pixels;
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

// The three steps of either direction: first(begin, end, scratch) over units, between(i) for every
// group i of every image, second(begin, end, scratch) over units.
template <class First, class Between, class Second>
void run(const GroupNormShape& shape, const First& first, const Between& between,
         const Second& second) {
  const int64_t groups = shape.images * shape.groups;
  const int64_t threads = torch::stable::get_num_threads();
  if (!shape.channels_last && (groups % threads == 0 || groups >= 4 * threads)) {
    // Group by group, so that the second step finds in the cache what the first one read.
    const int64_t units = units_per_image(shape) / shape.groups;
    in_parallel(shape, groups, [&](int64_t begin, int64_t end, float* scratch) {
      for (int64_t group = begin; group < end; ++group) {
        first(group * units, (group + 1) * units, scratch);
        between(group);
        second(group * units, (group + 1) * units, scratch);
      }
    });
    return;
  }
  const int64_t units = shape.images * units_per_image(shape);
  in_parallel(shape, units, first);
  in_parallel(shape, groups, [&](int64_t begin, int64_t end, float*) {
    for (int64_t group = begin; group < end; ++group) between(group);
  });
  in_parallel(shape, units, second);
}

// f(part, elements in it) for the parts of a group, in their order.
template <class F>
void for_each_part(const GroupNormShape& shape, const float* parts, const F& f) {
  const int64_t channels = shape.channels_last ? channels_per_group(shape) : 1;  // in a part
  for (int64_t plane = parts_per_group(shape) / shape.chunks; plane > 0; --plane) {
    for (int64_t chunk = 0; chunk < shape.chunks; ++chunk, parts += 2) {
      f(parts, static_cast<double>(pixels_of_chunk(shape, chunk) * channels));
    }
  }
}

// Of one group of one image, from its parts.
void put_together(const GroupNormSiluParams& params, double eps, int64_t group) {
  const GroupNormShape& shape = params.shape;
  const float* const parts = params.parts + group * parts_per_group(shape) * 2;
  const double elements = static_cast<double>(channels_per_group(shape) * shape.pixels);
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
  Tensor statistics =
      torch::stable::new_zeros(x, {maps.images(), maps.groups(), 2}, ScalarType::Float);
  if (out.numel() > 0) {
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
        params.shape,
        [&](int64_t begin, int64_t end, float* scratch) { moments(params, scratch, begin, end); },
        [&](int64_t group) { put_together(params, eps, group); },
        [&](int64_t begin, int64_t end, float* scratch) { apply(params, scratch, begin, end); });
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
  Tensor grad_weight = torch::stable::new_zeros(x, {channels}, ScalarType::Float);
  Tensor grad_bias = torch::stable::new_zeros(x, {channels}, ScalarType::Float);
  if (grad_x.numel() == 0) return {as_dtype(grad_x, dtype), grad_weight, grad_bias};

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
      params.shape,
      [&](int64_t begin, int64_t end, float* scratch) { sum(params, scratch, begin, end); },
      [&](int64_t group) { put_sums_together(params, of_channels, group); },
      [&](int64_t begin, int64_t end, float* scratch) { apply(params, scratch, begin, end); });

  // In the order of the images, whatever the number of threads.
  float* const results[] = {grad_weight.mutable_data_ptr<float>(),
                            grad_bias.mutable_data_ptr<float>()};
  for (int64_t c = 0; c < 2 * channels; ++c) {
    double total = 0;
    for (int64_t image = 0; image < maps.images(); ++image) {
      total += of_channels[image * 2 * channels + c];
    }
    results[c / channels][c % channels] = static_cast<float>(total);
  }
  return {as_dtype(grad_x, dtype), grad_weight, grad_bias};
}

STABLE_TORCH_LIBRARY_IMPL(flexvar, CPU, m) {
  m.impl("group_norm_silu", TORCH_BOX(&group_norm_silu_cpu));
  m.impl("group_norm_silu_backward", TORCH_BOX(&group_norm_silu_backward_cpu));
}

}  // namespace
}  // namespace flexvar
