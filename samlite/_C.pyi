"""The compiled module: eigen-solvers, Hessian-vector products and per-sample chains on libtorch."""

from collections.abc import Callable, Sequence
from enum import Enum
from typing import overload

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
        progress: Callable[[int, float], None] | None = None,
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

class Hessian:
    def __init__(
        self,
        params: Sequence[Tensor],
        rewind: Callable[[int], None],
        next: Callable[[], tuple[Tensor, float] | None],
        memory: int,
    ) -> None: ...
    def apply(self, v: Tensor) -> Tensor: ...
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
def chain(loss: Tensor, sites: Sequence[Site], samples: int, params: Sequence[Tensor]) -> Powers: ...
def whole(loss: Tensor, weight: float, mean: bool, params: Sequence[Tensor]) -> Powers: ...

class Moments:
    def __init__(
        self,
        params: Sequence[Tensor],
        rewind: Callable[[int], None],
        next: Callable[[], tuple[Powers, Tensor, float] | None],
        batches: bool,
        memory: int,
    ) -> None: ...
    def apply(self, v: Tensor, order: int) -> Tensor: ...  # (order, p)
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

class Centred:
    def __init__(self, moments: Moments, order: int) -> None: ...
    def apply(self, v: Tensor) -> Tensor: ...  # (p,)

@overload
def eigenpairs(hessian: Hessian, options: Options, which: str = "LA", method: str = "lanczos") -> Eigenpairs: ...
@overload
def eigenpairs(centred: Centred, options: Options, which: str = "LA", method: str = "lanczos") -> Eigenpairs: ...
@overload
def eigenpairs(
    matvec: Callable[[Tensor], Tensor],
    like: Tensor,
    dimension: int,
    options: Options,
    which: str = "LA",
    method: str = "lanczos",
) -> Eigenpairs: ...
