"""The compiled module: eigen-solvers and Hessian-vector products on libtorch."""

from collections.abc import Callable, Sequence
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

@overload
def eigenpairs(hessian: Hessian, options: Options, which: str = "LA", method: str = "lanczos") -> Eigenpairs: ...
@overload
def eigenpairs(
    matvec: Callable[[Tensor], Tensor],
    like: Tensor,
    dimension: int,
    options: Options,
    which: str = "LA",
    method: str = "lanczos",
) -> Eigenpairs: ...
