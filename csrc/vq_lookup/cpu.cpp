#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <deque>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "common/cpu_memory.h"
#include "common/cpu_shares.h"
#include "common/divide_up.h"
#include "common/tensor_checks.h"
#include "common/tensor_memory.h"
#include "resample/arguments.h"
#include "resample/table.h"
#include "vq_lookup/cpu_amx.h"
#include "vq_lookup/cpu_integers.h"
#include "vq_lookup/cpu_kernel.h"

namespace flexvar {
namespace {

// The indices, and whether all codes are finite.
using Lookup = std::tuple<Tensor, bool>;

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
// Both passes. Workers share queries out, and where there are too few of them codes, too.
template <typename Tiles>
void look_up_on_tiles(const Tiles& of_codes, int64_t workers) {
  Tiles tiles = of_codes;
  const int64_t query_tiles = tiles.query_tiles(), padded_rows = tiles.queries_of_tiles();
  int64_t query_shares =
      std::clamp<int64_t>(query_tiles / Tiles::kFewestQueryTilesOfShare, 1, workers);
  while (workers % query_shares != 0) --query_shares;
  const int64_t code_shares = workers / query_shares;

  Scratch<char> queries(query_tiles * tiles.query_tile_bytes());
  Scratch<float> rows(padded_rows * tiles.base.padded_dim());
  Scratch<double> query_norms(padded_rows);
  Scratch<typename Tiles::Score> thresholds(code_shares * padded_rows);
  Scratch<VqCandidates<typename Tiles::Score>> candidates(code_shares * padded_rows);
  tiles.queries = queries.data();
  tiles.base.queries = rows.data();
  tiles.base.query_norms = query_norms.data();
  tiles.thresholds = thresholds.data();
  tiles.candidates = candidates.data();

  // One parallel region, in which threads take what is next: those that are awake do not wait for
  // those that have yet to wake up.
  Shares preparing(query_tiles, workers);
  std::deque<Shares> scoring;  // of each share of the queries
  for (int64_t i = 0; i < query_shares; ++i) scoring.emplace_back(tiles.code_blocks(), code_shares);
  std::atomic<int64_t> prepared = 0;
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      preparing.take([&](int64_t first, int64_t last) {
        vq_tiles_prepare_queries(tiles, first, last);
        prepared += last - first;
      });
      while (prepared < query_tiles) std::this_thread::yield();  // others are at the last ones
      const int64_t query_share = worker / code_shares;
      const VqQueries part{worker, worker % code_shares, query_tiles * query_share / query_shares,
                           query_tiles * (query_share + 1) / query_shares};
      vq_tiles_start(tiles, part);
      scoring[query_share].take(
          [&](int64_t first, int64_t last) { vq_tiles_score(tiles, part, first, last); });
    }
  });
  torch::stable::parallel_for(0, query_tiles, 8, [&](int64_t begin, int64_t end) {
    vq_tiles_resolve(tiles, code_shares, begin, end);
  });
}

// A few times as many products as elsewhere are as soon done.
int64_t workers_on_tiles(int64_t products) {
  return std::clamp<int64_t>(products / (4 * kMinProducts), 1, torch::stable::get_num_threads());
}

template <typename Tiles>
void look_up_in_integers(const VqLookupParams& params) {
  constexpr int64_t kQueriesOfMaking = 64;  // that are scored while a code is made
  Tiles tiles{};
  tiles.base = params;
  const int64_t workers =
      workers_on_tiles((params.num_latents + kQueriesOfMaking) * params.num_codes * params.dim);
  Scratch<char> code_blocks(workers * tiles.code_block_bytes());
  tiles.code_blocks_of_workers = code_blocks.data();
  look_up_on_tiles(tiles, workers);
}

void look_up_on_tile_unit(const VqLookupParams& params) {
  amx::VqTiles tiles{};
  tiles.base = params;
  const int64_t code_tiles = tiles.code_tiles();
  Scratch<char> codes(code_tiles * tiles.code_tile_bytes());
  Scratch<float> negative_half(code_tiles * amx::VqTiles::kTileCodes);
  Scratch<double> tile_norms(code_tiles);
  tiles.codes = codes.data();
  tiles.negative_half = negative_half.data();
  tiles.tile_norms = tile_norms.data();
  torch::stable::parallel_for(0, code_tiles, 16, [&](int64_t begin, int64_t end) {
    vq_tiles_prepare_codes(tiles, begin, end);
  });
  tiles.max_code_norm = *std::max_element(tiles.tile_norms, tiles.tile_norms + code_tiles);
  look_up_on_tiles(tiles, workers_on_tiles(params.num_latents * params.num_codes * params.dim));
}
#endif

// Looks up the rows of `latents` [N, C], or, with a pyramid, the N rows resampled from them. Also
// whether all codes are finite.
Lookup look_up(const Tensor& latents, int64_t n, const VqPyramid* pyramid, const Tensor& codebook,
               bool normalize) {
  Tensor indices = empty_cpu({n}, ScalarType::Long);
  bool codebook_is_finite = true;
  const Tensor rows = as_contiguous(latents), codes = as_contiguous(codebook);
  VqLookupParams params{};
  params.codebook = codes.const_data_ptr<float>();
  params.latents = rows.const_data_ptr<float>();
  params.pyramid = pyramid;
  params.num_codes = codes.size(0);
  params.num_latents = n;
  params.dim = codes.size(1);
  params.normalize = normalize;
  params.indices = indices.mutable_data_ptr<int64_t>();
  params.codebook_is_finite = &codebook_is_finite;
#ifdef FLEXVAR_X86
  const CpuIsa isa = selected_cpu_isa();
  const bool fits_tiles = params.num_codes <= kVqMostCodesOfTiles;
  // AVX-512 without VNNI multiplies floats as fast as integers.
  if (isa != CpuIsa::baseline && isa != CpuIsa::avx512 && fits_tiles && normalize &&
      params.dim <= kVqMostDimOfIntegers) {
    isa == CpuIsa::avx2 ? look_up_in_integers<avx2::VqTiles>(params)
                        : look_up_in_integers<avx512vnni::VqTiles>(params);
    return {indices, codebook_is_finite};
  }
  if (isa == CpuIsa::amx && fits_tiles && n >= amx::VqTiles::kFewestLatents &&
      params.dim <= amx::VqTiles::kMaxDim) {
    look_up_on_tile_unit(params);
    return {indices, codebook_is_finite};
  }
#endif
  const int64_t blocks = params.blocks();
  const int64_t padded_rows = divide_up(n, kVqRowMultiple) * kVqRowMultiple;
  const int64_t padded_codes = blocks * kVqBlockCodes;
  Scratch<float> packed_codes(padded_codes * params.dim), negative_half(padded_codes),
      queries(padded_rows * params.padded_dim());
  Scratch<double> scales(padded_codes), block_norms(blocks), query_norms(n);
  params.packed_codes = packed_codes.data();
  params.negative_half = negative_half.data();
  params.scales = scales.data();
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
  return {indices, codebook_is_finite};
}

void check_codebook(const Tensor& codebook, int64_t dim, const char* op) {
  check_rank(codebook, 2, op, "codebook");
  check_dtype(codebook, ScalarType::Float, op, "codebook");
  STD_TORCH_CHECK(codebook.size(0) > 0 && codebook.size(1) == dim && dim > 0, op,
                  ": codebook must be [V >= 1, C >= 1]");
}

Lookup vq_lookup_checked(const Tensor& latents, const Tensor& codebook, bool normalize) {
  check_rank(latents, 2, "vq_lookup", "latents");
  check_dtype(latents, ScalarType::Float, "vq_lookup", "latents");
  check_codebook(codebook, latents.size(1), "vq_lookup");
  return look_up(latents, latents.size(0), nullptr, codebook, normalize);
}

Tensor vq_lookup_cpu(const Tensor& latents, const Tensor& codebook, bool normalize) {
  return std::get<0>(vq_lookup_checked(latents, codebook, normalize));
}

Lookup vq_lookup_multiscale_checked(const Tensor& latent, const Tensor& codebook,
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
  std::vector<ResampleTable<float>> tables;  // rows and columns of each scale
  for (size_t i = 0; i < heights.size() && batch > 0; ++i) {
    tables.emplace_back(mode, height, heights[i]);
    tables.emplace_back(mode, width, widths[i]);
  }
  std::vector<VqScale> scales;
  for (size_t i = 0, first = 0; 2 * i < tables.size(); first += heights[i] * widths[i], ++i) {
    scales.push_back({static_cast<int64_t>(first), tables[2 * i].taps(), tables[2 * i + 1].taps()});
  }
  const VqPyramid pyramid{scales.data(), static_cast<int64_t>(scales.size()), tokens};
  const Tensor flat =
      torch::stable::transpose(torch::stable::flatten(latent, 2, 3), 1, 2);  // [B, H * W, C]
  const auto [indices, is_finite] = look_up(flat, batch * tokens, &pyramid, codebook, normalize);
  return {torch::stable::view(indices, {batch, tokens}), is_finite};
}

Tensor vq_lookup_multiscale_cpu(const Tensor& latent, const Tensor& codebook,
                                std::vector<int64_t> heights, std::vector<int64_t> widths,
                                bool normalize, std::string mode_name, bool antialias) {
  return std::get<0>(vq_lookup_multiscale_checked(latent, codebook, heights, widths, normalize,
                                                  mode_name, antialias));
}

STABLE_TORCH_LIBRARY_IMPL(flexvar, CPU, m) {
  m.impl("vq_lookup", TORCH_BOX(&vq_lookup_cpu));
  m.impl("vq_lookup_checked", TORCH_BOX(&vq_lookup_checked));
  m.impl("vq_lookup_multiscale", TORCH_BOX(&vq_lookup_multiscale_cpu));
  m.impl("vq_lookup_multiscale_checked", TORCH_BOX(&vq_lookup_multiscale_checked));
}

}  // namespace
}  // namespace flexvar
