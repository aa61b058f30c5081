"""The compiled module: eigen-solvers, Hessian-vector products and per-sample chains on libtorch."""

from collections.abc import Callable as Function
from collections.abc import Sequence
from enum import Enum

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
    def apply(self, v: Tensor) -> Tensor: ...  # (p,) -> (p,)

class Callable(Operator):
    def __init__(self, function: Function[[Tensor], Tensor], like: Tensor, dimension: int) -> None: ...

class Curvature: ...

def gradient(loss: Tensor, params: Sequence[Tensor]) -> Curvature: ...
def gauss_newton(
    loss: Tensor, outputs: Sequence[Tensor], cuts: Sequence[Tensor], params: Sequence[Tensor]
) -> Curvature: ...

class Hessian(Operator):
    def __init__(
        self,
        params: Sequence[Tensor],
        rewind: Function[[int], None],
        next: Function[[], tuple[Curvature, Tensor, float] | None],
        memory: int,
        sum: Function[[Tensor], None] | None = None,
    ) -> None: ...
    def measure(self) -> int: ...
    def drift(self) -> float: ...
    @property
    def build_seconds(self) -> float: ...
    @property
    def batches(self) -> int: ...
    @property
    def kept(self) -> int: ...
    @property
    def kept_bytes(self) -> int: ...

class Kind(Enum):
    linear = ...
    conv = ...
    scale = ...
    shift = ...
    embedding = ...

class Use:
    def __init__(self, kind: Kind, param: int, sizes: list[int], strides: list[int], offset: int) -> None: ...
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    mean: Tensor | None
    inverse: Tensor | None
    padding_row: int

class Site:
    def __init__(self, a: Tensor | None, eta: Tensor | None, z: Tensor, layout: tuple[int, int, int, int]) -> None: ...
    def add(self, use: Use) -> None: ...

class Powers:
    def __call__(self, v: Tensor, order: int) -> Tensor: ...  # (order, p): sums over samples, not yet scaled

def tap(a: Tensor) -> tuple[Tensor, Tensor]: ...
def chain(
    loss: Tensor,
    sites: Sequence[Site],
    samples: int,
    params: Sequence[Tensor],
    outputs: Sequence[Tensor],
    cuts: Sequence[Tensor],
) -> Powers: ...
def whole(curvature: Curvature, weight: float, mean: bool, params: Sequence[Tensor]) -> Powers: ...

class Moments:
    def __init__(
        self,
        params: Sequence[Tensor],
        rewind: Function[[int], None],
        next: Function[[], tuple[Powers, Tensor, float] | None],
        batches: bool,
        memory: int,
        sum: Function[[Tensor], None] | None = None,
    ) -> None: ...
    def apply(self, v: Tensor, order: int) -> Tensor: ...  # (order, p)
    def ascent(self) -> Tensor: ...  # ()
    def measure(self) -> int: ...
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

class Traces:
    @property
    def values(self) -> list[float]: ...  # of tr((H / unit)^j)
    @property
    def errors(self) -> list[float]: ...
    @property
    def unit(self) -> float: ...
    @property
    def probes(self) -> int: ...
    @property
    def matvecs(self) -> int: ...
    @property
    def converged(self) -> bool: ...

class ProbeOptions:
    def __init__(
        self,
        *,
        tol: float,
        max_matvecs: int,
        deflation: int,
        seed: int,
        progress: Function[[int, float], None] | None,
    ) -> None: ...

def power_traces(operator: Operator, order: int, watched: int, options: ProbeOptions) -> Traces: ...

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
