"""Measure how the cost of applying an edit grows with rank, tokens, width and layers, against the formula.

    python benchmarks/growth.py [--rounds 5] [--json FILE] [--plot FILE]

A token costs 4 d (k+ + k-) floating-point operations per edited module. Factors are random, in float32.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rounds import interleave, report, spread

from sealign.methods.sea import projection_edit
from sealign.spectral.projection import Projection

matplotlib.use("Agg")

RANKS = (8, 32, 128, 512)
TOKENS = (1, 16, 128, 512, 2048)
WIDTHS = (576, 1024, 2048, 4096)
LAYERS = (1, 8, 32)
START: dict[str, int] = {"rank": 128, "tokens": 512, "width": 2048, "layers": 1}


def call(*, rank: int, tokens: int, width: int, layers: int) -> Callable[[], object]:
    """Return a function that applies the rescaled edits of some layers, with half of the rank on either side."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=generator)
    edits = []
    for _ in range(layers):
        plus, minus = (torch.linalg.qr(torch.randn(width, rank // 2, generator=generator))[0] for _ in range(2))
        edits.append(projection_edit(Projection(plus, minus), normalization="token"))

    @torch.no_grad()
    def run() -> None:
        for edit in edits:
            edit(x, 0.5)

    return run


def shapes() -> Mapping[str, list[dict[str, int]]]:
    """Return the shapes to time, by the size that varies."""
    return {
        what: [{**START, what: value} for value in values]
        for what, values in (("rank", RANKS), ("tokens", TOKENS), ("width", WIDTHS), ("layers", LAYERS))
    }


def gigaflops(shape: Mapping[str, int]) -> float:
    """Return the floating-point operations of a call by the formula, in units of 1e9."""
    return 4 * shape["width"] * shape["rank"] * shape["tokens"] * shape["layers"] / 1e9


def draw(record: Mapping[str, list[dict[str, Any]]], file: Path) -> None:
    """Plot milliseconds against each size, with a line in proportion to it through the largest."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(record), figsize=(3.2 * len(record), 3), layout="constrained")
    for axis, (what, found) in zip(axes, record.items(), strict=True):
        values = [item["shape"][what] for item in found]
        times = [1000 * statistics.median(item["seconds"]) for item in found]
        expected = [times[-1] * value / values[-1] for value in values]
        axis.loglog(values, times, "o-", color="black", label="measured")
        axis.loglog(values, expected, "--", color="0.5", label="in proportion")
        axis.set_xticks(values, [str(value) for value in values], fontsize="small")
        axis.xaxis.minorticks_off()
        axis.set_xlabel(what if what != "rank" else "rank, k+ + k-")
        axis.set_ylabel("ms per call" if axis is axes[0] else "")
    axes[0].legend()
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    rows, record = [], {}
    for what, chosen in shapes().items():
        arms = {str(shape[what]): call(**shape) for shape in chosen}
        seconds = interleave(arms, options.rounds, calls=5)
        record[what] = [
            {"shape": shape, "seconds": seconds[str(shape[what])], "gigaflops": gigaflops(shape)} for shape in chosen
        ]
        for item in record[what]:
            milliseconds = [1000 * taken for taken in item["seconds"]]
            rate = item["gigaflops"] / statistics.median(item["seconds"])
            value = f"{what} {item['shape'][what]}"
            rows.append({"": value, "ms per call": spread(milliseconds), "GFLOP/s": f"{rate:.1f}"})
    start = ", ".join(f"{name} {value}" for name, value in START.items())
    report(f"Applying, around {start}", rows, {"growth": record}, options.json)
    if options.plot:
        draw(record, options.plot)


if __name__ == "__main__":
    main()
