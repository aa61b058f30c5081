// The product of a vector with the Hessian of the mean loss over a data set, or with its Gauss-Newton part.
#pragma once

#include <memory>
#include <tuple>

#include "autograd.h"
#include "graphs.h"
#include "operator.h"

namespace samlite {

// The curvature of one loss through its graph.
class Curvature {
 public:
  virtual ~Curvature() = default;
  // out += H v, both as one tensor a parameter.
  virtual void add_product(const std::vector<Tensor>& v, std::vector<Tensor>& out) const = 0;
  // The tensors that it keeps, some with a graph behind them.
  virtual std::vector<Tensor> held() const = 0;
};

// The Hessian by double backward: the gradient with its graph. Parameters that the loss does not depend on, or only
// linearly, are left out.
class Gradient : public Curvature {
 public:
  Gradient(const Tensor& loss, std::vector<Tensor> params);
  void add_product(const std::vector<Tensor>& v, std::vector<Tensor>& out) const override;
  std::vector<Tensor> held() const override { return gradients_; }

 private:
  std::vector<Tensor> params_, gradients_;
  std::vector<size_t> index_;
};

// The outputs z of a network, cut from the loss that is computed from them, so that its two parts are differentiated
// apart: J v, the Hessian of the loss by z, and J^T w.
class Outputs {
 public:
  // z: with their graph; cuts: the leaves in place of z that the loss was computed from.
  Outputs(const Tensor& loss, std::vector<Tensor> z, std::vector<Tensor> cuts);
  const std::vector<Tensor>& z() const { return z_; }
  // They stand for a cotangent: J v is the derivative of v^T J^T u by u.
  const std::vector<Tensor>& u() const { return u_; }
  std::vector<Tensor> curve(const std::vector<Tensor>& v) const;  // the Hessian of the loss by z, times v
  void add_held(std::vector<Tensor>& out) const;

 private:
  std::vector<Tensor> z_, cuts_, u_, slopes_;
};

// The Gauss-Newton matrix J^T (d2 loss/dz2) J, which is positive semidefinite where the loss is convex in z.
class GaussNewton : public Curvature {
 public:
  GaussNewton(const Tensor& loss, std::vector<Tensor> z, std::vector<Tensor> cuts, std::vector<Tensor> params);
  void add_product(const std::vector<Tensor>& v, std::vector<Tensor>& out) const override;
  std::vector<Tensor> held() const override;

 private:
  std::vector<Tensor> params_, transposed_;  // J^T u
  std::vector<size_t> index_;
  Outputs outputs_;
};

// flat: (p,) as one view a parameter.
std::vector<Tensor> views(const Tensor& flat, const std::vector<Tensor>& params);

// A batch as `next` gives it: its graph, the sum over its samples of their loss, their number or weight, and the bytes
// of the graph.
template <class Graph>
using Next = std::function<std::optional<std::tuple<std::shared_ptr<Graph>, Tensor, double, int64_t>>()>;

// `next` as the stream of batches that `Graphs` takes.
template <class Graph>
auto stream(Next<Graph> next) {
  using Batch = typename Graphs<std::shared_ptr<Graph>>::Batch;
  return [next = std::move(next)]() -> std::optional<Batch> {
    auto item = next();
    if (!item) return std::nullopt;
    auto& [graph, loss, weight, bytes] = *item;
    return Batch{std::move(graph), loss, weight, bytes};
  };
}

class Hessian : public Operator {
 public:
  // params: the leaves that H is taken by; memory: bytes that the kept graphs may take; sum: over processes, each of
  // which has a part of the data.
  Hessian(std::vector<Tensor> params, std::function<void(int64_t)> rewind, Next<Curvature> next, int64_t memory,
          std::function<void()> check_signals, Sum sum = {});

  Tensor apply(const Tensor& v) override;
  const Tensor& like() const override { return params_.at(0); }
  int64_t numel() const override { return numel_; }
  auto& graphs() { return graphs_; }

 private:
  std::vector<Tensor> params_;
  int64_t numel_ = 0;
  Graphs<std::shared_ptr<Curvature>> graphs_;
};

}  // namespace samlite
