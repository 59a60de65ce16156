#include "group_norm_silu/cpu_kernel.h"

#include "common/cpu_exp2.h"
#include "common/cpu_vector.h"

namespace flexvar::FLEXVAR_ISA {

constexpr int64_t kUnroll = 4;  // sums under way at a time: additions are slow to finish
constexpr int64_t kStep = kUnroll * kFloatLanes;
static_assert(group_norm_row(1) % kStep == 0);
constexpr float kMinusLog2E = -1.44269504f;

// --- SiLU ----------------------------------------------------------------------------------------

// 1 + exp(-y), as exactly as maps of T need it; infinite where exp(-y) is beyond 2^126.
template <typename T>
static inline Vector<float> one_plus_exp(Vector<float> y) {
  const Vector<float> exponent = y * kMinusLog2E;
#ifdef __AVX512BF16__
  if constexpr (__is_same(T, Bfloat16)) return 1.0f + exp2_for_bfloat16(exponent);
#endif
#if FLEXVAR_VECTOR_BYTES == 64
  return 1.0f + exp2_of_any(exponent);
#else
  const Vector<float> infinity = Vector<float>{} + __builtin_inff();
  const Vector<float> bounded = larger(Vector<float>{} - 126.0f, exponent);
  return exponent > 126.0f ? infinity : 1.0f + exp2_within_range(bounded);
#endif
}

// a / b, as exactly as maps of T need it.
template <typename T>
static inline Vector<float> quotient(Vector<float> a, Vector<float> b) {
#ifdef __AVX512BF16__
  if constexpr (__is_same(T, Bfloat16)) {
    return a * (Vector<float>)_mm512_maskz_rcp14_ps(0xffff, (__m512)b);
  }
#endif
  return a / b;
}

template <typename T, bool kSilu>
static inline Vector<float> activation(Vector<float> y) {
  return kSilu ? quotient<T>(y, one_plus_exp<T>(y)) : y;
}

// grad times the derivative of the activation at y.
template <typename T, bool kSilu>
static inline Vector<float> through_activation(Vector<float> grad, Vector<float> y) {
  if constexpr (!kSilu) return grad;
  const Vector<float> s = quotient<T>(Vector<float>{} + 1.0f, one_plus_exp<T>(y));
  return grad * (s * (1.0f + y * (1.0f - s)));
}

template <typename T>
static inline void store_result(T* p, Vector<float> v, int64_t n) {
#ifdef __AVX512BF16__
  // One instruction instead of seven; it takes numbers below 2^-126 for 0.
  if constexpr (__is_same(T, Bfloat16)) {
    if (n == kFloatLanes) {
      return _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
    }
  }
#endif
  store_first(p, v, n);
}

// --- Units of work -------------------------------------------------------------------------------

template <typename F>
static inline void with_element(FloatElement element, const F& f) {
  switch (element) {
    case FloatElement::float32:
      return f(float());
    case FloatElement::float16:
      return f(Half());
    case FloatElement::bfloat16:
      return f(Bfloat16());
  }
}

struct Unit {
  int64_t image, group, channel, chunk;  // group and channel 0 with channels last
  int64_t offset;                        // of its first element
  int64_t pixels;
};

// f(unit) for the units [begin, end), with divisions for the first one only.
template <typename F>
static inline void for_each_unit(const GroupNormShape& shape, int64_t begin, int64_t end,
                                 const F& f) {
  const int64_t plane = begin / shape.chunks;  // an image with channels last, else a channel of one
  const int64_t planes = shape.channels_last ? 1 : shape.channels;  // of an image
  const int64_t row = shape.channels_last ? shape.channels : 1, size = channels_per_group(shape);
  Unit unit{};
  unit.chunk = begin % shape.chunks;
  unit.image = plane / planes;
  unit.channel = plane % planes;
  unit.group = unit.channel / size;
  unit.offset = (plane * shape.pixels + unit.chunk * shape.chunk_pixels) * row;
  for (int64_t index = begin; index < end; ++index) {
    unit.pixels = pixels_of_chunk(shape, unit.chunk);
    f(unit);
    unit.offset += unit.pixels * row;
    if (++unit.chunk < shape.chunks) continue;
    unit.chunk = 0;
    if (++unit.channel == planes) {
      unit.channel = unit.group = 0;
      ++unit.image;
    } else if (unit.channel == (unit.group + 1) * size) {
      ++unit.group;
    }
  }
}

#define FLEXVAR_INLINE __attribute__((always_inline))

// f(i, elements) for every vector of `count` elements, all but the last of which are full. Inlined,
// load_first of a full vector is a plain load, and constants stay in registers.
template <typename F>
static inline FLEXVAR_INLINE void for_each_vector(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + kFloatLanes <= count; i += kFloatLanes) f(i, kFloatLanes);
  if (i < count) f(i, count - i);
}

// The same, and ask(i) for every 64 bytes of full vectors of T: a line of the cache.
template <typename T, typename Ask, typename F>
static inline FLEXVAR_INLINE void for_each_line(int64_t count, const Ask& ask, const F& f) {
  constexpr int64_t line = 64 / sizeof(T);
  int64_t i = 0;
  for (; i + line <= count; i += line) {
    ask(i);
#pragma GCC unroll 8
    for (int64_t j = 0; j < line; j += kFloatLanes) f(i + j, kFloatLanes);
  }
  for_each_vector(count - i, [&](int64_t j, int64_t n) FLEXVAR_INLINE { f(i + j, n); });
}

// Neighbours first, then neighbours of those.
static inline float total(const Vector<float> (&sum)[kUnroll]) {
  float lanes[kFloatLanes];
  store(lanes, (sum[0] + sum[1]) + (sum[2] + sum[3]));
#pragma GCC unroll 4
  for (int64_t step = 1; step < kFloatLanes; step *= 2) {
#pragma GCC unroll 8
    for (int64_t lane = 0; lane < kFloatLanes; lane += 2 * step) lanes[lane] += lanes[lane + step];
  }
  return lanes[0];
}

// --- Moments -------------------------------------------------------------------------------------

struct Moments {
  float mean;
  float squares;  // of differences from the mean, summed
};

// Differences are taken from a shift, the mean of the first k of n elements. Squares of differences
// from it sum to at most 1 + n / k times those from the mean, so what is subtracted at the end
// cannot swallow the variance, whatever the elements are.
constexpr int64_t kShiftElements = 256;  // of at most 4,096 side by side
constexpr int64_t kMostPerShiftPixel = 16;

// Of so many elements. A sum of squares beyond a float's range stays infinite; of any other, what
// is subtracted is no more than a rounding beyond it.
static inline Vector<float> squares_about_mean(Vector<float> squares, Vector<float> differences,
                                               float count) {
  const Vector<float> rest = squares - differences * (differences * (1 / count));
  return squares > __FLT_MAX__ ? squares : larger(Vector<float>{}, rest);
}

// add(j, vector) for all elements, with j going round the sums under way; what lies behind the last
// element is `filling`.
template <typename T, typename Add>
static inline FLEXVAR_INLINE void for_run(const T* x, int64_t count, float filling,
                                          const Add& add) {
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < kUnroll; ++j) add(j, load(x + i + j * kFloatLanes));
  }
  for (; i < count; i += kFloatLanes) {
    Vector<float> v = load_first(x + i, count - i);
    for (int64_t lane = count - i; lane < kFloatLanes; ++lane) v[lane] = filling;
    add(0, v);
  }
}

// Of elements side by side, in one order for a given count.
template <typename T>
static Moments moments_of_run(const T* x, int64_t count) {
  const int64_t first = count < kShiftElements ? count : kShiftElements;
  Vector<float> sum[kUnroll] = {};
  for_run(x, first, 0, [&](int64_t j, Vector<float> v) FLEXVAR_INLINE { sum[j] += v; });
  const float shift = total(sum) / static_cast<float>(first);

  Vector<float> differences[kUnroll] = {}, squares[kUnroll] = {};
  for_run(x, count, shift, [&](int64_t j, Vector<float> v) FLEXVAR_INLINE {
    const Vector<float> difference = v - shift;
    differences[j] += difference;
    squares[j] += difference * difference;
  });
  const float n = static_cast<float>(count), difference = total(differences);
  const Vector<float> zero = {};
  return {shift + difference / n,
          squares_about_mean(zero + total(squares), zero + difference, n)[0]};
}

// Pixels of which a channel's numbers are added up before they go back to their row: so many rows
// are read side by side.
constexpr int64_t kPixelsAtATime = 4;

// f(offset of the first one, count) for the pixels of a chunk, a constant number of them at a time.
template <typename F>
static inline FLEXVAR_INLINE void for_pixels(int64_t channels, int64_t pixels, const F& f) {
  int64_t pixel = 0;
  for (; pixel + kPixelsAtATime <= pixels; pixel += kPixelsAtATime) {
    f(pixel * channels, kPixelsAtATime);
  }
  for (; pixel < pixels; ++pixel) f(pixel * channels, 1);
}

// Of every channel, in two rows: means, and squared differences from them. `shift`: scratch, a row.
template <typename T>
static void moments_of_channels(const T* x, int64_t channels, int64_t pixels, float* shift,
                                float* means, float* squares) {
  for (int64_t c = 0; c < group_norm_row(channels); ++c) shift[c] = means[c] = squares[c] = 0;
  const int64_t first = (pixels + kMostPerShiftPixel - 1) / kMostPerShiftPixel;
  for_pixels(channels, first, [&](int64_t offset, int64_t count) FLEXVAR_INLINE {
    const T* const rows = x + offset;
    for_each_vector(channels, [&](int64_t c, int64_t n) FLEXVAR_INLINE {
      Vector<float> sum = load(shift + c);
      for (int64_t i = 0; i < count; ++i) sum += load_first(rows + i * channels + c, n);
      store(shift + c, sum);
    });
  });
  for (int64_t c = 0; c < channels; ++c) shift[c] /= static_cast<float>(first);

  for_pixels(channels, pixels, [&](int64_t offset, int64_t count) FLEXVAR_INLINE {
    const T* const rows = x + offset;
    for_each_vector(channels, [&](int64_t c, int64_t n) FLEXVAR_INLINE {
      const Vector<float> from = load(shift + c);
      Vector<float> difference_sum = load(means + c), square_sum = load(squares + c);
      for (int64_t i = 0; i < count; ++i) {
        __builtin_prefetch(rows + (i + count) * channels + c);  // too many streams to guess
        const Vector<float> difference = load_first(rows + i * channels + c, n) - from;
        difference_sum += difference;
        square_sum += difference * difference;
      }
      store(means + c, difference_sum);
      store(squares + c, square_sum);
    });
  });
  const float count = static_cast<float>(pixels);
  for (int64_t c = 0; c < channels; c += kFloatLanes) {
    const Vector<float> difference = load(means + c);
    store(squares + c, squares_about_mean(load(squares + c), difference, count));
    store(means + c, load(shift + c) + difference / count);
  }
}

// Of a group's channels, each of which has so many pixels.
static inline Moments moments_of_group(const float* mean, const float* squares, int64_t channels,
                                       int64_t pixels) {
  double mean_sum = 0, square_sum = 0;
  for (int64_t c = 0; c < channels; ++c) mean_sum += mean[c];
  const double group_mean = mean_sum / static_cast<double>(channels);
  for (int64_t c = 0; c < channels; ++c) {
    const double difference = mean[c] - group_mean;
    square_sum += squares[c] + static_cast<double>(pixels) * (difference * difference);
  }
  return {static_cast<float>(group_mean), static_cast<float>(square_sum)};
}

template <typename T>
static void moments_of_units(const GroupNormSiluParams& params, float* scratch, int64_t begin,
                             int64_t end) {
  const GroupNormShape& shape = params.shape;
  const T* const x = static_cast<const T*>(params.x);
  const auto write = [&](int64_t place, const Moments& moments) {
    params.parts[2 * place] = moments.mean;
    params.parts[2 * place + 1] = moments.squares;
  };
  if (!shape.channels_last) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t group = index / shape.runs, run = index % shape.runs;
      const T* const first = x + group * elements_per_group(shape) + run * shape.run_elements;
      write(index, moments_of_run(first, elements_of_part(shape, run)));
    }
    return;
  }
  const int64_t row = group_norm_row(shape.channels), size = channels_per_group(shape);
  float *const mean = scratch, *const squares = scratch + row;
  for_each_unit(shape, begin, end, [&](const Unit& unit) {
    moments_of_channels(x + unit.offset, shape.channels, unit.pixels, squares + row, mean, squares);
    for (int64_t group = 0; group < shape.groups; ++group) {
      write((unit.image * shape.groups + group) * shape.chunks + unit.chunk,
            moments_of_group(mean + group * size, squares + group * size, size, unit.pixels));
    }
  });
}

void group_norm_moments(const GroupNormSiluParams& params, float* scratch, int64_t begin,
                        int64_t end) {
  with_element(params.element,
               [&]<typename T>(T) { moments_of_units<T>(params, scratch, begin, end); });
}

// --- From statistics to the result ---------------------------------------------------------------

// How far ahead of what is read its pixels are asked for.
constexpr int64_t kBytesAhead = 8192;

// What is done to the elements of a channel: (x - mean) * factor + bias, then the activation.
// Functions of their own, so that the constants of the loop stay in registers.
template <typename T, bool kSilu>
static __attribute__((noinline)) void apply_run(const T* x, T* out, int64_t count, float mean,
                                                float factor, float bias, int64_t ahead) {
  for_each_line<T>(
      count, [&](int64_t i) FLEXVAR_INLINE { __builtin_prefetch(x + i + ahead, 0, 2); },
      [&](int64_t i, int64_t n) FLEXVAR_INLINE {
        const Vector<float> y = (load_first(x + i, n) - mean) * factor + bias;
        store_result(out + i, activation<T, kSilu>(y), n);
      });
}

template <typename T, bool kSilu>
static __attribute__((noinline)) void apply_pixels(const T* x, T* out, int64_t pixels,
                                                   int64_t channels, const float* mean,
                                                   const float* factor, const float* bias) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel, x += channels, out += channels) {
    for_each_line<T>(
        channels,
        [&](int64_t c) FLEXVAR_INLINE { __builtin_prefetch(x + c + kBytesAhead / sizeof(T)); },
        [&](int64_t c, int64_t n) FLEXVAR_INLINE {
          const Vector<float> v = load_first(x + c, n);
          const Vector<float> y = (v - load(mean + c)) * load(factor + c) + load(bias + c);
          store_result(out + c, activation<T, kSilu>(y), n);
        });
  }
}

template <typename T, bool kSilu>
static void apply_units(const GroupNormSiluParams& params, float* scratch, int64_t begin,
                        int64_t end, bool has_next) {
  const GroupNormShape& shape = params.shape;
  const int64_t size = channels_per_group(shape), row = group_norm_row(shape.channels);
  const int64_t ahead = has_next ? elements_per_group(shape) : 0;
  float *const mean = scratch, *const factor = scratch + row, *const bias = scratch + 2 * row;
  int64_t image_of_rows = -1;
  for_each_unit(shape, begin, end, [&](const Unit& unit) {
    const float* const statistics = params.statistics + unit.image * shape.groups * 2;
    const T* const x = static_cast<const T*>(params.x) + unit.offset;
    T* const out = static_cast<T*>(params.out) + unit.offset;
    if (!shape.channels_last) {
      const float* const group = statistics + unit.group * 2;
      apply_run<T, kSilu>(x, out, unit.pixels, group[0], group[1] * params.weight[unit.channel],
                          params.bias[unit.channel], ahead);
      return;
    }
    if (unit.image != image_of_rows) {
      image_of_rows = unit.image;
      for (int64_t group = 0, c = 0; group < shape.groups; ++group) {
        for (const int64_t end_of_group = c + size; c < end_of_group; ++c) {
          mean[c] = statistics[2 * group];
          factor[c] = statistics[2 * group + 1] * params.weight[c];
          bias[c] = params.bias[c];
        }
      }
    }
    apply_pixels<T, kSilu>(x, out, unit.pixels, shape.channels, mean, factor, bias);
  });
}

void group_norm_silu_apply(const GroupNormSiluParams& params, float* scratch, int64_t begin,
                           int64_t end, bool has_next) {
  with_element(params.element, [&]<typename T>(T) {
    (params.silu ? apply_units<T, true> : apply_units<T, false>)(params, scratch, begin, end,
                                                                 has_next);
  });
}

// --- Backward ------------------------------------------------------------------------------------

// What the elements of a channel (Number: float), or of a vector of channels, have in common.
template <typename Number>
struct Channel {
  Number mean, reciprocal_deviation, weight, bias;
  Number grad_mean, product_mean;  // of g * weight and of g * weight * n over the group
};

struct NormAndGrad {
  Vector<float> norm, grad;  // n, and g: grad_out through the activation's derivative
};

template <typename T, bool kSilu, typename Number>
static inline NormAndGrad norm_and_grad(Vector<float> x, Vector<float> grad_out,
                                        const Channel<Number>& channel) {
  const Vector<float> norm = (x - channel.mean) * channel.reciprocal_deviation;
  return {norm, through_activation<T, kSilu>(grad_out, norm * channel.weight + channel.bias)};
}

// The gradient of x: (g * weight - mean(g * weight) - n * mean(g * weight * n)) / deviation.
template <typename Number>
static inline Vector<float> grad_of_x(const NormAndGrad& at, const Channel<Number>& channel) {
  return (at.grad * channel.weight - channel.grad_mean - at.norm * channel.product_mean) *
         channel.reciprocal_deviation;
}

static inline Channel<float> channel_at(const GroupNormSiluBackwardParams& params, int64_t image,
                                        int64_t group, int64_t c) {
  const int64_t at = (image * params.shape.groups + group) * 2;
  return {params.statistics[at], params.statistics[at + 1],  params.weight[c],
          params.bias[c],        params.group_means[at + 1], params.group_means[at]};
}

// The same of all channels, as six rows of scratch.
class ChannelRows {
 public:
  ChannelRows(float* scratch, int64_t channels) : rows_(scratch), row_(group_norm_row(channels)) {}

  void fill(const GroupNormSiluBackwardParams& params, int64_t image) {
    if (image == image_) return;
    image_ = image;
    const int64_t group_size = channels_per_group(params.shape);
    for (int64_t group = 0, c = 0; group < params.shape.groups; ++group) {
      for (const int64_t end = c + group_size; c < end; ++c) {
        const Channel<float> channel = channel_at(params, image, group, c);
        const float values[] = {channel.mean,      channel.reciprocal_deviation,
                                channel.weight,    channel.bias,
                                channel.grad_mean, channel.product_mean};
        for (int64_t i = 0; i < 6; ++i) rows_[i * row_ + c] = values[i];
      }
    }
  }
  Channel<Vector<float>> at(int64_t c) const {
    const float* const first = rows_ + c;
    return {load(first),
            load(first + row_),
            load(first + 2 * row_),
            load(first + 3 * row_),
            load(first + 4 * row_),
            load(first + 5 * row_)};
  }

 private:
  float* rows_;
  int64_t row_, image_ = -1;
};

// Elements whose sum is rounded on its own before it joins the others'.
constexpr int64_t kSumElements = 512;

// Whether g waits in grad_x for the second pass, where it keeps its bits and saves an exponential.
template <typename T, bool kSilu>
constexpr bool kKeepsGrad = kSilu && __is_same(T, float);

template <typename T, bool kSilu>
static void backward_sums(const GroupNormSiluBackwardParams& params, float* scratch, int64_t begin,
                          int64_t end) {
  const GroupNormShape& shape = params.shape;
  const int64_t channels = shape.channels, row = group_norm_row(channels);
  ChannelRows rows_of_image(scratch, channels);
  for_each_unit(shape, begin, end, [&](const Unit& unit) {
    const T* const x = static_cast<const T*>(params.x) + unit.offset;
    const T* const grad_out = static_cast<const T*>(params.grad_out) + unit.offset;
    T* const grad_x = static_cast<T*>(params.grad_x) + unit.offset;
    const auto grad_at = [&](int64_t i, int64_t n, const auto& channel) FLEXVAR_INLINE {
      const NormAndGrad at =
          norm_and_grad<T, kSilu>(load_first(x + i, n), load_first(grad_out + i, n), channel);
      if constexpr (kKeepsGrad<T, kSilu>) store_first(grad_x + i, at.grad, n);
      return at;
    };
    float* const product_sums = params.sums + (unit.image * shape.chunks + unit.chunk) * 2 * row;
    float* const grad_sums = product_sums + row;
    if (!shape.channels_last) {
      const Channel<float> channel = channel_at(params, unit.image, unit.group, unit.channel);
      Vector<float> products[kUnroll] = {}, grads[kUnroll] = {};
      for (int64_t first = 0; first < unit.pixels; first += kSumElements) {
        const int64_t rest = unit.pixels - first;
        Vector<float> product_sum = {}, grad_sum = {};
        for_each_vector(rest < kSumElements ? rest : kSumElements,
                        [&](int64_t i, int64_t n) FLEXVAR_INLINE {
                          const NormAndGrad at = grad_at(first + i, n, channel);
                          product_sum += at.grad * at.norm;  // behind the end g is 0
                          grad_sum += at.grad;
                        });
        products[first / kSumElements % kUnroll] += product_sum;
        grads[first / kSumElements % kUnroll] += grad_sum;
      }
      product_sums[unit.channel] = total(products);
      grad_sums[unit.channel] = total(grads);
      return;
    }
    rows_of_image.fill(params, unit.image);
    const ChannelRows rows = rows_of_image;  // which stores cannot change
    for (int64_t c = 0; c < row; ++c) product_sums[c] = grad_sums[c] = 0;
    for_pixels(channels, unit.pixels, [&](int64_t offset, int64_t count) FLEXVAR_INLINE {
      for_each_vector(channels, [&](int64_t c, int64_t n) FLEXVAR_INLINE {
        const Channel<Vector<float>> channel = rows.at(c);
        Vector<float> product_sum = load(product_sums + c), grad_sum = load(grad_sums + c);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t place = offset + i * channels + c, in_next_rows = place + count * channels;
          __builtin_prefetch(x + in_next_rows);  // so many streams are too many to guess
          __builtin_prefetch(grad_out + in_next_rows);
          const NormAndGrad at = grad_at(place, n, channel);
          product_sum += at.grad * at.norm;
          grad_sum += at.grad;
        }
        store(product_sums + c, product_sum);
        store(grad_sums + c, grad_sum);
      });
    });
  });
}

template <typename T, bool kSilu>
static void backward_apply(const GroupNormSiluBackwardParams& params, float* scratch, int64_t begin,
                           int64_t end) {
  const GroupNormShape& shape = params.shape;
  const int64_t channels = shape.channels;
  ChannelRows rows_of_image(scratch, channels);
  for_each_unit(shape, begin, end, [&](const Unit& unit) {
    const T* const x = static_cast<const T*>(params.x) + unit.offset;
    T* const grad_x = static_cast<T*>(params.grad_x) + unit.offset;
    constexpr bool kept = kKeepsGrad<T, kSilu>;
    const T* const grad = kept ? grad_x : static_cast<const T*>(params.grad_out) + unit.offset;
    const auto write = [&](int64_t i, int64_t n, const auto& channel) FLEXVAR_INLINE {
      const NormAndGrad at = norm_and_grad < T,
                        kSilu && !kept > (load_first(x + i, n), load_first(grad + i, n), channel);
      store_result(grad_x + i, grad_of_x(at, channel), n);
    };
    if (!shape.channels_last) {
      const Channel<float> channel = channel_at(params, unit.image, unit.group, unit.channel);
      for_each_vector(unit.pixels,
                      [&](int64_t i, int64_t n) FLEXVAR_INLINE { write(i, n, channel); });
      return;
    }
    rows_of_image.fill(params, unit.image);
    const ChannelRows rows = rows_of_image;  // which stores cannot change
    for_pixels(channels, unit.pixels, [&](int64_t offset, int64_t count) FLEXVAR_INLINE {
      for_each_vector(channels, [&](int64_t c, int64_t n) FLEXVAR_INLINE {
        const Channel<Vector<float>> channel = rows.at(c);
        for (int64_t i = 0; i < count; ++i) write(offset + i * channels + c, n, channel);
      });
    });
  });
}

void group_norm_silu_backward_sums(const GroupNormSiluBackwardParams& params, float* scratch,
                                   int64_t begin, int64_t end) {
  with_element(params.element, [&]<typename T>(T) {
    (params.silu ? backward_sums<T, true> : backward_sums<T, false>)(params, scratch, begin, end);
  });
}

void group_norm_silu_backward_apply(const GroupNormSiluBackwardParams& params, float* scratch,
                                    int64_t begin, int64_t end) {
  with_element(params.element, [&]<typename T>(T) {
    (params.silu ? backward_apply<T, true> : backward_apply<T, false>)(params, scratch, begin, end);
  });
}

}  // namespace flexvar::FLEXVAR_ISA
