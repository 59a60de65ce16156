// Gradients of 16-bit attention on tensor cores. Scores are made anew with the roundings of the
// forward pass, whose logsumexp they meet: lengths of queries and keys come behind the product.
// Only for the products with gradients are rows normalised, and rounded to 16 bits.
#pragma once

#include "scale_attention/tensor_core_backward_tiles.cuh"

namespace flexvar {

// As forward_blocks.
__host__ __device__ constexpr int grad_queries_blocks(int dim) {
  return dim > 64 || (dim == 64 && ptx::has_warpgroup_products()) ? 3 : 2;
}
constexpr int kGradKeysBlocks = 2;

// The gradients of a tile's queries, or false and none: a key or value that not all of them see is
// not finite, and would enter all their sums, 0 times a NaN being a NaN.
template <class T, int kDim>
__device__ __forceinline__ bool differentiate_queries(const AttentionBackwardCuda& params,
                                                      const TileList<QueryTile>& list,
                                                      const QueryTile& tile,
                                                      TensorCoreBackwardShared<T, kDim>& shared) {
  using Shared = TensorCoreBackwardShared<T, kDim>;
  constexpr int kColumns = Shared::kColumns, kTiles = kColumns / 8;
  int64_t head = head_of_block(list);
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * 16;
  const int g = static_cast<int>(threadIdx.x) % 32 / 4, t = static_cast<int>(threadIdx.x) % 4;
  const int64_t image = image_of(head, params.heads), in_image = head_in_image(head, params.heads);
  BackwardCopies<T, kDim> copies(
      shared, image, in_image, {{params.q, params.maps.q}, {params.grad_out, params.maps.grad_out}},
      tile.query_begin, tile.query_end, {{params.k, params.maps.k}, {params.v, params.maps.v}}, 0,
      tile.key_end);
  const float* q_inverse = head_part<float>(params.q_inverse_lengths, head, params.query_count);
  const float* k_inverse = head_part<float>(params.k_inverse_lengths, head, params.query_count);
  const float scale = static_cast<float>(params.softmax_scale) *
                      q_scale_of<float>(params.q_scale, head, params.heads);
  const float factor = static_cast<float>(params.softmax_scale * kAttentionLog2E) *
                       q_scale_of<float>(params.q_scale, head, params.heads);

  const auto copy_lengths = [&](int to, int first_key) {
    const int i = static_cast<int>(threadIdx.x);
    if (k_inverse == nullptr || i >= kColumns) return;
    copy_number_async(shared.stages[to].inverse_lengths[i], k_inverse, first_key + i, tile.key_end);
  };
  copy_lengths(0, 0);
  const auto copy = [&](int to, int first_key) {
    copies.start(to, first_key);
    copy_lengths(to, first_key);
  };
  const T* out = head_of_image<T>(params.out, image, in_image);
  const T* grad_out = head_of_image<T>(params.grad_out, image, in_image);
  float logsumexp[2], delta[2];  // the former in base 2
  float row_factor[2];           // of a row's products, to scores in base 2
  int seen_end[2];               // the end of the keys that a row sees
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t token = tile.query_begin + warp_row + g + 8 * half;
    const int64_t offset = head * params.query_count + token;
    const bool valid = token < tile.query_end;
    const int64_t row = valid ? token : tile.query_begin;
    const float product = row_product<T, kDim>(out + row * params.out.token_stride,
                                               grad_out + row * params.grad_out.token_stride);
    delta[half] = valid ? product : 0;
    logsumexp[half] = valid ? static_cast<const float*>(params.logsumexp)[offset] *
                                  static_cast<float>(kAttentionLog2E)
                            : 0;
    if (valid && t == 0) {  // for the gradients of the keys
      static_cast<float*>(params.delta)[offset] = delta[half];
      static_cast<float*>(params.logsumexp_in_base_2)[offset] = logsumexp[half];
    }
    // Rows that are none hold other queries, whose sums are to be finite, too.
    row_factor[half] = !valid ? 0 : q_inverse != nullptr ? factor * q_inverse[token] : factor;
    seen_end[half] = tile.key_end - hidden_keys(tile, warp_row + g + 8 * half);
  }
  const int all_seen_end = tile.key_end - tile.most_hidden;

  BackwardSums<T, kDim> grad{};
  BackwardTile<T, kDim> products;
  auto& weights = products.weights;
  auto& grad_scores = products.grad_scores;
  int stage = 0, begin = 0;
  // Weights from products. Where rows are not normalised nothing of that is to take an instruction.
  const auto weigh = [&]<bool kNormalized>() {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (kNormalized) {
          weights[n][i] *= shared.stages[stage].inverse_lengths[n * 8 + 2 * t + i % 2];
        }
        weights[n][i] = ptx::exp2_approx(weights[n][i] * row_factor[i / 2] - logsumexp[i / 2]);
      }
    }
  };
  // No weight for keys that are not seen.
  const auto hide_keys = [&] {
    const int own[2] = {seen_end[0] - begin - 2 * t, seen_end[1] - begin - 2 * t};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (n * 8 + i % 2 >= own[i / 2]) weights[n][i] = 0;
      }
    }
  };
  // The gradients of the scores.
  const auto differentiate = [&] {
    if (k_inverse != nullptr) {
      weigh.template operator()<true>();
    } else {
      weigh.template operator()<false>();
    }
    if (begin + kColumns > all_seen_end) hide_keys();
    products.wait_for_all();
    grad.hold();
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        grad_scores[n][i] = weights[n][i] * (grad_scores[n][i] - delta[i / 2]);
      }
    }
    grad.keep(grad_scores);
    if (k_inverse != nullptr) {
      __syncthreads();  // all have multiplied the keys as they are
      scale_copied_rows(shared.stages[stage].first_columns, k_inverse, begin, tile.key_end);
      ptx::fence_for_warpgroup();
      __syncthreads();
    }
  };
  const auto begin_adding = [&] {
    grad.begin_adding(grad_scores, shared.stages[stage].first_columns);
  };
  const auto arrive = [&](int arrived, int parity, int first) {
    copies.wait(arrived, parity);
    if constexpr (Shared::kHasWarpgroups) {
      if (const int count = tile.key_end - first; count < kColumns) {  // those of later scales
        clear_rows<kColumns, kTensorCoreThreads>(shared.stages[arrived].first_columns, count, 0);
        clear_rows<kColumns, kTensorCoreThreads>(shared.stages[arrived].second_columns, count, 0);
        ptx::fence_for_warpgroup();
      }
    }
  };
  for_each_tile(products, shared, warp_row, begin, tile.key_end, stage, copy, arrive, differentiate,
                begin_adding, [&] { grad.hold(); });
  if (tile.most_hidden > 0 && holds_not_finite(grad.sums)) return false;
  head = head_of_block(list, ptx::computed_here(blockIdx.x));  // and not kept: registers are short

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t token = tile.query_begin + warp_row + g + 8 * half;
    float row_scale = scale;
    if (q_inverse != nullptr) {
      const float inverse = token < tile.query_end ? q_inverse[token] : 0.0f;
      const float product =
          remove_radial_part(grad.sums, half, shared.first_rows, warp_row + g + 8 * half, inverse);
      if (token < tile.query_end && t == 0) {
        static_cast<float*>(params.grad_q_scale_parts)[head * params.query_count + token] =
            product * static_cast<float>(params.softmax_scale);
      }
      row_scale *= inverse;
    }
    if (token >= tile.query_end) continue;
    store_row(static_cast<T*>(params.grad_q) +
                  contiguous_offset<kDim>(head, params.heads, params.query_count, token),
              grad.sums, half, row_scale);
  }
  return true;
}

template <class T, int kDim>
__global__ void __launch_bounds__(kTensorCoreThreads, grad_queries_blocks(kDim))
    attention_grad_queries_tensor_core(const __grid_constant__ AttentionBackwardCuda params,
                                       TileList<QueryTile> list) {
  auto& shared = *dynamic_shared<TensorCoreBackwardShared<T, kDim>>();
  QueryTile tile = tile_of_block(list);
  for (;;) {
    const bool is_done = differentiate_queries<T, kDim>(params, list, tile, shared);
    // Where the whole tile would not do, one of its scales after the other.
    const QueryTile& whole = tile_of_block(list, ptx::computed_here(blockIdx.x));
    const int begin = is_done ? tile.query_end : whole.query_begin;
    if (begin == whole.query_end) break;
    const int end = whole.query_end - hidden_keys(whole, begin - whole.query_begin);
    tile = {begin, end, end};
    __syncthreads();  // nobody reads shared memory any more
    BackwardCopies<T, kDim>::end(shared);
  }
}

// The same of a tile's keys and values, where queries that see not all of them may be not finite.
template <class T, int kDim>
__device__ __forceinline__ bool differentiate_keys(const AttentionBackwardCuda& params,
                                                   int64_t head, const KeyTile& tile,
                                                   TensorCoreBackwardShared<T, kDim>& shared) {
  constexpr int kColumns = TensorCoreBackwardShared<T, kDim>::kColumns, kTiles = kColumns / 8;
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * 16;
  const int g = static_cast<int>(threadIdx.x) % 32 / 4, t = static_cast<int>(threadIdx.x) % 4;
  const int tokens = static_cast<int>(params.query_count);
  BackwardCopies<T, kDim> copies(
      shared, image_of(head, params.heads), head_in_image(head, params.heads),
      {{params.k, params.maps.k}, {params.v, params.maps.v}}, tile.key_begin, tile.key_end,
      {{params.q, params.maps.q}, {params.grad_out, params.maps.grad_out}}, tile.query_begin,
      tokens);
  const float* q_inverse = head_part<float>(params.q_inverse_lengths, head, tokens);
  const float factor = static_cast<float>(params.softmax_scale * kAttentionLog2E) *
                       q_scale_of<float>(params.q_scale, head, params.heads);

  // What products with a stage's columns take beside them.
  const int column = static_cast<int>(threadIdx.x) % kColumns;
  const int which = static_cast<int>(threadIdx.x) / kColumns;
  const float* const numbers =
      head_part<float>(which == 0 ? params.logsumexp_in_base_2 : params.delta, head, tokens);
  const auto copy_numbers = [&](int to, int first_column) {
    auto& columns = shared.stages[to];
    if (kTensorCoreThreads == 2 * kColumns || which < 2) {
      copy_number_async(columns.numbers[which][column], numbers, first_column + column, tokens);
    }
    if (q_inverse != nullptr && which == 0) {
      copy_number_async(columns.inverse_lengths[column], q_inverse, first_column + column, tokens);
    }
  };
  copy_numbers(0, tile.query_begin);
  if (q_inverse != nullptr && threadIdx.x < kTensorCoreRows) {
    const float* k_inverse = head_part<float>(params.k_inverse_lengths, head, tokens);
    const int row = static_cast<int>(threadIdx.x), token = tile.key_begin + row;
    shared.inverse_lengths[row] = token < tile.key_end ? k_inverse[token] : 0.0f;
  }

  BackwardSums<T, kDim> grad_keys{}, grad_values{};
  BackwardTile<T, kDim> products;
  auto& weights = products.weights;
  auto& grad_scores = products.grad_scores;
  int stage = 0, begin = tile.query_begin;
  int first[2];  // the first query that sees a row
#pragma unroll
  for (int half = 0; half < 2; ++half) first[half] = first_query(tile, warp_row + g + 8 * half);
  const int first_of_all = first_query(tile, kTensorCoreRows - 1);
  // Weights from products. Where rows are not normalised nothing of that is to take an instruction.
  const auto weigh = [&]<bool kNormalized>() {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = n * 8 + 2 * t + i;
        const float base = shared.stages[stage].numbers[0][column];
        const float column_factor =
            kNormalized ? factor * shared.stages[stage].inverse_lengths[column] : factor;
#pragma unroll
        for (int j = i; j < 4; j += 2) {
          if (kNormalized) weights[n][j] *= shared.inverse_lengths[warp_row + g + j / 2 * 8];
          weights[n][j] = ptx::exp2_approx(weights[n][j] * column_factor - base);
        }
      }
    }
  };
  // No weight for queries that do not see a row, or that are none.
  const auto hide_queries = [&] {
    const int own[2] = {begin + 2 * t - first[0], begin + 2 * t - first[1]};
    const unsigned counts[2] = {static_cast<unsigned>(tokens - first[0]),
                                static_cast<unsigned>(tokens - first[1])};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (static_cast<unsigned>(own[i / 2] + n * 8 + i % 2) >= counts[i / 2]) weights[n][i] = 0;
      }
    }
  };
  // The gradients of the scores.
  const auto differentiate = [&] {
    if (q_inverse != nullptr) {
      weigh.template operator()<true>();
    } else {
      weigh.template operator()<false>();
    }
    if (begin < first_of_all || begin + kColumns > tokens) hide_queries();
    products.wait_for_all();
    grad_keys.hold();
    grad_values.hold();
    grad_values.keep(weights);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float shift = shared.stages[stage].numbers[1][n * 8 + 2 * t + i % 2];
        grad_scores[n][i] = weights[n][i] * (grad_scores[n][i] - shift);
      }
    }
    grad_keys.keep(grad_scores);
    if (q_inverse != nullptr) {
      __syncthreads();  // all have multiplied the queries as they are
      scale_copied_rows(shared.stages[stage].first_columns, q_inverse, begin, tokens);
      ptx::fence_for_warpgroup();
      __syncthreads();
    }
  };
  const auto begin_adding = [&] {
    grad_values.begin_adding(weights, shared.stages[stage].second_columns);
    grad_keys.begin_adding(grad_scores, shared.stages[stage].first_columns);
  };
  const auto copy = [&](int to, int first_column) {
    copies.start(to, first_column);
    copy_numbers(to, first_column);
  };
  const auto arrive = [&](int arrived, int parity, int) { copies.wait(arrived, parity); };
  for_each_tile(products, shared, warp_row, begin, tokens, stage, copy, arrive, differentiate,
                begin_adding, [&] {
                  grad_keys.hold();
                  grad_values.hold();
                });
  if (first_of_all > tile.query_begin && holds_not_finite(grad_keys.sums, grad_values.sums)) {
    return false;
  }

  const float scale = static_cast<float>(params.softmax_scale) *
                      q_scale_of<float>(params.q_scale, head, params.heads);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t token = tile.key_begin + warp_row + g + 8 * half;
    float row_scale = scale;
    if (q_inverse != nullptr) {
      const float inverse = shared.inverse_lengths[warp_row + g + 8 * half];
      remove_radial_part(grad_keys.sums, half, shared.first_rows, warp_row + g + 8 * half, inverse);
      row_scale *= inverse;
    }
    if (token >= tile.key_end) continue;
    const int64_t offset = contiguous_offset<kDim>(head, params.heads, params.query_count, token);
    store_row(static_cast<T*>(params.grad_k) + offset, grad_keys.sums, half, row_scale);
    store_row(static_cast<T*>(params.grad_v) + offset, grad_values.sums, half, 1.0f);
  }
  return true;
}

template <class T, int kDim>
__global__ void __launch_bounds__(kTensorCoreThreads, kGradKeysBlocks)
    attention_grad_keys_tensor_core(const __grid_constant__ AttentionBackwardCuda params,
                                    TileList<KeyTile> list) {
  auto& shared = *dynamic_shared<TensorCoreBackwardShared<T, kDim>>();
  const int64_t head = head_of_block(list);
  KeyTile tile = tile_of_block(list);
  for (;;) {
    const bool is_done = differentiate_keys<T, kDim>(params, head, tile, shared);
    // Where the whole tile would not do, one of its scales after the other.
    const KeyTile& whole = tile_of_block(list, ptx::computed_here(blockIdx.x));
    const int begin = is_done ? tile.key_end : whole.key_begin;
    if (begin == whole.key_end) break;
    const int row = begin - whole.key_begin;
    const int length = __ffsll(static_cast<long long>(whole.scale_ends >> row));
    tile = {begin, length == 0 ? whole.key_end : begin + length, first_query(whole, row)};
    __syncthreads();  // nobody reads shared memory any more
    BackwardCopies<T, kDim>::end(shared);
  }
}

}  // namespace flexvar
