// Gradients of group_norm_silu. The maps are read twice: once for sums over a chunk of pixels,
// which are put together in one order, and once to write the result. For maps of E elements the
// floor is 5 E elements.
#pragma once

#include "group_norm_silu/place.cuh"

namespace flexvar {

constexpr int kGroupNormCombineThreads = 128;

// For sums in float32: a thread's are a single chain.
inline GroupNormPlan plan_for_sums(const GroupNormPlan& plan) {
  return plan.in_chunks(
      min(max(divide_up(plan.items_of_image(), kGroupNormBlocks), int64_t(kGroupNormMinItems)),
          int64_t(kGroupNormMaxItems)));
}

struct GroupNormSiluBackwardCudaParams {
  GroupNormPlan plan;
  const void *grad_out, *x;
  const float *weight, *bias;  // [channels]
  const float* statistics;     // [images, groups, 2]
  // With g = grad_out through SiLU's derivative and n = GN(x) before weight and bias:
  float2* parts;                   // [images, chunks, channels]: of g * n and of g, summed
  float2* channel_sums;            // [images, channels]: likewise
  float2* group_means;             // [images, groups]: of g * weight * n and of g * weight
  float *grad_weight, *grad_bias;  // [channels]
  void* grad_x;                    // as x
  bool silu;
};

__device__ __forceinline__ int64_t group_of(const GroupNormPlan& plan, const GroupNormPlace& place,
                                            int channel) {
  return place.image * plan.groups + group_of(plan, channel);
}

// add(row, row + step) for rows in a tree, all columns of the block side by side: what is left
// stands in row 0.
template <class Add>
__device__ __forceinline__ void for_row_pairs(const GroupNormPlan& plan, int row, Add add) {
  int step = 1;
  while (step < plan.rows) step *= 2;
  for (step /= 2; step > 0; step /= 2) {
    __syncthreads();
    if (row < step && row + step < plan.rows) {
      add(static_cast<int>(threadIdx.x), static_cast<int>(threadIdx.x) + step * plan.columns);
    }
  }
}

struct GroupNormSumStorage {
  double value[kGroupNormCombineThreads];
};

// The sum over the block's threads, the same bits in all of them.
__device__ __forceinline__ double block_sum(double value, GroupNormSumStorage& shared) {
  const int thread = static_cast<int>(threadIdx.x);
  __syncthreads();
  shared.value[thread] = value;
#pragma unroll
  for (int step = kGroupNormCombineThreads / 2; step > 0; step /= 2) {
    __syncthreads();
    if (thread < step) shared.value[thread] += shared.value[thread + step];
  }
  __syncthreads();
  return shared.value[0];
}

// g: grad through the activation's derivative at y.
__device__ __forceinline__ float through_activation(float grad, float y, bool silu) {
  if (!silu) return grad;
  const float s = group_norm_sigmoid(y);
  return grad * (s * fmaf(y, 1.0f - s, 1.0f));
}

template <int kVector>
struct GroupNormSumsStorage {
  float2 sum[kVector][kGroupNormThreads];  // of g * n and of g
};

template <class T, int kVector>
__global__ void __launch_bounds__(kGroupNormThreads, 2)
    group_norm_silu_backward_sums_kernel(GroupNormSiluBackwardCudaParams params) {
  auto& shared = shared_storage<GroupNormSumsStorage<kVector>>();
  const GroupNormPlan& plan = params.plan;
  const GroupNormPlace place = group_norm_place<kVector>(plan);
  const int thread = static_cast<int>(threadIdx.x);
  const int kept = plan.channels_last ? kVector : 1;
  float products[kVector] = {}, grads[kVector] = {};
  if (place.inside) {
    float mean[kVector], factor[kVector], weight[kVector], bias[kVector];
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const int channel = channel_of(plan, place, j);
      const float* const statistics = params.statistics + 2 * group_of(plan, place, channel);
      mean[j] = statistics[0];
      factor[j] = statistics[1];
      weight[j] = params.weight[channel];
      bias[j] = params.bias[channel];
    }
#pragma unroll 2
    for (int64_t item = place.begin + place.row; item < place.end; item += plan.rows) {
      const int64_t offset = place.offset + item * place.stride;
      float x[kVector], grad[kVector];
      load_vector<T, kVector>(x, params.x, offset);
      load_vector<T, kVector>(grad, params.grad_out, offset);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const float n = (x[j] - mean[j]) * factor[j];
        const float g = through_activation(grad[j], fmaf(n, weight[j], bias[j]), params.silu);
        products[j] = fmaf(g, n, products[j]);
        grads[j] += g;
      }
    }
  }
  if (!plan.channels_last) {
#pragma unroll
    for (int j = 1; j < kVector; ++j) {
      products[0] += products[j];
      grads[0] += grads[j];
    }
  }
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    if (j < kept) shared.sum[j][thread] = make_float2(products[j], grads[j]);
  }
  for_row_pairs(plan, place.row, [&](int a, int b) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      if (j < kept) {
        shared.sum[j][a].x += shared.sum[j][b].x;
        shared.sum[j][a].y += shared.sum[j][b].y;
      }
    }
  });
  if (place.row != 0 || !place.inside) return;
  float2* const parts =
      params.parts + (place.image * plan.chunks + place.chunk) * plan.channels + place.channel;
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    if (j < kept) parts[j] = shared.sum[j][thread];
  }
}

// Block b: group b % groups of image b / groups. The sums of every channel of the group over the
// chunks, one channel after the other, and the means over the group that they make.
__global__ void __launch_bounds__(kGroupNormCombineThreads)
    group_norm_silu_backward_means_kernel(GroupNormSiluBackwardCudaParams params) {
  auto& shared = shared_storage<GroupNormSumStorage>();
  const GroupNormPlan& plan = params.plan;
  const auto groups = static_cast<unsigned>(plan.groups);
  const int size = static_cast<int>(plan.channels) / plan.groups;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t image = blockIdx.x / groups, first = blockIdx.x % groups * int64_t(size);
  const float2* const parts = params.parts + image * plan.chunks * plan.channels;
  double product_mean = 0, grad_mean = 0;  // in lane 0: of the warp's channels
  for (int64_t channel = first + warp; channel < first + size;
       channel += kGroupNormCombineThreads / 32) {
    double products = 0, grads = 0;
    for (int chunk = lane; chunk < plan.chunks; chunk += 32) {
      const float2 part = parts[chunk * plan.channels + channel];
      products += static_cast<double>(part.x);
      grads += static_cast<double>(part.y);
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
      products += __shfl_xor_sync(0xffffffffu, products, mask);
      grads += __shfl_xor_sync(0xffffffffu, grads, mask);
    }
    if (lane == 0) {
      params.channel_sums[image * plan.channels + channel] =
          make_float2(static_cast<float>(products), static_cast<float>(grads));
      const double weight = static_cast<double>(params.weight[channel]);
      product_mean += weight * products;
      grad_mean += weight * grads;
    }
  }
  const double elements = static_cast<double>(size * plan.pixels);
  product_mean = block_sum(product_mean, shared) / elements;
  grad_mean = block_sum(grad_mean, shared) / elements;
  if (threadIdx.x == 0) {
    params.group_means[blockIdx.x] =
        make_float2(static_cast<float>(product_mean), static_cast<float>(grad_mean));
  }
}

// A thread for each channel: its sums over the images, in their order.
__global__ void __launch_bounds__(kGroupNormCombineThreads)
    group_norm_silu_backward_weight_kernel(GroupNormSiluBackwardCudaParams params) {
  const int64_t channel = blockIdx.x * int64_t(kGroupNormCombineThreads) + threadIdx.x;
  if (channel >= params.plan.channels) return;
  double products = 0, grads = 0;
#pragma unroll 8
  for (int64_t image = 0; image < params.plan.images; ++image) {
    const float2 sums = params.channel_sums[image * params.plan.channels + channel];
    products += static_cast<double>(sums.x);
    grads += static_cast<double>(sums.y);
  }
  params.grad_weight[channel] = static_cast<float>(products);
  params.grad_bias[channel] = static_cast<float>(grads);
}

// grad_x = (g * weight - mean(g * weight) - n * mean(g * weight * n)) / deviation
template <class T, int kVector>
__global__ void __launch_bounds__(kGroupNormThreads)
    group_norm_silu_backward_apply_kernel(GroupNormSiluBackwardCudaParams params) {
  const GroupNormPlan& plan = params.plan;
  const GroupNormPlace place = group_norm_place<kVector>(plan);
  if (!place.inside) return;
  float mean[kVector], factor[kVector], weight[kVector], bias[kVector];
  float product_mean[kVector], grad_mean[kVector];
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    const int channel = channel_of(plan, place, j);
    const int64_t group = group_of(plan, place, channel);
    const float2 means = params.group_means[group];
    mean[j] = params.statistics[2 * group];
    factor[j] = params.statistics[2 * group + 1];
    weight[j] = params.weight[channel];
    bias[j] = params.bias[channel];
    product_mean[j] = means.x;
    grad_mean[j] = means.y;
  }
#pragma unroll 2
  for (int64_t item = place.begin + place.row; item < place.end; item += plan.rows) {
    const int64_t offset = place.offset + item * place.stride;
    float x[kVector], grad[kVector];
    load_vector<T, kVector>(x, params.x, offset);
    load_vector<T, kVector>(grad, params.grad_out, offset);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const float n = (x[j] - mean[j]) * factor[j];
      const float g = through_activation(grad[j], fmaf(n, weight[j], bias[j]), params.silu);
      const float centred = fmaf(g, weight[j], -grad_mean[j]);
      x[j] = fmaf(-n, product_mean[j], centred) * factor[j];
    }
    store_vector<T, kVector>(x, params.grad_x, offset);
  }
}

}  // namespace flexvar
