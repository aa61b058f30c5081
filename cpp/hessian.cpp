#include "hessian.h"

#include <torch/csrc/autograd/autograd.h>

namespace samlite {

Gradient::Gradient(const Tensor& loss, const std::vector<Tensor>& params) {
  if (!loss.requires_grad()) return;  // does not depend on the parameters: zero curvature
  c10::AutoGradMode grad(true);
  const auto gradients = torch::autograd::grad({loss}, params, {}, /*retain_graph=*/true, /*create_graph=*/true,
                                               /*allow_unused=*/true);
  for (size_t i = 0; i < params.size(); ++i) {
    if (gradients[i].defined() && gradients[i].requires_grad()) {
      gradients_.push_back(gradients[i]);
      index_.push_back(i);
    }
  }
}

// d(g . v)/dw: reverse mode over the graph of the gradient.
void Gradient::add_product(const std::vector<Tensor>& params, const std::vector<Tensor>& v,
                           std::vector<Tensor>& out) const {
  if (gradients_.empty()) return;
  std::vector<Tensor> directions;
  for (const auto i : index_) directions.push_back(v[i]);
  const auto products = torch::autograd::grad(gradients_, params, directions, /*retain_graph=*/true,
                                              /*create_graph=*/false, /*allow_unused=*/true);
  for (size_t i = 0; i < params.size(); ++i)
    if (products[i].defined()) out[i].add_(products[i]);
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

Hessian::Hessian(std::vector<Tensor> params, Losses losses, int64_t memory, std::function<void()> check_signals)
    : params_(std::move(params)),
      graphs_(
          losses.rewind,
          [this, next = losses.next]() -> std::optional<Graphs<Gradient>::Batch> {
            const auto item = next();
            if (!item) return std::nullopt;
            const auto& [loss, weight] = *item;
            return Graphs<Gradient>::Batch{Gradient(loss, params_), loss, weight};
          },
          params_.at(0).device(), memory, std::move(check_signals)) {
  for (const auto& p : params_) numel_ += p.numel();
}

Tensor Hessian::apply(const Tensor& v) {
  Tensor out = at::zeros_like(v);
  const auto directions = views(v, params_);
  auto sums = views(out, params_);
  graphs_.pass([&](const Gradient& graph) { graph.add_product(params_, directions, sums); });
  return out.div_(graphs_.weight());
}

}  // namespace samlite
