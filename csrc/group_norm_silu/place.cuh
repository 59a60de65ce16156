// How the blocks and threads of group_norm_silu's kernels share maps out, and how they read and
// write them.
#pragma once

#include "common/cuda.cuh"
#include "common/divide_up.h"
#include "common/float_element.h"

namespace flexvar {

constexpr int kGroupNormThreads = 256;
// Of an image, as long as threads have items enough. The forward's moments are put together by
// every block that writes the result: the fewer of them the better.
constexpr int kGroupNormMomentsBlocks = 64, kGroupNormBlocks = 512;
// Vectors of a block, 128 bytes: of an image's moments each block then has few groups' to put
// together.
constexpr int kGroupNormColumns = 8;
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
  const bool has_whole_groups = vector > 1 && kGroupNormColumns * vector % plan.group_channels == 0;
  plan.columns = min(plan.vector_columns, has_whole_groups ? kGroupNormColumns : kGroupNormThreads);
  plan.column_blocks = static_cast<int>(divide_up(plan.vector_columns, plan.columns));
  plan.rows =
      static_cast<int>(min(int64_t(kGroupNormThreads / plan.columns), max(plan.items, int64_t(1))));
  plan.block_channels = channels_last ? plan.columns * vector : 1;
  return plan;
}

// Whether the maps can be read in vectors of 16 bytes; `aligned`: what pointers say.
inline bool group_norm_in_vectors(int64_t channels, int64_t pixels, bool channels_last,
                                  bool aligned, size_t element_size) {
  const int64_t elements = 16 / static_cast<int64_t>(element_size);
  return aligned && (channels_last ? channels : pixels) % elements == 0;
}

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
  // Blocks side by side read what lies side by side.
  const unsigned rest = blockIdx.x / column_blocks, plane = rest / chunks;
  place.chunk = static_cast<int>(rest % chunks);
  place.row = static_cast<int>(threadIdx.x) / plan.columns;
  place.column = static_cast<int>(threadIdx.x) % plan.columns;
  const int column = static_cast<int>(blockIdx.x % column_blocks) * plan.columns + place.column;
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

__device__ __forceinline__ float group_norm_sigmoid(float y) {
  return __fdividef(1.0f, 1.0f + __expf(-y));
}

}  // namespace flexvar
