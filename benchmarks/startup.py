"""Measure the time to import the library beyond torch, and to print the help of the command line.

    python benchmarks/startup.py [--rounds 9] [--json FILE]

Every run is a separate process; bytecode is cached by the call before the first round.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rounds import interleave, report, spread

COMMANDS = {
    "python": [sys.executable, "-c", ""],
    "import torch": [sys.executable, "-c", "import torch"],
    "import sealign": [sys.executable, "-c", "import torch, sealign"],
    "sealign --help": [str(Path(sys.executable).with_name("sealign")), "--help"],
}


def run(command: Sequence[str]) -> None:
    # Python must be able to cache its bytecode, as it does for users.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run(command, check=True, capture_output=True, env=environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    arms = {name: lambda command=command: run(command) for name, command in COMMANDS.items()}  # type: ignore[misc]
    seconds = interleave(arms, options.rounds)
    beyond = [own - torch for own, torch in zip(seconds["import sealign"], seconds["import torch"], strict=True)]
    rows = [{"": name, "seconds": spread(taken)} for name, taken in seconds.items()]
    rows.append({"": "import sealign beyond torch", "seconds": spread(beyond)})
    report(f"Starting, {options.rounds} rounds", rows, {"seconds": seconds, "beyond_torch": beyond}, options.json)


if __name__ == "__main__":
    main()
