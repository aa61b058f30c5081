// Arguments, GIL and signals; no mathematics.
#include <c10/core/GradMode.h>
#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "hessian.h"
#include "lanczos.h"
#include "power.h"

namespace py = pybind11;
using namespace samlite;

namespace {

// Python sees Ctrl-C only when asked: once a product.
void check_signals() {
  py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

Which parse_which(const std::string& which) {
  if (which == "LA") return Which::LA;
  if (which == "SA") return Which::SA;
  TORCH_CHECK_VALUE(which == "LM", "which must be LA, SA or LM, got ", which);
  return Which::LM;
}

Eigenpairs eigenpairs(const MatVec& apply, const Tensor& like, int64_t p, Options options, const std::string& which,
                      const std::string& method) {
  options.which = parse_which(which);
  TORCH_CHECK_VALUE(options.k >= 1 && options.k <= p, "k must be between 1 and the dimension ", p, ", got ", options.k);
  const c10::AutoGradMode no_grad(false);
  if (method == "power") return power_iteration(apply, like, p, options);
  TORCH_CHECK_VALUE(method == "lanczos", "method must be lanczos or power, got ", method);
  return Lanczos(apply, like, p, options).solve();
}

Eigenpairs of_hessian(const std::shared_ptr<Hessian>& hessian, Options options, const std::string& which,
                      const std::string& method) {
  const auto apply = [&](const Tensor& v) { return hessian->apply(v); };
  return eigenpairs(apply, hessian->params().at(0), hessian->numel(), options, which, method);
}

Eigenpairs of_callable(const MatVec& function, const Tensor& like, int64_t p, Options options, const std::string& which,
                       const std::string& method) {
  const auto apply = [&](const Tensor& v) {
    check_signals();
    return function(v);
  };
  return eigenpairs(apply, like, p, options, which, method);
}

std::shared_ptr<Hessian> make_hessian(std::vector<Tensor> params, std::function<void(int64_t)> rewind,
                                      std::function<std::optional<std::tuple<Tensor, double>>()> next, int64_t memory) {
  return std::make_shared<Hessian>(std::move(params), Losses{std::move(rewind), std::move(next)}, memory,
                                   check_signals);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Eigen-solvers and Hessian-vector products on libtorch.";

  py::class_<Options>(m, "Options")
      .def(py::init([](int64_t k, double tol, bool verify, bool separated, int64_t basis, int64_t max_matvecs,
                       uint64_t seed, std::optional<Tensor> start, std::function<void(int64_t, double)> progress) {
             return Options{k, Which::LA, tol, verify, separated, basis, max_matvecs, seed, start, progress};
           }),
           py::kw_only(), py::arg("k") = 1, py::arg("tol") = 1e-3, py::arg("verify") = false,
           py::arg("separated") = true, py::arg("basis") = 100, py::arg("max_matvecs") = 1000, py::arg("seed") = 0,
           py::arg("start") = py::none(), py::arg("progress") = py::none());

  py::class_<Eigenpairs>(m, "Eigenpairs")
      .def_readonly("values", &Eigenpairs::values)
      .def_readonly("errors", &Eigenpairs::errors)
      .def_readonly("residuals", &Eigenpairs::residuals)
      .def_readonly("vectors", &Eigenpairs::vectors)
      .def_readonly("converged", &Eigenpairs::converged)
      .def_readonly("complete", &Eigenpairs::complete)
      .def_readonly("matvecs", &Eigenpairs::matvecs);

  py::class_<Hessian, std::shared_ptr<Hessian>>(m, "Hessian")
      .def(py::init(&make_hessian), py::arg("params"), py::arg("rewind"), py::arg("next"), py::arg("memory"))
      .def("apply", torch::wrap_pybind_function_no_gil(&Hessian::apply), py::arg("v"))
      .def("measure", torch::wrap_pybind_function_no_gil(&Hessian::measure))
      .def("drift", torch::wrap_pybind_function_no_gil(&Hessian::drift))
      .def_property_readonly("build_seconds", &Hessian::build_seconds)
      .def_property_readonly("batches", &Hessian::batches)
      .def_property_readonly("kept", &Hessian::kept)
      .def_property_readonly("kept_bytes", &Hessian::kept_bytes);

  m.def("eigenpairs", torch::wrap_pybind_function_no_gil(of_hessian), py::arg("hessian"), py::arg("options"),
        py::arg("which") = "LA", py::arg("method") = "lanczos");
  m.def("eigenpairs", torch::wrap_pybind_function_no_gil(of_callable), py::arg("matvec"), py::arg("like"),
        py::arg("dimension"), py::arg("options"), py::arg("which") = "LA", py::arg("method") = "lanczos");
}
