// Per-sample Hessian chains H_i^k v at the price of Hessian-vector products.
//
// With the inputs a and output gradients delta of each layer, H_i v is a sum of two outer products a layer,
// delta' a^T + delta a'^T, where dots are derivatives along v. So a direction that differs from sample to sample is
// kept as (delta', a'), never as n vectors of length p. The derivatives themselves come from one reverse pass: with
// t(v) = sum over layers of <delta, V a>, dt/dz = delta' by the symmetry of second derivatives, and dt/deta = a', where
// eta is a zero added to the gradient of a (`tap`).
#pragma once

#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/function.h>

#include <cmath>
#include <memory>

#include "hessian.h"
#include "layers.h"

namespace samlite {

// Where the samples are in a tensor: dimension `dim` has the size outer * n * inner.
struct Layout {
  int64_t dim = 0, outer = 1, n = 1, inner = 1;
  Tensor first(const Tensor& t) const;                     // -> (n, ..., outer, inner, ...), ones left out
  Tensor back(const Tensor& t, const Tensor& like) const;  // -> as it was
};

// The identity, whose backward pass adds eta, a zero that stands for the derivative of a.
std::tuple<Tensor, Tensor> tap(const Tensor& a);  // -> (a, eta)

// One layer as it was called. The edge of z is taken at once: an operation in place on z may follow.
class Site {
 public:
  Site(std::optional<Tensor> a, std::optional<Tensor> eta, const Tensor& z, Layout layout);
  void add(Use use) { uses_.push_back(std::move(use)); }

 private:
  friend class Chain;
  Tensor a_, eta_, delta_;  // a and delta as in the graph
  Tensor a_first_, delta_first_;
  torch::autograd::Edge z_;
  Layout layout_;
  std::vector<Use> uses_;
};

// What multiplies to powers of Hessians: the samples of a batch, or the batch as a whole.
class Powers {
 public:
  virtual ~Powers() = default;
  // out[k] += the sum of H_i^(k+1) v over its samples, H_i not yet scaled. v: (p,), out: (orders, p).
  virtual void add(const Tensor& v, Tensor& out) = 0;
  // g_i^T H_i g_i / |g_i|^2 along each sample's own gradient, H_i not yet scaled: (samples,); nan where g_i is 0 or
  // it is not known.
  virtual Tensor ascent() const = 0;
  virtual int64_t samples() const = 0;
  // The tensors that it keeps, some with a graph behind them, and about what one step takes beside them.
  virtual std::vector<Tensor> held() const = 0;
  virtual int64_t step_bytes() const = 0;
};

class Chain : public Powers {
 public:
  // loss: the sum over n samples; sites: where the parameters act on them; outputs: for Gauss-Newton matrices.
  Chain(const Tensor& loss, std::vector<std::shared_ptr<Site>> sites, int64_t n, std::vector<Tensor> params,
        std::optional<Outputs> outputs);
  void add(const Tensor& v, Tensor& out) override;
  Tensor ascent() const override;
  int64_t samples() const override { return n_; }
  std::vector<Tensor> held() const override;
  int64_t step_bytes() const override;

 private:
  struct Rows {
    Tensor left, right;   // (n, positions, out), (n, positions, in)
    bool is_delta, is_a;  // left is the delta, or right the a, of the parameter's only site
  };
  // A direction of one parameter: one for all samples, or one a sample, as a whole or as rows of outer products.
  struct Direction {
    Tensor shared;           // (numel,)
    Tensor whole;            // (n, numel)
    std::vector<Rows> rows;  // whose outer products sum to it
  };
  struct Dots {
    Tensor delta, a;  // sample-first; not defined where they are zero
  };
  std::vector<Dots> step(const std::vector<Direction>& direction) const;
  Tensor response(const Site& site, const std::vector<Direction>& direction) const;  // V a of a site, like delta
  Tensor slope(const std::vector<Direction>& direction) const;                       // g_i . v_i: (n,)
  std::vector<Tensor> responses(const std::vector<Tensor>& roots, const std::vector<Tensor>& cotangents,
                                const std::vector<torch::autograd::Edge>& edges) const;
  std::vector<Direction> directions(const std::vector<Dots>& dots) const;
  void add_mean(const std::vector<Dots>& dots, const std::vector<Direction>& direction, const Tensor& scale,
                std::vector<Tensor>& out) const;
  Tensor normalise(std::vector<Dots>& dots) const;
  Tensor shrink(std::vector<Dots>& dots) const;

  std::vector<std::shared_ptr<Site>> sites_;
  int64_t n_;
  std::vector<Tensor> params_;
  std::optional<Outputs> outputs_;
  std::vector<bool> rows_;       // of each parameter: kept as rows
  std::vector<Tensor> aa_, dd_;  // of such parameters with one site: a a^T and delta delta^T over its positions
};

// A batch as one sample.
class Whole : public Powers {
 public:
  // mean: H is that of the loss over its weight, and counts by its weight; exponent: H is taken over 2^exponent.
  Whole(std::shared_ptr<Curvature> curvature, double weight, bool mean, std::vector<Tensor> params, int64_t exponent)
      : curvature_(std::move(curvature)),
        weight_(weight),
        mean_(mean),
        params_(std::move(params)),
        unit_(std::ldexp(1, static_cast<int>(exponent))) {}
  void add(const Tensor& v, Tensor& out) override;
  Tensor ascent() const override { return at::full({1}, NAN, params_[0].options().requires_grad(false)); }
  int64_t samples() const override { return 1; }
  std::vector<Tensor> held() const override { return curvature_->held(); }
  int64_t step_bytes() const override { return 0; }

 private:
  std::shared_ptr<Curvature> curvature_;
  double weight_;
  bool mean_;
  std::vector<Tensor> params_;
  double unit_;
};

// M_k v = (1/n) sum_i H_i^k v over a data set; with `batches`, i runs over batches by their weight. Powers of large and
// of small H_i overflow and underflow, so all are those of H_i / 2^exponent().
class Moments {
 public:
  // exponent: the graphs that `next` gives are those of losses over 2^exponent.
  Moments(std::vector<Tensor> params, std::function<void(int64_t)> rewind, Next<Powers> next, bool batches,
          int64_t memory, int64_t exponent, std::function<void()> check_signals, Sum sum = {});
  Tensor apply(const Tensor& v, int64_t order);  // -> (order, p): M_1 v, ..., M_order v
  double ascent();                               // the mean of g_i^T H_i g_i / |g_i|^2 where g_i is not 0
  int64_t exponent();                            // takes a pass, the first time
  // The exponent of the losses that brings the H_i to a size of about one, where powers are not safe as they are: ask
  // again with that. Takes two products.
  int64_t suitable_exponent();
  int64_t numel() const { return numel_; }
  const Tensor& like() const { return params_.at(0); }
  auto& graphs() { return graphs_; }

 private:
  std::vector<Tensor> params_;
  bool batches_;
  int64_t numel_ = 0;
  double total(int64_t samples);  // over all processes, as counted in a pass
  double share();                 // H = (1/n) sum_i share * (that of sample i's loss)

  int64_t exponent_;
  std::optional<double> samples_;
  Graphs<std::shared_ptr<Powers>> graphs_;
};

// What is made of the moments of one data set.
class OfMoments : public Operator {
 public:
  explicit OfMoments(std::shared_ptr<Moments> moments) : moments_(std::move(moments)) {}
  const Tensor& like() const override { return moments_->like(); }
  int64_t numel() const override { return moments_->numel(); }
  double scale() const override { return size_.defined() ? size_.item<double>() : 0; }

 protected:
  // The terms of a product with v were as large as this.
  void see(const Tensor& size, const Tensor& v);

  std::shared_ptr<Moments> moments_;

 private:
  Tensor size_;  // of the terms, for a unit v: the largest so far
};

// M_order - H^order, over 2^exponent().
class Centred : public OfMoments {
 public:
  Centred(std::shared_ptr<Moments> moments, int64_t order) : OfMoments(std::move(moments)), order_(order) {}
  Tensor apply(const Tensor& v) override;
  int64_t exponent() override { return order_ * moments_->exponent(); }

 private:
  int64_t order_;
};

// c_0 I + c_1 M_1 + c_2 M_2 + ... of the H_i over 2^(the exponent of the moments).
class Mixture : public OfMoments {
 public:
  Mixture(std::shared_ptr<Moments> moments, std::vector<double> coefficients)
      : OfMoments(std::move(moments)), coefficients_(std::move(coefficients)) {}
  Tensor apply(const Tensor& v) override;

 private:
  std::vector<double> coefficients_;
};

}  // namespace samlite
