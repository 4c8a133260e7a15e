"""Run the commands of each extra in an environment with the wheel and that extra alone, and those that need none.

``python -m tests.package.extras UV WHEEL FOLDER [NAME ...]`` makes an environment in FOLDER for each name, one after
another, all of them by default.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.package.extra_commands import COMMANDS


def check(uv: str, wheel: Path, folder: Path, name: str) -> bool:
    """Return whether the commands of an extra do what they should.

    Args:
        uv: The program uv.
        wheel: Wheel of the package.
        folder: Folder for the environment; an earlier one is replaced.
        name: Name of the extra, names with commas between them, or ``none``.
    """
    python = folder / "bin" / "python"
    wanted = f"sealign @ {wheel.resolve().as_uri()}"
    if name != "none":
        wanted = wanted.replace("sealign", f"sealign[{name}]", 1)
    subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, folder], check=True)
    subprocess.run([uv, "pip", "install", "--quiet", "--python", python, wanted], check=True)
    return subprocess.run([python, "-m", "tests.package.extra_commands", name]).returncode == 0


def main(uv: str, wheel: str, folder: str, *names: str) -> str | None:
    """Return which extras have faults; what they are was printed.

    Args:
        uv: The program uv.
        wheel: Wheel of the package.
        folder: Folder for the environment.
        *names: Extras; all if there are none.
    """
    failed = [name for name in names or tuple(COMMANDS) if not check(uv, Path(wheel), Path(folder), name)]
    return f"faults of {'; '.join(failed)}" if failed else None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
