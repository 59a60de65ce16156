#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <vector>

#include "common/tensor_checks.h"
#include "resample/arguments.h"
#include "resample/table.h"
#include "vq_lookup/cpu_kernel.h"

namespace flexvar {
namespace {

// Rows of a task, and rows whose group maxima are held at a time.
constexpr int64_t kRowsPerTask = 64;
constexpr int64_t kRowsPerPass = 1024;
// Multiply-adds below which another thread is not worth waking.
constexpr int64_t kMinProducts = 1 << 20;

template <class T>
T* allocate(Tensor& owner, int64_t elements) {
  owner = torch::stable::empty({elements * static_cast<int64_t>(sizeof(T))}, ScalarType::Byte);
  return reinterpret_cast<T*>(owner.mutable_data_ptr());
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

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
  const int64_t blocks = params.blocks();
  const int64_t padded_rows = divide_up(n, kVqRowMultiple) * kVqRowMultiple;
  Tensor owners[7];
  params.packed_codes = allocate<float>(owners[0], blocks * kVqBlockCodes * params.dim);
  params.negative_half = allocate<float>(owners[1], blocks * kVqBlockCodes);
  params.inverse_norms = allocate<double>(owners[2], params.num_codes);
  params.block_norms = allocate<double>(owners[3], blocks);
  params.queries = allocate<float>(owners[4], padded_rows * params.padded_dim());
  params.query_norms = allocate<double>(owners[5], n);
  params.group_max =
      allocate<float>(owners[6], std::min(padded_rows, kRowsPerPass) * blocks * kVqMaxLanes);

  const auto prepare_codes = FLEXVAR_SELECT_CPU_KERNEL(vq_prepare_codes);
  const auto prepare_latents = FLEXVAR_SELECT_CPU_KERNEL(vq_prepare_latents);
  const auto score = FLEXVAR_SELECT_CPU_KERNEL(vq_score);
  const auto resolve = FLEXVAR_SELECT_CPU_KERNEL(vq_resolve);
  torch::stable::parallel_for(
      0, blocks, 4, [&](int64_t begin, int64_t end) { prepare_codes(params, begin, end); });
  params.max_code_norm = *std::max_element(params.block_norms, params.block_norms + blocks);
  torch::stable::parallel_for(0, padded_rows, pyramid ? 16 : 512, [&](int64_t begin, int64_t end) {
    prepare_latents(params, begin, end);
  });
  const int64_t threads = torch::stable::get_num_threads();
  for (params.first_row = 0; params.first_row < n; params.first_row += kRowsPerPass) {
    const int64_t last_row = std::min(params.first_row + kRowsPerPass, padded_rows);
    const int64_t row_tasks = divide_up(last_row - params.first_row, kRowsPerTask);
    // With few queries the codes are split as well, so that every thread has work.
    const int64_t splits = std::min(blocks, divide_up(2 * threads, row_tasks));
    const int64_t products = std::min(last_row - params.first_row, kRowsPerTask) *
                             divide_up(blocks, splits) * kVqBlockCodes * params.dim;
    const int64_t grain = divide_up(kMinProducts, products);
    torch::stable::parallel_for(0, row_tasks * splits, grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t row = params.first_row + task / splits * kRowsPerTask, split = task % splits;
        score(params, row, std::min(row + kRowsPerTask, last_row), split * blocks / splits,
              (split + 1) * blocks / splits);
      }
    });
    torch::stable::parallel_for(params.first_row, std::min(last_row, n), 64,
                                [&](int64_t begin, int64_t end) { resolve(params, begin, end); });
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
  std::vector<ResampleTable<float>> tables;  // rows and columns of each scale
  int64_t tokens = 0;
  for (size_t i = 0; i < heights.size(); ++i) {
    check_side(heights[i], op, "a scale's height");
    check_side(widths[i], op, "a scale's width");
    tables.emplace_back(mode, height, heights[i]);
    tables.emplace_back(mode, width, widths[i]);
    tokens += heights[i] * widths[i];
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
