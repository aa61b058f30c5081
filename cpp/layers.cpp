#include "layers.h"

#include <numeric>

namespace samlite {

namespace {

Sizes prepended(int64_t first, at::IntArrayRef rest) {
  Sizes result{first};
  result.insert(result.end(), rest.begin(), rest.end());
  return result;
}

// (n, sizes) -> (n, 1, ..., sizes), so that it broadcasts against a tensor of so many dimensions.
Tensor aligned(const Tensor& theta, int64_t dim) {
  Sizes shape(dim - theta.dim() + 1, 1);
  shape[0] = theta.size(0);
  shape.insert(shape.end(), theta.sizes().begin() + 1, theta.sizes().end());
  return theta.reshape(shape);
}

// Summed to the sizes of theta, or of each sample's theta.
Tensor summed(const Tensor& t, at::IntArrayRef sizes, Reduction reduction) {
  if (reduction == Reduction::sum) return at::sum_to(t, sizes);
  Sizes shape(t.dim() - sizes.size(), 1);
  shape[0] = t.size(0);
  shape.insert(shape.end(), sizes.begin(), sizes.end());
  return at::sum_to(t, shape).reshape(prepended(t.size(0), sizes));
}

// Row numbers in each sample's own table of so many rows, the tables below one another.
Tensor in_own_table(const Tensor& rows, int64_t table) {
  const auto shape = prepended(-1, Sizes(rows.dim() - 1, 1));
  return rows + at::arange(rows.size(0), rows.options()).mul_(table).view(shape);
}

// (n, ..., features) -> (n, positions, features).
Tensor by_position(const Tensor& t) { return t.reshape({t.size(0), -1, t.size(-1)}); }

// (n, c, ...) -> (1, n c, ...): samples as groups of channels.
Tensor as_groups(const Tensor& t) {
  auto shape = t.sizes().vec();
  shape[1] *= shape[0];
  shape[0] = 1;
  return t.reshape(shape);
}

// (n, ..., features) -> (n, positions, features), with so many dimensions of features.
Tensor with_positions(const Tensor& t, size_t features) {
  Sizes shape{t.size(0), -1};
  const auto last = t.sizes().slice(t.dim() - features);
  shape.insert(shape.end(), last.begin(), last.end());
  return t.reshape(shape);
}

// (n, c, l) or (n, c, h, w) as two spatial dimensions.
Tensor plane(const Tensor& t) { return t.dim() == 3 ? t.unsqueeze(2) : t; }

Sizes pair(const Sizes& v, int64_t first) { return v.size() == 1 ? Sizes{first, v[0]} : v; }

}  // namespace

Tensor View::of(const Tensor& flat) const {
  if (flat.dim() == 1) return flat.as_strided(sizes, strides, flat.storage_offset() + offset);
  return flat.as_strided(prepended(flat.size(0), sizes), prepended(flat.stride(0), strides),
                         flat.storage_offset() + offset);
}

bool View::same_place(const View& other) const {
  return sizes == other.sizes && strides == other.strides && offset == other.offset;
}

int64_t Matrix::inputs() const {
  return std::accumulate(sizes().begin() + 1, sizes().end(), int64_t{1}, std::multiplies<>());
}

double Matrix::gram_cost(int64_t positions_of_param) const {
  return static_cast<double>(positions_of_param) * static_cast<double>(inputs() + outputs());
}

double Matrix::materialised_cost() const { return static_cast<double>(inputs()) * static_cast<double>(outputs()); }

Tensor Linear::apply(const Tensor& theta, const Tensor& a, const Tensor& like) const {
  if (!one_a_sample(theta)) return at::matmul(a, theta.t());
  return by_position(a).bmm(theta.mT()).view(like.sizes());
}

Tensor Linear::adjoint(const Tensor& theta, const Tensor& a, const Tensor& delta) const {
  if (!one_a_sample(theta)) return at::matmul(delta, theta);
  return by_position(delta).bmm(theta).view(a.sizes());
}

Tensor Linear::gradient(const Tensor& a, const Tensor& delta, Reduction reduction) const {
  if (reduction == Reduction::none) return by_position(delta).mT().bmm(by_position(a));
  return delta.reshape({-1, delta.size(-1)}).t().mm(a.reshape({-1, a.size(-1)}));
}

Tensor Linear::input_rows(const Tensor& a) const { return by_position(a); }
Tensor Linear::output_rows(const Tensor& delta) const { return by_position(delta); }
Tensor Linear::to_output(const Tensor& rows, const Tensor& like) const { return rows.view(like.sizes()); }
Tensor Linear::to_input(const Tensor& rows, const Tensor& like) const { return rows.view(like.sizes()); }

Conv::Conv(View view, Sizes stride, Sizes padding, Sizes dilation, int64_t groups, std::optional<Sizes> output_padding)
    : Matrix(std::move(view)),
      stride_(std::move(stride)),
      padding_(std::move(padding)),
      dilation_(std::move(dilation)),
      output_padding_(output_padding.value_or(Sizes(stride_.size(), 0))),
      groups_(groups),
      transposed_(output_padding.has_value()) {}

Tensor Conv::apply(const Tensor& theta, const Tensor& a, const Tensor& like) const {
  const auto convolve = [&](const Tensor& x, const Tensor& w, int64_t groups) {
    return at::convolution(x, w, {}, stride_, padding_, dilation_, transposed_, output_padding_, groups);
  };
  if (!one_a_sample(theta)) return convolve(a, theta, groups_);
  return convolve(as_groups(a), theta.flatten(0, 1), groups_ * a.size(0)).view(like.sizes());
}

Tensor Conv::adjoint(const Tensor& theta, const Tensor& a, const Tensor& delta) const {
  const auto input = [&](const Tensor& d, const Tensor& x, const Tensor& w, int64_t groups) {
    return std::get<0>(at::convolution_backward(d, x, w, at::OptionalIntArrayRef(), stride_, padding_, dilation_,
                                                transposed_, output_padding_, groups, {true, false, false}));
  };
  if (!one_a_sample(theta)) return input(delta, a, theta, groups_);
  return input(as_groups(delta), as_groups(a), theta.flatten(0, 1), groups_ * a.size(0)).view(a.sizes());
}

Tensor Conv::gradient(const Tensor& a, const Tensor& delta, Reduction reduction) const {
  const auto weight = [&](const Tensor& d, const Tensor& x, at::IntArrayRef size, int64_t groups) {
    return std::get<1>(at::convolution_backward(d, x, d.new_empty(size), at::OptionalIntArrayRef(), stride_, padding_,
                                                dilation_, transposed_, output_padding_, groups, {false, true, false}));
  };
  if (reduction == Reduction::sum) return weight(delta, a, sizes(), groups_);
  const int64_t n = delta.size(0);
  auto grouped = sizes();
  grouped[0] *= n;
  return weight(as_groups(delta), as_groups(a), grouped, groups_ * n).view(prepended(n, sizes()));
}

Sizes Conv::kernel() const { return pair({sizes().begin() + 2, sizes().end()}, 1); }

Tensor Conv::input_rows(const Tensor& a) const {
  return at::im2col(plane(a), kernel(), pair(dilation_, 1), pair(padding_, 0), pair(stride_, 1)).mT();
}

Tensor Conv::output_rows(const Tensor& delta) const { return delta.flatten(2).mT(); }

Tensor Conv::to_output(const Tensor& rows, const Tensor& like) const { return rows.mT().reshape(like.sizes()); }

Tensor Conv::to_input(const Tensor& rows, const Tensor& like) const {
  const Tensor image = plane(like);
  return at::col2im(rows.mT().contiguous(), image.sizes().slice(2), kernel(), pair(dilation_, 1), pair(padding_, 0),
                    pair(stride_, 1))
      .view(like.sizes());
}

Contraction::Contraction(View view, std::string a, std::string theta, std::string z)
    : Use(std::move(view)), a_(std::move(a)), theta_(std::move(theta)), z_(std::move(z)) {}

Tensor Contraction::apply(const Tensor& theta, const Tensor& a, const Tensor& like) const {
  const auto own = one_a_sample(theta) ? "Z" + theta_ : theta_;
  return at::einsum("ZY" + a_ + "," + own + "->ZY" + z_, {with_positions(a, a_.size()), theta}).reshape(like.sizes());
}

Tensor Contraction::adjoint(const Tensor& theta, const Tensor& a, const Tensor& delta) const {
  const auto own = one_a_sample(theta) ? "Z" + theta_ : theta_;
  return at::einsum("ZY" + z_ + "," + own + "->ZY" + a_, {with_positions(delta, z_.size()), theta}).reshape(a.sizes());
}

Tensor Contraction::gradient(const Tensor& a, const Tensor& delta, Reduction reduction) const {
  const auto own = reduction == Reduction::none ? "Z" + theta_ : theta_;
  return at::einsum("ZY" + a_ + ",ZY" + z_ + "->" + own,
                    {with_positions(a, a_.size()), with_positions(delta, z_.size())});
}

Scale::Scale(View view, std::optional<Tensor> mean, std::optional<Tensor> inverse)
    : Use(std::move(view)), mean_(std::move(mean)), inverse_(std::move(inverse)) {}

Tensor Scale::apply(const Tensor& theta, const Tensor& a, const Tensor&) const {
  const Tensor t = one_a_sample(theta) ? aligned(theta, a.dim()) : theta;
  return mean_ ? (a - *mean_).mul_(*inverse_).mul_(t) : a * t;
}

Tensor Scale::adjoint(const Tensor& theta, const Tensor&, const Tensor& delta) const {
  const Tensor result = delta * (one_a_sample(theta) ? aligned(theta, delta.dim()) : theta);
  return inverse_ ? result * *inverse_ : result;
}

Tensor Scale::gradient(const Tensor& a, const Tensor& delta, Reduction reduction) const {
  return summed(mean_ ? (a - *mean_).mul_(*inverse_).mul_(delta) : a * delta, sizes(), reduction);
}

// The gradient is linear in a but for the fixed mean, which has no part in the derivative.
Tensor Scale::gradient_along(const Tensor& a_dot, const Tensor& delta, Reduction reduction) const {
  if (!inverse_) return gradient(a_dot, delta, reduction);
  return summed((a_dot * *inverse_).mul_(delta), sizes(), reduction);
}

Tensor Shift::apply(const Tensor& theta, const Tensor&, const Tensor& like) const {
  return (one_a_sample(theta) ? aligned(theta, like.dim()) : theta).expand_as(like);
}

Tensor Shift::adjoint(const Tensor&, const Tensor&, const Tensor&) const {
  TORCH_INTERNAL_ASSERT(false, "a shift does not depend on an input");
}

Tensor Shift::gradient(const Tensor&, const Tensor& delta, Reduction reduction) const {
  return summed(delta, sizes(), reduction);
}

Tensor Embedding::apply(const Tensor& theta, const Tensor& a, const Tensor&) const {
  const Tensor valid = (a != padding_row_).unsqueeze(-1), rows = a.clamp_min(0);
  if (!one_a_sample(theta)) return at::embedding(theta, rows).mul_(valid);
  return at::embedding(theta.reshape({-1, sizes()[1]}), in_own_table(rows, sizes()[0])).mul_(valid);
}

Tensor Embedding::adjoint(const Tensor&, const Tensor&, const Tensor&) const {
  TORCH_INTERNAL_ASSERT(false, "embeddings are not differentiable in their row numbers");
}

Tensor Embedding::gradient(const Tensor& a, const Tensor& delta, Reduction reduction) const {
  const bool own = reduction == Reduction::none;
  const Tensor d = delta * (a != padding_row_).unsqueeze(-1), first = a.clamp_min(0);
  const Tensor rows = own ? in_own_table(first, sizes()[0]) : first;
  const int64_t tables = own ? delta.size(0) : 1;
  return at::zeros({tables * sizes()[0], sizes()[1]}, delta.options())
      .index_add_(0, rows.flatten(), d.reshape({-1, sizes()[1]}))
      .view(own ? prepended(tables, sizes()) : sizes());
}

}  // namespace samlite
