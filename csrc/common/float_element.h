// The storage types that most ops take, as a value for kernels that branch on them at run time.
#pragma once

namespace flexvar {

enum class FloatElement : int { float32, float16, bfloat16 };

}  // namespace flexvar
