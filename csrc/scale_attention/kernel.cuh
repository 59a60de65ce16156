// Every CUDA kernel of attention. Raw pointers only: this source also runs on the CPU in the tests.
#pragma once

#include <type_traits>

#include "scale_attention/kernel_plain.cuh"
#include "scale_attention/kernel_tensor_core.cuh"
#include "scale_attention/kernel_tensor_core_backward.cuh"

namespace flexvar {

template <class T>
constexpr bool kOnTensorCores = std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>;

// Which kernels an element type and head dim take, and how they are launched. Grids are in
// kernel_common.cuh.
template <class T, int kDim, bool kTensorCore = kOnTensorCores<T>>
struct AttentionKernels {
  static constexpr int kThreads = kPlainThreads;
  static constexpr auto kForward = &attention_forward_plain<T, kDim>;
  static constexpr auto kGradQueries = &attention_grad_queries_plain<T, kDim>;
  static constexpr auto kGradKeys = &attention_grad_keys_plain<T, kDim>;
  using ForwardShared = PlainForwardShared<AttentionArithmetic<T>, kDim>;
  using BackwardShared = PlainBackwardShared<AttentionArithmetic<T>, kDim>;
  static constexpr bool kHasCopyEngine = false;
  static constexpr bool kJoinsScales = false;  // in tiles
  static constexpr int kForwardRows = ForwardShared::Tile::kRows;
  static constexpr int kForwardColumns = ForwardShared::Tile::kColumns;
  static constexpr int kForwardBlocks = 1;  // a multiprocessor that a step is spread over
  static constexpr int kBackwardRows = BackwardShared::Tile::kRows;
  static constexpr bool kGradQueriesFindsDelta = false;  // or a kernel of its own
  static constexpr size_t backward_shared(bool) { return sizeof(BackwardShared); }
};

template <class T, int kDim>
struct AttentionKernels<T, kDim, true> {
  static constexpr int kThreads = kTensorCoreThreads;
  static constexpr auto kForward = &attention_forward_tensor_core<T, kDim>;
  static constexpr auto kGradQueries = &attention_grad_queries_tensor_core<T, kDim>;
  static constexpr auto kGradKeys = &attention_grad_keys_tensor_core<T, kDim>;
  using ForwardShared = TensorCoreForwardShared<T, kDim>;
  using BackwardShared = TensorCoreBackwardShared<T, kDim>;
  static constexpr bool kHasCopyEngine = kDim == 64;  // where a device has it
  static constexpr bool kJoinsScales = true;
  static constexpr int kForwardRows = kTensorCoreRows;
  static constexpr int kForwardColumns = ForwardShared::kColumns;
  static constexpr int kForwardBlocks = kDim <= 64 ? 4 : 2;
  static constexpr int kBackwardRows = kTensorCoreRows;
  static constexpr bool kGradQueriesFindsDelta = true;
  static constexpr size_t backward_shared(bool with_warpgroups) {
    return BackwardShared::bytes(with_warpgroups);
  }
};

}  // namespace flexvar
