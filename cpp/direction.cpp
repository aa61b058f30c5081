#include "direction.h"

namespace samlite {

namespace {

// sum += g y of each sample, (n, p, q) and (n, q, o) -> (n, p, o).
void add_combination(Tensor& sum, const Tensor& g, const Tensor& y) {
  if (g.size(2) == 1) {
    sum = sum.defined() ? sum.addcmul_(g, y) : g * y;
  } else {
    sum = sum.defined() ? sum.baddbmm_(g, y) : g.bmm(y);
  }
}

}  // namespace

// Batches of tiny products of matrices are slow.
Tensor inner_products(const Tensor& x, const Tensor& y) {
  if (x.size(1) == 1 && y.size(1) == 1) return (x * y).sum(2, /*keepdim=*/true);
  return x.bmm(y.mT());
}

Tensor Whole::apply(const Use& use, const Tensor& a, const Tensor& delta) const {
  return use.apply(use.view().of(flat_), a, delta);
}

Tensor Whole::adjoint(const Use& use, const Tensor& a, const Tensor& delta) const {
  return use.adjoint(use.view().of(flat_), a, delta);
}

void Whole::add(const Use& use, const Tensor& a, const Tensor& delta, const Derivatives& dot) {
  const Tensor own = use.view().of(flat_);
  if (dot.delta.defined()) own.add_(use.gradient(a, dot.delta, Reduction::none));
  if (dot.a.defined()) own.add_(use.gradient_along(dot.a, delta, Reduction::none));
}

bool Whole::add_sum(const Tensor& scale, Tensor& sum) const {
  if (flat_.dim() == 1) return false;
  sum.add_(scale.matmul(flat_));
  return true;
}

Tensor OuterProducts::apply(const Use& use, const Tensor& a, const Tensor& delta) const {
  const Tensor inputs = use.matrix()->input_rows(a);
  Tensor outputs;
  for (const auto& [left, right, is_delta, is_a] : rows_)
    add_combination(outputs, is_a ? gram_.a : inner_products(inputs, right), left);
  return use.matrix()->to_output(outputs, delta);
}

Tensor OuterProducts::adjoint(const Use& use, const Tensor& a, const Tensor& delta) const {
  const Tensor outputs = use.matrix()->output_rows(delta);
  Tensor inputs;
  for (const auto& [left, right, is_delta, is_a] : rows_)
    add_combination(inputs, is_delta ? gram_.delta : inner_products(outputs, left), right);
  return use.matrix()->to_input(inputs, a);
}

void OuterProducts::add(const Use& use, const Tensor& a, const Tensor& delta, const Derivatives& dot) {
  const Matrix& matrix = *use.matrix();
  const bool only = gram_.a.defined();
  if (dot.delta.defined()) rows_.push_back({matrix.output_rows(dot.delta), matrix.input_rows(a), false, only});
  if (dot.a.defined()) rows_.push_back({matrix.output_rows(delta), matrix.input_rows(dot.a), only, false});
}

}  // namespace samlite
