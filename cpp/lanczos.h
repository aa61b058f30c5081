// Thick-restart Lanczos for a few eigenpairs of a matrix-free symmetric operator.
//
// Wu and Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems" (SIAM J. Matrix Anal.,
// 2000), with two-pass reorthogonalisation at every step, a certificate for the returned pairs, and a search
// for eigenvalues that a single Krylov space cannot hold. Knows no network: H is anything that multiplies a
// vector.
#pragma once

#include <cmath>

#include "ritz.h"

namespace samlite {

struct Range {  // of eigenvalues
  double low, high;
};

class Lanczos {
 public:
  // like: any tensor with the type and device of the vectors; p: their length.
  Lanczos(MatVec apply, const Tensor& like, int64_t p, Options options);
  Eigenpairs solve();

 private:
  // The factorisation H V^T = V^T T + beta q e^T over the rows of V_ behind the locked ones.
  void begin(const Tensor& start);
  void step();
  void look();
  void restart(int64_t keep);
  template <class Distance>
  bool extend(int64_t wanted, int64_t first_look, Distance distance);

  // The stages of a solve; each leaves the best k Ritz vectors in the first rows of V_.
  void krylov();
  void certify();
  enum class Verdict { clear, missed, undecided };
  Range range_of_rest() const;
  Verdict probe(int64_t locked, const Range& range);
  Verdict probe_beyond_kept(const Range& range);
  bool settled(const Range& range);
  void search();
  void merge();
  void refine(int64_t count);

  Tensor random();
  void orthonormalise_row(int64_t row);  // against those before it
  std::vector<double> residual_norms(const Tensor& V, const Tensor& W, const Ritz& pairs, int64_t count) const;
  std::vector<double> bounds(const std::vector<double>& values, const std::vector<double>& residuals,
                             const std::vector<Interval>& rest) const;
  std::vector<double> ratios(const std::vector<double>& values, const std::vector<double>& residuals,
                             const std::vector<Interval>& rest) const;
  double distance(const std::vector<double>& values, const std::vector<double>& residuals,
                  const std::vector<Interval>& rest) const;
  // Restarts round the factorisation again: eight of them as much as its products, in trials.
  double rounding() const { return rounding_error(eps_, norm_) * std::sqrt(1 + static_cast<double>(restarts_) / 8); }
  void see(double norm);
  double wanted(double value) const;
  bool full() const { return locked_ + size_ == rows_ - 1; }
  bool spanned() const { return locked_ + size_ == p_; }

  // An eigenvector u that was missed, of eigenvalue at least mu, has the coordinates c y in the basis, where
  // c = u . v_0 is random and y follows from the recurrence alone. |y| can only be large if |c| is small.
  struct Hypothesis {
    double mu;
    std::vector<double> y;
    double growth() const;
  };

  CountedMatVec apply_;
  Options options_;
  at::Generator generator_;
  int64_t p_, rows_;
  double eps_;
  Tensor V_;     // (rows, p): locked vectors, then the basis, then the next vector q
  Tensor H_;     // (rows, rows) float64: column j holds V (H v_j), so T is its lower right block
  Tensor beta_;  // (rows,) float64: norm of what orthogonalisation left of H v_j

  int64_t locked_ = 0, size_ = 0, looked_ = 0, restarts_ = 0;
  double norm_ = 0;  // largest |H v| seen: a lower bound of ||H||
  bool broke_down_ = false;
  Tensor coefficients_;           // H_ on the host, as of the last look
  Ritz ritz_;                     // of the current T
  Tensor coupling_;               // b of every Ritz pair: H x = theta x + b q
  std::vector<double> residual_;  // |b|
  std::vector<Hypothesis> hypotheses_;
  std::optional<Range> range_;  // that the search looks beyond

  std::vector<std::pair<double, double>> kept_pairs_;  // values and couplings of the Ritz vectors in V_, k or more
  std::optional<Tensor> q_;                            // the residual direction that they share
  double correction_ = 0;                              // the weight of q q^T beside H in the search

  std::vector<double> values_, residuals_;  // of the returned pairs
  std::vector<Interval> rest_;              // what else is known of the spectrum
  std::optional<bool> complete_;
};

}  // namespace samlite
