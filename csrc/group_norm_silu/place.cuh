// How the blocks and threads of group_norm_silu's kernels share maps out, and how they read and
// write them.
#pragma once

#include <type_traits>

#include "common/cuda.cuh"
#include "common/divide_up.h"
#include "common/fast_divisor.h"
#include "common/float_element.h"
#include "common/ptx.cuh"

namespace flexvar {

constexpr int kGroupNormThreads = 256;
// Of an image, as long as threads have items enough.
constexpr int kGroupNormBlocks = 512;
// Vectors of a block, 128 bytes: of an image's moments each block then has few groups' to put
// together.
constexpr int kGroupNormColumns = 8;
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
  FastDivisor by_channels, by_group_channels, by_columns, by_column_blocks, by_chunks;

  // In whole warps: threads beyond the last row have nothing to read.
  int threads() const { return static_cast<int>(divide_up(columns * rows, 32) * 32); }
  int64_t blocks() const {
    return images * (channels_last ? 1 : channels) * column_blocks * chunks;
  }
  // Of all threads of an image, where each has but one column or channel.
  int64_t items_of_image() const {
    return divide_up(items, rows) * (channels_last ? column_blocks : channels);
  }
  // In blocks of at most so many threads.
  GroupNormPlan by_threads(int threads) const {
    GroupNormPlan plan = *this;
    plan.rows = static_cast<int>(min(int64_t(threads / columns), max(items, int64_t(1))));
    return plan;
  }
  GroupNormPlan in_chunks(int64_t items_of_thread) const {
    GroupNormPlan plan = *this;
    plan.chunk_items = rows * items_of_thread;
    plan.chunks = static_cast<int>(divide_up(items, plan.chunk_items));
    plan.by_channels = channels;
    plan.by_group_channels = group_channels;
    plan.by_columns = columns;
    plan.by_column_blocks = column_blocks;
    plan.by_chunks = plan.chunks;
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
  plan.block_channels = channels_last ? plan.columns * vector : 1;
  return plan.by_threads(kGroupNormThreads);
}

// Elements of a vector that belong together, a power of two: of a channel, or of channels of a
// group.
inline int group_norm_bundle(const GroupNormPlan& plan, int vector) {
  return plan.channels_last ? min(vector, plan.group_channels & -plan.group_channels) : vector;
}

// Whether the maps can be read in vectors of 16 bytes; `aligned`: what pointers say.
inline bool group_norm_in_vectors(int64_t channels, int64_t pixels, bool channels_last,
                                  bool aligned, size_t element_size) {
  const int64_t elements = 16 / static_cast<int64_t>(element_size);
  return aligned && (channels_last ? channels : pixels) % elements == 0;
}

struct GroupNormPlace {
  int image, chunk, row;
  int column;          // of the block
  int channel;         // of the first element of the thread's vectors
  int64_t begin, end;  // items
  int64_t offset;      // of item 0's element for this thread
  int64_t stride;      // elements from item to item
  bool inside;  // false where a column block reaches beyond the last column, or the block the rows
};

template <int kVector>
__device__ __forceinline__ GroupNormPlace group_norm_place(const GroupNormPlan& plan) {
  GroupNormPlace place;
  // Blocks side by side read what lies side by side.
  const unsigned rest = plan.by_column_blocks.quotient(blockIdx.x);
  const unsigned plane = plan.by_chunks.quotient(rest);
  place.chunk = static_cast<int>(plan.by_chunks.remainder(rest));
  place.row = static_cast<int>(plan.by_columns.quotient(threadIdx.x));
  place.column = static_cast<int>(plan.by_columns.remainder(threadIdx.x));
  const int column_block = static_cast<int>(plan.by_column_blocks.remainder(blockIdx.x));
  const int column = column_block * plan.columns + place.column;
  place.inside = column < plan.vector_columns && place.row < plan.rows;
  place.begin = place.chunk * plan.chunk_items;
  place.end = min(place.begin + plan.chunk_items, plan.items);
  if (plan.channels_last) {
    place.image = static_cast<int>(plane);
    place.channel = column * kVector;
    place.stride = plan.channels;
    place.offset = plane * plan.pixels * plan.channels + place.channel;
  } else {
    place.image = static_cast<int>(plan.by_channels.quotient(plane));
    place.channel = static_cast<int>(plan.by_channels.remainder(plane));
    place.stride = kVector;
    place.offset = plane * plan.pixels;
  }
  return place;
}

// The group of a channel, and which of the group's it is.
__device__ __forceinline__ int group_of(const GroupNormPlan& plan, int channel) {
  return static_cast<int>(plan.by_group_channels.quotient(static_cast<unsigned>(channel)));
}
__device__ __forceinline__ int channel_in_group(const GroupNormPlan& plan, int channel) {
  return static_cast<int>(plan.by_group_channels.remainder(static_cast<unsigned>(channel)));
}

// The channel of element j of the thread's vectors.
__device__ __forceinline__ int channel_of(const GroupNormPlan& plan, const GroupNormPlace& place,
                                          int j) {
  return place.channel + (plan.channels_last ? j : 0);
}

// A thread's vector of 16 bytes, or an element. In words: a vector of 16-bit elements that is
// loaded under a condition would have a register for each of them.
template <class T, int kVector>
class GroupNormVector {
 public:
  __device__ __forceinline__ float operator[](int j) const {
    if constexpr (kVector == 1) {
      return to_float(word_[0]);
    } else if constexpr (sizeof(T) == 4) {
      return __builtin_bit_cast(float, word_[j]);
    } else if constexpr (std::is_same_v<T, __half>) {
      return __half2float(__ushort_as_half(static_cast<uint16_t>(word_[j / 2] >> (j % 2 * 16))));
    } else {
      const uint32_t word = word_[j / 2];
      return __builtin_bit_cast(float, j % 2 == 0 ? word << 16 : word & 0xffff0000u);
    }
  }

 private:
  static constexpr int kWords = kVector == 1 ? 1 : kVector * sizeof(T) / 4;
  alignas(kVector * sizeof(T)) std::conditional_t<kVector == 1, T, uint32_t> word_[kWords];
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
  for (int j = 0; j < kVector; ++j) values[j] = loaded[j];
}

template <class T, int kVector>
__device__ __forceinline__ void store_vector(const float (&values)[kVector], void* data,
                                             int64_t offset) {
  struct alignas(sizeof(T) * kVector) Stored {
    T element[kVector];
  } stored;
#pragma unroll
  for (int j = 0; j < kVector; ++j) stored.element[j] = from_float<T>(values[j]);
  *reinterpret_cast<Stored*>(static_cast<T*>(data) + offset) = stored;
}

// Without the care that __expf and __fdividef take of numbers that are not normal: nothing is left
// of such exponentials beside 1, nor of such quotients.
__device__ __forceinline__ float group_norm_sigmoid(float y) {
  constexpr float kLog2E = 1.4426950408889634f;
  return ptx::reciprocal_approx(1.0f + ptx::exp2_approx(y * -kLog2E));
}

}  // namespace flexvar
