#include "accuracy.h"

#include <algorithm>
#include <cmath>

namespace samlite {

Known known(const Ritz& pairs, const std::vector<double>& residuals, int64_t k) {
  Known result{head(pairs.values, k), head(residuals, k), {}};
  for (size_t i = k; i < residuals.size(); ++i) result.rest.push_back({pairs.values[i], residuals[i]});
  return result;
}

// Restarts round the factorisation again: eight of them as much as its products, in trials.
double Accuracy::rounding() const {
  const double restarts = static_cast<double>(basis_.restarts());
  return rounding_error(basis_.epsilon(), basis_.norm()) * std::sqrt(1 + restarts / 8);
}

double Accuracy::allowed(double value) const {
  return samlite::allowed(value, options_.tol, basis_.epsilon(), basis_.norm());
}

std::vector<double> Accuracy::bounds(const Known& known) const {
  return error_bounds(known.values, known.residuals, options_.separated ? known.rest : std::vector<Interval>{},
                      rounding());
}

std::vector<double> Accuracy::excess(const Known& known) const {
  auto result = bounds(known);
  for (size_t i = 0; i < known.values.size(); ++i)
    result[i] = result[i] > 2 * rounding() ? result[i] / allowed(known.values[i]) : 0;
  return result;
}

double Accuracy::log_excess(const Known& known) const {
  const auto all = excess(known);
  return std::log(*std::max_element(all.begin(), all.end()));
}

}  // namespace samlite
