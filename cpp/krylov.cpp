#include "krylov.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace samlite {

void rotate(const Tensor& V, const Tensor& S) {
  const Tensor St = S.t().to(V.options()).contiguous();
  for (int64_t c = 0; c < V.size(1); c += kColumns) {
    const Tensor block = V.narrow(1, c, std::min(kColumns, V.size(1) - c));
    block.narrow(0, 0, S.size(1)).copy_(St.mm(block));
  }
}

double Hypothesis::growth() const {
  double square = 0;
  for (const double value : y_) square += value * value;
  return std::sqrt(square);
}

void Hypothesis::extend(const std::vector<double>& column, double left) {
  double next = mu_ * y_[column.size() - 1];
  for (size_t i = 0; i < column.size(); ++i) next -= column[i] * y_[i];
  y_.push_back(next / std::max(left, std::numeric_limits<double>::min()));
}

void Hypothesis::rotate(const Tensor& S) {
  const double next = y_[S.size(0)];
  y_ = to_vector(S.t().mv(at::tensor(head(y_, S.size(0)), at::kDouble)));
  y_.push_back(next);
}

Factorisation::Factorisation(CountedMatVec& apply, const Tensor& like, int64_t p, int64_t rows, const Options& options)
    : V(at::empty({rows, p}, like.options())),
      apply_(apply),
      options_(options),
      generator_(at::detail::createCPUGenerator(options.seed)),
      eps_(std::max(samlite::epsilon(like), options.precision)),
      H_(at::zeros({rows, rows}, like.options().dtype(at::kDouble))),
      beta_(at::zeros({rows}, H_.options())) {}

Tensor Factorisation::random() { return random_vector(V.size(1), generator_, V.options()); }

void Factorisation::orthonormalise_row(int64_t row) { orthonormalise(V[row], V.narrow(0, 0, row)); }

double Factorisation::growth() const {
  double least = std::numeric_limits<double>::infinity();
  for (const auto& hypothesis : hypotheses_) least = std::min(least, hypothesis.growth());
  return least;
}

double Factorisation::coupling_to_locked() const {
  return H_.select(1, locked_).narrow(0, 0, locked_).norm().item<double>();
}

void Factorisation::see(double norm) {
  check_finite(norm, apply_.count());
  norm_ = std::max(norm_, norm);
}

void Factorisation::see_scale() {
  if (options_.scale) see(options_.scale() / apply_.unit());
}

void Factorisation::begin(const Tensor& start, int64_t locked, MatVec product, std::vector<Hypothesis> hypotheses) {
  locked_ = locked;
  product_ = std::move(product);
  hypotheses_ = std::move(hypotheses);
  V[locked_].copy_(start);
  orthonormalise_row(locked_);
  size_ = looked_ = arrow_ = 0;
}

// One product and its orthogonalisation; nothing here waits for the device.
void Factorisation::step() {
  const int64_t row = locked_ + size_;
  const Tensor B = V.narrow(0, 0, row + 1);
  const Tensor w = product_(V[row]);
  // Twice is enough, and the first pass needs only those rows that H v_j has large parts along: the last two, or behind
  // a restart, which leaves an arrow, all of them.
  const int64_t rows = size_ == arrow_ ? row + 1 : std::min<int64_t>(row + 1, 2);
  const Tensor N = V.narrow(0, row + 1 - rows, rows);
  const Tensor large = N.mv(w);
  Tensor q = at::addmv(w, N.t(), large, 1, -1);
  Tensor h = B.mv(q);
  q.addmv_(B.t(), h, 1, -1);
  h.narrow(0, row + 1 - rows, rows).add_(large);
  // All coefficients are kept, not only the two of the three-term recurrence: after a restart T is an arrow,
  // and with locked vectors the upper rows hold the coupling to them.
  H_.select(1, row).narrow(0, 0, row + 1).copy_(h);
  const Tensor norm = at::linalg_vector_norm(q);
  beta_[row].copy_(norm);
  Tensor next = V[row + 1];
  at::div_out(next, q, norm);
  ++size_;
}

// Brings the coefficients to the host (the only wait), cuts back to the first breakdown since the last look,
// and solves the small eigenproblem.
void Factorisation::solve(const Order& order) {
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
    follow(j, H, beta[row]);
    const bool breakdown = beta[row] <= breakdown_threshold(eps_, norm_);
    last = breakdown ? 0 : beta[row];
    if (!breakdown) continue;
    broke_down_ = true;
    size_ = j + 1;
    if (spanned()) continue;
    V[locked_ + size_].copy_(random());
    orthonormalise_row(locked_ + size_);
  }
  looked_ = size_;
  see_scale();
  ritz_ = samlite::ritz(coefficients_.narrow(0, locked_, size_).narrow(1, locked_, size_), order);
  coupling_ = ritz_.vectors[size_ - 1].mul(last);
  residuals_ = to_vector(coupling_.abs());
}

void Factorisation::follow(int64_t j, const at::TensorAccessor<double, 2>& H, double left) {
  if (hypotheses_.empty()) return;
  std::vector<double> column;
  for (int64_t i = 0; i <= j; ++i) column.push_back(H[locked_ + i][locked_ + j]);
  for (auto& hypothesis : hypotheses_) hypothesis.extend(column, std::max(left, breakdown_threshold(eps_, norm_)));
}

void Factorisation::restart(int64_t keep) {
  const Tensor S = ritz_.vectors.narrow(1, 0, keep);
  rotate(V.narrow(0, locked_, size_), S);
  V[locked_ + keep].copy_(V[locked_ + size_]);
  const Tensor coupling = coefficients_.narrow(0, 0, locked_).narrow(1, locked_, size_).mm(S);  // (locked, keep)
  H_.narrow(1, locked_, V.size(0) - locked_).zero_();
  H_.narrow(0, 0, locked_).narrow(1, locked_, keep).copy_(coupling);
  H_.diagonal().narrow(0, locked_, keep).copy_(to_tensor(head(ritz_.values, keep), H_.options()));
  for (auto& hypothesis : hypotheses_) hypothesis.rotate(S);
  size_ = looked_ = arrow_ = keep;
}

// A step rarely gains more than a factor of 30, so looks that far apart waste few steps.
bool Factorisation::extend(int64_t needed, int64_t first_look, const Order& order,
                           const std::function<double()>& log_excess) {
  int64_t stride = first_look;
  while (true) {
    const int64_t from = size_;
    while (size_ < from + stride && !full() && !spanned() && (size_ < needed || !apply_.exhausted())) step();
    solve(order);
    const double excess = log_excess();
    if (options_.progress) options_.progress(apply_.count(), std::exp(excess));
    if (excess <= 0 || spanned()) return true;
    if (apply_.exhausted() && size_ >= needed) return false;
    stride = std::isfinite(excess) ? std::clamp<int64_t>(static_cast<int64_t>(excess / std::log(30)), 1, 4) : 1;
    if (!full()) continue;
    restart(needed + (size_ - needed) / 2);
    ++restarts_;
  }
}

Krylov krylov(CountedMatVec& apply, const Tensor& start, int64_t steps) {
  const int64_t p = start.numel();
  steps = std::min(steps, p);
  Tensor V = at::empty({steps, p}, start.options());
  Tensor alpha = at::zeros({steps}, start.options().dtype(at::kDouble)), beta = at::zeros_like(alpha);
  Tensor q = start / at::linalg_vector_norm(start);
  for (int64_t j = 0; j < steps; ++j) {
    V[j].copy_(q);
    const Tensor B = V.narrow(0, 0, j + 1);
    Tensor w = apply(V[j]);
    alpha[j].copy_(w.dot(V[j]));
    const Tensor N = V.narrow(0, std::max<int64_t>(j - 1, 0), std::min<int64_t>(j + 1, 2));  // all that is large
    for (const Tensor& rows : {N, B}) w = at::addmv(w, rows.t(), rows.mv(w), 1, -1);
    const Tensor norm = at::linalg_vector_norm(w);
    beta[j].copy_(norm);
    q = w / norm;
  }
  const Tensor host = at::stack({alpha, beta}).to(at::kCPU);
  const auto scalar = host.accessor<double, 2>();
  // Behind the first breakdown nothing belongs to the space any more.
  double norm = 0, last = 0;
  int64_t size = 0;
  do {
    const double column = std::abs(scalar[0][size]) + std::abs(scalar[1][size]);
    check_finite(column, apply.count());
    norm = std::max(norm, column);
    last = scalar[1][size] > breakdown_threshold(epsilon(start), norm) ? scalar[1][size] : 0;
  } while (++size < steps && last > 0);
  Tensor T = at::zeros({size, size}, at::kDouble);
  T.diagonal().copy_(host[0].narrow(0, 0, size));
  T.diagonal(1).copy_(host[1].narrow(0, 0, size - 1));
  T.diagonal(-1).copy_(host[1].narrow(0, 0, size - 1));
  return {V.narrow(0, 0, size), T, size < p ? last : 0};
}

}  // namespace samlite
