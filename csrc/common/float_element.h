// Storage types, as a value for kernels that branch on them at run time.
#pragma once

namespace flexvar {

enum class FloatElement : int { float32, float16, bfloat16 };
enum class Element : int { float32, float64, float16, bfloat16 };  // where float64 runs, too

}  // namespace flexvar
