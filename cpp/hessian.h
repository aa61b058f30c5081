// The product H v of the mean loss over a data set, by double backward through the gradient's graph.
#pragma once

#include <tuple>

#include "graphs.h"

namespace samlite {

// The data set as a stream of losses with a graph: `rewind(i)` goes to batch i, `next()` gives (the sum over
// the batch's samples of their loss, the number or weight of its samples), or nothing behind the last batch.
struct Losses {
  std::function<void(int64_t)> rewind;
  std::function<std::optional<std::tuple<Tensor, double>>()> next;
};

// The gradient of one loss with its graph; parameters it does not depend on, or only linearly, are left out.
class Gradient {
 public:
  Gradient(const Tensor& loss, const std::vector<Tensor>& params);
  // out += H v, both as one tensor a parameter.
  void add_product(const std::vector<Tensor>& params, const std::vector<Tensor>& v, std::vector<Tensor>& out) const;

 private:
  std::vector<Tensor> gradients_;
  std::vector<size_t> index_;
};

// flat: (p,) as one view a parameter.
std::vector<Tensor> views(const Tensor& flat, const std::vector<Tensor>& params);

class Hessian {
 public:
  // params: the leaves that H is taken by; memory: bytes that the kept graphs may take.
  Hessian(std::vector<Tensor> params, Losses losses, int64_t memory, std::function<void()> check_signals);

  Tensor apply(const Tensor& v);  // v: (p,) -> H v: (p,)
  int64_t measure() {             // bytes that the first batch's graph takes
    return graphs_.measure([](const Gradient&) {});
  }
  int64_t numel() const { return numel_; }
  const std::vector<Tensor>& params() const { return params_; }
  Graphs<Gradient>& graphs() { return graphs_; }

 private:
  std::vector<Tensor> params_;
  int64_t numel_ = 0;
  Graphs<Gradient> graphs_;
};

}  // namespace samlite
