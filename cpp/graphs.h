// A data set as a stream of batches with a graph each. Graphs are kept while they fit into the memory given, and built
// anew at every pass beyond it, with the same results.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <chrono>
#include <functional>
#include <limits>
#include <optional>
#include <vector>

namespace samlite {

using at::Tensor;

// Sums a tensor over the processes that share a data set, in place. Empty where there is one process.
using Sum = std::function<void(const Tensor&)>;

template <class Graph>
class Graphs {
 public:
  struct Batch {
    Graph graph;
    Tensor loss;    // the sum over the batch's samples of their loss
    double weight;  // the number or weight of its samples
    int64_t bytes;  // of the graph
  };
  // `rewind(i)` goes to batch i, `next()` builds it on the device, or gives nothing behind the last.
  Graphs(std::function<void(int64_t)> rewind, std::function<std::optional<Batch>()> next, c10::Device device,
         int64_t memory, std::function<void()> check_signals, Sum sum = {})
      : rewind_(std::move(rewind)),
        next_(std::move(next)),
        device_(device),
        memory_(memory),
        check_signals_(std::move(check_signals)),
        sum_(std::move(sum)) {}

  int64_t batches() const { return static_cast<int64_t>(losses_.size()); }
  int64_t kept() const { return static_cast<int64_t>(graphs_.size()); }
  int64_t kept_bytes() const { return kept_bytes_; }
  // Of all batches of all processes, once a pass is done. Waits for the device the first time.
  double weight() {
    if (!total_weight_) total_weight_ = summed(weight_);
    return *total_weight_;
  }
  // Over all processes, which must all ask: of a tensor in place, or of a number.
  void sum(const Tensor& part) const {
    if (sum_) sum_(part);
  }
  double summed(double part) const {
    if (!sum_) return part;
    const Tensor total = at::full({1}, part, at::TensorOptions().device(device_).dtype(at::kDouble));
    sum_(total);
    return total.item<double>();
  }
  // Time of the first pass's builds, which is that of a plain gradient to about a tenth: the unit of work.
  double build_seconds() const { return build_seconds_; }
  // The largest relative change of a batch's loss between two passes: anything but rounding means that the function
  // is not the same at every pass. Waits for the device.
  double drift() const { return drift_.defined() ? drift_.template item<double>() : 0; }

  // Calls visit(graph) for every batch.
  template <class Visit>
  void pass(Visit visit) {
    check_signals_();
    if (passes_ == 0) reset();  // also after a first pass that was interrupted
    for (const auto& graph : graphs_) visit(graph);
    if (passes_ > 0 && kept() == batches()) return;
    int64_t batch = kept();
    rewind_(batch);
    while (true) {
      const double began = passes_ == 0 ? now() : 0;
      auto item = next_();
      if (!item) break;
      if (passes_ == 0) build_seconds_ += now() - began;
      visit(item->graph);
      passes_ == 0 ? remember(*item, batch) : compare(item->loss.detach(), batch);
      ++batch;
      check_signals_();
    }
    TORCH_CHECK_VALUE(passes_ == 0 || batch == batches(), "data must give the same batches at every pass, got ", batch,
                      " after ", batches(), " in the first");
    TORCH_CHECK_VALUE(batch > 0, "data must hold at least one batch, got none");
    TORCH_CHECK_VALUE(weight_ > 0 || sum_, "the weights of all batches must sum to more than 0, got ", weight_);
    ++passes_;
  }

 private:
  // Kept graphs are those of the first batches: once one does not fit, the later ones are built anew.
  void remember(Batch& item, int64_t batch) {
    weight_ += item.weight;
    losses_.push_back(item.loss.detach());
    if (kept() == batch && kept_bytes_ + item.bytes <= memory_) {
      graphs_.push_back(std::move(item.graph));
      kept_bytes_ += item.bytes;
    }
  }

  void compare(const Tensor& loss, int64_t batch) {
    TORCH_CHECK_VALUE(batch < batches(), "data must give the same batches at every pass, got more than the ", batches(),
                      " of the first");
    const Tensor& first = losses_[batch];
    const double tiny =
        first.scalar_type() == at::kDouble ? std::numeric_limits<double>::min() : std::numeric_limits<float>::min();
    const Tensor change = (loss - first).abs().div(first.abs().clamp_min(tiny));
    drift_ = drift_.defined() ? at::maximum(drift_, change) : change;
  }

  void reset() {
    graphs_.clear();
    losses_.clear();
    weight_ = build_seconds_ = 0;
    total_weight_.reset();
    kept_bytes_ = 0;
  }

  // Seconds of a clock that waits for the device. Devices outside of torch need not know how to be waited for.
  double now() const {
    if (!device_.is_cpu() && !device_.is_privateuseone())
      c10::impl::VirtualGuardImpl(device_.type()).synchronizeDevice(device_.index());
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  }

  std::function<void(int64_t)> rewind_;
  std::function<std::optional<Batch>()> next_;
  c10::Device device_;
  int64_t memory_;
  std::function<void()> check_signals_;
  Sum sum_;
  std::vector<Graph> graphs_;  // of the first batches
  std::vector<Tensor> losses_;
  int64_t kept_bytes_ = 0, passes_ = 0;
  double weight_ = 0, build_seconds_ = 0;
  std::optional<double> total_weight_;
  Tensor drift_;
};

}  // namespace samlite
