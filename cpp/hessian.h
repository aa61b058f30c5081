// The product H v of the mean loss over a data set, by double backward through graphs that are kept while
// they fit.
#pragma once

#include <ATen/ATen.h>

#include <functional>
#include <optional>
#include <tuple>
#include <vector>

namespace samlite {

using at::Tensor;

// The data set as a stream of losses with a graph: `rewind(i)` goes to batch i, `next()` gives (the sum over
// the batch's samples of their loss, the number or weight of its samples), or nothing behind the last batch.
struct Losses {
  std::function<void(int64_t)> rewind;
  std::function<std::optional<std::tuple<Tensor, double>>()> next;
};

class Hessian {
 public:
  // params: the leaves that H is taken by; memory: bytes that the kept graphs may take.
  Hessian(std::vector<Tensor> params, Losses losses, int64_t memory, std::function<void()> check_signals);

  Tensor apply(const Tensor& v);  // v: (p,) -> H v: (p,)
  int64_t measure();              // bytes of the first batch's graph, built and let go
  int64_t numel() const { return numel_; }
  const std::vector<Tensor>& params() const { return params_; }

  int64_t batches() const { return static_cast<int64_t>(losses_seen_.size()); }
  int64_t kept() const { return static_cast<int64_t>(graphs_.size()); }
  int64_t kept_bytes() const { return kept_bytes_; }
  // Time of the first pass's gradients with their graphs, which is that of a plain gradient to about a tenth: the
  // unit of work.
  double build_seconds() const { return build_seconds_; }
  // The largest relative change of a batch's loss between two passes: anything but rounding means that the
  // function is not the same at every product. Waits for the device.
  double drift() const;

 private:
  // The gradient of one batch with its graph; parameters it does not depend on are left out.
  struct Graph {
    std::vector<Tensor> gradients;
    std::vector<size_t> index;
  };
  Graph build(const Tensor& loss) const;
  void accumulate(const Graph& graph, const std::vector<Tensor>& v, std::vector<Tensor>& out) const;
  std::vector<Tensor> views(const Tensor& flat) const;
  bool keeps_all() const { return passes_ > 0 && kept() == batches(); }

  std::vector<Tensor> params_;
  Losses losses_;
  int64_t memory_, numel_ = 0;
  std::function<void()> check_signals_;
  std::vector<Graph> graphs_;  // of the first batches
  int64_t kept_bytes_ = 0, passes_ = 0;
  double weight_ = 0, build_seconds_ = 0;
  std::vector<Tensor> losses_seen_;  // of each batch in the first pass
  Tensor drift_;
};

}  // namespace samlite
