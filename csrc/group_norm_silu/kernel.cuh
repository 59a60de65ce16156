// group_norm_silu. Maps whose groups a block's registers hold are read once, by one kernel. Others
// are read twice: for moments over a chunk of pixels, and to write the result, where every block
// puts them together in one order. For maps of E elements the floor is 3 E elements (2 E where the
// second read finds x in the cache, or there is none).
#pragma once

#include <optional>

#include "common/ptx.cuh"
#include "group_norm_silu/place.cuh"

namespace flexvar {

// Of an image, as long as threads have items enough: those of one image alone still make for every
// multiprocessor, and every block of the result has all their moments to put together, so no more.
constexpr int kGroupNormMomentsBlocks = 128, kGroupNormMomentsThreads = 512;
// Of all images, as long as threads do not have too many items: what fits on the device at once.
constexpr int kGroupNormApplyBlocks = 512;
constexpr int kGroupNormHeldThreads = 512, kGroupNormHeldItems = 4;  // the items of a thread
constexpr int kGroupNormHeldColumns = 32;  // at most, vectors of a group's channels

inline GroupNormPlan plan_for_moments(const GroupNormPlan& plan) {
  const GroupNormPlan wide = plan.by_threads(kGroupNormMomentsThreads);
  return wide.in_chunks(
      max(divide_up(wide.items_of_image(), kGroupNormMomentsBlocks), int64_t(kGroupNormMinItems)));
}
inline GroupNormPlan plan_for_result(const GroupNormPlan& plan) {
  return plan.in_chunks(
      min(max(divide_up(plan.images * plan.items_of_image(), kGroupNormApplyBlocks),
              int64_t(kGroupNormMinItems)),
          int64_t(kGroupNormMaxItems)));
}

// A block for each group, one chunk, if its threads can hold it. That is up to the shape of one
// image, so that the results of an image do not depend on its batch.
inline std::optional<GroupNormPlan> plan_for_held_groups(GroupNormPlan plan, int vector) {
  if (!plan.channels_last || vector == 1 || plan.group_channels % vector != 0) return {};
  plan.columns = plan.group_channels / vector;
  if (plan.columns > kGroupNormHeldColumns) return {};
  plan.column_blocks = plan.groups;
  plan.block_channels = plan.group_channels;
  plan = plan.by_threads(kGroupNormHeldThreads).in_chunks(kGroupNormHeldItems);
  return plan.chunks == 1 ? std::optional(plan) : std::nullopt;
}

struct GroupNormSiluCudaParams {
  GroupNormPlan plan,
      result_plan;  // they differ in their chunks and rows; of held groups: the same
  // A bundle, of 2^bundle_bits, are the elements of a thread's vector that belong together: those
  // of a channel, or with channels last those of so many channels of a group.
  int bundle_bits;
  // Bundles that a part of the moments is of: a group's, unless several blocks share it. Then one.
  int part_bundles, group_parts;  // and how many parts a group has of a chunk
  const void* x;
  const void *weight, *bias;  // [channels], both as x if `narrow`, else float32
  bool narrow;
  // [images, groups, chunks, group_parts]: mean, squared differences from it
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
  if (!plan.channels_last) return {place.channel, 1};
  const int first =
      static_cast<int>(plan.by_column_blocks.remainder(blockIdx.x)) * plan.block_channels;
  return {first, min(plan.block_channels, static_cast<int>(plan.channels) - first)};
}

// A power of two: as many as a block of warps has for each of `units`, which have `parts` each, and
// a warp at most.
__device__ __forceinline__ int lanes_for(int units, int parts) {
  int lanes = 32;
  while (lanes > 1 && (lanes * units > static_cast<int>(blockDim.x) || lanes / 2 >= parts)) {
    lanes /= 2;
  }
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
  const float share = ptx::reciprocal_approx(elements);
  float about = 0;
#pragma unroll 4
  for (int i = lane; i < count; i += lanes) {
    const GroupNormPart p = part(i);
    about = fmaf(p.elements * share, p.mean, about);
  }
  about = sum_over_lanes(about, lanes);
  float rest = 0, squares = 0;
#pragma unroll 4
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

// Elements of a bundle in a chunk.
__device__ __forceinline__ float elements_of_chunk(const GroupNormSiluCudaParams& params,
                                                   int chunk) {
  const int64_t begin = chunk * params.plan.chunk_items;
  const int64_t items = min(params.plan.chunk_items, params.plan.items - begin);
  return static_cast<float>(items << params.bundle_bits);
}

// In shared memory: parts of the bundles, one for each row of the block; row 0 then holds those of
// the chunk. Rows have an odd stride, which keeps the lanes that add a bundle up from sharing
// banks.
struct GroupNormRows {
  int bundles, stride;
  float *mean, *squares;
};
inline __host__ __device__ int group_norm_bundles(const GroupNormPlan& plan, int bundle_bits) {
  return plan.channels_last ? plan.block_channels >> bundle_bits : 1;
}
inline size_t moments_shared_bytes(const GroupNormSiluCudaParams& params) {
  const int stride = group_norm_bundles(params.plan, params.bundle_bits) | 1;
  return sizeof(float) * 2 * params.plan.rows * stride;
}
__device__ __forceinline__ GroupNormRows
rows_in_shared_memory(const GroupNormSiluCudaParams& params) {
  const int bundles = group_norm_bundles(params.plan, params.bundle_bits), stride = bundles | 1;
  auto* const mean = dynamic_shared<float>();
  return {bundles, stride, mean, mean + params.plan.rows * stride};
}

// Differences are taken from the first of at most kGroupNormMaxItems elements of a channel: being
// one of them, it cannot be so far from their mean that their squares swallow the variance.
template <class T, int kVector>
__global__ void __launch_bounds__(kGroupNormMomentsThreads, 2)
    group_norm_moments_kernel(GroupNormSiluCudaParams params) {
  const GroupNormRows shared = rows_in_shared_memory(params);
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const GroupNormPlan& plan = params.plan;
  const GroupNormPlace place = group_norm_place<kVector>(plan);
  const int items = static_cast<int>(place.end - place.begin);
  // Of the chunk's items, those from the thread's next one on; it has every plan.rows'th of them.
  int rest = place.inside ? items - place.row : 0;
  const int64_t step = plan.rows * place.stride;
  const T* source =
      static_cast<const T*>(params.x) + place.offset + (place.begin + place.row) * place.stride;
  // Where the thread's own moments are.
  const int at = place.row * shared.stride + ((place.column * kVector) >> params.bundle_bits);
  int count = 0;
  GroupNormVector<T, kVector> loaded[kGroupNormBatch];
#pragma unroll
  for (int i = 0; i < kGroupNormBatch; ++i, source += step) {
    if (i * plan.rows < rest) loaded[i] = vector_at<T, kVector>(source, 0);
  }
  while (rest > 0) {
    int taken = 0;
    float shift[kVector], sum[kVector] = {}, square_sum[kVector] = {};  // of differences
#pragma unroll
    for (int j = 0; j < kVector; ++j) shift[j] = loaded[0][j];
    for (int batch = 0; batch < kGroupNormMaxItems / kGroupNormBatch && rest > 0; ++batch) {
#pragma unroll
      for (int i = 0; i < kGroupNormBatch; ++i) {
        if (rest > 0) {
          ++taken;
#pragma unroll
          for (int j = 0; j < kVector; ++j) {
            const float difference = loaded[i][j] - shift[j];
            sum[j] += difference;
            square_sum[j] = fmaf(difference, difference, square_sum[j]);
          }
        }
        // The item a batch ahead takes the place of this one.
        if (kGroupNormBatch * plan.rows < rest) loaded[i] = vector_at<T, kVector>(source, 0);
        rest -= plan.rows;
        source += step;
      }
    }
    const auto more = static_cast<float>(taken);
    const float inverse = ptx::reciprocal_approx(more);
    float mean[kVector], squares[kVector];
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const float from_shift = sum[j] * inverse;
      const float around_mean = fmaf(-sum[j], from_shift, square_sum[j]);
      mean[j] = shift[j] + from_shift;
      squares[j] = around_mean < 0 ? 0.0f : around_mean;  // NaN stays
    }
    // To the first element of each bundle what the others, which have as many items, hold.
#pragma unroll
    for (int width = 1; width < kVector; width *= 2) {
      if (width >> params.bundle_bits == 0) {
        const float half = 0.5f * static_cast<float>(taken * width);
#pragma unroll
        for (int j = 0; j < kVector; j += 2 * width) {
          const float difference = mean[j + width] - mean[j];
          mean[j] = fmaf(difference, 0.5f, mean[j]);
          squares[j] += fmaf(half * difference, difference, squares[j + width]);
        }
      }
    }
    const float share = more * ptx::reciprocal_approx(static_cast<float>(count + taken));
    const float weight = static_cast<float>(count << params.bundle_bits) * share;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const int bundle = j >> params.bundle_bits;
      if (bundle << params.bundle_bits != j) continue;
      float& mean_so_far = shared.mean[at + bundle];
      float& squares_so_far = shared.squares[at + bundle];
      if (count == 0) {
        mean_so_far = mean[j];
        squares_so_far = squares[j];
      } else {
        const float difference = mean[j] - mean_so_far;
        mean_so_far = fmaf(difference, share, mean_so_far);
        squares_so_far += fmaf(weight * difference, difference, squares[j]);
      }
    }
    count += taken;
  }
  __syncthreads();
  const GroupNormChannels channels = channels_of_block(plan, place);
  const int block_bundles = plan.channels_last ? channels.count >> params.bundle_bits : 1;
  const float elements = elements_of_chunk(params, place.chunk);
  const int row_lanes = lanes_for(shared.bundles, plan.rows);
  const int each = items / plan.rows, rows_with_more = items % plan.rows;
  const auto of_row = static_cast<float>(each << params.bundle_bits);
  const auto of_longer_row = static_cast<float>((each + 1) << params.bundle_bits);
  for_each_unit(block_bundles, row_lanes, [&](int bundle, int lane, bool valid) {
    const auto row = [&](int i) {
      return GroupNormPart{i < rows_with_more ? of_longer_row : of_row,
                           shared.mean[i * shared.stride + bundle],
                           shared.squares[i * shared.stride + bundle]};
    };
    const int rows = valid ? min(plan.rows, items) : 0;
    const float2 merged = merge_parts(rows, elements, lane, row_lanes, row);
    __syncwarp();
    if (valid && lane == 0) {
      shared.mean[bundle] = merged.x;
      shared.squares[bundle] = merged.y;
    }
  });
  __syncthreads();
  const int size = params.part_bundles;
  const int units = size == 1 ? block_bundles : group_of(plan, channels.count);
  const int lanes = lanes_for(units, size);
  for_each_unit(units, lanes, [&](int unit, int lane, bool valid) {
    const auto bundle = [&](int i) {
      return GroupNormPart{elements, shared.mean[unit * size + i], shared.squares[unit * size + i]};
    };
    const float2 merged =
        merge_parts(valid ? size : 0, elements * static_cast<float>(size), lane, lanes, bundle);
    if (!valid || lane != 0) return;
    const int first =
        channels.first + (plan.channels_last ? (unit * size) << params.bundle_bits : 0);
    const int64_t group = int64_t(place.image) * plan.groups + group_of(plan, first);
    const int in_group = channel_in_group(plan, first);
    const int part = plan.channels_last ? in_group >> params.bundle_bits : in_group;
    params.parts[(group * plan.chunks + place.chunk) * params.group_parts + part] = merged;
  });
}

// In shared memory, as large as the block's channels: what it needs of its groups and of them.
struct GroupNormApplyShared {
  float2* group;  // mean, reciprocal deviation
  float *weight, *bias;
};
inline size_t apply_shared_bytes(const GroupNormSiluCudaParams& params) {
  return (sizeof(float2) + 2 * sizeof(float)) * params.result_plan.block_channels;
}
__device__ __forceinline__ GroupNormApplyShared
apply_in_shared_memory(const GroupNormSiluCudaParams& params) {
  const int channels = params.result_plan.block_channels;
  auto* const group = dynamic_shared<float2>();
  auto* const weight = reinterpret_cast<float*>(group + channels);
  return {group, weight, weight + channels};
}

// Of the groups of the block's channels, from the parts of the moments: to shared memory and, where
// a group begins in the first chunk, to where the backward finds them. Returns the first group.
__device__ __forceinline__ int group_statistics(const GroupNormSiluCudaParams& params,
                                                const GroupNormPlace& place,
                                                const GroupNormApplyShared& shared) {
  const GroupNormPlan& plan = params.plan;
  const GroupNormChannels channels = channels_of_block(params.result_plan, place);
  const int size = plan.group_channels, per_chunk = params.group_parts;
  const int first = group_of(plan, channels.first);
  const int groups = group_of(plan, channels.first + channels.count - 1) - first + 1;
  const int count = plan.chunks * per_chunk;
  const int lanes = lanes_for(
      per_chunk == 1 ? group_of(plan, plan.block_channels) : min(plan.groups, plan.block_channels),
      count);
  const auto part_bundles = static_cast<float>(params.part_bundles);
  const float of_chunk = elements_of_chunk(params, 0) * part_bundles;
  const float of_last = elements_of_chunk(params, plan.chunks - 1) * part_bundles;
  const float elements = static_cast<float>(size * plan.pixels);
  for_each_unit(groups, lanes, [&](int unit, int lane, bool valid) {
    const int64_t group = int64_t(place.image) * plan.groups + first + unit;
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

// Of `count` channels from `first` on, to shared memory, by all threads of the block.
template <class T>
__device__ __forceinline__ void copy_weight_and_bias(float* weight, float* bias,
                                                     const GroupNormSiluCudaParams& params,
                                                     GroupNormChannels channels) {
  const auto value = [&](const void* values, int channel) {
    return params.narrow ? to_float(static_cast<const T*>(values)[channel])
                         : static_cast<const float*>(values)[channel];
  };
  for (int i = static_cast<int>(threadIdx.x); i < channels.count;
       i += static_cast<int>(blockDim.x)) {
    weight[i] = value(params.weight, channels.first + i);
    bias[i] = value(params.bias, channels.first + i);
  }
}

template <class T, int kVector>
__global__ void __launch_bounds__(kGroupNormThreads, 4)
    group_norm_silu_apply_kernel(GroupNormSiluCudaParams params) {
  const GroupNormApplyShared shared = apply_in_shared_memory(params);
  const GroupNormPlan& plan = params.result_plan;
  const GroupNormPlace place = group_norm_place<kVector>(plan);
  // Of the chunk's items, those from the thread's next one on; it has every plan.rows'th of them.
  int rest = place.inside ? static_cast<int>(place.end - place.begin) - place.row : 0;
  const int64_t step = plan.rows * place.stride;
  const int64_t offset = place.offset + (place.begin + place.row) * place.stride;
  const T* source = static_cast<const T*>(params.x) + offset;
  // What the moments do not change is on its way while they are made: their kernel lets this one
  // begin when all before it has ended.
  GroupNormVector<T, kVector> vectors[kGroupNormBatch];
#pragma unroll
  for (int i = 0; i < kGroupNormBatch; ++i, source += step) {
    if (i * plan.rows < rest) vectors[i] = vector_at<T, kVector>(source, 0);
  }
  copy_weight_and_bias<T>(shared.weight, shared.bias, params, channels_of_block(plan, place));
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const int first_group = group_statistics(params, place, shared);
  if (rest <= 0) return;
  float mean[kVector], factor[kVector], bias[kVector];
  int group = group_of(plan, place.channel);
  int channel_of_group = channel_in_group(plan, place.channel);
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    const int channel = plan.channels_last ? place.column * kVector + j : 0;  // of the block
    const float2 statistics = shared.group[group - first_group];
    mean[j] = statistics.x;
    factor[j] = statistics.y * shared.weight[channel];
    bias[j] = shared.bias[channel];
    if (plan.channels_last && ++channel_of_group == plan.group_channels) {
      channel_of_group = 0;
      ++group;
    }
  }
  T* target = static_cast<T*>(params.out) + offset;
  while (rest > 0) {
#pragma unroll
    for (int i = 0; i < kGroupNormBatch; ++i) {
      if (rest > 0) {
        float y[kVector];
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          y[j] = fmaf(vectors[i][j] - mean[j], factor[j], bias[j]);
        }
        // The item a batch ahead takes the place of this one.
        if (kGroupNormBatch * plan.rows < rest) vectors[i] = vector_at<T, kVector>(source, 0);
        if (params.silu) {
#pragma unroll
          for (int j = 0; j < kVector; ++j) y[j] *= group_norm_sigmoid(y[j]);
        }
        store_vector<T, kVector>(y, target, 0);
      }
      rest -= plan.rows;
      source += step;
      target += step;
    }
  }
}

// --- Groups that a block holds -------------------------------------------------------------------

template <int kVector>
struct GroupNormHeldStorage {
  alignas(32) float weight[kVector * kGroupNormHeldColumns];
  alignas(32) float bias[kVector * kGroupNormHeldColumns];
  float2 of_warp[2][kGroupNormHeldThreads / 32];
};

// The sum over the block, the same bits in all of its threads. `of_warp` is written once.
__device__ __forceinline__ float2 sum_over_block(float2 value,
                                                 float2 (&of_warp)[kGroupNormHeldThreads / 32]) {
  const int thread = static_cast<int>(threadIdx.x), warps = static_cast<int>(blockDim.x) / 32;
  value = make_float2(sum_over_lanes(value.x, 32), sum_over_lanes(value.y, 32));
  if (thread % 32 == 0) of_warp[thread / 32] = value;
  __syncthreads();
  const float2 warp = thread % 32 < warps ? of_warp[thread % 32] : make_float2(0, 0);
  return make_float2(sum_over_lanes(warp.x, 32), sum_over_lanes(warp.y, 32));
}

// The mean first, then differences from it, so that nothing cancels; what that mean is off by is
// taken off.
template <class T, int kVector>
__global__ void __launch_bounds__(kGroupNormHeldThreads, 2)
    group_norm_silu_held_kernel(GroupNormSiluCudaParams params) {
  auto& shared = shared_storage<GroupNormHeldStorage<kVector>>();
  const GroupNormPlan& plan = params.plan;
  const GroupNormPlace place = group_norm_place<kVector>(plan);
  const int items = place.inside ? static_cast<int>(plan.items) : 0;
  const int64_t step = plan.rows * place.stride;
  const int64_t offset = place.offset + place.row * place.stride;
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  // f(i, its vector) for the thread's items.
  GroupNormVector<T, kVector> vectors[kGroupNormHeldItems];
  const auto for_each_item = [&](auto f) {
#pragma unroll
    for (int i = 0; i < kGroupNormHeldItems; ++i) {
      if (place.row + i * plan.rows < items) f(i, vectors[i]);
    }
  };
  for_each_item(
      [&](int i, auto& vector) { vector = vector_at<T, kVector>(params.x, offset + i * step); });
  copy_weight_and_bias<T>(shared.weight, shared.bias, params, channels_of_block(plan, place));

  const float elements = static_cast<float>(plan.group_channels * plan.pixels);
  float sum = 0, rest = 0, squares = 0;
  for_each_item([&](int, const auto& vector) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) sum += vector[j];
  });
  const float about = sum_over_block(make_float2(sum, 0), shared.of_warp[0]).x / elements;
  for_each_item([&](int, const auto& vector) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const float difference = vector[j] - about;
      rest += difference;
      squares = fmaf(difference, difference, squares);
    }
  });
  const float2 sums = sum_over_block(make_float2(rest, squares), shared.of_warp[1]);
  const float off = sums.x / elements, mean = about + off;
  const float left = fmaf(-sums.x, off, sums.y);
  const float variance = (left < 0 ? 0.0f : left) / elements;  // NaN stays
  const float factor = 1.0f / sqrtf(variance + params.eps);
  if (threadIdx.x == 0) {
    const int64_t group = int64_t(place.image) * plan.groups + group_of(plan, place.channel);
    params.statistics[2 * group] = mean;
    params.statistics[2 * group + 1] = factor;
  }
  float weight[kVector], bias[kVector];
  if (place.inside) {
    load_vector<float, kVector>(weight, shared.weight, place.column * kVector);
    load_vector<float, kVector>(bias, shared.bias, place.column * kVector);
  }
  for_each_item([&](int i, const auto& vector) {
    float y[kVector];
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      y[j] = fmaf(vector[j] - mean, factor * weight[j], bias[j]);
      if (params.silu) y[j] *= group_norm_sigmoid(y[j]);
    }
    store_vector<T, kVector>(y, params.out, offset + i * step);
  });
}

}  // namespace flexvar
