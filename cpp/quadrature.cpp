#include "quadrature.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace samlite {

namespace {

// Probes before the first standard error: with fewer, those that happen to agree stop it early. Without the large
// eigenvalues taken out, samples are so skewed that it takes more.
constexpr int64_t kFirstLook = 12, kFirstLookPlain = 30;

// Random signs, drawn on the host, so that a seed means the same probe on every device.
Tensor random_signs(int64_t p, at::Generator generator, const at::TensorOptions& options) {
  return at::randint(0, 2, {p}, std::move(generator), at::TensorOptions(at::kFloat)).mul_(2).sub_(1).to(options);
}

// What makes mean +- 1.96 errors an interval of 95 % with few samples of a skewed distribution, as those of a matrix
// with outliers are: (columns,) for samples (n, columns). Student's quantile over the normal one (Abramowitz and
// Stegun, 26.7.5), and the skewness term of the two-sided interval (Hall, "The Bootstrap and Edgeworth Expansion",
// 1992, 3.5).
Tensor widening(const Tensor& samples) {
  const double z = 1.959964, n = static_cast<double>(samples.size(0));
  const double first = (z * z + 1) / 4, second = (5 * std::pow(z, 4) + 16 * z * z + 3) / 96;
  Tensor centred = samples - samples.mean(0);
  const Tensor largest = centred.abs().amax(0);
  const Tensor unit = largest / std::get<0>(at::frexp(largest));  // a power of two, as third powers may underflow
  centred = centred.div_(at::where(largest > 0, unit, 1));
  const Tensor variance = centred.square().mean(0);
  const Tensor skewness = centred.pow(3).mean(0) / at::where(variance > 0, variance, 1).pow(1.5);
  const double weight = (std::pow(z, 4) + 2 * z * z - 3) / 18;
  return skewness.square().mul_(weight / n).add_(1 + first / (n - 1) + second / ((n - 1) * (n - 1)));
}

// z^T H^j z for j = 1 .. order: (order,) float64 on the device, from order/2 products. The vectors are scaled to 1, as
// powers of a small Hessian reach denormal numbers.
Tensor power_samples(CountedMatVec& apply, const Tensor& z, int64_t order) {
  std::vector<Tensor> samples;
  Tensor u = z, size = at::ones({}, z.options().dtype(at::kDouble));
  for (int64_t j = 1; j <= order; j += 2) {
    Tensor next = apply(u);
    samples.push_back(u.dot(next) * size * size);
    const Tensor norm = at::linalg_vector_norm(next);
    size = size * norm;
    samples.push_back(size * size);
    u = next.div_(at::where(norm > 0, norm, 1));
  }
  samples.resize(order);
  return at::stack(samples).to(at::kDouble);
}

}  // namespace

Traces power_traces(MatVec multiply, const Tensor& like, int64_t p, int64_t order, int64_t watched,
                    const ProbeOptions& options) {
  CountedMatVec apply(std::move(multiply), options.max_matvecs);
  auto generator = at::detail::createCPUGenerator(options.seed);
  const Tensor exponents = at::arange(1, order + 1, at::kDouble).unsqueeze(1);  // (order, 1)
  Krylov space{at::empty({0, p}, like.options()), at::empty({0, 0}, at::kDouble)};
  if (options.deflation > 0) space = krylov(apply, random_vector(p, generator, like.options()), options.deflation);
  const auto [theta, S] = at::linalg_eigh(space.T);
  const Tensor powers = theta.unsqueeze(0).pow(exponents);  // (order, m)
  const Tensor known = powers.sum(1);
  const Tensor X = S.t().to(like.options()).contiguous();

  Traces result;
  std::vector<Tensor> samples, coordinates;
  double before = std::numeric_limits<double>::infinity();
  for (int64_t look = options.deflation > 0 ? kFirstLook : kFirstLookPlain;; look += look / 4) {
    while (result.probes < look && !(apply.exhausted() && result.probes > 1)) {
      const Tensor z = random_signs(p, generator, like.options());
      samples.push_back(power_samples(apply, z, order));
      coordinates.push_back(X.mv(space.V.mv(z)));
      ++result.probes;
    }
    const Tensor squares = at::stack(coordinates).to(at::kCPU, at::kDouble).square();
    const Tensor rest = at::stack(samples).to(at::kCPU) - squares.mm(powers.t());  // (probes, order)
    const Tensor values = known + rest.mean(0);
    Tensor errors = rest.std(0).mul_(widening(rest)).div_(std::sqrt(static_cast<double>(result.probes)));
    errors.add_(powers.abs().sum(1), epsilon(like));  // rounding in H v
    result.values.assign(values.const_data_ptr<double>(), values.const_data_ptr<double>() + order);
    result.errors.assign(errors.const_data_ptr<double>(), errors.const_data_ptr<double>() + order);
    double worst = 0;
    for (int64_t j = watched - 1; j < order; ++j) {
      check_finite(result.values[j] + result.errors[j], apply.count());
      // Rounding is all that is left of a matrix that the Lanczos run spans, or of zero.
      const double allowed = options.tol * std::abs(result.values[j]);
      if (result.errors[j] > 0) worst = std::max(worst, result.errors[j] / allowed);
    }
    result.matvecs = apply.count();
    result.unit = apply.unit();
    // Twice in a row: the first time may be luck.
    result.converged = worst <= 1 && before <= 1;
    before = worst;
    if (options.progress) options.progress(apply.count(), worst);
    if (result.converged || apply.exhausted()) return result;
  }
}

Measure spectral_measure(MatVec multiply, const Tensor& start, int64_t steps) {
  CountedMatVec apply(std::move(multiply), steps);
  const Krylov space = krylov(apply, start, steps);
  const auto [nodes, S] = at::linalg_eigh(space.T);
  return {nodes.mul(apply.unit()), S[0].square(), S[-1].abs().mul(space.beta * apply.unit()), apply.count()};
}

}  // namespace samlite
