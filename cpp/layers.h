// Layers through which parameters act on samples: z = theta . a, linear in theta and in a. Each has three maps: apply
// (theta, a) -> z, its adjoint in a, and its adjoint in theta, the gradient. Tensors are sample-first here: a: (n, ...,
// inputs), z and delta: (n, ..., outputs), theta: (sizes) for all samples, or (n, sizes) with one a sample.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string>
#include <vector>

namespace samlite {

using at::Tensor;
using Sizes = std::vector<int64_t>;

// A strided view of a parameter that lies flat.
struct View {
  int64_t param;  // which
  Sizes sizes, strides;
  int64_t offset = 0;

  Tensor of(const Tensor& flat) const;  // (numel,) -> (sizes); (n, numel), contiguous -> (n, sizes)
  bool same_place(const View& other) const;
};

enum class Reduction { sum, none };  // over samples: (sizes), or (n, sizes)

class Matrix;

// One use of a parameter, or of a view of it.
class Use {
 public:
  explicit Use(View view) : view_(std::move(view)) {}
  virtual ~Use() = default;
  virtual Tensor apply(const Tensor& theta, const Tensor& a, const Tensor& like) const = 0;  // z, which is like `like`
  virtual Tensor adjoint(const Tensor& theta, const Tensor& a, const Tensor& delta) const = 0;  // like a
  virtual Tensor gradient(const Tensor& a, const Tensor& delta, Reduction reduction) const = 0;
  // Its derivative along a.
  virtual Tensor gradient_along(const Tensor& a_dot, const Tensor& delta, Reduction reduction) const {
    return gradient(a_dot, delta, reduction);
  }
  virtual bool varies_with_a() const { return true; }
  virtual const Matrix* matrix() const { return nullptr; }  // itself, where its gradient is made of rows
  const View& view() const { return view_; }
  int64_t param() const { return view_.param; }

 protected:
  bool one_a_sample(const Tensor& theta) const { return theta.dim() > static_cast<int64_t>(view_.sizes.size()); }
  const Sizes& sizes() const { return view_.sizes; }

 private:
  View view_;
};

// A layer whose gradient is a sum of outer products over its positions: theta: (outputs, inputs).
class Matrix : public Use {
 public:
  using Use::Use;
  const Matrix* matrix() const override { return this; }
  // Rows of a and of delta whose outer products sum to the gradient: (n, positions, in) and (n, positions, out).
  virtual Tensor input_rows(const Tensor& a) const = 0;
  virtual Tensor output_rows(const Tensor& delta) const = 0;
  virtual Tensor to_output(const Tensor& rows, const Tensor& like) const = 0;
  virtual Tensor to_input(const Tensor& rows, const Tensor& like) const = 0;

  int64_t positions(const Tensor& delta) const { return delta.numel() / delta.size(0) / outputs(); }
  // Operations of one step through the Gram matrix of rows, which are fewer for few positions, and through theta
  // itself.
  double gram_cost(int64_t positions_of_param) const;
  double materialised_cost() const;

 private:
  int64_t outputs() const { return sizes()[0]; }
  int64_t inputs() const;
};

class Linear : public Matrix {  // theta: (out, in), any positions between sample and features
 public:
  using Matrix::Matrix;
  Tensor apply(const Tensor& theta, const Tensor& a, const Tensor& like) const override;
  Tensor adjoint(const Tensor& theta, const Tensor& a, const Tensor& delta) const override;
  Tensor gradient(const Tensor& a, const Tensor& delta, Reduction reduction) const override;
  Tensor input_rows(const Tensor& a) const override;
  Tensor output_rows(const Tensor& delta) const override;
  Tensor to_output(const Tensor& rows, const Tensor& like) const override;
  Tensor to_input(const Tensor& rows, const Tensor& like) const override;
};

// theta: (out, in / groups, *kernel), in 1 to 3 dimensions; of a transposed one, which has an output padding, theta:
// (in, out / groups, *kernel).
class Conv : public Matrix {
 public:
  Conv(View view, Sizes stride, Sizes padding, Sizes dilation, int64_t groups, std::optional<Sizes> output_padding);
  Tensor apply(const Tensor& theta, const Tensor& a, const Tensor& like) const override;
  Tensor adjoint(const Tensor& theta, const Tensor& a, const Tensor& delta) const override;
  Tensor gradient(const Tensor& a, const Tensor& delta, Reduction reduction) const override;
  const Matrix* matrix() const override { return groups_ == 1 && stride_.size() <= 2 && !transposed_ ? this : nullptr; }
  Tensor input_rows(const Tensor& a) const override;
  Tensor output_rows(const Tensor& delta) const override;
  Tensor to_output(const Tensor& rows, const Tensor& like) const override;
  Tensor to_input(const Tensor& rows, const Tensor& like) const override;

 private:
  Sizes kernel() const;
  Sizes stride_, padding_, dilation_, output_padding_;
  int64_t groups_;
  bool transposed_;
};

// z = einsum over the labels that a and theta have in common; a and z have the sample, and perhaps positions, first.
class Contraction : public Use {
 public:
  Contraction(View view, std::string a, std::string theta, std::string z);
  Tensor apply(const Tensor& theta, const Tensor& a, const Tensor& like) const override;
  Tensor adjoint(const Tensor& theta, const Tensor& a, const Tensor& delta) const override;
  Tensor gradient(const Tensor& a, const Tensor& delta, Reduction reduction) const override;

 private:
  std::string a_, theta_, z_;  // the labels, without those of samples and positions
};

class Scale : public Use {  // z = theta * (a - mean) * inverse, theta broadcast; mean and inverse are fixed statistics
 public:
  Scale(View view, std::optional<Tensor> mean, std::optional<Tensor> inverse);
  Tensor apply(const Tensor& theta, const Tensor& a, const Tensor& like) const override;
  Tensor adjoint(const Tensor& theta, const Tensor& a, const Tensor& delta) const override;
  Tensor gradient(const Tensor& a, const Tensor& delta, Reduction reduction) const override;
  Tensor gradient_along(const Tensor& a_dot, const Tensor& delta, Reduction reduction) const override;

 private:
  std::optional<Tensor> mean_, inverse_;
};

class Shift : public Use {  // z = theta, broadcast: biases
 public:
  using Use::Use;
  Tensor apply(const Tensor& theta, const Tensor& a, const Tensor& like) const override;
  Tensor adjoint(const Tensor& theta, const Tensor& a, const Tensor& delta) const override;
  Tensor gradient(const Tensor& a, const Tensor& delta, Reduction reduction) const override;
  bool varies_with_a() const override { return false; }
};

class Embedding : public Use {  // theta: (rows, features), a: row numbers
 public:
  Embedding(View view, int64_t padding_row) : Use(std::move(view)), padding_row_(padding_row) {}
  Tensor apply(const Tensor& theta, const Tensor& a, const Tensor& like) const override;
  Tensor adjoint(const Tensor& theta, const Tensor& a, const Tensor& delta) const override;
  Tensor gradient(const Tensor& a, const Tensor& delta, Reduction reduction) const override;
  bool varies_with_a() const override { return false; }

 private:
  int64_t padding_row_;  // takes no gradient
};

}  // namespace samlite
