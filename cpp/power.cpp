#include "power.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace samlite {

namespace {

constexpr int64_t kStride = 10;  // products between two looks at the residual

struct Vector {
  Tensor v;
  double value, residual;
};

// v <- (H + shift) v in the complement of X, until |H v - theta v| there is at most allowed(theta) or
// products run out. The residual that is returned counts the directions of X too.
template <class Allowed>
Vector iterate(CountedMatVec& apply, Tensor v, const Tensor& X, double shift, const Options& options, Allowed allowed) {
  orthonormalise(v, X);
  while (true) {
    Tensor w, theta, r;
    for (int64_t i = 0; i < kStride; ++i) {
      if (i > 0) {
        Tensor next = w.add(v, shift);
        orthonormalise(next, X);
        v = at::where(next.isfinite().all(), next, v);  // H v = 0: v is an eigenvector already
      }
      w = apply(v);
      if (apply.exhausted()) break;
    }
    theta = v.dot(w);
    r = w - theta * v;
    const Tensor outside = r - X.t().mv(X.mv(r));
    const Tensor scalars =
        at::stack({theta, at::linalg_vector_norm(r), at::linalg_vector_norm(outside)}).to(at::kCPU, at::kDouble);
    const auto* scalar = scalars.const_data_ptr<double>();
    check_finite(scalar[0] + scalar[1], apply.count());
    const double bound = allowed(scalar[0]);
    if (options.progress) options.progress(apply.count(), bound > 0 ? scalar[2] / bound : 0);
    if (scalar[2] <= bound || apply.exhausted()) return {v, scalar[0], scalar[1]};
    v = w.add(v, shift);
    orthonormalise(v, X);
  }
}

// |H v| after a few products, which approaches ||H|| from below.
double estimate_norm(CountedMatVec& apply, Tensor v) {
  Tensor norm;
  for (int64_t i = 0; i < kStride; ++i) {
    v = apply(v.div(at::linalg_vector_norm(v).clamp_min(std::numeric_limits<float>::min())));
    norm = at::linalg_vector_norm(v);
  }
  return norm.item<double>();
}

}  // namespace

// For LA and SA the operator is shifted by its norm, so that the wanted end is also the largest in magnitude;
// without the shift, power iteration returns whichever end is. Pairs found are removed after every product.
Eigenpairs power_iteration(MatVec multiply, const Tensor& like, int64_t p, const Options& options) {
  CountedMatVec apply(std::move(multiply), options.max_matvecs);
  auto generator = at::detail::createCPUGenerator(options.seed);
  const auto random = [&] { return random_vector(p, generator, like.options()); };
  const double eps = std::max(epsilon(like), options.precision);
  Tensor X = at::empty({0, p}, like.options());

  // More than half of the norm is enough for the shift.
  double norm = estimate_norm(apply, random());
  if (options.scale) norm = std::max(norm, options.scale() / apply.unit());
  const double rounding = rounding_error(eps, norm);
  const double shift = options.which == Which::LA ? norm : options.which == Which::SA ? -norm : 0;

  Eigenpairs result;
  for (int64_t i = 0; i < options.k; ++i) {
    Tensor start = random();
    if (options.start && i < options.start->size(0)) start = (*options.start)[i].clone();
    // Half of what is allowed, as the coupling to the earlier pairs comes on top.
    const auto bound = [&](double value) {
      return std::max(allowed(value, options.tol, eps, norm) / 2 - rounding, rounding);
    };
    const Vector found = iterate(apply, start, X, shift, options, bound);
    result.values.push_back(found.value);
    result.residuals.push_back(found.residual);
    result.errors.push_back(found.residual + rounding);
    X = at::cat({X, found.v.unsqueeze(0)});
  }
  result.vectors = X;
  result.converged = within(result.values, result.errors, options.tol, eps, norm);
  result.multiply(apply.unit());
  result.matvecs = apply.count();
  return result;
}

}  // namespace samlite
