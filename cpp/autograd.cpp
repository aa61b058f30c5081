#include "autograd.h"

#include <ATen/SequenceNumber.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/variable.h>

#include <cstring>
#include <typeinfo>
#include <unordered_set>

namespace samlite {

using torch::autograd::Node;

namespace {

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

}  // namespace

Edge gradient_edge(const Tensor& t) { return torch::autograd::impl::gradient_edge(t); }

std::vector<Edge> gradient_edges(const std::vector<Tensor>& tensors) {
  std::vector<Edge> edges;
  for (const auto& tensor : tensors) edges.push_back(gradient_edge(tensor));
  return edges;
}

std::vector<Tensor> pull_back(const std::vector<Tensor>& roots, const std::vector<Tensor>& cotangents,
                              const std::vector<Edge>& edges, bool create_graph) {
  if (roots.empty() || edges.empty()) return std::vector<Tensor>(edges.size());
  return torch::autograd::Engine::get_default_engine().execute(gradient_edges(roots), cotangents, /*keep_graph=*/true,
                                                               create_graph, /*accumulate_grad=*/false, edges);
}

void append(std::vector<Tensor>& all, const std::vector<Tensor>& more) {
  for (const auto& tensor : more)
    if (tensor.defined()) all.push_back(tensor);
}

void accumulate(Tensor& sum, const Tensor& term) { sum = sum.defined() ? sum + term : term; }

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

SavedTensorHooks take_saved_tensor_hooks() {
  const SavedTensorHooks hooks = at::SavedTensorDefaultHooks::get_tls_state();
  SavedTensorHooks none = hooks;
  none.stack = {};
  at::SavedTensorDefaultHooks::set_tls_state(none);
  return hooks;
}

void restore_saved_tensor_hooks(const SavedTensorHooks& hooks) { at::SavedTensorDefaultHooks::set_tls_state(hooks); }

void check_differentiable(const std::vector<Tensor>& derivatives) {
  for_each_node(derivatives, [](Node* node) {
    const auto* error = dynamic_cast<torch::autograd::Error*>(node);
    TORCH_CHECK(!error, error->msg);
    TORCH_CHECK(!std::strstr(typeid(*node).name(), "WarnNotImplemented"),
                "derivative for an operation not implemented");
    return true;
  });
}

}  // namespace samlite
