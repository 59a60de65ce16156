// The interface of common/ptx.cuh on the CPU.
#pragma once

#include "testing/cuda_on_cpu.h"

namespace flexvar::emulation {

// d += a b of mma.m16n8k16 (half or bfloat16) and mma.m16n8k8 (tf32); ldmatrix of `count` matrices.
enum class MatrixFormat { half, bfloat16, tf32 };
void matrix_product(MatrixFormat format, float* d, const uint32_t* a, const uint32_t* b,
                    Location where);
void matrix_load(int count, bool transposed, uint32_t* registers, const void* row, Location where);

}  // namespace flexvar::emulation

namespace flexvar::ptx {

using emulation::Location;

template <int kBytes = 16>
void cp_async(void* shared, const void* global, bool valid = true,
              Location where = Location::current()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  emulation::cp_async(shared, global, kBytes, valid, where);
}
inline void cp_async_commit() { emulation::cp_async_commit(); }
template <int kPending = 0>
void cp_async_wait() {
  emulation::cp_async_wait(kPending);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, Location where = Location::current()) {
  emulation::matrix_load(4, false, r, row, where);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row,
                              Location where = Location::current()) {
  emulation::matrix_load(4, true, r, row, where);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row, Location where = Location::current()) {
  emulation::matrix_load(2, false, r, row, where);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row,
                              Location where = Location::current()) {
  emulation::matrix_load(2, true, r, row, where);
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  Location where = Location::current()) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  constexpr auto kFormat =
      std::is_same_v<T, __half> ? emulation::MatrixFormat::half : emulation::MatrixFormat::bfloat16;
  emulation::matrix_product(kFormat, d, a, b, where);
}
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  const float (&c)[4], Location where = Location::current()) {
  static_assert(std::is_same_v<T, __half>);
  for (int i = 0; i < 4; ++i) d[i] = c[i];
  mma_m16n8k16<T>(d, a, b, where);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             Location where = Location::current()) {
  emulation::matrix_product(emulation::MatrixFormat::tf32, d, a, b, where);
}
inline uint32_t float_to_tf32(float x) { return (__float_as_uint(x) + 0x1000u) & 0xffffe000u; }

inline void barrier_sync(int id, int threads, Location where = Location::current()) {
  emulation::block_barrier(id, threads, emulation::Vote::none, 0, where);
}
inline void barrier_arrive(int id, int threads, Location where = Location::current()) {
  emulation::block_barrier_arrive(id, threads, where);
}
inline void griddepcontrol_wait() { emulation::wait_for_earlier_launches(); }
inline void griddepcontrol_launch_dependents() {}
inline float exp2_approx(float x) { return std::exp2(x); }

}  // namespace flexvar::ptx
