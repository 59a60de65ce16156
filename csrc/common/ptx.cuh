// Instructions that CUDA C++ has no name for, behind one interface: asynchronous copies, matrix
// fragments and products, named barriers. Inline PTX under nvcc (with fallbacks below sm_80), the
// same functions from csrc/testing/ptx_on_cpu.h elsewhere. Kernels hold no `asm` of their own.
#pragma once

#include <type_traits>

#include "common/cuda.cuh"
#include "common/swizzle.h"
#include "common/tensor_map.h"

namespace flexvar::ptx {

// Layout of matrix products d += a b, with a 16 x K row-major, b K x 8 column-major, d 16 x 8 in
// fp32, g = lane / 4 and t = lane % 4. d[0], d[1] are (g, 2t), (g, 2t + 1); d[2], d[3] the same in
// row g + 8. 16-bit elements, K = 16: a[0] is (g, 2t..2t + 1), a[1] (g + 8, 2t..), a[2] (g, 2t
// + 8..), a[3] (g + 8, 2t + 8..); b[0] is (k = 2t..2t + 1, n = g), b[1] (k = 2t + 8.., n = g).
// tf32, K = 8: a[0] is (g, t), a[1] (g + 8, t), a[2] (g, t + 4), a[3] (g + 8, t + 4); b[0] is
// (k = t, n = g), b[1] (k = t + 4, n = g).

// Without the instruction: every lane collects the rows of a and columns of b that it needs.
// `kElements` per register: 2 (16-bit) or 1 (tf32); `decode(register, index)` yields the float.
template <int kElements, class Decode>
__device__ __forceinline__ void mma_by_shuffles(float (&d)[4], const uint32_t (&a)[4],
                                                const uint32_t (&b)[2], Decode decode) {
  const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, t = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll 1  // a kernel holds hundreds of these products
    for (int source = 0; source < 4; ++source) {
      const uint32_t low = __shfl_sync(0xffffffffu, a[2 * half], g * 4 + source);
      const uint32_t high = __shfl_sync(0xffffffffu, a[2 * half + 1], g * 4 + source);
      const uint32_t left = __shfl_sync(0xffffffffu, b[half], 2 * t * 4 + source);
      const uint32_t right = __shfl_sync(0xffffffffu, b[half], (2 * t + 1) * 4 + source);
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        d[0] = fmaf(decode(low, i), decode(left, i), d[0]);
        d[1] = fmaf(decode(low, i), decode(right, i), d[1]);
        d[2] = fmaf(decode(high, i), decode(left, i), d[2]);
        d[3] = fmaf(decode(high, i), decode(right, i), d[3]);
      }
    }
  }
}

// stmatrix_x4 without the instruction.
__device__ __forceinline__ void stmatrix_by_shuffles(void* row, const uint32_t (&r)[4]) {
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const auto target =
        __shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(row), j * 8 + lane / 4);
    reinterpret_cast<uint32_t*>(target)[lane % 4] = r[j];
  }
}

}  // namespace flexvar::ptx

#ifndef __CUDACC__
#include "testing/ptx_on_cpu.h"
#else

namespace flexvar::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// --- Asynchronous copies, global to shared -----------------------------------------------------

// `kBytes` (4, 8 or 16) from `global` to `shared`, both aligned to kBytes. With valid = false
// writes zeros and does not touch `global`. Done for this thread after cp_async_wait, for others
// after a barrier behind that.
template <int kBytes = 16>
__device__ __forceinline__ void cp_async(void* shared, const void* global, bool valid = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#if __CUDA_ARCH__ >= 800
  const int source_bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)),
                 "l"(global), "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(shared_address(shared)),
                 "l"(global), "n"(kBytes), "r"(source_bytes)
                 : "memory");
  }
#else
  using Chunk =
      std::conditional_t<kBytes == 16, uint4, std::conditional_t<kBytes == 8, uint2, uint32_t> >;
  *static_cast<Chunk*>(shared) = valid ? *static_cast<const Chunk*>(global) : Chunk{};
#endif
}

// Closes the group of copies that this thread issued since the last commit.
__device__ __forceinline__ void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

// Waits until at most the `kPending` latest groups of this thread are under way.
template <int kPending = 0>
__device__ __forceinline__ void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
#endif
}

// --- Fragments ---------------------------------------------------------------------------------

// Four 8 x 8 matrices of 16-bit elements. Lane i points at row i % 8 of matrix i / 8 (16 bytes,
// 16-byte aligned). Lane i receives in r[j] elements 2 * (i % 4) and + 1 of row i / 4 of matrix j;
// transposed: of column i / 4.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// Two matrices; the addresses are those of lanes 0 to 15.
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];\n"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];\n"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// The reverse of ldmatrix_x4: lane i's elements of matrix j, r[j], go to the rows that lanes 8 j
// and up point at.
__device__ __forceinline__ void stmatrix_x4(void* row, const uint32_t (&r)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(
                   shared_address(row)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#else
  stmatrix_by_shuffles(row, r);
#endif
}

// --- Matrix products ---------------------------------------------------------------------------

// T: __half or __nv_bfloat16.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __half>) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      asm volatile(
          "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
          "{%0, %1, %2, %3};\n"
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
          : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
    }
#endif
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    mma_by_shuffles<2>(d, a, b, [](uint32_t bits, int i) {
      return __uint_as_float(i == 0 ? bits << 16 : bits & 0xffff0000u);
    });
#endif
  }
}

// d = a b + c: the first product of several sums that begin with the same numbers, which `d += a b`
// would have to copy for every one. T: __half.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2], const float (&c)[4]) {
  static_assert(std::is_same_v<T, __half>);
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%10, %11, %12, %13};\n"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
        "f"(c[2]), "f"(c[3]));
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] = c[i];
  mma_m16n8k16<T>(d, a, b);
#endif
}

// fp32 to the nearest tf32 (ties away from zero), as fp32 bits.
__device__ __forceinline__ uint32_t float_to_tf32(float x) {
#if __CUDA_ARCH__ >= 800
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(x));
  return bits;
#else
  return (__float_as_uint(x) + 0x1000u) & 0xffffe000u;
#endif
}

__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  mma_by_shuffles<1>(d, a, b, [](uint32_t bits, int) { return __uint_as_float(bits); });
#endif
}

// --- Named barriers -----------------------------------------------------------------------------

// Waits for `threads` threads (a multiple of 32) at barrier `id` (1 to 15; 0 is __syncthreads).
__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("barrier.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}
// Counts this thread as arrived and goes on.
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("barrier.arrive %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

// --- Warps -------------------------------------------------------------------------------------

// The sum of all 32 lanes' x, in every lane.
__device__ __forceinline__ uint32_t warp_sum(uint32_t x) {
#if __CUDA_ARCH__ >= 800
  return __reduce_add_sync(0xffffffffu, x);
#else
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
#endif
}

// The sum of x over the lanes up to this one.
__device__ __forceinline__ uint32_t warp_inclusive_sum(uint32_t x) {
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    asm volatile(
        "{\n"
        ".reg .pred has_lane;\n"
        ".reg .b32 other;\n"
        "shfl.sync.up.b32 other|has_lane, %0, %1, 0, 0xffffffff;\n"
        "@has_lane add.u32 %0, %0, other;\n"
        "}\n"
        : "+r"(x)
        : "r"(lanes));
  }
  return x;
}

// --- Ahead of time ------------------------------------------------------------------------------

// Begins to fetch the line of global memory that holds *pointer.
__device__ __forceinline__ void prefetch(const void* pointer) {
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(__cvta_generic_to_global(pointer)));
}

// --- Pairs of 16-bit floats ----------------------------------------------------------------------

// T: __half or __nv_bfloat16, two of them in a word. All bits of those that are above the floor's;
// NaN is not.
template <class T>
__device__ __forceinline__ uint32_t above_mask(uint32_t pair, uint32_t floor) {
  if constexpr (std::is_same_v<T, __half>) {
    return __hgt2_mask(reinterpret_cast<const __half2&>(pair),
                       reinterpret_cast<const __half2&>(floor));
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    return __hgt2_mask(reinterpret_cast<const __nv_bfloat162&>(pair),
                       reinterpret_cast<const __nv_bfloat162&>(floor));
  }
}

// --- Lists in shared memory ---------------------------------------------------------------------

// The end of a list of float, __half or __nv_bfloat16, where a thread appends those above a floor:
// two instructions without a branch behind the comparison, where the compiler takes more.
template <class T>
class ListEnd {
 public:
  // Lists that are appended to side by side. A thread waits for a store to have read its address
  // before it moves that on, and these stores take their turns meanwhile.
  static constexpr int kTogether = sizeof(T) == 4 ? 4 : 2;

  ListEnd() = default;
  __device__ __forceinline__ explicit ListEnd(const T* place) : address_(shared_address(place)) {}
  __device__ __forceinline__ ListEnd behind(uint32_t elements) const {
    ListEnd end = *this;
    end.address_ += elements * static_cast<uint32_t>(sizeof(T));
    return end;
  }
  // Of each list's word of one or two elements, those above the floor's.
  __device__ static __forceinline__ void append_above(ListEnd (&ends)[kTogether], uint32_t floor,
                                                      const uint32_t (&words)[kTogether]) {
    if constexpr (sizeof(T) == 4) {
      asm volatile(
          "{\n"
          ".reg .pred p0, p1, p2, p3;\n"
          "setp.gt.f32 p0, %4, %8;\n"
          "setp.gt.f32 p1, %5, %8;\n"
          "setp.gt.f32 p2, %6, %8;\n"
          "setp.gt.f32 p3, %7, %8;\n"
          "@p0 st.shared.f32 [%0], %4;\n"
          "@p1 st.shared.f32 [%1], %5;\n"
          "@p2 st.shared.f32 [%2], %6;\n"
          "@p3 st.shared.f32 [%3], %7;\n"
          "@p0 add.u32 %0, %0, 4;\n"
          "@p1 add.u32 %1, %1, 4;\n"
          "@p2 add.u32 %2, %2, 4;\n"
          "@p3 add.u32 %3, %3, 4;\n"
          "}\n"
          : "+r"(ends[0].address_), "+r"(ends[1].address_), "+r"(ends[2].address_),
            "+r"(ends[3].address_)
          : "f"(__uint_as_float(words[0])), "f"(__uint_as_float(words[1])),
            "f"(__uint_as_float(words[2])), "f"(__uint_as_float(words[3])),
            "f"(__uint_as_float(floor))
          : "memory");
    } else {
#define FLEXVAR_APPEND_PAIRS(compare, other0, other1)          \
  asm volatile(                                                \
      "{\n"                                                    \
      ".reg .pred first0, second0, first1, second1;\n"         \
      ".reg .b32 bit;\n"                                       \
      ".reg .b16 low0, high0, low1, high1;\n"                  \
      "mov.b32 {low0, high0}, %2;\n"                           \
      "mov.b32 {low1, high1}, %3;\n" compare                   \
      "@first0 st.shared.b16 [%0], low0;\n"                    \
      "@first1 st.shared.b16 [%1], low1;\n"                    \
      "@first0 add.u32 %0, %0, 2;\n"                           \
      "@first1 add.u32 %1, %1, 2;\n"                           \
      "@second0 st.shared.b16 [%0], high0;\n"                  \
      "@second1 st.shared.b16 [%1], high1;\n"                  \
      "@second0 add.u32 %0, %0, 2;\n"                          \
      "@second1 add.u32 %1, %1, 2;\n"                          \
      "}\n"                                                    \
      : "+r"(ends[0].address_), "+r"(ends[1].address_)         \
      : "r"(words[0]), "r"(words[1]), "r"(other0), "r"(other1) \
      : "memory")
      if constexpr (std::is_same_v<T, __half>) {
        FLEXVAR_APPEND_PAIRS(
            "setp.gt.f16x2 first0|second0, %2, %4;\nsetp.gt.f16x2 first1|second1, %3, %5;\n", floor,
            floor);
      } else {
#if __CUDA_ARCH__ >= 900
        FLEXVAR_APPEND_PAIRS(
            "setp.gt.bf16x2 first0|second0, %2, %4;\nsetp.gt.bf16x2 first1|second1, %3, %5;\n",
            floor, floor);
#else
        FLEXVAR_APPEND_PAIRS(
            "and.b32 bit, %4, 1;\nsetp.ne.u32 first0, bit, 0;\nsetp.lt.s32 second0, %4, 0;\n"
            "and.b32 bit, %5, 1;\nsetp.ne.u32 first1, bit, 0;\nsetp.lt.s32 second1, %5, 0;\n",
            above_mask<T>(words[0], floor), above_mask<T>(words[1], floor));
#endif
      }
#undef FLEXVAR_APPEND_PAIRS
    }
  }

 private:
  uint32_t address_;
};

// --- Kernels that overlap (launch_overlapping) -------------------------------------------------

// Waits until the kernel before has ended and what it wrote is visible: every thread calls this
// before it touches memory. Nothing to do where kernels do not overlap.
__device__ __forceinline__ void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}
// Once every block has begun and called this, the next kernel's blocks may begin.
__device__ __forceinline__ void griddepcontrol_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

// --- Registers ---------------------------------------------------------------------------------

// x, as if it were not known before: what follows from it is computed here and not kept in
// registers from before a loop.
__device__ __forceinline__ int computed_here(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
template <class T>
__device__ __forceinline__ const T* computed_here(const T* x) {  // of global memory
  asm volatile("" : "+l"(x));
  __builtin_assume(__isGlobal(x));
  return x;
}

// --- Floats ------------------------------------------------------------------------------------

// The bits of a - b, rounded to nearest. The sign bit says whether a < b: a NaN has none.
__device__ __forceinline__ uint32_t difference_bits(float a, float b) {
  return __float_as_uint(__fsub_rn(a, b));  // every NaN is 0x7fffffff
}

// --- Approximations ----------------------------------------------------------------------------

// 2^x to 2 ulp; -inf gives 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}
// 1 / x to 1 ulp, for x that are 0 or normal.
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace flexvar::ptx

#include "common/ptx_warpgroup.cuh"

#endif
