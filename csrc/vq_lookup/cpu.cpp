#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <vector>

#include "common/cpu_memory.h"
#include "common/divide_up.h"
#include "common/tensor_checks.h"
#include "resample/arguments.h"
#include "resample/table.h"
#include "vq_lookup/cpu_amx.h"
#include "vq_lookup/cpu_kernel.h"
#include "vq_lookup/cpu_vnni.h"

namespace flexvar {
namespace {

// Rows whose group maxima a worker holds at a time.
constexpr int64_t kRowsAtATime = 64;
// Multiply-adds below which another thread is not worth waking.
constexpr int64_t kMinProducts = 1 << 20;

// Everything that the scores need, in one parallel region: a unit is a block of codes or as many
// latents.
void prepare(VqLookupParams& params, int64_t padded_rows) {
  const auto prepare_codes = FLEXVAR_SELECT_CPU_KERNEL(vq_prepare_codes);
  const auto prepare_latents = FLEXVAR_SELECT_CPU_KERNEL(vq_prepare_latents);
  const int64_t blocks = params.blocks();
  const int64_t units = blocks + divide_up(padded_rows, kVqBlockCodes);
  torch::stable::parallel_for(0, units, 4, [&](int64_t begin, int64_t end) {
    prepare_codes(params, begin, std::min(end, blocks));
    prepare_latents(params, std::max(begin - blocks, int64_t(0)) * kVqBlockCodes,
                    std::min((end - blocks) * kVqBlockCodes, padded_rows));
  });
  params.max_code_norm = *std::max_element(params.block_norms, params.block_norms + blocks);
}

// Each worker looks up rows of its own.
void split_rows(const VqLookupParams& params, int64_t padded_rows, int64_t workers) {
  const auto score = FLEXVAR_SELECT_CPU_KERNEL(vq_score);
  const auto resolve = FLEXVAR_SELECT_CPU_KERNEL(vq_resolve);
  const int64_t units = padded_rows / kVqRowMultiple;
  const int64_t scratch_size = kRowsAtATime * params.blocks() * kVqMaxLanes;
  Scratch<float> group_max(workers * scratch_size);
  float* const scratch = group_max.data();
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      VqLookupParams part = params;
      part.group_max = scratch + worker * scratch_size;
      const int64_t last = units * (worker + 1) / workers * kVqRowMultiple;
      for (int64_t row = units * worker / workers * kVqRowMultiple; row < last;
           row += kRowsAtATime) {
        part.first_row = row;
        const int64_t row_end = std::min(row + kRowsAtATime, last);
        score(part, row, row_end, 0, params.blocks());
        resolve(part, row, std::min(row_end, params.num_latents));
      }
    }
  });
}

// With few rows, each worker scores all of them against codes of its own.
void split_codes(VqLookupParams params, int64_t padded_rows, int64_t workers) {
  const auto score = FLEXVAR_SELECT_CPU_KERNEL(vq_score);
  const auto resolve = FLEXVAR_SELECT_CPU_KERNEL(vq_resolve);
  const int64_t blocks = params.blocks();
  Scratch<float> group_max(padded_rows * blocks * kVqMaxLanes);
  params.first_row = 0;
  params.group_max = group_max.data();
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    score(params, 0, padded_rows, blocks * begin / workers, blocks * end / workers);
  });
  torch::stable::parallel_for(0, params.num_latents, 64,
                              [&](int64_t begin, int64_t end) { resolve(params, begin, end); });
}

#ifdef FLEXVAR_X86
// Tiles: amx::VqTiles or avx512vnni::VqTiles, which bring the functions of the same names.
template <typename Tiles>
void look_up_on_tiles(const VqLookupParams& params) {
  using Score = typename Tiles::Score;
  Tiles tiles{};
  VqLookupParams& base = tiles.base = params;
  const int64_t code_tiles = tiles.code_tiles(), query_tiles = tiles.query_tiles();
  const int64_t padded_codes = code_tiles * kVqTile, padded_rows = tiles.queries_of_tiles();
  Scratch<char> codes(code_tiles * tiles.code_tile_bytes()),
      queries(query_tiles * tiles.query_tile_bytes());
  Scratch<Score> negative_half(padded_codes);
  Scratch<float> rows(padded_rows * base.padded_dim());
  Scratch<double> inverse_norms(padded_codes), tile_norms(code_tiles), query_norms(padded_rows);
  tiles.codes = codes.data();
  tiles.queries = queries.data();
  tiles.negative_half = negative_half.data();
  base.inverse_norms = inverse_norms.data();
  base.block_norms = tile_norms.data();
  base.queries = rows.data();
  base.query_norms = query_norms.data();
  torch::stable::parallel_for(0, code_tiles + query_tiles, 16, [&](int64_t begin, int64_t end) {
    vq_tiles_prepare_codes(tiles, begin, std::min(end, code_tiles));
    vq_tiles_prepare_queries(tiles, std::max(begin - code_tiles, int64_t(0)), end - code_tiles);
  });
  base.max_code_norm = *std::max_element(base.block_norms, base.block_norms + code_tiles);

  // A few times as many products as elsewhere are as soon done.
  const int64_t products = padded_rows * padded_codes * base.dim;
  const int64_t workers =
      std::clamp<int64_t>(products / (4 * kMinProducts), 1, torch::stable::get_num_threads());
  // Each worker has queries of its own; if there are few, all of them, with codes of its own.
  const bool splits_queries = query_tiles >= 2 * workers;
  const int64_t shares = splits_queries ? 1 : workers, blocks = tiles.code_blocks();
  Scratch<Score> thresholds(shares * padded_rows);
  Scratch<VqCandidates<Score>> candidates(shares * padded_rows);
  tiles.thresholds = thresholds.data();
  tiles.candidates = candidates.data();
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      const int64_t first = query_tiles * worker / workers;
      const int64_t last = query_tiles * (worker + 1) / workers;
      if (splits_queries) {
        vq_tiles_score(tiles, 0, first, last, 0, blocks);
        vq_tiles_resolve(tiles, shares, first, last);
      } else {
        vq_tiles_score(tiles, worker, 0, query_tiles, blocks * worker / workers,
                       blocks * (worker + 1) / workers);
      }
    }
  });
  if (!splits_queries) vq_tiles_resolve(tiles, shares, 0, query_tiles);
}
#endif

// Looks up the rows of `latents` [N, C], or, with a pyramid, the N rows resampled from them.
Tensor look_up(const Tensor& latents, int64_t n, const VqPyramid* pyramid, const Tensor& codebook,
               bool normalize) {
  Tensor indices = torch::stable::empty({n}, ScalarType::Long);
  if (n == 0) return indices;
  const Tensor rows = torch::stable::contiguous(latents);
  const Tensor codes = torch::stable::contiguous(codebook);
  VqLookupParams params{};
  params.codebook = codes.const_data_ptr<float>();
  params.latents = rows.const_data_ptr<float>();
  params.pyramid = pyramid;
  params.num_codes = codes.size(0);
  params.num_latents = n;
  params.dim = codes.size(1);
  params.normalize = normalize;
  params.indices = indices.mutable_data_ptr<int64_t>();
#ifdef FLEXVAR_X86
  const CpuIsa isa = selected_cpu_isa();
  if (isa >= CpuIsa::avx512vnni && normalize && params.dim <= avx512vnni::VqTiles::kMaxDim) {
    look_up_on_tiles<avx512vnni::VqTiles>(params);
    return indices;
  }
  if (isa == CpuIsa::amx && n >= amx::VqTiles::kFewestLatents &&
      params.dim <= amx::VqTiles::kMaxDim) {
    look_up_on_tiles<amx::VqTiles>(params);
    return indices;
  }
#endif
  const int64_t blocks = params.blocks();
  const int64_t padded_rows = divide_up(n, kVqRowMultiple) * kVqRowMultiple;
  const int64_t padded_codes = blocks * kVqBlockCodes;
  Scratch<float> packed_codes(padded_codes * params.dim), negative_half(padded_codes),
      queries(padded_rows * params.padded_dim());
  Scratch<double> inverse_norms(padded_codes), block_norms(blocks), query_norms(n);
  params.packed_codes = packed_codes.data();
  params.negative_half = negative_half.data();
  params.inverse_norms = inverse_norms.data();
  params.block_norms = block_norms.data();
  params.queries = queries.data();
  params.query_norms = query_norms.data();
  prepare(params, padded_rows);
  const int64_t products = padded_rows * blocks * kVqBlockCodes * params.dim;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t workers = std::clamp(products / kMinProducts, int64_t(1), threads);
  if (padded_rows >= workers * kRowsAtATime) {
    split_rows(params, padded_rows, workers);
  } else {
    split_codes(params, padded_rows, workers);
  }
  return indices;
}

void check_codebook(const Tensor& codebook, int64_t dim, const char* op) {
  check_rank(codebook, 2, op, "codebook");
  check_dtype(codebook, ScalarType::Float, op, "codebook");
  STD_TORCH_CHECK(codebook.size(0) > 0 && codebook.size(1) == dim && dim > 0, op,
                  ": codebook must be [V >= 1, C >= 1]");
}

Tensor vq_lookup_cpu(const Tensor& latents, const Tensor& codebook, bool normalize) {
  check_rank(latents, 2, "vq_lookup", "latents");
  check_dtype(latents, ScalarType::Float, "vq_lookup", "latents");
  check_codebook(codebook, latents.size(1), "vq_lookup");
  return look_up(latents, latents.size(0), nullptr, codebook, normalize);
}

Tensor vq_lookup_multiscale_cpu(const Tensor& latent, const Tensor& codebook,
                                std::vector<int64_t> heights, std::vector<int64_t> widths,
                                bool normalize, std::string mode_name, bool antialias) {
  const char* op = "vq_lookup_multiscale";
  check_rank(latent, 4, op, "latent");
  check_dtype(latent, ScalarType::Float, op, "latent");
  check_codebook(codebook, latent.size(1), op);
  STD_TORCH_CHECK(heights.size() == widths.size(), op, ": heights and widths must pair up");
  const ResampleMode mode = parse_resample_mode(mode_name, antialias, op);
  check_side(latent.size(2), op, "latent's height");
  check_side(latent.size(3), op, "latent's width");
  const int64_t batch = latent.size(0), height = latent.size(2), width = latent.size(3);
  int64_t tokens = 0;
  for (size_t i = 0; i < heights.size(); ++i) {
    check_side(heights[i], op, "a scale's height");
    check_side(widths[i], op, "a scale's width");
    tokens += heights[i] * widths[i];
  }
  if (batch * tokens == 0) return torch::stable::empty({batch, tokens}, ScalarType::Long);
  std::vector<ResampleTable<float>> tables;  // rows and columns of each scale
  for (size_t i = 0; i < heights.size(); ++i) {
    tables.emplace_back(mode, height, heights[i]);
    tables.emplace_back(mode, width, widths[i]);
  }
  std::vector<VqScale> scales;
  for (size_t i = 0, first = 0; i < heights.size(); first += heights[i] * widths[i], ++i) {
    scales.push_back({static_cast<int64_t>(first), tables[2 * i].taps(), tables[2 * i + 1].taps()});
  }
  const VqPyramid pyramid{scales.data(), static_cast<int64_t>(scales.size()), tokens};
  const Tensor flat =
      torch::stable::transpose(torch::stable::flatten(latent, 2, 3), 1, 2);  // [B, H * W, C]
  const Tensor indices = look_up(flat, batch * tokens, &pyramid, codebook, normalize);
  return torch::stable::view(indices, {batch, tokens});
}

STABLE_TORCH_LIBRARY_IMPL(flexvar, CPU, m) {
  m.impl("vq_lookup", TORCH_BOX(&vq_lookup_cpu));
  m.impl("vq_lookup_multiscale", TORCH_BOX(&vq_lookup_multiscale_cpu));
}

}  // namespace
}  // namespace flexvar
