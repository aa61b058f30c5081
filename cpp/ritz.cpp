#include "ritz.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace samlite {

Tensor CountedMatVec::operator()(const Tensor& v) {
  Tensor w = apply_(v);
  TORCH_CHECK_VALUE(w.sizes() == v.sizes() && w.scalar_type() == v.scalar_type() && w.device() == v.device(),
                    "the product must be like its vector, ", v.toString(), v.sizes(), " on ", v.device(), ", got ",
                    w.toString(), w.sizes(), " on ", w.device());
  ++count_;
  if (unit_ == 0) measure(v, w);
  if (unit_ == 0) return at::zeros_like(w);  // beside any larger product it is
  return unit_ == 1 ? w : w.mul(1 / unit_);
}

void CountedMatVec::measure(const Tensor& v, const Tensor& w) {
  const auto largest = [](const Tensor& t) { return at::linalg_vector_norm(t, INFINITY); };
  const Tensor sizes = at::stack({largest(v), largest(w)}).to(at::kCPU, at::kDouble);
  if (!std::isfinite(sizes.const_data_ptr<double>()[0])) return;  // behind a breakdown, which a solver sees later
  const bool is_double = w.scalar_type() == at::kDouble;
  const int64_t margin = 16;  // in powers of two: for what is smaller than the product on the way to it
  least_ = std::ldexp(is_double ? std::numeric_limits<double>::min() : std::numeric_limits<float>::min(), margin);
  const double size = sizes.const_data_ptr<double>()[1];
  check_finite(size, count_);
  largest_ = std::max(largest_, size);
  if (largest_ < least_) return;
  const int64_t most = is_double ? std::numeric_limits<double>::max_exponent : std::numeric_limits<float>::max_exponent;
  unit_ = std::ldexp(1, static_cast<int>(std::min<int64_t>(std::ilogb(largest_), most - margin)));
}

double CountedMatVec::unit() const {
  TORCH_CHECK_VALUE(unit_ > 0 || largest_ == 0, "the product H v must not underflow, got at most ", largest_,
                    " where numbers below ", least_, " lose digits; multiply the loss by a power of two",
                    least_ > 1e-100 ? ", or measure in float64" : "");
  return unit_ > 0 ? unit_ : 1;
}

void Eigenpairs::multiply(double unit) {
  for (auto* numbers : {&values, &errors, &residuals})
    for (auto& number : *numbers) number *= unit;
}

Tensor random_vector(int64_t p, at::Generator generator, const at::TensorOptions& options) {
  return at::randn({p}, std::move(generator), options.device(at::kCPU)).to(options.device());
}

Tensor safe_norm(const Tensor& v) {
  const Tensor largest = at::linalg_vector_norm(v, INFINITY);
  return at::linalg_vector_norm(v / at::where(largest > 0, largest, 1)) * largest;
}

void orthonormalise(Tensor v, const Tensor& X) {
  v.div_(at::linalg_vector_norm(v));
  for (int pass = 0; pass < 2; ++pass) {
    v.addmv_(X.t(), X.mv(v), 1, -1);
    v.div_(at::linalg_vector_norm(v));
  }
}

std::vector<double> to_vector(const Tensor& t) {
  const Tensor host = t.to(at::kCPU, at::kDouble).contiguous();
  return {host.const_data_ptr<double>(), host.const_data_ptr<double>() + host.numel()};
}

Tensor to_tensor(const std::vector<double>& values, const at::TensorOptions& options) {
  return at::tensor(values, at::kDouble).to(options);
}

void check_finite(double value, int64_t matvecs) {
  TORCH_CHECK_VALUE(std::isfinite(value), "the product H v must be finite, got nan or inf in one of ", matvecs,
                    " products; check the weights, the loss and the data");
}

double rank(double value, Which which) {
  switch (which) {
    case Which::LA:
      return value;
    case Which::SA:
      return -value;
    default:
      return std::abs(value);
  }
}

Ritz ritz(const Tensor& T, const std::function<double(double)>& wanted) {
  const auto [theta, S] = at::linalg_eigh(T, "U");
  const auto* ascending = theta.const_data_ptr<double>();
  std::vector<int64_t> order(theta.numel());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t i, int64_t j) { return wanted(ascending[i]) > wanted(ascending[j]); });
  Ritz result;
  for (const auto i : order) result.values.push_back(ascending[i]);
  result.vectors = S.index_select(1, at::tensor(order));
  return result;
}

std::vector<double> error_bounds(const std::vector<double>& values, const std::vector<double>& residuals,
                                 const std::vector<Interval>& rest, double rounding) {
  std::vector<Interval> all = rest;
  for (size_t i = 0; i < values.size(); ++i) all.push_back({values[i], residuals[i]});
  std::vector<double> errors;
  for (size_t i = 0; i < values.size(); ++i) {
    double gap = rest.empty() ? 0 : std::numeric_limits<double>::infinity();
    for (size_t j = 0; j < all.size(); ++j)
      if (j != rest.size() + i) gap = std::min(gap, std::abs(all[j].value - values[i]) - all[j].residual);
    const double r = residuals[i];
    errors.push_back((gap > r ? r * (r / gap) : r) + rounding);
  }
  return errors;
}

double allowed(double value, double tol, double eps, double norm) {
  const double rounding = rounding_error(eps, norm);
  const double relative = tol * std::max(std::abs(value), std::pow(eps, 2.0 / 3.0) * norm);
  return std::abs(value) <= 2 * rounding ? std::max(relative, 2 * rounding) : relative;
}

bool within(const std::vector<double>& values, const std::vector<double>& errors, double tol, double eps, double norm) {
  for (size_t i = 0; i < values.size(); ++i)
    if (!(errors[i] <= allowed(values[i], tol, eps, norm))) return false;
  return true;
}

double epsilon(const Tensor& like) {
  return like.scalar_type() == at::kDouble ? std::numeric_limits<double>::epsilon()
                                           : std::numeric_limits<float>::epsilon();
}

}  // namespace samlite
