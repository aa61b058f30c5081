// Krylov spaces of a symmetric operator: the Lanczos factorisation H V^T = V^T T + beta q e^T with reorthogonalisation
// in two passes at every step, and its thick restarts (Wu and Simon, "Thick-restart Lanczos method for large symmetric
// eigenvalue problems", SIAM J. Matrix Anal., 2000). The first pass is over the rows of the recurrence alone: of many
// parameters, reading the basis costs more than a product.
#pragma once

#include "ritz.h"

namespace samlite {

// Whether what orthogonalisation left of H v is rounding, whose direction means nothing: relative to the size of H.
inline double breakdown_threshold(double eps, double norm) { return 10 * eps * norm; }

// Long rows are worked on in blocks of so many columns, so that no second basis is ever held.
constexpr int64_t kColumns = 1 << 14;

// V <- S^T V for the (n, p) rows V and S: (n, m), in place; row i < m receives the i-th combination.
void rotate(const Tensor& V, const Tensor& S);

// A missed eigenvector u of eigenvalue at least mu has the coordinates c y in the basis, where c = u . v_0 is random
// and y follows from the recurrence alone. |y| can only be large if |c| is small.
class Hypothesis {
 public:
  explicit Hypothesis(double mu) : mu_(mu) {}
  double growth() const;  // |y|
  // The next coordinate: column: (j + 1) coefficients of H v_j in the basis, then the norm of what is left of it.
  void extend(const std::vector<double>& column, double left);
  void rotate(const Tensor& S);

 private:
  double mu_;
  std::vector<double> y_{1.0};
};

class Factorisation {
 public:
  using Order = std::function<double(double)>;  // of Ritz values: the larger, the more wanted

  // like: any tensor with the type and device of the vectors; p: their length; rows: how many are held.
  Factorisation(CountedMatVec& apply, const Tensor& like, int64_t p, int64_t rows, const Options& options);

  // A new factorisation behind the first `locked` rows, which all vectors are orthogonal to.
  void begin(const Tensor& start, int64_t locked, MatVec product, std::vector<Hypothesis> hypotheses = {});
  // Takes steps until log_excess() <= 0: the logarithm of how far the wanted quantity is from what is asked. False
  // where products ran out. At least `needed` vectors are made.
  bool extend(int64_t needed, int64_t first_look, const Order& order, const std::function<double()>& log_excess);
  // Keeps the best Ritz pairs and the residual direction q: H X^T = X^T Theta + q b^T is again of the Lanczos form.
  void restart(int64_t keep);

  int64_t size() const { return size_; }
  bool spanned() const { return locked_ + size_ == V.size(1); }  // the basis is of the whole space
  bool broke_down() const { return broke_down_; }
  int64_t restarts() const { return restarts_; }
  double growth() const;  // the least of the hypotheses'; infinite without any

  const Ritz& ritz() const { return ritz_; }                           // of T, as of the last `extend`
  const Tensor& coupling() const { return coupling_; }                 // b of every Ritz pair: H x = theta x + b q
  const std::vector<double>& residuals() const { return residuals_; }  // |b|
  double coupling_to_locked() const;                                   // of the first vector, behind a restart

  double norm() const { return norm_; }  // largest |H v| seen: a lower bound of ||H||
  void see(double norm);
  void see_scale();  // of the operator, where that is more than the norm of its products
  double epsilon() const { return eps_; }
  at::Generator generator() const { return generator_; }
  Tensor random();
  void orthonormalise_row(int64_t row);  // against those before it

  const Tensor V;  // (rows, p): locked vectors, then the basis, then the next vector q

 private:
  void step();
  void solve(const Order& order);
  void follow(int64_t j, const at::TensorAccessor<double, 2>& H, double left);
  bool full() const { return locked_ + size_ == V.size(0) - 1; }

  CountedMatVec& apply_;
  const Options& options_;
  MatVec product_;
  at::Generator generator_;
  double eps_;
  Tensor H_;     // (rows, rows) float64: column j holds V (H v_j), so T is its lower right block
  Tensor beta_;  // (rows,) float64: norm of what orthogonalisation left of H v_j

  int64_t locked_ = 0, size_ = 0, looked_ = 0, arrow_ = 0, restarts_ = 0;
  double norm_ = 0;
  bool broke_down_ = false;
  Tensor coefficients_;  // H_ on the host, as of the last look
  Ritz ritz_;
  Tensor coupling_;
  std::vector<double> residuals_;
  std::vector<Hypothesis> hypotheses_;
};

// An orthonormal basis V: (m, p) of the Krylov space of a start, and T = V H V^T: (m, m) in float64 on the host. H V^T
// = V^T T + r e^T with |r| = beta, which is 0 where that space is exhausted. H is over the unit of `apply`.
struct Krylov {
  Tensor V, T;
  double beta = 0;
};
Krylov krylov(CountedMatVec& apply, const Tensor& start, int64_t steps);  // at most so many products

}  // namespace samlite
