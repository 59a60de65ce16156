// The forward pass of 16-bit attention on tensor cores.
#pragma once

#include "scale_attention/tensor_core_tiles.cuh"

namespace flexvar {

// Blocks a multiprocessor that a kernel asks room for. Where products take fragments from registers
// 4 would make the compiler spill some.
__host__ __device__ constexpr int forward_blocks(int dim) {
  return dim > 64 ? 2 : dim == 64 && ptx::has_warpgroup_products() ? 4 : 3;
}

template <class T, int kDim>
struct TensorCoreForwardShared {
  static constexpr int kColumns = kDim <= 64 ? 64 : 32;
  HalfTile<T, kTensorCoreRows, kDim> queries;
  HalfTile<T, kColumns, kDim> keys[2];
  HalfTile<T, kColumns, kDim> values[2];
  float inverse_lengths[kColumns];  // of the keys at hand
};

// tile_scores of the next columns in the place of the weights, and tile_accumulate. Products of a
// warpgroup may still add to `sums`, and read `left`, when this returns: up to end_accumulate.
template <class T, int kTiles, int kDimTiles, int kRows, int kColumns, int kDim>
__device__ __forceinline__ void tile_score_and_accumulate(
    float (&sums)[kDimTiles][4], float (&weights)[kTiles][4], uint32_t (&left)[kTiles / 2][4],
    const HalfTile<T, kColumns, kDim>& columns, const HalfTile<T, kRows, kDim>& rows,
    const HalfTile<T, kColumns, kDim>& next_columns, int warp_row) {
  if constexpr (kColumns == 64 && kDim == 64) {
    if (ptx::has_warpgroup_products()) {
#pragma unroll
      for (int n = 0; n < 4; ++n) pack_left<T>(left[n], weights, n);
      ptx::hold_registers(sums);
      ptx::hold_registers(left);
      ptx::warpgroup_begin();
      begin_tile_scores(weights, rows, next_columns);
      ptx::warpgroup_commit();
      begin_tile_accumulate(sums, left, columns);
      ptx::warpgroup_commit();
      ptx::warpgroup_wait<1>();
      ptx::hold_registers(weights);
      return;
    }
  }
  tile_accumulate(sums, weights, columns);
  tile_scores(weights, rows, next_columns, warp_row);
}
template <int kTiles, int kDimTiles>
__device__ __forceinline__ void end_accumulate(float (&sums)[kDimTiles][4],
                                               uint32_t (&left)[kTiles][4]) {
  if constexpr (kTiles == 4 && kDimTiles == 8) {
    if (ptx::has_warpgroup_products()) {
      ptx::warpgroup_wait<0>();
      ptx::hold_registers(sums);
      ptx::hold_registers(left);
    }
  }
}

// The 16 rows of a warp's accumulators from `warp_row` on, those below `count`, times `factor`, to
// rows `row_stride` apart; in pieces of 16 bytes, by way of a tile that no other warp reads.
template <class T, int kDimTiles, int kRows, int kDim>
__device__ __forceinline__ void store_rows(T* rows, int64_t row_stride,
                                           const float (&sums)[kDimTiles][4],
                                           const float (&factor)[2], HalfTile<T, kRows, kDim>& tile,
                                           int warp_row, int count) {
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int d = 0; d < kDimTiles; d += 2) {
    uint32_t fragment[4];  // as of load_left
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float (&half)[4] = sums[d + i / 2];
      fragment[i] =
          pack_pair<T>(half[i % 2 * 2] * factor[i % 2], half[i % 2 * 2 + 1] * factor[i % 2]);
    }
    ptx::stmatrix_x4(tile.at(warp_row + lane % 16, d * 8 + lane / 16 * 8), fragment);
  }
  __syncwarp();
  constexpr int kChunks = kDim / 8, kStep = 32 / kChunks, kPasses = 16 / kStep;
  const int row = warp_row + lane / kChunks, column = lane % kChunks * 8;
  const bool is_mine = 32 % kChunks == 0 || lane < kStep * kChunks;
  T* target = rows + row * row_stride + column;
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass, target += kStep * row_stride) {
    if (is_mine && row + pass * kStep < count) {
      *reinterpret_cast<uint4*>(target) =
          *reinterpret_cast<const uint4*>(tile.at(row + pass * kStep, column));
    }
  }
}

// Over the 4 lanes that share a row; all lanes of the warp take part.
__device__ __forceinline__ float row_maximum(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// Whether the tile holds a NaN or an infinity; all threads of the block take part.
template <class T, int kRows, int kDim>
__device__ __forceinline__ bool holds_not_finite(const HalfTile<T, kRows, kDim>& tile) {
  // Of a pair of elements. An exponent of ones and 1 more carry into the place of the sign.
  constexpr uint32_t kExponents = std::is_same_v<T, __half> ? 0x7c007c00u : 0x7f807f80u;
  constexpr uint32_t kOnes = std::is_same_v<T, __half> ? 0x04000400u : 0x00800080u;
  constexpr int kChunks = kDim / 8;
  static_assert(kRows * kChunks % kTensorCoreThreads == 0);
  uint32_t carries = 0;
  const int thread = ptx::computed_here(static_cast<int>(threadIdx.x));  // few tiles are looked at
#pragma unroll
  for (int pass = 0; pass < kRows * kChunks / kTensorCoreThreads; ++pass) {
    const unsigned chunk = pass * kTensorCoreThreads + thread;
    const uint4 pairs =
        *reinterpret_cast<const uint4*>(tile.at(chunk / kChunks, chunk % kChunks * 8));
    carries |= ((pairs.x & kExponents) + kOnes) | ((pairs.y & kExponents) + kOnes) |
               ((pairs.z & kExponents) + kOnes) | ((pairs.w & kExponents) + kOnes);
  }
  return __any_sync(0xffffffffu, __syncthreads_or((carries & 0x80008000u) != 0));
}

// Rows g and g + 8 do not see the columns from columns[0] and columns[1] on: those get no weight.
template <int kTiles>
__device__ __forceinline__ void hide_columns(float (&scores)[kTiles][4], const int (&columns)[2]) {
  const int t = static_cast<int>(threadIdx.x % 4);
  const int own[2] = {columns[0] - 2 * t, columns[1] - 2 * t};
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (n * 8 + i % 2 >= own[i / 2]) scores[n][i] = -INFINITY;
    }
  }
}

// How far, in base 2, scores may exceed what stands for their maximum before it moves. Weights stay
// small numbers of their type, and what is in `sum` and `out` is seldom multiplied anew.
constexpr float kMaximumSlack = 8;

// While all scores are -inf the maximum is no number to subtract.
__device__ __forceinline__ float base_of(float maximum) {
  return maximum == -INFINITY ? 0.0f : maximum;
}

// Follows the maximum of the scores so far (nearly): rise[] times the products of rows and columns.
// `sum` stays relative to it; `out` is to be multiplied by `correction` where this returns true,
// for the whole warp.
template <int kTiles>
__device__ __forceinline__ bool raise_maximum(const float (&products)[kTiles][4],
                                              float (&maximum)[2], float (&sum)[2],
                                              float (&correction)[2], const float (&rise)[2]) {
  float highest[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      highest[half] = fmaxf(highest[half], fmaxf(products[n][2 * half], products[n][2 * half + 1]));
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) highest[half] = row_maximum(highest[half]) * rise[half];
  const bool is_raised = __any_sync(0xffffffffu, highest[0] > maximum[0] + kMaximumSlack ||
                                                     highest[1] > maximum[1] + kMaximumSlack);
  if (is_raised) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float before = maximum[half];
      maximum[half] = fmaxf(before, highest[half]);
      correction[half] = ptx::exp2_approx(before - base_of(maximum[half]));
      sum[half] *= correction[half];
    }
  }
  return is_raised;
}

// Products of rows and columns become softmax weights, relative to a maximum of scores in base 2,
// and this lane's parts of their sums grow.
template <int kTiles>
__device__ __forceinline__ void weigh(float (&weights)[kTiles][4], float (&sum)[2],
                                      const float (&rise)[2], const float (&base)[2]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float &left = weights[n][2 * half], &right = weights[n][2 * half + 1];
      left = ptx::exp2_approx(fmaf(left, rise[half], -base[half]));
      right = ptx::exp2_approx(fmaf(right, rise[half], -base[half]));
      sum[half] += left + right;
    }
  }
}

// The results of a tile's queries, or false and none: a value that not all of them see is not
// finite, and would enter all their sums, 0 times a NaN being a NaN.
template <class T, int kDim>
__device__ __forceinline__ bool attend(const AttentionForwardCuda& params,
                                       const TileList<QueryTile>& list, const QueryTile& tile,
                                       TensorCoreForwardShared<T, kDim>& shared) {
  constexpr int kColumns = TensorCoreForwardShared<T, kDim>::kColumns, kTiles = kColumns / 8;
  const KeyRange key_range = keys_of_block(params, tile);
  const int64_t head = head_of_block(list), image = image_of(head, params.heads),
                in_image = head_in_image(head, params.heads);
  const int warp_row = static_cast<int>(threadIdx.x / 32 * 16);
  const int g = static_cast<int>(threadIdx.x % 32 / 4), t = static_cast<int>(threadIdx.x % 4);
  const bool normalized = params.q_scale != nullptr;

  copy_rows_async(shared.queries, head_of_image<T>(params.q, image, in_image),
                  params.q.token_stride, tile.query_begin, tile.query_end);
  RowCopies<T, kDim> keys(head_of_image<T>(params.k, image, in_image), params.k.token_stride,
                          key_range.begin);
  int rest = key_range.end - key_range.begin;  // keys from the tile at hand on
  keys.start(shared.keys[0], rest);
  const float scale = normalized
                          ? params.float_scale * static_cast<const float*>(params.q_scale)[in_image]
                          : params.float_scale;
  float factor[2] = {scale, scale};  // of a row's products, to scores in base 2
  const SoftmaxStart<float> softmax = start_softmax<T>(params, head, scale);
  wait_for_tile();
  RowCopies<T, kDim> values(head_of_image<T>(params.v, image, in_image), params.v.token_stride,
                            key_range.begin);
  values.start(shared.values[0], rest);
  if (rest > kColumns) keys.start(shared.keys[1], rest - kColumns);
  float weights[kTiles][4];
  tile_scores(weights, shared.queries, shared.keys[0], warp_row);
  if (normalized) {
    float inverse[2];
    inverse_row_lengths(inverse, shared.queries, warp_row);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      factor[half] *= inverse[half];
      const int row = tile.query_begin + warp_row + g + 8 * half;
      if (t == 0 && row < tile.query_end) {
        head_part<float>(params.q_inverse_lengths, head, params.query_count)[row] = inverse[half];
      }
    }
  }
  float maximum[2] = {softmax.maximum, softmax.maximum};  // of scores in base 2
  float sum[2] = {0, 0};                                  // this lane's part
  float out[kDim / 8][4] = {};
  // Products with the values of a tile end while the weights of the next one are computed.
  uint32_t left[kTiles / 2][4] = {};
  int stage = 0;
  for (;; stage ^= 1, rest -= kColumns) {
    if (normalized) {
      float inverse[2];
      const int begin = key_range.end - rest;
      // Each warp measures 16 keys; those that are queries of this block, too, are no other's.
      if (warp_row < kColumns) {
        // Addresses are not to wait in registers where rows are not normalised.
        inverse_row_lengths(inverse, shared.keys[stage], ptx::computed_here(warp_row));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = warp_row + g + 8 * half, token = begin + row;
          if (t == 0) shared.inverse_lengths[row] = inverse[half];
          if (t == 0 && token >= tile.query_begin && token < tile.query_end) {
            head_part<float>(params.k_inverse_lengths, head, params.query_count)[token] =
                inverse[half];
          }
        }
      }
      __syncthreads();
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          weights[n][i] *= shared.inverse_lengths[n * 8 + 2 * t + i % 2];
        }
      }
    }
    float rise[2] = {factor[0], factor[1]};   // from products to scores
    if (!(factor[0] > 0 && factor[1] > 0)) {  // or scores would not be in the order of products
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) weights[n][i] *= factor[i / 2];
      }
      rise[0] = rise[1] = 1;
    }
    const bool is_seen_by_all = rest - tile.most_hidden >= kColumns;
    if (!is_seen_by_all) {
      int columns[2] = {rest, rest};
      if (tile.most_hidden > 0) {
        const QueryTile& whole = tile_of_block(list, ptx::computed_here(blockIdx.x));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          columns[half] -= hidden_keys(whole, warp_row + g + 8 * half);
        }
      }
      hide_columns(weights, columns);
    }
    bool is_raised = false;
    float correction[2];
    if (softmax.fixed) {
      weigh(weights, sum, rise, maximum);
    } else {
      is_raised = raise_maximum(weights, maximum, sum, correction, rise);
      weigh(weights, sum, rise, {base_of(maximum[0]), base_of(maximum[1])});
    }
    end_accumulate(out, left);
    if (is_raised) {
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[d][i] *= correction[i / 2];
      }
    }
    wait_for_tile();  // its values, and the next one's keys
    if (tile.most_hidden > 0 && !is_seen_by_all && holds_not_finite(shared.values[stage]))
      return false;
    if (rest <= kColumns) break;
    values.start(shared.values[stage ^ 1], rest - kColumns);
    if (rest > 2 * kColumns) keys.start(shared.keys[stage], rest - 2 * kColumns);
    tile_score_and_accumulate(out, weights, left, shared.values[stage], shared.queries,
                              shared.keys[stage ^ 1], warp_row);
  }
  tile_accumulate(out, weights, shared.values[stage]);

  const float total[2] = {row_sum(sum[0]), row_sum(sum[1])};
  const int first_row = warp_row + g, count = tile.query_end - tile.query_begin;
  if (params.parts != nullptr) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (first_row + 8 * half >= count) continue;
      const int64_t row = part_row(params, list, head, tile.query_begin + first_row + 8 * half);
      float2* sums = reinterpret_cast<float2*>(static_cast<float*>(params.part_sums) + row * kDim);
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d) {
        sums[d * 4 + t] = {out[d][2 * half], out[d][2 * half + 1]};
      }
      if (t == 0) {
        static_cast<AttentionPart<float>*>(params.parts)[row] = {maximum[half], total[half]};
      }
    }
    return true;
  }
  const float scales[2] = {ptx::reciprocal_approx(total[0]), ptx::reciprocal_approx(total[1])};
  T* const out_rows =
      static_cast<T*>(params.out) +
      contiguous_offset<kDim>(head, params.heads, params.query_count, tile.query_begin);
  store_rows(out_rows, int64_t{params.heads.divisor} * kDim, out, scales, shared.queries, warp_row,
             count);
  if (params.logsumexp != nullptr && t == 0) {
    float* const logsumexp = head_part<float>(params.logsumexp, head, params.query_count) +
                             (tile.query_begin + first_row);
    const auto logsumexp_of = [&](int half) {
      return (maximum[half] + __log2f(total[half])) * static_cast<float>(kAttentionLn2);
    };
    if (first_row < count) logsumexp[0] = logsumexp_of(0);
    if (first_row + 8 < count) logsumexp[8] = logsumexp_of(1);
  }
  return true;
}

template <class T, int kDim>
__global__ void __launch_bounds__(kTensorCoreThreads, forward_blocks(kDim))
    attention_forward_tensor_core(AttentionForwardCuda params, TileList<QueryTile> list) {
  auto& shared = *dynamic_shared<TensorCoreForwardShared<T, kDim>>();
  ptx::griddepcontrol_launch_dependents();
  ptx::griddepcontrol_wait();
  const QueryTile& whole = tile_of_block(list);
  QueryTile tile = whole;
  for (;;) {
    const bool is_done = attend(params, list, tile, shared);
    // Where the whole tile would not do, one of its scales after the other.
    const int begin = is_done ? tile.query_end : whole.query_begin;
    if (begin == whole.query_end) break;
    const int end = whole.query_end - hidden_keys(whole, begin - whole.query_begin);
    tile = {begin, end, end};
    __syncthreads();  // nobody reads shared memory any more
  }
}

}  // namespace flexvar
