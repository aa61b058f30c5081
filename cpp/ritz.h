// What the solvers share: the counted product, orthogonal vectors, and the small dense side: Ritz values, their
// order, and bounds on their errors, in float64 on the host and independent of the number of parameters.
#pragma once

#include <ATen/ATen.h>

#include <functional>
#include <optional>
#include <vector>

namespace samlite {

using at::Tensor;
using MatVec = std::function<Tensor(const Tensor&)>;  // v: (p,) -> H v: (p,), H symmetric

enum class Which { LA, SA, LM };  // largest algebraic, smallest algebraic, largest magnitude

struct Options {
  int64_t k = 1;
  Which which = Which::LA;
  double tol = 1e-3;      // on the error of an eigenvalue, relative to it
  bool verify = false;    // search for eigenvalues that one Krylov space cannot hold
  bool separated = true;  // use the gap between eigenvalues in error bounds: false where nothing vouches for it
  int64_t basis = 0;      // vectors of length p held at once, at least 2k + 2 (fewer where p is smaller)
  int64_t max_matvecs = 0;
  uint64_t seed = 0;
  std::optional<Tensor> start;                    // (s, p), rows: earlier eigenvectors
  std::function<void(int64_t, double)> progress;  // products so far, worst error over what is allowed
  double precision = 0;                           // relative error of products, where that is more than rounding
  std::function<double()> scale = {};             // of rounding in products, where that is more than their norm
};

struct Eigenpairs {
  std::vector<double> values, errors, residuals;
  Tensor vectors;  // (k, p), rows
  bool converged = false;
  std::optional<bool> complete;  // true: none was missed; false: the search did not finish; none: not searched
  int64_t matvecs = 0;
  void multiply(double unit);
};

// An operator that counts its products, refuses results of the wrong shape or type, and brings the matrix to a size of
// about one: products are those of H / unit(). So no square of a norm underflows or overflows, whatever the size of H,
// and as the unit is a power of two, no digit changes. The unit follows from the first product that is not zero; only
// that waits for the device.
class CountedMatVec {
 public:
  CountedMatVec(MatVec apply, int64_t limit) : apply_(std::move(apply)), limit_(limit) {}
  Tensor operator()(const Tensor& v);
  int64_t count() const { return count_; }
  bool exhausted() const { return count_ >= limit_; }
  // Raises ValueError where every product was so small that it has lost digits.
  double unit() const;

 private:
  void measure(const Tensor& v, const Tensor& w);

  MatVec apply_;
  int64_t limit_;
  int64_t count_ = 0;
  double unit_ = 0, largest_ = 0, least_ = 0;  // |w|: the largest so far, and the least that has all its digits
};

// A Gaussian vector, drawn on the host, so that a seed means the same vector on every device.
Tensor random_vector(int64_t p, at::Generator generator, const at::TensorOptions& options);

// The 2-norm, whose squares neither underflow nor overflow: ().
Tensor safe_norm(const Tensor& v);

// v: (p,) made orthogonal to the orthonormal rows of X: (n, p), and a unit vector, in place. Two passes leave it
// orthogonal to rounding ("twice is enough"), whatever cancelled in the first.
void orthonormalise(Tensor v, const Tensor& X);

std::vector<double> to_vector(const Tensor& t);
Tensor to_tensor(const std::vector<double>& values, const at::TensorOptions& options);

template <class T>
std::vector<T> head(const std::vector<T>& v, int64_t n) {
  return {v.begin(), v.begin() + n};
}

// Raises ValueError unless a number that came from products H v is finite.
void check_finite(double value, int64_t matvecs);

// A Ritz value that is not returned, with its residual: an eigenvalue lies in [value - residual, value +
// residual].
struct Interval {
  double value, residual;
};

struct Ritz {
  std::vector<double> values;  // most wanted first
  Tensor vectors;              // (m, m), column i belongs to values[i]
};

double rank(double value, Which which);  // the larger, the more wanted

// Eigen-decomposition of the symmetric matrix whose upper triangle is that of T: (m, m), float64, host.
Ritz ritz(const Tensor& T, const std::function<double(double)>& wanted);

// Bounds on |value - eigenvalue|: min(r, r^2/gap) + rounding, where the gap reaches to the nearest interval
// of any other Ritz value (Kato-Temple). Where intervals touch, or no value beyond the returned ones is
// known, r alone holds. The gap between bare Ritz values would understate the error of clustered eigenvalues.
std::vector<double> error_bounds(const std::vector<double>& values, const std::vector<double>& residuals,
                                 const std::vector<Interval>& rest, double rounding);

// The error up to which an eigenvalue counts as converged: relative to it; near zero relative to the norm of
// H; and a value that is zero to rounding is as good as it can be.
double allowed(double value, double tol, double eps, double norm);
bool within(const std::vector<double>& values, const std::vector<double>& errors, double tol, double eps, double norm);

// What rounding in H v alone leaves uncertain about an eigenvalue.
inline double rounding_error(double eps, double norm) { return 16 * eps * norm; }
double epsilon(const Tensor& like);  // machine epsilon of its type

}  // namespace samlite
