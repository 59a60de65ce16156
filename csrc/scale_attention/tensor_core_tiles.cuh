// Attention of 16-bit tensors on tensor cores, after FlashAttention-2 (arXiv 2307.08691): products
// in fragments of registers, tiles of columns brought in by asynchronous copies while the one
// before is worked on. Products are summed in fp32; softmax weights enter the second product in 16
// bits.
//
// 4 warps own 16 rows each of a tile of 64. Within a fragment of accumulators, with g = lane / 4
// and t = lane % 4, elements 0 and 1 are columns 2t and 2t + 1 of row g, elements 2 and 3 those of
// row g + 8. Rows are queries in the forward pass and for dQ, keys for dK and dV.
//
// Rows of D elements must be 16-byte aligned in global memory.
#pragma once

#include <type_traits>

#include "scale_attention/kernel_common.cuh"

namespace flexvar {

constexpr int kTensorCoreThreads = 128;
constexpr int kTensorCoreRows = 64;
// Rows of kDim elements. 8 rows of an 8 x 8 matrix lie in different banks: rows of 64 are swizzled,
// as the products of a warpgroup want it, others are 16 bytes longer than their elements.
template <class T, int kRows, int kDim>
struct HalfTile {
  static constexpr bool kSwizzled = kDim == 64;
  static constexpr int kRowElements = kSwizzled ? kDim : kDim + 8;
  alignas(kSwizzled ? 1024 : 16) T rows[kRows][kRowElements];

  // The 8 elements of a row from `column`, a multiple of 8.
  __device__ __forceinline__ T* at(int row, int column) {
    return &rows[row][kSwizzled ? ptx::swizzled_column(row, column) : column];
  }
  __device__ __forceinline__ const T* at(int row, int column) const {
    return &rows[row][kSwizzled ? ptx::swizzled_column(row, column) : column];
  }
};

template <class T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half_as_ushort(__float2half_rn(low)) |
           static_cast<uint32_t>(__half_as_ushort(__float2half_rn(high))) << 16;
  } else {
    return __bfloat16_as_ushort(__float2bfloat16_rn(low)) |
           static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16_rn(high))) << 16;
  }
}
template <class T>
__device__ __forceinline__ float2 unpack_pair(uint32_t pair) {
  if constexpr (std::is_same_v<T, __half>) {
    return {__half2float(__ushort_as_half(static_cast<uint16_t>(pair))),
            __half2float(__ushort_as_half(static_cast<uint16_t>(pair >> 16)))};
  } else {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  }
}

// This thread's part of copying a head's rows, tile after tile: a column of chunks of 16 bytes.
template <class T, int kDim>
class RowCopies {
 public:
  // `begin`: the first row to copy.
  __device__ __forceinline__ RowCopies(const T* head, int64_t token_stride, int begin = 0)
      : source_(head + static_cast<unsigned>(begin + first_row()) * token_stride + column()),
        step_(int64_t{kStep} * token_stride) {}

  // Starts copying the next kRows rows; of those from `count` on, which are not there, zeros.
  template <int kRows>
  __device__ __forceinline__ void start(HalfTile<T, kRows, kDim>& tile, int count) {
    if (count >= kRows) {
      copy<true>(tile, count);
    } else {
      copy<false>(tile, count);
    }
  }

 private:
  static constexpr int kChunks = kDim / 8, kStep = kTensorCoreThreads / kChunks;

  __device__ __forceinline__ static int first_row() {
    return static_cast<int>(threadIdx.x / kChunks);
  }
  __device__ __forceinline__ static int column() {
    return static_cast<int>(threadIdx.x % kChunks * 8);
  }

  template <bool kWhole, int kRows>
  __device__ __forceinline__ void copy(HalfTile<T, kRows, kDim>& tile, int count) {
    using Tile = HalfTile<T, kRows, kDim>;
    // The swizzle repeats itself every 8 rows: addresses differ by what the compiler knows.
    static_assert(!Tile::kSwizzled || kStep % 8 == 0);
    constexpr int kPasses = (kRows + kStep - 1) / kStep;
    T* const target = tile.at(first_row(), column());
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass, source_ += step_) {
      const int row = first_row() + pass * kStep;
      const bool is_mine = (kTensorCoreThreads % kChunks == 0 || first_row() < kStep) &&
                           (kRows % kStep == 0 || row < kRows);
      if (is_mine) {
        ptx::cp_async<16>(target + pass * kStep * Tile::kRowElements, source_,
                          kWhole || row < count);
      }
    }
    if constexpr (kRows % kStep != 0) source_ -= step_ / kStep * (kPasses * kStep - kRows);
  }

  const T* source_;
  int64_t step_;
};

// Starts copying rows [begin, begin + kRows) of a head; zeros from `end` on, which are not read.
template <class T, int kRows, int kDim>
__device__ __forceinline__ void copy_rows_async(HalfTile<T, kRows, kDim>& shared, const T* head,
                                                int64_t token_stride, int begin, int end) {
  RowCopies<T, kDim>(head, token_stride, begin).start(shared, end - begin);
}

// Zeros in those of rows [begin, begin + kCount) that come from `first` on, by kThreads threads.
template <int kCount, int kThreads, class T, int kRows, int kDim>
__device__ __forceinline__ void clear_rows(HalfTile<T, kRows, kDim>& tile, int first, int begin) {
  constexpr int kChunks = kDim / 8;
  static_assert(kCount * kChunks % kThreads == 0 && kThreads % kChunks == 0);
  // Few tiles are cut off.
  const unsigned thread = ptx::computed_here(static_cast<int>(threadIdx.x % kThreads));
#pragma unroll
  for (int pass = 0; pass < kCount * kChunks / kThreads; ++pass) {
    const int row = begin + static_cast<int>(thread / kChunks) + pass * (kThreads / kChunks);
    if (row >= first) *reinterpret_cast<uint4*>(tile.at(row, thread % kChunks * 8)) = {};
  }
}

// Until all copies by threads have arrived, and the block is done with the tiles before: the next
// ones may be copied over those. No copies for later are to be under way yet.
__device__ __forceinline__ void wait_for_tile() {
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
}

// The 16 x 16 block at (row, column) as the left factor of a product, or, transposed, as two right
// factors whose rows (keys of V, queries of dO, …) are the depth of the product.
template <class T, int kRows, int kDim>
__device__ __forceinline__ void load_left(uint32_t (&fragment)[4],
                                          const HalfTile<T, kRows, kDim>& tile, int row,
                                          int column) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  ptx::ldmatrix_x4(fragment, tile.at(row + lane % 16, column + lane / 16 * 8));
}
template <class T, int kRows, int kDim>
__device__ __forceinline__ void load_right_transposed(uint32_t (&fragment)[4],
                                                      const HalfTile<T, kRows, kDim>& tile, int row,
                                                      int column) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  ptx::ldmatrix_x4_trans(fragment, tile.at(row + lane % 16, column + lane / 16 * 8));
}
// Two right factors for 16 rows of the tile as columns of the product, with depth 16 from `column`.
template <class T, int kRows, int kDim>
__device__ __forceinline__ void load_right(uint32_t (&fragment)[4],
                                           const HalfTile<T, kRows, kDim>& tile, int row,
                                           int column) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  ptx::ldmatrix_x4(fragment, tile.at(row + lane / 16 * 8 + lane % 8, column + lane / 8 % 2 * 8));
}

template <class T>
__device__ __forceinline__ void multiply_pair(float (&left_sums)[4], float (&right_sums)[4],
                                              const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
  ptx::mma_m16n8k16<T>(left_sums, a, first);
  ptx::mma_m16n8k16<T>(right_sums, a, second);
}

// scores = rows [warp_row, warp_row + 16) times all columns, over the whole depth kDim.
template <class T, int kTiles, int kRows, int kColumns, int kDim>
__device__ __forceinline__ void tile_scores_by_warps(float (&scores)[kTiles][4],
                                                     const HalfTile<T, kRows, kDim>& rows,
                                                     const HalfTile<T, kColumns, kDim>& columns,
                                                     int warp_row) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[n][i] = 0;
  }
#pragma unroll 2  // registers are short
  for (int d = 0; d < kDim; d += 16) {
    uint32_t left[4];
    load_left(left, rows, warp_row, d);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      uint32_t right[4];
      load_right(right, columns, n * 8, d);
      multiply_pair<T>(scores[n], scores[n + 1], left, right);
    }
  }
}
// Begins tile_scores; somebody waits for it later.
template <class T>
__device__ __forceinline__ void begin_tile_scores(float (&scores)[8][4],
                                                  const HalfTile<T, 64, 64>& rows,
                                                  const HalfTile<T, 64, 64>& columns) {
  ptx::warpgroup_multiply<T, false>(scores, rows.rows[0], columns.rows[0], 0);
#pragma unroll
  for (int d = 16; d < 64; d += 16) {
    ptx::warpgroup_multiply<T, true>(scores, rows.rows[0], columns.rows[0], d);
  }
}
template <class T>
__device__ __forceinline__ void tile_scores_by_warpgroup(float (&scores)[8][4],
                                                         const HalfTile<T, 64, 64>& rows,
                                                         const HalfTile<T, 64, 64>& columns) {
  ptx::warpgroup_begin();
  begin_tile_scores(scores, rows, columns);
  ptx::warpgroup_end();
  ptx::hold_registers(scores);
}
template <class T, int kTiles, int kRows, int kColumns, int kDim>
__device__ __forceinline__ void tile_scores(float (&scores)[kTiles][4],
                                            const HalfTile<T, kRows, kDim>& rows,
                                            const HalfTile<T, kColumns, kDim>& columns,
                                            int warp_row) {
  static_assert(kTiles * 8 == kColumns);
  if constexpr (kColumns == 64 && kDim == 64) {
    if (ptx::has_warpgroup_products()) {
      tile_scores_by_warpgroup(scores, rows, columns);
    } else {
      tile_scores_by_warps(scores, rows, columns, warp_row);
    }
  } else {
    tile_scores_by_warps(scores, rows, columns, warp_row);
  }
}

// Columns [16 n, 16 n + 16) of accumulators as the left factor of a product.
template <class T, int kTiles>
__device__ __forceinline__ void pack_left(uint32_t (&left)[4], const float (&weights)[kTiles][4],
                                          int n) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float (&half)[4] = weights[2 * n + i / 2];
    left[i] = pack_pair<T>(half[i % 2 * 2], half[i % 2 * 2 + 1]);
  }
}

// sums += weights (16 rows of this warp x columns, as accumulators) times the columns' rows of D.
template <class T, int kTiles, int kDimTiles, int kColumns, int kDim>
__device__ __forceinline__ void tile_accumulate_by_warps(
    float (&sums)[kDimTiles][4], const float (&weights)[kTiles][4],
    const HalfTile<T, kColumns, kDim>& columns) {
#pragma unroll
  for (int n = 0; n < kTiles / 2; ++n) {
    uint32_t left[4];
    pack_left<T>(left, weights, n);
#pragma unroll
    for (int d = 0; d < kDimTiles; d += 2) {
      uint32_t right[4];
      load_right_transposed(right, columns, n * 16, d * 8);
      multiply_pair<T>(sums[d], sums[d + 1], left, right);
    }
  }
}
// Begins tile_accumulate; somebody waits for it later, and leaves `left`, the weights, alone.
template <class T>
__device__ __forceinline__ void begin_tile_accumulate(float (&sums)[8][4],
                                                      const uint32_t (&left)[4][4],
                                                      const HalfTile<T, 64, 64>& columns) {
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    ptx::warpgroup_multiply_rows(sums, left[n], columns.rows[0], n * 16);
  }
}
template <class T>
__device__ __forceinline__ void tile_accumulate_by_warpgroup(float (&sums)[8][4],
                                                             const float (&weights)[8][4],
                                                             const HalfTile<T, 64, 64>& columns) {
  uint32_t left[4][4];
#pragma unroll
  for (int n = 0; n < 4; ++n) pack_left<T>(left[n], weights, n);
  ptx::hold_registers(sums);
  ptx::hold_registers(left);
  ptx::warpgroup_begin();
  begin_tile_accumulate(sums, left, columns);
  ptx::warpgroup_end();
  ptx::hold_registers(sums);
}
template <class T, int kTiles, int kDimTiles, int kColumns, int kDim>
__device__ __forceinline__ void tile_accumulate(float (&sums)[kDimTiles][4],
                                                const float (&weights)[kTiles][4],
                                                const HalfTile<T, kColumns, kDim>& columns) {
  if constexpr (kColumns == 64 && kDim == 64) {
    if (ptx::has_warpgroup_products()) {
      tile_accumulate_by_warpgroup(sums, weights, columns);
    } else {
      tile_accumulate_by_warps(sums, weights, columns);
    }
  } else {
    tile_accumulate_by_warps(sums, weights, columns);
  }
}

// Rows `row` + g and `row` + g + 8 of a tile times this have length 1. The squares are the diagonal
// of the rows' products with themselves.
template <class T, int kRows, int kDim>
__device__ __forceinline__ void inverse_row_lengths(float (&inverse)[2],
                                                    const HalfTile<T, kRows, kDim>& tile, int row) {
  const int g = static_cast<int>(threadIdx.x % 32 / 4);
  float upper[4] = {}, lower[4] = {};
#pragma unroll
  for (int d = 0; d < kDim; d += 16) {
    uint32_t left[4];
    load_left(left, tile, row, d);
    const uint32_t right[4] = {left[0], left[2], left[1], left[3]};  // the same rows as columns
    multiply_pair<T>(upper, lower, left, right);
  }
  const int owner = g * 4 + g / 2;  // the lane that holds columns 2 * (g / 2) and + 1 of row g
  const float squares[2] = {
      __shfl_sync(0xffffffffu, g % 2 == 0 ? upper[0] : upper[1], owner),
      __shfl_sync(0xffffffffu, g % 2 == 0 ? lower[2] : lower[3], owner),
  };
  // inverse_length, to 2 ulp and without a root and a division; NaN stays NaN.
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    inverse[i] = squares[i] <= 1e-24f ? inverse_length(0.0f) : rsqrtf(squares[i]);
  }
}

// Row `half` * 8 + g of accumulators, times `factor`, to a row of D elements.
template <class T, int kDimTiles>
__device__ __forceinline__ void store_row(T* row, const float (&sums)[kDimTiles][4], int half,
                                          float factor) {
  const int t = static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int d = 0; d < kDimTiles; ++d) {
    *reinterpret_cast<uint32_t*>(row + d * 8 + 2 * t) =
        pack_pair<T>(sums[d][2 * half] * factor, sums[d][2 * half + 1] * factor);
  }
}

// Over the 4 lanes that share a row; all lanes of the warp take part.
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Whether the sums of the block hold a NaN or an infinity; all threads of the block take part.
template <int kDimTiles, class... Others>
__device__ __forceinline__ bool holds_not_finite(const float (&sums)[kDimTiles][4],
                                                 const Others&... others) {
  float zero = 0;
  const auto look_at = [&zero](const float (&some)[kDimTiles][4]) {
#pragma unroll
    for (int d = 0; d < kDimTiles; ++d) {
#pragma unroll
      for (int i = 0; i < 4; ++i) zero += some[d][i] - some[d][i];
    }
  };
  look_at(sums);
  (look_at(others), ...);
  return __any_sync(0xffffffffu, __syncthreads_or(zero != 0));  // the same to the compiler, too
}

}  // namespace flexvar
