// Forward pass of bfloat16 attention on the tile unit (common/cpu_amx.h), arranged as in
// cpu_forward.h: everything of a tile of queries is transposed, so that a vector holds many
// queries.
#include "scale_attention/cpu_amx.h"

#include "common/cpu_amx.h"
#include "scale_attention/cpu_forward.h"

namespace flexvar::FLEXVAR_ISA {
namespace {

constexpr int64_t kTileFloats = kTileBytes / 4;
constexpr int64_t kQueryTiles = kTile / kTileRows;

class TileForward {
 public:
  TileForward(const AttentionForwardParams& params, void* memory)
      : params_(params), shape_(params.shape), steps_(shape_.dim / kTileDepth) {
    Scratch scratch{static_cast<char*>(memory)};
    const int64_t keys = (shape_.key_count + kKeyBlock - 1) / kKeyBlock * kKeyBlock;
    keys_ = scratch.take<char>(keys * shape_.dim * 2);
    values_ = scratch.take<char>(keys * shape_.dim * 2);
    queries_ = scratch.take<char>(kTile * shape_.dim * 2);
    out_ = scratch.take<float>(kTile * shape_.dim);
    scores_ = scratch.take<float>(kKeyBlock * kTile);
    weights_ = scratch.take<char>(kKeyBlock * kTile * 2);
    maximum_ = scratch.take<float>(kTile);
    sum_ = scratch.take<float>(kTile);
    correction_ = scratch.take<float>(kTile);
    factor_ = static_cast<float>(__builtin_fabs(shape_.softmax_scale) * kLog2E);
  }

  void run(int64_t item) {
    const int64_t head = item / shape_.tile_count;
    const QueryTile tile = shape_.tiles[item % shape_.tile_count];
    pack_keys(head, tile.key_end);
    const int64_t queries = tile.query_end - tile.query_begin;
    query_tiles_ = (queries + kTileRows - 1) / kTileRows;
    pack_queries(head, tile);
    for (int64_t i = 0; i < kTile; ++i) {
      maximum_[i] = -__builtin_inff();
      sum_[i] = 0;
    }
    for (int64_t begin = 0; begin < tile.key_end; begin += kKeyBlock) {
      const int64_t keys = tile.key_end - begin < kKeyBlock ? tile.key_end - begin : kKeyBlock;
      score(begin, keys);
      const bool is_corrected = softmax(keys);
      if (begin > 0 && is_corrected) correct_out();
      multiply_values(begin, keys, begin > 0);
    }
    finish(head, tile);
  }

 private:
  // Tiles of a head come in order of their keys, and a head's keys are packed once. Keys are left
  // panels [tiles of 16 keys][dim / 32]; values are left tiles of their transpose,
  // [32 keys][dim / 16]: 16 columns of the values, 32 keys each.
  void pack_keys(int64_t head, int64_t end) {
    if (head != packed_head_) packed_keys_ = 0;
    packed_head_ = head;
    if (end <= packed_keys_) return;
    const HeadRows<Bfloat16> keys = head_rows<Bfloat16>(params_.k, head, shape_.heads);
    const HeadRows<Bfloat16> values = head_rows<Bfloat16>(params_.v, head, shape_.heads);
    // Tiles that were not full may be now.
    for (int64_t t = packed_keys_ / kTileDepth * kTileDepth; t < end; t += kTileRows) {
      pack_left_panel<1>(keys_ + t / kTileRows * steps_ * kTileBytes, keys.data + t * keys.stride,
                         keys.stride, end - t, shape_.dim);
    }
    for (int64_t t = packed_keys_ / kTileDepth * kTileDepth; t < end; t += kTileDepth) {
      for (int64_t d = 0; d < shape_.dim; d += kTileRows) {
        Vector<float> square[kTileRows];
#pragma GCC unroll 16
        for (int64_t i = 0; i < kTileRows; ++i) {
          // A bfloat16 as a float is its bits and 16 zeros below.
          const int64_t key = t + 2 * i;
          const Bfloat16* const row = values.data + key * values.stride + d;
          const Bits32 first = key < end ? (Bits32)load(row) >> 16 : Bits32{};
          const Bits32 second = key + 1 < end ? (Bits32)load(row + values.stride) : Bits32{};
          square[i] = (Vector<float>)(first | second);
        }
        transpose<float>(square);
        char* const place =
            values_ + (t / kTileDepth * (shape_.dim / kTileRows) + d / kTileRows) * kTileBytes;
#pragma GCC unroll 16
        for (int64_t i = 0; i < kTileRows; ++i) {
          _mm512_store_si512(place + i * 64, (__m512i)square[i]);
        }
      }
    }
    packed_keys_ = end;
  }

  // Right panels [tiles of 16 queries][dim / 32].
  void pack_queries(int64_t head, const QueryTile& tile) {
    const HeadRows<Bfloat16> rows = head_rows<Bfloat16>(params_.q, head, shape_.heads);
    for (int64_t i = 0; i < query_tiles_; ++i) {
      const int64_t begin = tile.query_begin + i * kTileRows;
      pack_right_panel<1>(queries_ + i * steps_ * kTileBytes, rows.data + begin * rows.stride,
                          rows.stride, tile.query_end - begin, shape_.dim);
    }
    if (shape_.softmax_scale < 0) {
      const __m512i sign = _mm512_set1_epi32(static_cast<int>(0x80008000));
      for (int64_t i = 0; i < query_tiles_ * steps_ * kTileBytes; i += 64) {
        _mm512_store_si512(queries_ + i, _mm512_xor_si512(_mm512_load_si512(queries_ + i), sign));
      }
    }
  }

  float* score_tile(int64_t key_tile, int64_t query_tile) const {
    return scores_ + (key_tile * kQueryTiles + query_tile) * kTileFloats;
  }
  float* out_tile(int64_t column_tile, int64_t query_tile) const {
    return out_ + (column_tile * kQueryTiles + query_tile) * kTileFloats;
  }

  // Products of two left tiles with all right panels of the queries.
  template <typename Sums>
  void multiply_all(const LeftTiles& left, const char* right, int64_t right_bytes, int64_t steps,
                    bool accumulate, const Sums& sums) const {
    for (int64_t i = 0; i < query_tiles_; i += 2, right += 2 * right_bytes) {
      const char* const panels[2] = {right, right + right_bytes};
      float* const out[2][2] = {{sums(0, i), sums(0, i + 1)}, {sums(1, i), sums(1, i + 1)}};
      if (i + 1 < query_tiles_) {
        multiply_tiles<1, 2>(left, panels, out, steps, accumulate);
      } else {
        multiply_tiles<1, 1>(left, panels, out, steps, accumulate);
      }
    }
  }

  // scores_: [key, query] by tiles. Tiles of keys go in pairs; a second one that does not exist
  // gives scores that nobody reads.
  void score(int64_t begin, int64_t keys) {
    for (int64_t t = 0; t < keys; t += 2 * kTileRows) {
      const char* const tile = keys_ + (begin + t) / kTileRows * steps_ * kTileBytes;
      const LeftTiles left{{tile, tile + steps_ * kTileBytes}, kPanelSteps<1>};
      multiply_all(left, queries_, steps_ * kTileBytes, steps_, false,
                   [&](int64_t i, int64_t j) { return score_tile(t / kTileRows + i, j); });
    }
  }

  // From scores_ to weights_, relative to the new maximum: right panels [tiles of 16 queries] of up
  // to 64 keys in pairs. Returns whether a sum has to be corrected.
  bool softmax(int64_t keys) {
    constexpr int64_t lanes = kFloatLanes;
    bool is_corrected = false;
    for (int64_t q = 0; q < query_tiles_; ++q) {
      const float* const scores = score_tile(0, q);
      const auto at = [&](int64_t n) __attribute__((always_inline)) {
        return load(scores + n / kTileRows * kQueryTiles * kTileFloats + n % kTileRows * lanes);
      };
      const Vector<float> before = load(maximum_ + q * lanes);
      Vector<float> maximum = before;
      for (int64_t n = 0; n < keys; ++n) {
        const Vector<float> score = at(n);
        maximum = score > maximum ? score : maximum;
      }
      store(maximum_ + q * lanes, maximum);
      // -inf, the maximum of no finite score, is no number to subtract. Differences are scaled, not
      // scores, as in cpu_forward.h: the correction of a maximum that stays is exactly 1.
      const float none = -__builtin_inff(), factor = 2 * factor_;
      const Vector<float> base = maximum == none ? Vector<float>{} : maximum * 0.5f;
      const Vector<float> correction =
          before == none ? Vector<float>{} : exp2_nonpositive((before * 0.5f - base) * factor);
      is_corrected |= _mm512_cmp_ps_mask((__m512)correction, _mm512_set1_ps(1), _CMP_NEQ_UQ) != 0;
      Vector<float> sum = load(sum_ + q * lanes) * correction;
      char* place = weights_ + q * (kKeyBlock / kTileDepth) * kTileBytes;
      const int64_t padded = (keys + kTileDepth - 1) / kTileDepth * kTileDepth;
      for (int64_t n = 0; n < padded; n += 2, place += 64) {
        Vector<float> pair[2] = {};
        if (n < keys) pair[0] = exp2_for_bfloat16((at(n) * 0.5f - base) * factor);
        if (n + 1 < keys) pair[1] = exp2_for_bfloat16((at(n + 1) * 0.5f - base) * factor);
        sum += pair[0] + pair[1];
        // Rounded half up; no weight is negative.
        const Bits32 low = ((Bits32)pair[0] + 0x8000) >> 16;
        const Bits32 high = ((Bits32)pair[1] + 0x8000) & 0xffff0000;
        _mm512_store_si512(place, (__m512i)(low | high));
      }
      store(correction_ + q * lanes, correction);
      store(sum_ + q * lanes, sum);
    }
    return is_corrected;
  }

  void correct_out() {
    for (int64_t q = 0; q < query_tiles_; ++q) {
      const Vector<float> correction = load(correction_ + q * kFloatLanes);
      for (int64_t d = 0; d < shape_.dim / kTileRows; ++d) {
        float* const tile = out_tile(d, q);
        for (int64_t i = 0; i < kTileFloats; i += kFloatLanes) {
          store(tile + i, load(tile + i) * correction);
        }
      }
    }
  }

  // out_, [column, query] by tiles, (+)= values^T weights_
  void multiply_values(int64_t begin, int64_t keys, bool accumulate) {
    const int64_t column_tiles = shape_.dim / kTileRows;
    const int64_t key_steps[2] = {0, column_tiles * kTileBytes};
    const char* const block = values_ + begin / kTileDepth * column_tiles * kTileBytes;
    for (int64_t d = 0; d < column_tiles; d += 2) {
      const LeftTiles left{{block + d * kTileBytes, block + (d + 1) * kTileBytes}, key_steps};
      multiply_all(left, weights_, kKeyBlock / kTileDepth * kTileBytes,
                   (keys + kTileDepth - 1) / kTileDepth, accumulate,
                   [&](int64_t i, int64_t j) { return out_tile(d + i, j); });
    }
  }

  void finish(int64_t head, const QueryTile& tile) {
    const int64_t queries = tile.query_end - tile.query_begin;
    if (params_.logsumexp != nullptr) {
      float* const logsumexp =
          static_cast<float*>(params_.logsumexp) + head * shape_.query_count + tile.query_begin;
      for (int64_t i = 0; i < queries; ++i) {
        logsumexp[i] = logsumexp_of(maximum_[i], factor_, sum_[i]);
      }
    }
    const int64_t stride = shape_.heads * shape_.dim;
    Bfloat16* const out = static_cast<Bfloat16*>(params_.out) +
                          (head / shape_.heads * shape_.query_count + tile.query_begin) * stride +
                          head % shape_.heads * shape_.dim;
    for (int64_t q = 0; q < query_tiles_; ++q) {
      const Vector<float> inverse = 1.0f / load(sum_ + q * kFloatLanes);
      for (int64_t d = 0; d < shape_.dim / kTileRows; ++d) {
        Vector<float> square[kTileRows];
#pragma GCC unroll 16
        for (int64_t i = 0; i < kTileRows; ++i) {
          square[i] = load(out_tile(d, q) + i * kFloatLanes) * inverse;
        }
        transpose<float>(square);
        for (int64_t i = 0; i < kTileRows && q * kTileRows + i < queries; ++i) {
          store_result(out + (q * kTileRows + i) * stride + d * kTileRows, square[i], kFloatLanes);
        }
      }
    }
  }

  const AttentionForwardParams& params_;
  const AttentionShape& shape_;
  const int64_t steps_;  // tiles of the depth of a product with keys
  char *keys_, *values_, *queries_, *weights_;
  float *out_, *scores_;
  float *maximum_, *sum_, *correction_;  // [kTile], see RunningSoftmax
  float factor_;
  int64_t query_tiles_ = 0;
  int64_t packed_head_ = -1, packed_keys_ = 0;
};

}  // namespace

void attention_forward_bfloat16(const AttentionForwardParams& params, int64_t begin, int64_t end,
                                void* scratch) {
  const TileScope scope;
  TileForward tiles(params, scratch);
  for (int64_t item = begin; item < end; ++item) tiles.run(item);
}

}  // namespace flexvar::FLEXVAR_ISA
