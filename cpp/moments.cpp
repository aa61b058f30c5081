#include "moments.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/engine.h>

#include <algorithm>
#include <limits>

#include "ritz.h"

namespace samlite {

namespace {

using torch::autograd::Edge;

// Cotangents at the roots pulled back to the edges; undefined where nothing arrives.
std::vector<Tensor> pull_back(const std::vector<Tensor>& roots, const std::vector<Tensor>& cotangents,
                              const std::vector<Edge>& edges, bool create_graph) {
  if (roots.empty()) return std::vector<Tensor>(edges.size());
  torch::autograd::edge_list root_edges;
  for (const auto& root : roots) root_edges.push_back(torch::autograd::impl::gradient_edge(root));
  return torch::autograd::Engine::get_default_engine().execute(root_edges, cotangents, /*keep_graph=*/true,
                                                               create_graph, /*accumulate_grad=*/false, edges);
}

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

void accumulate(Tensor& sum, const Tensor& term) { sum = sum.defined() ? sum + term : term; }

// x y^T of each sample, (n, p, i) and (n, q, i) -> (n, p, q). Batches of tiny products of matrices are slow.
Tensor inner_products(const Tensor& x, const Tensor& y) {
  if (x.size(1) == 1 && y.size(1) == 1) return (x * y).sum(2, /*keepdim=*/true);
  return x.bmm(y.mT());
}

// sum += g y of each sample, (n, p, q) and (n, q, o) -> (n, p, o).
void add_combination(Tensor& sum, const Tensor& g, const Tensor& y) {
  if (g.size(2) == 1) {
    sum = sum.defined() ? sum.addcmul_(g, y) : g * y;
  } else {
    sum = sum.defined() ? sum.baddbmm_(g, y) : g.bmm(y);
  }
}

// (n,) as (n, 1, ..., 1), so that it broadcasts against sample-first tensors of so many dimensions.
Tensor per_sample(const Tensor& scale, int64_t dim) {
  std::vector<int64_t> shape(dim, 1);
  shape[0] = scale.size(0);
  return scale.view(shape);
}

}  // namespace

Tensor Layout::first(const Tensor& t) const {
  if (outer == 1 && inner == 1) return t.movedim(dim, 0);
  auto shape = t.sizes().vec();
  shape.erase(shape.begin() + dim);
  shape.insert(shape.begin() + dim, {outer, n, inner});
  return t.reshape(shape).movedim(dim + 1, 0);
}

Tensor Layout::back(const Tensor& t, const Tensor& like) const {
  return outer == 1 && inner == 1 ? t.movedim(0, dim) : t.movedim(0, dim + 1).reshape(like.sizes());
}

std::tuple<Tensor, Tensor> tap(const Tensor& a) {
  Tensor eta = at::zeros_like(a).requires_grad_();
  return {Tap::apply(a, eta), eta};
}

Site::Site(std::optional<Tensor> a, std::optional<Tensor> eta, const Tensor& z, Layout layout)
    : a_(a.value_or(Tensor())),
      eta_(eta.value_or(Tensor())),
      z_(torch::autograd::impl::gradient_edge(z)),
      layout_(layout) {}

Chain::Chain(const Tensor& loss, std::vector<std::shared_ptr<Site>> sites, int64_t n, std::vector<Tensor> params,
             std::optional<Outputs> outputs)
    : n_(n), params_(std::move(params)), outputs_(std::move(outputs)), rows_(params_.size(), false) {
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
  aa_.resize(params_.size());
  dd_.resize(params_.size());
  for (size_t p = 0; p < params_.size(); ++p) {
    const Use* common = nullptr;
    const Site* only = nullptr;
    int64_t positions = 0, uses = 0;
    bool rows = true;
    for (const auto& site : sites_)
      for (const auto& use : site->uses_) {
        if (use.param != static_cast<int64_t>(p)) continue;
        rows = rows && use.has_rows() && (!common || use.same_view(*common));
        common = &use;
        only = site.get();
        ++uses;
        if (rows) positions += use.positions(site->delta_first_);
      }
    rows_[p] = rows && common && common->gram_cost(positions) < common->materialised_cost();
    if (!rows_[p] || uses > 1) continue;
    const Tensor a = common->input_rows(only->a_first_), delta = common->output_rows(only->delta_first_);
    aa_[p] = inner_products(a, a);
    dd_[p] = inner_products(delta, delta);
  }
}

std::vector<Tensor> Chain::held() const {
  std::vector<Tensor> result;
  const auto add = [&](const std::vector<Tensor>& tensors) {
    for (const auto& tensor : tensors)
      if (tensor.defined()) result.push_back(tensor);
  };
  for (const auto& site : sites_) add({site->a_, site->eta_, site->delta_, site->a_first_, site->delta_first_});
  add(aa_);
  add(dd_);
  if (outputs_) outputs_->add_held(result);
  return result;
}

// Two directions at a time, the old and the new one: of a parameter as a whole for each sample, or as rows.
int64_t Chain::step_bytes() const {
  double numbers = 0;
  for (size_t p = 0; p < params_.size(); ++p)
    if (!rows_[p]) numbers += static_cast<double>(n_ * params_[p].numel());
  for (const auto& site : sites_)
    for (const auto& use : site->uses_)
      if (rows_[use.param]) numbers += 2 * static_cast<double>(n_) * use.gram_cost(use.positions(site->delta_first_));
  return static_cast<int64_t>(2 * numbers * static_cast<double>(params_[0].element_size()));
}

Tensor Chain::response(const Site& site, const std::vector<Direction>& direction) const {
  const Tensor &a = site.a_first_, &delta = site.delta_first_;
  Tensor result;
  for (const auto& use : site.uses_) {
    const auto& [shared, whole, rows] = direction[use.param];
    if (rows.empty()) {
      const bool per_sample = whole.defined();
      const Tensor theta = per_sample ? use.view_per_sample(whole) : use.view(shared);
      accumulate(result, use.apply(theta, a, delta, per_sample));
      continue;
    }
    const Tensor inputs = use.input_rows(a);
    Tensor outputs;
    for (const auto& [left, right, is_delta, is_a] : rows)
      add_combination(outputs, is_a ? aa_[use.param] : inner_products(inputs, right), left);
    accumulate(result, use.to_output(outputs, delta));
  }
  return result;
}

// One reverse pass: from the layers' linear responses to the direction, to the derivatives along it.
std::vector<Chain::Dots> Chain::step(const std::vector<Direction>& direction) const {
  std::vector<Tensor> roots, cotangents;
  std::vector<Edge> edges;
  for (const auto& site : sites_) {
    Tensor at_a;
    const bool wants_a = site->eta_.defined();
    for (const auto& use : site->uses_) {
      if (!wants_a || !use.varies_with_a()) continue;
      const auto& [shared, whole, rows] = direction[use.param];
      const Tensor &a = site->a_first_, &delta = site->delta_first_;
      if (rows.empty()) {
        const bool per_sample = whole.defined();
        const Tensor theta = per_sample ? use.view_per_sample(whole) : use.view(shared);
        accumulate(at_a, use.adjoint(theta, a, delta, per_sample));
        continue;
      }
      const Tensor outputs = use.output_rows(delta);
      Tensor inputs;
      for (const auto& [left, right, is_delta, is_a] : rows)
        add_combination(inputs, is_delta ? dd_[use.param] : inner_products(outputs, left), right);
      accumulate(at_a, use.to_input(inputs, a));
    }
    if (site->delta_.requires_grad()) {
      roots.push_back(site->delta_);
      cotangents.push_back(site->layout_.back(response(*site, direction), site->delta_));
    }
    if (at_a.defined() && site->a_.requires_grad()) {
      roots.push_back(site->a_);
      cotangents.push_back(site->layout_.back(at_a, site->a_));
    }
    edges.push_back(site->z_);
    if (wants_a) edges.push_back(torch::autograd::impl::gradient_edge(site->eta_));
  }
  const auto captured = responses(roots, cotangents, edges);
  std::vector<Dots> dots;
  size_t next = 0;
  for (const auto& site : sites_) {
    Dots dot;
    if (captured[next].defined()) dot.delta = site->layout_.first(captured[next]);
    ++next;
    if (site->eta_.defined()) {
      if (captured[next].defined()) dot.a = site->layout_.first(captured[next]);
      ++next;
    }
    dots.push_back(dot);
  }
  return dots;
}

// Cotangents at the layers' linear responses to the derivatives at the edges: at once, or by way of the outputs.
std::vector<Tensor> Chain::responses(const std::vector<Tensor>& roots, const std::vector<Tensor>& cotangents,
                                     const std::vector<Edge>& edges) const {
  if (!outputs_) return pull_back(roots, cotangents, edges, /*create_graph=*/false);
  std::vector<Edge> stand_ins;
  for (const auto& u : outputs_->u()) stand_ins.push_back(torch::autograd::impl::gradient_edge(u));
  const auto along = pull_back(roots, cotangents, stand_ins, /*create_graph=*/false);
  return pull_back(outputs_->z(), outputs_->curve(along), edges, /*create_graph=*/false);
}

// Powers of small Hessians reach denormal numbers, which are a hundred times slower on a CPU: each sample's derivatives
// are scaled to a norm of 1. Returns the scale: (n,).
Tensor Chain::normalise(std::vector<Dots>& dots) const {
  Tensor square;
  for (const auto& dot : dots)
    for (const auto& t : {dot.delta, dot.a})
      if (t.defined()) accumulate(square, at::linalg_vector_norm(t.reshape({n_, -1}), 2, at::IntArrayRef{1}).square());
  if (!square.defined()) return at::ones({n_}, params_[0].options().requires_grad(false));
  Tensor scale = square.sqrt();
  scale.masked_fill_(scale == 0, 1);
  for (auto& dot : dots)
    for (auto* t : {&dot.delta, &dot.a})
      if (t->defined()) *t = *t / per_sample(scale, t->dim());
  return scale;
}

std::vector<Chain::Direction> Chain::directions(const std::vector<Dots>& dots) const {
  std::vector<Direction> result(params_.size());
  for (size_t s = 0; s < sites_.size(); ++s) {
    const auto& [delta_dot, a_dot] = dots[s];
    const Tensor &a = sites_[s]->a_first_, &delta = sites_[s]->delta_first_;
    for (const auto& use : sites_[s]->uses_) {
      const bool through_a = a_dot.defined() && use.varies_with_a();
      auto& direction = result[use.param];
      if (rows_[use.param]) {
        const bool only = aa_[use.param].defined();
        if (delta_dot.defined()) direction.rows.push_back({use.output_rows(delta_dot), use.input_rows(a), false, only});
        if (through_a) direction.rows.push_back({use.output_rows(delta), use.input_rows(a_dot), only, false});
        continue;
      }
      const auto add = [&](const Tensor& gradient) {
        const int64_t numel = params_[use.param].numel();
        if (!direction.whole.defined()) direction.whole = at::zeros({n_, numel}, gradient.options());
        use.view_per_sample(direction.whole).add_(gradient);
      };
      if (delta_dot.defined()) add(use.gradient(a, delta_dot, true));
      if (through_a) add(use.gradient_along(a_dot, delta, true));
    }
  }
  for (size_t p = 0; p < params_.size(); ++p)
    if (result[p].rows.empty() && !result[p].whole.defined())
      result[p].shared = at::zeros({params_[p].numel()}, params_[p].options().requires_grad(false));
  return result;
}

// out += sum_i scale_i (delta_i' a_i^T + delta_i a_i'^T): of a parameter that `direction` holds whole by one product
// with that, else by one ordinary product of matrices a layer.
void Chain::add_mean(const std::vector<Dots>& dots, const std::vector<Direction>& direction, const Tensor& scale,
                     std::vector<Tensor>& out) const {
  const auto scaled = [&](const Tensor& t) {
    return t.defined() && scale.defined() ? t * per_sample(scale, t.dim()) : t;
  };
  const auto is_whole = [&](int64_t p) { return !direction.empty() && direction[p].whole.defined(); };
  for (size_t p = 0; p < params_.size(); ++p)
    if (is_whole(p)) out[p].add_(scale.matmul(direction[p].whole));
  for (size_t s = 0; s < sites_.size(); ++s) {
    const auto& uses = sites_[s]->uses_;
    if (std::all_of(uses.begin(), uses.end(), [&](const Use& use) { return is_whole(use.param); })) continue;
    const Tensor delta_dot = scaled(dots[s].delta), a_dot = scaled(dots[s].a);
    const Tensor &a = sites_[s]->a_first_, &delta = sites_[s]->delta_first_;
    for (const auto& use : uses) {
      if (is_whole(use.param)) continue;
      const Tensor target = use.view(out[use.param]);
      if (delta_dot.defined()) target.add_(use.gradient(a, delta_dot, false));
      if (a_dot.defined() && use.varies_with_a()) target.add_(use.gradient_along(a_dot, delta, false));
    }
  }
}

void Chain::add(const Tensor& v, Tensor& out) {
  std::vector<Direction> direction;
  for (const auto& part : views(v, params_)) direction.push_back({part.flatten(), {}, {}});
  Tensor scale;
  for (int64_t k = 0; k < out.size(0); ++k) {
    auto dots = step(direction);
    std::vector<Tensor> sums;
    for (const auto& part : views(out[k], params_)) sums.push_back(part.flatten());
    if (k + 1 == out.size(0)) return add_mean(dots, {}, scale, sums);
    const Tensor factor = normalise(dots);
    scale = scale.defined() ? scale * factor : factor;
    direction = directions(dots);
    add_mean(dots, direction, scale, sums);
  }
}

Tensor Chain::slope(const std::vector<Direction>& direction) const {
  Tensor sum = at::zeros({n_}, params_[0].options().requires_grad(false));
  for (const auto& site : sites_) sum += (site->delta_first_ * response(*site, direction)).reshape({n_, -1}).sum(1);
  return sum;
}

// Each sample's derivatives over the largest of them, which is returned: (n,). Squares of small ones underflow.
Tensor Chain::shrink(std::vector<Dots>& dots) const {
  Tensor largest = at::zeros({n_}, params_[0].options().requires_grad(false));
  for (const auto& dot : dots)
    for (const auto& t : {dot.delta, dot.a})
      if (t.defined()) largest = at::maximum(largest, t.abs().reshape({n_, -1}).amax(1));
  largest.masked_fill_(largest == 0, 1);
  for (auto& dot : dots)
    for (auto* t : {&dot.delta, &dot.a})
      if (t->defined()) *t = *t / per_sample(largest, t->dim());
  return largest;
}

// The gradient of a sample is a direction with delta in place of delta', and no a'.
Tensor Chain::ascent() const {
  if (outputs_) return at::full({n_}, NAN, params_[0].options().requires_grad(false));
  std::vector<Dots> dots;
  for (const auto& site : sites_) dots.push_back({site->delta_first_, Tensor()});
  shrink(dots);
  normalise(dots);
  const auto gradient = directions(dots);
  auto along = step(gradient);
  const Tensor size = shrink(along);
  return slope(directions(along)) / slope(gradient) * size;
}

void Whole::add(const Tensor& v, Tensor& out) {
  if (mean_ && weight_ == 0) return;  // no sample in it counts
  Tensor u = v;
  for (int64_t k = 0; k < out.size(0); ++k) {
    Tensor next = at::zeros_like(u);
    auto sums = views(next, params_);
    curvature_->add_product(views(u, params_), sums);
    if (unit_ != 1) next.mul_(1 / unit_);
    u = mean_ ? next.div_(weight_) : next;
    out[k].add_(u, mean_ ? weight_ : 1);
  }
}

Moments::Moments(std::vector<Tensor> params, std::function<void(int64_t)> rewind, Next<Powers> next, bool batches,
                 int64_t memory, int64_t exponent, std::function<void()> check_signals, Sum sum)
    : params_(std::move(params)),
      batches_(batches),
      exponent_(exponent),
      graphs_(std::move(rewind), stream(std::move(next)), params_.at(0).device(), memory, std::move(check_signals),
              std::move(sum)) {
  for (const auto& p : params_) numel_ += p.numel();
}

// Sample i's loss is scaled so that H = (1/n) sum_i H_i, whatever the denominator of the mean loss.
Tensor Moments::apply(const Tensor& v, int64_t order) {
  Tensor out = at::zeros({order, v.numel()}, v.options());
  int64_t samples = 0;
  graphs_.pass([&](const auto& graph) {
    graph->add(v, out);
    samples += graph->samples();
  });
  graphs_.sum(out);
  if (batches_) return out.div_(graphs_.weight());
  const double n = total(samples);
  int power = 0;
  const double mantissa = 2 * std::frexp(share(), &power);  // its power of two is in exponent()
  for (int64_t k = 0; k < order; ++k) out[k].mul_(std::pow(mantissa, static_cast<double>(k + 1)) / n);
  return out;
}

double Moments::total(int64_t samples) {
  if (!samples_) samples_ = graphs_.summed(static_cast<double>(samples));
  return *samples_;
}

double Moments::share() { return *samples_ / graphs_.weight(); }

int64_t Moments::exponent() {
  if (batches_) return exponent_;
  if (!samples_) apply(at::zeros({numel_}, params_[0].options().requires_grad(false)), 1);
  return exponent_ + std::ilogb(share());
}

// |M v| of a Gaussian v is about the Frobenius norm of M. The Hessians of samples may cancel in M_1, but not in M_2.
// Orders up to 8 of a matrix within 2^12 of one are safe in float32.
int64_t Moments::suitable_exponent() {
  const int far = 12;
  const Tensor v = random_vector(numel_, at::detail::createCPUGenerator(0), params_[0].options().requires_grad(false));
  const auto exponent = [&](int64_t order) {
    const double size = safe_norm(apply(v, order)[order - 1]).item<double>();
    check_finite(size, order);
    return size > 0 ? static_cast<int>(std::ilogb(size) / order) : std::numeric_limits<int>::min();
  };
  int found = exponent(1);
  if (found == std::numeric_limits<int>::min() || std::abs(found) <= far) found = std::max(found, exponent(2));
  if (found == std::numeric_limits<int>::min() || std::abs(found) <= far) return exponent_;
  return exponent_ + found;
}

double Moments::ascent() {
  Tensor sum, count;
  int64_t samples = 0;
  graphs_.pass([&](const auto& graph) {
    const Tensor quotients = graph->ascent();
    accumulate(sum, quotients.nansum());
    accumulate(count, quotients.isfinite().sum());
    samples += graph->samples();
  });
  sum = sum.contiguous().view({1});
  const Tensor counted = count.to(sum.scalar_type()).view({1});
  graphs_.sum(sum);
  graphs_.sum(counted);
  total(samples);
  return std::ldexp((sum / counted).item<double>() * share(), static_cast<int>(exponent_));
}

void OfMoments::see(const Tensor& size, const Tensor& v) {
  const Tensor unit = size / at::linalg_vector_norm(v);
  size_ = size_.defined() ? at::fmax(size_, unit) : unit;
}

Tensor Centred::apply(const Tensor& v) {
  const Tensor moments = moments_->apply(v, order_);
  Tensor power = moments[0];
  for (int64_t k = 1; k < order_; ++k) power = moments_->apply(power, 1)[0];
  see(at::fmax(safe_norm(moments[order_ - 1]), safe_norm(power)), v);
  return moments[order_ - 1] - power;
}

Tensor Mixture::apply(const Tensor& v) {
  const auto order = static_cast<int64_t>(coefficients_.size()) - 1;
  Tensor out = v * coefficients_[0];
  if (order == 0) return out;
  const Tensor moments = moments_->apply(v, order);
  Tensor size = safe_norm(out);
  for (int64_t k = 1; k <= order; ++k) {
    out.add_(moments[k - 1], coefficients_[k]);
    size = size + safe_norm(moments[k - 1]) * std::abs(coefficients_[k]);
  }
  see(size, v);
  return out;
}

}  // namespace samlite
