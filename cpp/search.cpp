#include "search.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "refine.h"

namespace samlite {

namespace {

// With this probability at most, over the random start, the search ends although an eigenvalue was missed.
constexpr double kMissProbability = 1e-3;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Range {  // of eigenvalues
  double low, high;
  double outside(double value) const { return std::max(value - high, low - value); }
};

class Search {
 public:
  Search(Factorisation& basis, CountedMatVec& apply, const Accuracy& accuracy, const Options& options, Known& known)
      : basis_(basis), apply_(apply), accuracy_(accuracy), options_(options), known_(known), p_(basis.V.size(1)) {}
  bool finish(Kept kept);

 private:
  enum class Verdict { clear, missed, undecided };
  Range range_of_rest() const;
  Verdict probe(int64_t locked, const Range& range, MatVec product);
  Verdict probe_beyond(const Kept& kept, const Range& range);
  bool settled(const Range& range);
  void merge();

  Factorisation& basis_;
  CountedMatVec& apply_;
  const Accuracy& accuracy_;
  const Options& options_;
  Known& known_;
  int64_t p_;
};

// The range that the search has to show to hold the rest of the spectrum. On the side asked for it ends at the k-th
// value and what is not known of that. A bound that uses a gap needs the gap to be empty: the range ends below each
// value by as much as its bound needs to converge, and below the k-th by at least a quarter of the gap that is known,
// which costs next to nothing.
Range Search::range_of_rest() const {
  const double error = accuracy_.bounds(known_).back(), last = known_.values.back(), rounding = accuracy_.rounding();
  const double most = rank(last, options_.which) + std::max(error, options_.tol * std::abs(last)) + 2 * rounding;
  Range range{-4 * basis_.norm(), 4 * basis_.norm()};
  if (options_.which != Which::SA) range.high = most;
  if (options_.which != Which::LA) range.low = -most;
  for (int64_t i = 0; options_.separated && i < options_.k; ++i) {
    const double value = known_.values[i], r = known_.residuals[i];
    const double side = options_.which == Which::LA || (options_.which == Which::LM && value > 0) ? 1 : -1;
    // Of the error without its rounding, a little less than what `log_excess` lets pass.
    const double limit = (1 - 1e-6) * std::max(accuracy_.allowed(value), 2 * rounding) - rounding;
    double depth = r > limit ? r * (r / limit) : 0;
    if (i == options_.k - 1) {
      double gap = known_.rest.empty() ? 0 : kInfinity;
      for (const auto& other : known_.rest) gap = std::min(gap, side * (value - other.value) - other.residual);
      depth = std::max(depth, gap / 4);
    }
    if (depth <= 2 * rounding) continue;
    if (side > 0)
      range.high = std::min(range.high, value - depth);
    else
      range.low = std::max(range.low, value + depth);
  }
  return range;
}

// Searches the complement of the first `locked` rows for an eigenvalue outside of the range, from a fresh random
// start v_0. If u is an eigenvector there with eigenvalue mu, the recurrence fixes all its coordinates up to
// c = u . v_0, and as their squares sum to at most 1, |c| <= 1/growth(mu). For a random start that has a
// probability of at most sqrt(2p/pi)/growth; growth rises with mu, so the end of the range is the worst case. A few
// products suffice where the rest of the spectrum lies well inside; where it touches the end, as many as
// resolve it.
Search::Verdict Search::probe(int64_t locked, const Range& range, MatVec product) {
  const double needed = std::sqrt(2 * static_cast<double>(p_) / M_PI) / kMissProbability;
  if (locked == p_) return Verdict::clear;
  if (apply_.exhausted()) return Verdict::undecided;
  std::vector<Hypothesis> ends;
  if (options_.which != Which::SA) ends.emplace_back(range.high);
  if (options_.which != Which::LA) ends.emplace_back(range.low);
  basis_.begin(basis_.random(), locked, std::move(product), std::move(ends));
  bool missed = false;
  const auto log_excess = [&] {
    missed = range.outside(basis_.ritz().values[0]) > 0;
    if (missed && locked > options_.k) return -kInfinity;
    if (missed) return accuracy_.log_excess(known(basis_.ritz(), basis_.residuals(), 1));
    return std::log(needed / basis_.growth());
  };
  const bool decided = basis_.extend(1, 3, [&](double value) { return range.outside(value); }, log_excess);
  return !decided ? Verdict::undecided : missed ? Verdict::missed : Verdict::clear;
}

// Whether the complement of all kept Ritz vectors X is clear, which takes about half the products of the
// complement of the first k, as the values next to the k-th are out of the way. With H X^T = X^T Theta + q
// b^T, the eigenvalues of H beyond mu number those of Theta plus those of the Schur complement P H P + q b^T
// (mu - Theta)^{-1} b q^T (Sylvester's law of inertia): one rank-one term accounts for X being no exact
// invariant subspace.
Search::Verdict Search::probe_beyond(const Kept& kept, const Range& range) {
  const auto count = static_cast<int64_t>(kept.values.size());
  if (count <= options_.k || options_.which == Which::LM) return Verdict::undecided;
  const double mu = options_.which == Which::LA ? range.high : range.low;
  double weight = 0;
  for (int64_t i = 0; i < count; ++i) weight += kept.coupling[i] * kept.coupling[i] / (mu - kept.values[i]);
  if (!(std::abs(weight) < basis_.norm())) return Verdict::undecided;
  return probe(count, range, [&](const Tensor& v) {
    const Tensor w = apply_(v);
    return weight == 0 ? w : at::addcmul(w, kept.q, kept.q.dot(v), weight);
  });
}

// Whether the error bounds hold where the rest of the spectrum is known to lie in the range, and no more.
bool Search::settled(const Range& range) {
  Known known = known_;
  known.rest = {{(range.high + range.low) / 2, (range.high - range.low) / 2}};
  if (!accuracy_.holds(known)) return false;
  known_ = known;
  return true;
}

bool Search::finish(Kept kept) {
  if (options_.k == p_) {
    known_.rest.clear();
    return true;
  }
  Range range = range_of_rest();
  bool clear = probe_beyond(kept, range) == Verdict::clear && settled(range);
  kept = {};
  while (!clear) {
    range = range_of_rest();
    const Verdict verdict = probe(options_.k, range, std::ref(apply_));
    if (verdict == Verdict::undecided) return false;
    clear = verdict == Verdict::clear && settled(range);
    if (!clear) merge();
  }
  return true;
}

// Adds the pair that the search found: it is an eigenvector of H to within its residual and its coupling to
// the others. Where a neighbour now lies so close that a bound fails (a cluster), the pairs are refined
// together.
void Search::merge() {
  const int64_t k = options_.k;
  const double value = basis_.ritz().values[0], residual = basis_.residuals()[0];
  const auto others = known(basis_.ritz(), basis_.residuals(), 1).rest;
  auto& [values, residuals, rest] = known_;
  rest.insert(rest.end(), others.begin(), others.end());
  basis_.restart(1);

  int64_t place = 0;
  while (place < k && rank(values[place], options_.which) >= rank(value, options_.which)) ++place;
  values.insert(values.begin() + place, value);
  residuals.insert(residuals.begin() + place, std::hypot(residual, basis_.coupling_to_locked()));
  std::vector<int64_t> order(k);
  std::iota(order.begin(), order.end(), 0);
  order.insert(order.begin() + place, k);
  rotate(basis_.V.narrow(0, 0, k + 1), at::eye(k + 1, at::kDouble).index_select(1, at::tensor(order)));
  rest.push_back({values.back(), residuals.back()});
  values.pop_back();
  residuals.pop_back();
  if (!accuracy_.holds(known_)) known_ = refine(basis_, apply_, accuracy_, options_, k + 1);
}

}  // namespace

bool search(Factorisation& basis, CountedMatVec& apply, const Accuracy& accuracy, const Options& options, Known& known,
            Kept kept) {
  return Search(basis, apply, accuracy, options, known).finish(std::move(kept));
}

}  // namespace samlite
