"""``python -m sealign``: the command line."""

from __future__ import annotations

from sealign.cli import main

if __name__ == "__main__":
    main()
