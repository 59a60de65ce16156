#include "scale_attention/cpu_kernel.h"

#include "scale_attention/cpu_backward.h"
#include "scale_attention/cpu_norm.h"

namespace flexvar::FLEXVAR_ISA {

template <template <typename, typename> class Runner, typename Params>
static void run_items(const Params& params, int64_t begin, int64_t end, void* scratch) {
  const auto run = [&](auto runner) {
    for (int64_t item = begin; item < end; ++item) runner.run(item);
  };
  switch (params.shape.element) {
    case Element::float32:
      return run(Runner<float, float>(params, scratch));
    case Element::float16:
      return run(Runner<float, Half>(params, scratch));
    case Element::bfloat16:
      return run(Runner<float, Bfloat16>(params, scratch));
    case Element::float64:
      return run(Runner<double, double>(params, scratch));
  }
}

void attention_forward(const AttentionForwardParams& params, int64_t begin, int64_t end,
                       void* scratch) {
  run_items<ForwardTiles>(params, begin, end, scratch);
}

void attention_backward(const AttentionBackwardParams& params, int64_t begin, int64_t end,
                        void* scratch) {
  run_items<BackwardHeads>(params, begin, end, scratch);
}

void attention_normalize(const AttentionNormalizeParams& params, int64_t begin, int64_t end) {
  switch (params.element) {
    case Element::float32:
      return normalize_tokens<float, float>(params, begin, end);
    case Element::float16:
      return normalize_tokens<float, Half>(params, begin, end);
    case Element::bfloat16:
      return normalize_tokens<float, Bfloat16>(params, begin, end);
    case Element::float64:
      return normalize_tokens<double, double>(params, begin, end);
  }
}

void attention_normalize_backward(const AttentionNormalizeBackwardParams& params, int64_t begin,
                                  int64_t end) {
  switch (params.element) {
    case Element::float32:
      return normalize_tokens_backward<float, float>(params, begin, end);
    case Element::float16:
      return normalize_tokens_backward<float, Half>(params, begin, end);
    case Element::bfloat16:
      return normalize_tokens_backward<float, Bfloat16>(params, begin, end);
    case Element::float64:
      return normalize_tokens_backward<double, double>(params, begin, end);
  }
}

}  // namespace flexvar::FLEXVAR_ISA
