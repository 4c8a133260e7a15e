"""Cases of spectral editing in float64, computed from the formulas with numpy alone.

``python tests/oracle.py FOLDER`` writes them as files: ``index.json`` with the settings and one ``.npz`` for each case.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

EPSILON = 1e-4
"""Distance kept from the ends of the domain of an inverse map."""

LEAST_GAP = 0.05
"""Smallest (s_k - s_{k+1}) / s_1 of a case, so that rounding of the inputs cannot turn the subspaces."""

LEAST_DISTANCE = 1e-3
"""Smallest distance of a reached share of variance from K, so that rounding cannot change a rank."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of one case, and the ranks that they give."""

    case: str
    feature_map: str
    centered: bool
    combine: str
    normalization: str
    explained_variance: float
    strength: float


@dataclass(frozen=True)
class Case:
    """Inputs and results of one case."""

    settings: Settings
    rank_positive: int
    rank_negative: int
    arrays: dict[str, Array]

    def record(self) -> dict[str, Any]:
        """Return the entry of ``index.json``."""
        return asdict(self.settings) | {"rank_positive": self.rank_positive, "rank_negative": self.rank_negative}


def settings() -> list[Settings]:
    """Return the settings of all cases: maps, centring, combinations and rescalings, with several K and strengths."""
    found: list[Settings] = []
    for feature_map, centered in itertools.product(("identity", "squared_exponential", "tanh", "elu"), (False, True)):
        if centered and feature_map != "identity":
            continue  # An extension of the library; the paper and the design have no formula for it.
        for combine in ("both", "positive", "negative", "average", "reversed"):
            for normalization in ("token", "feature", "none"):
                for share in (0.6, 0.95) if combine == "both" else (0.9,):
                    name = f"generated_{len(found):03d}"
                    found.append(
                        Settings(
                            case=name,
                            feature_map=feature_map,
                            centered=centered,
                            combine=combine,
                            normalization=normalization,
                            explained_variance=share,
                            strength=1.0 if len(found) % 3 else 0.35,
                        )
                    )
    return found


def make_case(chosen: Settings) -> Case:
    """Return the first case of these settings, over growing seeds, whose ranks and subspaces are well determined."""
    number = int(chosen.case.rpartition("_")[2])
    for attempt in itertools.count():
        case = _attempt(chosen, np.random.default_rng([number, attempt]))
        if case is not None:
            return case
    raise AssertionError


def _attempt(chosen: Settings, random: np.random.Generator) -> Case | None:
    neutral, positive, negative, tokens = _draw(random)
    forward, inverse = FEATURE_MAPS[chosen.feature_map]
    h, h_positive, h_negative = forward(neutral), forward(positive), forward(negative)
    mean = np.zeros(h.shape[1])
    if chosen.centered:
        mean = h.mean(axis=0)
        h, h_positive, h_negative = (matrix - matrix.mean(axis=0) for matrix in (h, h_positive, h_negative))
    left_positive, values_positive, _ = np.linalg.svd(h.T @ h_positive / len(h))
    left_negative, values_negative, _ = np.linalg.svd(h.T @ h_negative / len(h))
    rank_positive = _rank(values_positive, chosen.explained_variance)
    rank_negative = _rank(values_negative, chosen.explained_variance)
    if rank_positive is None or rank_negative is None:
        return None
    kept = left_positive[:, :rank_positive] @ left_positive[:, :rank_positive].T
    removed = left_negative[:, :rank_negative] @ left_negative[:, :rank_negative].T
    identity = np.eye(len(kept))
    first, second = (removed, identity - kept) if chosen.combine == "reversed" else (kept, identity - removed)

    def part(projector: Array) -> Array:
        return inverse((forward(tokens) - mean) @ projector, tokens)

    combined = {
        "both": lambda: part(first) + part(second),
        "positive": lambda: part(first),
        "negative": lambda: part(second),
        "average": lambda: (part(first) + part(second)) / 2,
        "reversed": lambda: part(first) + part(second),
    }[chosen.combine]()
    y = combined + mean
    if chosen.normalization != "none":
        axis = 1 if chosen.normalization == "token" else 0
        y = y * np.linalg.norm(tokens, axis=axis, keepdims=True) / np.linalg.norm(y, axis=axis, keepdims=True)
    arrays = {
        "neutral": neutral,
        "positive": positive,
        "negative": negative,
        "tokens": tokens,
        "singular_values_positive": values_positive,
        "singular_values_negative": values_negative,
        "projector_positive": kept,
        "projector_negative_removed": removed,
        "edited": tokens + chosen.strength * (y - tokens),
    }
    return Case(chosen, rank_positive, rank_negative, arrays)


def _draw(random: np.random.Generator) -> tuple[Array, Array, Array, Array]:
    """Draw H, H+, H- that share some directions with falling weights, and tokens like those of H."""
    width, count, shared = int(random.integers(18, 27)), int(random.integers(20, 41)), 6
    directions = np.linalg.qr(random.normal(size=(width, shared)))[0].T
    weights = 2.0 * 0.7 ** np.arange(shared)
    means = random.normal(scale=0.3, size=(3, width))
    latent = random.normal(size=(count, shared))

    def observe(mean: Array, closeness: float) -> Array:
        mixed = closeness * latent + (1 - closeness) * random.normal(size=latent.shape)
        noise: Array = random.normal(scale=0.15, size=(count, width))
        return (mixed * weights) @ directions + noise + mean

    neutral, positive, negative = observe(means[0], 1.0), observe(means[1], 0.7), observe(means[2], 0.6)
    tokens = (random.normal(size=(int(random.integers(5, 9)), shared)) * weights) @ directions + means[0]
    return neutral, positive, negative, tokens + random.normal(scale=0.15, size=tokens.shape)


def _rank(values: Array, share: float) -> int | None:
    """Return the smallest k whose squared singular values reach a share, or None where rounding could change it."""
    reached = np.cumsum(values**2) / np.sum(values**2)
    k = int(np.argmax(reached >= share)) + 1
    gap = (values[k - 1] - values[k]) / values[0]
    return None if np.abs(reached - share).min() < LEAST_DISTANCE or gap < LEAST_GAP else k


def _identity(x: Array) -> Array:
    return x


def _identity_inverse(y: Array, _x: Array) -> Array:
    return y


def _bell(x: Array) -> Array:
    found: Array = np.exp(-(x**2) / 2)
    return found


def _bell_inverse(y: Array, x: Array) -> Array:
    found: Array = np.sign(x) * np.sqrt(-2 * np.log(np.clip(y, EPSILON, 1)))
    return found


def _tanh(x: Array) -> Array:
    found: Array = np.tanh(x)
    return found


def _tanh_inverse(y: Array, _x: Array) -> Array:
    found: Array = np.arctanh(np.clip(y, -1 + EPSILON, 1 - EPSILON))
    return found


def _elu(x: Array) -> Array:
    return np.where(x >= 0, x, np.exp(np.minimum(x, 0)) - 1)


def _elu_inverse(y: Array, _x: Array) -> Array:
    return np.where(y >= 0, y, np.log(1 + np.maximum(np.minimum(y, 0), -1 + EPSILON)))


FEATURE_MAPS: dict[str, tuple[Callable[[Array], Array], Callable[[Array, Array], Array]]] = {
    "identity": (_identity, _identity_inverse),
    "squared_exponential": (_bell, _bell_inverse),
    "tanh": (_tanh, _tanh_inverse),
    "elu": (_elu, _elu_inverse),
}
"""Phi and Phi^-1 by name; the inverse takes the sign from the unedited activation where Phi is even."""


def read_cases(folder: Path) -> Iterator[tuple[dict[str, Any], Path]]:
    """Yield the entry of each case of a folder, and the path of its arrays."""
    index = folder / "index.json"
    if index.is_file():
        for entry in json.loads(index.read_text(encoding="utf-8")):
            yield entry, folder / f"{entry['case']}.npz"


def write_cases(folder: Path) -> None:
    """Write all generated cases to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = [make_case(chosen) for chosen in settings()]
    for case in cases:
        np.savez(folder / f"{case.settings.case}.npz", **case.arrays)  # type: ignore[arg-type]
    records = [case.record() for case in cases]
    (folder / "index.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_cases(Path(sys.argv[1]))
