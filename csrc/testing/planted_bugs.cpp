// Kernels with one mistake each, and their right twins: tests/emulated/test_planted_bugs.py shows
// that the emulation catches the first and lets the second pass.
#include <map>

#include "common/ptx.cuh"
#include "testing/arrays.h"
#include "testing/planted_boxes.h"

namespace flexvar::emulation {
namespace {

struct Tile {
  alignas(16) float values[256];
};

// --- Bounds ------------------------------------------------------------------------------------

template <bool kBug>
__global__ void read_past_end(Params p) {
  p.y[threadIdx.x] = p.x[threadIdx.x + (kBug ? 1 : 0)];
}

template <bool kBug>
__global__ void write_before_start(Params p) {
  p.y[static_cast<int>(threadIdx.x) - (kBug ? 1 : 0)] = 1;
}

template <bool kBug>
__global__ void write_to_input(Params p) {
  p.y[threadIdx.x] = 1;
  if (kBug) const_cast<float*>(p.x)[threadIdx.x] = 1;
}

template <bool kBug>
__global__ void index_outside_array(Params p) {
  auto& tile = shared_storage<Tile>().values;
  tile[threadIdx.x + (kBug ? 1 : 0)] = 1;
  p.y[threadIdx.x] = tile[threadIdx.x + (kBug ? 1 : 0)];
}

template <bool kBug>
__global__ void shared_pointer_past_end(Params p) {
  float* tile = shared_storage<Tile>().values;
  tile[threadIdx.x + (kBug ? 1 : 0)] = 1;
  p.y[threadIdx.x] = 1;
}

template <bool kBug>
__global__ void dynamic_shared_past_end(Params p) {
  float* tile = dynamic_shared<float>();
  tile[threadIdx.x + (kBug ? 1 : 0)] = 1;
  p.y[threadIdx.x] = 1;
}

template <bool kBug>
__global__ void pointer_to_nowhere(Params p) {
  const float* pointer = kBug ? reinterpret_cast<const float*>(static_cast<uintptr_t>(p.n)) : p.x;
  p.y[threadIdx.x] = pointer[threadIdx.x];
}

template <bool kBug>
__global__ void stack_of_another_thread(Params p) {
  auto& pointer = shared_storage<float*>();
  float own = static_cast<float>(threadIdx.x);
  if (threadIdx.x == 0) pointer = &own;
  __syncthreads();
  if (threadIdx.x == (kBug ? 1 : 0)) *pointer = 7;
  p.y[threadIdx.x] = own;
}

template <bool kBug>
__global__ void misaligned_vector(Params p) {
  if (threadIdx.x > 1) {
    p.y[threadIdx.x] = 0;
    return;
  }
  const auto& four = *reinterpret_cast<const float4*>(p.x + 4 * threadIdx.x + (kBug ? 1 : 0));
  p.y[threadIdx.x] = four.x + four.w;
}

// --- Initialisation ----------------------------------------------------------------------------

template <bool kBug>
__global__ void shared_not_written(Params p) {
  auto& tile = shared_storage<Tile>().values;
  if (threadIdx.x < (kBug ? 255 : 256)) tile[threadIdx.x] = p.x[threadIdx.x];
  p.y[threadIdx.x] = tile[threadIdx.x];
}

template <bool kBug>
__global__ void accumulate_into_output(Params p) {
  if (!kBug) p.y[threadIdx.x] = 0;
  p.y[threadIdx.x] += p.x[threadIdx.x];
}

template <bool kBug>
__global__ void output_not_complete(Params p) {
  if (threadIdx.x < (kBug ? 255 : 256)) p.y[threadIdx.x] = 1;
}

// --- Races -------------------------------------------------------------------------------------

template <bool kBug>
__global__ void read_before_barrier(Params p) {
  auto& tile = shared_storage<Tile>().values;
  tile[threadIdx.x] = p.x[threadIdx.x];
  if (!kBug) __syncthreads();
  p.y[threadIdx.x] = tile[threadIdx.x ^ 32];
}

template <bool kBug>
__global__ void overwrite_before_barrier(Params p) {
  auto& tile = shared_storage<Tile>().values;
  float total = 0;
  for (int round = 0; round < 2; ++round) {
    tile[threadIdx.x] = p.x[threadIdx.x] + static_cast<float>(round);
    __syncthreads();
    total += tile[255 - threadIdx.x];
    if (!kBug) __syncthreads();
  }
  p.y[threadIdx.x] = total;
}

template <bool kBug>
__global__ void two_writers(Params p) {
  auto& tile = shared_storage<Tile>().values;
  if (threadIdx.x % 64 == 0 && (kBug || threadIdx.x == 0)) tile[0] = 1;
  __syncthreads();
  p.y[threadIdx.x] = tile[0];
}

template <bool kBug>
__global__ void lanes_without_syncwarp(Params p) {
  auto& tile = shared_storage<Tile>().values;
  tile[threadIdx.x] = p.x[threadIdx.x];
  if (!kBug) __syncwarp();
  p.y[threadIdx.x] = tile[threadIdx.x ^ 1];
}

template <bool kBug>
__global__ void syncwarp_for_two_warps(Params p) {
  auto& tile = shared_storage<Tile>().values;
  tile[threadIdx.x] = p.x[threadIdx.x];
  __syncwarp();
  p.y[threadIdx.x] = tile[threadIdx.x ^ (kBug ? 32 : 16)];
}

// A shuffle makes lanes wait for each other and still orders no memory.
template <bool kBug>
__global__ void shuffle_as_barrier(Params p) {
  auto& tile = shared_storage<Tile>().values;
  tile[threadIdx.x] = p.x[threadIdx.x];
  const int other = __shfl_xor_sync(0xffffffffu, static_cast<int>(threadIdx.x), 1);
  if (!kBug) __syncwarp();
  p.y[threadIdx.x] = tile[other];
}

template <bool kBug>
__global__ void blocks_share_an_output(Params p) {
  if (kBug || blockIdx.x == 0) p.y[threadIdx.x] = 1;
}

// The last block sums what all blocks left; without the fence its view may be stale.
template <bool kBug>
__global__ void last_block_without_fence(Params p) {
  auto& is_last = shared_storage<Tile>().values[0];
  if (threadIdx.x == 0) {
    p.y[blockIdx.x] = p.x[blockIdx.x];
    if (!kBug) __threadfence();
    is_last = static_cast<float>(atomicAdd(p.counter, 1u) == gridDim.x - 1);
  }
  __syncthreads();
  if (is_last == 0) return;
  __threadfence();
  if (threadIdx.x >= gridDim.x) p.y[threadIdx.x] = p.y[threadIdx.x % gridDim.x];
}

template <bool kBug>
__global__ void atomic_and_plain(Params p) {
  if (threadIdx.x != 7) atomicAdd(p.counter, 1u);
  if (!kBug) __syncthreads();
  if (threadIdx.x == 7) *p.counter = 0;
  p.y[threadIdx.x] = 1;
}

// --- Barriers and warps ------------------------------------------------------------------------

template <bool kBug>
__global__ void barrier_in_branch(Params p) {
  if (!kBug || threadIdx.x != 37) __syncthreads();
  p.y[threadIdx.x] = 1;
  if (kBug) __syncthreads();
}

template <bool kBug>
__global__ void leaves_before_barrier(Params p) {
  p.y[threadIdx.x] = 1;
  if (kBug && threadIdx.x == 255) return;
  __syncthreads();
}

template <bool kBug>
__global__ void two_different_barriers(Params p) {
  if (kBug && threadIdx.x < 128) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  p.y[threadIdx.x] = 1;
}

template <bool kBug>
__global__ void named_barrier_of_wrong_size(Params p) {
  if (threadIdx.x < 64) ptx::barrier_sync(1, kBug ? 96 : 64);
  p.y[threadIdx.x] = 1;
}

template <bool kBug>
__global__ void shuffle_in_branch(Params p) {
  float value = p.x[threadIdx.x];
  if (!kBug || threadIdx.x % 32 < 16) value += __shfl_xor_sync(0xffffffffu, value, 1);
  p.y[threadIdx.x] = value;
}

template <bool kBug>
__global__ void shuffle_on_two_lines(Params p) {
  float value = p.x[threadIdx.x];
  if (kBug && threadIdx.x % 32 < 16) {
    value += __shfl_xor_sync(0xffffffffu, value, 1);
  } else {
    value -= __shfl_xor_sync(0xffffffffu, value, 1);
  }
  p.y[threadIdx.x] = value;
}

template <bool kBug>
__global__ void shuffle_from_absent_lane(Params p) {
  float value = p.x[threadIdx.x];
  if (threadIdx.x % 32 < 16) value = __shfl_sync(0xffffu, value, kBug ? 16 : 15);
  p.y[threadIdx.x] = value;
}

template <bool kBug>
__global__ void mask_without_caller(Params p) {
  p.y[threadIdx.x] = static_cast<float>(__any_sync(kBug ? 0x7fffffffu : 0xffffffffu, 1));
}

// --- Asynchronous copies and matrices ----------------------------------------------------------

template <bool kBug>
__global__ void copy_not_waited_for(Params p) {
  auto& tile = shared_storage<Tile>().values;
  ptx::cp_async<4>(&tile[threadIdx.x], &p.x[threadIdx.x]);
  ptx::cp_async_commit();
  if (!kBug) ptx::cp_async_wait<0>();
  p.y[threadIdx.x] = tile[threadIdx.x];
}

template <bool kBug>
__global__ void copy_without_barrier(Params p) {
  auto& tile = shared_storage<Tile>().values;
  ptx::cp_async<4>(&tile[threadIdx.x], &p.x[threadIdx.x]);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  if (!kBug) __syncthreads();
  p.y[threadIdx.x] = tile[255 - threadIdx.x];
}

template <bool kBug>
__global__ void copy_waits_for_too_few(Params p) {
  auto& tile = shared_storage<Tile>().values;
  if (threadIdx.x < 128) {
    for (int part = 0; part < 2; ++part) {
      ptx::cp_async<4>(&tile[threadIdx.x + 128 * part], &p.x[threadIdx.x + 128 * part]);
      ptx::cp_async_commit();
    }
    ptx::cp_async_wait<kBug ? 1 : 0>();
  }
  __syncthreads();
  p.y[threadIdx.x] = tile[threadIdx.x];
}

template <bool kBug>
__global__ void copy_onto_what_is_read(Params p) {
  auto& tile = shared_storage<Tile>().values;
  tile[threadIdx.x] = 0;
  __syncthreads();
  p.y[threadIdx.x] = tile[255 - threadIdx.x];
  if (!kBug) __syncthreads();
  ptx::cp_async<4>(&tile[threadIdx.x], &p.x[threadIdx.x]);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
}

template <bool kBug>
__global__ void copy_past_end(Params p) {
  auto& tile = shared_storage<Tile>().values;
  const int first = static_cast<int>(threadIdx.x) * 4;
  p.y[threadIdx.x] = 1;
  // The last 16 threads lie beyond the rows that there are.
  if (threadIdx.x < 64) ptx::cp_async<16>(&tile[first], &p.x[first + 64], kBug || first + 64 < p.n);
}

template <bool kBug>
__global__ void copy_misaligned(Params p) {
  auto& tile = shared_storage<Tile>().values;
  p.y[threadIdx.x] = 1;
  if (threadIdx.x == 0) ptx::cp_async<16>(&tile[4], &p.x[kBug ? 1 : 4]);
}

template <bool kBug>
__global__ void ldmatrix_before_barrier(Params p) {
  auto& tile = shared_storage<Tile>().values;
  tile[threadIdx.x] = p.x[threadIdx.x];
  if (!kBug) __syncthreads();
  uint32_t fragment[4];
  ptx::ldmatrix_x4(fragment, &tile[4 * (threadIdx.x % 32)]);
  p.y[threadIdx.x] = static_cast<float>(fragment[0] & 1);
}

template <bool kBug>
__global__ void ldmatrix_misaligned(Params p) {
  auto& tile = shared_storage<Tile>().values;
  tile[threadIdx.x] = p.x[threadIdx.x];
  __syncthreads();
  uint32_t fragment[2];
  ptx::ldmatrix_x2(fragment, &tile[4 * (threadIdx.x % 32) + (kBug ? 2 : 0)]);
  p.y[threadIdx.x] = static_cast<float>(fragment[0] & 1);
}

template <bool kBug>
__global__ void mma_in_branch(Params p) {
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  if (!kBug || threadIdx.x != 40) ptx::mma_m16n8k16<__half>(d, a, b);
  p.y[threadIdx.x] = d[0];
}

// --- Arithmetic and launches -------------------------------------------------------------------

template <bool kBug>
__global__ void integer_overflow(Params p) {
  const int rows = p.n << 16;
  p.y[threadIdx.x] =
      kBug ? static_cast<float>(rows * p.n) : static_cast<float>(static_cast<int64_t>(rows) * p.n);
}

template <bool kBug>
__global__ void division_by_zero(Params p) {
  const int divisor = p.n - (kBug ? 256 : 255);
  p.y[threadIdx.x] = static_cast<float>(static_cast<int>(threadIdx.x) / divisor);
}

template <bool kBug>
__global__ void shift_too_far(Params p) {
  p.y[threadIdx.x] = static_cast<float>(1u << (p.n / (kBug ? 8 : 16)));
}

template <bool kBug>
__global__ void too_much_shared_memory(Params p) {
  struct Large {
    float values[kBug ? 12 * 1024 : 1024];
  };
  auto& large = shared_storage<Large>();
  large.values[threadIdx.x] = p.x[threadIdx.x];
  p.y[threadIdx.x] = large.values[threadIdx.x];
}

// The sum of floats depends on the order in which atomics come.
template <bool kBug>
__global__ void order_of_atomics(Params p) {
  p.y[threadIdx.x] = 0;
  __syncthreads();
  if (kBug) {
    atomicAdd(&p.y[0], p.x[threadIdx.x]);
  } else if (threadIdx.x == 0) {
    for (int i = 0; i < 256; ++i) p.y[0] += p.x[i];
  }
}

// Launched such that it may overlap with `copy`.
template <bool kBug>
__global__ void overlap_without_wait(Params p) {
  if (!kBug) ptx::griddepcontrol_wait();
  p.y[threadIdx.x] += 1;
}
__global__ void copy(Params p) { p.y[threadIdx.x] = p.x[threadIdx.x]; }

struct Planted {
  void (*bug)(Params);
  void (*right)(Params);
  unsigned blocks = 1;
  size_t dynamic_shared = 0;
  void (*overlapped)(Params) = nullptr;  // launched before
};

#define PLANTED(name)                    \
  {                                      \
    #name, { &name<true>, &name<false> } \
  }
const std::map<std::string, Planted> planted = {
    PLANTED(read_past_end),
    PLANTED(write_before_start),
    PLANTED(write_to_input),
    PLANTED(index_outside_array),
    PLANTED(shared_pointer_past_end),
    {"dynamic_shared_past_end",
     {&dynamic_shared_past_end<true>, &dynamic_shared_past_end<false>, 1, 1024}},
    PLANTED(pointer_to_nowhere),
    PLANTED(stack_of_another_thread),
    PLANTED(misaligned_vector),
    PLANTED(shared_not_written),
    PLANTED(accumulate_into_output),
    PLANTED(output_not_complete),
    PLANTED(read_before_barrier),
    PLANTED(overwrite_before_barrier),
    PLANTED(two_writers),
    PLANTED(lanes_without_syncwarp),
    PLANTED(syncwarp_for_two_warps),
    PLANTED(shuffle_as_barrier),
    {"blocks_share_an_output", {&blocks_share_an_output<true>, &blocks_share_an_output<false>, 2}},
    {"last_block_without_fence",
     {&last_block_without_fence<true>, &last_block_without_fence<false>, 5}},
    PLANTED(atomic_and_plain),
    PLANTED(barrier_in_branch),
    PLANTED(leaves_before_barrier),
    PLANTED(two_different_barriers),
    PLANTED(named_barrier_of_wrong_size),
    PLANTED(shuffle_in_branch),
    PLANTED(shuffle_on_two_lines),
    PLANTED(shuffle_from_absent_lane),
    PLANTED(mask_without_caller),
    PLANTED(copy_not_waited_for),
    PLANTED(copy_without_barrier),
    PLANTED(copy_waits_for_too_few),
    PLANTED(copy_onto_what_is_read),
    PLANTED(copy_past_end),
    PLANTED(copy_misaligned),
    PLANTED(box_not_waited_for),
    PLANTED(box_waited_for_by_one),
    PLANTED(box_waited_for_in_wrong_phase),
    PLANTED(box_onto_what_is_read),
    PLANTED(box_read_by_other_lanes),
    PLANTED(box_not_expected),
    PLANTED(box_expected_in_vain),
    PLANTED(box_nobody_waits_for),
    PLANTED(box_misplaced),
    PLANTED(mbarrier_used_before_it_is_ready),
    PLANTED(mbarrier_of_too_few),
    PLANTED(ldmatrix_before_barrier),
    PLANTED(ldmatrix_misaligned),
    PLANTED(mma_in_branch),
    PLANTED(integer_overflow),
    PLANTED(division_by_zero),
    PLANTED(shift_too_far),
    {"too_much_shared_memory",
     {&too_much_shared_memory<true>, &too_much_shared_memory<false>, 1, 200 * 1024}},
    {"overlap_without_wait",
     {&overlap_without_wait<true>, &overlap_without_wait<false>, 1, 0, &copy}},
    PLANTED(order_of_atomics),
};

}  // namespace

EMULATED_BINDINGS(planted_bugs, module) {
  // The kernel's output [256], from x [256].
  module.def("planted", [](const std::string& name, bool bug, const py::array& x,
                           const EmulationOptions& options) {
    const Planted& entry = planted.at(name);
    DeviceMemory memory(options);
    auto* y = memory.output<float>("y", {256});
    py::array_t<unsigned> counter(1);
    counter.mutable_at(0) = 0;
    const Params params{memory.input<float>("x", x), y,
                        memory.input_output<unsigned>("counter", counter), 256};
    const bool overlaps = entry.overlapped != nullptr;
    if (overlaps) memory.launch(entry.overlapped, {{1, 1, 1}, {256, 1, 1}, 0}, params);
    memory.launch(bug ? entry.bug : entry.right,
                  {{entry.blocks, 1, 1}, {256, 1, 1}, entry.dynamic_shared, overlaps}, params);
    return memory.fetch(y);
  });
  module.def("planted_names", [] {
    std::vector<std::string> names;
    for (const auto& [name, entry] : planted) names.push_back(name);
    return py::cast(names);
  });
}

}  // namespace flexvar::emulation
