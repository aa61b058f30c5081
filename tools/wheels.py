"""Makes a wheel that holds the compiled module for several minor versions of torch.

    python tools/wheels.py OUT PYTHON [PYTHON ...]

Each PYTHON is an interpreter of the same version, beside another torch. A wheel is built with each, and their modules
are put into one, which requires the oldest of these torches or any newer one: beside a torch that it has no module for,
one is built at import. It needs the package `wheel`.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from find_torch import minor_of

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENT = re.compile(r"^Requires-Dist: torch\b.*$", re.MULTILINE)


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    out, pythons = Path(sys.argv[1]).resolve(), sys.argv[2:]
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        unpacked = [_unpacked(_built(python, Path(folder, str(i)))) for i, python in enumerate(pythons)]
        whole = unpacked[0]
        for other in unpacked[1:]:
            for module in (other / "samlite" / "native").glob("torch_*.*"):
                shutil.copy2(module, whole / "samlite" / "native")
        modules = sorted((whole / "samlite" / "native").glob("torch_*.*"))
        _require_at_least(whole, min(minor_of(module.name[6:].split(".")[0].replace("_", ".")) for module in modules))
        subprocess.run([sys.executable, "-m", "wheel", "pack", str(whole), "--dest-dir", str(out)], check=True)
    for module in modules:
        print(module.name)
    for wheel in out.glob("samlite-*.whl"):
        print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MB")


def _built(python: str, folder: Path) -> Path:
    began = time.monotonic()
    command = [python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    print(f"{python}: {time.monotonic() - began:.0f} s", flush=True)
    return wheel


def _unpacked(wheel: Path) -> Path:
    command = [sys.executable, "-m", "wheel", "unpack", str(wheel), "--dest", str(wheel.parent)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (folder,) = (path for path in wheel.parent.iterdir() if path.is_dir())
    return folder


def _require_at_least(folder: Path, oldest: tuple[int, int]) -> None:
    (metadata,) = folder.glob("*.dist-info/METADATA")
    text, count = REQUIREMENT.subn(f"Requires-Dist: torch>={oldest[0]}.{oldest[1]}", metadata.read_text())
    if count != 1:
        sys.exit(f"{metadata} must require torch once, got {count} times")
    metadata.write_text(text)


if __name__ == "__main__":
    main()
