"""A folder that looks like a sweep, for tests of what reads one."""

from pathlib import Path
from typing import Any

from samlite.files import write_json
from samlite.training.config import Config


class Sweep:
    """A folder that looks like a sweep, with results made up."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cells = folder, []

    def add(
        self,
        test: float | None,
        *,
        validation: float = 0.9,
        best: float = 0.95,
        sharpness: Any = None,
        spread: Any = None,  # s_k by k
        converged: bool = True,  # the moments
        **choices: Any,
    ) -> None:
        config = Config.of(**{"task": "digits", "width": 8, "device": "cpu", **choices})
        self.cells.append(config.to_json())
        write_json(self.folder / "sweep.json", {"cells": self.cells})
        run = self.folder / config.name
        run.mkdir()
        write_json(run / "config.json", config.to_json())
        if test is not None:
            final = {"test_metric": test, "validation_metric": validation, "validation_loss": 1 - validation}
            end = {
                "final": final,
                "best": {"test_metric": best},
                "parameters": 587 * config.width // 8,
                "interpolates": test > 0.925,
            }
            write_json(run / "result.json", end)
        if sharpness is not None:
            found = {"which": "LA", "converged": True, "complete": True, "values": [sharpness]}
            moments = {"unit": "sample", "converged": converged, "nonuniformity": spread}
            write_json(run / "sharpness.json", {"eigenvalues": found, **({"moments": moments} if spread else {})})
