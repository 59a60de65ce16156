// The planted bugs (planted_bugs.cpp) of copies by the copy engine and of barriers in shared
// memory.
#pragma once

#include "common/ptx.cuh"

namespace flexvar::emulation {
namespace {

struct Params {
  const float* x;  // [256]
  float* y;        // [256]
  unsigned* counter;
  int n;  // 256
};

struct BoxStorage {
  alignas(1024) uint16_t rows[8][64];
  ptx::Mbarrier arrived, done;
};
constexpr int kBoxBytes = 1024;

// x as 8 rows of 64 elements of 16 bits.
TensorMap rows_of(const Params& p) {
  return {reinterpret_cast<const char*>(p.x), 1, 1, 8, 64, 0, 0, 128, 8};
}
// Thread 0 begins to copy them.
void begin_box(const Params& p, BoxStorage& shared, int expected_bytes = kBoxBytes) {
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(shared.arrived, 1);
    ptx::mbarrier_init(shared.done, 8);
    ptx::mbarriers_are_ready();
    ptx::mbarrier_arrive_and_expect(shared.arrived, expected_bytes);
    ptx::copy_box(shared.rows, rows_of(p), 0, 0, 0, shared.arrived);
  }
  __syncthreads();
}
float in_box(const BoxStorage& shared, int row, int column) {
  return shared.rows[row][ptx::swizzled_column(row, column)];
}

void read_box(const Params& p, int expected_bytes) {
  auto& shared = shared_storage<BoxStorage>();
  begin_box(p, shared, expected_bytes);
  ptx::mbarrier_wait(shared.arrived, 0);
  p.y[threadIdx.x] = in_box(shared, static_cast<int>(threadIdx.x) / 32, 1);
}

template <bool kBug>
__global__ void box_not_waited_for(Params p) {
  auto& shared = shared_storage<BoxStorage>();
  begin_box(p, shared);
  if (!kBug) ptx::mbarrier_wait(shared.arrived, 0);
  p.y[threadIdx.x] = in_box(shared, static_cast<int>(threadIdx.x) / 32, 1);
}

template <bool kBug>
__global__ void box_waited_for_by_one(Params p) {
  auto& shared = shared_storage<BoxStorage>();
  begin_box(p, shared);
  if (!kBug || threadIdx.x == 0) ptx::mbarrier_wait(shared.arrived, 0);
  p.y[threadIdx.x] = in_box(shared, static_cast<int>(threadIdx.x) / 32, 1);
}

template <bool kBug>
__global__ void box_waited_for_in_wrong_phase(Params p) {
  auto& shared = shared_storage<BoxStorage>();
  begin_box(p, shared);
  ptx::mbarrier_wait(shared.arrived, kBug ? 1 : 0);
  p.y[threadIdx.x] = in_box(shared, static_cast<int>(threadIdx.x) / 32, 1);
}

template <bool kBug>
__global__ void box_onto_what_is_read(Params p) {
  auto& shared = shared_storage<BoxStorage>();
  begin_box(p, shared);
  ptx::mbarrier_wait(shared.arrived, 0);
  p.y[threadIdx.x] = in_box(shared, static_cast<int>(threadIdx.x) / 32, 1);
  __syncwarp();
  if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(shared.done);
  if (threadIdx.x == 0) {
    if (!kBug) ptx::mbarrier_wait(shared.done, 0);
    ptx::mbarrier_arrive_and_expect(shared.arrived, kBoxBytes);
    ptx::copy_box(shared.rows, rows_of(p), 4, 0, 0, shared.arrived);
  }
  ptx::mbarrier_wait(shared.arrived, 1);
  p.y[threadIdx.x] += in_box(shared, static_cast<int>(threadIdx.x) / 32, 1);  // 4 to 7, and zeros
}

template <bool kBug>
__global__ void box_read_by_other_lanes(Params p) {
  auto& shared = shared_storage<BoxStorage>();
  begin_box(p, shared);
  ptx::mbarrier_wait(shared.arrived, 0);
  p.y[threadIdx.x] = in_box(shared, static_cast<int>(threadIdx.x) / 32, 1);
  if (!kBug) __syncwarp();
  if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(shared.done);
  if (threadIdx.x == 0) {
    ptx::mbarrier_wait(shared.done, 0);
    shared.rows[7][0] = 0;
    shared.rows[0][ptx::swizzled_column(0, 1)] = 0;
  }
}

template <bool kBug>
__global__ void box_not_expected(Params p) {
  read_box(p, kBug ? 512 : kBoxBytes);
}

template <bool kBug>
__global__ void box_expected_in_vain(Params p) {
  read_box(p, kBug ? 2048 : kBoxBytes);
}

template <bool kBug>
__global__ void box_nobody_waits_for(Params p) {
  auto& shared = shared_storage<BoxStorage>();
  begin_box(p, shared);
  p.y[threadIdx.x] = 1;
  if (!kBug) ptx::mbarrier_wait(shared.arrived, 0);
}

template <bool kBug>
__global__ void box_misplaced(Params p) {
  auto& shared = shared_storage<BoxStorage>();
  begin_box(p, shared);
  p.y[threadIdx.x] = 1;
  ptx::mbarrier_wait(shared.arrived, 0);
  if (kBug && threadIdx.x == 0) {
    ptx::copy_box(&shared.rows[1], rows_of(p), 0, 0, 0, shared.arrived);
  }
}

template <bool kBug>
__global__ void mbarrier_used_before_it_is_ready(Params p) {
  auto& shared = shared_storage<BoxStorage>();
  if (threadIdx.x == 0) ptx::mbarrier_init(shared.done, 256);
  if (!kBug) __syncthreads();
  ptx::mbarrier_arrive(shared.done);
  p.y[threadIdx.x] = 1;
}

template <bool kBug>
__global__ void mbarrier_of_too_few(Params p) {
  auto& shared = shared_storage<BoxStorage>();
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(shared.arrived, 1);
    ptx::mbarrier_arrive_and_expect(shared.arrived, 16);
    if (kBug) ptx::mbarrier_arrive(shared.arrived);
  }
  p.y[threadIdx.x] = 1;
}

}  // namespace
}  // namespace flexvar::emulation
