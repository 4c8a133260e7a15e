"""Compare ways to shift activations: efficiency of each, and how it divides its damage between texts.

At single layers of the embedded model, each variant is fitted on a part of a behaviour's demonstrations. Gain and
curvatures are measured on the rest, on neutral text and on the model's own answers, as in ``sealign tune``
(``sealign.evaluation.scan``): efficiency = gain / sqrt(2 KL) to first order, with the larger KL of both texts. The
script prints, for each site and variant, the mean efficiency over layers with its standard error over demonstrations,
the same in units of the mean difference, and the ratio of KL on neutral text to KL on own answers.

    OMP_NUM_THREADS=1 python benchmarks/directions.py [--behaviour bundled:positivity] [--data-dir DIR]
        [--layers 10,14,18] [--pairs 240] [--json FILE]

A behaviour takes about 5 minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import sealign
from sealign.demonstrations.bundled import ordinary_texts
from sealign.evaluation.sensitivity import PlacedEdit, mean_log_probability_derivatives, sampled_score_derivatives
from sealign.evaluation.strength_choice import DamageTexts
from sealign.fitting.token_activations import collect_token_activations
from sealign.methods.sea import fit_projection, projection_edit
from sealign.models.passages import completion_passages, text_passages
from sealign.models.sites import resolve_sites
from sealign.spectral.reading_direction import reading_direction

SITES = ("residual", "attention")
HOLDOUT, HELD = 0.35, 48  # the fraction that is held out, of which at most so many pairs are scored
SAMPLES = 2

Edit = Callable[[Tensor], Tensor]


def variants(neutral: Tensor, positive: Tensor, negative: Tensor, ordinary: Tensor) -> dict[str, Edit]:
    """Return every variant as a function of tokens, from H, H+, H- and the tokens of ordinary text, in float64."""
    h, plus, minus, text = (rows.double() for rows in (neutral, positive, negative, ordinary))
    difference, middle = (plus - minus).mean(0), (plus + minus) / 2
    width = h.shape[1]

    def constant(shift: Tensor) -> Edit:
        return lambda x: x + shift.float()

    def rank_one(read: Tensor, write: Tensor = difference) -> Edit:
        return lambda x: x + (x @ read.float())[:, :, None] * write.float()

    def without_sink(edit: Edit) -> Edit:
        """Leave out tokens whose norm is above 5 times the typical one: the first, on which attention rests."""

        def edited(x: Tensor) -> Tensor:
            norms = x.norm(dim=-1, keepdim=True)
            return torch.where(norms > 5 * norms.median(), x, edit(x))

        return edited

    def operator(left: Tensor, right: Tensor, rank: int, power: float = 1.0, about: Tensor | None = None) -> Edit:
        u, s, v = torch.linalg.svd(left.T @ right, full_matrices=False)
        reads = u[:, :rank].float()
        writes = ((s[:rank] / s[0]) ** power)[:, None].float() * v[:rank].float()
        center = 0 if about is None else about.float()
        return lambda x: x + (x - center) @ reads @ writes

    def sea(center: bool, shift: bool) -> Edit:
        projection = fit_projection(h, plus, minus, explained_variance=0.998, centered=center)
        edit = projection_edit(projection, difference=difference if shift else None)
        return lambda x: edit(x)

    deviations = text - text.mean(0)
    covariance = deviations.T @ deviations / len(text)
    covariance += 0.01 * covariance.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(covariance)
    whitened = vectors @ ((vectors.T @ difference) / values)
    half = vectors @ ((vectors.T @ difference) / values.sqrt())
    top = vectors[:, -64:]
    unit = (difference / difference.norm()).float()

    def rotation(x: Tensor) -> Tensor:
        """Arc towards the direction, to first order in its angle."""
        lengths = x.norm(dim=-1, keepdim=True)
        return x + lengths * unit - x * ((x @ unit)[:, :, None] / lengths)

    low, high = minus.sort(0).values, plus.sort(0).values
    low_mean, high_mean = low.mean(0), high.mean(0)
    slope = ((low - low_mean) * (high - high_mean)).sum(0) / (low - low_mean).square().sum(0)

    u, _, v = torch.linalg.svd(h.T @ (plus - minus), full_matrices=False)
    return {
        "mean difference": constant(difference),
        "scaled by the token's norm": lambda x: x + x.norm(dim=-1, keepdim=True) * difference.float(),
        "rotation on the sphere": rotation,
        "difference operator, rank 1": operator(h, plus - minus, 1),
        "difference operator, rank 1, first token left out": without_sink(operator(h, plus - minus, 1)),
        "difference operator, rank 2": operator(h, plus - minus, 2),
        "difference operator, rank 8": operator(h, plus - minus, 8),
        "difference operator, rank 8, equal weights": operator(h, plus - minus, 8, 0.0),
        "difference operator, rank 8, squared weights": operator(h, plus - minus, 8, 2.0),
        "difference operator, centred": operator(h - h.mean(0), plus - minus - difference, 1, 1.0, h.mean(0)),
        "difference operator, H the middle of H+ and H-": operator(middle, plus - minus, 1),
        "read U, write U": rank_one(u[:, 0], u[:, 0]),
        "read V, write V": rank_one(v[0], v[0]),
        "write V, constant": constant(v[0] * torch.sign(v[0] @ difference)),
        "read mean of H, write mean difference": rank_one(h.mean(0)),
        "targeted shift": rank_one(reading_direction(torch.cat([plus, minus]), text)),
        "SEA": sea(False, False),
        "SEA, centred": sea(True, False),
        "SEA, centred, with shift": sea(True, True),
        "whitened, S^-1": constant(whitened),
        "whitened, S^-1/2": constant(half),
        "null space of text, top 64 left out": constant(difference - top @ (top.T @ difference)),
        "oblique, read S^-1 v": rank_one(whitened),
        "linear transport per neuron": lambda x: x * slope.float() + (high_mean - slope * low_mean).float(),
    }


def measure(behaviour: str, data_dir: str | None, layers: list[int], pairs: int | None) -> dict[str, dict[str, Any]]:
    """Return, by site and variant, the efficiency of each held-out pair and the curvatures, each by layer."""
    model, tokenizer = sealign.load_model("smollm2")
    demonstrations = sealign.load_demonstrations(behaviour, data_dir=data_dir, limit=pairs)
    fitted, held = sealign.split_demonstrations(demonstrations, holdout=HOLDOUT)
    held = held[:HELD]
    texts = DamageTexts.of(model, tokenizer, held)
    sites = {site: resolve_sites(model, site, layers) for site in SITES}
    config = sealign.CollectConfig(token="completion")
    names: list[tuple[str, str]] = []
    placed = []
    for site in SITES:
        rows = sealign.collect_activations(model, tokenizer, fitted, site=site, layers=layers, config=config)
        text = collect_token_activations(model, tokenizer, text_passages(tokenizer, ordinary_texts()), sites[site])
        for layer in layers:
            for name, edit in variants(*rows.rows(layer), text[layer]).items():
                names.append((site, name))
                placed.append(PlacedEdit(site, layer, edit))  # type: ignore[arg-type]
    both = [passage for pair in completion_passages(tokenizer, held) for passage in pair]
    slopes = mean_log_probability_derivatives(model, tokenizer, both, placed, sites)
    curvatures = []
    for passages in (texts.neutral, texts.answers):
        draws, _ = sampled_score_derivatives(model, tokenizer, passages, placed, sites, samples=SAMPLES)
        curvatures.append(draws.square().sum(0) / (SAMPLES * sum(passage.count for passage in passages)))
    neutral, domain = curvatures
    efficiencies = (slopes[0::2] - slopes[1::2]) / torch.maximum(neutral, domain).sqrt()
    found: dict[str, dict[str, Any]] = {site: {} for site in SITES}
    for site, name in dict.fromkeys(names):
        own = [index for index, named in enumerate(names) if named == (site, name)]
        found[site][name] = {
            "pairs": efficiencies[:, own].mean(1).tolist(),
            "layers": efficiencies[:, own].mean(0).tolist(),
            "neutral to domain": float((neutral[own] / domain[own]).log().mean().exp()),
        }
    return found


def summarise(rows: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return mean, standard error, ratio to the mean difference and its t value, by variant."""
    base = torch.tensor(rows["mean difference"]["pairs"], dtype=torch.float64)
    found = {}
    for name, row in rows.items():
        own = torch.tensor(row["pairs"], dtype=torch.float64)
        more = own - base
        error = float(more.std()) / math.sqrt(len(more))
        found[name] = {
            "efficiency": float(own.mean()),
            "error": float(own.std()) / math.sqrt(len(own)),
            "ratio": float(own.mean() / base.mean()),
            "t": float(more.mean()) / error if error else 0.0,
            "neutral to domain": row["neutral to domain"],
        }
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--behaviour", default="bundled:positivity")
    parser.add_argument("--data-dir")
    parser.add_argument("--layers", default="10,14,18")
    parser.add_argument("--pairs", type=int, help="number of demonstrations; default: all")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    layers = [int(layer) for layer in options.layers.split(",")]
    found = measure(options.behaviour, options.data_dir, layers, options.pairs)
    summaries = {site: summarise(rows) for site, rows in found.items()}
    for site, rows in summaries.items():
        table = Table("variant", "efficiency", "to mean difference", "t", "KL neutral / own answers", title=site)
        for name, row in rows.items():
            table.add_row(
                name,
                f"{row['efficiency']:.3f} +- {row['error']:.3f}",
                f"{row['ratio']:.2f}",
                f"{row['t']:.1f}",
                f"{row['neutral to domain']:.3g}",
            )
        Console().print(table)
    if options.json:
        record = {"behaviour": options.behaviour, "layers": layers, "pairs": options.pairs, "found": found}
        options.json.write_text(json.dumps(record | {"summaries": summaries}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
