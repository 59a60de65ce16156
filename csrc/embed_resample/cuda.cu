#include <torch/csrc/stable/library.h>

#include <array>
#include <string>
#include <utility>

#include "common/cuda_launch.h"
#include "common/divide_up.h"
#include "common/tensor_memory.h"
#include "embed_resample/arguments.h"
#include "embed_resample/kernel.cuh"

namespace flexvar {
namespace {

template <class Real>
constexpr ScalarType kRealType =
    sizeof(Real) == sizeof(double) ? ScalarType::Double : ScalarType::Float;

// Calls body(T(), Real()) for the types that elements are stored and summed in.
template <class Body>
void by_element(Element element, const Body& body) {
  switch (element) {
    case Element::float32:
      return body(float(), float());
    case Element::float64:
      return body(double(), double());
    case Element::float16:
      return body(__half(), float());
    case Element::bfloat16:
      return body(__nv_bfloat16(), float());
  }
}

// `rows` are the codes, or the tokens' gradients; `out` the tokens, or gradients of the cells.
template <bool kAdjoint, class T, class Real>
void launch_resample(const int64_t* indices, const Tensor& rows, const EmbedShape& s,
                     bool normalize, Tensor& out, cudaStream_t stream, const char* op) {
  const int64_t tiles_y = divide_up(kAdjoint ? s.in_height : s.height, kEmbedTile);
  const int64_t tiles_x = divide_up(kAdjoint ? s.in_width : s.width, kEmbedTile);
  const int64_t channels = divide_up(s.dim, kEmbedChannels);
  const unsigned blocks = grid_size(tiles_x * tiles_y * s.batch * channels, op);
  using Params = EmbedResampleCudaParams<T, Real, kAdjoint>;
  const Params params{indices,
                      static_cast<const T*>(rows.const_data_ptr()),
                      static_cast<typename Params::Out*>(out.mutable_data_ptr()),
                      rows.numel() / s.dim,
                      s.dim,
                      normalize,
                      make_resample_axis<Real>(s.mode, s.in_height, s.height),
                      make_resample_axis<Real>(s.mode, s.in_width, s.width),
                      tiles_x,
                      tiles_y,
                      s.batch};
  launch_overlapping(op, stream, embed_resample_kernel<T, Real, kAdjoint>, blocks, kEmbedThreads, 0,
                     params);
}

// The values of a flat int64 tensor in ascending order, and where they stood, ascending for equals.
std::pair<Tensor, Tensor> stable_sort(const Tensor& flat) {
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(flat), torch::stable::detail::from(std::optional<bool>(true)),
      torch::stable::detail::from(int64_t(0)), torch::stable::detail::from(false)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

Tensor embed_resample_cuda(const Tensor& indices, const Tensor& codebook, int64_t height,
                           int64_t width, bool normalize, std::string mode) {
  const char* op = "embed_resample";
  const EmbedShape s = embed_shape(indices, codebook, height, width, mode, op);
  const CudaScope scope(codebook);
  Tensor tokens = empty_contiguous({s.batch, height * width, s.dim}, codebook.scalar_type(),
                                   device_of(codebook));
  if (tokens.numel() == 0) return tokens;
  const Tensor cells = as_contiguous(indices);
  const Tensor codes = as_contiguous(codebook);
  by_element(s.element, [&]<class T, class Real>(T, Real) {
    launch_resample<false, T, Real>(cells.const_data_ptr<int64_t>(), codes, s, normalize, tokens,
                                    scope.stream(), op);
  });
  return tokens;
}

Tensor embed_resample_backward_cuda(const Tensor& grad, const Tensor& indices,
                                    const Tensor& codebook, int64_t height, int64_t width,
                                    bool normalize, std::string mode) {
  const char* op = "embed_resample_backward";
  const EmbedShape s = embed_shape(indices, codebook, height, width, mode, op);
  check_token_gradient(grad, codebook, s, op);
  const CudaScope scope(codebook);
  if (grad.numel() == 0) return torch::stable::new_zeros(codebook, {s.num_codes, s.dim});
  const int64_t cells = s.batch * s.in_height * s.in_width;
  const Tensor tokens = as_contiguous(grad);
  const Tensor codes = as_contiguous(codebook);
  const auto [sorted, order] = stable_sort(torch::stable::reshape(as_contiguous(indices), {cells}));
  Tensor grad_codebook;
  by_element(s.element, [&]<class T, class Real>(T, Real) {
    Tensor grid = empty_contiguous({cells, s.dim}, kRealType<Real>, device_of(codes));
    launch_resample<true, T, Real>(nullptr, tokens, s, false, grid, scope.stream(), op);
    grad_codebook = empty_contiguous({s.num_codes, s.dim}, kRealType<Real>, device_of(codes));
    const Tensor run_sums =
        empty_contiguous({divide_up(cells, kEmbedRun), s.dim}, kRealType<Real>, device_of(codes));
    const EmbedScatterCudaParams<T, Real> params{grid.const_data_ptr<Real>(),
                                                 sorted.template const_data_ptr<int64_t>(),
                                                 order.template const_data_ptr<int64_t>(),
                                                 static_cast<const T*>(codes.const_data_ptr()),
                                                 run_sums.mutable_data_ptr<Real>(),
                                                 grad_codebook.mutable_data_ptr<Real>(),
                                                 cells,
                                                 s.num_codes,
                                                 s.dim,
                                                 normalize};
    const auto blocks = [&](int64_t warps) { return grid_size(divide_up(warps, kEmbedWarps), op); };
    launch_overlapping(op, scope.stream(), embed_sum_runs_kernel<T, Real>, blocks(params.runs()),
                       kEmbedSumThreads, 0, params);
    launch_overlapping(op, scope.stream(), embed_scatter_kernel<T, Real>, blocks(s.num_codes),
                       kEmbedSumThreads, 0, params);
  });
  return torch::stable::to(grad_codebook, codebook.scalar_type());
}

FLEXVAR_LAUNCHERS(m) {
  m.impl("embed_resample", TORCH_BOX(&embed_resample_cuda));
  m.impl("embed_resample_backward", TORCH_BOX(&embed_resample_backward_cuda));
}

}  // namespace
}  // namespace flexvar
