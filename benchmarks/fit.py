"""Measure the fit of one layer against the paper's formulas, computed densely in float64.

    python benchmarks/fit.py [--rounds 3] [--width 4096] [--demonstrations 2000] [--json FILE]

Both sides are fitted, positive and negative, at K = 0.998. The activations are random and resemble a language model's:
a large mean, variances that fall as 1 / j, and correlated roles of a demonstration. The larger the mean (``--means``),
the fewer directions are kept: 4 with a mean of 1, and 20 with 0.65. The wider shapes are timed without the reference.
Memory is the peak of the process above its memory before, on Linux only.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from reference import directions
from rounds import interleave, peak, ratios, report, reset_peak, spread
from torch import Tensor

from sealign.methods.sea import fit_projection

K = 0.998


def activations(count: int, width: int, mean: float) -> list[Tensor]:
    """Return H, H+ and H-, (n, d) float32."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.arange(1, width + 1).double().rsqrt().float()
    center = mean * torch.randn(width, generator=generator) * scales
    shared = torch.randn(count, width, generator=generator)
    roles = []
    for _ in range(3):
        own = torch.randn(count, width, generator=generator)
        shift = 0.1 * torch.randn(width, generator=generator) * scales
        roles.append(center + shift + (0.8 * shared + 0.6 * own) * scales)
    return roles


def sine(found: Tensor, expected: Tensor) -> float:
    """Return the sine of the largest principal angle between the spans of two orthonormal bases."""
    found, expected = found.double(), expected.double()
    return float(torch.linalg.matrix_norm(found - expected @ (expected.T @ found), ord=2))


def memory(roles: list[Tensor]) -> float:
    """Return the peak memory of a fit as a multiple of the size of its inputs."""
    before = reset_peak()
    fit_projection(*roles, explained_variance=K)
    return (peak() - before) / sum(role.nbytes for role in roles)


def beside(roles: list[Tensor], rounds: int) -> dict[str, Any]:
    """Time fits and the dense formulas in turn, and compare their results."""
    added = memory(roles)
    kept: dict[str, Any] = {}

    def sealign() -> None:
        kept["sealign"] = fit_projection(*roles, explained_variance=K)

    def reference() -> None:
        kept["reference"] = [directions(roles[0], target, K) for target in roles[1:]]

    seconds = interleave({"sealign": sealign, "reference": reference}, rounds)
    found, expected = kept["sealign"], kept["reference"]
    return {
        "seconds": seconds,
        "times_faster": ratios(seconds, "reference", "sealign"),
        "ranks": [(found.rank_positive, found.rank_negative), tuple(basis.shape[1] for basis in expected)],
        "largest_angle": max(sine(found.positive, expected[0]), sine(found.negative, expected[1])),
        "memory_of_inputs": added,
    }


def row(
    seconds: dict[str, list[float]],
    times_faster: list[float],
    ranks: list[Any],
    largest_angle: float,
    memory_of_inputs: float,
) -> dict[str, str]:
    """Return a row of the table."""
    return {
        "Sealign, s": spread(seconds["sealign"]),
        "dense, s": spread(seconds["reference"], 1),
        "times faster": spread(times_faster, 1),
        "k+, k-; dense": "; ".join(f"{plus}, {minus}" for plus, minus in ranks),
        "largest angle": f"{largest_angle:.1e}",
        "memory, of inputs": f"{memory_of_inputs:.1f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--demonstrations", type=int, default=2000)
    parser.add_argument("--means", type=float, nargs="+", default=[1.0, 0.65])
    parser.add_argument(
        "--wide", type=int, default=8192, help="width of the shapes that are timed without the reference"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, str]] = []
    record: dict[str, Any] = {"beside": {}, "alone": {}}
    for mean in options.means:
        shape = f"d = {options.width}, n = {options.demonstrations}, mean {mean:g}"
        record["beside"][shape] = beside(activations(options.demonstrations, options.width, mean), options.rounds)
        rows.append({"shape": shape} | row(**record["beside"][shape]))
    for count in (options.demonstrations, 25):
        wide = activations(count, options.wide, options.means[0])
        added = memory(wide)
        alone = interleave({"sealign": lambda wide=wide: fit_projection(*wide, explained_variance=K)}, options.rounds)  # type: ignore[misc]
        record["alone"][f"d = {options.wide}, n = {count}"] = alone["sealign"]
        rows.append(
            dict.fromkeys(rows[0], "")
            | {
                "shape": f"d = {options.wide}, n = {count}",
                "Sealign, s": spread(alone["sealign"]),
                "memory, of inputs": f"{added:.1f}",
            }
        )
    report(f"Fit of one layer, K = {K}, medians of {options.rounds} rounds", rows, record, options.json)


if __name__ == "__main__":
    main()
