"""The compiled module: eigen-solvers, Hessian-vector products and per-sample chains on libtorch."""

from collections.abc import Callable as Function
from collections.abc import Sequence

from torch import Tensor

class Options:
    def __init__(
        self,
        *,
        k: int = 1,
        tol: float = 1e-3,
        verify: bool = False,
        separated: bool = True,
        basis: int = 100,
        max_matvecs: int = 1000,
        seed: int = 0,
        start: Tensor | None = None,
        progress: Function[[int, float], None] | None = None,
        precision: float = 0.0,
    ) -> None: ...

class Eigenpairs:
    @property
    def values(self) -> list[float]: ...
    @property
    def errors(self) -> list[float]: ...
    @property
    def residuals(self) -> list[float]: ...
    @property
    def vectors(self) -> Tensor: ...  # (k, p)
    @property
    def converged(self) -> bool: ...
    @property
    def complete(self) -> bool | None: ...
    @property
    def matvecs(self) -> int: ...

class Operator:
    def apply(self, v: Tensor) -> Tensor: ...  # (p,) -> (p,), of the matrix over 2^exponent()
    def exponent(self) -> int: ...

class Callable(Operator):
    def __init__(self, function: Function[[Tensor], Tensor], like: Tensor, dimension: int) -> None: ...

class Curvature:
    def held(self) -> list[Tensor]: ...

class SavedTensorHooks: ...

def take_saved_tensor_hooks() -> SavedTensorHooks: ...
def restore_saved_tensor_hooks(hooks: SavedTensorHooks) -> None: ...
def sequence_number() -> int: ...
def check_differentiable(derivatives: Sequence[Tensor]) -> None: ...
def drop_hooks(roots: Sequence[Tensor], since: int) -> None: ...
def gradient(loss: Tensor, params: Sequence[Tensor]) -> Curvature: ...
def gauss_newton(
    loss: Tensor, outputs: Sequence[Tensor], cuts: Sequence[Tensor], params: Sequence[Tensor]
) -> Curvature: ...

class Hessian(Operator):
    def __init__(
        self,
        params: Sequence[Tensor],
        rewind: Function[[int], None],
        next: Function[[], tuple[Curvature, Tensor, float, int] | None],
        memory: int,
        sum: Function[[Tensor], None] | None = None,
    ) -> None: ...
    def drift(self) -> float: ...
    @property
    def build_seconds(self) -> float: ...
    @property
    def batches(self) -> int: ...
    @property
    def kept(self) -> int: ...
    @property
    def kept_bytes(self) -> int: ...

class View:
    def __init__(self, param: int, sizes: list[int], strides: list[int], offset: int) -> None: ...

class Use: ...

class Linear(Use):
    def __init__(self, view: View) -> None: ...

class Conv(Use):
    def __init__(
        self,
        view: View,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
        output_padding: list[int] | None = None,
    ) -> None: ...

class Contraction(Use):
    def __init__(self, view: View, a: str, theta: str, z: str) -> None: ...

class Scale(Use):
    def __init__(self, view: View, mean: Tensor | None = None, inverse: Tensor | None = None) -> None: ...

class Shift(Use):
    def __init__(self, view: View) -> None: ...

class Embedding(Use):
    def __init__(self, view: View, padding_row: int = -1) -> None: ...

class Site:
    def __init__(
        self,
        a: Tensor | None,
        eta: Tensor | None,
        z: Tensor,
        layout: tuple[int, int, int, int],
        places: Tensor | None = None,
    ) -> None: ...
    def add(self, use: Use) -> None: ...

class SampleHessians:
    def __call__(self, v: Tensor, order: int) -> Tensor: ...  # (order, p): sums over samples, not yet scaled
    def held(self) -> list[Tensor]: ...
    def step_bytes(self) -> int: ...

def tap(a: Tensor) -> tuple[Tensor, Tensor]: ...
def chain(
    loss: Tensor,
    sites: Sequence[Site],
    samples: int,
    params: Sequence[Tensor],
    outputs: Sequence[Tensor],
    cuts: Sequence[Tensor],
) -> SampleHessians: ...
def batch_hessian(
    curvature: Curvature, weight: float, mean: bool, params: Sequence[Tensor], exponent: int = 0
) -> SampleHessians: ...

class Moments:
    def __init__(
        self,
        params: Sequence[Tensor],
        rewind: Function[[int], None],
        next: Function[[], tuple[SampleHessians, Tensor, float, int] | None],
        batches: bool,
        memory: int,
        exponent: int = 0,
        sum: Function[[Tensor], None] | None = None,
    ) -> None: ...
    def apply(self, v: Tensor, order: int) -> Tensor: ...  # (order, p), of Hessians over 2^exponent()
    def exponent(self) -> int: ...
    def suitable_exponent(self) -> int: ...
    def ascent(self) -> float: ...
    def drift(self) -> float: ...
    @property
    def build_seconds(self) -> float: ...
    @property
    def batches(self) -> int: ...
    @property
    def kept(self) -> int: ...
    @property
    def kept_bytes(self) -> int: ...

class Centred(Operator):
    def __init__(self, moments: Moments, order: int) -> None: ...

class Mixture(Operator):
    def __init__(self, moments: Moments, coefficients: Sequence[float]) -> None: ...

def eigenpairs(operator: Operator, options: Options, which: str = "LA", method: str = "lanczos") -> Eigenpairs: ...

class TraceProbes:
    def draw(self, more: int) -> int: ...
    def unit(self) -> float: ...  # samples are of tr((H / unit)^j)
    @property
    def samples(self) -> Tensor: ...  # (probes, order)
    @property
    def known(self) -> Tensor: ...  # (order,)
    @property
    def magnitude(self) -> Tensor: ...  # (order,)
    @property
    def exhausted(self) -> bool: ...
    @property
    def matvecs(self) -> int: ...

def trace_probes(operator: Operator, order: int, deflation: int, seed: int, limit: int) -> TraceProbes: ...

class Measure:
    @property
    def nodes(self) -> Tensor: ...
    @property
    def weights(self) -> Tensor: ...
    @property
    def residuals(self) -> Tensor: ...
    @property
    def matvecs(self) -> int: ...

def spectral_measure(operator: Operator, start: Tensor, steps: int) -> Measure: ...
