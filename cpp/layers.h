// Layers through which parameters act on samples: z = theta . a, linear in theta and in a. Each has three maps: apply
// (theta, a) -> z, its adjoint in a, and its adjoint in theta; and theta may be one for all samples or one a sample.
// Tensors are sample-first here: a: (n, ..., inputs), z and delta: (n, ..., outputs), theta: (sizes) or (n, sizes).
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <vector>

namespace samlite {

using at::Tensor;

enum class Kind {
  linear,     // theta: (out, in), any positions between sample and features
  conv,       // theta: (out, in / groups, *kernel), in 1 to 3 dimensions
  scale,      // z = theta * (a - mean) * inverse, theta broadcast
  shift,      // z = theta, broadcast: biases
  embedding,  // theta: (rows, features), a: row numbers
};

// One use of a parameter, or of a strided view of it.
struct Use {
  Kind kind;
  int64_t param;  // which
  std::vector<int64_t> sizes, strides;
  int64_t offset = 0;
  std::vector<int64_t> stride{}, padding{}, dilation{};  // of a convolution
  int64_t groups = 1;
  std::optional<Tensor> mean{}, inverse{};  // of a normalisation with fixed statistics, broadcast like theta
  int64_t padding_row = -1;                 // of an embedding: it takes no gradient

  Tensor apply(const Tensor& theta, const Tensor& a, const Tensor& like, bool per_sample) const;
  Tensor adjoint(const Tensor& theta, const Tensor& a, const Tensor& delta, bool per_sample) const;
  // The sum over samples: (sizes), or each sample's own: (n, sizes).
  Tensor gradient(const Tensor& a, const Tensor& delta, bool per_sample) const;
  Tensor gradient_along(const Tensor& a_dot, const Tensor& delta, bool per_sample) const;  // its derivative along a
  bool varies_with_a() const { return kind != Kind::shift && kind != Kind::embedding; }

  Tensor view(const Tensor& flat) const;             // of (numel,)
  Tensor view_per_sample(const Tensor& flat) const;  // of (n, numel), contiguous
  bool same_view(const Use& other) const;
  int64_t positions(const Tensor& delta) const;
  // Operations of one step through U = sum of outer products of positions, and through U itself.
  double gram_cost(int64_t positions_of_param) const;
  double materialised_cost() const;
  // Rows of a and of delta whose outer products sum to the gradient: (n, positions, in) and (n, positions, out).
  Tensor input_rows(const Tensor& a) const;
  Tensor output_rows(const Tensor& delta) const;
  Tensor to_output(const Tensor& rows, const Tensor& like) const;
  Tensor to_input(const Tensor& rows, const Tensor& like) const;
  bool has_rows() const { return kind == Kind::linear || (kind == Kind::conv && groups == 1 && stride.size() <= 2); }
};

}  // namespace samlite
