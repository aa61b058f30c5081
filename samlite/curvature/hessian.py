"""The Hessian of a model's mean loss over a data set, and everything that is asked of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from torch import Tensor
from torch.optim import Optimizer

from samlite.curvature.matrix import Progress
from samlite.curvature.measures.point import Point
from samlite.curvature.measures.table import measures, names_of
from samlite.curvature.moments import moments
from samlite.curvature.operator import Operator
from samlite.curvature.preconditioner import preconditioned
from samlite.curvature.products import HessianProducts
from samlite.curvature.results import Block, Measure, Moments, SampleSpectra, Sharpness, Stability
from samlite.curvature.samples import Unit
from samlite.curvature.sharpness import blocks, sharpness
from samlite.curvature.spectra import spectra
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

    def preconditioned(self, by: Optimizer | Tensor, *, decay: float = 0.0) -> Operator:
        """P^-1/2 (H + decay I) P^-1/2: curvature as an adaptive optimizer feels it, with all that an `Operator` has.

        Args:
            by: Adam, AdamW, RMSprop or Adagrad of torch, or SAM around one, which has taken a step: P is the diagonal
                that its last step was divided by (see ``samlite.curvature.preconditioner``). Or the diagonal: (p,).
            decay: weight decay that is a part of the gradient, as in Adam; see `samlite.edges`.

        Raises:
            UsageError: the optimizer has no such diagonal, no state yet, or not these parameters.
        """
        return preconditioned(self, by, decay)

    def measures(
        self,
        names: str | Iterable[str] = "all",
        optimizer: Optimizer | None = None,
        lr: float | None = None,
        rho: float | None = None,
        *,
        radius: float = 0.05,
        batch_size: int = 128,
        k: int = 5,
        other: HessianProducts | None = None,
        tol: float = 1e-3,
        seed: int = 0,
        progress: Callable[[str], None] | None = None,
    ) -> dict[str, Measure]:
        """Sharpness as the literature measures it, by name: "batch,critical", or "all". See docs/measures.md.

        Args:
            optimizer: in use at these weights, for its next update, its preconditioner and its edge.
            lr: learning rate where there is no optimizer.
            rho: SAM's radius where there is no optimizer.
            radius: of worst- and average-case sharpness.
            batch_size: of batch sharpness, and the number m of samples that share a worst-case step.
            k: the size of the top space.
            other: another checkpoint of the network, for the overlap of their top spaces.
            tol: relative error of eigenvalues.
            progress: called with the name of each measure before it is taken.

        Returns:
            One `Measure` a name; the value is nan, with the reason in `note`, for one that does not apply here.

        Raises:
            UsageError: there is no such measure, or an argument is not usable.
        """
        require(lr is None or 0 < lr < math.inf, f"lr must be > 0, got {lr}")
        require(rho is None or 0 <= rho < math.inf, f"rho must be >= 0, got {rho}")
        require(0 < radius < math.inf, f"radius must be > 0, got {radius}")
        require(isinstance(batch_size, int) and batch_size >= 1, f"batch_size must be >= 1, got {batch_size}")
        require(isinstance(k, int) and k >= 1, f"k must be >= 1, got {k}")
        point = Point(self, optimizer, lr, rho, radius, batch_size, k=k, tol=tol, other=other, seed=seed)
        return measures(names_of(names), point, progress)

    def sample_eigenvalues(
        self, count: int = 256, tol: float = 1e-2, *, seed: int = 0, progress: Progress | None = None
    ) -> SampleSpectra:
        """The largest eigenvalue of each of `count` samples' own Hessians: about 10 products of a single sample each.

        Samples of a pair are drawn by the seed; of batches they are the first ones. `progress` is called with their
        number.
        """
        require(isinstance(count, int) and count >= 1, f"count must be >= 1, got {count}")
        require(0 < tol < 1, f"tol must be between 0 and 1, got {tol}")
        return spectra(self, count, tol, seed, progress)

    def sharpness(self, tol: float = 0.05, *, seed: int = 0, progress: Progress | None = None) -> Sharpness:
        """Worst-, ascent- and average-direction sharpness; `tol` is that of the trace.

        Raises:
            UsageError: as of `moments`.
        """
        return sharpness(self, tol, seed, progress)

    def blocks(
        self,
        k: int = 1,
        tol: float = 0.05,
        *,
        by: Optimizer | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> dict[str, Block]:
        """The k largest eigenvalues and the trace of each layer's own block, by the layer's name.

        A layer is what shares the name before the last dot. Blocks are measured one by one, so that memory is that of
        one. With an optimizer in `by` they are preconditioned as of `preconditioned`.
        """
        require(isinstance(k, int) and k >= 1, f"k must be >= 1, got {k}")
        return blocks(self, k, tol, by, seed, progress)
