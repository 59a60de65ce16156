// Gradients of 16-bit attention on tensor cores. Scores are made anew with the roundings of the
// forward pass, whose logsumexp they meet: lengths of queries and keys come behind the product.
// Only for the products with gradients are rows normalised, and rounded to 16 bits.
#pragma once

#include "scale_attention/tensor_core_tiles.cuh"

namespace flexvar {

// As forward_blocks.
__host__ __device__ constexpr int grad_queries_blocks(int dim) {
  return dim > 64 || (dim == 64 && ptx::has_warpgroup_products()) ? 3 : 2;
}
constexpr int kGradKeysBlocks = 2;

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
