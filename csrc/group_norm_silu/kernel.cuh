// group_norm_silu. It reads its maps twice: once for moments over a chunk of pixels, and once to
// write the result, where every block puts them together in one order. For maps of E elements the
// floor is 3 E elements (2 E where the second read finds x in the cache).
#pragma once

#include "common/ptx.cuh"
#include "group_norm_silu/place.cuh"

namespace flexvar {

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

struct GroupNormSiluCudaParams {
  GroupNormPlan plan, result_plan;  // they differ in their chunks
  // Channels that a part of the moments is of: a group's, unless several blocks share it.
  int part_channels;
  const void* x;
  const void *weight, *bias;  // [channels], both as x if `narrow`, else float32
  bool narrow;
  // [images, groups, chunks, group_channels / part_channels]: mean, squared differences from it
  float2* parts;
  float* statistics;  // [images, groups, 2]: mean, reciprocal deviation
  void* out;          // as x
  float eps;
  bool silu;
};

// --- Moments -------------------------------------------------------------------------------------

// The first channel of a block, and how many are its own.
struct GroupNormChannels {
  int first, count;
};
__device__ __forceinline__ GroupNormChannels channels_of_block(const GroupNormPlan& plan,
                                                               const GroupNormPlace& place) {
  if (!plan.channels_last) return {static_cast<int>(place.channel), 1};
  const auto blocks = static_cast<unsigned>(plan.column_blocks);
  const int first = static_cast<int>(blockIdx.x % blocks) * plan.block_channels;
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
  const int count = plan.chunks * per_chunk;
  const int lanes = lanes_for(per_chunk == 1 ? plan.block_channels / size
                                             : min(plan.groups, plan.block_channels));
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

// --- The result ----------------------------------------------------------------------------------

// A channel's weight or bias.
template <class T>
__device__ __forceinline__ float group_norm_parameter(const void* values, bool narrow,
                                                      int64_t channel) {
  return narrow ? to_float(static_cast<const T*>(values)[channel])
                : static_cast<const float*>(values)[channel];
}

template <class T, int kVector>
__global__ void __launch_bounds__(kGroupNormThreads, 2)
    group_norm_silu_apply_kernel(GroupNormSiluCudaParams params) {
  auto& shared = shared_storage<GroupNormStatisticsStorage<kVector>>();
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
  // What the moments do not change is on its way while they are made: their kernel lets this one
  // begin when all before it has ended.
  load_batch();
  float weight[kVector] = {}, bias[kVector] = {};
  if (place.inside) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const int64_t channel = channel_of(plan, place, j);
      weight[j] = group_norm_parameter<T>(params.weight, params.narrow, channel);
      bias[j] = group_norm_parameter<T>(params.bias, params.narrow, channel);
    }
  }
  ptx::griddepcontrol_wait();
  const int first_group = group_statistics<kVector>(params, place, shared);
  if (!place.inside) return;
  float mean[kVector], factor[kVector];
  int group = static_cast<int>(place.channel) / plan.group_channels;
  int channel_of_group = static_cast<int>(place.channel) % plan.group_channels;
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    const float2 statistics = shared.group[group - first_group];
    mean[j] = statistics.x;
    factor[j] = statistics.y * weight[j];
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

}  // namespace flexvar
