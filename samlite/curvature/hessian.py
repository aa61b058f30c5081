"""The Hessian of a model's mean loss over a data set, and everything that is asked of it."""

from __future__ import annotations

import math

from samlite.curvature.matrix import Progress
from samlite.curvature.moments import moments
from samlite.curvature.products import HessianProducts
from samlite.curvature.results import Block, Moments, Sharpness, Stability
from samlite.curvature.samples import Unit
from samlite.curvature.sharpness import blocks, sharpness
from samlite.curvature.stability import stability
from samlite.errors import require


class Hessian(HessianProducts):
    """H = (1/n) sum_i of the second derivatives of sample i's loss by the parameters: ``h @ v``, ``h.eigenvalues()``.

    The measurement is the same whatever is switched on around it (no_grad, inference mode, autocast, anomaly mode), and
    sees neither hooks on gradients nor checkpointing nor compilation. Transforms of torch.func and fake tensors are
    refused.

    Args:
        model: any module; of a wrapper that compiles it or distributes its training, the module inside. It is left as
            it was found: weights, gradients, modes, buffers, plain attributes, random state.
        loss_fn: a loss module, taken as criterion(model(inputs), targets) with its own denominator
            (ignore_index, class weights); or ``loss_fn(model, batch)`` that returns the mean loss over the batch, or
            (mean loss, weight) where its denominator is not the number of samples.
        data: an (inputs, targets) pair of tensors, or a re-iterable of batches, the same at every pass: tensors in
            containers of any kind (see ``samlite.batches``). Batches of unequal size count by their samples. A pair
            whose samples depend on each other through the loss (contrastive, pairwise) is one batch.
        params: which parameters, as name patterns (``"layer3.*"``) or tensors; default all of the model that require a
            gradient. Those of a loss module are named ``criterion.NAME``.
        curvature: "hessian", or "ggn" for its Gauss-Newton part: see ``samlite.curvature``.
        memory: bytes (or "2GB") that kept graphs may take; default half of what is free. Beyond it graphs are built
            anew at every product, with the same results. The graph of one batch comes on top.
        mode: "eval", or "train" for the function with batch statistics.
        process_group: of ``torch.distributed``, whose processes each hold a part of the data and the same weights:
            every result is that of all the data together, the same on every process, and all must call the same
            methods. Every product is summed over the processes once. Memory is what the one with the least has.
        products: "autograd", exact; or "finite-difference", by central differences of the gradient, for operations
            without a second derivative. Those take two gradients each on a copy of the model, in float64 where the loss
            can be computed so, and their error is in every bound of `eigenvalues`.

    Raises:
        UsageError: an argument is not usable; the line names it, the rule and the fix.
    """

    def moments(
        self,
        order: int = 4,
        unit: Unit = "sample",
        *,
        tol: float = 1e-3,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Moments:
        """Sharpness a and the non-uniformity s_2 .. s_order of the per-sample Hessians (or of those of batches).

        Args:
            order: the highest moment; M_k v costs k steps of about one product H v each.
            unit: "sample", or "batch" for each batch of `data` as one, weighted by its share: the moments of
                mini-batch SGD.
            tol: relative error of each eigenvalue.

        Raises:
            UsageError: samples depend on each other (batch norm with batch statistics), or are not told apart.
        """
        require(isinstance(order, int) and 2 <= order <= 8, f"order must be between 2 and 8, got {order}")
        return moments(self, order, unit, tol, seed, progress)

    def stability(
        self,
        lr: float,
        rho: float = 0.0,
        unit: Unit = "sample",
        *,
        tol: float = 1e-3,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Stability:
        """Whether SGD (rho = 0) or unnormalised SAM stays at this minimum, one sample (or batch) a step.

        Where the loss is not squared error, its Hessian is rarely free of negative eigenvalues: measure with
        ``curvature="ggn"``.

        Args:
            tol: relative error of `max_lr`. Eigenvalues are found to tol/1000 of the largest one of their matrix:
                directions that matter less than that are not seen, unless the Krylov space spans them all.

        Raises:
            UsageError: as of `moments`.
        """
        require(0 < lr < math.inf, f"lr must be > 0, got {lr}")
        require(0 <= rho < math.inf, f"rho must be >= 0, got {rho}")
        require(0 < tol < 1, f"tol must be between 0 and 1, got {tol}")
        return stability(self, lr, rho, unit, tol, seed, progress)

    def sharpness(self, tol: float = 0.05, *, seed: int = 0, progress: Progress | None = None) -> Sharpness:
        """Worst-, ascent- and average-direction sharpness; `tol` is that of the trace.

        Raises:
            UsageError: as of `moments`.
        """
        return sharpness(self, tol, seed, progress)

    def blocks(
        self, k: int = 1, tol: float = 0.05, *, seed: int = 0, progress: Progress | None = None
    ) -> dict[str, Block]:
        """The k largest eigenvalues and the trace of each layer's own block, by the layer's name.

        A layer is what shares the name before the last dot. Blocks are measured one by one, so that memory is that of
        one.
        """
        require(isinstance(k, int) and k >= 1, f"k must be >= 1, got {k}")
        return blocks(self, k, tol, seed, progress)
