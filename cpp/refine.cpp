#include "refine.h"

#include <algorithm>
#include <cmath>

namespace samlite {

namespace {

// |W^T s_i - theta_i V^T s_i| of the first `count` Ritz pairs, in blocks of columns. V and W: (n, p).
std::vector<double> residual_norms(const Tensor& V, const Tensor& W, const Ritz& pairs, int64_t count) {
  const Tensor S = pairs.vectors.narrow(1, 0, count).t().to(V.options()).contiguous();
  const Tensor theta = to_tensor(head(pairs.values, count), V.options()).unsqueeze(1);
  Tensor square = at::zeros({count}, V.options().dtype(at::kDouble));
  for (int64_t c = 0; c < V.size(1); c += kColumns) {
    const int64_t width = std::min(kColumns, V.size(1) - c);
    const Tensor R = S.mm(W.narrow(1, c, width)).sub_(S.mm(V.narrow(1, c, width)).mul_(theta));
    square.add_(R.square_().sum(1));
  }
  return to_vector(square.sqrt_());
}

}  // namespace

Known refine(Factorisation& basis, CountedMatVec& apply, const Accuracy& accuracy, const Options& options,
             int64_t count) {
  const int64_t k = options.k, p = basis.V.size(1), capacity = basis.V.size(0) / 2;
  const Tensor V = basis.V.narrow(0, 0, capacity), W = basis.V.narrow(0, capacity, capacity);
  const auto multiply = [&](int64_t row) {
    basis.orthonormalise_row(row);
    W[row].copy_(apply(V[row]));
  };
  int64_t size = 0;
  for (; size < count; ++size) multiply(size);
  while (true) {
    const Tensor vectors = V.narrow(0, 0, size), images = W.narrow(0, 0, size);
    const Ritz pairs = ritz(vectors.mm(images.t()).to(at::kCPU, at::kDouble),
                            [&](double value) { return rank(value, options.which); });
    const auto residuals = residual_norms(vectors, images, pairs, std::min(k + 1, size));
    basis.see(std::hypot(std::abs(pairs.values[0]), residuals[0]));
    basis.see_scale();
    const Known now = known(pairs, residuals, k);
    const double excess = accuracy.log_excess(now);
    if (options.progress) options.progress(apply.count(), std::exp(excess));
    const bool done = excess <= 0 || size == p || apply.exhausted();
    if (done || size == capacity) {
      const int64_t keep = done ? k : k + (size - k) / 2;
      const Tensor S = pairs.vectors.narrow(1, 0, keep);
      rotate(vectors, S);
      rotate(images, S);
      size = keep;
      if (done) return now;
      continue;
    }
    const auto all = accuracy.excess(now);
    const int64_t worst = std::max_element(all.begin(), all.end()) - all.begin();
    const Tensor s = pairs.vectors.select(1, worst).to(V.options());
    V[size].copy_(images.t().mv(s).sub_(vectors.t().mv(s), now.values[worst]));
    multiply(size);
    ++size;
  }
}

}  // namespace samlite
