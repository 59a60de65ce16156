// The interface of common/ptx.cuh on the CPU.
#pragma once

#include <algorithm>

#include "common/swizzle.h"
#include "testing/cuda_on_cpu.h"
#include "testing/device.h"

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

inline void stmatrix_x4(void* row, const uint32_t (&r)[4]) { stmatrix_by_shuffles(row, r); }

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

inline bool has_warpgroup_products() { return emulation::device_options().warpgroups; }
inline void fence_for_warpgroup() {}
template <int kCount>
void hold_registers(float (&)[kCount][4]) {}
template <int kCount>
void hold_registers(uint32_t (&)[kCount][4]) {}
inline void warpgroup_begin() {}
inline void warpgroup_commit() { emulation::commit_products(); }
template <int kPending>
void warpgroup_wait() {
  emulation::wait_for_products(kPending);
}
inline void warpgroup_end() {
  warpgroup_commit();
  warpgroup_wait<0>();
}
// product() when the warpgroup waits for it.
template <class F>
void begin_product(const F& product) {
  static_assert(std::is_trivially_copyable_v<F>);
  emulation::begin_product([](const void* f) { (*static_cast<const F*>(f))(); }, &product,
                           sizeof(product));
}
// d = a b^T (add: d +=) of a warpgroup over a depth of 16, when it is waited for. `left` and
// `right` yield the address of a row's 8 elements from a column on, which is 0 or 8.
template <class T, int kColumns, class Left, class Right>
void warpgroup_product(float (&d)[kColumns][4], bool add, Left left, Right right, Location where) {
  begin_product([&d, add, left, right, where] {
    const int lane = emulation::current_lane(), warp = static_cast<int>(threadIdx.x) / 32;
    uint32_t a[4];
    ldmatrix_x4(a, left(warp % 4 * 16 + lane % 16, lane / 16 * 8), where);
    for (int n = 0; n < kColumns; ++n) {
      if (!add) std::fill_n(d[n], 4, 0.0f);
      uint32_t b[2];
      ldmatrix_x2(b, right(n * 8 + lane % 8, lane / 8 % 2 * 8), where);
      mma_m16n8k16<T>(d[n], a, b, where);
    }
  });
}
template <class T, bool kAdd>
void warpgroup_multiply(float (&d)[8][4], const T* a, const T* b, int depth,
                        Location where = Location::current()) {
  const auto in = [depth](const T* tile) {
    return [tile, depth](int row, int column) {
      return tile + row * 64 + swizzled_column(row, depth + column);
    };
  };
  warpgroup_product<T>(d, kAdd, in(a), in(b), where);
}
template <bool kAdd = true, class T, int kColumns>
void warpgroup_multiply(float (&d)[kColumns][4], const ChunkedMatrix<T>& a,
                        const ChunkedMatrix<T>& b, Location where = Location::current()) {
  const auto in = [](const ChunkedMatrix<T>& matrix) {
    return [matrix](int row, int column) {
      return matrix.data + row / 8 * matrix.group_stride + row % 8 * 8 +
             column / 8 * matrix.chunk_stride;
    };
  };
  warpgroup_product<T>(d, kAdd, in(a), in(b), where);
}
template <class T>
void warpgroup_multiply_rows(float (&d)[8][4], const uint32_t (&a)[4], const T* b, int row,
                             Location where = Location::current()) {
  begin_product([&d, &a, b, row, where] {
    const int lane = emulation::current_lane();
    for (int n = 0; n < 8; ++n) {
      uint32_t right[2];
      const int from = row + lane % 16;
      ldmatrix_x2_trans(right, b + from * 64 + swizzled_column(from, n * 8), where);
      mma_m16n8k16<T>(d[n], a, right, where);
    }
  });
}

// Where a is in registers: 16 columns of the 64 rows.
template <bool kAdd, class T>
void warpgroup_multiply(float (&d)[8][4], const uint32_t (&a)[4], const T* b, int depth,
                        Location where = Location::current()) {
  begin_product([&d, &a, b, depth, where] {
    const int lane = emulation::current_lane();
    for (int n = 0; n < 8; ++n) {
      if (!kAdd) std::fill_n(d[n], 4, 0.0f);
      uint32_t right[2];
      const int row = n * 8 + lane % 8;
      ldmatrix_x2(right, b + row * 64 + swizzled_column(row, depth + lane / 8 % 2 * 8), where);
      mma_m16n8k16<T>(d[n], a, right, where);
    }
  });
}

inline bool has_copy_engine() { return has_warpgroup_products(); }
struct Mbarrier {
  uint64_t state;
};
inline void mbarrier_init(Mbarrier& barrier, int arrivals, Location where = Location::current()) {
  emulation::mbarrier_init(&barrier, arrivals, where);
}
inline void mbarriers_are_ready() {}
inline void mbarrier_end(Mbarrier& barrier, Location where = Location::current()) {
  emulation::mbarrier_end(&barrier, where);
}
inline void mbarrier_arrive(Mbarrier& barrier, Location where = Location::current()) {
  emulation::mbarrier_arrive(&barrier, 0, where);
}
inline void mbarrier_arrive_and_expect(Mbarrier& barrier, int bytes,
                                       Location where = Location::current()) {
  emulation::mbarrier_arrive(&barrier, bytes, where);
}
inline void mbarrier_wait(Mbarrier& barrier, int parity, Location where = Location::current()) {
  emulation::mbarrier_wait(&barrier, parity, where);
}
inline void copy_box(void* shared, const TensorMap& map, int row, int head, int image,
                     Mbarrier& barrier, Location where = Location::current()) {
  emulation::copy_box(shared, map, row, head, image, &barrier, where);
}

inline void barrier_sync(int id, int threads, Location where = Location::current()) {
  emulation::block_barrier(id, threads, emulation::Vote::none, 0, where);
}
inline void barrier_arrive(int id, int threads, Location where = Location::current()) {
  emulation::block_barrier_arrive(id, threads, where);
}
inline uint32_t warp_sum(uint32_t x, Location where = Location::current()) {
  return __reduce_add_sync(0xffffffffu, x, where);
}
inline uint32_t warp_inclusive_sum(uint32_t x, Location where = Location::current()) {
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const uint32_t other = __shfl_up_sync(0xffffffffu, x, static_cast<unsigned>(lanes), 32, where);
    if (static_cast<int>(threadIdx.x) % 32 >= lanes) x += other;
  }
  return x;
}

inline void prefetch(const void*) {}

template <class T>
T half_of(uint32_t pair, int i) {
  return std::bit_cast<T>(static_cast<uint16_t>(pair >> 16 * i));
}
template <class T>
uint32_t above_mask(uint32_t pair, uint32_t floor) {
  return (half_of<T>(pair, 0) > half_of<T>(floor, 0) ? 0xffffu : 0) |
         (half_of<T>(pair, 1) > half_of<T>(floor, 1) ? 0xffff0000u : 0);
}

template <class T>
class ListEnd {
 public:
  static constexpr int kTogether = sizeof(T) == 4 ? 4 : 2;

  ListEnd() = default;
  explicit ListEnd(T* place) : place_(place) {}
  ListEnd behind(uint32_t elements) const { return ListEnd(place_ + elements); }
  static void append_above(ListEnd (&ends)[kTogether], uint32_t floor,
                           const uint32_t (&words)[kTogether]) {
    for (int list = 0; list < kTogether; ++list) ends[list].append(floor, words[list]);
  }

 private:
  void append(uint32_t floor, uint32_t word) {
    if constexpr (sizeof(T) == 4) {
      if (std::bit_cast<T>(word) > std::bit_cast<T>(floor)) *place_++ = std::bit_cast<T>(word);
    } else {
      for (int i = 0; i < 2; ++i) {
        if (half_of<T>(word, i) > half_of<T>(floor, i)) *place_++ = half_of<T>(word, i);
      }
    }
  }

  T* place_;
};

inline void griddepcontrol_wait() { emulation::wait_for_earlier_launches(); }
inline void griddepcontrol_launch_dependents() {}
inline int computed_here(int x) { return x; }
template <class T>
const T* computed_here(const T* x) {
  return x;
}
inline uint32_t difference_bits(float a, float b) {
  return std::isnan(a - b) ? 0x7fffffffu : std::bit_cast<uint32_t>(a - b);
}
inline float exp2_approx(float x) { return std::exp2(x); }
inline float reciprocal_approx(float x) { return 1 / x; }

}  // namespace flexvar::ptx
