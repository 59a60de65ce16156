#include "group_norm_silu/cpu_kernel.h"

#include "common/cpu_exp2.h"
#include "common/cpu_vector.h"

namespace flexvar::FLEXVAR_ISA {

constexpr int64_t kUnroll = 4;  // sums under way at a time: additions are slow to finish
constexpr int64_t kStep = kUnroll * kFloatLanes;
static_assert(group_norm_row(1) % kStep == 0);
constexpr float kMinusLog2E = -1.44269504f;

// --- SiLU ----------------------------------------------------------------------------------------

// 1 + exp(-y); infinite where exp(-y) is beyond 2^126.
static inline Vector<float> one_plus_exp_minus(Vector<float> y) {
  Vector<float> exponent = y * kMinusLog2E;
  exponent = exponent < -126.0f ? Vector<float>{} - 126.0f : exponent;
  const Vector<float> power = exp2_within_range(exponent);
  return 1.0f + (exponent > 126.0f ? Vector<float>{} + __builtin_inff() : power);
}

template <bool kSilu>
static inline Vector<float> activation(Vector<float> y) {
  return kSilu ? y / one_plus_exp_minus(y) : y;
}

// grad times the derivative of the activation at y.
template <bool kSilu>
static inline Vector<float> through_activation(Vector<float> grad, Vector<float> y) {
  if constexpr (!kSilu) return grad;
  const Vector<float> sigmoid = 1.0f / one_plus_exp_minus(y);
  return grad * (sigmoid * (1.0f + y * (1.0f - sigmoid)));
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
  int64_t image, channel, chunk;  // channel 0 with channels last
  int64_t offset;                 // of its first element
  int64_t pixels;
};

static inline Unit unit_at(const GroupNormShape& shape, int64_t index) {
  Unit unit{};
  unit.chunk = index % shape.chunks;
  const int64_t plane = index / shape.chunks;  // an image with channels last, else a channel of one
  unit.image = shape.channels_last ? plane : plane / shape.channels;
  unit.channel = shape.channels_last ? 0 : plane % shape.channels;
  const int64_t first = plane * shape.pixels + unit.chunk * shape.chunk_pixels;
  unit.offset = first * (shape.channels_last ? shape.channels : 1);
  unit.pixels = pixels_of_chunk(shape, unit.chunk);
  return unit;
}

static inline float total(const Vector<float> (&sum)[kUnroll]) {
  const Vector<float> lanes = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  float result = 0;
  for (int64_t lane = 0; lane < kFloatLanes; ++lane) result += lanes[lane];
  return result;
}

// --- Moments -------------------------------------------------------------------------------------

struct Moments {
  float mean;
  float squares;  // of differences from the mean, summed
};

// From sums of differences, and of their squares, from `shift`, which lies close to the mean.
static inline Moments moments_about(float shift, float differences, float squares, float count) {
  const float rest = squares - differences * differences / count;
  return {shift + differences / count, rest < 0 ? 0 : rest};
}

// Of elements side by side, in one order for a given count. The second pass over them is over a
// chunk, which the first one brought into the cache.
template <typename T>
static Moments moments_of_run(const T* x, int64_t count) {
  const auto for_each_vector = [&](float filling, const auto& add) {
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
  };
  Vector<float> sum[kUnroll] = {};
  for_each_vector(0, [&](int64_t j, Vector<float> v) { sum[j] += v; });
  const float shift = total(sum) / static_cast<float>(count);
  Vector<float> differences[kUnroll] = {}, squares[kUnroll] = {};
  for_each_vector(shift, [&](int64_t j, Vector<float> v) {
    const Vector<float> difference = v - shift;
    differences[j] += difference;
    squares[j] += difference * difference;
  });
  return moments_about(shift, total(differences), total(squares), static_cast<float>(count));
}

// Of each of `columns` (at most kVectors vectors of) channels, `stride` from pixel to pixel.
template <typename T, int kVectors>
static void moments_of_columns(const T* x, int64_t stride, int64_t pixels, int64_t columns,
                               float* mean, float* squares) {
  const auto column = [&](int64_t pixel, int64_t j) {
    return load_first(x + pixel * stride + j * kFloatLanes, columns - j * kFloatLanes);
  };
  const float count = static_cast<float>(pixels);
  Vector<float> sum[kVectors] = {};
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < kVectors; ++j) sum[j] += column(pixel, j);
  }
  Vector<float> shift[kVectors], difference_sum[kVectors] = {}, square_sum[kVectors] = {};
  for (int64_t j = 0; j < kVectors; ++j) shift[j] = sum[j] / count;
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < kVectors; ++j) {
      const Vector<float> difference = column(pixel, j) - shift[j];
      difference_sum[j] += difference;
      square_sum[j] += difference * difference;
    }
  }
  for (int64_t j = 0; j < kVectors; ++j) {
    const Vector<float> rest = square_sum[j] - difference_sum[j] * difference_sum[j] / count;
    store(mean + j * kFloatLanes, shift[j] + difference_sum[j] / count);
    store(squares + j * kFloatLanes, rest < 0.0f ? Vector<float>{} : rest);
  }
}

// Of a group's channels, each of which has so many pixels.
static inline Moments moments_of_group(const float* mean, const float* squares, int64_t channels,
                                       int64_t pixels) {
  float mean_sum = 0, square_sum = 0;
  for (int64_t c = 0; c < channels; ++c) mean_sum += mean[c];
  const float group_mean = mean_sum / static_cast<float>(channels);
  for (int64_t c = 0; c < channels; ++c) {
    const float difference = mean[c] - group_mean;
    square_sum += squares[c] + static_cast<float>(pixels) * (difference * difference);
  }
  return {group_mean, square_sum};
}

void group_norm_moments(const GroupNormSiluParams& params, float* scratch, int64_t begin,
                        int64_t end) {
  const GroupNormShape& shape = params.shape;
  const int64_t channels = shape.channels, group_size = channels_per_group(shape);
  const int64_t parts = parts_per_group(shape);
  const auto write = [&](int64_t image, int64_t group, int64_t part, const Moments& moments) {
    float* const place = params.parts + ((image * shape.groups + group) * parts + part) * 2;
    place[0] = moments.mean;
    place[1] = moments.squares;
  };
  with_element(params.element, [&]<typename T>(T) {
    for (int64_t index = begin; index < end; ++index) {
      const Unit unit = unit_at(shape, index);
      const T* const x = static_cast<const T*>(params.x) + unit.offset;
      if (!shape.channels_last) {
        write(unit.image, unit.channel / group_size,
              unit.channel % group_size * shape.chunks + unit.chunk,
              moments_of_run(x, unit.pixels));
        continue;
      }
      float *const mean = scratch, *const squares = scratch + group_norm_row(channels);
      int64_t c = 0;
      for (; c + kStep <= channels; c += kStep) {
        moments_of_columns<T, kUnroll>(x + c, channels, unit.pixels, kStep, mean + c, squares + c);
      }
      for (; c < channels; c += kFloatLanes) {
        moments_of_columns<T, 1>(x + c, channels, unit.pixels, channels - c, mean + c,
                                 squares + c);
      }
      for (int64_t group = 0; group < shape.groups; ++group) {
        write(unit.image, group, unit.chunk,
              moments_of_group(mean + group * group_size, squares + group * group_size, group_size,
                               unit.pixels));
      }
    }
  });
}

// --- From statistics to the result ---------------------------------------------------------------

// What is done to the elements of a channel: (x - mean) * factor + bias, then the activation.
template <typename T, bool kSilu>
static void apply_run(const T* x, T* out, int64_t count, float mean, float factor, float bias) {
  for (int64_t i = 0; i < count; i += kFloatLanes) {
    const Vector<float> y = (load_first(x + i, count - i) - mean) * factor + bias;
    store_first(out + i, activation<kSilu>(y), count - i);
  }
}

template <typename T, bool kSilu>
static void apply_pixels(const T* x, T* out, int64_t pixels, int64_t channels, const float* mean,
                         const float* factor, const float* bias) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel, x += channels, out += channels) {
    for (int64_t c = 0; c < channels; c += kFloatLanes) {
      const Vector<float> v = load_first(x + c, channels - c);
      const Vector<float> y = (v - load(mean + c)) * load(factor + c) + load(bias + c);
      store_first(out + c, activation<kSilu>(y), channels - c);
    }
  }
}

template <typename T, bool kSilu>
static void apply_units(const GroupNormSiluParams& params, float* scratch, int64_t begin,
                        int64_t end) {
  const GroupNormShape& shape = params.shape;
  const int64_t channels = shape.channels, group_size = channels_per_group(shape);
  const int64_t row = group_norm_row(channels);
  float *const mean = scratch, *const factor = scratch + row, *const bias = scratch + 2 * row;
  for (int64_t index = begin; index < end; ++index) {
    const Unit unit = unit_at(shape, index);
    const float* const statistics = params.statistics + unit.image * shape.groups * 2;
    const T* const x = static_cast<const T*>(params.x) + unit.offset;
    T* const out = static_cast<T*>(params.out) + unit.offset;
    if (!shape.channels_last) {
      const float* const group = statistics + unit.channel / group_size * 2;
      apply_run<T, kSilu>(x, out, unit.pixels, group[0], group[1] * params.weight[unit.channel],
                          params.bias[unit.channel]);
      continue;
    }
    for (int64_t c = 0; c < channels; ++c) {
      const float* const group = statistics + c / group_size * 2;
      mean[c] = group[0];
      factor[c] = group[1] * params.weight[c];
      bias[c] = params.bias[c];
    }
    apply_pixels<T, kSilu>(x, out, unit.pixels, channels, mean, factor, bias);
  }
}

void group_norm_silu_apply(const GroupNormSiluParams& params, float* scratch, int64_t begin,
                           int64_t end) {
  with_element(params.element, [&]<typename T>(T) {
    (params.silu ? apply_units<T, true> : apply_units<T, false>)(params, scratch, begin, end);
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

template <bool kSilu, typename Number>
static inline NormAndGrad norm_and_grad(Vector<float> x, Vector<float> grad_out,
                                        const Channel<Number>& channel) {
  const Vector<float> norm = (x - channel.mean) * channel.reciprocal_deviation;
  return {norm, through_activation<kSilu>(grad_out, norm * channel.weight + channel.bias)};
}

// The gradient of x: (g * weight - mean(g * weight) - n * mean(g * weight * n)) / deviation.
template <typename Number>
static inline Vector<float> grad_of_x(const NormAndGrad& at, const Channel<Number>& channel) {
  return (at.grad * channel.weight - channel.grad_mean - at.norm * channel.product_mean) *
         channel.reciprocal_deviation;
}

static inline Channel<float> channel_at(const GroupNormSiluBackwardParams& params, int64_t image,
                                        int64_t c) {
  const GroupNormShape& shape = params.shape;
  const int64_t group = (image * shape.groups + c / channels_per_group(shape)) * 2;
  return {params.statistics[group],      params.statistics[group + 1], params.weight[c],
          params.bias[c],                params.group_means[group + 1],
          params.group_means[group]};
}

// The same of all channels, as six rows of scratch.
class ChannelRows {
 public:
  ChannelRows(float* scratch, int64_t channels) : rows_(scratch), row_(group_norm_row(channels)) {}

  void fill(const GroupNormSiluBackwardParams& params, int64_t image) {
    for (int64_t c = 0; c < params.shape.channels; ++c) {
      const Channel<float> channel = channel_at(params, image, c);
      const float values[] = {channel.mean, channel.reciprocal_deviation, channel.weight,
                              channel.bias, channel.grad_mean,            channel.product_mean};
      for (int64_t i = 0; i < 6; ++i) rows_[i * row_ + c] = values[i];
    }
  }
  Channel<Vector<float>> at(int64_t c) const {
    const float* const first = rows_ + c;
    return {load(first),            load(first + row_),     load(first + 2 * row_),
            load(first + 3 * row_), load(first + 4 * row_), load(first + 5 * row_)};
  }

 private:
  float* rows_;
  int64_t row_;
};

template <typename T, bool kSilu>
static void backward_sums(const GroupNormSiluBackwardParams& params, float* scratch, int64_t begin,
                          int64_t end) {
  const GroupNormShape& shape = params.shape;
  const int64_t channels = shape.channels, row = group_norm_row(channels);
  for (int64_t index = begin; index < end; ++index) {
    const Unit unit = unit_at(shape, index);
    const T* x = static_cast<const T*>(params.x) + unit.offset;
    const T* grad_out = static_cast<const T*>(params.grad_out) + unit.offset;
    float* const product_sums = params.sums + (unit.image * shape.chunks + unit.chunk) * 2 * row;
    float* const grad_sums = product_sums + row;
    if (!shape.channels_last) {
      const Channel<float> channel = channel_at(params, unit.image, unit.channel);
      Vector<float> products[kUnroll] = {}, grads[kUnroll] = {};
      for (int64_t i = 0; i < unit.pixels; i += kFloatLanes) {  // behind the end g is 0
        const int64_t count = unit.pixels - i;
        const NormAndGrad at = norm_and_grad<kSilu>(load_first(x + i, count),
                                                    load_first(grad_out + i, count), channel);
        products[0] += at.grad * at.norm;
        grads[0] += at.grad;
      }
      product_sums[unit.channel] = total(products);
      grad_sums[unit.channel] = total(grads);
      continue;
    }
    ChannelRows rows(scratch, channels);
    rows.fill(params, unit.image);
    for (int64_t c = 0; c < row; ++c) product_sums[c] = grad_sums[c] = 0;
    for (int64_t pixel = 0; pixel < unit.pixels; ++pixel, x += channels, grad_out += channels) {
      for (int64_t c = 0; c < channels; c += kFloatLanes) {
        const int64_t count = channels - c;
        const NormAndGrad at = norm_and_grad<kSilu>(load_first(x + c, count),
                                                    load_first(grad_out + c, count), rows.at(c));
        store(product_sums + c, load(product_sums + c) + at.grad * at.norm);
        store(grad_sums + c, load(grad_sums + c) + at.grad);
      }
    }
  }
}

template <typename T, bool kSilu>
static void backward_apply(const GroupNormSiluBackwardParams& params, float* scratch,
                           int64_t begin, int64_t end) {
  const GroupNormShape& shape = params.shape;
  const int64_t channels = shape.channels;
  for (int64_t index = begin; index < end; ++index) {
    const Unit unit = unit_at(shape, index);
    const T* x = static_cast<const T*>(params.x) + unit.offset;
    const T* grad_out = static_cast<const T*>(params.grad_out) + unit.offset;
    T* grad_x = static_cast<T*>(params.grad_x) + unit.offset;
    const auto write = [&](int64_t i, int64_t count, const auto& channel) {
      const NormAndGrad at = norm_and_grad<kSilu>(load_first(x + i, count),
                                                  load_first(grad_out + i, count), channel);
      store_first(grad_x + i, grad_of_x(at, channel), count);
    };
    if (!shape.channels_last) {
      const Channel<float> channel = channel_at(params, unit.image, unit.channel);
      for (int64_t i = 0; i < unit.pixels; i += kFloatLanes) write(i, unit.pixels - i, channel);
      continue;
    }
    ChannelRows rows(scratch, channels);
    rows.fill(params, unit.image);
    for (int64_t pixel = 0; pixel < unit.pixels; ++pixel) {
      for (int64_t c = 0; c < channels; c += kFloatLanes) write(c, channels - c, rows.at(c));
      x += channels;
      grad_out += channels;
      grad_x += channels;
    }
  }
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
    (params.silu ? backward_apply<T, true> : backward_apply<T, false>)(params, scratch, begin,
                                                                      end);
  });
}

}  // namespace flexvar::FLEXVAR_ISA
