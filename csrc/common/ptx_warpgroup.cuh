// The part of common/ptx.cuh, which includes it, that sm_90a alone has: products of a warpgroup,
// and copies by the copy engine.
#pragma once

#include "common/ptx.cuh"
#include "common/tensor_map.h"

namespace flexvar::ptx {

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

// product("f16" or "bf16", "+f" where it adds or "=f"): T's name, and how registers are used.
#define FLEXVAR_FOR_TYPE(T, kAdd, product)                                      \
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>); \
  if constexpr (std::is_same_v<T, __half> && kAdd) {                            \
    product("f16", "+f");                                                       \
  } else if constexpr (std::is_same_v<T, __half>) {                             \
    product("f16", "=f");                                                       \
  } else if constexpr (kAdd) {                                                  \
    product("bf16", "+f");                                                      \
  } else {                                                                      \
    product("bf16", "=f");                                                      \
  }

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
  FLEXVAR_FOR_TYPE(T, kAdd, FLEXVAR_MULTIPLY)
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
#define FLEXVAR_MULTIPLY(type, kind, n, list, operands, left_number, right_number, add_number) \
  asm volatile("{.reg .pred add;\nsetp.ne.b32 add, %" add_number                               \
               ", 0;\n"                                                                        \
               "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " " list         \
               ", %" left_number ", %" right_number ", add, 1, 1, 0, 0;}\n"                    \
               : operands(kind, d)                                                             \
               : "l"(left), "l"(right), "n"(kAdd ? 1 : 0)                                      \
               : "memory")
#define FLEXVAR_MULTIPLY_COLUMNS(type, kind)                                                       \
  if constexpr (kColumns == 8) {                                                                   \
    FLEXVAR_MULTIPLY(type, kind, "64", FLEXVAR_ACCUMULATOR_LIST, FLEXVAR_ACCUMULATORS, "32", "33", \
                     "34");                                                                        \
  } else {                                                                                         \
    FLEXVAR_MULTIPLY(type, kind, "128", FLEXVAR_ACCUMULATOR_LIST_16, FLEXVAR_ACCUMULATORS_16,      \
                     "64", "65", "66");                                                            \
  }
  FLEXVAR_FOR_TYPE(T, kAdd, FLEXVAR_MULTIPLY_COLUMNS)
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
  FLEXVAR_FOR_TYPE(T, kAdd, FLEXVAR_MULTIPLY)
#undef FLEXVAR_MULTIPLY
#endif
}

// d += a b, where b is rows [row, row + 16) of a tile.
template <class T>
__device__ __forceinline__ void warpgroup_multiply_rows(float (&d)[8][4], const uint32_t (&a)[4],
                                                        const T* b, int row) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  const uint64_t right = tile_descriptor(b, row * 64);
#define FLEXVAR_MULTIPLY(type, kind)                                                           \
  asm volatile(                                                                                \
      "{.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n"                                             \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " FLEXVAR_ACCUMULATOR_LIST \
      ", {%32, %33, %34, %35}, %36, add, 1, 1, 1;}\n"                                          \
      : FLEXVAR_ACCUMULATORS(kind, d)                                                          \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(right)                                 \
      : "memory")
  FLEXVAR_FOR_TYPE(T, true, FLEXVAR_MULTIPLY)
#undef FLEXVAR_MULTIPLY
#endif
}
#undef FLEXVAR_FOR_TYPE
#undef FLEXVAR_FRAGMENT
#undef FLEXVAR_FRAGMENTS_4
#undef FLEXVAR_ACCUMULATORS
#undef FLEXVAR_ACCUMULATORS_16
#undef FLEXVAR_NUMBERS_32
#undef FLEXVAR_ACCUMULATOR_LIST
#undef FLEXVAR_ACCUMULATOR_LIST_16

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

}  // namespace flexvar::ptx
