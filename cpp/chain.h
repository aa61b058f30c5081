// Per-sample Hessian chains H_i^k v at the price of Hessian-vector products.
//
// With the inputs a and output gradients delta of each layer, H_i v is a sum of two outer products a layer,
// delta' a^T + delta a'^T, where dots are derivatives along v. So a direction that differs from sample to sample is
// kept as (delta', a'), never as n vectors of length p. The derivatives themselves come from one reverse pass: with
// t(v) = sum over layers of <delta, V a>, dt/dz = delta' by the symmetry of second derivatives, and dt/deta = a', where
// eta is a zero added to the gradient of a (`tap`).
#pragma once

#include "direction.h"
#include "hessian.h"
#include "sample_hessians.h"

namespace samlite {

// Where the samples are in a tensor: dimension `dim` has the size outer * n * inner. Where they have unequal numbers of
// rows there, as the nodes of graphs, each gets `inner` of them, zeros behind its own.
struct Layout {
  int64_t dim = 0, outer = 1, n = 1, inner = 1;
  Tensor places = {};                   // of unequal rows: (rows,), the place of each in (n * inner,); else not defined
  Tensor first(const Tensor& t) const;  // -> (n, ..., outer, inner, ...), ones left out
  Tensor back(const Tensor& t, const Tensor& like) const;  // -> as it was
};

// The identity, whose backward pass adds eta, a zero that stands for the derivative of a.
std::tuple<Tensor, Tensor> tap(const Tensor& a);  // -> (a, eta)

// One layer as it was called. The edge of z is taken at once: an operation in place on z may follow.
class Site {
 public:
  Site(std::optional<Tensor> a, std::optional<Tensor> eta, const Tensor& z, Layout layout);
  void add(std::shared_ptr<Use> use) { uses_.push_back(std::move(use)); }

 private:
  friend class Chain;
  Tensor a_, eta_, delta_;  // a and delta as in the graph
  Tensor a_first_, delta_first_;
  Edge z_;
  Layout layout_;
  std::vector<std::shared_ptr<Use>> uses_;
};

class Chain : public SampleHessians {
 public:
  // loss: the sum over n samples; sites: where the parameters act on them; outputs: for Gauss-Newton matrices.
  Chain(const Tensor& loss, std::vector<std::shared_ptr<Site>> sites, int64_t n, std::vector<Tensor> params,
        std::optional<Outputs> outputs);
  void add(const Tensor& v, Tensor& out) override;
  Tensor ascent() const override;
  Tensor slopes(const Tensor& v) const override;
  int64_t samples() const override { return n_; }
  std::vector<Tensor> held() const override;
  int64_t step_bytes() const override;

 private:
  void choose_rows(int64_t param);
  std::vector<Derivatives> derivatives(const Directions& v) const;  // of each site
  Tensor response(const Site& site, const Directions& v) const;     // V a of a site, like delta
  Tensor adjoint(const Site& site, const Directions& v) const;      // V^T delta of a site, like a
  std::vector<Tensor> at_edges(const std::vector<Tensor>& roots, const std::vector<Tensor>& cotangents,
                               const std::vector<Edge>& edges) const;
  Directions shared(const Tensor& v) const;                           // the same direction of every sample
  Directions directions(const std::vector<Derivatives>& dots) const;  // H_i v of each sample
  void add_sum(const std::vector<Derivatives>& dots, const Directions& v, const Tensor& scale,
               std::vector<Tensor>& out) const;
  Tensor slope(const Directions& v) const;  // g_i . v_i: (n,)
  Tensor normalise(std::vector<Derivatives>& dots) const;
  Tensor shrink(std::vector<Derivatives>& dots) const;
  void divide(std::vector<Derivatives>& dots, const Tensor& by) const;
  Tensor ones() const { return at::ones({n_}, params_[0].options().requires_grad(false)); }

  std::vector<std::shared_ptr<Site>> sites_;
  int64_t n_;
  std::vector<Tensor> params_;
  std::optional<Outputs> outputs_;
  std::vector<bool> rows_;   // of each parameter: kept as rows
  std::vector<Gram> grams_;  // of such parameters with one use
};

}  // namespace samlite
