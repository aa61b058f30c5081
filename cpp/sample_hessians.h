// What multiplies a vector by powers of Hessians: those of the samples of a batch, or that of the batch as a whole.
#pragma once

#include <ATen/ATen.h>

#include <vector>

namespace samlite {

using at::Tensor;

class SampleHessians {
 public:
  virtual ~SampleHessians() = default;
  // out[k] += the sum of H_i^(k+1) v over its samples, H_i not yet scaled. v: (p,), out: (orders, p).
  virtual void add(const Tensor& v, Tensor& out) = 0;
  // g_i^T H_i g_i / |g_i|^2 along each sample's own gradient, H_i not yet scaled: (samples,); nan where g_i is 0 or
  // it is not known.
  virtual Tensor ascent() const = 0;
  // g_i . v: (samples,); nan where it is not known.
  virtual Tensor slopes(const Tensor& v) const = 0;
  virtual int64_t samples() const = 0;
  // The tensors that it keeps, some with a graph behind them, and about what one step takes beside them.
  virtual std::vector<Tensor> held() const = 0;
  virtual int64_t step_bytes() const = 0;
};

}  // namespace samlite
