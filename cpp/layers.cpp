#include "layers.h"

#include <numeric>

namespace samlite {

namespace {

std::vector<int64_t> prepended(int64_t first, at::IntArrayRef rest) {
  std::vector<int64_t> result{first};
  result.insert(result.end(), rest.begin(), rest.end());
  return result;
}

// (n, sizes) -> (n, 1, ..., sizes), so that it broadcasts against a tensor of so many dimensions.
Tensor aligned(const Tensor& theta, int64_t dim) {
  std::vector<int64_t> shape(dim - theta.dim() + 1, 1);
  shape[0] = theta.size(0);
  shape.insert(shape.end(), theta.sizes().begin() + 1, theta.sizes().end());
  return theta.reshape(shape);
}

// Summed to the sizes of theta, or of each sample's theta.
Tensor summed(const Tensor& t, at::IntArrayRef sizes, bool per_sample) {
  if (!per_sample) return at::sum_to(t, sizes);
  std::vector<int64_t> shape(t.dim() - sizes.size(), 1);
  shape[0] = t.size(0);
  shape.insert(shape.end(), sizes.begin(), sizes.end());
  return at::sum_to(t, shape).reshape(prepended(t.size(0), sizes));
}

// Row numbers in each sample's own table of so many rows, the tables below one another.
Tensor in_own_table(const Tensor& rows, int64_t table) {
  const auto shape = prepended(-1, std::vector<int64_t>(rows.dim() - 1, 1));
  return rows + at::arange(rows.size(0), rows.options()).mul_(table).view(shape);
}

// (n, c, ...) -> (1, n c, ...): samples as groups of channels.
Tensor as_groups(const Tensor& t) {
  auto shape = t.sizes().vec();
  shape[1] *= shape[0];
  shape[0] = 1;
  return t.reshape(shape);
}

int64_t product(at::IntArrayRef sizes) {
  return std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<>());
}

}  // namespace

Tensor Use::view(const Tensor& flat) const { return flat.as_strided(sizes, strides, flat.storage_offset() + offset); }

Tensor Use::view_per_sample(const Tensor& flat) const {
  return flat.as_strided(prepended(flat.size(0), sizes), prepended(flat.stride(0), strides),
                         flat.storage_offset() + offset);
}

bool Use::same_view(const Use& other) const {
  return kind == other.kind && sizes == other.sizes && strides == other.strides && offset == other.offset;
}

Tensor Use::apply(const Tensor& theta, const Tensor& a, const Tensor& like, bool per_sample) const {
  switch (kind) {
    case Kind::linear:
      if (!per_sample) return at::matmul(a, theta.t());
      return a.reshape({a.size(0), -1, a.size(-1)}).bmm(theta.mT()).view(like.sizes());
    case Kind::conv: {
      const std::vector<int64_t> none(stride.size(), 0);
      if (!per_sample) return at::convolution(a, theta, {}, stride, padding, dilation, false, none, groups);
      return at::convolution(as_groups(a), theta.flatten(0, 1), {}, stride, padding, dilation, false, none,
                             groups * a.size(0))
          .view(like.sizes());
    }
    case Kind::scale: {
      const Tensor t = per_sample ? aligned(theta, a.dim()) : theta;
      return mean ? (a - *mean).mul_(*inverse).mul_(t) : a * t;
    }
    case Kind::shift:
      return (per_sample ? aligned(theta, like.dim()) : theta).expand_as(like);
    case Kind::embedding: {
      const Tensor valid = (a != padding_row).unsqueeze(-1);
      const Tensor rows = a.clamp_min(0);
      if (!per_sample) return at::embedding(theta, rows).mul_(valid);
      return at::embedding(theta.reshape({-1, sizes[1]}), in_own_table(rows, sizes[0])).mul_(valid);
    }
  }
  TORCH_INTERNAL_ASSERT(false);
}

Tensor Use::adjoint(const Tensor& theta, const Tensor& a, const Tensor& delta, bool per_sample) const {
  switch (kind) {
    case Kind::linear:
      if (!per_sample) return at::matmul(delta, theta);
      return delta.reshape({delta.size(0), -1, delta.size(-1)}).bmm(theta).view(a.sizes());
    case Kind::conv: {
      const std::vector<int64_t> none(stride.size(), 0);
      const auto input = [&](const Tensor& d, const Tensor& x, const Tensor& w, int64_t g) {
        return std::get<0>(at::convolution_backward(d, x, w, at::OptionalIntArrayRef(), stride, padding, dilation,
                                                    false, none, g, {true, false, false}));
      };
      if (!per_sample) return input(delta, a, theta, groups);
      return input(as_groups(delta), as_groups(a), theta.flatten(0, 1), groups * a.size(0)).view(a.sizes());
    }
    case Kind::scale: {
      const Tensor result = delta * (per_sample ? aligned(theta, delta.dim()) : theta);
      return inverse ? result * *inverse : result;
    }
    default:
      TORCH_INTERNAL_ASSERT(false, "row numbers and nothing have no derivative");
  }
}

Tensor Use::gradient(const Tensor& a, const Tensor& delta, bool per_sample) const {
  const int64_t n = delta.size(0);
  const auto shape = per_sample ? prepended(n, sizes) : sizes;
  switch (kind) {
    case Kind::linear:
      if (!per_sample) return delta.reshape({-1, delta.size(-1)}).t().mm(a.reshape({-1, a.size(-1)}));
      return delta.reshape({n, -1, delta.size(-1)}).mT().bmm(a.reshape({n, -1, a.size(-1)}));
    case Kind::conv: {
      const std::vector<int64_t> none(stride.size(), 0);
      const auto weight = [&](const Tensor& d, const Tensor& x, at::IntArrayRef size, int64_t g) {
        return std::get<1>(at::convolution_backward(d, x, d.new_empty(size), at::OptionalIntArrayRef(), stride, padding,
                                                    dilation, false, none, g, {false, true, false}));
      };
      if (!per_sample) return weight(delta, a, sizes, groups);
      auto grouped = sizes;
      grouped[0] *= n;
      return weight(as_groups(delta), as_groups(a), grouped, groups * n).view(shape);
    }
    case Kind::scale:
      return summed(mean ? (a - *mean).mul_(*inverse).mul_(delta) : a * delta, sizes, per_sample);
    case Kind::shift:
      return summed(delta, sizes, per_sample);
    case Kind::embedding: {
      const Tensor d = delta * (a != padding_row).unsqueeze(-1);
      const Tensor rows = per_sample ? in_own_table(a.clamp_min(0), sizes[0]) : a.clamp_min(0);
      return at::zeros({(per_sample ? n : 1) * sizes[0], sizes[1]}, delta.options())
          .index_add_(0, rows.flatten(), d.reshape({-1, sizes[1]}))
          .view(shape);
    }
  }
  TORCH_INTERNAL_ASSERT(false);
}

// The gradient is linear in a but for the fixed mean, which has no part in the derivative.
Tensor Use::gradient_along(const Tensor& a_dot, const Tensor& delta, bool per_sample) const {
  if (!inverse) return gradient(a_dot, delta, per_sample);
  return summed((a_dot * *inverse).mul_(delta), sizes, per_sample);
}

// --- Through rows: for few positions the Gram matrix of rows takes fewer operations than the outer products.

namespace {

int64_t outputs(const Use& use) { return use.sizes[0]; }
int64_t inputs(const Use& use) { return product(at::IntArrayRef(use.sizes).slice(1)); }

// (n, c, l) or (n, c, h, w) as two spatial dimensions.
Tensor plane(const Tensor& t) { return t.dim() == 3 ? t.unsqueeze(2) : t; }

std::vector<int64_t> pair(const std::vector<int64_t>& v, int64_t first) {
  return v.size() == 1 ? std::vector<int64_t>{first, v[0]} : v;
}

}  // namespace

double Use::gram_cost(int64_t positions_of_param) const {
  return static_cast<double>(positions_of_param) * static_cast<double>(inputs(*this) + outputs(*this));
}

double Use::materialised_cost() const {
  return static_cast<double>(inputs(*this)) * static_cast<double>(outputs(*this));
}

int64_t Use::positions(const Tensor& delta) const { return delta.numel() / delta.size(0) / outputs(*this); }

Tensor Use::input_rows(const Tensor& a) const {
  if (kind == Kind::linear) return a.reshape({a.size(0), -1, a.size(-1)});
  const auto kernel = pair({sizes.begin() + 2, sizes.end()}, 1);
  return at::im2col(plane(a), kernel, pair(dilation, 1), pair(padding, 0), pair(stride, 1)).mT();
}

Tensor Use::output_rows(const Tensor& delta) const {
  if (kind == Kind::linear) return delta.reshape({delta.size(0), -1, delta.size(-1)});
  return delta.flatten(2).mT();
}

Tensor Use::to_output(const Tensor& rows, const Tensor& like) const {
  if (kind == Kind::linear) return rows.view(like.sizes());
  return rows.mT().reshape(like.sizes());
}

Tensor Use::to_input(const Tensor& rows, const Tensor& like) const {
  if (kind == Kind::linear) return rows.view(like.sizes());
  const auto kernel = pair({sizes.begin() + 2, sizes.end()}, 1);
  const Tensor image = plane(like);
  return at::col2im(rows.mT().contiguous(), image.sizes().slice(2), kernel, pair(dilation, 1), pair(padding, 0),
                    pair(stride, 1))
      .view(like.sizes());
}

}  // namespace samlite
