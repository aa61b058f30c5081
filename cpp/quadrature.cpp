#include "quadrature.h"

#include <cmath>

namespace samlite {

namespace {

// Random signs, drawn on the host, so that a seed means the same probe on every device.
Tensor random_signs(int64_t p, at::Generator generator, const at::TensorOptions& options) {
  return at::randint(0, 2, {p}, std::move(generator), at::TensorOptions(at::kFloat)).mul_(2).sub_(1).to(options);
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

TraceProbes::TraceProbes(MatVec apply, const Tensor& like, int64_t p, int64_t order, int64_t deflation, uint64_t seed,
                         int64_t limit)
    : apply_(std::move(apply), limit),
      generator_(at::detail::createCPUGenerator(seed)),
      p_(p),
      order_(order),
      options_(like.options().requires_grad(false)),
      samples_(at::empty({0, order}, at::kDouble)) {
  Krylov space{at::empty({0, p}, options_), at::empty({0, 0}, at::kDouble)};
  if (deflation > 0) space = krylov(apply_, random_vector(p, generator_, options_), deflation);
  const auto [theta, S] = at::linalg_eigh(space.T);
  V_ = space.V;
  X_ = S.t().to(options_).contiguous();
  powers_ = theta.unsqueeze(0).pow(at::arange(1, order + 1, at::kDouble).unsqueeze(1));
  known_ = powers_.sum(1);
  magnitude_ = powers_.abs().sum(1);
}

int64_t TraceProbes::draw(int64_t more) {
  std::vector<Tensor> samples, coordinates;
  for (int64_t i = 0; i < more; ++i) {
    if (apply_.exhausted() && samples_.size(0) + i > 1) break;
    const Tensor z = random_signs(p_, generator_, options_);
    samples.push_back(power_samples(apply_, z, order_));
    coordinates.push_back(X_.mv(V_.mv(z)));
  }
  if (!samples.empty()) {
    const Tensor squares = at::stack(coordinates).to(at::kCPU, at::kDouble).square();
    const Tensor rest = at::stack(samples).to(at::kCPU) - squares.mm(powers_.t());
    check_finite((rest + known_).abs().sum().item<double>(), apply_.count());
    samples_ = at::cat({samples_, rest});
  }
  return samples_.size(0);
}

Measure spectral_measure(MatVec multiply, const Tensor& start, int64_t steps) {
  CountedMatVec apply(std::move(multiply), steps);
  const Krylov space = krylov(apply, start, steps);
  const auto [nodes, S] = at::linalg_eigh(space.T);
  return {nodes.mul(apply.unit()), S[0].square(), S[-1].abs().mul(space.beta * apply.unit()), apply.count()};
}

}  // namespace samlite
