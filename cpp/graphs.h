// A data set as a stream of batches with a graph each. Graphs are kept while they fit into the memory given, and built
// anew at every pass beyond it, with the same results.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Logging.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <chrono>
#include <functional>
#include <optional>
#include <vector>

namespace samlite {

using at::Tensor;

// Bytes allocated while it is active, as torch's allocators report them: what is left when a graph has been built is
// the graph, and the peak above it is what building and using it takes for a moment. The channel is the memory
// profiler's, so while somebody else listens nothing is known.
class AllocationCounter {
 public:
  AllocationCounter() {
    if (c10::ThreadLocalDebugInfo::get(c10::DebugInfoKind::PROFILER_STATE)) return;
    count_ = std::make_shared<Count>();
    guard_.emplace(c10::DebugInfoKind::PROFILER_STATE, count_);
    // The allocator warns when a block from before is freed, which is of no concern here (2 is ERROR).
    FLAGS_caffe2_log_level = std::max(log_level_, 2);
  }
  ~AllocationCounter() { FLAGS_caffe2_log_level = log_level_; }
  bool knows() const { return count_ != nullptr; }
  int64_t bytes() const { return count_ ? count_->bytes : 0; }
  int64_t peak() const { return count_ ? count_->peak : 0; }

 private:
  struct Count : c10::MemoryReportingInfoBase {
    int64_t bytes = 0, peak = 0;
    void reportMemoryUsage(void*, int64_t size, size_t, size_t, c10::Device) override {
      bytes += size;
      peak = std::max(peak, bytes);
    }
    bool memoryProfilingEnabled() const override { return true; }
  };
  const int log_level_ = FLAGS_caffe2_log_level;
  std::shared_ptr<Count> count_;
  std::optional<c10::DebugInfoGuard> guard_;
};

// Sums a tensor over the processes that share a data set, in place. Empty where there is one process.
using Sum = std::function<void(const Tensor&)>;

template <class Graph>
class Graphs {
 public:
  struct Batch {
    Graph graph;
    Tensor loss;    // the sum over the batch's samples of their loss
    double weight;  // the number or weight of its samples
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
      AllocationCounter counter;
      const double began = passes_ == 0 ? now() : 0;
      auto item = next_();
      if (!item) break;
      if (passes_ == 0) build_seconds_ += now() - began;
      visit(item->graph);
      passes_ == 0 ? remember(*item, batch, counter) : compare(item->loss.detach(), batch);
      ++batch;
      check_signals_();
    }
    TORCH_CHECK_VALUE(passes_ == 0 || batch == batches(), "data must give the same batches at every pass, got ", batch,
                      " after ", batches(), " in the first");
    TORCH_CHECK_VALUE(batch > 0, "data must hold at least one batch, got none");
    TORCH_CHECK_VALUE(weight_ > 0 || sum_, "the weights of all batches must sum to more than 0, got ", weight_);
    ++passes_;
  }

  // Bytes that building and visiting the first batch takes at its peak; it is let go.
  template <class Visit>
  int64_t measure(Visit visit) {
    rewind_(0);
    AllocationCounter counter;
    const auto item = next_();
    if (item) visit(item->graph);
    return counter.peak();
  }

 private:
  // Kept graphs are those of the first batches: once one does not fit beside what a pass takes for a moment, the later
  // ones are built anew.
  void remember(Batch& item, int64_t batch, const AllocationCounter& counter) {
    weight_ += item.weight;
    losses_.push_back(item.loss.detach());
    if (kept() == batch && counter.knows() && kept_bytes_ + counter.peak() <= memory_) {
      graphs_.push_back(std::move(item.graph));
      kept_bytes_ += counter.bytes();
    }
  }

  void compare(const Tensor& loss, int64_t batch) {
    TORCH_CHECK_VALUE(batch < batches(), "data must give the same batches at every pass, got more than the ", batches(),
                      " of the first");
    const Tensor change = (loss - losses_[batch]).abs().div(losses_[batch].abs().clamp_min(1e-30));
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
