// Power iteration with deflation: the textbook baseline, on the same operator and with the same honesty.
#pragma once

#include "ritz.h"

namespace samlite {

Eigenpairs power_iteration(MatVec apply, const Tensor& like, int64_t p, const Options& options);

}  // namespace samlite
