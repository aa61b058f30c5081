// The search for eigenvalues that a single Krylov space cannot hold.
#pragma once

#include "accuracy.h"

namespace samlite {

// The Ritz vectors X that a Krylov space left in the first rows of its basis, k or more: H X^T = X^T Theta + q b^T.
struct Kept {
  std::vector<double> values, coupling;  // Theta and b
  Tensor q;
};

// Searches the complement of the known pairs, whose vectors are the first k rows of basis.V, and adds what it finds to
// them. Whether it finished: then none is missing, but for a stated probability.
bool search(Factorisation& basis, CountedMatVec& apply, const Accuracy& accuracy, const Options& options, Known& known,
            Kept kept);

}  // namespace samlite
