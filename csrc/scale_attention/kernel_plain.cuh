// Attention with ordinary multiply-adds: float32 and float64.
//
// 128 threads are 16 groups of 8 lanes. Group g owns the rows g, g + 16, …; of a product with a
// tile of columns its lane t owns the columns t, t + 8, …: a row never leaves its group, so softmax
// needs shuffles among 8 lanes only. Rows are queries in the forward pass and for dQ, keys for dK
// and dV.
#pragma once

#include "scale_attention/kernel_common.cuh"

namespace flexvar {

constexpr int kPlainThreads = 128;

// kRowsPerThread x kColumnsPerThread scores a thread.
template <class A, int kDim, int kRowsPerThread, int kColumnsPerThread>
struct PlainTile {
  static constexpr int kR = kRowsPerThread;
  static constexpr int kC = kColumnsPerThread;
  static constexpr int kRows = 16 * kR;
  static constexpr int kColumns = 8 * kC;
  static constexpr int kVector = 16 / static_cast<int>(sizeof(A));
  static constexpr int kStride =
      kDim + kVector;  // of rows in shared memory, free of bank conflicts
  static constexpr int kGroups = kDim / (8 * kVector);  // vectors of an output row a lane owns
  static constexpr int kScoreStride = kColumns + 1;

  struct alignas(16) Vector {
    A x[kVector];
  };
};

template <class A, int kDim>
using PlainForwardTile = PlainTile<A, kDim, sizeof(A) == 8 ? 1 : 4, sizeof(A) == 8 ? 2 : 4>;
template <class A, int kDim>
using PlainBackwardTile = PlainTile<A, kDim, sizeof(A) == 8 ? 1 : 2, sizeof(A) == 8 ? 1 : 2>;

template <class A, int kDim>
struct PlainForwardShared {
  using Tile = PlainForwardTile<A, kDim>;
  alignas(16) A queries[Tile::kRows][Tile::kStride];
  alignas(16) A keys[Tile::kColumns][Tile::kStride];  // then the values
  A weights[Tile::kRows][Tile::kScoreStride];
};

// `first`, `second`: Q and dO in rows, K and V in columns for dQ; the other way round for dK, dV.
template <class A, int kDim>
struct PlainBackwardShared {
  using Tile = PlainBackwardTile<A, kDim>;
  alignas(16) A first_rows[Tile::kRows][Tile::kStride];
  alignas(16) A second_rows[Tile::kRows][Tile::kStride];
  alignas(16) A first_columns[Tile::kColumns][Tile::kStride];
  alignas(16) A second_columns[Tile::kColumns][Tile::kStride];
  A weights[Tile::kRows][Tile::kScoreStride];
  A grad_scores[Tile::kRows][Tile::kScoreStride];
};

__device__ __forceinline__ double to_float(double x) { return x; }
template <>
__device__ __forceinline__ double from_float<double>(float) = delete;
template <class T, class A>
__device__ __forceinline__ T element_from(A x) {
  if constexpr (sizeof(T) == 8) {
    return x;
  } else {
    return from_float<T>(x);
  }
}

__device__ __forceinline__ float exp2_of(float x) { return exp2f(x); }
__device__ __forceinline__ double exp2_of(double x) { return exp2(x); }
__device__ __forceinline__ float log_of(float x) { return logf(x); }
__device__ __forceinline__ double log_of(double x) { return log(x); }

template <class A>
__device__ __forceinline__ A maximum_of(A a, A b) {
  return a > b ? a : b;
}

// Rows [begin, begin + kRows) of a head into shared memory, zeros from `end` on; the row of token t
// times factors[t] unless that is null.
template <int kDim, class A, class T, int kRows, int kStride>
__device__ __forceinline__ void load_plain_rows(A (&shared)[kRows][kStride], const T* head,
                                                int64_t token_stride, int begin, int end,
                                                const A* factors = nullptr) {
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kDim; i += kPlainThreads) {
    const int row = i / kDim, d = i % kDim;
    A x = 0;
    if (begin + row < end) {
      x = static_cast<A>(to_float(head[(begin + row) * token_stride + d]));
      if (factors != nullptr) x *= factors[begin + row];
    }
    shared[row][d] = x;
  }
}

template <class Tile, int kDim, class A>
__device__ __forceinline__ void plain_scores(A (&scores)[Tile::kR][Tile::kC],
                                             const A (&rows)[Tile::kRows][Tile::kStride],
                                             const A (&columns)[Tile::kColumns][Tile::kStride]) {
  using Vector = typename Tile::Vector;
  const int group = static_cast<int>(threadIdx.x) / 8, lane = static_cast<int>(threadIdx.x) % 8;
#pragma unroll
  for (int r = 0; r < Tile::kR; ++r) {
#pragma unroll
    for (int c = 0; c < Tile::kC; ++c) scores[r][c] = 0;
  }
#pragma unroll 2
  for (int d = 0; d < kDim; d += Tile::kVector) {
    Vector left[Tile::kR], right[Tile::kC];
#pragma unroll
    for (int r = 0; r < Tile::kR; ++r) {
      left[r] = *reinterpret_cast<const Vector*>(&rows[group + 16 * r][d]);
    }
#pragma unroll
    for (int c = 0; c < Tile::kC; ++c) {
      right[c] = *reinterpret_cast<const Vector*>(&columns[lane + 8 * c][d]);
    }
#pragma unroll
    for (int i = 0; i < Tile::kVector; ++i) {
#pragma unroll
      for (int r = 0; r < Tile::kR; ++r) {
#pragma unroll
        for (int c = 0; c < Tile::kC; ++c) scores[r][c] += left[r].x[i] * right[c].x[i];
      }
    }
  }
}

// sums[r] += row of weights times the columns' vectors. Lane t owns the vectors t, t + 8, … of a
// row.
template <class Tile, class A>
__device__ __forceinline__ void plain_accumulate(
    typename Tile::Vector (&sums)[Tile::kR][Tile::kGroups],
    const A (&weights)[Tile::kRows][Tile::kScoreStride],
    const A (&columns)[Tile::kColumns][Tile::kStride]) {
  using Vector = typename Tile::Vector;
  const int group = static_cast<int>(threadIdx.x) / 8, lane = static_cast<int>(threadIdx.x) % 8;
#pragma unroll 2
  for (int n = 0; n < Tile::kColumns; ++n) {
#pragma unroll
    for (int j = 0; j < Tile::kGroups; ++j) {
      const Vector column =
          *reinterpret_cast<const Vector*>(&columns[n][(lane + 8 * j) * Tile::kVector]);
#pragma unroll
      for (int r = 0; r < Tile::kR; ++r) {
        const A weight = weights[group + 16 * r][n];
#pragma unroll
        for (int i = 0; i < Tile::kVector; ++i) sums[r][j].x[i] += weight * column.x[i];
      }
    }
  }
}

template <class T, class Tile, class A>
__device__ __forceinline__ void store_plain_row(T* row,
                                                const typename Tile::Vector (&sums)[Tile::kGroups],
                                                A factor) {
  const int lane = static_cast<int>(threadIdx.x) % 8;
#pragma unroll
  for (int j = 0; j < Tile::kGroups; ++j) {
#pragma unroll
    for (int i = 0; i < Tile::kVector; ++i) {
      row[(lane + 8 * j) * Tile::kVector + i] = element_from<T>(sums[j].x[i] * factor);
    }
  }
}

// Over the 8 lanes of a group; all lanes of the warp take part.
template <class A>
__device__ __forceinline__ A group_maximum(A x) {
#pragma unroll
  for (int step = 1; step < 8; step *= 2) x = maximum_of(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}
template <class A>
__device__ __forceinline__ A group_sum(A x) {
#pragma unroll
  for (int step = 1; step < 8; step *= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// Scales rows in shared memory to length 1. Row r is that of token begin + r, and for tokens in
// [tile.query_begin, tile.query_end) its factor goes to inverse_lengths[token]. Every group scales
// the rows it owns.
template <int kDim, class A, int kRows, int kStride>
__device__ __forceinline__ void normalize_plain_rows(A (&shared)[kRows][kStride],
                                                     A* inverse_lengths, int begin,
                                                     const QueryTile& tile) {
  const int lane = static_cast<int>(threadIdx.x) % 8;
  static_assert(kRows % 16 == 0);
#pragma unroll 1
  for (int row = static_cast<int>(threadIdx.x) / 8; row < kRows; row += 16) {
    A squares = 0;
    for (int d = lane; d < kDim; d += 8) squares += shared[row][d] * shared[row][d];
    const A inverse = inverse_length(static_cast<A>(sqrt(group_sum(squares))));
    for (int d = lane; d < kDim; d += 8) shared[row][d] *= inverse;
    const int token = begin + row;
    if (lane == 0 && token >= tile.query_begin && token < tile.query_end) {
      inverse_lengths[token] = inverse;
    }
  }
}

// `sums`, the gradient of a row of length 1, becomes that of the row which `inverse` scaled to it,
// but for a factor of `inverse`. Returns the product of the row and its gradient; all lanes of the
// warp take part.
template <class Tile, class A>
__device__ __forceinline__ A remove_radial_part(typename Tile::Vector (&sums)[Tile::kGroups],
                                                const A (&row)[Tile::kStride], A inverse) {
  const int lane = static_cast<int>(threadIdx.x) % 8;
  A product = 0;
#pragma unroll
  for (int j = 0; j < Tile::kGroups; ++j) {
#pragma unroll
    for (int i = 0; i < Tile::kVector; ++i) {
      product += sums[j].x[i] * row[(lane + 8 * j) * Tile::kVector + i];
    }
  }
  product = group_sum(product);
  const A removed = has_length_one(inverse) ? product : A(0);
#pragma unroll
  for (int j = 0; j < Tile::kGroups; ++j) {
#pragma unroll
    for (int i = 0; i < Tile::kVector; ++i) {
      sums[j].x[i] -= removed * row[(lane + 8 * j) * Tile::kVector + i];
    }
  }
  return product;
}

template <class T, int kDim>
__global__ void __launch_bounds__(kPlainThreads, 2)
    attention_forward_plain(AttentionForwardCuda params, TileList<QueryTile> list) {
  using A = AttentionArithmetic<T>;
  using Shared = PlainForwardShared<A, kDim>;
  using Tile = typename Shared::Tile;
  Shared& shared = *dynamic_shared<Shared>();
  ptx::griddepcontrol_launch_dependents();
  ptx::griddepcontrol_wait();
  const QueryTile tile = tile_of_block(list);
  const KeyRange key_range = keys_of_block(params, tile);
  const int64_t head = head_of_block(list);
  const int group = static_cast<int>(threadIdx.x) / 8, lane = static_cast<int>(threadIdx.x) % 8;
  const T* keys = head_of<T>(params.k, head, params.heads);
  const T* values = head_of<T>(params.v, head, params.heads);
  const bool normalized = params.q_scale != nullptr;
  const A factor = static_cast<A>(params.softmax_scale * kAttentionLog2E) *
                   q_scale_of<A>(params.q_scale, head, params.heads);

  load_plain_rows<kDim>(shared.queries, head_of<T>(params.q, head, params.heads),
                        params.q.token_stride, tile.query_begin, tile.query_end);
  if (normalized) {
    __syncthreads();
    normalize_plain_rows<kDim>(shared.queries,
                               head_part<A>(params.q_inverse_lengths, head, params.query_count),
                               tile.query_begin, tile);
  }
  const SoftmaxStart<A> softmax = start_softmax<T>(params, head, factor);
  A maximum[Tile::kR], sum[Tile::kR];  // of scores in base 2; this lane's part of the sum
  typename Tile::Vector out[Tile::kR][Tile::kGroups] = {};
#pragma unroll
  for (int r = 0; r < Tile::kR; ++r) maximum[r] = softmax.maximum, sum[r] = 0;

  for (int begin = key_range.begin; begin < key_range.end; begin += Tile::kColumns) {
    __syncthreads();
    load_plain_rows<kDim>(shared.keys, keys, params.k.token_stride, begin, key_range.end);
    __syncthreads();
    if (normalized) {
      normalize_plain_rows<kDim>(shared.keys,
                                 head_part<A>(params.k_inverse_lengths, head, params.query_count),
                                 begin, tile);
      __syncthreads();
    }
    A scores[Tile::kR][Tile::kC];
    plain_scores<Tile, kDim>(scores, shared.queries, shared.keys);
#pragma unroll
    for (int r = 0; r < Tile::kR; ++r) {
#pragma unroll
      for (int c = 0; c < Tile::kC; ++c) {
        scores[r][c] = begin + lane + 8 * c < key_range.end ? scores[r][c] * factor : A(-INFINITY);
      }
      A base = maximum[r];
      if (!softmax.fixed) {
        A highest = maximum[r];
#pragma unroll
        for (int c = 0; c < Tile::kC; ++c) highest = maximum_of(scores[r][c], highest);
        highest = group_maximum(highest);
        // While all scores are -inf the maximum is no number to subtract.
        base = highest == A(-INFINITY) ? A(0) : highest;
        const A correction = exp2_of(maximum[r] - base);
        maximum[r] = highest;
        sum[r] *= correction;
#pragma unroll
        for (int j = 0; j < Tile::kGroups; ++j) {
#pragma unroll
          for (int i = 0; i < Tile::kVector; ++i) out[r][j].x[i] *= correction;
        }
      }
#pragma unroll
      for (int c = 0; c < Tile::kC; ++c) {
        const A weight = exp2_of(scores[r][c] - base);
        shared.weights[group + 16 * r][lane + 8 * c] = weight;
        sum[r] += weight;
      }
    }
    __syncthreads();
    load_plain_rows<kDim>(shared.keys, values, params.v.token_stride, begin, key_range.end);
    __syncthreads();
    plain_accumulate<Tile>(out, shared.weights, shared.keys);
  }

#pragma unroll
  for (int r = 0; r < Tile::kR; ++r) {
    const A total = group_sum(sum[r]);
    const int64_t token = tile.query_begin + group + 16 * r;
    if (token >= tile.query_end) continue;
    if (params.parts != nullptr) {
      const int64_t row = part_row(params, list, head, token);
      store_plain_row<A, Tile>(static_cast<A*>(params.part_sums) + row * kDim, out[r], A(1));
      if (lane == 0) static_cast<AttentionPart<A>*>(params.parts)[row] = {maximum[r], total};
      continue;
    }
    store_plain_row<T, Tile>(
        static_cast<T*>(params.out) +
            contiguous_offset<kDim>(head, params.heads, params.query_count, token),
        out[r], 1 / total);
    if (params.logsumexp != nullptr && lane == 0) {
      static_cast<A*>(params.logsumexp)[head * params.query_count + token] =
          maximum[r] * A(kAttentionLn2) + log_of(total);
    }
  }
}

// out from the sums over parts of the keys, in the parts' order. A warp owns a row. Where maxima
// are fixed all parts have one, and this just adds.
constexpr int kCombineThreads = 128;
template <class T, int kDim>
__global__ void __launch_bounds__(kCombineThreads)
    attention_combine(AttentionForwardCuda params, int64_t rows, int parts) {
  using A = AttentionArithmetic<T>;
  ptx::griddepcontrol_launch_dependents();
  ptx::griddepcontrol_wait();
  const int64_t row =
      blockIdx.x * int64_t{kCombineThreads / 32} + static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (row >= rows) return;
  const A* sums = static_cast<const A*>(params.part_sums) + row * kDim;
  const AttentionPart<A>* of_row = static_cast<const AttentionPart<A>*>(params.parts) + row;
  A highest = A(-INFINITY);
  for (int part = 0; part < parts; ++part) {
    highest = maximum_of(of_row[part * rows].maximum, highest);
  }
  const A base = highest == A(-INFINITY) ? A(0) : highest;
  A out[kDim / 32] = {}, total = 0;
  for (int part = 0; part < parts; ++part) {
    const A weight = exp2_of(of_row[part * rows].maximum - base);
    total += weight * of_row[part * rows].sum;
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) {
      out[i] += weight * sums[part * rows * kDim + i * 32 + lane];
    }
  }
  T* to = static_cast<T*>(params.out) + contiguous_offset<kDim>(row / params.query_count,
                                                                params.heads, params.query_count,
                                                                row % params.query_count);
#pragma unroll
  for (int i = 0; i < kDim / 32; ++i) to[i * 32 + lane] = element_from<T>(out[i] / total);
}

// delta = sum over D of grad_out * out, a group of 8 lanes for each of the B * H * L tokens.
template <class T, int kDim>
__global__ void __launch_bounds__(kPlainThreads)
    attention_delta(AttentionBackwardCuda params, int64_t all_tokens) {
  using A = AttentionArithmetic<T>;
  const int64_t index = blockIdx.x * int64_t{kPlainThreads / 8} + threadIdx.x / 8;
  const int64_t head = index / params.query_count, token = index % params.query_count;
  A delta = 0;
  if (index < all_tokens) {
    const T* out = head_of<T>(params.out, head, params.heads) + token * params.out.token_stride;
    const T* grad =
        head_of<T>(params.grad_out, head, params.heads) + token * params.grad_out.token_stride;
    for (int d = static_cast<int>(threadIdx.x) % 8; d < kDim; d += 8) {
      delta += static_cast<A>(to_float(out[d])) * static_cast<A>(to_float(grad[d]));
    }
  }
  delta = group_sum(delta);
  if (index < all_tokens && threadIdx.x % 8 == 0) static_cast<A*>(params.delta)[index] = delta;
}

// grad_q_scale of a head, a block each: the sum over images and tokens of its parts, in one order.
constexpr int kQScaleThreads = 512;
template <class A>
__global__ void __launch_bounds__(kQScaleThreads)
    attention_grad_q_scale(const A* parts, A* grad_q_scale, int64_t batch, int64_t tokens) {
  struct Storage {
    A sums[kQScaleThreads];
  };
  A(&sums)[kQScaleThreads] = shared_storage<Storage>().sums;
  const int64_t heads = gridDim.x, head = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  A sum = 0;
  for (int64_t image = thread / 32; image < batch; image += kQScaleThreads / 32) {
    const A* of_image = parts + (image * heads + head) * tokens;
#pragma unroll 4
    for (int64_t token = thread % 32; token < tokens; token += 32) sum += of_image[token];
  }
  sums[thread] = sum;
  for (int half = kQScaleThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) sums[thread] += sums[thread + half];
  }
  if (thread == 0) grad_q_scale[head] = sums[0];
}

template <class T, int kDim>
__global__ void __launch_bounds__(kPlainThreads, 2)
    attention_grad_queries_plain(AttentionBackwardCuda params, TileList<QueryTile> list) {
  using A = AttentionArithmetic<T>;
  using Shared = PlainBackwardShared<A, kDim>;
  using Tile = typename Shared::Tile;
  Shared& shared = *dynamic_shared<Shared>();
  const QueryTile tile = tile_of_block(list);
  const int64_t head = head_of_block(list);
  const int group = static_cast<int>(threadIdx.x) / 8, lane = static_cast<int>(threadIdx.x) % 8;
  const T* keys = head_of<T>(params.k, head, params.heads);
  const T* values = head_of<T>(params.v, head, params.heads);
  const A* q_inverse = head_part<A>(params.q_inverse_lengths, head, params.query_count);
  const A* k_inverse = head_part<A>(params.k_inverse_lengths, head, params.query_count);
  const A q_scale = q_scale_of<A>(params.q_scale, head, params.heads);
  const A factor = static_cast<A>(params.softmax_scale * kAttentionLog2E) * q_scale;

  load_plain_rows<kDim>(shared.first_rows, head_of<T>(params.q, head, params.heads),
                        params.q.token_stride, tile.query_begin, tile.query_end, q_inverse);
  load_plain_rows<kDim>(shared.second_rows, head_of<T>(params.grad_out, head, params.heads),
                        params.grad_out.token_stride, tile.query_begin, tile.query_end);
  A logsumexp[Tile::kR], delta[Tile::kR];
  typename Tile::Vector grad[Tile::kR][Tile::kGroups] = {};
#pragma unroll
  for (int r = 0; r < Tile::kR; ++r) {
    const int64_t token = tile.query_begin + group + 16 * r;
    const int64_t offset = head * params.query_count + token;
    const bool valid = token < tile.query_end;
    logsumexp[r] =
        valid ? static_cast<const A*>(params.logsumexp)[offset] * A(kAttentionLog2E) : A(0);
    delta[r] = valid ? static_cast<const A*>(params.delta)[offset] : A(0);
  }

  for (int begin = 0; begin < tile.key_end; begin += Tile::kColumns) {
    __syncthreads();
    load_plain_rows<kDim>(shared.first_columns, keys, params.k.token_stride, begin, tile.key_end,
                          k_inverse);
    load_plain_rows<kDim>(shared.second_columns, values, params.v.token_stride, begin,
                          tile.key_end);
    __syncthreads();
    A scores[Tile::kR][Tile::kC], grads[Tile::kR][Tile::kC];
    plain_scores<Tile, kDim>(scores, shared.first_rows, shared.first_columns);
    plain_scores<Tile, kDim>(grads, shared.second_rows, shared.second_columns);
#pragma unroll
    for (int r = 0; r < Tile::kR; ++r) {
#pragma unroll
      for (int c = 0; c < Tile::kC; ++c) {
        const A weight = begin + lane + 8 * c < tile.key_end
                             ? exp2_of(scores[r][c] * factor - logsumexp[r])
                             : A(0);
        shared.grad_scores[group + 16 * r][lane + 8 * c] = weight * (grads[r][c] - delta[r]);
      }
    }
    __syncwarp();
    plain_accumulate<Tile>(grad, shared.grad_scores, shared.first_columns);
  }

#pragma unroll
  for (int r = 0; r < Tile::kR; ++r) {
    const int64_t token = tile.query_begin + group + 16 * r;
    A scale = static_cast<A>(params.softmax_scale) * q_scale;
    if (q_inverse != nullptr) {
      const A inverse = token < tile.query_end ? q_inverse[token] : A(0);
      const A product =
          remove_radial_part<Tile>(grad[r], shared.first_rows[group + 16 * r], inverse);
      if (token < tile.query_end && lane == 0) {
        static_cast<A*>(params.grad_q_scale_parts)[head * params.query_count + token] =
            product * static_cast<A>(params.softmax_scale);
      }
      scale *= inverse;
    }
    if (token >= tile.query_end) continue;
    store_plain_row<T, Tile>(
        static_cast<T*>(params.grad_q) +
            contiguous_offset<kDim>(head, params.heads, params.query_count, token),
        grad[r], scale);
  }
}

template <class T, int kDim>
__global__ void __launch_bounds__(kPlainThreads, 2)
    attention_grad_keys_plain(AttentionBackwardCuda params, TileList<KeyTile> list) {
  using A = AttentionArithmetic<T>;
  using Shared = PlainBackwardShared<A, kDim>;
  using Tile = typename Shared::Tile;
  Shared& shared = *dynamic_shared<Shared>();
  const KeyTile tile = tile_of_block(list);
  const int64_t head = head_of_block(list);
  const int group = static_cast<int>(threadIdx.x) / 8, lane = static_cast<int>(threadIdx.x) % 8;
  const int tokens = static_cast<int>(params.query_count);
  const T* queries = head_of<T>(params.q, head, params.heads);
  const T* grads_out = head_of<T>(params.grad_out, head, params.heads);
  const A* logsumexp = static_cast<const A*>(params.logsumexp) + head * params.query_count;
  const A* delta = static_cast<const A*>(params.delta) + head * params.query_count;
  const A* q_inverse = head_part<A>(params.q_inverse_lengths, head, params.query_count);
  const A* k_inverse = head_part<A>(params.k_inverse_lengths, head, params.query_count);
  const A q_scale = q_scale_of<A>(params.q_scale, head, params.heads);
  const A factor = static_cast<A>(params.softmax_scale * kAttentionLog2E) * q_scale;

  load_plain_rows<kDim>(shared.first_rows, head_of<T>(params.k, head, params.heads),
                        params.k.token_stride, tile.key_begin, tile.key_end, k_inverse);
  load_plain_rows<kDim>(shared.second_rows, head_of<T>(params.v, head, params.heads),
                        params.v.token_stride, tile.key_begin, tile.key_end);
  typename Tile::Vector grad_keys[Tile::kR][Tile::kGroups] = {};
  typename Tile::Vector grad_values[Tile::kR][Tile::kGroups] = {};

  for (int begin = tile.query_begin; begin < tokens; begin += Tile::kColumns) {
    __syncthreads();
    load_plain_rows<kDim>(shared.first_columns, queries, params.q.token_stride, begin, tokens,
                          q_inverse);
    load_plain_rows<kDim>(shared.second_columns, grads_out, params.grad_out.token_stride, begin,
                          tokens);
    __syncthreads();
    A scores[Tile::kR][Tile::kC], grads[Tile::kR][Tile::kC];
    plain_scores<Tile, kDim>(scores, shared.first_rows, shared.first_columns);
    plain_scores<Tile, kDim>(grads, shared.second_rows, shared.second_columns);
#pragma unroll
    for (int c = 0; c < Tile::kC; ++c) {
      const int query = begin + lane + 8 * c;
      const A base = query < tokens ? logsumexp[query] * A(kAttentionLog2E) : A(0);
      const A shift = query < tokens ? delta[query] : A(0);
#pragma unroll
      for (int r = 0; r < Tile::kR; ++r) {
        const A weight = query < tokens ? exp2_of(scores[r][c] * factor - base) : A(0);
        shared.weights[group + 16 * r][lane + 8 * c] = weight;
        shared.grad_scores[group + 16 * r][lane + 8 * c] = weight * (grads[r][c] - shift);
      }
    }
    __syncwarp();
    plain_accumulate<Tile>(grad_keys, shared.grad_scores, shared.first_columns);
    plain_accumulate<Tile>(grad_values, shared.weights, shared.second_columns);
  }

#pragma unroll
  for (int r = 0; r < Tile::kR; ++r) {
    const int64_t token = tile.key_begin + group + 16 * r;
    A scale = static_cast<A>(params.softmax_scale) * q_scale;
    if (k_inverse != nullptr) {
      const A inverse = token < tile.key_end ? k_inverse[token] : A(0);
      remove_radial_part<Tile>(grad_keys[r], shared.first_rows[group + 16 * r], inverse);
      scale *= inverse;
    }
    if (token >= tile.key_end) continue;
    const int64_t offset = contiguous_offset<kDim>(head, params.heads, params.query_count, token);
    store_plain_row<T, Tile>(static_cast<T*>(params.grad_k) + offset, grad_keys[r], scale);
    store_plain_row<T, Tile>(static_cast<T*>(params.grad_v) + offset, grad_values[r], A(1));
  }
}

}  // namespace flexvar
