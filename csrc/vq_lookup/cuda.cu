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

// `overlap`: behind the kernel that resamples the latents.
void launch_prepare(const VqPrepareParams& params, bool overlap, cudaStream_t stream,
                    const char* op) {
  const auto launch =
      overlap ? launch_overlapping<VqPrepareParams> : launch_kernel<VqPrepareParams>;
  launch(op, stream, vq_prepare_kernel, grid_size(vq_prepare_blocks(params.problem), op),
         kVqPrepareThreads, 0, params);
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
                 bool resampled, DevicePlace device, int64_t* indices, cudaStream_t stream,
                 const char* op) {
  const int64_t groups = problem.stages * kVqChunksPerStage * kVqSubgroups;
  Tensor maxima = empty_contiguous({problem.num_latents, groups}, ScalarType::Float, device);
  VqResolveFewParams params{};
  params.scores = {problem, latents, codes, resampled, maxima.mutable_data_ptr<float>()};
  const VqErrorBound bound = vq_error_bound(problem);
  params.reach = vq_unit_reach(bound);
  params.cosine_reach = static_cast<float>(2.001 * vq_cosine_bound(problem));
  params.indices = indices;
  with_steps(problem, [&](auto steps) {
    if constexpr (steps > 0) {
      const dim3 grid(grid_size(problem.parts, op), grid_size(problem.row_tiles, op));
      launch_overlapping(op, stream, vq_score_few_kernel<steps>, grid, kVqFewThreads, 0,
                         params.scores);
      const int64_t blocks = divide_up(problem.num_latents, kVqResolveFewThreads / 32);
      launch_overlapping(op, stream, vq_resolve_few_kernel<steps>, grid_size(blocks, op),
                         kVqResolveFewThreads, 0, params);
    }
  });
}

bool in_fours(const float* rows, int64_t dim) {
  return dim % 4 == 0 && reinterpret_cast<uintptr_t>(rows) % sizeof(float4) == 0;
}

constexpr int64_t kVqLargest = int64_t(1) << 31;

// Looks up `num_latents` rows in contiguous codes. `resampled`: by the kernel launched just before.
void look_up(const float* latents, int64_t num_latents, bool resampled, const Tensor& codes,
             bool normalize, int64_t* indices, cudaStream_t stream, const char* op) {
  if (num_latents == 0) return;
  STD_TORCH_CHECK(codes.size(0) < kVqLargest && codes.size(1) < kVqLargest, op,
                  ": codebook must have fewer than 2^31 rows and columns");
  const int multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, op);
  const int64_t dim = codes.size(1);
  const auto* code_values = codes.const_data_ptr<float>();
  const bool can_be_direct = in_fours(latents, dim) && in_fours(code_values, dim) &&
                             num_latents < kVqLargest / 4 && codes.size(0) < kVqLargest / 4;
  VqPrepareParams prepare{};
  prepare.problem = plan_vq_lookup(num_latents, codes.size(0), static_cast<int>(dim), normalize,
                                   can_be_direct, has_warpgroups(op), multiprocessors);
  if (prepare.problem.few) {
    look_up_few(prepare.problem, {latents, static_cast<int>(num_latents), prepare.problem.dim},
                {code_values, static_cast<int>(codes.size(0)), prepare.problem.dim}, resampled,
                device_of(codes), indices, stream, op);
    return;
  }
  VqResolveParams resolve{};
  resolve.problem = prepare.problem;
  resolve.bound = vq_error_bound(prepare.problem);
  resolve.unit_reach = vq_unit_reach(resolve.bound);
  resolve.indices = indices;
  Layout sizes(nullptr);
  lay_out(prepare.problem, sizes);
  Tensor memory = empty_contiguous({sizes.used()}, ScalarType::Byte, device_of(codes));
  Layout layout(static_cast<unsigned char*>(memory.mutable_data_ptr()));
  prepare.workspace = lay_out(prepare.problem, layout);
  resolve.workspace = prepare.workspace;
  prepare.codebook = code_values;
  prepare.latents = latents;
  if (!normalize) {
    check_cuda(cudaMemsetAsync(prepare.workspace.max_code_norm, 0, sizeof(float), stream), op,
               "cudaMemsetAsync");
  }
  launch_prepare(prepare, resampled && normalize, stream, op);
  launch_score_and_resolve(resolve, stream, op);
}

// The rows of all tokens. Several launches wait for each other, so whatever overlaps the last one
// finds the others done.
void resample(VqResampleParams params, const std::vector<VqScaleSize>& scales, cudaStream_t stream,
              const char* op) {
  const int multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, op);
  for (size_t first = 0; first < scales.size(); first += kVqMaxScales) {
    const size_t end = std::min(scales.size(), first + kVqMaxScales);
    params.num_scales = static_cast<int>(end - first);
    std::copy(scales.begin() + first, scales.begin() + end, params.scales);
    params.first_token = scales[first].first_token;
    params.end_token = end < scales.size() ? scales[end].first_token : params.tokens;
    const bool many = vq_has_many_rows(params, multiprocessors);
    const int64_t blocks = vq_resample_blocks(params, many ? kVqChannelsOfManyRows : 1);
    launch_overlapping(op, stream,
                       many ? vq_resample_kernel<kVqChannelsOfManyRows> : vq_resample_kernel<1>,
                       grid_size(blocks, op), kVqResampleThreads, 0, params);
  }
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
  const CudaScope scope(latents);
  const Tensor rows = as_contiguous(latents), codes = as_contiguous(codebook);
  Tensor indices = empty_contiguous({rows.size(0)}, ScalarType::Long, device_of(rows));
  look_up(rows.const_data_ptr<float>(), rows.size(0), false, codes, normalize,
          indices.mutable_data_ptr<int64_t>(), scope.stream(), op);
  return indices;
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
  STD_TORCH_CHECK(latent.size(0) < kVqLargest && latent.size(1) < kVqLargest, op,
                  ": latent must have fewer than 2^31 images and channels");
  const CudaScope scope(latent);
  const Tensor images = as_contiguous(latent), codes = as_contiguous(codebook);
  VqResampleParams params{};
  params.images = images.const_data_ptr<float>();
  params.mode = parse_resample_mode(mode, antialias, op);
  params.num_images = static_cast<int>(images.size(0));
  params.channels = static_cast<int>(images.size(1));
  params.height = static_cast<int>(images.size(2));
  params.width = static_cast<int>(images.size(3));
  std::vector<VqScaleSize> scales;
  for (size_t i = 0; i < heights.size(); ++i) {
    check_side(heights[i], op, "a scale's height");
    check_side(widths[i], op, "a scale's width");
    scales.push_back({params.tokens, static_cast<int>(heights[i]), static_cast<int>(widths[i])});
    params.tokens += heights[i] * widths[i];
  }
  const int64_t num_latents = images.size(0) * params.tokens;
  const DevicePlace device = device_of(images);
  Tensor rows = empty_contiguous({num_latents, images.size(1)}, ScalarType::Float, device);
  Tensor indices = empty_contiguous({images.size(0), params.tokens}, ScalarType::Long, device);
  params.rows = rows.mutable_data_ptr<float>();
  if (num_latents > 0) resample(params, scales, scope.stream(), op);
  look_up(params.rows, num_latents, true, codes, normalize, indices.mutable_data_ptr<int64_t>(),
          scope.stream(), op);
  return indices;
}

FLEXVAR_LAUNCHERS(m) {
  m.impl("vq_lookup", TORCH_BOX(&vq_lookup_cuda));
  m.impl("vq_lookup_multiscale", TORCH_BOX(&vq_lookup_multiscale_cuda));
}

}  // namespace
}  // namespace flexvar
