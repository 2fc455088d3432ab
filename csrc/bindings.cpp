// The Python module zipfls_cuda._C: importing it registers the operators; it tells what was built.
#include <string>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include "autograd.h"
#include "cpu/isa.h"

// The text of a macro's value, commas included.
#define ZIPFLS_QUOTE(...) #__VA_ARGS__
#define ZIPFLS_TEXT(...) ZIPFLS_QUOTE(__VA_ARGS__)

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

/// The versions of torch and CUDA that this was compiled against.
pybind11::dict built_for() {
  pybind11::dict versions;
  versions["torch"] = TORCH_VERSION;
#ifdef ZIPFLS_CUDA
  versions["cuda"] = ZIPFLS_TEXT(ZIPFLS_CUDA);
#else
  versions["cuda"] = pybind11::none();
#endif
  return versions;
}

/// What csrc was built with: see zipfls_cuda.ops.build_info.
pybind11::dict build_info() {
  namespace py = pybind11;
  std::vector<std::string> sets;
  for (const auto* set : zipfls::cpu::compiled_kernels()) sets.emplace_back(set->name);
  py::dict info;
  info["compiler"] = compiler();
  info["torch"] = TORCH_VERSION;
#ifdef ZIPFLS_CUDA
  info["cuda"] = ZIPFLS_TEXT(ZIPFLS_CUDA);
  info["cuda_arch"] = ZIPFLS_TEXT(ZIPFLS_CUDA_ARCH);
#else
  info["cuda"] = false;
  info["cuda_arch"] = std::vector<std::string>();
#endif
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["isa"] = sets;
  info["isa_used"] = zipfls::cpu::kernels().name;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "C++ operators of zipfls_cuda, registered as torch.ops.zipfls.* when this module is loaded.";
  m.attr("built_for") = built_for();
  m.def("build_info", &build_info,
        "What the extension was built with, and the CPU instruction set it uses.");
  m.def("loss", &zipfls::loss, pybind11::call_guard<pybind11::gil_scoped_release>(),
        "(loss, ce, zipf) of torch.ops.zipfls.loss_fwd with the gradient attached: "
        "autograd.Loss, in C++.");
  m.def("distill", &zipfls::distill, pybind11::call_guard<pybind11::gil_scoped_release>(),
        "(loss, ce, distillation) of torch.ops.zipfls.distill_fwd with the gradient attached.");
}
