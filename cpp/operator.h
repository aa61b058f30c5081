// A symmetric matrix that only multiplies.
#pragma once

#include <ATen/ATen.h>

#include <vector>

namespace samlite {

using at::Tensor;

class Operator {
 public:
  virtual ~Operator() = default;
  virtual Tensor apply(const Tensor& v) = 0;  // (p,) -> (p,), of the matrix over 2^exponent()
  virtual const Tensor& like() const = 0;     // any tensor with the type and device of the vectors
  virtual int64_t numel() const = 0;          // p
  virtual int64_t exponent() { return 0; }    // where products themselves might underflow or overflow
  // The size of the vectors whose difference a product is, as far as seen: what is lost to rounding is relative to it.
  // Waits for the device.
  virtual double scale() const { return 0; }
};

}  // namespace samlite
