// Traces of functions of a matrix-free symmetric operator from random probes, each with a standard error.
//
// The variance of Hutchinson's z^T f(H) z is carried by the few large eigenvalues of a Hessian. A short Lanczos run
// finds them, and its f(V T V^T), whose trace is known, is subtracted from every sample: the estimate stays unbiased
// whatever that run found and for any symmetric H, and only the rest is left to chance.
#pragma once

#include "krylov.h"

namespace samlite {

struct ProbeOptions {
  double tol = 0.05;        // on the standard error, relative to the value
  int64_t max_matvecs = 0;  // products at most
  int64_t deflation = 0;    // steps of the Lanczos run before the probes; 0: plain Hutchinson
  uint64_t seed = 0;
  std::function<void(int64_t, double)> progress;  // products so far, worst error over what is allowed
};

struct Traces {
  std::vector<double> values, errors;  // of tr((H / unit)^j), j = 1 .. order
  double unit = 1;                     // a power of two
  int64_t probes = 0, matvecs = 0;
  bool converged = false;
};

// tr(H^j) for j = 1 .. order, until the standard errors of those from `watched` on are small enough.
Traces power_traces(MatVec apply, const Tensor& like, int64_t p, int64_t order, int64_t watched,
                    const ProbeOptions& options);

// Nodes x and weights w: sum_i w_i f(x_i) approximates s^T f(H) s of the unit start s, exactly for polynomials of a
// degree below 2m (Golub and Welsch). Each node is within its residual of an eigenvalue.
struct Measure {
  Tensor nodes, weights, residuals;  // (m,) float64 on the host
  int64_t matvecs = 0;
};
Measure spectral_measure(MatVec apply, const Tensor& start, int64_t steps);

}  // namespace samlite
