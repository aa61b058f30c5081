// What lies below torch's public autograd: cotangents pulled back along edges, and the nodes of a graph.
#pragma once

#include <ATen/ATen.h>
#include <ATen/SavedTensorHooks.h>
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/function.h>  // an edge needs its node whole

#include <vector>

namespace samlite {

using at::Tensor;
using torch::autograd::Edge;

Edge gradient_edge(const Tensor& t);
std::vector<Edge> gradient_edges(const std::vector<Tensor>& tensors);

// Cotangents at the roots pulled back to the edges; undefined where nothing arrives. The graph is kept.
std::vector<Tensor> pull_back(const std::vector<Tensor>& roots, const std::vector<Tensor>& cotangents,
                              const std::vector<Edge>& edges, bool create_graph = false);

// Appends the tensors that are defined.
void append(std::vector<Tensor>& all, const std::vector<Tensor>& more);

// Adds to a sum that need not be defined yet.
void accumulate(Tensor& sum, const Tensor& term);

// Takes the hooks of Python off the graph behind some tensors, as they would change or record every derivative: off
// nodes made since `sequence_number()` was `since`, but not off leaves, whose hooks are not this graph's.
void drop_hooks(const std::vector<Tensor>& roots, uint64_t since);
uint64_t sequence_number();

// Takes the hooks on tensors that autograd saves off this thread, and gives them back.
using SavedTensorHooks = at::impl::SavedTensorDefaultHooksTLS;
SavedTensorHooks take_saved_tensor_hooks();
void restore_saved_tensor_hooks(const SavedTensorHooks& hooks);

// Raises RuntimeError where the graph behind derivatives holds an operation that has none of its own. autograd itself
// passes by those of functions marked as once_differentiable, and what depends on them would count as constant.
void check_differentiable(const std::vector<Tensor>& derivatives);

}  // namespace samlite
