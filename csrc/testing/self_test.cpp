// Kernels without a mistake that use all that the emulation offers:
// tests/emulated/test_cuda_on_cpu.py compares them with numpy.
#include "common/ptx.cuh"
#include "testing/arrays.h"

namespace flexvar::emulation {
namespace {

// --- A small GEMM: C = A B^T, with A [M, K], B [N, K] ------------------------------------------

constexpr int kTile = 32;                 // of M and N a block
constexpr int kDepth = 32;                // of K a stage
constexpr int kRowElements = kDepth + 8;  // rows in shared memory, padded

template <class T>
struct GemmStorage {
  alignas(16) T a[2][kTile][kRowElements];
  alignas(16) T b[2][kTile][kRowElements];
};

template <class T>
struct GemmParams {
  const T* a;
  const T* b;
  float* c;
  int m, n, k;
  bool by_shuffles;  // multiply without the instruction
};

// Four warps, each 16 x 16 of C; a double buffer filled by cp.async.
template <class T>
__global__ void __launch_bounds__(128) gemm_kernel(GemmParams<T> params) {
  auto& shared = shared_storage<GemmStorage<T>>();
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int row0 = static_cast<int>(blockIdx.y) * kTile,
            column0 = static_cast<int>(blockIdx.x) * kTile;
  const auto fetch = [&](int stage) {
    constexpr int kChunk = 16 / sizeof(T);
    for (int i = thread; i < kTile * kDepth / kChunk; i += 128) {
      const int row = i / (kDepth / kChunk), k = i % (kDepth / kChunk) * kChunk;
      const int from = stage * kDepth + k;
      const bool in_k = from < params.k;
      ptx::cp_async<16>(&shared.a[stage % 2][row][k], params.a + (row0 + row) * params.k + from,
                        in_k && row0 + row < params.m);
      ptx::cp_async<16>(&shared.b[stage % 2][row][k], params.b + (column0 + row) * params.k + from,
                        in_k && column0 + row < params.n);
    }
    ptx::cp_async_commit();
  };
  float c[2][4] = {};
  const int stages = (params.k + kDepth - 1) / kDepth;
  const int row = warp / 2 * 16, column = warp % 2 * 16;
  fetch(0);
  for (int stage = 0; stage < stages; ++stage) {
    if (stage + 1 < stages) {
      fetch(stage + 1);
      ptx::cp_async_wait<1>();
    } else {
      ptx::cp_async_wait<0>();
    }
    __syncthreads();
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t a[4], b[4];
      ptx::ldmatrix_x4(a, &shared.a[stage % 2][row + lane % 16][k + lane / 16 * 8]);
      // Two 8-column tiles: their k halves in turn.
      ptx::ldmatrix_x4(
          b, &shared.b[stage % 2][column + lane / 16 * 8 + lane % 8][k + lane / 8 % 2 * 8]);
      for (int tile = 0; tile < 2; ++tile) {
        const uint32_t pair[2] = {b[2 * tile], b[2 * tile + 1]};
        if (params.by_shuffles) {
          ptx::mma_by_shuffles<2>(c[tile], a, pair, [](uint32_t bits, int i) {
            return to_float(std::bit_cast<T>(static_cast<uint16_t>(bits >> (16 * i))));
          });
        } else {
          ptx::mma_m16n8k16<T>(c[tile], a, pair);
        }
      }
    }
    __syncthreads();
  }
  for (int tile = 0; tile < 2; ++tile) {
    for (int i = 0; i < 4; ++i) {
      const int m = row0 + row + lane / 4 + i / 2 * 8;
      const int n = column0 + column + tile * 8 + lane % 4 * 2 + i % 2;
      if (m < params.m && n < params.n) params.c[m * params.n + n] = c[tile][i];
    }
  }
}

template <class T>
py::array gemm(const py::array& a, const py::array& b, bool by_shuffles,
               const EmulationOptions& options) {
  DeviceMemory memory(options);
  const auto m = a.shape(0), n = b.shape(0), k = a.shape(1);
  auto* c = memory.output<float>("c", {m, n});
  const GemmParams<T> params{
      memory.input<T>("a", a), memory.input<T>("b", b), c,          static_cast<int>(m),
      static_cast<int>(n),     static_cast<int>(k),     by_shuffles};
  const auto blocks = [](py::ssize_t size) {
    return static_cast<unsigned>((size + kTile - 1) / kTile);
  };
  memory.launch(gemm_kernel<T>, {{blocks(n), blocks(m), 1}, {128, 1, 1}, 0}, params);
  return memory.fetch(c);
}

// One tf32 product, 16 x 8 by 8 x 8.
struct Tf32Params {
  const float* a;
  const float* b;
  float* c;
};
__global__ void tf32_kernel(Tf32Params params) {
  const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) {
    a[i] = ptx::float_to_tf32(params.a[(g + i % 2 * 8) * 8 + t + i / 2 * 4]);
  }
  for (int i = 0; i < 2; ++i) b[i] = ptx::float_to_tf32(params.b[(t + i * 4) * 8 + g]);
  float c[4] = {}, again[4] = {};
  ptx::mma_m16n8k8_tf32(c, a, b);
  ptx::mma_by_shuffles<1>(again, a, b, [](uint32_t bits, int) { return __uint_as_float(bits); });
  for (int i = 0; i < 4; ++i) {
    const int at = (g + i / 2 * 8) * 8 + 2 * t + i % 2;
    params.c[at] = c[i];
    params.c[128 + at] = again[i];
  }
}

// --- ldmatrix: what every lane receives --------------------------------------------------------

struct LdmatrixStorage {
  alignas(16) uint16_t rows[32][8];
};
__global__ void ldmatrix_kernel(const uint16_t* rows, uint16_t* plain, uint16_t* transposed) {
  auto& shared = shared_storage<LdmatrixStorage>();
  const auto lane = threadIdx.x;
  for (int i = 0; i < 8; ++i) shared.rows[lane][i] = rows[lane * 8 + i];
  __syncwarp();
  uint32_t r[4];
  ptx::ldmatrix_x4(r, shared.rows[lane]);
  for (int i = 0; i < 8; ++i)
    plain[lane * 8 + i] = static_cast<uint16_t>(r[i / 2] >> (16 * (i % 2)));
  ptx::ldmatrix_x4_trans(r, shared.rows[lane]);
  for (int i = 0; i < 8; ++i) {
    transposed[lane * 8 + i] = static_cast<uint16_t>(r[i / 2] >> (16 * (i % 2)));
  }
}

// --- Warp operations, one row of results each --------------------------------------------------

__global__ void warp_kernel(const int* x, int* y) {
  const unsigned all = 0xffffffffu;
  const auto lane = static_cast<int>(threadIdx.x % 32);
  const int value = x[threadIdx.x];
  int* out = y + threadIdx.x;
  const auto next = [&](int result) {
    *out = result;
    out += blockDim.x;
  };
  next(__shfl_sync(all, value, 5));
  next(__shfl_sync(all, value, lane + 1, 8));
  next(__shfl_up_sync(all, value, 3));
  next(__shfl_down_sync(all, value, 2, 16));
  next(__shfl_xor_sync(all, value, 9));
  next(static_cast<int>(__ballot_sync(all, value > 0)));
  next(__all_sync(all, value > -100));
  next(__any_sync(all, value > 100));
  next(static_cast<int>(__match_any_sync(all, value)));
  next(__reduce_add_sync(all, value));
  next(__reduce_min_sync(all, value));
  next(__reduce_max_sync(all, value));
  next(static_cast<int>(__reduce_xor_sync(all, static_cast<unsigned>(value))));
  next(__syncthreads_count(value > 0));
  next(__syncthreads_and(value > 0));
  next(__syncthreads_or(value > 0));
}

// --- One warp fills a ring of buffers, another empties it: named barriers ----------------------

struct RingStorage {
  int ring[2][32];
};
__global__ void producer_consumer_kernel(const int* x, int* y, int rounds) {
  auto& shared = shared_storage<RingStorage>();
  const int lane = static_cast<int>(threadIdx.x % 32);
  // Barriers 1 and 2: buffer filled; 3 and 4: buffer free.
  if (threadIdx.x < 32) {
    for (int round = 0; round < rounds; ++round) {
      if (round >= 2) ptx::barrier_sync(3 + round % 2, 64);
      shared.ring[round % 2][lane] = x[round * 32 + lane];
      ptx::barrier_arrive(1 + round % 2, 64);
    }
  } else {
    int total = 0;
    for (int round = 0; round < rounds; ++round) {
      ptx::barrier_sync(1 + round % 2, 64);
      total += shared.ring[round % 2][31 - lane];
      if (round + 2 < rounds) ptx::barrier_arrive(3 + round % 2, 64);
    }
    y[lane] = total;
  }
}

// --- The last block adds what all blocks left, whatever its number -----------------------------

struct SumStorage {
  float partial[8];
  bool is_last;
};
__global__ void sum_kernel(const float* x, float* partial, float* total, unsigned* tickets, int n) {
  auto& shared = shared_storage<SumStorage>();
  const auto thread = static_cast<int>(threadIdx.x);
  float sum = 0;
  for (int i = static_cast<int>(blockIdx.x) * 256 + thread; i < n;
       i += static_cast<int>(gridDim.x) * 256) {
    sum += x[i];
  }
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (thread % 32 == 0) shared.partial[thread / 32] = sum;
  __syncthreads();
  if (thread == 0) {
    for (int warp = 1; warp < 8; ++warp) sum += shared.partial[warp];
    partial[blockIdx.x] = sum;
    __threadfence();
    shared.is_last = atomicAdd(tickets, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!shared.is_last) return;
  __threadfence();
  if (thread != 0) return;
  sum = 0;
  for (unsigned block = 0; block < gridDim.x; ++block) sum += partial[block];
  *total = sum;
}

template <class T>
py::array round_trip(const py::array_t<float>& x) {
  py::array_t<uint16_t> bits(x.size());
  for (py::ssize_t i = 0; i < x.size(); ++i) bits.mutable_at(i) = from_float<T>(x.at(i)).bits;
  return bits;
}
template <class T>
py::array decode(const py::array_t<uint16_t>& bits) {
  py::array_t<float> x(bits.size());
  for (py::ssize_t i = 0; i < x.size(); ++i)
    x.mutable_at(i) = to_float(std::bit_cast<T>(bits.at(i)));
  return x;
}
template <class T>
py::array multiply_add(const py::array_t<uint16_t>& a, const py::array_t<uint16_t>& b,
                       const py::array_t<uint16_t>& c) {
  py::array_t<uint16_t> result(a.size());
  for (py::ssize_t i = 0; i < a.size(); ++i) {
    result.mutable_at(i) =
        __hfma(std::bit_cast<T>(a.at(i)), std::bit_cast<T>(b.at(i)), std::bit_cast<T>(c.at(i)))
            .bits;
  }
  return result;
}

}  // namespace

EMULATED_BINDINGS(self_test, module) {
  module.def("gemm_half", &gemm<__half>);
  module.def("gemm_bfloat16", &gemm<__nv_bfloat16>);
  module.def("tf32", [](const py::array& a, const py::array& b, const EmulationOptions& options) {
    DeviceMemory memory(options);
    auto* c = memory.output<float>("c", {2, 16, 8});
    const Tf32Params params{memory.input<float>("a", a), memory.input<float>("b", b), c};
    memory.launch(tf32_kernel, {{1, 1, 1}, {32, 1, 1}, 0}, params);
    return memory.fetch(c);
  });
  module.def("ldmatrix", [](const py::array& rows, const EmulationOptions& options) {
    DeviceMemory memory(options);
    auto* plain = memory.output<uint16_t>("plain", {32, 4, 2});
    auto* transposed = memory.output<uint16_t>("transposed", {32, 4, 2});
    memory.launch(ldmatrix_kernel, {{1, 1, 1}, {32, 1, 1}, 0}, memory.input<uint16_t>("rows", rows),
                  plain, transposed);
    return py::make_tuple(memory.fetch(plain), memory.fetch(transposed));
  });
  module.def("warp_operations", [](const py::array& x, const EmulationOptions& options) {
    DeviceMemory memory(options);
    auto* y = memory.output<int>("y", {16, x.size()});
    memory.launch(warp_kernel, {{1, 1, 1}, {static_cast<unsigned>(x.size()), 1, 1}, 0},
                  memory.input<int>("x", x), y);
    return memory.fetch(y);
  });
  module.def("producer_consumer", [](const py::array& x, const EmulationOptions& options) {
    DeviceMemory memory(options);
    auto* y = memory.output<int>("y", {32});
    memory.launch(producer_consumer_kernel, {{1, 1, 1}, {64, 1, 1}, 0}, memory.input<int>("x", x),
                  y, static_cast<int>(x.shape(0)));
    return memory.fetch(y);
  });
  module.def("sum", [](const py::array& x, unsigned blocks, const EmulationOptions& options) {
    DeviceMemory memory(options);
    py::array_t<unsigned> zero(1);
    zero.mutable_at(0) = 0;
    auto* partial = memory.output<float>("partial", {blocks});
    auto* total = memory.output<float>("total", {1});
    memory.launch(sum_kernel, {{blocks, 1, 1}, {256, 1, 1}, 0}, memory.input<float>("x", x),
                  partial, total, memory.input_output<unsigned>("tickets", zero),
                  static_cast<int>(x.size()));
    return memory.fetch(total);
  });
  module.def("encode_half", &round_trip<__half>);
  module.def("encode_bfloat16", &round_trip<__nv_bfloat16>);
  module.def("decode_half", &decode<__half>);
  module.def("decode_bfloat16", &decode<__nv_bfloat16>);
  module.def("fma_half", &multiply_add<__half>);
  module.def("fma_bfloat16", &multiply_add<__nv_bfloat16>);
}

}  // namespace flexvar::emulation
