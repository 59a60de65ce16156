#include "scale_attention/cpu_kernel.h"

#include "scale_attention/cpu_backward.h"

namespace flexvar::FLEXVAR_ISA {

template <template <typename, typename> class Runner, typename Params>
static void run_items(const Params& params, int64_t begin, int64_t end, void* scratch) {
  const auto run = [&](auto runner) {
    for (int64_t item = begin; item < end; ++item) runner.run(item);
  };
  switch (params.shape.element) {
    case AttentionElement::float32:
      return run(Runner<float, float>(params, scratch));
    case AttentionElement::float16:
      return run(Runner<float, Half>(params, scratch));
    case AttentionElement::bfloat16:
      return run(Runner<float, Bfloat16>(params, scratch));
    case AttentionElement::float64:
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

}  // namespace flexvar::FLEXVAR_ISA
