// What the gradients of 16-bit attention take their tiles through: copies to shared memory,
// products of rows with a tile of columns, and the sums of what they give.
#pragma once

#include "scale_attention/tensor_core_tiles.cuh"

namespace flexvar {

// `first`, `second`: Q and dO in rows, K and V in columns for dQ; the other way round for dK, dV.
template <class T, int kDim>
struct TensorCoreBackwardShared {
  static constexpr int kColumns = kDim <= 64 ? 64 : kDim <= 96 ? 32 : 16;
  // Whether a device multiplies by warpgroups, beside other instructions.
  static constexpr bool kHasWarpgroups = kColumns == 64 && kDim == 64;
  HalfTile<T, kTensorCoreRows, kDim> first_rows;
  HalfTile<T, kTensorCoreRows, kDim> second_rows;
  float inverse_lengths[kTensorCoreRows];  // of the keys in rows
  ptx::Mbarrier arrived[3];                // of what the copy engine brings, by stage
  struct Stage {
    HalfTile<T, kColumns, kDim> first_columns;
    HalfTile<T, kColumns, kDim> second_columns;
    // Of the queries in columns: logsumexp in base 2, delta.
    float numbers[2][kColumns];
    float inverse_lengths[kColumns];
  };
  // Of the tile at hand and of the next one; with warpgroups of the one before, too, whose products
  // have not ended.
  Stage stages[kHasWarpgroups ? 3 : 2];

  static constexpr size_t bytes(bool with_warpgroups) {
    return sizeof(TensorCoreBackwardShared) -
           (kHasWarpgroups && !with_warpgroups ? sizeof(Stage) : 0);
  }
};

// Brings rows and columns of tokens to shared memory: by the copy engine, which one thread tells
// what to copy, or every thread its part, and then wait_for_tile is for them.
template <class T, int kDim>
class BackwardCopies {
 public:
  using Shared = TensorCoreBackwardShared<T, kDim>;
  static constexpr int kColumns = Shared::kColumns;
  struct Source {
    const AttentionCudaTensor& tensor;
    const TensorMap& map;
  };

  __device__ __forceinline__ static bool has_engine() {
    return Shared::kHasWarpgroups && ptx::has_copy_engine();
  }

  // Starts to copy rows [row_begin, row_end), and columns from column_begin on.
  __device__ __forceinline__ BackwardCopies(Shared& shared, int64_t image, int64_t in_image,
                                            const Source (&rows)[2], int row_begin, int row_end,
                                            const Source (&columns)[2], int column_begin,
                                            int column_end)
      : shared_(shared),
        image_(static_cast<int>(image)),
        head_(static_cast<int>(in_image)),
        first_map_(columns[0].map),
        second_map_(columns[1].map),
        column_end_(column_end),
        first_(head_of_image<T>(columns[0].tensor, image, in_image), columns[0].tensor.token_stride,
               column_begin),
        second_(head_of_image<T>(columns[1].tensor, image, in_image),
                columns[1].tensor.token_stride, column_begin) {
    if constexpr (Shared::kHasWarpgroups) {
      if (has_engine()) {
        if (threadIdx.x == 0) {
#pragma unroll
          for (ptx::Mbarrier& barrier : shared.arrived) ptx::mbarrier_init(barrier, 1);
          ptx::mbarriers_are_ready();
          expect_and_copy(shared.first_rows, shared.second_rows, rows[0].map, rows[1].map,
                          row_begin, 0, 2 * kBytes);
          copy(shared.stages[0].first_columns, shared.stages[0].second_columns, first_map_,
               second_map_, column_begin, 0);
        }
        __syncthreads();
        return;
      }
    }
    copy_rows_async(shared.first_rows, head_of_image<T>(rows[0].tensor, image, in_image),
                    rows[0].tensor.token_stride, row_begin, row_end);
    copy_rows_async(shared.second_rows, head_of_image<T>(rows[1].tensor, image, in_image),
                    rows[1].tensor.token_stride, row_begin, row_end);
    start(0, column_begin);
  }

  // The next columns, from `begin` on. Nobody reads those of the stage any more.
  __device__ __forceinline__ void start(int stage, int begin) {
    auto& first = shared_.stages[stage].first_columns;
    auto& second = shared_.stages[stage].second_columns;
    if constexpr (Shared::kHasWarpgroups) {
      if (has_engine()) {
        if (threadIdx.x == 0) {
          expect_and_copy(first, second, first_map_, second_map_, begin, stage, kBytes);
        }
        return;
      }
    }
    first_.start(first, column_end_ - begin);
    second_.start(second, column_end_ - begin);
  }
  // Until what the engine brings has arrived; `parity` is that of how often the stage was before.
  __device__ __forceinline__ void wait(int stage, int parity) {
    if (has_engine()) ptx::mbarrier_wait(shared_.arrived[stage], parity);
  }
  // Behind a barrier of the block, where copies are to be begun anew.
  __device__ __forceinline__ static void end(Shared& shared) {
    if (has_engine() && threadIdx.x == 0) {
#pragma unroll
      for (ptx::Mbarrier& barrier : shared.arrived) ptx::mbarrier_end(barrier);
    }
  }

 private:
  using Tile = HalfTile<T, kColumns, kDim>;
  static constexpr int kBytes = 2 * sizeof(Tile);

  __device__ __forceinline__ void copy(Tile& first, Tile& second, const TensorMap& first_map,
                                       const TensorMap& second_map, int token, int stage) const {
    ptx::copy_box(first.rows, first_map, token, head_, image_, shared_.arrived[stage]);
    ptx::copy_box(second.rows, second_map, token, head_, image_, shared_.arrived[stage]);
  }
  __device__ __forceinline__ void expect_and_copy(Tile& first, Tile& second,
                                                  const TensorMap& first_map,
                                                  const TensorMap& second_map, int token, int stage,
                                                  int bytes) const {
    ptx::mbarrier_arrive_and_expect(shared_.arrived[stage], bytes);
    copy(first, second, first_map, second_map, token, stage);
  }

  Shared& shared_;
  int image_, head_;
  const TensorMap &first_map_, &second_map_;
  int column_end_;
  RowCopies<T, kDim> first_, second_;
};

// Starts copying number `index` to shared memory; a zero from `end` on.
__device__ __forceinline__ void copy_number_async(float& shared, const float* numbers, int index,
                                                  int end) {
  ptx::cp_async<4>(&shared, numbers + (index < end ? index : 0), index < end);
}

// Multiplies rows [begin, begin + kRows) that copy_rows_async brought by factors[token].
template <class T, int kRows, int kDim>
__device__ __forceinline__ void scale_copied_rows(HalfTile<T, kRows, kDim>& shared,
                                                  const float* factors, int begin, int end) {
  constexpr int kChunks = kDim / 8;
#pragma unroll 1  // registers are short
  for (int start = 0; start < kRows * kChunks; start += kTensorCoreThreads) {
    const int i = start + static_cast<int>(threadIdx.x);
    if (kRows * kChunks % kTensorCoreThreads != 0 && i >= kRows * kChunks) break;
    const int row = i / kChunks, d = i % kChunks * 8;
    if (begin + row >= end) continue;
    const float factor = factors[begin + row];
    uint4* const place = reinterpret_cast<uint4*>(shared.at(row, d));
    const auto scaled = [factor](uint32_t pair) {
      const float2 x = unpack_pair<T>(pair);
      return pack_pair<T>(x.x * factor, x.y * factor);
    };
    const uint4 chunk = *place;
    *place = {scaled(chunk.x), scaled(chunk.y), scaled(chunk.z), scaled(chunk.w)};
  }
}

// The product of two rows, which 4 lanes share; all lanes of the warp take part.
template <class T, int kDim>
__device__ __forceinline__ float row_product(const T* left, const T* right) {
  float product = 0;
#pragma unroll
  for (int d = 0; d < kDim; d += 32) {
    const int column = d + static_cast<int>(threadIdx.x % 4 * 8);
    const uint4 x = *reinterpret_cast<const uint4*>(left + column),
                y = *reinterpret_cast<const uint4*>(right + column);
    const auto add = [&product](uint32_t x_pair, uint32_t y_pair) {
      const float2 a = unpack_pair<T>(x_pair), b = unpack_pair<T>(y_pair);
      product = fmaf(a.x, b.x, product);
      product = fmaf(a.y, b.y, product);
    };
    add(x.x, y.x);
    add(x.y, y.y);
    add(x.z, y.z);
    add(x.w, y.w);
  }
  return row_sum(product);
}

// Row `half` * 8 + g of accumulators, the gradient of a row of length 1, becomes that of row
// `row` of the tile, which `inverse` scales to it, but for a factor of `inverse`. Returns the
// product of the row of length 1 and its gradient; all lanes of the warp take part.
template <class T, int kDimTiles, int kRows, int kDim>
__device__ __forceinline__ float remove_radial_part(float (&sums)[kDimTiles][4], int half,
                                                    const HalfTile<T, kRows, kDim>& tile, int row,
                                                    float inverse) {
  const int t = static_cast<int>(threadIdx.x) % 4;
  const auto pair = [&](int d) {
    return unpack_pair<T>(*reinterpret_cast<const uint32_t*>(tile.at(row, d * 8) + 2 * t));
  };
  float product = 0;
#pragma unroll
  for (int d = 0; d < kDimTiles; ++d) {
    const float2 x = pair(d);
    product += sums[d][2 * half] * (x.x * inverse) + sums[d][2 * half + 1] * (x.y * inverse);
  }
  product = row_sum(product);
  const float removed = has_length_one(inverse) ? product : 0.0f;
#pragma unroll
  for (int d = 0; d < kDimTiles; ++d) {
    const float2 x = pair(d);
    sums[d][2 * half] -= removed * (x.x * inverse);
    sums[d][2 * half + 1] -= removed * (x.y * inverse);
  }
  return product;
}

// The products of a tile of columns: scores and their gradients, which the next tile's follow
// before those that add up the gradients have ended.
template <class T, int kDim>
struct BackwardTile {
  using Shared = TensorCoreBackwardShared<T, kDim>;
  static constexpr int kColumns = Shared::kColumns, kTiles = kColumns / 8;

  float weights[kTiles][4], grad_scores[kTiles][4];

  // Where products of a warpgroup run beside other instructions.
  __device__ __forceinline__ static bool is_asynchronous() {
    return Shared::kHasWarpgroups && ptx::has_warpgroup_products();
  }

  // The rows' products with the columns of a stage: those for the weights are a group, those for
  // grad_scores the beginning of one.
  __device__ __forceinline__ void begin(const Shared& shared, int stage, int warp_row) {
    if constexpr (Shared::kHasWarpgroups) {
      if (is_asynchronous()) {
        begin_tile_scores(weights, shared.first_rows, shared.stages[stage].first_columns);
        ptx::warpgroup_commit();
        begin_tile_scores(grad_scores, shared.second_rows, shared.stages[stage].second_columns);
        return;
      }
    }
    tile_scores_by_warps(weights, shared.first_rows, shared.stages[stage].first_columns, warp_row);
    tile_scores_by_warps(grad_scores, shared.second_rows, shared.stages[stage].second_columns,
                         warp_row);
  }
  // Before products that read or write registers that others have written.
  __device__ __forceinline__ static void fence() {
    if (is_asynchronous()) ptx::warpgroup_begin();
  }
  __device__ __forceinline__ static void commit() {
    if (is_asynchronous()) ptx::warpgroup_commit();
  }
  // The products for the weights end first; where that is waited for a loop later the compiler does
  // not understand it, and puts all products one behind the other.
  __device__ __forceinline__ void wait_for_weights() {
    if (is_asynchronous()) ptx::warpgroup_wait<1>();
    hold(weights);
  }
  __device__ __forceinline__ void wait_for_all() {
    if (is_asynchronous()) ptx::warpgroup_wait<0>();
    hold(grad_scores);
  }
  __device__ __forceinline__ static void hold(float (&registers)[kTiles][4]) {
    if constexpr (Shared::kHasWarpgroups) {
      if (is_asynchronous()) ptx::hold_registers(registers);
    }
  }
};

// What factors times columns add up to. Asynchronous products read the factors from here, in 16
// bits, until they have ended.
template <class T, int kDim>
struct BackwardSums {
  using Tile = BackwardTile<T, kDim>;
  static constexpr int kTiles = Tile::kTiles;

  float sums[kDim / 8][4];
  uint32_t left[kTiles / 2][4];

  __device__ __forceinline__ void keep(const float (&factors)[kTiles][4]) {
    if (!Tile::is_asynchronous()) return;
#pragma unroll
    for (int n = 0; n < kTiles / 2; ++n) pack_left<T>(left[n], factors, n);
    hold();
  }
  __device__ __forceinline__ void hold() {
    if constexpr (Tile::Shared::kHasWarpgroups) {
      if (Tile::is_asynchronous()) {
        ptx::hold_registers(sums);
        ptx::hold_registers(left);
      }
    }
  }
  // `factors`: what is kept.
  template <int kColumns>
  __device__ __forceinline__ void begin_adding(const float (&factors)[kTiles][4],
                                               const HalfTile<T, kColumns, kDim>& columns) {
    if constexpr (Tile::Shared::kHasWarpgroups) {
      if (Tile::is_asynchronous()) return begin_tile_accumulate(sums, left, columns);
    }
    tile_accumulate_by_warps(sums, factors, columns);
  }
};

// Takes `products` through the columns [begin, end) of a block, kColumns at a time. copy(stage,
// begin) starts to copy columns, arrive(stage, parity, begin) waits for those that the copy engine
// brings; differentiate() makes the gradients of the scores at hand;
// begin_adding() adds up what they give, and hold() holds the sums. `begin` and `stage` are those
// at hand.
template <class T, int kDim, class Copy, class Arrive, class Differentiate, class Add, class Hold>
__device__ __forceinline__ void for_each_tile(BackwardTile<T, kDim>& products,
                                              const TensorCoreBackwardShared<T, kDim>& shared,
                                              int warp_row, int& begin, int end, int& stage,
                                              const Copy& copy, const Arrive& arrive,
                                              const Differentiate& differentiate,
                                              const Add& begin_adding, const Hold& hold) {
  constexpr int kColumns = BackwardTile<T, kDim>::kColumns;
  if (products.is_asynchronous()) {
    if (begin + kColumns < end) copy(1, begin + kColumns);
    int parity = 0;
    arrive(0, parity, begin);
    wait_for_tile();
    hold();
    products.fence();
    products.begin(shared, 0, warp_row);
    products.commit();
    products.wait_for_weights();
    for (; begin + kColumns < end; begin += kColumns) {
      differentiate();
      const int next = begin + kColumns, next_stage = stage < 2 ? stage + 1 : 0;
      parity ^= static_cast<int>(next_stage == 0);
      arrive(next_stage, parity, next);
      wait_for_tile();  // nobody reads the last one any more
      if (next + kColumns < end) copy(next_stage < 2 ? next_stage + 1 : 0, next + kColumns);
      products.fence();
      products.begin(shared, next_stage, warp_row);
      begin_adding();
      products.commit();
      products.wait_for_weights();
      stage = next_stage;
    }
    differentiate();
    products.fence();
    begin_adding();
    products.commit();
    products.wait_for_all();
    hold();
    return;
  }
  for (; begin < end; begin += kColumns, stage ^= 1) {
    const int next = begin + kColumns;
    wait_for_tile();
    if (next < end) copy(stage ^ 1, next);
    products.begin(shared, stage, warp_row);
    differentiate();
    begin_adding();
  }
}

}  // namespace flexvar
