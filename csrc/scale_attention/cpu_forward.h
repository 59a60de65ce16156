// Forward pass of one tile of queries with online softmax. Scores are held transposed, [key,
// query], so that a vector holds many queries of one key: maxima and sums over keys never cross
// lanes.
#pragma once

#include "scale_attention/cpu_exp2.h"
#include "scale_attention/cpu_pairs.h"

namespace flexvar::FLEXVAR_ISA {

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

inline float log_of(float x) { return __builtin_logf(x); }
inline double log_of(double x) { return __builtin_log(x); }

// The running softmax of a tile's queries. Scores s enter as 2^(factor * s), factor >= 0.
template <typename T>
struct RunningSoftmax {
  T factor;
  T* maximum;     // [kTile], of the scores so far
  T* sum;         // [kTile], of the exponentials so far, relative to the maximum
  T* correction;  // [kTile]: what earlier sums must be multiplied by after a block
};

// 2^x, as exactly as a weight that is multiplied as E needs it.
template <typename E, typename V>
static inline __attribute__((always_inline)) V exponential(V x) {
#ifdef __AVX512BF16__
  if constexpr (__is_same(E, Bfloat16)) return exp2_for_bfloat16(x);
#endif
  return exp2_nonpositive(x);
}

// Of a row, rounded once: what it is wrong by is a relative error of the backward pass's weights.
template <typename T>
static inline T logsumexp_of(T maximum, T factor, T sum) {
  return static_cast<T>(double{maximum} * (double{factor} * kLn2) + double{log_of(sum)});
}

constexpr int kChains = 4;  // of sums over a block's keys

// Turns a block of scores [keys, kTile] into exponentials relative to the new maximum.
template <typename T, typename E>
inline void softmax_block(const RunningSoftmax<T>& state, T* scores, int64_t keys,
                          int64_t vectors) {
  for (int64_t j = 0; j < vectors * kLanes<T>; j += kLanes<T>) {
    const Vector<T> before = load(state.maximum + j);
    Vector<T> maximum = before;
    for (int64_t n = 0; n < keys; ++n) {
      const Vector<T> score = load(scores + n * kTile + j);
      maximum = larger(score, maximum);
    }
    store(state.maximum + j, maximum);
    // -inf, the maximum of no finite score, is no number to subtract. Differences are scaled, not
    // scores: a product less a rounded product would not be 0 for the maximum itself, and what is
    // wrong with a correction multiplies with every block. Halves, as a difference may overflow.
    const T none = -__builtin_inf(), half = 0.5, factor = 2 * state.factor;
    const Vector<T> base = maximum == none ? Vector<T>{} : maximum * half;
    const Vector<T> correction =
        before == none ? Vector<T>{} : exp2_nonpositive((before * half - base) * factor);
    // One long chain would lose the many weights that are too small beside the largest.
    Vector<T> sums[kChains] = {};
    const auto weigh = [&](int64_t n, int chain) __attribute__((always_inline)) {
      T* score = scores + n * kTile + j;
      const Vector<T> weight = exponential<E>((load(score) * half - base) * factor);
      store(score, weight);
      sums[chain] += weight;
    };
    int64_t n = 0;
    for (; n + kChains <= keys; n += kChains) {
#pragma GCC unroll 4
      for (int chain = 0; chain < kChains; ++chain) weigh(n + chain, chain);
    }
    for (; n < keys; ++n) weigh(n, 0);
    store(state.correction + j, correction);
    store(state.sum + j,
          load(state.sum + j) * correction + ((sums[0] + sums[1]) + (sums[2] + sums[3])));
  }
}

template <typename T, typename E>
class ForwardTiles {
 public:
  ForwardTiles(const AttentionForwardParams& params, void* memory)
      : params_(params), shape_(params.shape), entries_(kPairs ? shape_.dim / 2 : shape_.dim) {
    Scratch scratch{static_cast<char*>(memory)};
    keys_ = scratch.take<T>(shape_.key_count * shape_.dim);
    values_ = scratch.take<T>(shape_.key_count * shape_.dim);
    query_rows_ = scratch.take<T>(kTile * shape_.dim);
    queries_ = scratch.take<T>(kTile * shape_.dim);
    out_ = query_rows_;  // the rows are done with once they are transposed
    scores_ = scratch.take<T>(kKeyBlock * kTile);
    softmax_.factor = static_cast<T>(__builtin_fabs(shape_.softmax_scale) * kLog2E);
    softmax_.maximum = scratch.take<T>(kTile);
    softmax_.sum = scratch.take<T>(kTile);
    softmax_.correction = scratch.take<T>(kTile);
  }

  void run(int64_t item) {
    const int64_t head = item / shape_.tile_count;
    const QueryTile tile = shape_.tiles[item % shape_.tile_count];
    pack_keys(head, tile.key_end);
    const int64_t queries = tile.query_end - tile.query_begin;
    const int64_t vectors = (queries + kLanes<T> - 1) / kLanes<T>;
    pack_queries(head, tile);
    for (int64_t i = 0; i < kTile; ++i) {
      softmax_.maximum[i] = -__builtin_inf();
      softmax_.sum[i] = 0;
    }
    for (int64_t begin = 0; begin < tile.key_end; begin += kKeyBlock) {
      const int64_t keys = tile.key_end - begin < kKeyBlock ? tile.key_end - begin : kKeyBlock;
      multiply<T, Entry>({reinterpret_cast<const Entry*>(keys_) + begin * entries_, entries_},
                         {queries_, kTile}, {scores_, kTile}, keys, vectors, entries_, false);
      softmax_block<T, E>(softmax_, scores_, keys, vectors);
      for (int64_t i = 0; begin > 0 && i < queries; ++i) {
        for (int64_t d = 0; d < shape_.dim; ++d) out_[i * shape_.dim + d] *= softmax_.correction[i];
      }
      multiply_values(begin, keys, queries, vectors);
    }
    finish(head, tile);
  }

 private:
  // Tiles of a head come in order of their keys, and a head's keys are packed once.
  void pack_keys(int64_t head, int64_t end) {
    if (head != packed_head_) packed_keys_ = 0;
    packed_head_ = head;
    if (end <= packed_keys_) return;
    const HeadRows<E> keys = head_rows<E>(params_.k, head, shape_.heads);
    const HeadRows<E> values = head_rows<E>(params_.v, head, shape_.heads);
    const int64_t begin = packed_keys_;
    if constexpr (kPairs) {
      const int64_t even = begin / 2 * 2;  // a row without a partner may have one now
      pack_row_pairs(keys_ + begin * entries_, keys, begin, end, shape_.dim);
      pack_column_pairs(values_ + even * entries_, values, even, end, shape_.dim);
    } else {
      load_rows(keys_ + begin * shape_.dim, keys, begin, end, shape_.dim);
      load_rows(values_ + begin * shape_.dim, values, begin, end, shape_.dim);
    }
    packed_keys_ = end;
  }

  void pack_queries(int64_t head, const QueryTile& tile) {
    const HeadRows<E> rows = head_rows<E>(params_.q, head, shape_.heads);
    const int64_t queries = tile.query_end - tile.query_begin;
    if constexpr (kPairs) {
      pack_row_pairs(query_rows_, rows, tile.query_begin, tile.query_end, shape_.dim);
      transpose_pairs(queries_, query_rows_, queries, shape_.dim, shape_.softmax_scale < 0);
    } else {
      load_rows(query_rows_, rows, tile.query_begin, tile.query_end, shape_.dim);
      transpose_rows(queries_, query_rows_, queries, shape_.dim,
                     T(shape_.softmax_scale < 0 ? -1 : 1));
    }
  }

  // out_ += (scores_ of the block)^T values
  void multiply_values(int64_t begin, int64_t keys, int64_t queries, int64_t vectors) {
    if constexpr (kPairs) {
      pair_rows(scores_, keys, vectors);
      keys = (keys + 1) / 2;
    }
    multiply<T, Entry>({reinterpret_cast<const Entry*>(scores_), 1, kTile},
                       {values_ + begin * entries_, shape_.dim}, {out_, shape_.dim}, queries,
                       shape_.dim / kLanes<T>, keys, begin > 0);
  }

  void finish(int64_t head, const QueryTile& tile) {
    const int64_t queries = tile.query_end - tile.query_begin;
    if (params_.logsumexp != nullptr) {
      T* logsumexp =
          static_cast<T*>(params_.logsumexp) + head * shape_.query_count + tile.query_begin;
      for (int64_t i = 0; i < queries; ++i) {
        logsumexp[i] = logsumexp_of(softmax_.maximum[i], softmax_.factor, softmax_.sum[i]);
      }
    }
    T* inverse = softmax_.correction;
    for (int64_t i = 0; i < queries; ++i) inverse[i] = 1 / softmax_.sum[i];
    store_rows(static_cast<E*>(params_.out), out_, inverse, 1, head, shape_, shape_.query_count,
               tile.query_begin, queries);
  }

  using Entry = typename Packing<T, E>::Entry;
  static constexpr bool kPairs = Packing<T, E>::pairs;

  const AttentionForwardParams& params_;
  const AttentionShape& shape_;
  const int64_t entries_;     // of a row of D elements
  T *keys_, *values_;         // [keys, dim] of the head at hand, of pairs half as many
  T *query_rows_, *queries_;  // [kTile, dim] and [dim, kTile]
  T* out_;                    // [kTile, dim], relative to the running maximum
  T* scores_;                 // [kKeyBlock, kTile]
  RunningSoftmax<T> softmax_;
  int64_t packed_head_ = -1, packed_keys_ = 0;
};

}  // namespace flexvar::FLEXVAR_ISA
