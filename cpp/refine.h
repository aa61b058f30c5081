// Rayleigh-Ritz with expansion by residuals, from a basis that is there already.
#pragma once

#include "accuracy.h"

namespace samlite {

// Rayleigh-Ritz on the first `count` rows of basis.V, then expansion by the residual of the worst pair, with W = H V
// held beside V, until the bounds hold. Leaves the k best Ritz vectors in the first rows. Residuals are exact here, so
// no certificate is needed.
Known refine(Factorisation& basis, CountedMatVec& apply, const Accuracy& accuracy, const Options& options,
             int64_t count);

}  // namespace samlite
