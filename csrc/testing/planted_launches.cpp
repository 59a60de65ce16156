// Launches with one mistake each, as a launcher would make them;
// tests/emulated/test_planted_bugs.py.
#include "testing/arrays.h"
#include "testing/cuda_runtime_on_cpu.h"

namespace flexvar::emulation {
namespace {

struct LargeStorage {
  float values[10 * 1024];
};

__global__ void nothing_kernel() {}
__global__ void static_and_dynamic_kernel() {
  auto& storage = shared_storage<LargeStorage>();
  storage.values[threadIdx.x] = 0;
  dynamic_shared<float>()[threadIdx.x] = 0;
}

void launch(const dim3& grid, const dim3& threads, size_t shared_bytes) {
  const DeviceScope scope;
  launch_on_device("planted", scope.stream(), false, nothing_kernel, grid, threads, shared_bytes);
}

void planted_launch(const std::string& name) {
  if (name == "no_blocks") return launch(dim3(0), dim3(32), 0);
  if (name == "too_many_blocks_in_y") return launch(dim3(1, 65536), dim3(32), 0);
  if (name == "too_many_blocks_in_z") return launch(dim3(1, 1, 65536), dim3(32), 0);
  if (name == "too_many_threads") return launch(dim3(1), dim3(1025), 0);
  if (name == "shared_memory_without_leave") return launch(dim3(1), dim3(32), 48 * 1024 + 1);
  if (name == "more_shared_memory_than_allowed") {
    cudaFuncSetAttribute(nothing_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 60 * 1024);
    return launch(dim3(1), dim3(32), 60 * 1024 + 1);
  }
  if (name == "static_and_dynamic_without_leave") {
    const DeviceScope scope;
    return launch_on_device("planted", scope.stream(), false, static_and_dynamic_kernel, dim3(1),
                            dim3(32), 9 * 1024);
  }
  if (name == "default_stream") {
    const DeviceScope scope;
    return launch_on_device("planted", nullptr, false, nothing_kernel, dim3(1), dim3(32), 0);
  }
  throw std::invalid_argument("no planted launch '" + name + "'");
}

}  // namespace

EMULATED_BINDINGS(planted_launches, module) {
  module.def("planted_launch", &planted_launch);
  // Whether a device gives a kernel so much dynamic shared memory.
  module.def("allow_shared_memory", [](int bytes) {
    return cudaFuncSetAttribute(nothing_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                bytes) == cudaSuccess;
  });
}

}  // namespace flexvar::emulation
