#include "moments.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "ritz.h"

namespace samlite {

void BatchHessian::add(const Tensor& v, Tensor& out) {
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

Moments::Moments(std::vector<Tensor> params, std::function<void(int64_t)> rewind, Next<SampleHessians> next,
                 bool batches, int64_t memory, int64_t exponent, std::function<void()> check_signals, Sum sum)
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
  const int unknown = std::numeric_limits<int>::min();
  const Tensor v = random_vector(numel_, at::detail::createCPUGenerator(0), params_[0].options().requires_grad(false));
  const auto exponent = [&](int64_t order) {
    const double size = safe_norm(apply(v, order)[order - 1]).item<double>();
    check_finite(size, order);
    return size > 0 ? static_cast<int>(std::ilogb(size) / order) : unknown;
  };
  const auto safe = [&](int size) { return size == unknown || std::abs(size) <= far; };
  int size = exponent(1);
  if (safe(size)) size = std::max(size, exponent(2));
  return safe(size) ? exponent_ : exponent_ + size;
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

Tensor Moments::slopes(const Tensor& v) {
  std::vector<Tensor> parts;
  int64_t samples = 0;
  graphs_.pass([&](const auto& graph) {
    parts.push_back(graph->slopes(v));
    samples += graph->samples();
  });
  total(samples);
  return at::cat(parts).to(at::kDouble).mul_(std::ldexp(share(), static_cast<int>(exponent_)));
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
