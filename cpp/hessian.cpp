#include "hessian.h"

#include <c10/core/Allocator.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Logging.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <torch/csrc/autograd/autograd.h>

#include <chrono>

namespace samlite {

namespace {

// Bytes allocated while it is active, as torch's allocators report them: what is left when a graph has been
// built is the graph, and the peak above it is what building and using it takes for a moment. The channel is
// the memory profiler's, so while somebody else listens nothing is known.
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

// Seconds of a clock that waits for the device.
double now(c10::Device device) {
  if (!device.is_cpu()) c10::impl::VirtualGuardImpl(device.type()).synchronizeDevice(device.index());
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

Hessian::Hessian(std::vector<Tensor> params, Losses losses, int64_t memory, std::function<void()> check_signals)
    : params_(std::move(params)),
      losses_(std::move(losses)),
      memory_(memory),
      check_signals_(std::move(check_signals)) {
  for (const auto& p : params_) numel_ += p.numel();
  drift_ = at::zeros({}, params_.at(0).options().requires_grad(false));
}

std::vector<Tensor> Hessian::views(const Tensor& flat) const {
  std::vector<Tensor> result;
  int64_t offset = 0;
  for (const auto& p : params_) {
    result.push_back(flat.narrow(0, offset, p.numel()).view(p.sizes()));
    offset += p.numel();
  }
  return result;
}

Hessian::Graph Hessian::build(const Tensor& loss) const {
  Graph graph;
  if (!loss.requires_grad()) return graph;  // does not depend on the parameters: zero curvature
  c10::AutoGradMode grad(true);
  const auto gradients = torch::autograd::grad({loss}, params_, {}, /*retain_graph=*/true, /*create_graph=*/true,
                                               /*allow_unused=*/true);
  for (size_t i = 0; i < params_.size(); ++i) {
    if (gradients[i].defined() && gradients[i].requires_grad()) {  // else linear in this parameter
      graph.gradients.push_back(gradients[i]);
      graph.index.push_back(i);
    }
  }
  return graph;
}

// out += d(g . v)/dw: reverse mode over the graph of the gradient.
void Hessian::accumulate(const Graph& graph, const std::vector<Tensor>& v, std::vector<Tensor>& out) const {
  if (graph.gradients.empty()) return;
  std::vector<Tensor> directions;
  for (const auto i : graph.index) directions.push_back(v[i]);
  const auto products = torch::autograd::grad(graph.gradients, params_, directions, /*retain_graph=*/true,
                                              /*create_graph=*/false, /*allow_unused=*/true);
  for (size_t i = 0; i < params_.size(); ++i)
    if (products[i].defined()) out[i].add_(products[i]);
}

int64_t Hessian::measure() {
  losses_.rewind(0);
  AllocationCounter counter;
  const auto item = losses_.next();
  const Graph graph = build(std::get<0>(item.value()));
  return counter.bytes();
}

Tensor Hessian::apply(const Tensor& v) {
  check_signals_();
  if (passes_ == 0) {  // also after a first pass that was interrupted
    graphs_.clear();
    losses_seen_.clear();
    weight_ = build_seconds_ = 0;
    kept_bytes_ = 0;
  }
  Tensor out = at::zeros_like(v);
  const auto directions = views(v);
  auto sums = views(out);
  for (const auto& graph : graphs_) accumulate(graph, directions, sums);
  if (!keeps_all()) {
    int64_t batch = kept();
    losses_.rewind(batch);
    while (true) {
      AllocationCounter counter;
      const double began = passes_ == 0 ? now(v.device()) : 0;
      const auto item = losses_.next();
      if (!item) break;
      const auto& [loss, weight] = *item;
      Graph graph = build(loss);
      if (passes_ == 0) build_seconds_ += now(v.device()) - began;
      accumulate(graph, directions, sums);
      const Tensor value = loss.detach();
      if (passes_ == 0) {
        weight_ += weight;
        losses_seen_.push_back(value);
        // Kept graphs are those of the first batches: once one does not fit beside what a product takes for a
        // moment, the later ones are built anew.
        if (kept() == batch && counter.knows() && kept_bytes_ + counter.peak() <= memory_) {
          graphs_.push_back(std::move(graph));
          kept_bytes_ += counter.bytes();
        }
      } else {
        TORCH_CHECK_VALUE(batch < batches(), "data must give the same batches at every pass, got more than the ",
                          batches(), " of the first");
        const Tensor& first = losses_seen_[batch];
        drift_ = at::maximum(drift_, (value - first).abs().div(first.abs().clamp_min(1e-30)));
      }
      ++batch;
      check_signals_();
    }
    TORCH_CHECK_VALUE(passes_ == 0 || batch == batches(), "data must give the same batches at every pass, got ", batch,
                      " after ", batches(), " in the first");
    TORCH_CHECK_VALUE(batch > 0, "data must hold at least one batch, got none");
    TORCH_CHECK_VALUE(weight_ > 0, "the weights of all batches must sum to more than 0, got ", weight_);
    ++passes_;
  }
  return out.div_(weight_);
}

double Hessian::drift() const { return drift_.item<double>(); }

}  // namespace samlite
