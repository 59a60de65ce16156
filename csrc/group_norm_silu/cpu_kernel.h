#pragma once

#include <stdint.h>

#include "common/cpu_isa.h"
#include "common/float_element.h"

namespace flexvar {

// Pixels come in chunks, whose results are put together in their order: what comes out depends on
// the shape of an image alone. A unit of work is a chunk of a channel, units being in the order
// [image, channel, chunk]; with channels last it is a chunk of all channels: [image, chunk].
// Moments need not tell channels of a group apart: without channels last their units are its runs
// of elements, [image, group, run].
struct GroupNormShape {
  int64_t images, channels, groups, pixels;
  int64_t chunk_pixels, chunks;  // of all chunks but the last, which may have fewer
  int64_t run_elements, runs;    // likewise, of a group
  bool channels_last;            // [images, pixels, channels], else [images, channels, pixels]
};

// `static`: kernels are compiled once per instruction set, and the linker must not merge the
// copies.
static inline int64_t channels_per_group(const GroupNormShape& s) { return s.channels / s.groups; }
static inline int64_t pixels_of_chunk(const GroupNormShape& s, int64_t chunk) {
  return chunk + 1 < s.chunks ? s.chunk_pixels : s.pixels - chunk * s.chunk_pixels;
}
static inline int64_t units_per_image(const GroupNormShape& s) {
  return s.chunks * (s.channels_last ? 1 : s.channels);
}
static inline int64_t elements_per_group(const GroupNormShape& s) {
  return channels_per_group(s) * s.pixels;
}
// A group of an image has so many parts, its runs or, with channels last, chunks.
static inline int64_t parts_per_group(const GroupNormShape& s) {
  return s.channels_last ? s.chunks : s.runs;
}
static inline int64_t elements_of_part(const GroupNormShape& s, int64_t part) {
  if (s.channels_last) return pixels_of_chunk(s, part) * channels_per_group(s);
  return part + 1 < s.runs ? s.run_elements : elements_per_group(s) - part * s.run_elements;
}
static inline int64_t moment_units_per_image(const GroupNormShape& s) {
  return s.channels_last ? s.chunks : s.groups * s.runs;
}

struct GroupNormSiluParams {
  GroupNormShape shape;
  const void* x;
  const float *weight, *bias;  // [channels]
  float* parts;                // [images, groups, parts_per_group, 2]: mean, squared differences
  float* statistics;           // [images, groups, 2]: mean, reciprocal deviation
  void* out;                   // as x
  FloatElement element;        // of x and out
  bool silu;
};

// Floats of a row that holds a number for each channel.
static constexpr int64_t group_norm_row(int64_t channels) { return (channels + 63) / 64 * 64; }

struct GroupNormSiluBackwardParams {
  GroupNormShape shape;
  const void *grad_out, *x;
  const float *weight, *bias;  // [channels]
  const float* statistics;     // [images, groups, 2]
  // With g = grad_out through SiLU's derivative and n = GN(x) before weight and bias:
  float* sums;           // [images, chunks, 2, group_norm_row]: of g * n and of g over a chunk
  float* group_means;    // [images, groups, 2]: of g * weight * n and of g * weight
  void* grad_x;          // as x
  FloatElement element;  // of grad_out, x and grad_x
  bool silu;
};

// Floats of scratch that a call of any of the kernels needs.
static constexpr int64_t group_norm_scratch(int64_t channels) {
  return 6 * group_norm_row(channels);
}

// Units of moments [begin, end): x to parts.
FLEXVAR_DECLARE_CPU_KERNEL(group_norm_moments, (const GroupNormSiluParams& params, float* scratch,
                                                int64_t begin, int64_t end));
// Units [begin, end): x and statistics to out. Where `has_next`, x of the group behind is needed
// next, and asked for.
FLEXVAR_DECLARE_CPU_KERNEL(group_norm_silu_apply,
                           (const GroupNormSiluParams& params, float* scratch, int64_t begin,
                            int64_t end, bool has_next));
// x, statistics and grad_out to sums.
FLEXVAR_DECLARE_CPU_KERNEL(group_norm_silu_backward_sums,
                           (const GroupNormSiluBackwardParams& params, float* scratch,
                            int64_t begin, int64_t end));
// x, statistics, grad_out and group_means to grad_x.
FLEXVAR_DECLARE_CPU_KERNEL(group_norm_silu_backward_apply,
                           (const GroupNormSiluBackwardParams& params, float* scratch,
                            int64_t begin, int64_t end));

}  // namespace flexvar
