// flexvar_ext._host: what the host side knows without tensors: how this was built, what this CPU
// has, how attention is cut into tiles.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "common/cpu_isa.h"
#include "scale_attention/plan.h"

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

std::vector<std::array<int32_t, 3>> query_tiles(const std::vector<int64_t>& scale_lengths,
                                                int64_t rows) {
  std::vector<std::array<int32_t, 3>> list;
  for (const auto& t : flexvar::longest_first(flexvar::query_tiles(scale_lengths, rows))) {
    list.push_back({t.query_begin, t.query_end, t.key_end});
  }
  return list;
}

std::vector<std::array<int32_t, 3>> key_tiles(const std::vector<int64_t>& scale_lengths,
                                              int64_t rows) {
  std::vector<std::array<int32_t, 3>> list;
  for (const auto& t : flexvar::longest_first(flexvar::key_tiles(scale_lengths, rows))) {
    list.push_back({t.key_begin, t.key_end, t.query_begin});
  }
  return list;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host side of flexvar_ext: build information, CPU features, attention's tiles.";
  m.def("build_info", &build_info,
        "How this binary was built: compilers, CUDA architectures, instruction sets.");
  m.def(
      "cpu_isa", [] { return flexvar::cpu_isa_name(flexvar::selected_cpu_isa()); },
      "The instruction set that CPU kernels use now: this CPU's best, or FLEXVAR_CPU_ISA.");
  m.def("query_tiles", &query_tiles, py::arg("scale_lengths"), py::arg("rows"),
        "Work list of block-causal attention by queries, longest first: (query_begin, query_end, "
        "key_end).");
  m.def("key_tiles", &key_tiles, py::arg("scale_lengths"), py::arg("rows"),
        "Work list by keys, longest first: (key_begin, key_end, query_begin).");
  m.def("keys_per_part", &flexvar::keys_per_part, py::arg("tiles"), py::arg("keys"),
        py::arg("columns"), py::arg("blocks"),
        "Keys that a block takes in a step of generation on CUDA.");
  m.def("balanced_runs", &flexvar::balanced_runs, py::arg("costs"), py::arg("repeats"),
        py::arg("parts"),
        "Bounds of at most `parts` runs of about equal cost over `repeats` passes.");
}
