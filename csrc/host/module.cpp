// flexvar_ext._host: what the host side knows without tensors: how this was built, what this CPU
// has.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/cpu_isa.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["cuda"] = static_cast<bool>(FLEXVAR_WITH_CUDA);
  info["cuda_architectures"] = FLEXVAR_CUDA_ARCHITECTURES;
  info["cuda_compiler_version"] = FLEXVAR_CUDA_COMPILER_VERSION;
  info["cxx_compiler"] = FLEXVAR_CXX_COMPILER;
  info["cpu_instruction_sets"] = FLEXVAR_BUILD_ISAS;
  return info;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host side of flexvar_ext: build information, CPU features.";
  m.def("build_info", &build_info,
        "How this binary was built: compilers, CUDA architectures, instruction sets.");
  m.def(
      "cpu_isa", [] { return flexvar::cpu_isa_name(flexvar::selected_cpu_isa()); },
      "The instruction set that CPU kernels use now: this CPU's best, or FLEXVAR_CPU_ISA.");
}
