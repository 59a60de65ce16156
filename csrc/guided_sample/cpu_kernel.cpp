// One row at a time, all of it in the nearest caches. Thresholds are found by bisecting the key
// range: a pass counts (or weighs) what lies above the middle, and passes turn cheap once the keys
// still in question have been copied out. The loops are plain, for the compiler to vectorise; only
// the copying of selected elements is written out for AVX-512.
#include "guided_sample/cpu_kernel.h"

#include "guided_sample/arithmetic.h"
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace flexvar::FLEXVAR_ISA {
namespace {

int32_t half_to_float_bits(uint16_t half) {
  const int32_t sign = static_cast<int32_t>(half & 0x8000u) << 16;
  const int32_t magnitude = (half & 0x7fff) << 13;
  const int32_t normal = magnitude + (112 << 23);
  // Subnormal: the mantissa behind 2^-14 and that taken off again, exact whatever the flush mode.
  const int32_t subnormal =
      __builtin_bit_cast(int32_t, __builtin_bit_cast(float, magnitude + (113 << 23)) - 0x1p-14f);
  const int32_t special = normal + (112 << 23);
  return sign | (magnitude >= 0x0f800000 ? special : magnitude < 0x00800000 ? subnormal : normal);
}

// Order keys of a row, and the largest of them.
int32_t load_keys(const GuidedSampleParams& params, int64_t row, int32_t* keys) {
  const int64_t n = params.vocabulary;
  if (params.element == FloatElement::float32) {
    const int32_t* bits = static_cast<const int32_t*>(params.logits) + row * n;
    for (int64_t i = 0; i < n; ++i) keys[i] = order_key(bits[i]);
  } else {
    const uint16_t* bits = static_cast<const uint16_t*>(params.logits) + row * n;
    if (params.element == FloatElement::bfloat16) {
      for (int64_t i = 0; i < n; ++i) {
        keys[i] = order_key(static_cast<int32_t>(static_cast<uint32_t>(bits[i]) << 16));
      }
    } else {
      for (int64_t i = 0; i < n; ++i) keys[i] = order_key(half_to_float_bits(bits[i]));
    }
  }
  int32_t largest = kMinusInfinityKey;
  for (int64_t i = 0; i < n; ++i) largest = keys[i] > largest ? keys[i] : largest;
  return largest;
}

// Copies the keys in [low, high] and their companions, in order; returns how many. The outputs may
// be the inputs, and need room for 16 more.
int64_t select(const int32_t* keys, const int32_t* companions, int64_t n, int32_t low, int32_t high,
               int32_t* keys_out, int32_t* companions_out) {
  int64_t count = 0;
#ifdef __AVX512F__
  const __m512i low_x16 = _mm512_set1_epi32(low), high_x16 = _mm512_set1_epi32(high);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 valid = i + 16 <= n ? 0xffff : static_cast<__mmask16>((1 << (n - i)) - 1);
    const __m512i key = _mm512_maskz_loadu_epi32(valid, keys + i);
    const __m512i companion = _mm512_maskz_loadu_epi32(valid, companions + i);
    __mmask16 inside = _mm512_mask_cmpge_epi32_mask(valid, key, low_x16);
    inside = _mm512_mask_cmple_epi32_mask(inside, key, high_x16);
    _mm512_storeu_si512(keys_out + count, _mm512_maskz_compress_epi32(inside, key));
    _mm512_storeu_si512(companions_out + count, _mm512_maskz_compress_epi32(inside, companion));
    count += __builtin_popcount(inside);
  }
#else
  for (int64_t i = 0; i < n; ++i) {
    const int32_t key = keys[i], companion = companions[i];
    keys_out[count] = key;
    companions_out[count] = companion;
    count += key >= low && key <= high;
  }
#endif
  return count;
}

struct Mass {
  int64_t tokens;
  int64_t weight;
};

// Of the keys >= key. Weight is the number of tokens when there are no weights.
Mass mass_from(const int32_t* keys, const int32_t* weights, int64_t n, int32_t key) {
  int32_t tokens = 0;
  if (weights == nullptr) {
    for (int64_t i = 0; i < n; ++i) tokens += keys[i] >= key;
    return {tokens, tokens};
  }
  int64_t weight = 0;
  for (int64_t i = 0; i < n; ++i) {
    tokens += keys[i] >= key;
    weight += keys[i] >= key ? weights[i] : 0;
  }
  return {tokens, weight};
}

// The threshold of the tokens with less than limit mass before them; 0 < limit <= the mass of all.
// `weights` null: every token weighs 1. `spare`: room for twice n + 16.
Threshold find_threshold(const int32_t* keys, const int32_t* weights, int64_t n, int32_t largest,
                         float maximum, int64_t limit, int32_t* spare) {
  // The mass from `low` on is at least limit, that from `high` on is less.
  int64_t low = kMinusInfinityKey, high = int64_t{largest} + 1;
  Mass from_low{n, 0}, from_high{0, 0}, beyond{0, 0};  // beyond: what is no longer in `keys`
  bool copied = false;
  while (high - low > 1) {
    const int64_t middle = (low + high) >> 1;
    Mass from_middle = mass_from(keys, weights, n, static_cast<int32_t>(middle));
    from_middle.tokens += beyond.tokens;
    from_middle.weight += beyond.weight;
    if (from_middle.weight >= limit) {
      low = middle;
      from_low = from_middle;
    } else {
      high = middle;
      from_high = from_middle;
    }
    if (!copied && from_low.tokens - from_high.tokens <= n / 8) {
      int32_t* const spare_weights = spare + n + 16;
      n = select(keys, weights != nullptr ? weights : keys, n, static_cast<int32_t>(low),
                 static_cast<int32_t>(high - 1), spare, spare_weights);
      keys = spare;
      weights = weights != nullptr ? spare_weights : nullptr;
      beyond = from_high;
      copied = true;
    }
  }
  const auto key = static_cast<int32_t>(low);
  const int64_t weight = weights == nullptr ? 1 : token_weight(logit_of_key(key), maximum);
  return {key, (limit - from_high.weight + weight - 1) / weight};
}

// Keeps the tokens that the threshold keeps, in place and in order; returns how many.
int64_t keep(int32_t* keys, int32_t* tokens, int64_t n, Threshold threshold) {
  n = select(keys, tokens, n, threshold.key, kInfinityKey, keys, tokens);
  int64_t at_threshold = 0;
  for (int64_t i = 0; i < n; ++i) at_threshold += keys[i] == threshold.key;
  if (at_threshold <= threshold.ties) return n;
  int64_t count = 0, ties = threshold.ties;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t key = keys[i], token = tokens[i];
    const bool tie = key == threshold.key;
    keys[count] = key;
    tokens[count] = token;
    count += !tie || ties > 0;
    ties -= tie;
  }
  return count;
}

int64_t weigh(const int32_t* keys, int64_t n, float maximum, int32_t* weights) {
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) {
    const auto weight = static_cast<int32_t>(token_weight(logit_of_key(keys[i]), maximum));
    weights[i] = weight;
    total += weight;
  }
  return total;
}

// The first element whose inclusive cumulative weight exceeds `draw`.
int64_t find_drawn(const int32_t* weights, int64_t n, int64_t draw) {
  constexpr int64_t kBlock = 128;
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    int64_t sum = 0;
    for (int64_t j = 0; j < kBlock; ++j) sum += weights[i + j];
    if (sum > draw) break;
    draw -= sum;
  }
  while (i < n - 1 && weights[i] <= draw) draw -= weights[i++];
  return i;
}

int64_t sample_row(const GuidedSampleParams& params, int64_t row, int32_t* scratch) {
  int64_t n = params.vocabulary;
  const int64_t stride = n + 16;
  int32_t* const keys = scratch;
  int32_t* const tokens = scratch + stride;
  int32_t* const weights = scratch + 2 * stride;
  int32_t* const spare = scratch + 3 * stride;

  int32_t largest = load_keys(params, row, keys);
  if (largest == kMinusInfinityKey) return -1;
  if (largest == kInfinityKey) {
    for (int64_t i = 0; i < n; ++i) keys[i] = key_beside_infinity(keys[i]);
    largest = 0;
  }
  const float maximum = logit_of_key(largest);
  if (params.top_k == 1) {
    int64_t i = 0;
    while (keys[i] != largest) ++i;
    return i;
  }
  for (int64_t i = 0; i < n; ++i) tokens[i] = static_cast<int32_t>(i);
  if (params.top_k > 0 && params.top_k < n) {
    n = keep(keys, tokens, n,
             find_threshold(keys, nullptr, n, largest, maximum, params.top_k, spare));
  }
  int64_t total = weigh(keys, n, maximum, weights);
  if (params.top_p > 0 && params.top_p < 1) {
    const int64_t limit = mass_limit(total, params.top_p);
    n = keep(keys, tokens, n, find_threshold(keys, weights, n, largest, maximum, limit, spare));
    total = weigh(keys, n, maximum, weights);
  }
  const int64_t image = row / params.length, position = row % params.length;
  const int64_t draw = scaled_draw(
      random_number(params.seeds[image], params.image_ids[image], params.step, position), total);
  return tokens[find_drawn(weights, n, draw)];
}

}  // namespace

void guided_sample_rows(const GuidedSampleParams& params, int64_t begin, int64_t end,
                        int32_t* scratch) {
  for (int64_t row = begin; row < end; ++row) params.tokens[row] = sample_row(params, row, scratch);
}

}  // namespace flexvar::FLEXVAR_ISA
