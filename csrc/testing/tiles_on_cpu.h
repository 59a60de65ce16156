// The tile unit (AMX) in AVX-512, included before a file that uses it: its instructions as
// functions of the same names, so that csrc/<op>/cpu_amx.cpp runs on CPUs without one. Slow;
// configurations are taken to be that of TileScope.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace flexvar::tiles_on_cpu {

typedef uint32_t Bits __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));
struct Tile {
  Bits rows[16];
};
inline thread_local Tile tiles[8];

static inline void load(int tile, const void* memory, int64_t stride) {
  for (int64_t row = 0; row < 16; ++row) {
    std::memcpy(&tiles[tile].rows[row], static_cast<const char*>(memory) + row * stride, 64);
  }
}

static inline void store(int tile, void* memory, int64_t stride) {
  for (int64_t row = 0; row < 16; ++row) {
    std::memcpy(static_cast<char*>(memory) + row * stride, &tiles[tile].rows[row], 64);
  }
}

static inline void zero(int tile) { tiles[tile] = {}; }

static inline Floats fused(Floats a, Floats b, Floats sum) {
  return (Floats)_mm512_maskz_fmadd_ps(0xffff, (__m512)a, (__m512)b, (__m512)sum);
}

// Products of the even and of the odd numbers of pairs are chains of their own, which are added up
// before they join the sum; denormal numbers are zeros (Intel's manual, TDPBF16PS).
static inline void multiply(int sums, int left, int right) {
  constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x0040;
  const unsigned control = _mm_getcsr();
  _mm_setcsr(control | kFlushToZero | kDenormalsAreZero);
  constexpr uint32_t kUpper = 0xffff0000;
  for (int row = 0; row < 16; ++row) {
    Floats even = {}, odd = {};
    for (int k = 0; k < 16; ++k) {
      const Bits pair = Bits{} + tiles[left].rows[row][k];
      const Bits pairs = tiles[right].rows[k];
      even = fused((Floats)(pair << 16), (Floats)(pairs << 16), even);
      odd = fused((Floats)(pair & kUpper), (Floats)(pairs & kUpper), odd);
    }
    Bits& sum = tiles[sums].rows[row];
    sum = (Bits)((Floats)sum + (even + odd));
  }
  _mm_setcsr(control);
}

}  // namespace flexvar::tiles_on_cpu

// The compiler's are macros, too, or functions that no flag of ours changes.
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadd(tile, memory, stride) flexvar::tiles_on_cpu::load(tile, memory, stride)
#define _tile_stored(tile, memory, stride) flexvar::tiles_on_cpu::store(tile, memory, stride)
#define _tile_zero(tile) flexvar::tiles_on_cpu::zero(tile)
#define _tile_dpbf16ps(sums, left, right) flexvar::tiles_on_cpu::multiply(sums, left, right)
#define _tile_loadconfig(config) static_cast<void>(config)
#define _tile_release() static_cast<void>(0)
