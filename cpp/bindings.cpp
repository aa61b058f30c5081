// Arguments, GIL and signals; no mathematics.
#include <c10/core/GradMode.h>
#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "hessian.h"
#include "lanczos.h"
#include "moments.h"
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

// Operator: Hessian or Centred.
template <class Operator>
Eigenpairs of_operator(const std::shared_ptr<Operator>& operation, Options options, const std::string& which,
                       const std::string& method) {
  const auto apply = [&](const Tensor& v) { return operation->apply(v); };
  return eigenpairs(apply, operation->params().at(0), operation->numel(), options, which, method);
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

std::shared_ptr<Moments> make_moments(std::vector<Tensor> params, std::function<void(int64_t)> rewind,
                                      std::function<std::optional<std::tuple<Moments::Graph, Tensor, double>>()> next,
                                      bool batches, int64_t memory) {
  return std::make_shared<Moments>(std::move(params), std::move(rewind), std::move(next), batches, memory,
                                   check_signals);
}

std::shared_ptr<Powers> make_chain(const Tensor& loss, std::vector<std::shared_ptr<Site>> sites, int64_t samples,
                                   std::vector<Tensor> params) {
  return std::make_shared<Chain>(loss, std::move(sites), samples, std::move(params));
}

std::shared_ptr<Powers> make_whole(const Tensor& loss, double weight, bool mean, std::vector<Tensor> params) {
  return std::make_shared<Whole>(loss, weight, mean, std::move(params));
}

Tensor powers(const std::shared_ptr<Powers>& graph, const Tensor& v, int64_t order) {
  Tensor out = at::zeros({order, v.numel()}, v.options());
  graph->add(v, out);
  return out;
}

std::shared_ptr<Site> make_site(std::optional<Tensor> a, std::optional<Tensor> eta, const Tensor& z,
                                const std::tuple<int64_t, int64_t, int64_t, int64_t>& layout) {
  const auto& [dim, outer, n, inner] = layout;
  return std::make_shared<Site>(std::move(a), std::move(eta), z, Layout{dim, outer, n, inner});
}

template <class Class>
double drift(Class& self) {
  return self.graphs().drift();
}

template <class Class>
void bind_graphs(py::class_<Class, std::shared_ptr<Class>>& bound) {
  bound.def("measure", torch::wrap_pybind_function_no_gil(&Class::measure))
      .def("drift", torch::wrap_pybind_function_no_gil(drift<Class>))
      .def_property_readonly("build_seconds", [](Class& self) { return self.graphs().build_seconds(); })
      .def_property_readonly("batches", [](Class& self) { return self.graphs().batches(); })
      .def_property_readonly("kept", [](Class& self) { return self.graphs().kept(); })
      .def_property_readonly("kept_bytes", [](Class& self) { return self.graphs().kept_bytes(); });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Eigen-solvers, Hessian-vector products and per-sample chains on libtorch.";

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

  py::class_<Hessian, std::shared_ptr<Hessian>> hessian(m, "Hessian");
  hessian.def(py::init(&make_hessian), py::arg("params"), py::arg("rewind"), py::arg("next"), py::arg("memory"))
      .def("apply", torch::wrap_pybind_function_no_gil(&Hessian::apply), py::arg("v"));
  bind_graphs(hessian);

  m.def("tap", &tap, py::arg("a"));
  py::enum_<Kind>(m, "Kind")
      .value("linear", Kind::linear)
      .value("conv", Kind::conv)
      .value("scale", Kind::scale)
      .value("shift", Kind::shift)
      .value("embedding", Kind::embedding);
  py::class_<Use>(m, "Use")
      .def(py::init([](Kind kind, int64_t param, std::vector<int64_t> sizes, std::vector<int64_t> strides,
                       int64_t offset) { return Use{kind, param, std::move(sizes), std::move(strides), offset}; }),
           py::arg("kind"), py::arg("param"), py::arg("sizes"), py::arg("strides"), py::arg("offset"))
      .def_readwrite("stride", &Use::stride)
      .def_readwrite("padding", &Use::padding)
      .def_readwrite("dilation", &Use::dilation)
      .def_readwrite("groups", &Use::groups)
      .def_readwrite("mean", &Use::mean)
      .def_readwrite("inverse", &Use::inverse)
      .def_readwrite("padding_row", &Use::padding_row);
  py::class_<Site, std::shared_ptr<Site>>(m, "Site")
      .def(py::init(&make_site), py::arg("a"), py::arg("eta"), py::arg("z"), py::arg("layout"))
      .def("add", &Site::add, py::arg("use"));
  py::class_<Powers, std::shared_ptr<Powers>>(m, "Powers")
      .def("__call__", torch::wrap_pybind_function_no_gil(powers), py::arg("v"), py::arg("order"));
  m.def("chain", torch::wrap_pybind_function_no_gil(make_chain), py::arg("loss"), py::arg("sites"), py::arg("samples"),
        py::arg("params"));
  m.def("whole", torch::wrap_pybind_function_no_gil(make_whole), py::arg("loss"), py::arg("weight"), py::arg("mean"),
        py::arg("params"));
  py::class_<Moments, std::shared_ptr<Moments>> moments(m, "Moments");
  moments
      .def(py::init(&make_moments), py::arg("params"), py::arg("rewind"), py::arg("next"), py::arg("batches"),
           py::arg("memory"))
      .def("apply", torch::wrap_pybind_function_no_gil(&Moments::apply), py::arg("v"), py::arg("order"));
  bind_graphs(moments);
  py::class_<Centred, std::shared_ptr<Centred>>(m, "Centred")
      .def(py::init<std::shared_ptr<Moments>, int64_t>(), py::arg("moments"), py::arg("order"))
      .def("apply", torch::wrap_pybind_function_no_gil(&Centred::apply), py::arg("v"));

  m.def("eigenpairs", torch::wrap_pybind_function_no_gil(of_operator<Hessian>), py::arg("hessian"), py::arg("options"),
        py::arg("which") = "LA", py::arg("method") = "lanczos");
  m.def("eigenpairs", torch::wrap_pybind_function_no_gil(of_operator<Centred>), py::arg("centred"), py::arg("options"),
        py::arg("which") = "LA", py::arg("method") = "lanczos");
  m.def("eigenpairs", torch::wrap_pybind_function_no_gil(of_callable), py::arg("matvec"), py::arg("like"),
        py::arg("dimension"), py::arg("options"), py::arg("which") = "LA", py::arg("method") = "lanczos");
}
