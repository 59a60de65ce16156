// Run-time choice among the instruction sets that csrc/<op>/cpu_kernel.cpp is compiled for.
//
// A kernel file is compiled once per instruction set (CMakeLists.txt: FLEXVAR_ISAS) with
// FLEXVAR_ISA naming it, and puts everything it defines into `namespace flexvar::FLEXVAR_ISA`. It
// includes no torch and no standard headers with inline functions: the linker keeps one copy of an
// inline function, and it could be the AVX-512 one.
//
//   cpu_kernel.h    FLEXVAR_DECLARE_CPU_KERNEL(my_kernel, (const MyParams& params, int64_t end));
//   cpu_kernel.cpp  namespace flexvar::FLEXVAR_ISA { void my_kernel(...) { ... } }
//   cpu.cpp         const auto kernel = FLEXVAR_SELECT_CPU_KERNEL(my_kernel);
#pragma once

namespace flexvar {

enum class CpuIsa { baseline = 0, avx2 = 1, avx512 = 2, avx512vnni = 3, avx512bf16 = 4, amx = 5 };

// For two sets nothing is compiled but files of their own: csrc/<op>/cpu_integers.cpp (which AVX2
// takes, too) for avx512vnni, that is avx512 and sums of products of 16-bit integers, which
// avx512bf16 has too; cpu_amx.cpp for amx, that is avx512bf16 and the tile unit. What such files do
// not hold runs as for avx512 and avx512bf16.

// The best instruction set of this CPU, or the one that the environment variable FLEXVAR_CPU_ISA
// names (for tests and measurements). Throws std::runtime_error when that name is unknown or this
// CPU does not have it.
CpuIsa selected_cpu_isa();
const char* cpu_isa_name(CpuIsa isa);

}  // namespace flexvar

#ifdef FLEXVAR_X86
#define FLEXVAR_DECLARE_CPU_KERNEL(name, arguments) \
  namespace baseline {                              \
  void name arguments;                              \
  }                                                 \
  namespace avx2 {                                  \
  void name arguments;                              \
  }                                                 \
  namespace avx512 {                                \
  void name arguments;                              \
  }                                                 \
  namespace avx512bf16 {                            \
  void name arguments;                              \
  }
#define FLEXVAR_SELECT_CPU_KERNEL(name)      \
  [] {                                       \
    switch (::flexvar::selected_cpu_isa()) { \
      case ::flexvar::CpuIsa::amx:           \
      case ::flexvar::CpuIsa::avx512bf16:    \
        return &::flexvar::avx512bf16::name; \
      case ::flexvar::CpuIsa::avx512vnni:    \
      case ::flexvar::CpuIsa::avx512:        \
        return &::flexvar::avx512::name;     \
      case ::flexvar::CpuIsa::avx2:          \
        return &::flexvar::avx2::name;       \
      default:                               \
        return &::flexvar::baseline::name;   \
    }                                        \
  }()
#else
#define FLEXVAR_DECLARE_CPU_KERNEL(name, arguments) \
  namespace baseline {                              \
  void name arguments;                              \
  }
#define FLEXVAR_SELECT_CPU_KERNEL(name) (::flexvar::selected_cpu_isa(), &::flexvar::baseline::name)
#endif
