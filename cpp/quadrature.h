// Samples of traces and of spectra from random probes, for a matrix-free symmetric operator.
//
// The variance of Hutchinson's z^T f(H) z is carried by the few large eigenvalues of a Hessian. A short Lanczos run
// finds them, and its f(V T V^T), whose trace is known, is subtracted from every sample: their mean stays unbiased
// whatever that run found and for any symmetric H, and only the rest is left to chance.
#pragma once

#include "krylov.h"

namespace samlite {

// Samples of tr(H^j) for j = 1 .. order, H over unit().
class TraceProbes {
 public:
  // deflation: steps of the Lanczos run before the probes; 0: plain Hutchinson. limit: products at most.
  TraceProbes(MatVec apply, const Tensor& like, int64_t p, int64_t order, int64_t deflation, uint64_t seed,
              int64_t limit);
  // Takes so many more probes, of which two at least, as far as products reach; returns how many there are. Waits for
  // the device once.
  int64_t draw(int64_t more);
  const Tensor& samples() const { return samples_; }      // (probes, order) float64 on the host, less the known part
  const Tensor& known() const { return known_; }          // (order,): the traces of the known part
  const Tensor& magnitude() const { return magnitude_; }  // (order,): of its terms, which rounding is relative to
  bool exhausted() const { return apply_.exhausted(); }
  int64_t matvecs() const { return apply_.count(); }
  double unit() const { return apply_.unit(); }

 private:
  CountedMatVec apply_;
  at::Generator generator_;
  int64_t p_, order_;
  at::TensorOptions options_;
  Tensor V_, X_;                       // the Krylov space, and its Ritz vectors in it: rows
  Tensor powers_, known_, magnitude_;  // (order, m): those of the Ritz values, and their sums
  Tensor samples_;
};

// Nodes x and weights w: sum_i w_i f(x_i) approximates s^T f(H) s of the unit start s, exactly for polynomials of a
// degree below 2m (Golub and Welsch). Each node is within its residual of an eigenvalue.
struct Measure {
  Tensor nodes, weights, residuals;  // (m,) float64 on the host
  int64_t matvecs = 0;
};
Measure spectral_measure(MatVec apply, const Tensor& start, int64_t steps);

}  // namespace samlite
