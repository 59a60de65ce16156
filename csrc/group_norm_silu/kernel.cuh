// group_norm_silu and its backward. Either direction reads its maps twice: once for moments or sums
// of every channel over a chunk of pixels, which a small kernel puts together in one order, and
// once to write the result. For maps of E elements the floors are, in elements: 3 E forward (2 E
// where the second read finds x in the cache), 5 E backward.
#pragma once

#include "common/cuda.cuh"
#include "common/divide_up.h"
#include "common/float_element.h"

namespace flexvar {

constexpr int kGroupNormThreads = 256;
constexpr int kGroupNormCombineThreads = 128;
constexpr int kGroupNormMinItems = 4, kGroupNormMaxItems = 32;  // of a thread
constexpr int kGroupNormBlocks = 512;  // of an image, as long as threads have items enough

// How blocks and threads share the work. An item is what lies kVector-wise side by side: with
// channels last a pixel, and the columns are its vectors of channels; else a vector of pixels of a
// channel, the only column. A plane is what items follow each other in: an image, else a channel of
// one. Block (plane, column block, chunk) takes a chunk of a plane's items; thread (row, column)
// of it the items row, row + rows, … of the chunk. All this depends on the shape of one image, so
// that the order of sums does.
struct GroupNormPlan {
  int64_t images, channels, pixels;
  int groups;
  bool channels_last;
  int64_t items, chunk_items;
  int chunks, vector_columns, columns, column_blocks, rows;

  int threads() const { return columns * rows; }
  int64_t blocks() const {
    return images * (channels_last ? 1 : channels) * column_blocks * chunks;
  }
};

inline GroupNormPlan plan_group_norm(int64_t images, int64_t channels, int64_t pixels,
                                     int64_t groups, bool channels_last, int vector) {
  GroupNormPlan plan{};
  plan.images = images;
  plan.channels = channels;
  plan.pixels = pixels;
  plan.groups = static_cast<int>(groups);
  plan.channels_last = channels_last;
  plan.items = channels_last ? pixels : pixels / vector;
  plan.vector_columns = channels_last ? static_cast<int>(channels / vector) : 1;
  plan.columns = min(plan.vector_columns, kGroupNormThreads);
  plan.column_blocks = static_cast<int>(divide_up(plan.vector_columns, plan.columns));
  plan.rows =
      static_cast<int>(min(int64_t(kGroupNormThreads / plan.columns), max(plan.items, int64_t(1))));
  const int64_t items_of_threads =
      divide_up(plan.items, plan.rows) * (channels_last ? plan.column_blocks : channels);
  const int64_t items_of_thread =
      min(max(divide_up(items_of_threads, kGroupNormBlocks), int64_t(kGroupNormMinItems)),
          int64_t(kGroupNormMaxItems));
  plan.chunk_items = plan.rows * items_of_thread;
  plan.chunks = static_cast<int>(divide_up(plan.items, plan.chunk_items));
  return plan;
}

// Whether the maps can be read in vectors of 16 bytes; `aligned`: what pointers say.
inline bool group_norm_in_vectors(int64_t channels, int64_t pixels, bool channels_last,
                                  bool aligned, size_t element_size) {
  const int64_t elements = 16 / static_cast<int64_t>(element_size);
  return aligned && (channels_last ? channels : pixels) % elements == 0;
}

struct GroupNormSiluCudaParams {
  GroupNormPlan plan;
  const void* x;
  const float *weight, *bias;  // [channels]
  float2* parts;               // [images, chunks, channels]: mean, squared differences from it
  float* statistics;           // [images, groups, 2]: mean, reciprocal deviation
  void* out;                   // as x
  float eps;
  bool silu;
};

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

// --- A thread's place
// ----------------------------------------------------------------------------

struct GroupNormPlace {
  int64_t image;
  int chunk, row;
  int column;          // of the block
  int64_t channel;     // of the first element of the thread's vectors
  int64_t begin, end;  // items
  int64_t offset;      // of item 0's element for this thread
  int64_t stride;      // elements from item to item
  bool inside;         // false where a column block reaches beyond the last column
};

template <int kVector>
__device__ __forceinline__ GroupNormPlace group_norm_place(const GroupNormPlan& plan) {
  GroupNormPlace place;
  const auto chunks = static_cast<unsigned>(plan.chunks);
  const auto column_blocks = static_cast<unsigned>(plan.column_blocks);
  const unsigned rest = blockIdx.x / chunks, plane = rest / column_blocks;
  place.chunk = static_cast<int>(blockIdx.x % chunks);
  place.row = static_cast<int>(threadIdx.x) / plan.columns;
  place.column = static_cast<int>(threadIdx.x) % plan.columns;
  const int column = static_cast<int>(rest % column_blocks) * plan.columns + place.column;
  place.inside = column < plan.vector_columns;
  place.begin = place.chunk * plan.chunk_items;
  place.end = min(place.begin + plan.chunk_items, plan.items);
  if (plan.channels_last) {
    place.image = plane;
    place.channel = int64_t(column) * kVector;
    place.stride = plan.channels;
    place.offset = plane * plan.pixels * plan.channels + place.channel;
  } else {
    place.image = plane / plan.channels;
    place.channel = plane % plan.channels;
    place.stride = kVector;
    place.offset = plane * plan.pixels;
  }
  return place;
}

// The channel of element j of the thread's vectors.
__device__ __forceinline__ int64_t channel_of(const GroupNormPlan& plan,
                                              const GroupNormPlace& place, int j) {
  return place.channel + (plan.channels_last ? j : 0);
}
__device__ __forceinline__ int64_t group_of(const GroupNormPlan& plan, const GroupNormPlace& place,
                                            int64_t channel) {
  const int size = static_cast<int>(plan.channels) / plan.groups;
  return place.image * plan.groups + static_cast<int>(channel) / size;
}

template <class T, int kVector>
struct alignas(sizeof(T) * kVector) GroupNormVector {
  T element[kVector];
};

template <class T, int kVector>
__device__ __forceinline__ void load_vector(float (&values)[kVector], const void* data,
                                            int64_t offset) {
  using V = GroupNormVector<T, kVector>;
  const V loaded = *reinterpret_cast<const V*>(static_cast<const T*>(data) + offset);
#pragma unroll
  for (int j = 0; j < kVector; ++j) values[j] = to_float(loaded.element[j]);
}

template <class T, int kVector>
__device__ __forceinline__ void store_vector(const float (&values)[kVector], void* data,
                                             int64_t offset) {
  using V = GroupNormVector<T, kVector>;
  V stored;
#pragma unroll
  for (int j = 0; j < kVector; ++j) stored.element[j] = from_float<T>(values[j]);
  *reinterpret_cast<V*>(static_cast<T*>(data) + offset) = stored;
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

// Elements of a channel in a chunk.
__device__ __forceinline__ int64_t elements_of_chunk(const GroupNormPlan& plan, int chunk) {
  const int64_t begin = chunk * plan.chunk_items;
  const int64_t items = min(plan.chunk_items, plan.items - begin);
  return items * (plan.channels_last ? 1 : plan.pixels / plan.items);
}

// --- Moments
// -------------------------------------------------------------------------------------

template <int kVector>
struct GroupNormMomentsStorage {
  float count[kGroupNormThreads];  // of elements
  float mean[kVector][kGroupNormThreads];
  float squares[kVector][kGroupNormThreads];  // of differences from the mean, summed
};

// Differences are taken from the first of a thread's at most kGroupNormMaxItems elements of a
// channel: being one of them, it cannot be so far from their mean that their squares swallow the
// variance.
template <class T, int kVector>
__global__ void __launch_bounds__(kGroupNormThreads)
    group_norm_moments_kernel(GroupNormSiluCudaParams params) {
  auto& shared = shared_storage<GroupNormMomentsStorage<kVector>>();
  const GroupNormPlan& plan = params.plan;
  const GroupNormPlace place = group_norm_place<kVector>(plan);
  const int thread = static_cast<int>(threadIdx.x);
  const int kept = plan.channels_last ? kVector : 1;  // channels of the thread
  float count = 0, mean[kVector] = {}, squares[kVector] = {};
  int64_t item = place.begin + place.row;
  if (place.inside && item < place.end) {
    float shift[kVector], sum[kVector] = {};
    load_vector<T, kVector>(shift, params.x, place.offset + item * place.stride);
    count = 1;
#pragma unroll 4
    for (item += plan.rows; item < place.end; item += plan.rows) {
      float x[kVector];
      load_vector<T, kVector>(x, params.x, place.offset + item * place.stride);
      count += 1;
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const float difference = x[j] - shift[j];
        sum[j] += difference;
        squares[j] = fmaf(difference, difference, squares[j]);
      }
    }
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const float difference = sum[j] / count;
      mean[j] = shift[j] + difference;
      squares[j] = squares[j] - sum[j] * difference;
      if (squares[j] < 0) squares[j] = 0;  // NaN stays
    }
    if (!plan.channels_last) {  // one channel: the elements of the vector belong together
      float mean_sum = 0, square_sum = 0;
#pragma unroll
      for (int j = 0; j < kVector; ++j) mean_sum += mean[j];
      const float together = mean_sum / kVector;
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const float difference = mean[j] - together;
        square_sum += fmaf(count * difference, difference, squares[j]);
      }
      mean[0] = together;
      squares[0] = square_sum;
      count *= kVector;
    }
  }
  shared.count[thread] = count;
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    if (j < kept) {
      shared.mean[j][thread] = mean[j];
      shared.squares[j][thread] = squares[j];
    }
  }
  for_row_pairs(plan, place.row, [&](int a, int b) {
    const float more = shared.count[b];
    if (more == 0) return;
    const float together = shared.count[a] + more, share = more / together;
    const float weight = shared.count[a] * share;
    shared.count[a] = together;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      if (j < kept) {
        const float difference = shared.mean[j][b] - shared.mean[j][a];
        shared.mean[j][a] = fmaf(difference, share, shared.mean[j][a]);
        shared.squares[j][a] += fmaf(weight * difference, difference, shared.squares[j][b]);
      }
    }
  });
  if (place.row != 0 || !place.inside) return;
  float2* const parts =
      params.parts + (place.image * plan.chunks + place.chunk) * plan.channels + place.channel;
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    if (j < kept) parts[j] = make_float2(shared.mean[j][thread], shared.squares[j][thread]);
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

// Block b: group b % groups of image b / groups.
__global__ void __launch_bounds__(kGroupNormCombineThreads)
    group_norm_statistics_kernel(GroupNormSiluCudaParams params) {
  auto& shared = shared_storage<GroupNormSumStorage>();
  const GroupNormPlan& plan = params.plan;
  const auto groups = static_cast<unsigned>(plan.groups);
  const int size = static_cast<int>(plan.channels) / plan.groups;
  const int64_t image = blockIdx.x / groups, count = int64_t(size) * plan.chunks;
  const float2* const parts =
      params.parts + image * plan.chunks * plan.channels + blockIdx.x % groups * size;
  // f(a part, its elements)
  const auto for_each_part = [&](auto f) {
    for (int64_t i = threadIdx.x; i < count; i += kGroupNormCombineThreads) {
      const int chunk = static_cast<int>(i / size);
      f(parts[chunk * plan.channels + i % size],
        static_cast<double>(elements_of_chunk(plan, chunk)));
    }
  };
  const double elements = static_cast<double>(size * plan.pixels);
  double sum = 0;
  for_each_part([&](float2 part, double n) { sum += n * static_cast<double>(part.x); });
  const double mean = block_sum(sum, shared) / elements;
  double squares = 0;
  for_each_part([&](float2 part, double n) {
    const double difference = static_cast<double>(part.x) - mean;
    squares += static_cast<double>(part.y) + n * difference * difference;
  });
  const double variance = block_sum(squares, shared) / elements;
  if (threadIdx.x == 0) {
    params.statistics[2 * blockIdx.x] = static_cast<float>(mean);
    params.statistics[2 * blockIdx.x + 1] =
        static_cast<float>(1 / sqrt(variance + static_cast<double>(params.eps)));
  }
}

// --- The result
// ----------------------------------------------------------------------------------

__device__ __forceinline__ float group_norm_sigmoid(float y) {
  return __fdividef(1.0f, 1.0f + __expf(-y));
}

template <class T, int kVector>
__global__ void __launch_bounds__(kGroupNormThreads)
    group_norm_silu_apply_kernel(GroupNormSiluCudaParams params) {
  const GroupNormPlan& plan = params.plan;
  const GroupNormPlace place = group_norm_place<kVector>(plan);
  if (!place.inside) return;
  float mean[kVector], factor[kVector], bias[kVector];
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    const int64_t channel = channel_of(plan, place, j);
    const float* const statistics = params.statistics + 2 * group_of(plan, place, channel);
    mean[j] = statistics[0];
    factor[j] = statistics[1] * params.weight[channel];
    bias[j] = params.bias[channel];
  }
#pragma unroll 4
  for (int64_t item = place.begin + place.row; item < place.end; item += plan.rows) {
    const int64_t offset = place.offset + item * place.stride;
    float x[kVector];
    load_vector<T, kVector>(x, params.x, offset);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const float y = fmaf(x[j] - mean[j], factor[j], bias[j]);
      x[j] = params.silu ? y * group_norm_sigmoid(y) : y;
    }
    store_vector<T, kVector>(x, params.out, offset);
  }
}

// --- Backward
// ------------------------------------------------------------------------------------

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
__global__ void __launch_bounds__(kGroupNormThreads)
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
      const int64_t channel = channel_of(plan, place, j);
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
    const int64_t channel = channel_of(plan, place, j);
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
