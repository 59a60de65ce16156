// A row in a block's shared memory: how it gets there, and how threads read it. A thread has
// `pieces` pieces of four logits that lie one behind the other, so the threads' order is the row's.
// Behind the row's end there is -inf.
#pragma once

#include "guided_sample/row.cuh"

namespace flexvar {

template <class T>
struct alignas(4 * sizeof(T)) LogitPiece {
  T values[4];
};

// Four logits of a row of n from `begin` on, -inf where there are none.
template <class T>
__device__ inline LogitPiece<T> load_piece(const T* logits, int32_t n, int32_t begin) {
  if (reinterpret_cast<uintptr_t>(logits) % sizeof(LogitPiece<T>) == 0 && begin + 4 <= n) {
    return *reinterpret_cast<const LogitPiece<T>*>(logits + begin);
  }
  LogitPiece<T> piece;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    piece.values[e] = begin + e < n ? logits[begin + e] : from_float<T>(-INFINITY);
  }
  return piece;
}

// Begins to copy a row of n logits. It is there once every thread is past cp_async_wait and then
// the block past a barrier.
template <int kThreads, class T>
__device__ inline void copy_row(T* resident, const T* logits, int32_t n) {
  constexpr int kChunk = 16 / sizeof(T);
  const int32_t thread = ptx::computed_here(threadIdx.x);
  if (reinterpret_cast<uintptr_t>(logits) % 16 == 0) {
    const int32_t whole = n / kChunk * kChunk;
#pragma unroll 3
    for (int32_t i = thread * kChunk; i < whole; i += kThreads * kChunk) {
      ptx::cp_async(resident + i, logits + i);
    }
    for (int32_t i = whole + thread; i < n; i += kThreads) resident[i] = logits[i];
  } else if constexpr (sizeof(T) == 4) {
#pragma unroll 4
    for (int32_t i = thread; i < n; i += kThreads) ptx::cp_async<4>(resident + i, logits + i);
  } else {
#pragma unroll 8
    for (int32_t i = thread; i < n; i += kThreads) resident[i] = logits[i];
  }
  ptx::cp_async_commit();
}

// The mass of the logits from `part` on, `pieces` pieces.
template <class T>
__device__ inline int64_t mass_of_part(const T* part, int32_t pieces, float maximum) {
  int64_t mass = 0;
#pragma unroll 3
  for (int32_t j = 0; j < pieces; ++j) {
    const auto piece = *reinterpret_cast<const LogitPiece<T>*>(part + j * 4);
    uint32_t weights[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) weights[e] = token_weight(to_float(piece.values[e]), maximum);
    mass += weights[0] + weights[1] + weights[2];  // at most 3 * 2^30
    mass += weights[3];
  }
  return mass;
}

}  // namespace flexvar
