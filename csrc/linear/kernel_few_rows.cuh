// linear for few rows of 16-bit numbers, whose time is the weight's way from memory. The weight
// does not depend on the kernel before, so it is fetched while that one still runs: every block
// asks at its very beginning for all of the weight that it multiplies, and waits only then.
//
// A block owns kFeatures * 8 features and up to kRowTiles * 16 rows. Its warps take turns at chunks
// of 32 numbers of the depth, each with sums of its own, which are added up at the end in the order
// of the warps: a row's result depends on nothing but the row and the weight.
#pragma once

#include "common/ptx.cuh"

namespace flexvar {

constexpr int kFewRowsThreads = 256, kFewRowsWarps = kFewRowsThreads / 32;
constexpr int kFewRowsChunk = 32;                             // of the depth
constexpr int kFewRowsRound = kFewRowsWarps * kFewRowsChunk;  // that a block takes at a time
constexpr int kFewRowsMostShared = 100 * 1024;  // bytes: the next kernel's blocks fit beside these

template <class T>
struct LinearFewRowsCudaParams {
  const T* x;       // [rows, depth], contiguous, aligned to 16 bytes
  const T* weight;  // [columns, depth], likewise
  const T* bias;    // [columns], or null
  T* out;           // [rows, columns]
  int rows;
  int columns;    // a multiple of 8
  int depth;      // a multiple of kFewRowsChunk
  bool gelu;      // GELU in its tanh form
  bool constant;  // no kernel that may still run writes weight and bias
};

// A row of the sums of a warp in shared memory: padded so that the 8 rows of a fragment lie in
// different banks.
__host__ __device__ constexpr int few_rows_stride(int features) {
  return features % 2 == 0 ? features * 8 + 8 : features * 8;
}

// Sixteens of rows whose numbers are under way at a time: fewer where products by shuffles take
// registers.
__host__ __device__ constexpr int few_rows_under_way() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  return 4;
#else
  return 8;
#endif
}

// Bytes of dynamic shared memory: the weight's part, then sums in its place.
template <int kRowTiles, int kFeatures>
int64_t few_rows_shared_bytes(int64_t depth) {
  const int64_t rounds = (depth + kFewRowsRound - 1) / kFewRowsRound;
  const int64_t weights = rounds * kFeatures * kFewRowsThreads * 16;
  const int64_t sums = int64_t{kFewRowsWarps} * kRowTiles * 16 * few_rows_stride(kFeatures) * 4;
  return weights > sums ? weights : sums;
}

__device__ __forceinline__ float gelu_tanh(float x) {
  const float inner = 0.7978845608f * fmaf(0.044715f * x * x, x, x);
  return 0.5f * x * (1.0f + tanhf(inner));
}

template <class T>
struct alignas(2 * sizeof(T)) ElementPair {
  T low, high;
};

template <class T, int kRowTiles, int kFeatures>
__global__ void __launch_bounds__(kFewRowsThreads, 2)
    linear_few_rows_kernel(LinearFewRowsCudaParams<T> params) {
  constexpr int kBatch = few_rows_under_way() / kRowTiles;  // rounds that are loaded at a time
  ptx::griddepcontrol_launch_dependents();
  if (!params.constant) ptx::griddepcontrol_wait();
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int g = lane / 4, t = lane % 4;
  const int first_column = static_cast<int>(blockIdx.x) * kFeatures * 8;
  const int first_row = static_cast<int>(blockIdx.y) * kRowTiles * 16;
  const int rounds = (params.depth + kFewRowsRound - 1) / kFewRowsRound;
  // A lane's numbers of a chunk are 8 side by side: which of them are a fragment's first and last
  // does not matter, as long as x and the weight agree.
  const int first_depth = warp * kFewRowsChunk + t * 8;

  // Each thread reads only what it has copied itself, so no barrier is needed.
  uint4* const slots = dynamic_shared<uint4>() + thread;
  for (int round = 0; round < rounds; ++round) {
    const int depth = first_depth + round * kFewRowsRound;
#pragma unroll
    for (int f = 0; f < kFeatures; ++f) {
      const int column = first_column + f * 8 + g;
      const bool is_there = column < params.columns && depth < params.depth;
      ptx::cp_async<16>(
          slots + (round * kFeatures + f) * kFewRowsThreads,
          is_there ? params.weight + int64_t{column} * params.depth + depth : params.weight,
          is_there);
    }
  }
  ptx::cp_async_commit();
  // The results of this thread at the end: pairs of neighbours.
  constexpr int kRows = kRowTiles * 16, kPairs = kFeatures * 4;
  constexpr int kEach = (kRows * kPairs + kFewRowsThreads - 1) / kFewRowsThreads;
  float bias[kEach][2] = {};
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int column = first_column + (thread + i * kFewRowsThreads) % kPairs * 2;
    if (params.bias != nullptr && column < params.columns) {
      bias[i][0] = to_float(params.bias[column]);
      bias[i][1] = to_float(params.bias[column + 1]);
    }
  }
  if (params.constant) ptx::griddepcontrol_wait();

  const T* x[kRowTiles][2];
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // rows that are not there: another one's numbers
      const int row = min(first_row + i * 16 + half * 8 + g, params.rows - 1);
      x[i][half] = params.x + int64_t{row} * params.depth + first_depth;
    }
  }
  float sums[kRowTiles][kFeatures][4] = {};
  for (int begin = 0; begin < rounds; begin += kBatch) {
    uint4 left[kBatch][kRowTiles][2] = {};
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int offset = (begin + b) * kFewRowsRound;
      if (first_depth + offset < params.depth) {
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            left[b][i][half] = *reinterpret_cast<const uint4*>(x[i][half] + offset);
          }
        }
      }
    }
    if (begin == 0) ptx::cp_async_wait();
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (begin + b >= rounds) break;
#pragma unroll
      for (int f = 0; f < kFeatures; ++f) {
        const uint4 right = slots[((begin + b) * kFeatures + f) * kFewRowsThreads];
        const uint32_t first[2] = {right.x, right.y}, second[2] = {right.z, right.w};
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          const uint4 upper = left[b][i][0], lower = left[b][i][1];
          const uint32_t first_left[4] = {upper.x, lower.x, upper.y, lower.y};
          const uint32_t second_left[4] = {upper.z, lower.z, upper.w, lower.w};
          ptx::mma_m16n8k16<T>(sums[i][f], first_left, first);
          ptx::mma_m16n8k16<T>(sums[i][f], second_left, second);
        }
      }
    }
  }

  constexpr int kStride = few_rows_stride(kFeatures);
  float* const all_sums = reinterpret_cast<float*>(dynamic_shared<uint4>());
  __syncthreads();  // the weight has been read
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int f = 0; f < kFeatures; ++f) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp * kRows + i * 16 + half * 8 + g;
        *reinterpret_cast<float2*>(all_sums + row * kStride + f * 8 + 2 * t) =
            make_float2(sums[i][f][2 * half], sums[i][f][2 * half + 1]);
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int pair = thread + i * kFewRowsThreads;
    const int row_of_block = pair / kPairs, column_of_block = pair % kPairs * 2;
    const int row = first_row + row_of_block, column = first_column + column_of_block;
    if (row_of_block >= kRows || row >= params.rows || column >= params.columns) continue;
    float low = 0, high = 0;
#pragma unroll
    for (int w = 0; w < kFewRowsWarps; ++w) {
      const float2 part = *reinterpret_cast<const float2*>(
          all_sums + (w * kRows + row_of_block) * kStride + column_of_block);
      low += part.x;
      high += part.y;
    }
    low += bias[i][0];
    high += bias[i][1];
    if (params.gelu) {
      low = gelu_tanh(low);
      high = gelu_tanh(high);
    }
    *reinterpret_cast<ElementPair<T>*>(params.out + int64_t{row} * params.columns + column) = {
        from_float<T>(low), from_float<T>(high)};
  }
}

}  // namespace flexvar
