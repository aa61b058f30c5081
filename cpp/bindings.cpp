// Arguments, GIL and signals; no mathematics.
#include <c10/core/GradMode.h>
#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "chain.h"
#include "hessian.h"
#include "lanczos.h"
#include "moments.h"
#include "power.h"
#include "quadrature.h"

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

// A function of a vector as an operator, such as a product with a known matrix.
class Callable : public Operator {
 public:
  Callable(MatVec function, Tensor like, int64_t numel)
      : function_(std::move(function)), like_(std::move(like)), numel_(numel) {}
  Tensor apply(const Tensor& v) override {
    check_signals();
    return function_(v);
  }
  const Tensor& like() const override { return like_; }
  int64_t numel() const override { return numel_; }

 private:
  MatVec function_;
  Tensor like_;
  int64_t numel_;
};

MatVec product(Operator& operation) {
  return [&](const Tensor& v) { return operation.apply(v); };
}

Eigenpairs eigenpairs(Operator& operation, Options options, const std::string& which, const std::string& method) {
  const int64_t p = operation.numel();
  options.which = parse_which(which);
  options.scale = [&] { return operation.scale(); };
  TORCH_CHECK_VALUE(options.k >= 1 && options.k <= p, "k must be between 1 and the dimension ", p, ", got ", options.k);
  const c10::AutoGradMode no_grad(false);
  if (method == "power") return power_iteration(product(operation), operation.like(), p, options);
  TORCH_CHECK_VALUE(method == "lanczos", "method must be lanczos or power, got ", method);
  return lanczos(product(operation), operation.like(), p, options);
}

std::shared_ptr<TraceProbes> make_probes(const std::shared_ptr<Operator>& operation, int64_t order, int64_t deflation,
                                         uint64_t seed, int64_t limit) {
  const c10::AutoGradMode no_grad(false);
  const auto multiply = [operation](const Tensor& v) { return operation->apply(v); };
  return std::make_shared<TraceProbes>(multiply, operation->like(), operation->numel(), order, deflation, seed, limit);
}

int64_t draw(TraceProbes& probes, int64_t more) {
  const c10::AutoGradMode no_grad(false);
  return probes.draw(more);
}

Measure measure_of(Operator& operation, const Tensor& start, int64_t steps) {
  const c10::AutoGradMode no_grad(false);
  return spectral_measure(product(operation), start, steps);
}

std::shared_ptr<Hessian> make_hessian(std::vector<Tensor> params, std::function<void(int64_t)> rewind,
                                      Next<Curvature> next, int64_t memory, Sum sum) {
  return std::make_shared<Hessian>(std::move(params), std::move(rewind), std::move(next), memory, check_signals,
                                   std::move(sum));
}

std::shared_ptr<Moments> make_moments(std::vector<Tensor> params, std::function<void(int64_t)> rewind,
                                      Next<SampleHessians> next, bool batches, int64_t memory, int64_t exponent,
                                      Sum sum) {
  return std::make_shared<Moments>(std::move(params), std::move(rewind), std::move(next), batches, memory, exponent,
                                   check_signals, std::move(sum));
}

std::shared_ptr<Curvature> make_gradient(const Tensor& loss, std::vector<Tensor> params) {
  return std::make_shared<Gradient>(loss, std::move(params));
}

std::shared_ptr<Curvature> make_gauss_newton(const Tensor& loss, std::vector<Tensor> z, std::vector<Tensor> cuts,
                                             std::vector<Tensor> params) {
  return std::make_shared<GaussNewton>(loss, std::move(z), std::move(cuts), std::move(params));
}

std::shared_ptr<SampleHessians> make_chain(const Tensor& loss, std::vector<std::shared_ptr<Site>> sites,
                                           int64_t samples, std::vector<Tensor> params, std::vector<Tensor> z,
                                           std::vector<Tensor> cuts) {
  std::optional<Outputs> outputs;
  if (!z.empty()) outputs.emplace(loss, std::move(z), std::move(cuts));
  return std::make_shared<Chain>(loss, std::move(sites), samples, std::move(params), std::move(outputs));
}

std::shared_ptr<SampleHessians> make_batch(std::shared_ptr<Curvature> curvature, double weight, bool mean,
                                           std::vector<Tensor> params, int64_t exponent) {
  return std::make_shared<BatchHessian>(std::move(curvature), weight, mean, std::move(params), exponent);
}

Tensor powers(const std::shared_ptr<SampleHessians>& graph, const Tensor& v, int64_t order) {
  Tensor out = at::zeros({order, v.numel()}, v.options());
  graph->add(v, out);
  return out;
}

std::shared_ptr<Site> make_site(std::optional<Tensor> a, std::optional<Tensor> eta, const Tensor& z,
                                const std::tuple<int64_t, int64_t, int64_t, int64_t>& layout,
                                std::optional<Tensor> places) {
  const auto& [dim, outer, n, inner] = layout;
  return std::make_shared<Site>(std::move(a), std::move(eta), z,
                                Layout{dim, outer, n, inner, places.value_or(Tensor())});
}

template <class Class>
double drift(Class& self) {
  return self.graphs().drift();
}

template <class Class, class... Rest>
void bind_graphs(py::class_<Class, Rest...>& bound) {
  bound.def("drift", torch::wrap_pybind_function_no_gil(drift<Class>))
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
                       uint64_t seed, std::optional<Tensor> start, std::function<void(int64_t, double)> progress,
                       double precision) {
             return Options{k, Which::LA, tol, verify, separated, basis, max_matvecs, seed, start, progress, precision};
           }),
           py::kw_only(), py::arg("k") = 1, py::arg("tol") = 1e-3, py::arg("verify") = false,
           py::arg("separated") = true, py::arg("basis") = 100, py::arg("max_matvecs") = 1000, py::arg("seed") = 0,
           py::arg("start") = py::none(), py::arg("progress") = py::none(), py::arg("precision") = 0.0);

  py::class_<Eigenpairs>(m, "Eigenpairs")
      .def_readonly("values", &Eigenpairs::values)
      .def_readonly("errors", &Eigenpairs::errors)
      .def_readonly("residuals", &Eigenpairs::residuals)
      .def_readonly("vectors", &Eigenpairs::vectors)
      .def_readonly("converged", &Eigenpairs::converged)
      .def_readonly("complete", &Eigenpairs::complete)
      .def_readonly("matvecs", &Eigenpairs::matvecs);

  py::class_<Operator, std::shared_ptr<Operator>>(m, "Operator")
      .def("apply", torch::wrap_pybind_function_no_gil(&Operator::apply), py::arg("v"))
      .def("exponent", torch::wrap_pybind_function_no_gil(&Operator::exponent));
  py::class_<Callable, Operator, std::shared_ptr<Callable>>(m, "Callable")
      .def(py::init<MatVec, Tensor, int64_t>(), py::arg("function"), py::arg("like"), py::arg("dimension"));

  m.def("sequence_number", &sequence_number);
  py::class_<SavedTensorHooks>(m, "SavedTensorHooks");
  m.def("take_saved_tensor_hooks", &take_saved_tensor_hooks);
  m.def("restore_saved_tensor_hooks", &restore_saved_tensor_hooks, py::arg("hooks"));
  m.def("drop_hooks", torch::wrap_pybind_function_no_gil(drop_hooks), py::arg("roots"), py::arg("since"));
  m.def("check_differentiable", torch::wrap_pybind_function_no_gil(check_differentiable), py::arg("derivatives"));
  py::class_<Curvature, std::shared_ptr<Curvature>>(m, "Curvature").def("held", &Curvature::held);
  m.def("gradient", torch::wrap_pybind_function_no_gil(make_gradient), py::arg("loss"), py::arg("params"));
  m.def("gauss_newton", torch::wrap_pybind_function_no_gil(make_gauss_newton), py::arg("loss"), py::arg("outputs"),
        py::arg("cuts"), py::arg("params"));
  py::class_<Hessian, Operator, std::shared_ptr<Hessian>> hessian(m, "Hessian");
  hessian.def(py::init(&make_hessian), py::arg("params"), py::arg("rewind"), py::arg("next"), py::arg("memory"),
              py::arg("sum") = nullptr);
  bind_graphs(hessian);

  m.def("tap", &tap, py::arg("a"));
  py::class_<View>(m, "View").def(py::init<int64_t, Sizes, Sizes, int64_t>(), py::arg("param"), py::arg("sizes"),
                                  py::arg("strides"), py::arg("offset"));
  py::class_<Use, std::shared_ptr<Use>>(m, "Use");
  py::class_<Linear, Use, std::shared_ptr<Linear>>(m, "Linear").def(py::init<View>(), py::arg("view"));
  py::class_<Conv, Use, std::shared_ptr<Conv>>(m, "Conv").def(
      py::init<View, Sizes, Sizes, Sizes, int64_t, std::optional<Sizes>>(), py::arg("view"), py::arg("stride"),
      py::arg("padding"), py::arg("dilation"), py::arg("groups"), py::arg("output_padding") = py::none());
  py::class_<Contraction, Use, std::shared_ptr<Contraction>>(m, "Contraction")
      .def(py::init<View, std::string, std::string, std::string>(), py::arg("view"), py::arg("a"), py::arg("theta"),
           py::arg("z"));
  py::class_<Scale, Use, std::shared_ptr<Scale>>(m, "Scale")
      .def(py::init<View, std::optional<Tensor>, std::optional<Tensor>>(), py::arg("view"),
           py::arg("mean") = py::none(), py::arg("inverse") = py::none());
  py::class_<Shift, Use, std::shared_ptr<Shift>>(m, "Shift").def(py::init<View>(), py::arg("view"));
  py::class_<Embedding, Use, std::shared_ptr<Embedding>>(m, "Embedding")
      .def(py::init<View, int64_t>(), py::arg("view"), py::arg("padding_row") = -1);
  py::class_<Site, std::shared_ptr<Site>>(m, "Site")
      .def(py::init(&make_site), py::arg("a"), py::arg("eta"), py::arg("z"), py::arg("layout"),
           py::arg("places") = py::none())
      .def("add", &Site::add, py::arg("use"));
  py::class_<SampleHessians, std::shared_ptr<SampleHessians>>(m, "SampleHessians")
      .def("__call__", torch::wrap_pybind_function_no_gil(powers), py::arg("v"), py::arg("order"))
      .def("held", &SampleHessians::held)
      .def("step_bytes", &SampleHessians::step_bytes);
  m.def("chain", torch::wrap_pybind_function_no_gil(make_chain), py::arg("loss"), py::arg("sites"), py::arg("samples"),
        py::arg("params"), py::arg("outputs"), py::arg("cuts"));
  m.def("batch_hessian", torch::wrap_pybind_function_no_gil(make_batch), py::arg("curvature"), py::arg("weight"),
        py::arg("mean"), py::arg("params"), py::arg("exponent") = 0);
  py::class_<Moments, std::shared_ptr<Moments>> moments(m, "Moments");
  moments
      .def(py::init(&make_moments), py::arg("params"), py::arg("rewind"), py::arg("next"), py::arg("batches"),
           py::arg("memory"), py::arg("exponent") = 0, py::arg("sum") = nullptr)
      .def("exponent", torch::wrap_pybind_function_no_gil(&Moments::exponent))
      .def("suitable_exponent", torch::wrap_pybind_function_no_gil(&Moments::suitable_exponent))
      .def("apply", torch::wrap_pybind_function_no_gil(&Moments::apply), py::arg("v"), py::arg("order"))
      .def("ascent", torch::wrap_pybind_function_no_gil(&Moments::ascent))
      .def("slopes", torch::wrap_pybind_function_no_gil(&Moments::slopes), py::arg("v"));
  bind_graphs(moments);
  py::class_<Centred, Operator, std::shared_ptr<Centred>>(m, "Centred")
      .def(py::init<std::shared_ptr<Moments>, int64_t>(), py::arg("moments"), py::arg("order"));
  py::class_<Mixture, Operator, std::shared_ptr<Mixture>>(m, "Mixture")
      .def(py::init<std::shared_ptr<Moments>, std::vector<double>>(), py::arg("moments"), py::arg("coefficients"));

  m.def("eigenpairs", torch::wrap_pybind_function_no_gil(eigenpairs), py::arg("operator"), py::arg("options"),
        py::arg("which") = "LA", py::arg("method") = "lanczos");

  py::class_<TraceProbes, std::shared_ptr<TraceProbes>>(m, "TraceProbes")
      .def("draw", torch::wrap_pybind_function_no_gil(draw), py::arg("more"))
      .def_property_readonly("samples", &TraceProbes::samples)
      .def_property_readonly("known", &TraceProbes::known)
      .def_property_readonly("magnitude", &TraceProbes::magnitude)
      .def_property_readonly("exhausted", &TraceProbes::exhausted)
      .def_property_readonly("matvecs", &TraceProbes::matvecs)
      .def("unit", torch::wrap_pybind_function_no_gil(&TraceProbes::unit));
  m.def("trace_probes", torch::wrap_pybind_function_no_gil(make_probes), py::arg("operator"), py::arg("order"),
        py::arg("deflation"), py::arg("seed"), py::arg("limit"));
  py::class_<Measure>(m, "Measure")
      .def_readonly("nodes", &Measure::nodes)
      .def_readonly("weights", &Measure::weights)
      .def_readonly("residuals", &Measure::residuals)
      .def_readonly("matvecs", &Measure::matvecs);
  m.def("spectral_measure", torch::wrap_pybind_function_no_gil(measure_of), py::arg("operator"), py::arg("start"),
        py::arg("steps"));
}
