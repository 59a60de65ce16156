// Backward pass of one head. With P = softmax, dP = dO V^T and delta = sum(dO * O) per query:
//   dV = P^T dO,  dS = P * (dP - delta),  dQ = scale * dS K,  dK = scale * dS^T Q.
// Tiles of queries are taken in order, so that every sum has one order.
#pragma once

#include "scale_attention/cpu_forward.h"

namespace flexvar::FLEXVAR_ISA {

template <typename T, typename E>
class BackwardHeads {
 public:
  BackwardHeads(const AttentionBackwardParams& params, void* memory)
      : params_(params), shape_(params.shape) {
    Scratch scratch{static_cast<char*>(memory)};
    keys_ = scratch.take<T>(shape_.key_count * shape_.dim);
    values_ = scratch.take<T>(shape_.key_count * shape_.dim);
    grad_keys_ = scratch.take<T>(shape_.key_count * shape_.dim);
    grad_values_ = scratch.take<T>(shape_.key_count * shape_.dim);
    query_rows_ = scratch.take<T>(kTile * shape_.dim);
    queries_ = scratch.take<T>(kTile * shape_.dim);
    grad_rows_ = scratch.take<T>(kTile * shape_.dim);
    grads_ = scratch.take<T>(kTile * shape_.dim);
    grad_queries_ = scratch.take<T>(kTile * shape_.dim);
    weights_ = scratch.take<T>(kKeyBlock * kTile);
    grad_scores_ = scratch.take<T>(kKeyBlock * kTile);
    delta_ = scratch.take<T>(kTile);
    logsumexp_ = scratch.take<T>(kTile);
  }

  void run(int64_t head) {
    const int64_t size = shape_.key_count * shape_.dim;
    load_rows(keys_, head_rows<E>(params_.k, head, shape_.heads), 0, shape_.key_count, shape_.dim);
    load_rows(values_, head_rows<E>(params_.v, head, shape_.heads), 0, shape_.key_count,
              shape_.dim);
    for (int64_t i = 0; i < size; ++i) grad_keys_[i] = grad_values_[i] = 0;
    for (int64_t t = 0; t < shape_.tile_count; ++t) run_tile(head, shape_.tiles[t]);
    const T scale = static_cast<T>(shape_.softmax_scale), one = 1;
    store_rows(static_cast<E*>(params_.grad_k), grad_keys_, &scale, 0, head, shape_,
               shape_.key_count, 0, shape_.key_count);
    store_rows(static_cast<E*>(params_.grad_v), grad_values_, &one, 0, head, shape_,
               shape_.key_count, 0, shape_.key_count);
  }

 private:
  void run_tile(int64_t head, const QueryTile& tile) {
    const int64_t dim = shape_.dim, queries = tile.query_end - tile.query_begin;
    const int64_t vectors = (queries + kLanes<T> - 1) / kLanes<T>, columns = dim / kLanes<T>;
    load_tile(head, tile);
    for (int64_t begin = 0; begin < tile.key_end; begin += kKeyBlock) {
      const int64_t keys = tile.key_end - begin < kKeyBlock ? tile.key_end - begin : kKeyBlock;
      T* block_keys = keys_ + begin * dim;
      multiply<T>({block_keys, dim}, {queries_, kTile}, {weights_, kTile}, keys, vectors, dim,
                  false);
      multiply<T>({values_ + begin * dim, dim}, {grads_, kTile}, {grad_scores_, kTile}, keys,
                  vectors, dim, false);
      differentiate_softmax(keys, vectors);
      multiply<T>({weights_, kTile}, {grad_rows_, dim}, {grad_values_ + begin * dim, dim}, keys,
                  columns, queries, true);
      multiply<T>({grad_scores_, kTile}, {query_rows_, dim}, {grad_keys_ + begin * dim, dim}, keys,
                  columns, queries, true);
      multiply<T>({grad_scores_, 1, kTile}, {block_keys, dim}, {grad_queries_, dim}, queries,
                  columns, keys, begin > 0);
    }
    const T scale = static_cast<T>(shape_.softmax_scale);
    store_rows(static_cast<E*>(params_.grad_q), grad_queries_, &scale, 0, head, shape_,
               shape_.query_count, tile.query_begin, queries);
  }

  void load_tile(int64_t head, const QueryTile& tile) {
    const int64_t dim = shape_.dim, queries = tile.query_end - tile.query_begin;
    load_rows(query_rows_, head_rows<E>(params_.q, head, shape_.heads), tile.query_begin,
              tile.query_end, dim);
    load_rows(grad_rows_, head_rows<E>(params_.grad_out, head, shape_.heads), tile.query_begin,
              tile.query_end, dim);
    transpose_rows(queries_, query_rows_, queries, dim, T(shape_.softmax_scale < 0 ? -1 : 1));
    transpose_rows(grads_, grad_rows_, queries, dim, T(1));
    const HeadRows<E> out = head_rows<E>(params_.out, head, shape_.heads);
    const T* logsumexp =
        static_cast<const T*>(params_.logsumexp) + head * shape_.query_count + tile.query_begin;
    for (int64_t i = 0; i < kTile; ++i) {
      T delta = 0;
      for (int64_t d = 0; i < queries && d < dim; ++d) {
        delta +=
            grad_rows_[i * dim + d] * to_float(out.data[(tile.query_begin + i) * out.stride + d]);
      }
      delta_[i] = delta;
      logsumexp_[i] = i < queries ? static_cast<T>(double{logsumexp[i]} * kLog2E) : 0;
    }
  }

  // weights_ from scores to P, grad_scores_ from dP to dS.
  void differentiate_softmax(int64_t keys, int64_t vectors) {
    const T factor = static_cast<T>(__builtin_fabs(shape_.softmax_scale) * kLog2E);
    for (int64_t j = 0; j < vectors * kLanes<T>; j += kLanes<T>) {
      const Vector<T> logsumexp = load(logsumexp_ + j), delta = load(delta_ + j);
      for (int64_t n = 0; n < keys; ++n) {
        T *weight = weights_ + n * kTile + j, *grad = grad_scores_ + n * kTile + j;
        // No weight is above 1; where logits are so large that theirs rounds to more, it is 1.
        Vector<T> exponent = load(weight) * factor - logsumexp;
        exponent = exponent > 0 ? Vector<T>{} : exponent;
        const Vector<T> p = exp2_nonpositive(exponent);
        store(weight, p);
        store(grad, p * (load(grad) - delta));
      }
    }
  }

  const AttentionBackwardParams& params_;
  const AttentionShape& shape_;
  T *keys_, *values_, *grad_keys_, *grad_values_;  // [keys, dim] of the head at hand
  T *query_rows_, *grad_rows_, *grad_queries_;     // [kTile, dim]
  T *queries_, *grads_;                            // [dim, kTile]: Q^T and dO^T
  T *weights_, *grad_scores_;                      // [kKeyBlock, kTile]
  T *delta_, *logsumexp_;                          // [kTile]; the latter in base 2
};

}  // namespace flexvar::FLEXVAR_ISA
