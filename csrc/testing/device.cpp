#include "testing/device.h"

#include <c10/core/CPUAllocator.h>

#include <cstring>
#include <map>
#include <mutex>

#include "testing/arrays.h"

namespace flexvar::emulation {
namespace {

constexpr size_t kSharedWithoutLeave = 48 * 1024;

Options device;
bool is_open = false;
int opened = 0, questions = 0;
std::map<const void*, size_t> allowed_shared;  // by kernel
void* current_stream = nullptr;
uintptr_t scopes = 0;

// torch may allocate from several threads.
std::mutex mutex;
int tensors;

struct Allocation {
  void* data;
  uint64_t generation;
};

void release(void* context) {
  const std::lock_guard lock(mutex);
  const auto* allocation = static_cast<Allocation*>(context);
  if (allocation->generation == generation()) free_buffer(allocation->data);
  delete allocation;
}

class ArenaAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device cpu(c10::DeviceType::CPU);
    if (bytes == 0) return {nullptr, cpu};
    const std::lock_guard lock(mutex);
    const std::string name = "tensor " + std::to_string(++tensors);
    void* data = emulation::allocate(name, bytes, unwritten, 0, device.poison);
    return {data, new Allocation{data, generation()}, release, cpu};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};
ArenaAllocator arena_allocator;

// Results stay readable after the device is closed, until the next one opens.
class Device {
 public:
  explicit Device(const EmulationOptions& options) : options_(options) {}

  void open() {
    if (is_open) throw KernelError("Device: one is open already");
    free_all();
    allowed_shared.clear();
    tensors = 0;
    ++opened;
    device = options_;
    host_allocator_ = c10::GetCPUAllocator();
    c10::SetCPUAllocator(&arena_allocator);
    is_open = true;
  }
  void close() {
    c10::SetCPUAllocator(host_allocator_);
    is_open = false;
  }

 private:
  EmulationOptions options_;
  c10::Allocator* host_allocator_ = nullptr;
};

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

// Of all bytes of a buffer only the tensor's elements may be touched.
void restrict_to(uintptr_t buffer, uintptr_t data, const std::string& name,
                 const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                 size_t element, bool writable) {
  const ByteState state = writable ? written_by_host : read_only;
  set_buffer(pointer(buffer), name, no_buffer);
  std::vector<int64_t> index(sizes.size(), 0);
  for (const int64_t size : sizes) {
    if (size == 0) return;
  }
  for (;;) {
    int64_t offset = 0;
    for (size_t i = 0; i < index.size(); ++i) offset += index[i] * strides[i];
    set_state(pointer(data + static_cast<uintptr_t>(offset) * element), element, state);
    size_t axis = index.size();
    while (axis > 0 && ++index[axis - 1] == sizes[axis - 1]) index[--axis] = 0;
    if (axis == 0) return;
  }
}

}  // namespace

const Options& device_options() {
  if (!is_open) throw KernelError("flexvar_emulated: ops run within `with _emulated.Device(...)`");
  return device;
}

int device_ordinal() { return opened; }

DeviceScope::DeviceScope() : stream_(pointer(++scopes)) {
  device_options();
  current_stream = stream_;
}
DeviceScope::~DeviceScope() { current_stream = nullptr; }

void check_stream(const char* op, const void* stream) {
  if (current_stream == nullptr || stream != current_stream) {
    throw KernelError(std::string(op) + ": not on the current stream of the device");
  }
}

bool allow_dynamic_shared(const void* kernel, size_t bytes) {
  if (bytes > device_options().shared_memory) return false;
  allowed_shared[kernel] = bytes;
  return true;
}

size_t allowed_dynamic_shared(const void* kernel) {
  const auto found = allowed_shared.find(kernel);
  return found == allowed_shared.end() ? kSharedWithoutLeave : found->second;
}

void count_question() { ++questions; }

Options begin_device_launch(const char* op, const void* kernel, size_t shared_bytes) {
  Options options = device_options();
  const size_t allowed = allowed_dynamic_shared(kernel);
  if (shared_bytes > allowed) {
    throw KernelError(std::string(op) + ": launch: " + std::to_string(shared_bytes) +
                      " bytes of dynamic shared memory, the kernel may have " +
                      std::to_string(allowed) + " (allow_shared_memory)");
  }
  // Without leave static and dynamic shared memory have this much together.
  if (!allowed_shared.contains(kernel)) options.shared_memory = kSharedWithoutLeave;
  adopt_host_writes(options.poison);
  return options;
}

void fill_from_host(void* data, int value, size_t bytes) {
  std::memset(data, value, bytes);
  set_state(data, bytes, written_by_host);
}

EMULATED_BINDINGS(device, module) {
  py::class_<Device>(module, "Device")
      .def(py::init<const EmulationOptions&>())
      .def("__enter__", &Device::open)
      .def("__exit__", [](Device& device, const py::args&) { device.close(); });
  module.def("restrict_to", &restrict_to);
  module.def("questions", [] { return questions; });
  module.def("count_unwritten", [](uintptr_t data, size_t bytes) {
    adopt_host_writes(device.poison);
    return count_unwritten(pointer(data), bytes);
  });
}

}  // namespace flexvar::emulation
