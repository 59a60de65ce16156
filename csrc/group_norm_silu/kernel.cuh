// group_norm_silu and its backward. Either direction reads its maps twice: once for moments or sums
// over a chunk of pixels, which are put together in one order, and once to write the result. For
// maps of E elements the floors are, in elements: 3 E forward (2 E where the second read finds x in
// the cache), 5 E backward.
#pragma once

#include "common/cuda.cuh"
#include "common/divide_up.h"
#include "common/float_element.h"
#include "common/ptx.cuh"

namespace flexvar {

constexpr int kGroupNormThreads = 256;
constexpr int kGroupNormCombineThreads = 128;
// Of an image, as long as threads have items enough. The forward's moments are put together by
// every block that writes the result: the fewer of them the better.
constexpr int kGroupNormMomentsBlocks = 64, kGroupNormBlocks = 512;
constexpr int kGroupNormApplyBlocks = 4096;  // of all images: each has that to do beforehand
constexpr int kGroupNormMinItems = 4, kGroupNormMaxItems = 32;  // of a thread
constexpr int kGroupNormBatch = 4;  // items of a thread that are on their way at a time

// How blocks and threads share the work. An item is what lies kVector-wise side by side: with
// channels last a pixel, and the columns are its vectors of channels; else a vector of pixels of a
// channel, the only column. A plane is what items follow each other in: an image, else a channel of
// one. Block (plane, column block, chunk) takes a chunk of a plane's items; thread (row, column)
// of it the items row, row + rows, … of the chunk. All this depends on the shape of one image, so
// that the order of sums does; only the chunks in which the forward writes its result do not.
struct GroupNormPlan {
  int64_t images, channels, pixels;
  int groups, group_channels;
  bool channels_last;
  int64_t items, chunk_items;
  int chunks, vector_columns, columns, column_blocks, rows;
  int block_channels;  // at most

  // In whole warps: threads beyond the last row have nothing to read.
  int threads() const { return static_cast<int>(divide_up(columns * rows, 32) * 32); }
  int64_t blocks() const {
    return images * (channels_last ? 1 : channels) * column_blocks * chunks;
  }
  // Of all threads of an image, where each has but one column or channel.
  int64_t items_of_image() const {
    return divide_up(items, rows) * (channels_last ? column_blocks : channels);
  }
  GroupNormPlan in_chunks(int64_t items_of_thread) const {
    GroupNormPlan plan = *this;
    plan.chunk_items = rows * items_of_thread;
    plan.chunks = static_cast<int>(divide_up(items, plan.chunk_items));
    return plan;
  }
};

inline GroupNormPlan plan_group_norm(int64_t images, int64_t channels, int64_t pixels,
                                     int64_t groups, bool channels_last, int vector) {
  GroupNormPlan plan{};
  plan.images = images;
  plan.channels = channels;
  plan.pixels = pixels;
  plan.groups = static_cast<int>(groups);
  plan.group_channels = static_cast<int>(channels / groups);
  plan.channels_last = channels_last;
  plan.items = channels_last ? pixels : pixels / vector;
  plan.vector_columns = channels_last ? static_cast<int>(channels / vector) : 1;
  plan.columns = min(plan.vector_columns, kGroupNormThreads);
  plan.column_blocks = static_cast<int>(divide_up(plan.vector_columns, plan.columns));
  plan.rows =
      static_cast<int>(min(int64_t(kGroupNormThreads / plan.columns), max(plan.items, int64_t(1))));
  plan.block_channels = channels_last ? plan.columns * vector : 1;
  return plan;
}

// For sums in float32: a thread's are a single chain.
inline GroupNormPlan plan_for_sums(const GroupNormPlan& plan) {
  return plan.in_chunks(
      min(max(divide_up(plan.items_of_image(), kGroupNormBlocks), int64_t(kGroupNormMinItems)),
          int64_t(kGroupNormMaxItems)));
}
inline GroupNormPlan plan_for_moments(const GroupNormPlan& plan) {
  return plan.in_chunks(
      max(divide_up(plan.items_of_image(), kGroupNormMomentsBlocks), int64_t(kGroupNormMinItems)));
}
inline GroupNormPlan plan_for_result(const GroupNormPlan& plan) {
  return plan.in_chunks(
      min(max(divide_up(plan.images * plan.items_of_image(), kGroupNormApplyBlocks),
              int64_t(kGroupNormMinItems)),
          int64_t(kGroupNormMaxItems)));
}

// Whether the maps can be read in vectors of 16 bytes; `aligned`: what pointers say.
inline bool group_norm_in_vectors(int64_t channels, int64_t pixels, bool channels_last,
                                  bool aligned, size_t element_size) {
  const int64_t elements = 16 / static_cast<int64_t>(element_size);
  return aligned && (channels_last ? channels : pixels) % elements == 0;
}

struct GroupNormSiluCudaParams {
  GroupNormPlan plan, result_plan;  // they differ in their chunks
  // Channels that a part of the moments is of: a group's, unless several blocks share it.
  int part_channels;
  const void* x;
  const float *weight, *bias;  // [channels]
  // [images, groups, chunks, group_channels / part_channels]: mean, squared differences from it
  float2* parts;
  float* statistics;  // [images, groups, 2]: mean, reciprocal deviation
  void* out;          // as x
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
  bool inside;  // false where a column block reaches beyond the last column, or the block the rows
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
  place.inside = column < plan.vector_columns && place.row < plan.rows;
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
  return place.image * plan.groups + static_cast<int>(channel) / plan.group_channels;
}

template <class T, int kVector>
struct alignas(sizeof(T) * kVector) GroupNormVector {
  T element[kVector];
};

template <class T, int kVector>
__device__ __forceinline__ GroupNormVector<T, kVector> vector_at(const void* data, int64_t offset) {
  return *reinterpret_cast<const GroupNormVector<T, kVector>*>(static_cast<const T*>(data) +
                                                               offset);
}

template <class T, int kVector>
__device__ __forceinline__ void load_vector(float (&values)[kVector], const void* data,
                                            int64_t offset) {
  const GroupNormVector<T, kVector> loaded = vector_at<T, kVector>(data, offset);
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

// The first channel of a block, and how many are its own.
struct GroupNormChannels {
  int first, count;
};
__device__ __forceinline__ GroupNormChannels channels_of_block(const GroupNormPlan& plan,
                                                               const GroupNormPlace& place) {
  if (!plan.channels_last) return {static_cast<int>(place.channel), 1};
  const auto blocks = static_cast<unsigned>(plan.column_blocks);
  const auto block = blockIdx.x / static_cast<unsigned>(plan.chunks) % blocks;
  const int first = static_cast<int>(block) * plan.block_channels;
  return {first, min(plan.block_channels, static_cast<int>(plan.channels) - first)};
}

// A power of two: as many as a block of warps has for each of `units`, and a warp at most.
__device__ __forceinline__ int lanes_for(int units) {
  int lanes = 32;
  while (lanes > 1 && lanes * units > static_cast<int>(blockDim.x)) lanes /= 2;
  return lanes;
}

// f(unit, lane of the unit's, whether there is such a unit), by whole warps.
template <class F>
__device__ __forceinline__ void for_each_unit(int units, int lanes, F f) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  for (int first = 0; first < units; first += threads / lanes) {
    const int unit = first + thread / lanes;
    f(unit, thread % lanes, unit < units);
  }
}

__device__ __forceinline__ float sum_over_lanes(float value, int lanes) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, mask);
  }
  return value;
}

struct GroupNormPart {
  float elements, mean, squares;  // squared differences from the mean, summed
};

// Of part(0), …, part(count - 1) together, which have `elements`: mean and squares, the same bits
// in all of the unit's lanes. Means first, then differences from their mean, so that nothing
// cancels; what that mean is off by is taken off.
template <class PartOf>
__device__ __forceinline__ float2 merge_parts(int count, float elements, int lane, int lanes,
                                              PartOf part) {
  const float share = 1.0f / elements;
  float about = 0;
#pragma unroll 8
  for (int i = lane; i < count; i += lanes) {
    const GroupNormPart p = part(i);
    about = fmaf(p.elements * share, p.mean, about);
  }
  about = sum_over_lanes(about, lanes);
  float rest = 0, squares = 0;
#pragma unroll 8
  for (int i = lane; i < count; i += lanes) {
    const GroupNormPart p = part(i);
    const float difference = p.mean - about;
    rest = fmaf(p.elements * share, difference, rest);
    squares += fmaf(p.elements * difference, difference, p.squares);
  }
  rest = sum_over_lanes(rest, lanes);
  squares = sum_over_lanes(squares, lanes);
  squares = fmaf(-rest * elements, rest, squares);
  return make_float2(about + rest, squares < 0 ? 0.0f : squares);  // NaN stays
}

// Elements of a channel in a chunk.
__device__ __forceinline__ float elements_of_chunk(const GroupNormPlan& plan, int chunk,
                                                   int vector) {
  const int64_t begin = chunk * plan.chunk_items;
  const int64_t items = min(plan.chunk_items, plan.items - begin);
  return static_cast<float>(items * (plan.channels_last ? 1 : vector));
}

// Parts of a channel, one for each row of the block; row 0 then holds those of the chunk.
template <int kVector>
struct GroupNormMomentsStorage {
  alignas(32) float mean[kVector * kGroupNormThreads];
  alignas(32) float squares[kVector * kGroupNormThreads];
};

// Differences are taken from the first of at most kGroupNormMaxItems elements of a channel: being
// one of them, it cannot be so far from their mean that their squares swallow the variance.
template <class T, int kVector>
__global__ void __launch_bounds__(kGroupNormThreads, 2)
    group_norm_moments_kernel(GroupNormSiluCudaParams params) {
  auto& shared = shared_storage<GroupNormMomentsStorage<kVector>>();
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const GroupNormPlan& plan = params.plan;
  const GroupNormPlace place = group_norm_place<kVector>(plan);
  const int items = static_cast<int>(place.end - place.begin);
  const int each = items / plan.rows, rows_with_more = items % plan.rows;
  const int64_t step = plan.rows * place.stride;
  const T* source =
      static_cast<const T*>(params.x) + place.offset + (place.begin + place.row) * place.stride;
  float count = 0, mean[kVector] = {}, squares[kVector] = {};
  int left = place.inside ? each + (place.row < rows_with_more) : 0;
  while (left > 0) {
    const int taken = min(left, kGroupNormMaxItems);
    float shift[kVector], sum[kVector] = {}, square_sum[kVector] = {};
    load_vector<T, kVector>(shift, source, 0);
    for (int first = 0; first < taken; first += kGroupNormBatch) {
      GroupNormVector<T, kVector> loaded[kGroupNormBatch];
#pragma unroll
      for (int i = 0; i < kGroupNormBatch; ++i) {
        if (first + i < taken) loaded[i] = vector_at<T, kVector>(source, i * step);
      }
#pragma unroll
      for (int i = 0; i < kGroupNormBatch; ++i) {
        if (first + i < taken) {
#pragma unroll
          for (int j = 0; j < kVector; ++j) {
            const float difference = to_float(loaded[i].element[j]) - shift[j];
            sum[j] += difference;
            square_sum[j] = fmaf(difference, difference, square_sum[j]);
          }
        }
      }
      source += kGroupNormBatch * step;
    }
    const auto more = static_cast<float>(taken);
    const float inverse = 1.0f / more, together = count + more;
    const float share = more / together, weight = count * share;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const float from_shift = sum[j] * inverse;
      const float rest = fmaf(-sum[j], from_shift, square_sum[j]);
      const float difference = shift[j] + from_shift - mean[j];
      mean[j] = fmaf(difference, share, mean[j]);
      squares[j] += fmaf(weight * difference, difference, rest < 0 ? 0.0f : rest);  // NaN stays
    }
    count = together;
    left -= taken;
  }
  if (place.inside) {
    if (plan.channels_last) {
      const int first = place.row * plan.block_channels + place.column * kVector;
      store_vector<float, kVector>(mean, shared.mean, first);
      store_vector<float, kVector>(squares, shared.squares, first);
    } else {  // one channel: the elements of the vector belong together
      float mean_sum = 0, square_sum = 0;
#pragma unroll
      for (int j = 0; j < kVector; ++j) mean_sum += mean[j];
      const float together = mean_sum / kVector;
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const float difference = mean[j] - together;
        square_sum += fmaf(count * difference, difference, squares[j]);
      }
      shared.mean[place.row] = together;
      shared.squares[place.row] = square_sum;
    }
  }
  __syncthreads();
  const GroupNormChannels channels = channels_of_block(plan, place);
  const float elements = elements_of_chunk(plan, place.chunk, kVector);
  const int vector = plan.channels_last ? 1 : kVector, row_lanes = lanes_for(plan.block_channels);
  const auto of_row = static_cast<float>(each * vector);
  const auto of_longer_row = static_cast<float>((each + 1) * vector);
  for_each_unit(channels.count, row_lanes, [&](int channel, int lane, bool valid) {
    const auto row = [&](int i) {
      const int at = i * plan.block_channels + channel;
      return GroupNormPart{i < rows_with_more ? of_longer_row : of_row, shared.mean[at],
                           shared.squares[at]};
    };
    const int rows = valid ? min(plan.rows, items) : 0;
    const float2 merged = merge_parts(rows, elements, lane, row_lanes, row);
    __syncwarp();
    if (valid && lane == 0) {
      shared.mean[channel] = merged.x;
      shared.squares[channel] = merged.y;
    }
  });
  __syncthreads();
  const int size = params.part_channels, units = channels.count / size, lanes = lanes_for(units);
  for_each_unit(units, lanes, [&](int unit, int lane, bool valid) {
    const auto channel = [&](int i) {
      return GroupNormPart{elements, shared.mean[unit * size + i], shared.squares[unit * size + i]};
    };
    const float2 merged =
        merge_parts(valid ? size : 0, elements * static_cast<float>(size), lane, lanes, channel);
    if (!valid || lane != 0) return;
    const int part = channels.first / size + unit;  // of the image's, side by side
    const int per_group = plan.group_channels / size, of_group = part % per_group;
    const int64_t group = int64_t(part - of_group) * plan.chunks;
    params.parts[place.image * plan.chunks * (plan.channels / size) + group +
                 int64_t(place.chunk) * per_group + of_group] = merged;
  });
}

template <int kVector>
struct GroupNormStatisticsStorage {
  float2 group[kVector * kGroupNormThreads];  // mean, reciprocal deviation
};

// Of the groups of the block's channels, from the parts of the moments: to shared memory and, where
// a group begins in the first chunk, to where the backward finds them. Returns the first group.
template <int kVector>
__device__ __forceinline__ int group_statistics(const GroupNormSiluCudaParams& params,
                                                const GroupNormPlace& place,
                                                GroupNormStatisticsStorage<kVector>& shared) {
  const GroupNormPlan& plan = params.plan;
  const GroupNormChannels channels = channels_of_block(params.result_plan, place);
  const int size = plan.group_channels, per_chunk = size / params.part_channels;
  const int first = channels.first / size;
  const int groups = (channels.first + channels.count - 1) / size - first + 1;
  const int count = plan.chunks * per_chunk,
            lanes = lanes_for(min(plan.groups, plan.block_channels));
  const auto part_channels = static_cast<float>(params.part_channels);
  const float of_chunk = elements_of_chunk(plan, 0, kVector) * part_channels;
  const float of_last = elements_of_chunk(plan, plan.chunks - 1, kVector) * part_channels;
  const float elements = static_cast<float>(size * plan.pixels);
  for_each_unit(groups, lanes, [&](int unit, int lane, bool valid) {
    const int64_t group = place.image * plan.groups + first + unit;
    const float2* const parts = params.parts + group * count;
    const auto part = [&](int i) {
      const float2 loaded = parts[i];
      return GroupNormPart{i < count - per_chunk ? of_chunk : of_last, loaded.x, loaded.y};
    };
    const float2 merged = merge_parts(valid ? count : 0, elements, lane, lanes, part);
    if (!valid || lane != 0) return;
    const float2 statistics = make_float2(merged.x, 1.0f / sqrtf(merged.y / elements + params.eps));
    shared.group[unit] = statistics;
    if (place.chunk == 0 && (first + unit) * size >= channels.first) {
      params.statistics[2 * group] = statistics.x;
      params.statistics[2 * group + 1] = statistics.y;
    }
  });
  __syncthreads();
  return first;
}

// --- The result
// ----------------------------------------------------------------------------------

__device__ __forceinline__ float group_norm_sigmoid(float y) {
  return __fdividef(1.0f, 1.0f + __expf(-y));
}

template <class T, int kVector>
__global__ void __launch_bounds__(kGroupNormThreads, 2)
    group_norm_silu_apply_kernel(GroupNormSiluCudaParams params) {
  auto& shared = shared_storage<GroupNormStatisticsStorage<kVector>>();
  ptx::griddepcontrol_wait();
  const GroupNormPlan& plan = params.result_plan;
  const GroupNormPlace place = group_norm_place<kVector>(plan);
  const int items = static_cast<int>(place.end - place.begin);
  const int64_t step = plan.rows * place.stride;
  int64_t offset = place.offset + (place.begin + place.row) * place.stride;
  int item = place.inside ? place.row : items;
  GroupNormVector<T, kVector> vectors[kGroupNormBatch];
  const auto load_batch = [&] {
#pragma unroll
    for (int i = 0; i < kGroupNormBatch; ++i) {
      if (item + i * plan.rows < items) {
        vectors[i] = vector_at<T, kVector>(params.x, offset + i * step);
      }
    }
  };
  load_batch();  // on its way while the statistics are put together
  const int first_group = group_statistics<kVector>(params, place, shared);
  if (!place.inside) return;
  float mean[kVector], factor[kVector], bias[kVector];
  int group = static_cast<int>(place.channel) / plan.group_channels;
  int channel_of_group = static_cast<int>(place.channel) % plan.group_channels;
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    const int64_t channel = channel_of(plan, place, j);
    const float2 statistics = shared.group[group - first_group];
    mean[j] = statistics.x;
    factor[j] = statistics.y * params.weight[channel];
    bias[j] = params.bias[channel];
    if (plan.channels_last && ++channel_of_group == plan.group_channels) {
      channel_of_group = 0;
      ++group;
    }
  }
  while (item < items) {
#pragma unroll
    for (int i = 0; i < kGroupNormBatch; ++i) {
      if (item + i * plan.rows < items) {
        float y[kVector];
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          y[j] = fmaf(to_float(vectors[i].element[j]) - mean[j], factor[j], bias[j]);
        }
        if (params.silu) {
#pragma unroll
          for (int j = 0; j < kVector; ++j) y[j] *= group_norm_sigmoid(y[j]);
        }
        store_vector<T, kVector>(y, params.out, offset + i * step);
      }
    }
    item += kGroupNormBatch * plan.rows;
    offset += kGroupNormBatch * step;
    load_batch();
  }
}

// --- Backward
// ------------------------------------------------------------------------------------

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
