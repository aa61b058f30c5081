// Moments of the Hessians of samples, or of batches, over a data set, and the operators made of them.
#pragma once

#include <cmath>

#include "hessian.h"
#include "sample_hessians.h"

namespace samlite {

// A batch as one sample.
class BatchHessian : public SampleHessians {
 public:
  // mean: H is that of the loss over its weight, and counts by its weight; exponent: H is taken over 2^exponent.
  BatchHessian(std::shared_ptr<Curvature> curvature, double weight, bool mean, std::vector<Tensor> params,
               int64_t exponent)
      : curvature_(std::move(curvature)),
        weight_(weight),
        mean_(mean),
        params_(std::move(params)),
        unit_(std::ldexp(1, static_cast<int>(exponent))) {}
  void add(const Tensor& v, Tensor& out) override;
  Tensor ascent() const override { return at::full({1}, NAN, params_[0].options().requires_grad(false)); }
  Tensor slopes(const Tensor&) const override { return ascent(); }
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
  Moments(std::vector<Tensor> params, std::function<void(int64_t)> rewind, Next<SampleHessians> next, bool batches,
          int64_t memory, int64_t exponent, std::function<void()> check_signals, Sum sum = {});
  Tensor apply(const Tensor& v, int64_t order);  // -> (order, p): M_1 v, ..., M_order v
  double ascent();                               // the mean of g_i^T H_i g_i / |g_i|^2 where g_i is not 0
  Tensor slopes(const Tensor& v);                // g_i . v of the samples of this process: (samples,)
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
  Graphs<std::shared_ptr<SampleHessians>> graphs_;
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
