#include "lanczos.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "refine.h"
#include "search.h"

namespace samlite {

namespace {

// One product for all k pairs: with random signs c, H X^T c - X^T (theta c) - q (b . c) has the mean square
// norm (1/k) sum |H x_i - theta_i x_i - b_i q|^2, which is rounding unless orthogonality was lost or H is not
// one symmetric matrix. It enters the residuals; where the pairs do not stand it, each residual is computed
// by itself.
void certify(const Factorisation& basis, CountedMatVec& apply, const Accuracy& accuracy, Known& known,
             const Tensor& q) {
  const auto k = static_cast<int64_t>(known.values.size());
  const Tensor X = basis.V.narrow(0, 0, k);
  const Tensor signs = at::randint(0, 2, {k}, basis.generator(), at::kDouble).mul_(2).sub_(1).div_(std::sqrt(k));
  const Tensor c = signs.to(X.options());
  const Tensor theta = to_tensor(known.values, X.options());
  const double b = basis.coupling().narrow(0, 0, k).dot(signs).item<double>();
  const Tensor expected = X.t().mv(theta * c).add_(q, b);
  const double mismatch = at::linalg_vector_norm(apply(X.t().mv(c)) - expected).item<double>();
  check_finite(mismatch, apply.count());
  Known certified = known;
  for (auto& r : certified.residuals) r = std::hypot(r, std::sqrt(k) * mismatch);
  if (accuracy.holds(known) && !accuracy.holds(certified)) {
    for (int64_t i = 0; i < k; ++i) {
      const Tensor r = apply(X[i]).sub(X[i], known.values[i]);
      certified.residuals[i] = at::linalg_vector_norm(r).item<double>();
    }
  }
  known = certified;
}

// From a random start to k pairs whose error bounds hold, given that the basis is orthogonal. Leaves their vectors, and
// a few more, in the first rows of the basis.
std::pair<Known, Kept> converge(Factorisation& basis, CountedMatVec& apply, const Accuracy& accuracy,
                                const Options& options) {
  const int64_t k = options.k;
  const auto pairs = [&] { return known(basis.ritz(), basis.residuals(), k); };
  basis.begin(basis.random(), 0, std::ref(apply));
  basis.extend(
      k, 2 * k + 2, [&](double value) { return rank(value, options.which); },
      [&] { return basis.size() < k ? std::numeric_limits<double>::infinity() : accuracy.log_excess(pairs()); });
  Known result = pairs();
  const bool spanned = basis.spanned();
  // A few pairs more than asked for make the search short, where there is room for it.
  const int64_t count = std::max(k, std::min({basis.size(), 2 * k + 2, basis.V.size(0) - 10}));
  Kept kept{head(basis.ritz().values, count), head(to_vector(basis.coupling()), count), {}};
  basis.restart(count);
  kept.q = basis.V[count].clone();
  if (!spanned) certify(basis, apply, accuracy, result, kept.q);
  return {result, kept};
}

// From earlier eigenvectors.
Known warm_start(Factorisation& basis, CountedMatVec& apply, const Accuracy& accuracy, const Options& options) {
  const int64_t given = std::min(options.start->size(0), basis.V.size(0) / 2);
  basis.V.narrow(0, 0, given).copy_(options.start->narrow(0, 0, given));
  for (int64_t i = given; i < options.k; ++i) basis.V[i].copy_(basis.random());
  return refine(basis, apply, accuracy, options, std::max(given, options.k));
}

}  // namespace

Eigenpairs lanczos(MatVec multiply, const Tensor& like, int64_t p, const Options& options) {
  CountedMatVec apply(std::move(multiply), options.max_matvecs);
  const int64_t rows = std::max(2 * options.k + 2, std::min(options.basis, options.start ? 2 * p : p + 1));
  Factorisation basis(apply, like, p, rows, options);
  const Accuracy accuracy(options, basis);

  Known known;
  Kept kept;
  if (options.start)
    known = warm_start(basis, apply, accuracy, options);
  else
    std::tie(known, kept) = converge(basis, apply, accuracy, options);

  Eigenpairs result;
  // A breakdown ends in an invariant subspace, which proves nothing about the rest of the spectrum.
  if ((options.verify || basis.broke_down()) && accuracy.holds(known))
    result.complete = search(basis, apply, accuracy, options, known, std::move(kept));
  // Gaps are known where a search that finished shows them, and taken on trust where none was asked for.
  const bool trusted = !options.verify && accuracy.holds(known);
  if (!result.complete.value_or(trusted)) known.rest.clear();

  result.values = known.values;
  result.residuals = known.residuals;
  result.errors = accuracy.bounds(known);
  result.converged = within(result.values, result.errors, options.tol, basis.epsilon(), basis.norm());
  result.vectors = basis.V.narrow(0, 0, options.k).clone();
  result.matvecs = apply.count();
  result.multiply(apply.unit());
  return result;
}

}  // namespace samlite
