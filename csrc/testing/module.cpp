// The module `_emulated`: every CUDA kernel of the library, run on the CPU. For tests only.
#include <stdexcept>
#include <string>

#include "testing/arrays.h"

namespace flexvar::emulation {

std::vector<AddBindings>& all_bindings() {
  static std::vector<AddBindings> bindings;
  return bindings;
}

namespace {

ThreadOrder parse_order(const std::string& order) {
  if (order == "forward") return ThreadOrder::forward;
  if (order == "reversed") return ThreadOrder::reversed;
  if (order == "random") return ThreadOrder::random;
  throw std::invalid_argument("order must be forward, reversed or random, got '" + order + "'");
}

}  // namespace

PYBIND11_MODULE(_emulated, module) {
  py::register_exception<KernelError>(module, "KernelError", PyExc_RuntimeError);
  py::class_<EmulationOptions>(module, "Options")
      .def(py::init([](const std::string& order, uint64_t seed, uint8_t poison, size_t misalignment,
                       int multiprocessors, size_t shared_memory, bool warpgroups) {
             EmulationOptions options;
             options.order = parse_order(order);
             options.seed = seed;
             options.poison = poison;
             options.misalignment = misalignment;
             options.multiprocessors = multiprocessors;
             options.shared_memory = shared_memory;
             options.warpgroups = warpgroups;
             return options;
           }),
           py::kw_only(), py::arg("order") = "forward", py::arg("seed") = 0,
           py::arg("poison") = 0xff, py::arg("misalignment") = 0, py::arg("multiprocessors") = 132,
           py::arg("shared_memory") = 227 * 1024, py::arg("warpgroups") = true)
      .def_readonly("misalignment", &EmulationOptions::misalignment);
  for (const AddBindings add : all_bindings()) add(module);
}

}  // namespace flexvar::emulation
