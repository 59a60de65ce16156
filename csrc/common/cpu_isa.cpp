#include "common/cpu_isa.h"

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace flexvar {

#ifdef FLEXVAR_X86
#ifdef FLEXVAR_TILES_ON_CPU
static bool has_tiles() { return true; }  // csrc/testing/tiles_on_cpu.h
#else
// Linux lets a process use the tile unit's registers when it has asked for them, once.
static bool may_use_tiles() {
#ifdef __linux__
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of asm/prctl.h
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
static bool has_tiles() {
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         may_use_tiles();
}
#endif
#endif

static CpuIsa best_cpu_isa() {
#ifdef FLEXVAR_X86
  static const CpuIsa best = [] {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
    if (bf16 && has_tiles()) return CpuIsa::amx;
    if (bf16) return CpuIsa::avx512bf16;
    if (vnni) return CpuIsa::avx512vnni;
    if (avx512) return CpuIsa::avx512;
    if (avx2) return CpuIsa::avx2;
    return CpuIsa::baseline;
  }();
  return best;
#else
  return CpuIsa::baseline;
#endif
}

const char* cpu_isa_name(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::amx:
      return "amx";
    case CpuIsa::avx512bf16:
      return "avx512bf16";
    case CpuIsa::avx512vnni:
      return "avx512vnni";
    case CpuIsa::avx512:
      return "avx512";
    case CpuIsa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

CpuIsa selected_cpu_isa() {
  const CpuIsa best = best_cpu_isa();
  const char* forced = std::getenv("FLEXVAR_CPU_ISA");
  if (forced == nullptr || *forced == '\0') return best;
  for (int i = 0; i <= static_cast<int>(best); ++i) {
    if (std::string(forced) == cpu_isa_name(static_cast<CpuIsa>(i))) return static_cast<CpuIsa>(i);
  }
  throw std::runtime_error(
      std::string("FLEXVAR_CPU_ISA must be an instruction set of this CPU (up to ") +
      cpu_isa_name(best) + "), got " + forced);
}

}  // namespace flexvar
