// The forward pass of 16-bit attention on tensor cores.
#pragma once

#include "scale_attention/tensor_core_tiles.cuh"

namespace flexvar {

// Blocks a multiprocessor that a kernel asks room for. Where products take fragments from registers
// 4 would make the compiler spill some.
__host__ __device__ constexpr int forward_blocks(int dim) {
  return dim > 96 ? 2 : dim == 64 && ptx::has_warpgroup_products() ? 4 : 3;
}

template <class T, int kDim>
struct TensorCoreForwardShared {
  static constexpr int kColumns = kDim <= 64 ? 64 : 32;
  HalfTile<T, kTensorCoreRows, kDim> queries;
  HalfTile<T, kColumns, kDim> keys[2];
  HalfTile<T, kColumns, kDim> values[2];
  float inverse_lengths[2][kColumns];          // of the keys at hand, by stage
  float own_inverse_lengths[kTensorCoreRows];  // of the keys that are queries of the tile, too
  struct {
    ptx::Mbarrier keys[2], values[2], done[2];
  } barriers;  // of StepsByWarpgroup, as what follows: it need not wait in registers
  int image, head_in_image;
  QueryTile tile;
};

// How `attend` takes its step through the keys, kColumns at a time: there are two ways with the
// same names. `stage` is where a step's tiles lie, `parity` that of the barriers' phases, and
// `rest` the number of keys from the step's first one on.

// Every thread copies its part, and waits for the whole block with every step.
template <class T, int kDim>
class StepsByWarps {
 public:
  using Shared = TensorCoreForwardShared<T, kDim>;
  static constexpr int kColumns = Shared::kColumns;

  // Starts to copy the queries and the first keys.
  __device__ __forceinline__ StepsByWarps(const AttentionForwardCuda& params,
                                          const QueryTile& queries, KeyRange range, int64_t image,
                                          int64_t in_image, Shared& shared)
      : shared_(shared),
        keys_(head_of_image<T>(params.k, image, in_image), params.k.token_stride, range.begin),
        values_(head_of_image<T>(params.v, image, in_image), params.v.token_stride, range.begin) {
    copy_rows_async(shared.queries, head_of_image<T>(params.q, image, in_image),
                    params.q.token_stride, queries.query_begin, queries.query_end);
    keys_.start(shared.keys[0], range.end - range.begin);
  }

  template <int kTiles>
  __device__ __forceinline__ void first_scores(float (&scores)[kTiles][4], int rest) {
    wait_for_tile();
    values_.start(shared_.values[0], rest);
    if (rest > kColumns) keys_.start(shared_.keys[1], rest - kColumns);
    tile_scores(scores, shared_.queries, shared_.keys[0], warp_row());
  }
  __device__ __forceinline__ const HalfTile<T, kColumns, kDim>& keys(int stage) const {
    return shared_.keys[stage];
  }
  // Until the products of the step before have been added to `sums`.
  template <int kDimTiles>
  __device__ __forceinline__ void end_products(float (&)[kDimTiles][4]) {}
  // Takes the weights for the products with the values at hand.
  template <int kTiles>
  __device__ __forceinline__ void keep(const float (&)[kTiles][4]) {}
  // This warp is done with what it read of this step's keys and of the values before.
  __device__ __forceinline__ void release(int) {}
  // Until the values at hand, and the next keys, have arrived.
  __device__ __forceinline__ void wait(int, int, int) { wait_for_tile(); }
  // Adds the products of the weights with the values at hand; the scores of the next keys take the
  // place of the weights.
  template <int kTiles, int kDimTiles>
  __device__ __forceinline__ void next(float (&sums)[kDimTiles][4], float (&weights)[kTiles][4],
                                       int stage, int, int rest) {
    values_.start(shared_.values[stage ^ 1], rest - kColumns);
    if (rest > 2 * kColumns) keys_.start(shared_.keys[stage], rest - 2 * kColumns);
    tile_accumulate(sums, weights, shared_.values[stage]);
    tile_scores(weights, shared_.queries, shared_.keys[stage ^ 1], warp_row());
  }
  template <int kTiles, int kDimTiles>
  __device__ __forceinline__ void last(float (&sums)[kDimTiles][4],
                                       const float (&weights)[kTiles][4], int stage) {
    tile_accumulate(sums, weights, shared_.values[stage]);
  }
  // Behind a barrier of the block, where the tile of queries is to be begun anew.
  __device__ __forceinline__ static void end(Shared&) {}
  // The tile of queries, `tile`, once the copies have been started.
  __device__ __forceinline__ static const QueryTile& queries(const Shared&, const QueryTile& tile) {
    return tile;
  }

 private:
  __device__ __forceinline__ static int warp_row() {
    return static_cast<int>(threadIdx.x / 32 * 16);
  }

  Shared& shared_;
  RowCopies<T, kDim> keys_, values_;
};

// One thread tells the copy engine what to copy, and the warpgroup multiplies: queries stay in
// registers, and the products with a step's values end while the next step's maxima are sought.
// Nobody waits for the whole block: barriers say that a step's keys, or its values, have arrived,
// and that all warps are done with the keys of a step and the values of the one before.
template <class T>
class StepsByWarpgroup {
 public:
  using Shared = TensorCoreForwardShared<T, 64>;
  static constexpr int kColumns = Shared::kColumns;

  __device__ __forceinline__ StepsByWarpgroup(const AttentionForwardCuda& params,
                                              const QueryTile& queries, KeyRange range,
                                              int64_t image, int64_t in_image, Shared& shared)
      : shared_(shared), params_(params) {
    if (threadIdx.x == 0) {
      auto& barriers = shared.barriers;
      shared.image = static_cast<int>(image);
      shared.head_in_image = static_cast<int>(in_image);
      shared.tile = queries;
#pragma unroll
      for (int stage = 0; stage < 2; ++stage) {
        ptx::mbarrier_init(barriers.keys[stage], 1);
        ptx::mbarrier_init(barriers.values[stage], 1);
        ptx::mbarrier_init(barriers.done[stage], kTensorCoreThreads / 32);
      }
      ptx::mbarriers_are_ready();
      ptx::mbarrier_arrive_and_expect(barriers.keys[0], sizeof(shared.queries) + kBytes);
      copy(shared.queries, params.maps.q, queries.query_begin, barriers.keys[0]);
      copy(shared.keys[0], params.maps.k, range.begin, barriers.keys[0]);
      expect_and_copy(shared.values[0], params.maps.v, range.begin, barriers.values[0]);
      if (range.end - range.begin > kColumns) {
        expect_and_copy(shared.keys[1], params.maps.k, range.begin + kColumns, barriers.keys[1]);
      }
    }
    __syncthreads();
  }

  __device__ __forceinline__ void first_scores(float (&scores)[8][4], int) {
    ptx::mbarrier_wait(shared_.barriers.keys[0], 0);
    const int warp_row = static_cast<int>(threadIdx.x / 32 * 16);
    const int count = shared_.tile.query_end - shared_.tile.query_begin;
    if (count < kTensorCoreRows) {  // those of other tiles lie behind
      clear_rows<16, 32>(shared_.queries, count, warp_row);
      __syncwarp();
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) load_left(queries_[n], shared_.queries, warp_row, n * 16);
    ptx::hold_registers(queries_);
    ptx::warpgroup_begin();
    begin_scores(scores, shared_.keys[0]);
    ptx::warpgroup_end();
    ptx::hold_registers(scores);
  }
  __device__ __forceinline__ const HalfTile<T, 64, 64>& keys(int stage) const {
    return shared_.keys[stage];
  }
  __device__ __forceinline__ void end_products(float (&sums)[8][4]) {
    ptx::warpgroup_wait<0>();
    ptx::hold_registers(sums);
    ptx::hold_registers(left_);
  }
  __device__ __forceinline__ void keep(const float (&weights)[8][4]) {
#pragma unroll
    for (int n = 0; n < 4; ++n) pack_left<T>(left_[n], weights, n);
  }
  __device__ __forceinline__ void release(int stage) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(shared_.barriers.done[stage]);
  }
  __device__ __forceinline__ void wait(int stage, int parity, int rest) {
    ptx::mbarrier_wait(shared_.barriers.values[stage], parity);
    if (rest > kColumns) {
      ptx::mbarrier_wait(shared_.barriers.keys[stage ^ 1], parity ^ stage);
    } else if (rest < kColumns) {  // those of later scales lie behind
      clear_rows<kColumns, kTensorCoreThreads>(shared_.values[stage], rest, 0);
      ptx::fence_for_warpgroup();
      __syncthreads();
    }
  }
  __device__ __forceinline__ void next(float (&sums)[8][4], float (&weights)[8][4], int stage,
                                       int parity, int rest) {
    ptx::hold_registers(sums);
    ptx::hold_registers(left_);
    ptx::warpgroup_begin();
    begin_scores(weights, shared_.keys[stage ^ 1]);
    ptx::warpgroup_commit();
    begin_tile_accumulate(sums, left_, shared_.values[stage]);
    ptx::warpgroup_commit();
    if (threadIdx.x == 0) {
      auto& barriers = shared_.barriers;
      ptx::mbarrier_wait(barriers.done[stage], parity);
      const int row = keys_of_block(params_, shared_.tile).end - rest;
      expect_and_copy(shared_.values[stage ^ 1], params_.maps.v, row + kColumns,
                      barriers.values[stage ^ 1]);
      if (rest > 2 * kColumns) {
        expect_and_copy(shared_.keys[stage], params_.maps.k, row + 2 * kColumns,
                        barriers.keys[stage]);
      }
    }
    __syncwarp();
    ptx::warpgroup_wait<1>();
    ptx::hold_registers(weights);
  }
  __device__ __forceinline__ void last(float (&sums)[8][4], const float (&)[8][4], int stage) {
    ptx::hold_registers(sums);
    ptx::hold_registers(left_);
    ptx::warpgroup_begin();
    begin_tile_accumulate(sums, left_, shared_.values[stage]);
    ptx::warpgroup_end();
    ptx::hold_registers(sums);
  }
  // In shared memory, so as not to wait in registers.
  __device__ __forceinline__ static const QueryTile& queries(const Shared& shared,
                                                             const QueryTile&) {
    return shared.tile;
  }
  __device__ __forceinline__ static void end(Shared& shared) {
    if (threadIdx.x == 0) {
#pragma unroll
      for (int stage = 0; stage < 2; ++stage) {
        ptx::mbarrier_end(shared.barriers.keys[stage]);
        ptx::mbarrier_end(shared.barriers.values[stage]);
        ptx::mbarrier_end(shared.barriers.done[stage]);
      }
    }
  }

 private:
  static constexpr int kBytes = sizeof(Shared::keys[0]);

  __device__ __forceinline__ void copy(HalfTile<T, 64, 64>& tile, const TensorMap& map, int row,
                                       ptx::Mbarrier& barrier) const {
    ptx::copy_box(tile.rows, map, row, shared_.head_in_image, shared_.image, barrier);
  }
  __device__ __forceinline__ void expect_and_copy(HalfTile<T, 64, 64>& tile, const TensorMap& map,
                                                  int row, ptx::Mbarrier& barrier) const {
    ptx::mbarrier_arrive_and_expect(barrier, kBytes);
    copy(tile, map, row, barrier);
  }
  __device__ __forceinline__ void begin_scores(float (&scores)[8][4],
                                               const HalfTile<T, 64, 64>& columns) {
    ptx::warpgroup_multiply<false>(scores, queries_[0], columns.rows[0], 0);
#pragma unroll
    for (int n = 1; n < 4; ++n) {
      ptx::warpgroup_multiply<true>(scores, queries_[n], columns.rows[0], n * 16);
    }
  }

  Shared& shared_;
  const AttentionForwardCuda& params_;
  uint32_t queries_[4][4];
  uint32_t left_[4][4] = {};  // the weights, while products of them are under way
};

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
  for (int half = 0; half < 2; ++half) highest[half] *= rise[half];
  const bool is_raised = __any_sync(0xffffffffu, highest[0] > maximum[0] + kMaximumSlack ||
                                                     highest[1] > maximum[1] + kMaximumSlack);
  if (is_raised) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float before = maximum[half];
      maximum[half] = fmaxf(before, row_maximum(highest[half]));
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
template <class Steps, class T, int kDim>
__device__ __forceinline__ bool attend(const AttentionForwardCuda& params,
                                       const TileList<QueryTile>& list, const QueryTile& first_tile,
                                       TensorCoreForwardShared<T, kDim>& shared) {
  constexpr int kColumns = TensorCoreForwardShared<T, kDim>::kColumns, kTiles = kColumns / 8;
  const KeyRange key_range = keys_of_block(params, first_tile);
  const int64_t head = head_of_block(list), image = image_of(head, params.heads),
                in_image = head_in_image(head, params.heads);
  const int warp_row = static_cast<int>(threadIdx.x / 32 * 16);
  const int g = static_cast<int>(threadIdx.x % 32 / 4), t = static_cast<int>(threadIdx.x % 4);
  const bool normalized = params.q_scale != nullptr;

  Steps steps(params, first_tile, key_range, image, in_image, shared);
  const QueryTile& tile = Steps::queries(shared, first_tile);
  const int key_count = key_range.end - key_range.begin;
  const float scale = normalized
                          ? params.float_scale * static_cast<const float*>(params.q_scale)[in_image]
                          : params.float_scale;
  float factor[2] = {scale, scale};  // of a row's products, to scores in base 2
  const SoftmaxStart<float> softmax = start_softmax<T>(params, head, scale);
  float weights[kTiles][4];
  steps.first_scores(weights, key_count);
  // Each warp measures 16 of a step's keys, `rest` keys from the end.
  const auto measure_keys = [&](int stage, int rest) {
    if (kColumns < kTensorCoreRows && warp_row >= kColumns) return;
    float inverse[2];
    // Addresses are not to wait in registers where rows are not normalised; and branches of single
    // lanes would keep the compiler from its registers for whole warps, where tiles are addressed.
    inverse_row_lengths(inverse, steps.keys(stage), ptx::computed_here(warp_row));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + g + 8 * half;
      const int own = keys_of_block(params, tile).end - rest + row - tile.query_begin;
      if (t == 0) shared.inverse_lengths[stage][row] = inverse[half];
      if (t == 0 && own >= 0 && own < kTensorCoreRows)
        shared.own_inverse_lengths[own] = inverse[half];
    }
  };
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
    measure_keys(0, key_count);
  }
  float maximum[2] = {softmax.maximum, softmax.maximum};  // of scores in base 2
  float sum[2] = {0, 0};                                  // this lane's part
  float out[kDim / 8][4] = {};
  int step = 0;
  // Keys from a step's first one on that all queries of the tile see.
  int rest_seen = key_count - first_tile.most_hidden;
  for (;; ++step, rest_seen -= kColumns) {
    const int stage = step & 1, parity = step >> 1 & 1;
    if (normalized) {
      __syncthreads();
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          weights[n][i] *= shared.inverse_lengths[stage][n * 8 + 2 * t + i % 2];
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
    if (rest_seen < kColumns) {
      const int rest = rest_seen + tile.most_hidden;
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
    float correction[2];
    const bool is_raised = !softmax.fixed && raise_maximum(weights, maximum, sum, correction, rise);
    steps.end_products(out);
    steps.release(stage);
    if (is_raised) {
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[d][i] *= correction[i / 2];
      }
    }
    weigh(weights, sum, rise, {base_of(maximum[0]), base_of(maximum[1])});
    steps.keep(weights);
    const int rest = rest_seen + tile.most_hidden;
    steps.wait(stage, parity, rest);
    if (rest <= kColumns) break;
    if (normalized) measure_keys(stage ^ 1, rest - kColumns);
    steps.next(out, weights, stage, parity, rest);
  }
  steps.last(out, weights, step & 1);
  if (tile.most_hidden > 0 && holds_not_finite(out)) return false;

  const float total[2] = {row_sum(sum[0]), row_sum(sum[1])};
  const int first_row = warp_row + g, count = tile.query_end - tile.query_begin;
  if (const int row = static_cast<int>(threadIdx.x); normalized && row < count) {
    head_part<float>(params.k_inverse_lengths, head, params.query_count)[tile.query_begin + row] =
        shared.own_inverse_lengths[row];
  }
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

template <class Steps, class T, int kDim>
__device__ __forceinline__ void attend_until_done(const AttentionForwardCuda& params,
                                                  const TileList<QueryTile>& list,
                                                  TensorCoreForwardShared<T, kDim>& shared) {
  QueryTile tile = tile_of_block(list);
  for (;;) {
    const bool is_done = attend<Steps>(params, list, tile, shared);
    // Where the whole tile would not do, one of its scales after the other.
    const QueryTile& whole = tile_of_block(list, ptx::computed_here(blockIdx.x));
    const int begin = is_done ? Steps::queries(shared, tile).query_end : whole.query_begin;
    if (begin == whole.query_end) break;
    const int end = whole.query_end - hidden_keys(whole, begin - whole.query_begin);
    tile = {begin, end, end};
    __syncthreads();  // nobody reads shared memory any more
    Steps::end(shared);
  }
}

template <class T, int kDim>
__global__ void __launch_bounds__(kTensorCoreThreads, forward_blocks(kDim))
    attention_forward_tensor_core(const __grid_constant__ AttentionForwardCuda params,
                                  TileList<QueryTile> list) {
  auto& shared = *dynamic_shared<TensorCoreForwardShared<T, kDim>>();
  ptx::griddepcontrol_launch_dependents();
  ptx::griddepcontrol_wait();
  if constexpr (kDim == 64) {
    if (ptx::has_copy_engine()) {
      attend_until_done<StepsByWarpgroup<T>>(params, list, shared);
      return;
    }
  }
  attend_until_done<StepsByWarps<T, kDim>>(params, list, shared);
}

}  // namespace flexvar
