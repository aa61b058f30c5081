#include "chain.h"

#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>
#include <typeinfo>

namespace samlite {

namespace {

struct Tap : torch::autograd::Function<Tap> {
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& a, const Tensor& eta) {
    context->save_for_backward({eta});
    return a.view_as(a);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    return {gradients[0] + context->get_saved_variables()[0], Tensor()};
  }
};

// (n,) as (n, 1, ..., 1), so that it broadcasts against sample-first tensors of so many dimensions.
Tensor per_sample(const Tensor& scale, int64_t dim) {
  std::vector<int64_t> shape(dim, 1);
  shape[0] = scale.size(0);
  return scale.view(shape);
}

}  // namespace

Tensor Layout::first(const Tensor& t) const {
  if (places.defined()) {
    const Tensor rows = t.movedim(dim, 0);
    auto shape = rows.sizes().vec();
    shape[0] = n * inner;
    const Tensor padded = at::zeros(shape, t.options()).index_copy_(0, places, rows);
    shape[0] = inner;
    shape.insert(shape.begin(), n);
    return padded.view(shape);
  }
  if (outer == 1 && inner == 1) return t.movedim(dim, 0);
  auto shape = t.sizes().vec();
  shape.erase(shape.begin() + dim);
  shape.insert(shape.begin() + dim, {outer, n, inner});
  return t.reshape(shape).movedim(dim + 1, 0);
}

Tensor Layout::back(const Tensor& t, const Tensor& like) const {
  if (places.defined()) return t.flatten(0, 1).index_select(0, places).movedim(0, dim);
  return outer == 1 && inner == 1 ? t.movedim(0, dim) : t.movedim(0, dim + 1).reshape(like.sizes());
}

std::tuple<Tensor, Tensor> tap(const Tensor& a) {
  Tensor eta = at::zeros_like(a).requires_grad_();
  return {Tap::apply(a, eta), eta};
}

Site::Site(std::optional<Tensor> a, std::optional<Tensor> eta, const Tensor& z, Layout layout)
    : a_(a.value_or(Tensor())), eta_(eta.value_or(Tensor())), z_(gradient_edge(z)), layout_(layout) {}

Chain::Chain(const Tensor& loss, std::vector<std::shared_ptr<Site>> sites, int64_t n, std::vector<Tensor> params,
             std::optional<Outputs> outputs)
    : n_(n),
      params_(std::move(params)),
      outputs_(std::move(outputs)),
      rows_(params_.size(), false),
      grams_(params_.size()) {
  if (!loss.requires_grad()) return;
  std::vector<Edge> edges;
  for (const auto& site : sites) edges.push_back(site->z_);
  c10::AutoGradMode grad(true);
  // For Gauss-Newton matrices, delta = J^T u of the outputs' stand-in u instead of the loss.
  const auto deltas = outputs_ ? pull_back(outputs_->z(), outputs_->u(), edges, /*create_graph=*/true)
                               : pull_back({loss}, {at::ones_like(loss)}, edges, /*create_graph=*/true);
  check_differentiable(deltas);
  for (size_t i = 0; i < sites.size(); ++i) {
    if (!deltas[i].defined()) continue;  // its output is not used
    auto& site = *sites[i];
    site.delta_ = deltas[i];
    site.delta_first_ = site.layout_.first(site.delta_.detach());
    if (site.a_.defined()) site.a_first_ = site.layout_.first(site.a_.detach());
    sites_.push_back(sites[i]);
  }
  for (size_t p = 0; p < params_.size(); ++p) choose_rows(static_cast<int64_t>(p));
}

// A parameter is kept as rows where that takes fewer operations, and all its uses see the same matrix.
void Chain::choose_rows(int64_t param) {
  const Use* first = nullptr;
  const Site* only = nullptr;
  int64_t positions = 0, uses = 0;
  for (const auto& site : sites_)
    for (const auto& use : site->uses_) {
      if (use->param() != param) continue;
      if (!first) first = use.get();
      const bool same = typeid(*use) == typeid(*first) && use->view().same_place(first->view());
      if (!use->matrix() || !same) return;
      positions += use->matrix()->positions(site->delta_first_);
      only = site.get();
      ++uses;
    }
  if (!first || first->matrix()->gram_cost(positions) >= first->matrix()->materialised_cost()) return;
  rows_[param] = true;
  if (uses > 1) return;
  const Tensor a = first->matrix()->input_rows(only->a_first_);
  const Tensor delta = first->matrix()->output_rows(only->delta_first_);
  grams_[param] = {inner_products(delta, delta), inner_products(a, a)};
}

std::vector<Tensor> Chain::held() const {
  std::vector<Tensor> result;
  for (const auto& site : sites_)
    append(result, {site->a_, site->eta_, site->delta_, site->a_first_, site->delta_first_});
  for (const auto& gram : grams_) append(result, {gram.delta, gram.a});
  if (outputs_) outputs_->add_held(result);
  return result;
}

// Two directions at a time, the old and the new one: of a parameter as a whole for each sample, or as rows.
int64_t Chain::step_bytes() const {
  double numbers = 0;
  for (size_t p = 0; p < params_.size(); ++p)
    if (!rows_[p]) numbers += static_cast<double>(n_ * params_[p].numel());
  for (const auto& site : sites_)
    for (const auto& use : site->uses_) {
      if (!rows_[use->param()]) continue;
      const Matrix& matrix = *use->matrix();
      numbers += 2 * static_cast<double>(n_) * matrix.gram_cost(matrix.positions(site->delta_first_));
    }
  return static_cast<int64_t>(2 * numbers * static_cast<double>(params_[0].element_size()));
}

Tensor Chain::response(const Site& site, const Directions& v) const {
  Tensor result;
  for (const auto& use : site.uses_) accumulate(result, v[use->param()]->apply(*use, site.a_first_, site.delta_first_));
  return result;
}

Tensor Chain::adjoint(const Site& site, const Directions& v) const {
  Tensor result;
  for (const auto& use : site.uses_)
    if (use->varies_with_a()) accumulate(result, v[use->param()]->adjoint(*use, site.a_first_, site.delta_first_));
  return result;
}

// One reverse pass: from the layers' linear responses to the direction, to the derivatives along it.
std::vector<Derivatives> Chain::derivatives(const Directions& v) const {
  std::vector<Tensor> roots, cotangents;
  std::vector<Edge> edges;
  const auto add = [&](const Site& site, const Tensor& root, const Tensor& cotangent) {
    roots.push_back(root);
    cotangents.push_back(site.layout_.back(cotangent, root));
  };
  for (const auto& site : sites_) {
    if (site->delta_.requires_grad()) add(*site, site->delta_, response(*site, v));
    edges.push_back(site->z_);
    if (!site->eta_.defined()) continue;
    const Tensor at_a = adjoint(*site, v);
    if (at_a.defined() && site->a_.requires_grad()) add(*site, site->a_, at_a);
    edges.push_back(gradient_edge(site->eta_));
  }
  const auto captured = at_edges(roots, cotangents, edges);
  std::vector<Derivatives> dots;
  size_t next = 0;
  const auto take = [&](const Site& site) {
    const Tensor& dot = captured[next++];
    return dot.defined() ? site.layout_.first(dot) : Tensor();
  };
  for (const auto& site : sites_) {
    Derivatives dot{take(*site), {}};
    if (site->eta_.defined()) dot.a = take(*site);
    dots.push_back(dot);
  }
  return dots;
}

// Cotangents at the layers' linear responses to the derivatives at the edges: at once, or by way of the outputs.
std::vector<Tensor> Chain::at_edges(const std::vector<Tensor>& roots, const std::vector<Tensor>& cotangents,
                                    const std::vector<Edge>& edges) const {
  if (!outputs_) return pull_back(roots, cotangents, edges);
  const auto along = pull_back(roots, cotangents, gradient_edges(outputs_->u()));
  return pull_back(outputs_->z(), outputs_->curve(along), edges);
}

void Chain::divide(std::vector<Derivatives>& dots, const Tensor& by) const {
  for (auto& dot : dots)
    for (auto* t : {&dot.delta, &dot.a})
      if (t->defined()) *t = *t / per_sample(by, t->dim());
}

// Powers of small Hessians reach denormal numbers, which are a hundred times slower on a CPU: each sample's derivatives
// are scaled to a norm of 1. Returns the scale: (n,).
Tensor Chain::normalise(std::vector<Derivatives>& dots) const {
  Tensor square;
  for (const auto& dot : dots)
    for (const auto& t : {dot.delta, dot.a})
      if (t.defined()) accumulate(square, at::linalg_vector_norm(t.reshape({n_, -1}), 2, at::IntArrayRef{1}).square());
  if (!square.defined()) return ones();
  Tensor scale = square.sqrt();
  scale.masked_fill_(scale == 0, 1);
  divide(dots, scale);
  return scale;
}

// Each sample's derivatives over the largest of them, which is returned: (n,). Squares of small ones underflow.
Tensor Chain::shrink(std::vector<Derivatives>& dots) const {
  Tensor largest = at::zeros_like(ones());
  for (const auto& dot : dots)
    for (const auto& t : {dot.delta, dot.a})
      if (t.defined()) largest = at::maximum(largest, t.abs().reshape({n_, -1}).amax(1));
  largest.masked_fill_(largest == 0, 1);
  divide(dots, largest);
  return largest;
}

Directions Chain::directions(const std::vector<Derivatives>& dots) const {
  Directions result(params_.size());
  for (size_t s = 0; s < sites_.size(); ++s) {
    const Site& site = *sites_[s];
    for (const auto& use : site.uses_) {
      const Derivatives dot{dots[s].delta, use->varies_with_a() ? dots[s].a : Tensor()};
      if (!dot.delta.defined() && !dot.a.defined()) continue;
      const int64_t p = use->param();
      auto& direction = result[p];
      if (!direction && rows_[p]) direction = std::make_unique<OuterProducts>(grams_[p]);
      if (!direction)
        direction = std::make_unique<Whole>(at::zeros({n_, params_[p].numel()}, site.delta_first_.options()));
      direction->add(*use, site.a_first_, site.delta_first_, dot);
    }
  }
  for (size_t p = 0; p < params_.size(); ++p)
    if (!result[p])
      result[p] = std::make_unique<Whole>(at::zeros({params_[p].numel()}, params_[p].options().requires_grad(false)));
  return result;
}

// out += sum_i scale_i (delta_i' a_i^T + delta_i a_i'^T): of a parameter that `v` holds whole by one product with
// that, else by one ordinary product of matrices a layer.
void Chain::add_sum(const std::vector<Derivatives>& dots, const Directions& v, const Tensor& scale,
                    std::vector<Tensor>& out) const {
  const auto scaled = [&](const Tensor& t) {
    return t.defined() && scale.defined() ? t * per_sample(scale, t.dim()) : t;
  };
  std::vector<bool> done(params_.size(), false);
  for (size_t p = 0; p < v.size(); ++p) done[p] = v[p]->add_sum(scale, out[p]);
  for (size_t s = 0; s < sites_.size(); ++s) {
    const Site& site = *sites_[s];
    const auto& uses = site.uses_;
    if (std::all_of(uses.begin(), uses.end(), [&](const auto& use) { return done[use->param()]; })) continue;
    const Tensor delta_dot = scaled(dots[s].delta), a_dot = scaled(dots[s].a);
    for (const auto& use : uses) {
      if (done[use->param()]) continue;
      const Tensor target = use->view().of(out[use->param()]);
      if (delta_dot.defined()) target.add_(use->gradient(site.a_first_, delta_dot, Reduction::sum));
      if (a_dot.defined() && use->varies_with_a())
        target.add_(use->gradient_along(a_dot, site.delta_first_, Reduction::sum));
    }
  }
}

Directions Chain::shared(const Tensor& v) const {
  Directions result;
  for (const auto& part : views(v, params_)) result.push_back(std::make_unique<Whole>(part.flatten()));
  return result;
}

void Chain::add(const Tensor& v, Tensor& out) {
  Directions direction = shared(v);
  Tensor scale;
  for (int64_t k = 0; k < out.size(0); ++k) {
    auto dots = derivatives(direction);
    std::vector<Tensor> sums;
    for (const auto& part : views(out[k], params_)) sums.push_back(part.flatten());
    if (k + 1 == out.size(0)) return add_sum(dots, {}, scale, sums);
    const Tensor factor = normalise(dots);
    scale = scale.defined() ? scale * factor : factor;
    direction = directions(dots);
    add_sum(dots, direction, scale, sums);
  }
}

Tensor Chain::slope(const Directions& v) const {
  Tensor sum = at::zeros_like(ones());
  for (const auto& site : sites_) sum += (site->delta_first_ * response(*site, v)).reshape({n_, -1}).sum(1);
  return sum;
}

Tensor Chain::slopes(const Tensor& v) const { return outputs_ ? ones().mul_(NAN) : slope(shared(v)); }

// The gradient of a sample is a direction with delta in place of delta', and no a'.
Tensor Chain::ascent() const {
  if (outputs_) return ones().mul_(NAN);
  std::vector<Derivatives> dots;
  for (const auto& site : sites_) dots.push_back({site->delta_first_, Tensor()});
  shrink(dots);
  normalise(dots);
  const auto gradient = directions(dots);
  auto along = derivatives(gradient);
  const Tensor size = shrink(along);
  return slope(directions(along)) / slope(gradient) * size;
}

}  // namespace samlite
