#include <algorithm>

#include "testing/arrays.h"
#include "vq_lookup/kernel.cuh"

namespace flexvar::emulation {
namespace {

void launch_score(DeviceMemory& memory, const VqProblem& problem, const VqWorkspace& workspace) {
  const auto tiles = static_cast<unsigned>(problem.row_tiles);
  const auto splits = static_cast<unsigned>(problem.splits);
  const LaunchShape tensor{{tiles, splits, 1}, {kVqTensorThreads, 1, 1}, 0, true};
  switch (problem.tensor_dim / 16) {
    case 1:
      return memory.launch(vq_score_tensor_kernel<1>, tensor, problem, workspace);
    case 2:
      return memory.launch(vq_score_tensor_kernel<2>, tensor, problem, workspace);
    case 3:
      return memory.launch(vq_score_tensor_kernel<3>, tensor, problem, workspace);
    case 4:
      return memory.launch(vq_score_tensor_kernel<4>, tensor, problem, workspace);
    default:
      memory.launch(vq_score_float_kernel, {{tiles, splits, 1}, {kVqFloatThreads, 1, 1}, 0, true},
                    problem, workspace);
  }
}

void launch_prepare(DeviceMemory& memory, const VqPrepareParams& params) {
  const dim3 grid = vq_prepare_grid(params.code_rows + params.latent_rows);
  memory.launch(vq_prepare_kernel, {{grid.x, 1, 1}, {kVqPrepareThreads, 1, 1}, 0}, params);
}

// The launcher's three steps; `scales` is empty for a matrix of latents.
py::array look_up(DeviceMemory& memory, VqPrepareParams prepare,
                  const std::vector<VqScaleSize>& scales) {
  const VqProblem& problem = prepare.problem;
  const int64_t codes = problem.padded_codes(), rows = problem.num_latents;
  VqWorkspace& workspace = prepare.workspace;
  workspace.codes = memory.workspace<float>("codes", {codes, problem.padded_dim});
  workspace.latents = memory.workspace<float>("latents", {rows, problem.padded_dim});
  workspace.half_norms = memory.workspace<double>("half_norms", {codes});
  workspace.negative_half = memory.workspace<float>("negative_half", {codes});
  workspace.latent_norms = memory.workspace<double>("latent_norms", {rows});
  if (!problem.normalize) {
    py::array_t<float> zero(1);
    zero.mutable_data()[0] = 0;
    workspace.max_code_norm = memory.input_output<float>("max_code_norm", zero);
  }
  if (problem.tensor_dim > 0) {
    workspace.codes_half = memory.workspace<__half>("codes_half", {codes, problem.tensor_dim});
    workspace.latents_half = memory.workspace<__half>("latents_half", {rows, problem.tensor_dim});
  }
  auto* tops = memory.workspace<float>("tops", {problem.splits, rows, kVqSubgroups, 3});
  workspace.tops = reinterpret_cast<VqTop*>(tops);
  prepare.code_rows = codes;
  if (scales.empty()) {
    prepare.latent_rows = rows;
    launch_prepare(memory, prepare);
  }
  for (size_t first = 0; first < scales.size(); first += kVqMaxScales) {
    const size_t end = std::min(scales.size(), first + kVqMaxScales);
    VqLatentSource& part = prepare.source;
    part.num_scales = static_cast<int>(end - first);
    std::copy(scales.begin() + first, scales.begin() + end, part.scales);
    part.first_token = scales[first].first_token;
    part.end_token = end < scales.size() ? scales[end].first_token : part.tokens;
    prepare.latent_rows = rows / part.tokens * (part.end_token - part.first_token);
    launch_prepare(memory, prepare);
    prepare.code_rows = 0;
  }
  launch_score(memory, problem, workspace);
  auto* indices = memory.output<int64_t>("indices", {rows});
  memory.launch(vq_resolve_kernel,
                {{vq_resolve_grid(problem).x, 1, 1}, {kVqResolveThreads, 1, 1}, 0, true},
                VqResolveParams{problem, workspace, vq_error_bound(problem), indices});
  return memory.fetch(indices);
}

}  // namespace

EMULATED_BINDINGS(vq_lookup, module) {
  module.def(
      "vq_lookup",
      [](const py::array& latents, const py::array& codebook, bool normalize, int multiprocessors,
         const EmulationOptions& options) {
        DeviceMemory memory(options);
        VqPrepareParams prepare{};
        prepare.problem =
            plan_vq_lookup(latents.shape(0), codebook.shape(0), static_cast<int>(codebook.shape(1)),
                           normalize, multiprocessors);
        prepare.codebook = memory.input<float>("codebook", codebook);
        prepare.source.latents = memory.input<float>("latents", latents);
        return look_up(memory, prepare, {});
      },
      "[N, C], [V, C] float32 -> int64 [N], as planned for a GPU with `multiprocessors`.");
  module.def(
      "vq_lookup_multiscale",
      [](const py::array& latent, const py::array& codebook,
         const std::vector<std::pair<int, int>>& sizes, bool normalize, int mode,
         const EmulationOptions& options) {
        DeviceMemory memory(options);
        VqPrepareParams prepare{};
        VqLatentSource& source = prepare.source;
        source.mode = static_cast<ResampleMode>(mode);
        source.height = static_cast<int>(latent.shape(2));
        source.width = static_cast<int>(latent.shape(3));
        std::vector<VqScaleSize> scales;
        for (const auto& [height, width] : sizes) {
          scales.push_back({source.tokens, height, width});
          source.tokens += static_cast<int64_t>(height) * width;
        }
        prepare.problem = plan_vq_lookup(latent.shape(0) * source.tokens, codebook.shape(0),
                                         static_cast<int>(codebook.shape(1)), normalize, 1);
        prepare.codebook = memory.input<float>("codebook", codebook);
        source.latents = memory.input<float>("latent", latent);
        return look_up(memory, prepare, scales);
      },
      "[B, C, H, W], [V, C] float32 -> int64 [B * L]; `mode` counts csrc/resample's ResampleMode.");
}

}  // namespace flexvar::emulation
