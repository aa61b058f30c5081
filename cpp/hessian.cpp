#include "hessian.h"

#include <c10/core/GradMode.h>

#include <tuple>

namespace samlite {

namespace {

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

// Some of the parts of a vector, each on the device of its parameter: a network may be spread over several.
std::vector<Tensor> selected(const std::vector<Tensor>& parts, const std::vector<size_t>& index,
                             const std::vector<Tensor>& params) {
  std::vector<Tensor> result;
  for (const auto i : index) result.push_back(parts[i].to(params[i].device()));
  return result;
}

void add(const std::vector<Tensor>& terms, std::vector<Tensor>& sums) {
  for (size_t i = 0; i < sums.size(); ++i)
    if (terms[i].defined()) sums[i].add_(terms[i].to(sums[i].device()));
}

}  // namespace

Gradient::Gradient(const Tensor& loss, std::vector<Tensor> params) : params_(std::move(params)) {
  if (!loss.requires_grad()) return;  // does not depend on the parameters: zero curvature
  c10::AutoGradMode grad(true);
  std::tie(gradients_, index_) =
      differentiable(pull_back({loss}, {at::ones_like(loss)}, gradient_edges(params_), /*create_graph=*/true));
  check_differentiable(gradients_);
}

// d(g . v)/dw: reverse mode over the graph of the gradient.
void Gradient::add_product(const std::vector<Tensor>& v, std::vector<Tensor>& out) const {
  add(pull_back(gradients_, selected(v, index_, params_), gradient_edges(params_)), out);
}

Outputs::Outputs(const Tensor& loss, std::vector<Tensor> z, std::vector<Tensor> cuts)
    : z_(std::move(z)), cuts_(std::move(cuts)) {
  c10::AutoGradMode grad(true);
  for (const auto& output : z_) u_.push_back(at::zeros_like(output).requires_grad_());
  if (loss.requires_grad())
    slopes_ = pull_back({loss}, {at::ones_like(loss)}, gradient_edges(cuts_), /*create_graph=*/true);
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
  auto result = pull_back(roots, cotangents, gradient_edges(cuts_));
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
      differentiable(pull_back(outputs_.z(), outputs_.u(), gradient_edges(params_), /*create_graph=*/true));
  check_differentiable(transposed_);
}

void GaussNewton::add_product(const std::vector<Tensor>& v, std::vector<Tensor>& out) const {
  const auto along = pull_back(transposed_, selected(v, index_, params_), gradient_edges(outputs_.u()));
  add(pull_back(outputs_.z(), outputs_.curve(along), gradient_edges(params_)), out);
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
