"""The name of the compiled module for a version of torch. The build reads this file, too, before torch is there."""

import re


def module_name(version: str) -> str:
    """torch_2_13 for 2.13.0+cpu. A version before its release has a module of its own."""
    release = re.fullmatch(r"(\d+)\.(\d+)(\.\d+)*(\.post\d+)?(\+.*)?", version)
    return f"torch_{release[1]}_{release[2]}" if release else "torch_" + re.sub(r"\W", "_", version)
