#include "lanczos.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace samlite {

namespace {

// With this probability at most, over the random start, `complete` is stated although an eigenvalue was
// missed.
constexpr double kMissProbability = 1e-3;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Rows are rotated in blocks of columns, so that no second basis is ever held.
constexpr int64_t kColumns = 1 << 14;

// V <- S^T V for the (n, p) rows V and S: (n, m), in place; row i < m receives the i-th combination.
void rotate(const Tensor& V, const Tensor& S) {
  const Tensor St = S.t().to(V.options()).contiguous();
  for (int64_t c = 0; c < V.size(1); c += kColumns) {
    const Tensor block = V.narrow(1, c, std::min(kColumns, V.size(1) - c));
    block.narrow(0, 0, S.size(1)).copy_(St.mm(block));
  }
}

std::vector<double> to_vector(const Tensor& t) {
  const Tensor host = t.to(at::kCPU, at::kDouble).contiguous();
  return {host.const_data_ptr<double>(), host.const_data_ptr<double>() + host.numel()};
}

Tensor to_tensor(const std::vector<double>& values, const at::TensorOptions& options) {
  return at::tensor(values, at::kDouble).to(options);
}

std::vector<Interval> intervals(const std::vector<double>& values, const std::vector<double>& residuals, size_t from) {
  std::vector<Interval> result;
  for (size_t i = from; i < residuals.size(); ++i) result.push_back({values[i], residuals[i]});
  return result;
}

template <class T>
std::vector<T> head(const std::vector<T>& v, int64_t n) {
  return {v.begin(), v.begin() + n};
}

}  // namespace

Lanczos::Lanczos(MatVec apply, const Tensor& like, int64_t p, Options options)
    : apply_(std::move(apply), options.max_matvecs),
      options_(std::move(options)),
      generator_(at::detail::createCPUGenerator(options_.seed)),
      p_(p),
      rows_(std::max(2 * options_.k + 2, std::min(options_.basis, options_.start ? 2 * p : p + 1))),
      eps_(epsilon(like)),
      V_(at::empty({rows_, p}, like.options())),
      H_(at::zeros({rows_, rows_}, like.options().dtype(at::kDouble))),
      beta_(at::zeros({rows_}, H_.options())) {}

Eigenpairs Lanczos::solve() {
  if (options_.start) {
    const int64_t given = std::min(options_.start->size(0), rows_ / 2);
    V_.narrow(0, 0, given).copy_(options_.start->narrow(0, 0, given));
    for (int64_t i = given; i < options_.k; ++i) V_[i].copy_(random());
    refine(std::max(given, options_.k));
  } else {
    krylov();
  }
  // A breakdown ends in an invariant subspace, which proves nothing about the rest of the spectrum.
  if ((options_.verify || broke_down_) && distance(values_, residuals_, rest_) <= 0) search();

  // Gaps are known where a search that finished shows them, and taken on trust where none was asked for.
  const bool trusted = !options_.verify && distance(values_, residuals_, rest_) <= 0;
  if (!complete_.value_or(trusted)) rest_.clear();

  Eigenpairs result;
  result.values = values_;
  result.residuals = residuals_;
  result.errors = bounds(values_, residuals_, rest_);
  result.converged = within(values_, result.errors, options_.tol, eps_, norm_);
  result.complete = complete_;
  result.vectors = V_.narrow(0, 0, options_.k).clone();
  result.matvecs = apply_.count();
  result.multiply(apply_.unit());
  return result;
}

// --- The factorisation

Tensor Lanczos::random() { return random_vector(p_, generator_, V_.options()); }

void Lanczos::orthonormalise_row(int64_t row) { orthonormalise(V_[row], V_.narrow(0, 0, row)); }

void Lanczos::begin(const Tensor& start) {
  V_[locked_].copy_(start);
  orthonormalise_row(locked_);
  size_ = looked_ = 0;
}

// One product and its orthogonalisation; nothing here waits for the device.
void Lanczos::step() {
  const int64_t row = locked_ + size_;
  const Tensor B = V_.narrow(0, 0, row + 1);
  Tensor w = apply_(V_[row]);
  if (correction_ != 0) w = at::addcmul(w, *q_, q_->dot(V_[row]), correction_);
  Tensor h = B.mv(w);
  Tensor q = at::addmv(w, B.t(), h, 1, -1);
  const Tensor correction = B.mv(q);
  q.addmv_(B.t(), correction, 1, -1);
  // All coefficients are kept, not only the two of the three-term recurrence: after a restart T is an arrow,
  // and with locked vectors the upper rows hold the coupling to them.
  H_.select(1, row).narrow(0, 0, row + 1).copy_(h.add_(correction));
  const Tensor norm = at::linalg_vector_norm(q);
  beta_[row].copy_(norm);
  Tensor next = V_[row + 1];
  at::div_out(next, q, norm);
  ++size_;
}

// Brings the coefficients to the host (the only wait), cuts back to the first breakdown since the last look,
// and solves the small eigenproblem.
void Lanczos::look() {
  const int64_t used = locked_ + size_;
  const Tensor host = at::cat({H_.narrow(0, 0, used), beta_.unsqueeze(0)}).narrow(1, 0, used).to(at::kCPU);
  coefficients_ = host.narrow(0, 0, used);
  const auto H = coefficients_.accessor<double, 2>();
  const auto beta = host.accessor<double, 2>()[used];
  double last = 0;
  for (int64_t j = looked_; j < size_; ++j) {
    const int64_t row = locked_ + j;
    double square = beta[row] * beta[row];
    for (int64_t i = 0; i <= row; ++i) square += H[i][row] * H[i][row];
    see(std::sqrt(square));
    // Relative to the size of H: what is left of H v is rounding, and its direction means nothing.
    const double tiny = 10 * eps_ * norm_;
    const bool breakdown = beta[row] <= tiny;
    for (auto& [mu, y] : hypotheses_) {
      double next = mu * y[j];
      for (int64_t i = 0; i <= j; ++i) next -= H[locked_ + i][row] * y[i];
      y.push_back(next / std::max(beta[row], std::max(tiny, std::numeric_limits<double>::min())));
    }
    last = breakdown ? 0 : beta[row];
    if (breakdown) {
      broke_down_ = true;
      size_ = j + 1;
      if (!spanned()) {
        V_[locked_ + size_].copy_(random());
        orthonormalise_row(locked_ + size_);
      }
    }
  }
  looked_ = size_;
  if (options_.scale) see(options_.scale() / apply_.unit());
  ritz_ = ritz(coefficients_.narrow(0, locked_, size_).narrow(1, locked_, size_), [&](double x) { return wanted(x); });
  coupling_ = ritz_.vectors[size_ - 1].mul(last);
  residual_ = to_vector(coupling_.abs());
}

// The larger, the more wanted: in a search, what is farthest outside of the range.
double Lanczos::wanted(double value) const {
  return range_ ? std::max(value - range_->high, range_->low - value) : rank(value, options_.which);
}

void Lanczos::see(double norm) {
  check_finite(norm, apply_.count());
  norm_ = std::max(norm_, norm);
}

// Keeps the best Ritz pairs and the residual direction q: H X^T = X^T Theta + q b^T is again of the Lanczos
// form.
void Lanczos::restart(int64_t keep) {
  const Tensor S = ritz_.vectors.narrow(1, 0, keep);
  rotate(V_.narrow(0, locked_, size_), S);
  V_[locked_ + keep].copy_(V_[locked_ + size_]);
  const Tensor coupling = coefficients_.narrow(0, 0, locked_).narrow(1, locked_, size_).mm(S);  // (locked, keep)
  H_.narrow(1, locked_, rows_ - locked_).zero_();
  H_.narrow(0, 0, locked_).narrow(1, locked_, keep).copy_(coupling);
  H_.diagonal().narrow(0, locked_, keep).copy_(to_tensor(head(ritz_.values, keep), H_.options()));
  for (auto& [mu, y] : hypotheses_) {
    const Tensor old = at::tensor(head(y, size_), at::kDouble);
    const double next = y[size_];
    y = to_vector(S.t().mv(old));
    y.push_back(next);
  }
  size_ = looked_ = keep;
}

// Steps until distance() <= 0: the logarithm of how far the wanted quantity is from what is asked. A step rarely gains
// more than a factor of 30, so looks that far apart waste few steps. False where products ran out.
template <class Distance>
bool Lanczos::extend(int64_t wanted, int64_t first_look, Distance distance) {
  int64_t stride = first_look;
  while (true) {
    const int64_t from = size_;
    while (size_ < from + stride && !full() && !spanned() && (size_ < wanted || !apply_.exhausted())) step();
    look();
    const double now = distance();
    if (options_.progress) options_.progress(apply_.count(), std::exp(now));
    if (now <= 0 || spanned()) return true;
    if (apply_.exhausted() && size_ >= wanted) return false;
    stride = std::isfinite(now) ? std::clamp<int64_t>(static_cast<int64_t>(now / std::log(30)), 1, 4) : 1;
    if (!full()) continue;
    restart(wanted + (size_ - wanted) / 2);
    ++restarts_;
  }
}

// --- The stages

std::vector<double> Lanczos::bounds(const std::vector<double>& values, const std::vector<double>& residuals,
                                    const std::vector<Interval>& rest) const {
  return error_bounds(values, residuals, options_.separated ? rest : std::vector<Interval>{}, rounding());
}

// The error of each pair over what is allowed. Errors near the rounding of H v cannot be made smaller: they count as
// 0, and `converged` says what was reached.
std::vector<double> Lanczos::ratios(const std::vector<double>& values, const std::vector<double>& residuals,
                                    const std::vector<Interval>& rest) const {
  auto result = bounds(values, residuals, rest);
  for (size_t i = 0; i < values.size(); ++i)
    result[i] = result[i] > 2 * rounding() ? result[i] / allowed(values[i], options_.tol, eps_, norm_) : 0;
  return result;
}

double Lanczos::distance(const std::vector<double>& values, const std::vector<double>& residuals,
                         const std::vector<Interval>& rest) const {
  const auto all = ratios(values, residuals, rest);
  return std::log(*std::max_element(all.begin(), all.end()));
}

// From a random start to k pairs whose error bounds hold, given that the basis is orthogonal.
void Lanczos::krylov() {
  const int64_t k = options_.k;
  begin(random());
  extend(k, 2 * k + 2, [&] {
    if (size_ < k) return kInfinity;
    return distance(head(ritz_.values, k), head(residual_, k), intervals(ritz_.values, residual_, k));
  });
  values_ = head(ritz_.values, k);
  rest_ = intervals(ritz_.values, residual_, k);
  residuals_ = head(residual_, k);
  const bool whole = spanned();
  // A few pairs more than asked for make the search short, where there is room for it.
  const int64_t kept = std::max(k, std::min({size_, 2 * k + 2, rows_ - 10}));
  const auto coupling = to_vector(coupling_);
  for (int64_t i = 0; i < kept; ++i) kept_pairs_.push_back({ritz_.values[i], coupling[i]});
  restart(kept);
  q_ = V_[kept].clone();
  if (!whole) certify();
}

// One product for all k pairs: with random signs c, H X^T c - X^T (theta c) - q (b . c) has the mean square
// norm (1/k) sum |H x_i - theta_i x_i - b_i q|^2, which is rounding unless orthogonality was lost or H is not
// one symmetric matrix. It enters the residuals; where the pairs do not stand it, each residual is computed
// by itself.
void Lanczos::certify() {
  const int64_t k = options_.k;
  const Tensor X = V_.narrow(0, 0, k);
  const Tensor signs = at::randint(0, 2, {k}, generator_, at::kDouble).mul_(2).sub_(1).div_(std::sqrt(k));
  const Tensor c = signs.to(V_.options());
  const Tensor theta = to_tensor(values_, V_.options());
  const double b = coupling_.narrow(0, 0, k).dot(signs).item<double>();
  const Tensor expected = X.t().mv(theta * c).add_(*q_, b);
  const double mismatch = at::linalg_vector_norm(apply_(X.t().mv(c)) - expected).item<double>();
  check_finite(mismatch, apply_.count());
  auto certified = residuals_;
  for (auto& r : certified) r = std::hypot(r, std::sqrt(k) * mismatch);
  if (distance(values_, residuals_, rest_) <= 0 && !(distance(values_, certified, rest_) <= 0)) {
    for (int64_t i = 0; i < k; ++i) {
      const Tensor r = apply_(X[i]).sub(X[i], values_[i]);
      certified[i] = at::linalg_vector_norm(r).item<double>();
    }
  }
  residuals_ = certified;
}

double Lanczos::Hypothesis::growth() const {
  double square = 0;
  for (const double value : y) square += value * value;
  return std::sqrt(square);
}

// Searches the complement of the first `locked` rows for an eigenvalue outside of the range, from a fresh random
// start v_0. If u is an eigenvector there with eigenvalue mu, the recurrence fixes all its coordinates up to
// c = u . v_0, and as their squares sum to at most 1, |c| <= 1/growth(mu). For a random start that has a
// probability of at most sqrt(2p/pi)/growth; growth rises with mu, so the end of the range is the worst case. A few
// products suffice where the rest of the spectrum lies well inside; where it touches the end, as many as
// resolve it.
Lanczos::Verdict Lanczos::probe(int64_t locked, const Range& range) {
  const double needed = std::sqrt(2 * static_cast<double>(p_) / M_PI) / kMissProbability;
  locked_ = locked;
  size_ = 0;
  if (spanned()) return Verdict::clear;
  if (apply_.exhausted()) return Verdict::undecided;
  hypotheses_.clear();
  if (options_.which != Which::SA) hypotheses_.push_back({range.high, {1.0}});
  if (options_.which != Which::LA) hypotheses_.push_back({range.low, {1.0}});
  range_ = range;
  begin(random());
  bool missed = false;
  const bool decided = extend(1, 3, [&] {
    missed = wanted(ritz_.values[0]) > 0;
    if (missed && locked > options_.k) return -kInfinity;
    if (missed) return distance({ritz_.values[0]}, {residual_[0]}, intervals(ritz_.values, residual_, 1));
    double growth = kInfinity;
    for (const auto& h : hypotheses_) growth = std::min(growth, h.growth());
    return std::log(needed / growth);
  });
  hypotheses_.clear();
  range_.reset();
  return !decided ? Verdict::undecided : missed ? Verdict::missed : Verdict::clear;
}

// The range that the search has to show to hold the rest of the spectrum. On the side asked for it ends at the k-th
// value and what is not known of that. A bound that uses a gap needs the gap to be empty: the range ends below each
// value by as much as its bound needs to converge, and below the k-th by at least a quarter of the gap that is known,
// which costs next to nothing.
Range Lanczos::range_of_rest() const {
  const double error = bounds(values_, residuals_, rest_).back(), last = values_.back();
  const double most = rank(last, options_.which) + std::max(error, options_.tol * std::abs(last)) + 2 * rounding();
  Range range{-4 * norm_, 4 * norm_};
  if (options_.which != Which::SA) range.high = most;
  if (options_.which != Which::LA) range.low = -most;
  for (int64_t i = 0; options_.separated && i < options_.k; ++i) {
    const double value = values_[i], r = residuals_[i];
    const double side = options_.which == Which::LA || (options_.which == Which::LM && value > 0) ? 1 : -1;
    // Of the error without its rounding, a little less than what `distance` lets pass.
    const double limit = (1 - 1e-6) * std::max(allowed(value, options_.tol, eps_, norm_), 2 * rounding()) - rounding();
    double depth = r > limit ? r * (r / limit) : 0;
    if (i == options_.k - 1) {
      double gap = rest_.empty() ? 0 : kInfinity;
      for (const auto& other : rest_) gap = std::min(gap, side * (value - other.value) - other.residual);
      depth = std::max(depth, gap / 4);
    }
    if (depth <= 2 * rounding()) continue;
    if (side > 0)
      range.high = std::min(range.high, value - depth);
    else
      range.low = std::max(range.low, value + depth);
  }
  return range;
}

// Whether the complement of all kept Ritz vectors X is clear, which takes about half the products of the
// complement of the first k, as the values next to the k-th are out of the way. With H X^T = X^T Theta + q
// b^T, the eigenvalues of H beyond mu number those of Theta plus those of the Schur complement P H P + q b^T
// (mu - Theta)^{-1} b q^T (Sylvester's law of inertia): one rank-one term accounts for X being no exact
// invariant subspace.
Lanczos::Verdict Lanczos::probe_beyond_kept(const Range& range) {
  const auto kept = static_cast<int64_t>(kept_pairs_.size());
  if (kept <= options_.k || options_.which == Which::LM) return Verdict::undecided;
  const double mu = options_.which == Which::LA ? range.high : range.low;
  double weight = 0;
  for (const auto& [theta, b] : kept_pairs_) weight += b * b / (mu - theta);
  if (!(std::abs(weight) < norm_)) return Verdict::undecided;
  correction_ = weight;
  const Verdict verdict = probe(kept, range);
  correction_ = 0;
  return verdict;
}

// Whether the error bounds hold where the rest of the spectrum is known to lie in the range, and no more.
bool Lanczos::settled(const Range& range) {
  const std::vector<Interval> rest{{(range.high + range.low) / 2, (range.high - range.low) / 2}};
  if (distance(values_, residuals_, rest) > 0) return false;
  rest_ = rest;
  return true;
}

void Lanczos::search() {
  complete_ = options_.k == p_;
  if (*complete_) return rest_.clear();
  Range range = range_of_rest();
  bool clear = probe_beyond_kept(range) == Verdict::clear && settled(range);
  q_.reset();
  while (!clear) {
    range = range_of_rest();
    const Verdict verdict = probe(options_.k, range);
    if (verdict == Verdict::undecided) return;
    clear = verdict == Verdict::clear && settled(range);
    if (!clear) merge();
  }
  complete_ = true;
}

// Adds the pair that the search found: it is an eigenvector of H to within its residual and its coupling to
// the others. Where a neighbour now lies so close that a bound fails (a cluster), the pairs are refined
// together.
void Lanczos::merge() {
  const int64_t k = options_.k;
  const double value = ritz_.values[0];
  const auto others = intervals(ritz_.values, residual_, 1);
  rest_.insert(rest_.end(), others.begin(), others.end());
  const double r = residual_[0];
  restart(1);
  const double coupling = H_.select(1, k).narrow(0, 0, k).norm().item<double>();
  const double own = std::hypot(r, coupling);

  int64_t place = 0;
  while (place < k && rank(values_[place], options_.which) >= rank(value, options_.which)) ++place;
  values_.insert(values_.begin() + place, value);
  residuals_.insert(residuals_.begin() + place, own);
  std::vector<int64_t> order(k);
  std::iota(order.begin(), order.end(), 0);
  order.insert(order.begin() + place, k);
  rotate(V_.narrow(0, 0, k + 1), at::eye(k + 1, at::kDouble).index_select(1, at::tensor(order)));
  rest_.push_back({values_.back(), residuals_.back()});
  values_.pop_back();
  residuals_.pop_back();
  if (distance(values_, residuals_, rest_) > 0) refine(k + 1);
}

// Rayleigh-Ritz on the first `count` rows of V_, then expansion by the residual of the worst pair, with W = H
// V held beside V, until the bounds hold. Residuals are exact here, so no certificate is needed.
void Lanczos::refine(int64_t count) {
  const int64_t k = options_.k, capacity = rows_ / 2;
  const Tensor V = V_.narrow(0, 0, capacity), W = V_.narrow(0, capacity, capacity);
  locked_ = 0;
  for (size_ = 0; size_ < count; ++size_) {
    orthonormalise_row(size_);
    W[size_].copy_(apply_(V[size_]));
  }
  while (true) {
    ritz_ = ritz(V.narrow(0, 0, size_).mm(W.narrow(0, 0, size_).t()).to(at::kCPU, at::kDouble),
                 [&](double x) { return wanted(x); });
    residual_ = residual_norms(V, W, ritz_, std::min(k + 1, size_));
    see(std::hypot(std::abs(ritz_.values[0]), residual_[0]));
    if (options_.scale) see(options_.scale() / apply_.unit());
    values_ = head(ritz_.values, k);
    residuals_ = head(residual_, k);
    rest_ = intervals(ritz_.values, residual_, k);
    const double now = distance(values_, residuals_, rest_);
    if (options_.progress) options_.progress(apply_.count(), std::exp(now));
    const bool done = now <= 0 || size_ == p_ || apply_.exhausted();
    if (done || size_ == capacity) {
      const int64_t keep = done ? k : k + (size_ - k) / 2;
      const Tensor S = ritz_.vectors.narrow(1, 0, keep);
      rotate(V.narrow(0, 0, size_), S);
      rotate(W.narrow(0, 0, size_), S);
      size_ = keep;
      if (done) return;
      continue;
    }
    const auto all = ratios(values_, residuals_, rest_);
    const int64_t worst = std::max_element(all.begin(), all.end()) - all.begin();
    const Tensor s = ritz_.vectors.select(1, worst).to(V.options());
    const Tensor basis = V.narrow(0, 0, size_), image = W.narrow(0, 0, size_);
    V[size_].copy_(image.t().mv(s).sub_(basis.t().mv(s), values_[worst]));
    orthonormalise_row(size_);
    W[size_].copy_(apply_(V[size_]));
    ++size_;
  }
}

// |W^T s_i - theta_i V^T s_i| of the first `count` Ritz pairs, in blocks of columns.
std::vector<double> Lanczos::residual_norms(const Tensor& V, const Tensor& W, const Ritz& pairs, int64_t count) const {
  const int64_t n = pairs.vectors.size(0);
  const Tensor S = pairs.vectors.narrow(1, 0, count).t().to(V.options()).contiguous();
  const Tensor theta = to_tensor(head(pairs.values, count), V.options()).unsqueeze(1);
  Tensor square = at::zeros({count}, H_.options());
  for (int64_t c = 0; c < p_; c += kColumns) {
    const int64_t width = std::min(kColumns, p_ - c);
    const Tensor R =
        S.mm(W.narrow(0, 0, n).narrow(1, c, width)).sub_(S.mm(V.narrow(0, 0, n).narrow(1, c, width)).mul_(theta));
    square.add_(R.square_().sum(1));
  }
  return to_vector(square.sqrt_());
}

}  // namespace samlite
