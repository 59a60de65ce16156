// For the bindings: numpy arrays in and out of the emulated device memory, and registration with
// the module.
//
//   EMULATED_BINDINGS(vq_lookup, module) {
//     module.def("vq_lookup", [](const py::array& x, ..., const EmulationOptions& options) {
//       DeviceMemory memory(options);
//       const auto* x_device = memory.input<float>("x", x);
//       auto* y_device = memory.output<int64_t>("y", {n});
//       memory.launch(kernel, {{blocks}, {threads}, shared_bytes}, Params{x_device, y_device, n});
//       return memory.fetch(y_device);
//     });
//   }
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "testing/cuda_on_cpu.h"
#include "testing/memory.h"

namespace flexvar::emulation {

namespace py = pybind11;

struct EmulationOptions : Options {
  size_t misalignment = 0;  // elements by which every buffer misses a multiple of 256 bytes
};

// numpy has no bfloat16: its bits as uint16.
template <class T>
py::dtype numpy_type() {
  if constexpr (std::is_same_v<T, __half>) {
    return py::dtype("float16");
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return py::dtype("uint16");
  } else {
    return py::dtype::of<T>();
  }
}

// All device memory for the launches of one call; freed at the end of the scope. One at a time.
class DeviceMemory {
 public:
  explicit DeviceMemory(const EmulationOptions& options) : options_(options) {
    if (std::exchange(exists_, true)) throw KernelError("DeviceMemory: there is one already");
  }
  ~DeviceMemory() {
    free_all();
    exists_ = false;
  }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  // A contiguous array of T, which kernels may only read.
  template <class T>
  const T* input(const char* name, const py::array& array) {
    return copy_in<T>(name, array, read_only);
  }
  template <class T>
  T* input_output(const char* name, const py::array& array) {
    return copy_in<T>(name, array, written_by_host);
  }
  // Holds poison until a kernel writes it.
  template <class T>
  T* output(const char* name, const std::vector<py::ssize_t>& shape) {
    return unwritten_array<T>(name, shape, options_.misalignment * sizeof(T));
  }
  // The same, aligned to 256 bytes whatever the options say: what a launcher allocates itself.
  template <class T>
  T* workspace(const char* name, const std::vector<py::ssize_t>& shape) {
    return unwritten_array<T>(name, shape, 0);
  }

  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), const LaunchShape& shape,
              const Arguments&... arguments) {
    emulate(options_, kernel, shape, arguments...);
  }

  // Throws KernelError when elements are left that no kernel wrote, unless that is allowed.
  py::array fetch(const void* data, bool allow_unwritten = false) const {
    const Array& array = arrays_.at(data);
    const size_t missing = count_unwritten(data, array.bytes());
    if (missing != 0 && !allow_unwritten) {
      throw KernelError("output '" + array.name + "': " + std::to_string(missing) + " of " +
                        std::to_string(array.bytes()) + " bytes were never written");
    }
    py::array result(array.type, array.shape);
    std::memcpy(result.mutable_data(), data, array.bytes());
    return result;
  }

 private:
  struct Array {
    std::string name;
    py::dtype type;
    std::vector<py::ssize_t> shape;

    size_t bytes() const {
      size_t total = static_cast<size_t>(type.itemsize());
      for (const py::ssize_t size : shape) total *= static_cast<size_t>(size);
      return total;
    }
  };

  template <class T>
  T* copy_in(const char* name, const py::array& array, ByteState state) {
    if (!array.dtype().equal(numpy_type<T>()) || (array.flags() & py::array::c_style) == 0) {
      throw py::type_error(std::string(name) + ": must be a contiguous array of dtype " +
                           std::string(py::str(numpy_type<T>())) + ", got " +
                           std::string(py::str(array.dtype())));
    }
    const auto bytes = static_cast<size_t>(array.nbytes());
    void* data = allocate(name, bytes, state, options_.misalignment * sizeof(T), options_.poison);
    std::memcpy(data, array.data(), bytes);
    arrays_.emplace(data,
                    Array{name, array.dtype(),
                          std::vector<py::ssize_t>(array.shape(), array.shape() + array.ndim())});
    return static_cast<T*>(data);
  }

  template <class T>
  T* unwritten_array(const char* name, const std::vector<py::ssize_t>& shape, size_t misalignment) {
    const Array array{name, numpy_type<T>(), shape};
    void* data = allocate(name, array.bytes(), unwritten, misalignment, options_.poison);
    arrays_.emplace(data, array);
    return static_cast<T*>(data);
  }

  static inline bool exists_ = false;
  EmulationOptions options_;
  std::map<const void*, Array> arrays_;
};

// Files of bindings add themselves to the module.
using AddBindings = void (*)(py::module_&);
std::vector<AddBindings>& all_bindings();

}  // namespace flexvar::emulation

#define EMULATED_BINDINGS(name, module)                                          \
  static void add_bindings_##name(pybind11::module_&);                           \
  [[maybe_unused]] static const bool registered_##name =                         \
      (flexvar::emulation::all_bindings().push_back(add_bindings_##name), true); \
  static void add_bindings_##name(pybind11::module_& module)
