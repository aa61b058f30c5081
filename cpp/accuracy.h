// When eigenvalues count as known: bounds on their errors, and how far those are from what is asked.
#pragma once

#include "krylov.h"

namespace samlite {

// The pairs to return, most wanted first, and what else is known of the spectrum.
struct Known {
  std::vector<double> values, residuals;
  std::vector<Interval> rest;
};

// The first k Ritz pairs, and the others as the rest.
Known known(const Ritz& pairs, const std::vector<double>& residuals, int64_t k);

class Accuracy {
 public:
  Accuracy(const Options& options, const Factorisation& basis) : options_(options), basis_(basis) {}
  // Of the errors of each pair. Gaps count where they may be trusted.
  std::vector<double> bounds(const Known& known) const;
  // The error of each pair over what is allowed. Errors near the rounding of H v cannot be made smaller: they count as
  // 0, and `converged` says what was reached.
  std::vector<double> excess(const Known& known) const;
  double log_excess(const Known& known) const;  // of the worst pair: at most 0 where all bounds hold
  bool holds(const Known& known) const { return log_excess(known) <= 0; }
  double allowed(double value) const;
  double rounding() const;

 private:
  const Options& options_;
  const Factorisation& basis_;
};

}  // namespace samlite
