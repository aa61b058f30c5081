#include "hessian.h"

#include <ATen/SequenceNumber.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/functions/basic_ops.h>

#include <cstring>
#include <typeinfo>
#include <unordered_set>

namespace samlite {

namespace {

// Cotangents at the roots pulled back to the inputs; undefined where nothing arrives.
std::vector<Tensor> pulled_back(const std::vector<Tensor>& roots, const std::vector<Tensor>& inputs,
                                const std::vector<Tensor>& cotangents, bool create_graph = false) {
  if (roots.empty() || inputs.empty()) return std::vector<Tensor>(inputs.size());
  return torch::autograd::grad(roots, inputs, cotangents, /*retain_graph=*/true, create_graph, /*allow_unused=*/true);
}

// Those of some tensors that can be differentiated further, and where they are.
std::pair<std::vector<Tensor>, std::vector<size_t>> differentiable(const std::vector<Tensor>& tensors) {
  std::pair<std::vector<Tensor>, std::vector<size_t>> result;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].defined() && tensors[i].requires_grad()) {
      result.first.push_back(tensors[i]);
      result.second.push_back(i);
    }
  }
  return result;
}

std::vector<Tensor> selected(const std::vector<Tensor>& tensors, const std::vector<size_t>& index) {
  std::vector<Tensor> result;
  for (const auto i : index) result.push_back(tensors[i]);
  return result;
}

void add(const std::vector<Tensor>& terms, std::vector<Tensor>& sums) {
  for (size_t i = 0; i < sums.size(); ++i)
    if (terms[i].defined()) sums[i].add_(terms[i]);
}

using torch::autograd::Node;

// Visits the nodes of the graphs behind some tensors, each once; those behind a node for which `visit` is false are
// left out.
template <class Visit>
void for_each_node(const std::vector<Tensor>& tensors, Visit visit) {
  std::vector<Node*> unseen;
  std::unordered_set<Node*> seen;
  for (const auto& tensor : tensors)
    if (tensor.defined()) unseen.push_back(tensor.grad_fn().get());
  while (!unseen.empty()) {
    Node* node = unseen.back();
    unseen.pop_back();
    if (!node || !seen.insert(node).second || !visit(node)) continue;
    for (const auto& edge : node->next_edges()) unseen.push_back(edge.function.get());
  }
}

void append(std::vector<Tensor>& all, const std::vector<Tensor>& more) {
  for (const auto& tensor : more)
    if (tensor.defined()) all.push_back(tensor);
}

}  // namespace

uint64_t sequence_number() { return at::sequence_number::peek(); }

void drop_hooks(const std::vector<Tensor>& roots, uint64_t since) {
  for_each_node(roots, [&](Node* node) {
    if (node->sequence_nr() < since) return false;
    if (dynamic_cast<torch::autograd::AccumulateGrad*>(node)) return true;
    node->pre_hooks().clear();
    node->tensor_pre_hooks().clear();
    node->post_hooks().clear();
    node->retains_grad_hooks().clear();
    return true;
  });
}

void check_differentiable(const std::vector<Tensor>& derivatives) {
  for_each_node(derivatives, [](Node* node) {
    const auto* error = dynamic_cast<torch::autograd::Error*>(node);
    TORCH_CHECK(!error, error->msg);
    TORCH_CHECK(!std::strstr(typeid(*node).name(), "WarnNotImplemented"),
                "derivative for an operation not implemented");
    return true;
  });
}

Gradient::Gradient(const Tensor& loss, std::vector<Tensor> params) : params_(std::move(params)) {
  if (!loss.requires_grad()) return;  // does not depend on the parameters: zero curvature
  c10::AutoGradMode grad(true);
  std::tie(gradients_, index_) = differentiable(pulled_back({loss}, params_, {}, /*create_graph=*/true));
  check_differentiable(gradients_);
}

// d(g . v)/dw: reverse mode over the graph of the gradient.
void Gradient::add_product(const std::vector<Tensor>& v, std::vector<Tensor>& out) const {
  add(pulled_back(gradients_, params_, selected(v, index_)), out);
}

Outputs::Outputs(const Tensor& loss, std::vector<Tensor> z, std::vector<Tensor> cuts)
    : z_(std::move(z)), cuts_(std::move(cuts)) {
  c10::AutoGradMode grad(true);
  for (const auto& output : z_) u_.push_back(at::zeros_like(output).requires_grad_());
  if (loss.requires_grad()) slopes_ = pulled_back({loss}, cuts_, {}, /*create_graph=*/true);
  check_differentiable(slopes_);
  for (auto& slope : slopes_)
    if (!slope.defined() || !slope.requires_grad()) slope = Tensor();
}

std::vector<Tensor> Outputs::curve(const std::vector<Tensor>& v) const {
  std::vector<Tensor> roots, cotangents;
  for (size_t i = 0; i < slopes_.size(); ++i) {
    if (!slopes_[i].defined() || !v[i].defined()) continue;
    roots.push_back(slopes_[i]);
    cotangents.push_back(v[i]);
  }
  auto result = pulled_back(roots, cuts_, cotangents);
  for (size_t i = 0; i < result.size(); ++i)
    if (!result[i].defined()) result[i] = at::zeros_like(u_[i]);
  return result;
}

void Outputs::add_held(std::vector<Tensor>& out) const {
  append(out, z_);
  append(out, u_);
  append(out, slopes_);
}

GaussNewton::GaussNewton(const Tensor& loss, std::vector<Tensor> z, std::vector<Tensor> cuts,
                         std::vector<Tensor> params)
    : params_(std::move(params)), outputs_(loss, std::move(z), std::move(cuts)) {
  c10::AutoGradMode grad(true);
  std::tie(transposed_, index_) =
      differentiable(pulled_back(outputs_.z(), params_, outputs_.u(), /*create_graph=*/true));
  check_differentiable(transposed_);
}

void GaussNewton::add_product(const std::vector<Tensor>& v, std::vector<Tensor>& out) const {
  const auto along = pulled_back(transposed_, outputs_.u(), selected(v, index_));
  add(pulled_back(outputs_.z(), params_, outputs_.curve(along)), out);
}

std::vector<Tensor> GaussNewton::held() const {
  std::vector<Tensor> result = transposed_;
  outputs_.add_held(result);
  return result;
}

std::vector<Tensor> views(const Tensor& flat, const std::vector<Tensor>& params) {
  std::vector<Tensor> result;
  int64_t offset = 0;
  for (const auto& p : params) {
    result.push_back(flat.narrow(0, offset, p.numel()).view(p.sizes()));
    offset += p.numel();
  }
  return result;
}

Hessian::Hessian(std::vector<Tensor> params, std::function<void(int64_t)> rewind, Next<Curvature> next, int64_t memory,
                 std::function<void()> check_signals, Sum sum)
    : params_(std::move(params)),
      graphs_(std::move(rewind), stream(std::move(next)), params_.at(0).device(), memory, std::move(check_signals),
              std::move(sum)) {
  for (const auto& p : params_) numel_ += p.numel();
}

Tensor Hessian::apply(const Tensor& v) {
  Tensor out = at::zeros_like(v);
  const auto directions = views(v, params_);
  auto sums = views(out, params_);
  graphs_.pass([&](const auto& graph) { graph->add_product(directions, sums); });
  graphs_.sum(out);
  return out.div_(graphs_.weight());
}

}  // namespace samlite
