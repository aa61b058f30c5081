// Thick-restart Lanczos for a few eigenpairs of a matrix-free symmetric operator, with a certificate for the returned
// pairs, and a search for eigenvalues that a single Krylov space cannot hold. Knows no network: H is anything that
// multiplies a vector.
#pragma once

#include "ritz.h"

namespace samlite {

// like: any tensor with the type and device of the vectors; p: their length.
Eigenpairs lanczos(MatVec apply, const Tensor& like, int64_t p, const Options& options);

}  // namespace samlite
