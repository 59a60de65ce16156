#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "common/cpu_isa.h"
#include "common/cpu_memory.h"
#include "common/divide_up.h"
#include "conv3x3/arguments.h"
#include "conv3x3/cpu_amx.h"
#include "conv3x3/cpu_kernel.h"

namespace flexvar {
namespace {

FloatElement element_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::BFloat16,
                  kConv3x3, ": ", name, " must have dtype float32 or bfloat16");
  return t.scalar_type() == ScalarType::Float ? FloatElement::float32 : FloatElement::bfloat16;
}

// Into as few parts of at most `most` as there can be, and alike.
int64_t divide_evenly(int64_t whole, int64_t most) {
  return divide_up(whole, divide_up(whole, most));
}

bool has_channels_last(const Tensor& t) {
  return t.stride(1) == 1 && t.stride(3) == t.size(1) && t.stride(2) == t.size(3) * t.stride(3) &&
         t.stride(0) == t.size(2) * t.stride(2);
}

#ifdef FLEXVAR_X86
void run_on_tiles(const Conv3x3Params& all) {
  amx::ConvTileParams params{all, nullptr};
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t weight_units = params.column_tiles() * params.channel_blocks();
  const int64_t panel_bytes = params.phases * weight_units * params.weight_block_bytes();
  Scratch<char> panels(panel_bytes);
  params.weight_panels = panels.data();
  torch::stable::parallel_for(0, weight_units, 1, [&](int64_t begin, int64_t end) {
    amx::conv3x3_pack_weight(params, begin, end);
  });

  // The larger factor is read once: threads take bands of large maps, which all meet the weight, or
  // columns of a large weight, which all meet the map.
  const int64_t pairs = divide_up(params.column_tiles(), 2), wanted = 2 * threads;
  const bool splits_weight = panel_bytes > params.batch * amx::Conv3x3Band(params, 1).bytes(params);
  const amx::Conv3x3Band band(params, splits_weight ? 1 : divide_up(wanted, params.batch));
  const int64_t band_rows = divide_up(params.grid_height, band.rows);
  const int64_t band_columns = divide_up(params.tiles_in_row(), band.tiles);
  const int64_t bands = params.batch * band_rows * band_columns;
  const int64_t shares = std::min(divide_up(wanted, splits_weight ? 1 : bands), pairs);
  const int64_t units = bands * shares, runs = std::min(units, threads);
  const int64_t scratch_bytes = band.bytes(params) + amx::kConvSumBytes;
  Scratch<char> scratch(runs * scratch_bytes);
  torch::stable::parallel_for(0, runs, 1, [&](int64_t first_run, int64_t last_run) {
    for (int64_t run = first_run; run < last_run; ++run) {
      int64_t packed = -1;
      for (int64_t unit = units * run / runs; unit < units * (run + 1) / runs; ++unit) {
        const int64_t place = unit / shares, share = unit % shares;
        const amx::ConvTileBlock block{
            place / band_columns / band_rows, place / band_columns % band_rows * band.rows,
            place % band_columns * band.tiles, pairs * share / shares * 2,
            std::min(pairs * (share + 1) / shares * 2, params.column_tiles())};
        amx::conv3x3_block(params, band, block, place == packed,
                           scratch.data() + run * scratch_bytes);
        packed = place;
      }
    }
  });
}

#endif

// Calls work(run, outer, inner, is_same): all pairs, the outer ones in turn, shared out to `runs`
// runs at once; whether the pair before it in its run had the same outer one.
template <typename Work>
void share_out(int64_t outer_count, int64_t inner_count, int64_t runs, Work work) {
  const int64_t units = outer_count * inner_count;
  torch::stable::parallel_for(0, runs, 1, [&](int64_t first_run, int64_t last_run) {
    for (int64_t run = first_run; run < last_run; ++run) {
      const int64_t first = units * run / runs, last = units * (run + 1) / runs;
      for (int64_t unit = first; unit < last; ++unit) {
        const bool is_same = unit > first && unit % inner_count > 0;
        work(run, unit / inner_count, unit % inner_count, is_same);
      }
    }
  });
}

// Maps of height x width, cut into blocks of rows x columns.
struct Place {
  int64_t image, row, column, rows, columns;
};
struct Cut {
  int64_t height, width, rows, columns;

  int64_t blocks() const { return divide_up(height, rows) * divide_up(width, columns); }
  Place place(int64_t block) const {
    const int64_t in_image = block % blocks(), blocks_in_row = divide_up(width, columns);
    const int64_t row = in_image / blocks_in_row * rows;
    const int64_t column = in_image % blocks_in_row * columns;
    return {block / blocks(), row, column, std::min(rows, height - row),
            std::min(columns, width - column)};
  }
};

// Rows and columns of a block's pixels: as many as leave every thread some blocks, and what a block
// sees and sums in the L2 cache.
Cut choose_blocks(const Conv3x3Params& params, int64_t wanted_blocks) {
  constexpr int64_t kMostPixels = 1024, kFewestPixels = 64, kMostFloatsSeen = 384 << 10;
  constexpr int64_t kMostColumns = 64;
  const int64_t most =
      std::min(kMostPixels / params.phases,
               kMostFloatsSeen / (params.in_channels * params.stride * params.stride));
  const int64_t pixels = params.grid_height * params.grid_width;
  const int64_t aim = std::max(std::min(most, divide_up(pixels, wanted_blocks)), kFewestPixels);
  const int64_t columns = divide_evenly(params.grid_width, kMostColumns);
  return {params.grid_height, params.grid_width,
          divide_evenly(params.grid_height, divide_up(aim, columns)), columns};
}

// Packs the weight by `kernel`, `channels` of the input at a time. Runs take shares of the scratch
// memory, which need not hold more than taps.
template <typename Kernel>
void pack_weight(const Conv3x3Params& params, Kernel kernel, int64_t channels, float* panels,
                 float* scratch, int64_t scratch_size, int64_t runs) {
  const int64_t steps = divide_up(params.out_channels, kConvColumns);
  share_out(steps, divide_up(params.in_channels, channels), runs,
            [&](int64_t run, int64_t step, int64_t part, bool) {
              kernel(params, step * kConvColumns, part * channels,
                     std::min((part + 1) * channels, params.in_channels), panels,
                     scratch + run * scratch_size);
            });
}

void run_on_vectors(const Conv3x3Params& params) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t steps = divide_up(params.out_channels, kConvColumns);
  const Cut cut = choose_blocks(params, divide_up(2 * threads, params.batch * steps));
  const int64_t places = params.batch * cut.blocks(), runs = std::min(places * steps, threads);
  const int64_t scratch_size = conv3x3_scratch_size(params, cut.rows, cut.columns);
  Scratch<float> scratch(runs * scratch_size);
  // Where a thread would pack a panel of the weight more than once, all are packed before.
  const bool packs_weight = places > threads;
  const Conv3x3Product product = conv3x3_product(params, 1, 1);
  const int64_t panels_size = steps * params.in_channels * conv3x3_channel_panel_size(product);
  Scratch<float> panels(packs_weight ? panels_size + kConvLanes : 0);
  if (packs_weight) {
    pack_weight(params, FLEXVAR_SELECT_CPU_KERNEL(conv3x3_pack), conv3x3_pack_step(product),
                panels.data(), scratch.data(), scratch_size, runs);
  }
  const auto kernel = FLEXVAR_SELECT_CPU_KERNEL(conv3x3_block);
  share_out(places, steps, runs, [&](int64_t run, int64_t block, int64_t step, bool is_packed) {
    const Place at = cut.place(block);
    kernel(params, {at.image, at.row, at.column, at.rows, at.columns, step * kConvColumns},
           packs_weight ? panels.data() : nullptr, is_packed, scratch.data() + run * scratch_size);
  });
}

bool suits_winograd(const Conv3x3Params& params) {
  return params.resize == ConvResize::none && params.in_channels >= 32 && params.out_channels >= 32;
}

void run_by_winograd(const Conv3x3Params& params) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t steps = divide_up(params.out_channels, kConvColumns);
  const Winograd& sizes = winograd_of(params);
  Cut cut{divide_up(params.height, sizes.outputs), divide_up(params.width, sizes.outputs), 0, 0};
  const int64_t wanted_blocks = divide_up(2 * threads, params.batch * steps);
  const int64_t aim = std::min(kWinogradTiles, divide_up(cut.height * cut.width, wanted_blocks));
  cut.columns = divide_evenly(cut.width, 32);
  cut.rows = divide_evenly(cut.height, std::max<int64_t>(aim / cut.columns, 1));
  const int64_t places = params.batch * cut.blocks(), runs = std::min(places * steps, threads);
  const int64_t scratch_size = sizes.scratch_size(params);
  Scratch<float> scratch(runs * scratch_size);
  // A panel of the weight that is met more than once is transformed before.
  const bool packs_weight = places > 1;
  const int64_t panel_count = steps * sizes.channel_steps(params.in_channels);
  Scratch<float> panels(packs_weight ? panel_count * sizes.panel_size() : 0);
  if (packs_weight) {
    pack_weight(params, FLEXVAR_SELECT_CPU_KERNEL(winograd_pack), kWinogradChannels, panels.data(),
                scratch.data(), scratch_size, runs);
  }
  const auto kernel = FLEXVAR_SELECT_CPU_KERNEL(winograd_block);
  share_out(places, steps, runs, [&](int64_t run, int64_t block, int64_t step, bool is_packed) {
    const Place at = cut.place(block);
    kernel(params,
           {at.image, at.row, at.column, at.rows * at.columns, at.columns, step * kConvColumns},
           packs_weight ? panels.data() : nullptr, is_packed, scratch.data() + run * scratch_size);
  });
}

void run(const Conv3x3Params& params) {
#ifdef FLEXVAR_X86
  if (selected_cpu_isa() == CpuIsa::amx) return run_on_tiles(params);
#endif
  suits_winograd(params) ? run_by_winograd(params) : run_on_vectors(params);
}

Tensor conv3x3_cpu(const Tensor& x_in, const Tensor& weight_in, std::optional<Tensor> bias_in,
                   std::string resize, std::optional<Tensor> residual_in,
                   std::optional<Tensor> packed) {
  STD_TORCH_CHECK(!packed, kConv3x3, ": packed must be None on a CPU");
  const Conv3x3Shape shape = check_conv3x3(x_in, weight_in, bias_in, resize, residual_in);
  Conv3x3Params params{};
  params.resize = shape.resize;
  params.element = element_of(x_in, "x");
  params.weight_element = element_of(weight_in, "weight");
  params.batch = shape.batch;
  params.in_channels = shape.in_channels;
  params.height = shape.height;
  params.width = shape.width;
  params.out_channels = shape.out_channels;
  params.out_height = shape.out_height;
  params.out_width = shape.out_width;
  const bool up = shape.resize == ConvResize::up, down = shape.resize == ConvResize::down;
  params.phases = up ? 4 : 1;
  params.grid_height = up ? params.height : params.out_height;
  params.grid_width = up ? params.width : params.out_width;
  params.side = up ? 2 : 3;
  params.stride = down ? 2 : 1;
  params.padding = down ? 0 : 1;

  const Tensor x = as_channels_last(x_in);
  const bool is_channels_last = has_channels_last(weight_in);
  const Tensor weight = is_channels_last ? weight_in : as_contiguous(weight_in);
  params.channel_stride = is_channels_last ? 1 : 9;
  params.tap_stride = is_channels_last ? params.in_channels : 1;
  std::optional<Tensor> bias, residual;
  if (bias_in) {
    element_of(*bias_in, "bias");
    bias = as_contiguous(as_dtype(*bias_in, ScalarType::Float));
    params.bias = bias->const_data_ptr<float>();
  }
  if (residual_in) {
    residual = as_channels_last(*residual_in);
    params.residual = residual->const_data_ptr();
  }
  const auto sizes = shape.result_sizes();
  Tensor out = empty_cpu(sizes, channels_last_strides(sizes), x.scalar_type());
  params.x = x.const_data_ptr();
  params.weight = weight.const_data_ptr();
  params.out = out.mutable_data_ptr();
  if (out.numel() > 0) run(params);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(flexvar, CPU, m) { m.impl("conv3x3", TORCH_BOX(&conv3x3_cpu)); }

}  // namespace
}  // namespace flexvar
