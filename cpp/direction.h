// A direction of one parameter: one for all samples, or one a sample, as a whole or as rows of outer products.
#pragma once

#include <memory>

#include "layers.h"

namespace samlite {

// Derivatives along a direction of a layer's output gradient and of its input; not defined where they are zero.
struct Derivatives {
  Tensor delta, a;  // sample-first
};

class Direction {
 public:
  virtual ~Direction() = default;
  virtual Tensor apply(const Use& use, const Tensor& a, const Tensor& delta) const = 0;    // V a, like delta
  virtual Tensor adjoint(const Use& use, const Tensor& a, const Tensor& delta) const = 0;  // V^T delta, like a
  // V += delta' a^T + delta a'^T of each sample.
  virtual void add(const Use& use, const Tensor& a, const Tensor& delta, const Derivatives& dot) = 0;
  // sum += scale_i V_i over the samples, where each has a whole one. scale: (n,), sum: (numel,).
  virtual bool add_sum(const Tensor& /*scale*/, Tensor& /*sum*/) const { return false; }
};
using Directions = std::vector<std::unique_ptr<Direction>>;  // of each parameter

// One for all samples: (numel,), or one a sample: (n, numel).
class Whole : public Direction {
 public:
  explicit Whole(Tensor flat) : flat_(std::move(flat)) {}
  Tensor apply(const Use& use, const Tensor& a, const Tensor& delta) const override;
  Tensor adjoint(const Use& use, const Tensor& a, const Tensor& delta) const override;
  void add(const Use& use, const Tensor& a, const Tensor& delta, const Derivatives& dot) override;
  bool add_sum(const Tensor& scale, Tensor& sum) const override;

 private:
  Tensor flat_;
};

// Of a parameter with one use: delta delta^T and a a^T over the positions of each sample, else not defined.
struct Gram {
  Tensor delta, a;  // (n, positions, positions)
};

class OuterProducts : public Direction {
 public:
  explicit OuterProducts(Gram gram) : gram_(std::move(gram)) {}
  Tensor apply(const Use& use, const Tensor& a, const Tensor& delta) const override;
  Tensor adjoint(const Use& use, const Tensor& a, const Tensor& delta) const override;
  void add(const Use& use, const Tensor& a, const Tensor& delta, const Derivatives& dot) override;

 private:
  struct Rows {
    Tensor left, right;   // (n, positions, out), (n, positions, in)
    bool is_delta, is_a;  // left is the delta, or right the a, of the parameter's only use
  };
  Gram gram_;
  std::vector<Rows> rows_;  // whose outer products sum to it
};

// x y^T of each sample, (n, p, i) and (n, q, i) -> (n, p, q).
Tensor inner_products(const Tensor& x, const Tensor& y);

}  // namespace samlite
