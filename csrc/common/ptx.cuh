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

// --- Products of a warpgroup -------------------------------------------------------------------

// 4 warps, the first of which is a multiple of 4, multiply 64 rows together, right factors straight
// from shared memory: on sm_90a, which alone has wgmma. Accumulators and left factors in registers
// are those of mma_m16n8k16, warp i having rows 16 i and up. Tiles are 64 rows of 64 elements at
// swizzled_column. All products between warpgroup_begin and warpgroup_end run asynchronously: what
// they use is not to be touched in between. warpgroup_end is warpgroup_commit, which closes a group
// of products, and warpgroup_wait<0>.
__host__ __device__ constexpr bool has_warpgroup_products() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  return true;
#else
  return false;
#endif
}

// Makes this thread's writes to shared memory, asynchronous copies included, visible to the
// products of a warpgroup behind the next barrier.
__device__ __forceinline__ void fence_for_warpgroup() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
#endif
}

// --- Copies by the copy engine, and their barriers ----------------------------------------------

// Whether tiles can be copied by the engine: where products of a warpgroup take them.
__host__ __device__ constexpr bool has_copy_engine() { return has_warpgroup_products(); }

// A barrier in shared memory. Its phases end one after the other, each when as many threads as it
// was made for have arrived and the bytes they announced are there. Whoever waits says which phase
// it means by its parity: that of the first one is 0.
struct Mbarrier {
  uint64_t state;
};

// Before anybody else uses the barrier; that needs mbarriers_are_ready and a barrier of the block.
__device__ __forceinline__ void mbarrier_init(Mbarrier& barrier, int arrivals) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(&barrier)),
               "r"(arrivals)
               : "memory");
#endif
}
// Behind the mbarrier_inits of a thread.
__device__ __forceinline__ void mbarriers_are_ready() { fence_for_warpgroup(); }
// The end of a barrier that nobody uses any more: another may begin in its place.
__device__ __forceinline__ void mbarrier_end(Mbarrier& barrier) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];\n" ::"r"(shared_address(&barrier)) : "memory");
#endif
}
__device__ __forceinline__ void mbarrier_arrive(Mbarrier& barrier) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(&barrier))
               : "memory");
#endif
}
// Arrives, and announces that many bytes of copies for this phase.
__device__ __forceinline__ void mbarrier_arrive_and_expect(Mbarrier& barrier, int bytes) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(&barrier)),
      "r"(bytes)
      : "memory");
#endif
}
__device__ __forceinline__ void mbarrier_wait(Mbarrier& barrier, int parity) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile(
      "{.reg .pred done;\nwait:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra wait;}\n" ::"r"(
          shared_address(&barrier)),
      "r"(parity)
      : "memory");
#endif
}

// Copies one box of a tensor (common/tensor_map.h) to `shared`, at a multiple of 1024 bytes, and
// tells `barrier` when it is there; zeros from outside of the tensor. Boxes of rows of 64 16-bit
// elements arrive at swizzled_column. One thread calls it.
__device__ __forceinline__ void copy_box(void* shared, const TensorMap& map, int row, int head,
                                         int image, Mbarrier& barrier) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5}], [%6];\n" ::"r"(shared_address(shared)),
      "l"(&map), "r"(0), "r"(row), "r"(head), "r"(image), "r"(shared_address(&barrier))
      : "memory");
#endif
}

// --- Registers of products of a warpgroup --------------------------------------------------------

#define FLEXVAR_FRAGMENT(kind, d) kind(d[0]), kind(d[1]), kind(d[2]), kind(d[3])
#define FLEXVAR_FRAGMENTS_4(kind, d, i)                           \
  FLEXVAR_FRAGMENT(kind, d[i]), FLEXVAR_FRAGMENT(kind, d[i + 1]), \
      FLEXVAR_FRAGMENT(kind, d[i + 2]), FLEXVAR_FRAGMENT(kind, d[i + 3])
#define FLEXVAR_ACCUMULATORS(kind, d) \
  FLEXVAR_FRAGMENTS_4(kind, d, 0), FLEXVAR_FRAGMENTS_4(kind, d, 4)
#define FLEXVAR_ACCUMULATORS_16(kind, d) \
  FLEXVAR_ACCUMULATORS(kind, d), FLEXVAR_FRAGMENTS_4(kind, d, 8), FLEXVAR_FRAGMENTS_4(kind, d, 12)
#define FLEXVAR_NUMBERS_32                                                                     \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FLEXVAR_ACCUMULATOR_LIST "{" FLEXVAR_NUMBERS_32 "}"
#define FLEXVAR_ACCUMULATOR_LIST_16                                                              \
  "{" FLEXVAR_NUMBERS_32                                                                         \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"

// The registers of a product that has not begun, or has ended, may be moved and changed by the
// compiler up to here, or from here on.
__device__ __forceinline__ void hold_registers(float (&d)[8][4]) {
  asm volatile("" : FLEXVAR_ACCUMULATORS("+f", d)::"memory");
}
__device__ __forceinline__ void hold_registers(float (&d)[16][4]) {
  asm volatile("" : FLEXVAR_ACCUMULATORS_16("+f", d)::"memory");
}
template <int kCount>
__device__ __forceinline__ void hold_registers(uint32_t (&a)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3])::"memory");
  }
}
__device__ __forceinline__ void warpgroup_begin() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
#endif
}
__device__ __forceinline__ void warpgroup_commit() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
#endif
}
// Waits until at most the `kPending` latest groups of this warpgroup are under way.
template <int kPending>
__device__ __forceinline__ void warpgroup_wait() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
#endif
}
__device__ __forceinline__ void warpgroup_end() {
  warpgroup_commit();
  warpgroup_wait<0>();
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// Matrix descriptor of a tile from `elements` on, a multiple of 8: groups of 8 rows 1024 bytes
// apart, 128-byte swizzle. Descriptors of a tile differ by numbers known to the compiler: an
// address of shared memory has 18 bits, so nothing is carried out of its field.
__device__ __forceinline__ uint64_t tile_descriptor(const void* tile, int elements) {
  const uint32_t low =
      (shared_address(tile) >> 4) + (1u << 16) + static_cast<uint32_t>(elements / 8);
  return low | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}
// The same without a swizzle.
template <class T>
__device__ __forceinline__ uint64_t matrix_descriptor(const ChunkedMatrix<T>& matrix) {
  return (shared_address(matrix.data) & 0x3ffffu) >> 4 |
         static_cast<uint64_t>(matrix.chunk_stride / 8) << 16 |
         static_cast<uint64_t>(matrix.group_stride / 8) << 32;
}
#endif

// d = a b^T (kAdd: d +=) over depth [depth, depth + 16), of two tiles' rows.
template <class T, bool kAdd>
__device__ __forceinline__ void warpgroup_multiply(float (&d)[8][4], const T* a, const T* b,
                                                   int depth) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  const uint64_t left = tile_descriptor(a, depth), right = tile_descriptor(b, depth);
#define FLEXVAR_MULTIPLY(type, kind)                                                           \
  asm volatile(                                                                                \
      "{.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n"                                           \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " FLEXVAR_ACCUMULATOR_LIST \
      ", %32, %33, add, 1, 1, 0, 0;}\n"                                                        \
      : FLEXVAR_ACCUMULATORS(kind, d)                                                          \
      : "l"(left), "l"(right), "n"(kAdd ? 1 : 0)                                               \
      : "memory")
  if constexpr (std::is_same_v<T, __half>) {
    if constexpr (kAdd) {
      FLEXVAR_MULTIPLY("f16", "+f");
    } else {
      FLEXVAR_MULTIPLY("f16", "=f");
    }
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    if constexpr (kAdd) {
      FLEXVAR_MULTIPLY("bf16", "+f");
    } else {
      FLEXVAR_MULTIPLY("bf16", "=f");
    }
  }
#undef FLEXVAR_MULTIPLY
#endif
}

// d = a b^T (kAdd: d +=), where a has 64 rows and b 64 or 128.
template <bool kAdd = true, class T, int kColumns>
__device__ __forceinline__ void warpgroup_multiply(float (&d)[kColumns][4],
                                                   const ChunkedMatrix<T>& a,
                                                   const ChunkedMatrix<T>& b) {
  static_assert(kColumns == 8 || kColumns == 16);
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  const uint64_t left = matrix_descriptor(a), right = matrix_descriptor(b);
#define FLEXVAR_MULTIPLY(kind, n, type, list, operands, left_number, right_number, add_number) \
  asm volatile("{.reg .pred add;\nsetp.ne.b32 add, %" add_number                               \
               ", 0;\n"                                                                        \
               "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " " list         \
               ", %" left_number ", %" right_number ", add, 1, 1, 0, 0;}\n"                    \
               : operands(kind, d)                                                             \
               : "l"(left), "l"(right), "n"(kAdd ? 1 : 0)                                      \
               : "memory")
#define FLEXVAR_MULTIPLY_COLUMNS(kind, type)                                                       \
  if constexpr (kColumns == 8) {                                                                   \
    FLEXVAR_MULTIPLY(kind, "64", type, FLEXVAR_ACCUMULATOR_LIST, FLEXVAR_ACCUMULATORS, "32", "33", \
                     "34");                                                                        \
  } else {                                                                                         \
    FLEXVAR_MULTIPLY(kind, "128", type, FLEXVAR_ACCUMULATOR_LIST_16, FLEXVAR_ACCUMULATORS_16,      \
                     "64", "65", "66");                                                            \
  }
  constexpr bool kHalf = std::is_same_v<T, __half>;
  static_assert(kHalf || std::is_same_v<T, __nv_bfloat16>);
  if constexpr (kHalf && kAdd) {
    FLEXVAR_MULTIPLY_COLUMNS("+f", "f16")
  } else if constexpr (kHalf) {
    FLEXVAR_MULTIPLY_COLUMNS("=f", "f16")
  } else if constexpr (kAdd) {
    FLEXVAR_MULTIPLY_COLUMNS("+f", "bf16")
  } else {
    FLEXVAR_MULTIPLY_COLUMNS("=f", "bf16")
  }
#undef FLEXVAR_MULTIPLY_COLUMNS
#undef FLEXVAR_MULTIPLY
#endif
}

// The same where a is in registers: 16 columns of the 64 rows.
template <bool kAdd, class T>
__device__ __forceinline__ void warpgroup_multiply(float (&d)[8][4], const uint32_t (&a)[4],
                                                   const T* b, int depth) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  const uint64_t right = tile_descriptor(b, depth);
#define FLEXVAR_MULTIPLY(type, kind)                                                           \
  asm volatile(                                                                                \
      "{.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n"                                           \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " FLEXVAR_ACCUMULATOR_LIST \
      ", {%32, %33, %34, %35}, %36, add, 1, 1, 0;}\n"                                          \
      : FLEXVAR_ACCUMULATORS(kind, d)                                                          \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(right), "n"(kAdd ? 1 : 0)              \
      : "memory")
  if constexpr (std::is_same_v<T, __half>) {
    if constexpr (kAdd) {
      FLEXVAR_MULTIPLY("f16", "+f");
    } else {
      FLEXVAR_MULTIPLY("f16", "=f");
    }
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    if constexpr (kAdd) {
      FLEXVAR_MULTIPLY("bf16", "+f");
    } else {
      FLEXVAR_MULTIPLY("bf16", "=f");
    }
  }
#undef FLEXVAR_MULTIPLY
#endif
}

// d += a b, where b is rows [row, row + 16) of a tile.
template <class T>
__device__ __forceinline__ void warpgroup_multiply_rows(float (&d)[8][4], const uint32_t (&a)[4],
                                                        const T* b, int row) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  const uint64_t right = tile_descriptor(b, row * 64);
#define FLEXVAR_MULTIPLY(type)                                                                 \
  asm volatile(                                                                                \
      "{.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n"                                             \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " FLEXVAR_ACCUMULATOR_LIST \
      ", {%32, %33, %34, %35}, %36, add, 1, 1, 1;}\n"                                          \
      : FLEXVAR_ACCUMULATORS("+f", d)                                                          \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(right)                                 \
      : "memory")
  if constexpr (std::is_same_v<T, __half>) {
    FLEXVAR_MULTIPLY("f16");
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    FLEXVAR_MULTIPLY("bf16");
  }
#undef FLEXVAR_MULTIPLY
#endif
}
#undef FLEXVAR_FRAGMENT
#undef FLEXVAR_FRAGMENTS_4
#undef FLEXVAR_ACCUMULATORS
#undef FLEXVAR_ACCUMULATORS_16
#undef FLEXVAR_NUMBERS_32
#undef FLEXVAR_ACCUMULATOR_LIST
#undef FLEXVAR_ACCUMULATOR_LIST_16

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
  __device__ __forceinline__ explicit ListEnd(const T* place) : address_(shared_address(place)) {}
  __device__ __forceinline__ ListEnd behind(uint32_t elements) const {
    ListEnd end = *this;
    end.address_ += elements * static_cast<uint32_t>(sizeof(T));
    return end;
  }
  // Of a word's one or two elements, those above the floor's.
  __device__ __forceinline__ void append_above(uint32_t floor, uint32_t word) {
    if constexpr (sizeof(T) == 4) {
      asm volatile(
          "{\n"
          ".reg .pred is_above;\n"
          "setp.gt.f32 is_above, %1, %2;\n"
          "@is_above st.shared.f32 [%0], %1;\n"
          "@is_above add.u32 %0, %0, 4;\n"
          "}\n"
          : "+r"(address_)
          : "f"(__uint_as_float(word)), "f"(__uint_as_float(floor))
          : "memory");
    } else {
#define FLEXVAR_APPEND_PAIR(compare, other) \
  asm volatile(                             \
      "{\n"                                 \
      ".reg .pred first, second;\n"         \
      ".reg .b32 bit;\n"                    \
      ".reg .b16 low, high;\n"              \
      "mov.b32 {low, high}, %1;\n" compare  \
      "@first st.shared.b16 [%0], low;\n"   \
      "@first add.u32 %0, %0, 2;\n"         \
      "@second st.shared.b16 [%0], high;\n" \
      "@second add.u32 %0, %0, 2;\n"        \
      "}\n"                                 \
      : "+r"(address_)                      \
      : "r"(word), "r"(other)               \
      : "memory")
      if constexpr (std::is_same_v<T, __half>) {
        FLEXVAR_APPEND_PAIR("setp.gt.f16x2 first|second, %1, %2;\n", floor);
      } else {
#if __CUDA_ARCH__ >= 900
        FLEXVAR_APPEND_PAIR("setp.gt.bf16x2 first|second, %1, %2;\n", floor);
#else
        FLEXVAR_APPEND_PAIR(
            "and.b32 bit, %2, 1;\nsetp.ne.u32 first, bit, 0;\nsetp.lt.s32 second, %2, 0;\n",
            above_mask<T>(word, floor));
#endif
      }
#undef FLEXVAR_APPEND_PAIR
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

#endif
