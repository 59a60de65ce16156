// CUDA's language on the CPU: included by common/cuda.cuh when the compiler is not nvcc. The names
// are CUDA's own; semantics are those of independent thread scheduling (sm_70 and later), made
// strict: what CUDA leaves undefined is an error here. See README.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <type_traits>

#include "testing/intrinsics_on_cpu.h"
#include "testing/runtime.h"
// After the vector types:
#include "testing/half_on_cpu.h"

#define FLEXVAR_EMULATED 1

#define __global__ inline
#define __device__
#define __host__
#define __constant__ static const
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// --- Barriers and fences -----------------------------------------------------------------------

#define FLEXVAR_WHERE \
  ::flexvar::emulation::Location where = ::flexvar::emulation::Location::current()

inline void __syncthreads(FLEXVAR_WHERE) {
  flexvar::emulation::block_barrier(0, 0, flexvar::emulation::Vote::none, 0, where);
}
inline int __syncthreads_and(int predicate, FLEXVAR_WHERE) {
  return flexvar::emulation::block_barrier(0, 0, flexvar::emulation::Vote::all, predicate, where);
}
inline int __syncthreads_or(int predicate, FLEXVAR_WHERE) {
  return flexvar::emulation::block_barrier(0, 0, flexvar::emulation::Vote::any, predicate, where);
}
inline int __syncthreads_count(int predicate, FLEXVAR_WHERE) {
  return flexvar::emulation::block_barrier(0, 0, flexvar::emulation::Vote::count, predicate, where);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, FLEXVAR_WHERE) {
  flexvar::emulation::WarpArguments arguments;
  flexvar::emulation::warp_collective(flexvar::emulation::WarpOp::sync, mask, arguments, where);
}
inline void __threadfence() { flexvar::emulation::thread_fence(); }
inline void __threadfence_system() { flexvar::emulation::thread_fence(); }
inline void __threadfence_block() { flexvar::emulation::thread_fence(); }

// --- Shuffles, votes, matches, reductions ------------------------------------------------------

namespace flexvar::emulation {

template <class T>
uint64_t to_payload(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t payload = 0;
  __builtin_memcpy(&payload, &value, sizeof(T));
  return payload;
}
template <class T>
T from_payload(uint64_t payload) {
  T value;
  __builtin_memcpy(&value, &payload, sizeof(T));
  return value;
}

template <class T>
T warp_exchange(WarpOp op, unsigned mask, T value, int source_lane, Location where) {
  WarpArguments arguments;
  arguments.value = to_payload(value);
  arguments.source_lane = source_lane;
  warp_collective(op, mask, arguments, where);
  return from_payload<T>(arguments.result);
}

template <class T>
T warp_reduce(WarpOp unsigned_op, WarpOp signed_op, unsigned mask, T value, Location where) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
  return warp_exchange(std::is_signed_v<T> ? signed_op : unsigned_op, mask, value, 0, where);
}

}  // namespace flexvar::emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, FLEXVAR_WHERE) {
  const int lane = flexvar::emulation::current_lane();
  return flexvar::emulation::warp_exchange(flexvar::emulation::WarpOp::shuffle, mask, value,
                                           (lane & -width) | (source & (width - 1)), where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, FLEXVAR_WHERE) {
  const int lane = flexvar::emulation::current_lane();
  const int source = lane - static_cast<int>(delta);
  return flexvar::emulation::warp_exchange(flexvar::emulation::WarpOp::shuffle, mask, value,
                                           source < (lane & -width) ? lane : source, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, FLEXVAR_WHERE) {
  const int lane = flexvar::emulation::current_lane();
  const int source = lane + static_cast<int>(delta);
  return flexvar::emulation::warp_exchange(flexvar::emulation::WarpOp::shuffle, mask, value,
                                           source > (lane | (width - 1)) ? lane : source, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, FLEXVAR_WHERE) {
  const int lane = flexvar::emulation::current_lane();
  const int source = lane ^ lane_mask;
  return flexvar::emulation::warp_exchange(flexvar::emulation::WarpOp::shuffle, mask, value,
                                           source > (lane | (width - 1)) ? lane : source, where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, FLEXVAR_WHERE) {
  return flexvar::emulation::warp_exchange(flexvar::emulation::WarpOp::ballot, mask,
                                           unsigned{predicate != 0}, 0, where);
}
inline int __all_sync(unsigned mask, int predicate, FLEXVAR_WHERE) {
  return flexvar::emulation::warp_exchange(flexvar::emulation::WarpOp::vote_all, mask,
                                           int{predicate != 0}, 0, where);
}
inline int __any_sync(unsigned mask, int predicate, FLEXVAR_WHERE) {
  return flexvar::emulation::warp_exchange(flexvar::emulation::WarpOp::vote_any, mask,
                                           int{predicate != 0}, 0, where);
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, FLEXVAR_WHERE) {
  return static_cast<unsigned>(
      flexvar::emulation::warp_exchange(flexvar::emulation::WarpOp::match_any, mask,
                                        flexvar::emulation::to_payload(value), 0, where));
}
template <class T>
unsigned __match_all_sync(unsigned mask, T value, int* predicate, FLEXVAR_WHERE) {
  const auto lanes = static_cast<unsigned>(
      flexvar::emulation::warp_exchange(flexvar::emulation::WarpOp::match_all, mask,
                                        flexvar::emulation::to_payload(value), 0, where));
  *predicate = lanes != 0;
  return lanes;
}
template <class T>
T __reduce_add_sync(unsigned mask, T value, FLEXVAR_WHERE) {
  using enum flexvar::emulation::WarpOp;
  return flexvar::emulation::warp_reduce(add, add, mask, value, where);
}
template <class T>
T __reduce_min_sync(unsigned mask, T value, FLEXVAR_WHERE) {
  using enum flexvar::emulation::WarpOp;
  return flexvar::emulation::warp_reduce(min, min_signed, mask, value, where);
}
template <class T>
T __reduce_max_sync(unsigned mask, T value, FLEXVAR_WHERE) {
  using enum flexvar::emulation::WarpOp;
  return flexvar::emulation::warp_reduce(max, max_signed, mask, value, where);
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value, FLEXVAR_WHERE) {
  return flexvar::emulation::warp_exchange(flexvar::emulation::WarpOp::bit_and, mask, value, 0,
                                           where);
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value, FLEXVAR_WHERE) {
  return flexvar::emulation::warp_exchange(flexvar::emulation::WarpOp::bit_or, mask, value, 0,
                                           where);
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value, FLEXVAR_WHERE) {
  return flexvar::emulation::warp_exchange(flexvar::emulation::WarpOp::bit_xor, mask, value, 0,
                                           where);
}

// --- Atomics: threads run one at a time, so a plain update is atomic ---------------------------

namespace flexvar::emulation {

template <class T, class Update>
__attribute__((no_sanitize("thread"))) T atomic_update(T* address, Location where, Update update) {
  check_atomic(address, sizeof(T), where);
  const T old = *address;
  *address = update(old);
  return old;
}

}  // namespace flexvar::emulation

#define FLEXVAR_ATOMIC(name, expression)                                                         \
  template <class T>                                                                             \
  T name(T* address, std::type_identity_t<T> value, FLEXVAR_WHERE) {                             \
    return flexvar::emulation::atomic_update(address, where,                                     \
                                             [=](T old) { return static_cast<T>(expression); }); \
  }
FLEXVAR_ATOMIC(atomicAdd, old + value)
FLEXVAR_ATOMIC(atomicSub, old - value)
FLEXVAR_ATOMIC(atomicExch, (static_cast<void>(old), value))
FLEXVAR_ATOMIC(atomicMin, min(old, value))
FLEXVAR_ATOMIC(atomicMax, max(old, value))
FLEXVAR_ATOMIC(atomicAnd, old& value)
FLEXVAR_ATOMIC(atomicOr, old | value)
FLEXVAR_ATOMIC(atomicXor, old ^ value)
FLEXVAR_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
#undef FLEXVAR_ATOMIC

template <class T>
T atomicCAS(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> value,
            FLEXVAR_WHERE) {
  return flexvar::emulation::atomic_update(address, where,
                                           [=](T old) { return old == compare ? value : old; });
}

#undef FLEXVAR_WHERE

// --- Loads and stores with cache hints ---------------------------------------------------------

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
void __stcg(T* address, std::type_identity_t<T> value) {
  *address = value;
}
template <class T>
void __stcs(T* address, std::type_identity_t<T> value) {
  *address = value;
}

[[noreturn]] inline void __trap() { flexvar::emulation::fail("__trap() was called"); }
inline void __nanosleep(unsigned) {}
inline long long clock64() { return 0; }

// --- Shared memory (common/cuda.cuh documents both) --------------------------------------------

namespace flexvar::emulation {

template <class T>
T& shared_storage() {
  static_assert(std::is_trivially_default_constructible_v<T>);
  static_assert(sizeof(T) <= 48 * 1024, "static shared memory is limited to 48 KiB");
  static const char key = 0;
  return *static_cast<T*>(static_shared(&key, sizeof(T), alignof(T), __PRETTY_FUNCTION__));
}

template <class T = unsigned char>
T* dynamic_shared() {
  return static_cast<T*>(dynamic_shared_memory());
}

}  // namespace flexvar::emulation
