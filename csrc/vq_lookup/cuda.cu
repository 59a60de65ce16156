#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <type_traits>
#include <vector>

#include "common/cuda_launch.h"
#include "common/tensor_checks.h"
#include "common/tensor_memory.h"
#include "resample/arguments.h"
#include "vq_lookup/kernel.cuh"

namespace flexvar {
namespace {

// Lays buffers out in one allocation; called twice: to add sizes up, and with memory to hand out.
class Layout {
 public:
  explicit Layout(unsigned char* memory) : memory_(memory) {}
  template <class T>
  T* take(int64_t elements) {
    unsigned char* taken = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += (elements * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return reinterpret_cast<T*>(taken);
  }
  int64_t used() const { return used_; }

 private:
  unsigned char* memory_;
  int64_t used_ = 0;
};

VqWorkspace lay_out(const VqProblem& problem, Layout& layout) {
  const int64_t codes = problem.padded_codes(), rows = problem.num_latents;
  VqWorkspace workspace{};
  workspace.codes = layout.take<float>(codes * problem.padded_dim);
  workspace.latents = layout.take<float>(rows * problem.padded_dim);
  workspace.half_norms = layout.take<double>(codes);
  workspace.starts = layout.take<float>(codes * 2);
  workspace.latent_norms = layout.take<double>(rows);
  workspace.max_code_norm = layout.take<float>(1);
  workspace.codes_half = layout.take<__half>(codes * problem.tensor_dim);
  workspace.latents_half = layout.take<__half>(rows * problem.tensor_dim);
  workspace.tops = layout.take<VqTop>(rows * problem.parts * kVqSubgroups);
  return workspace;
}

// Instantiations of a template for problem.tensor_dim.
template <class Launch>
void with_steps(const VqProblem& problem, Launch launch) {
  switch (problem.tensor_dim / 16) {
    case 1:
      return launch(std::integral_constant<int, 1>());
    case 2:
      return launch(std::integral_constant<int, 2>());
    case 3:
      return launch(std::integral_constant<int, 3>());
    case 4:
      return launch(std::integral_constant<int, 4>());
    default:
      launch(std::integral_constant<int, 0>());
  }
}

void launch_prepare(const VqPrepareParams& params, cudaStream_t stream, const char* op) {
  const int64_t rows = params.code_rows + params.latent_rows;
  const auto kernel =
      params.source.num_scales > 0 ? vq_prepare_kernel<true> : vq_prepare_kernel<false>;
  launch_kernel(op, stream, kernel, vq_prepare_grid(rows), kVqPrepareThreads, 0, params);
}

bool has_warpgroups(const char* op) {
  return takes_threads(vq_score_warpgroup_kernel<1>, kVqWarpgroupThreads, op);
}

template <int kSteps>
void launch_score(const VqProblem& problem, const VqWorkspace& workspace, cudaStream_t stream,
                  const char* op) {
  const unsigned blocks = grid_size(problem.blocks(), op);
  if constexpr (kSteps == 0) {
    launch_overlapping(op, stream, vq_score_float_kernel, blocks, kVqFloatThreads, 0, problem,
                       workspace);
  } else {
    if constexpr (kSteps <= kVqWarpgroupMaxSteps) {
      if (problem.by_warpgroups) {
        return launch_overlapping(op, stream, vq_score_warpgroup_kernel<kSteps>, blocks,
                                  kVqWarpgroupThreads, 0, problem, workspace);
      }
    }
    constexpr int kFragments = vq_row_fragments(kSteps);
    const auto kernel = problem.tile_rows == vq_tensor_rows(kFragments)
                            ? vq_score_tensor_kernel<kSteps, kFragments>
                            : vq_score_tensor_kernel<kSteps, 1>;
    launch_overlapping(op, stream, kernel, blocks, kVqTensorThreads, 0, problem, workspace);
  }
}

void launch_score_and_resolve(const VqResolveParams& params, cudaStream_t stream, const char* op) {
  with_steps(params.problem, [&](auto steps) {
    launch_score<steps>(params.problem, params.workspace, stream, op);
    launch_overlapping(op, stream, vq_resolve_kernel<steps>,
                       grid_size(vq_resolve_blocks(params.problem), op), kVqResolveThreads, 0,
                       params);
  });
}

void look_up_few(const VqProblem& problem, const VqDirectRows& latents, const VqDirectRows& codes,
                 const Tensor& codebook, int64_t* indices, cudaStream_t stream, const char* op) {
  const int64_t groups = problem.stages * kVqChunksPerStage * kVqSubgroups;
  Tensor maxima = torch::stable::new_empty(codebook, {problem.num_latents, groups});
  VqResolveFewParams params{};
  params.scores = {problem, latents, codes, maxima.mutable_data_ptr<float>()};
  const VqErrorBound bound = vq_error_bound(problem);
  params.reach = vq_unit_reach(bound);
  params.cosine_reach = static_cast<float>(2.001 * vq_cosine_bound(problem));
  params.indices = indices;
  with_steps(problem, [&](auto steps) {
    if constexpr (steps > 0) {
      const dim3 grid(grid_size(problem.parts, op), grid_size(problem.row_tiles, op));
      launch_kernel(op, stream, vq_score_few_kernel<steps>, grid, kVqFewThreads, 0, params.scores);
      const int64_t blocks = divide_up(problem.num_latents, kVqResolveFewThreads / 32);
      launch_overlapping(op, stream, vq_resolve_few_kernel<steps>, grid_size(blocks, op),
                         kVqResolveFewThreads, 0, params);
    }
  });
}

bool in_fours(const float* rows, int64_t dim) {
  return dim % 4 == 0 && reinterpret_cast<uintptr_t>(rows) % sizeof(float4) == 0;
}

// `scales` is empty for a matrix of latents [N, C]; else source says what is resampled.
Tensor look_up(VqLatentSource source, const std::vector<VqScaleSize>& scales, int64_t num_latents,
               const Tensor& codebook, bool normalize, const char* op) {
  const CudaScope scope(codebook);
  Tensor indices = empty_contiguous({num_latents}, ScalarType::Long, device_of(codebook));
  if (num_latents == 0) return indices;
  const int64_t largest = int64_t(1) << 31;
  STD_TORCH_CHECK(codebook.size(0) < largest && codebook.size(1) < largest, op,
                  ": codebook must have fewer than 2^31 rows and columns");
  const Tensor codes = as_contiguous(codebook);
  const int multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, op);
  VqPrepareParams prepare{};
  const int64_t dim = codes.size(1);
  const auto* code_values = codes.const_data_ptr<float>();
  const bool can_be_direct = scales.empty() && in_fours(source.latents, dim) &&
                             in_fours(code_values, dim) && num_latents < largest / 4 &&
                             codes.size(0) < largest / 4;
  prepare.problem = plan_vq_lookup(num_latents, codes.size(0), static_cast<int>(dim), normalize,
                                   can_be_direct, has_warpgroups(op), multiprocessors);
  if (prepare.problem.few) {
    look_up_few(prepare.problem,
                {source.latents, static_cast<int>(num_latents), prepare.problem.dim},
                {code_values, static_cast<int>(codes.size(0)), prepare.problem.dim}, codes,
                indices.mutable_data_ptr<int64_t>(), scope.stream(), op);
    return indices;
  }
  VqResolveParams resolve{};
  resolve.problem = prepare.problem;
  resolve.bound = vq_error_bound(prepare.problem);
  resolve.unit_reach = vq_unit_reach(resolve.bound);
  resolve.indices = indices.mutable_data_ptr<int64_t>();
  Layout sizes(nullptr);
  lay_out(prepare.problem, sizes);
  Tensor memory = empty_contiguous({sizes.used()}, ScalarType::Byte, device_of(codes));
  Layout layout(static_cast<unsigned char*>(memory.mutable_data_ptr()));
  prepare.workspace = lay_out(prepare.problem, layout);
  resolve.workspace = prepare.workspace;
  prepare.codebook = code_values;
  prepare.source = source;
  prepare.code_rows = prepare.problem.padded_codes();
  if (!normalize) {
    check_cuda(cudaMemsetAsync(prepare.workspace.max_code_norm, 0, sizeof(float), scope.stream()),
               op, "cudaMemsetAsync");
  }
  if (scales.empty()) {
    prepare.latent_rows = num_latents;
    launch_prepare(prepare, scope.stream(), op);
  }
  for (size_t first = 0; first < scales.size(); first += kVqMaxScales) {
    const size_t end = std::min(scales.size(), first + kVqMaxScales);
    VqLatentSource& part = prepare.source;
    part.num_scales = static_cast<int>(end - first);
    std::copy(scales.begin() + first, scales.begin() + end, part.scales);
    part.first_token = scales[first].first_token;
    part.end_token = end < scales.size() ? scales[end].first_token : source.tokens;
    prepare.latent_rows = num_latents / source.tokens * (part.end_token - part.first_token);
    launch_prepare(prepare, scope.stream(), op);
    prepare.code_rows = 0;
  }
  launch_score_and_resolve(resolve, scope.stream(), op);
  return indices;
}

void check_codebook(const Tensor& latents, const Tensor& codebook, const char* op) {
  check_rank(codebook, 2, op, "codebook");
  check_dtype(codebook, ScalarType::Float, op, "codebook");
  check_same_device(latents, codebook, op, "codebook");
  const int64_t dim = latents.size(1);
  STD_TORCH_CHECK(codebook.size(0) > 0 && codebook.size(1) == dim && dim > 0, op,
                  ": codebook must be [V >= 1, C >= 1]");
}

Tensor vq_lookup_cuda(const Tensor& latents, const Tensor& codebook, bool normalize) {
  const char* op = "vq_lookup";
  check_rank(latents, 2, op, "latents");
  check_dtype(latents, ScalarType::Float, op, "latents");
  check_codebook(latents, codebook, op);
  const Tensor rows = as_contiguous(latents);
  VqLatentSource source{};
  source.latents = rows.const_data_ptr<float>();
  return look_up(source, {}, rows.size(0), codebook, normalize, op);
}

Tensor vq_lookup_multiscale_cuda(const Tensor& latent, const Tensor& codebook,
                                 std::vector<int64_t> heights, std::vector<int64_t> widths,
                                 bool normalize, std::string mode, bool antialias) {
  const char* op = "vq_lookup_multiscale";
  check_rank(latent, 4, op, "latent");
  check_dtype(latent, ScalarType::Float, op, "latent");
  check_codebook(latent, codebook, op);
  STD_TORCH_CHECK(heights.size() == widths.size() && !heights.empty(), op,
                  ": heights and widths must pair up");
  check_side(latent.size(2), op, "latent's height");
  check_side(latent.size(3), op, "latent's width");
  const Tensor images = as_contiguous(latent);
  VqLatentSource source{};
  source.latents = images.const_data_ptr<float>();
  source.mode = parse_resample_mode(mode, antialias, op);
  source.height = static_cast<int>(images.size(2));
  source.width = static_cast<int>(images.size(3));
  std::vector<VqScaleSize> scales;
  for (size_t i = 0; i < heights.size(); ++i) {
    check_side(heights[i], op, "a scale's height");
    check_side(widths[i], op, "a scale's width");
    scales.push_back({source.tokens, static_cast<int>(heights[i]), static_cast<int>(widths[i])});
    source.tokens += heights[i] * widths[i];
  }
  const Tensor indices =
      look_up(source, scales, images.size(0) * source.tokens, codebook, normalize, op);
  return torch::stable::view(indices, {images.size(0), source.tokens});
}

FLEXVAR_LAUNCHERS(m) {
  m.impl("vq_lookup", TORCH_BOX(&vq_lookup_cuda));
  m.impl("vq_lookup_multiscale", TORCH_BOX(&vq_lookup_multiscale_cuda));
}

}  // namespace
}  // namespace flexvar
