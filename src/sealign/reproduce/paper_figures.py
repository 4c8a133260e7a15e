"""The figures of Qiu et al. 2024 (arXiv 2405.09719), for any model."""

from __future__ import annotations

import dataclasses
import random

from sealign import figures
from sealign.errors import DemonstrationError
from sealign.evaluation.results import BASE
from sealign.fitting.activations import Activations
from sealign.methods.sea import layer_signatures
from sealign.models.structure import text_config, unwrap_model
from sealign.reproduce.paper_tables import LINEAR, LINEAR_FAIR, MC
from sealign.reproduce.target_page import Drawing
from sealign.reproduce.workbench import FAIRNESS, TRUTHFULNESS, Workbench, rows_of

COUNTS = (25, 50, 100, 250, 500, 1000, 2000)
"""Demonstrations on the curve; those that the source has."""

SEEDS = (0, 1, 2)
"""Of the draws of demonstrations at each count."""

SHOWN = 200
"""Demonstrations in the figures of activations: more hide one another."""


def data(bench: Workbench) -> Drawing:
    """Return the score against the number of demonstrations, over draws.

    Raises:
        DemonstrationError: the source has fewer than two of the counts.
    """
    bench.model()
    most = len(bench.demonstrations(TRUTHFULNESS))
    counts = [count for count in COUNTS if count <= most]
    if len(counts) < 2:
        raise DemonstrationError(f"{TRUTHFULNESS} has {most} demonstrations, but a curve needs at least {COUNTS[1]}")
    scores: list[list[float]] = []
    base = float("nan")
    for count in counts:
        # All demonstrations there are can be drawn in one way only.
        seeds = SEEDS if count < most else SEEDS[:1]
        edits = {
            f"seed {seed}": bench.edit({TRUTHFULNESS: random.Random(seed).sample(range(most), count)}, LINEAR)
            for seed in seeds
        }
        metric = bench.evaluate(edits, MC[1:]).tasks[MC[1]].metrics["mc2"]
        scores.append([100 * metric.value(name) for name in edits])
        base = 100 * metric.value(BASE)
    title = "TruthfulQA MC2 against the number of demonstrations"
    return Drawing(
        "figure-data",
        title,
        figures.score_by_demonstrations(counts, scores, base=base, metric="MC2 (%)"),
        figures.score_points(counts, scores, base=base),
        [f"draws of {TRUTHFULNESS} with seeds {', '.join(map(str, SEEDS))}; all of them at once in one draw"],
    )


def tsne(bench: Workbench) -> Drawing:
    """Return activations of positives and negatives at the first, middle and last layer."""
    bench.model()
    activations = _shown(bench, TRUTHFULNESS)
    points = figures.tsne_points(activations, seed=bench.config.seed)
    title = "Activations of positives and negatives, by t-SNE"
    note = f"MLP outputs at the last token, {_count(activations)} demonstrations of {TRUTHFULNESS}"
    return Drawing("figure-tsne", title, figures.plane(points, "tsne"), points, [note])


def edit(bench: Workbench) -> Drawing:
    """Return activations before and after a non-linear edit."""
    bench.model()
    fitted = bench.edit(FAIRNESS, dataclasses.replace(LINEAR_FAIR, feature_map="squared_exponential"))
    before = _shown(bench, FAIRNESS)
    settings = fitted.settings
    neutral = {
        layer: projection(
            before.neutral[layer],
            combine=settings.combine,  # type: ignore[arg-type]
            normalization=settings.normalization,  # type: ignore[arg-type]
            strength=settings.strength,
        )
        for layer, projection in fitted.projections.items()
    }
    after = dataclasses.replace(before, neutral=neutral)
    points = figures.effect_points(before, after, fitted.layers, seed=bench.config.seed)
    title = "What a non-linear edit does to activations"
    note = f"squared exponential, learnt from {fitted.record.demonstrations_count} demonstrations of {FAIRNESS}"
    return Drawing("figure-edit", title, figures.plane(points, "pca"), points, [note])


def signature(bench: Workbench) -> Drawing:
    """Return the signature of every layer of several models, for both behaviours."""
    signatures: dict[str, dict[int, float]] = {}
    depths: dict[str, int] = {}
    for name in (bench.config.model, *bench.config.models):
        model, _ = bench.model(name)
        for source in (TRUTHFULNESS, FAIRNESS):
            label = f"{name}, {source}"
            signatures[label] = layer_signatures(_shown(bench, source))
            depths[label] = text_config(unwrap_model(model)).num_hidden_layers
    return Drawing(
        "figure-signature",
        "Signature of each layer",
        figures.signature(signatures, depths=depths),
        figures.signature_points(signatures, depths=depths),
        [f"MLP outputs at the last token, at most {SHOWN} demonstrations of each source"],
    )


def spectrum(bench: Workbench) -> Drawing:
    """Return the singular values of the cross-covariances, by layer and index."""
    bench.model()
    activations = _shown(bench, TRUTHFULNESS)
    spectra = figures.activation_spectra(activations)
    note = f"not centred; {_count(activations)} demonstrations of {TRUTHFULNESS}"
    title = "Singular values of the cross-covariances"
    return Drawing("figure-spectrum", title, figures.spectrum(spectra), figures.spectrum_points(spectra), [note])


def _shown(bench: Workbench, source: str) -> Activations:
    """The activations of the first demonstrations of a source."""
    found = bench.activations(source, LINEAR.collect_config())
    return rows_of(found, range(min(SHOWN, _count(found))))


def _count(activations: Activations) -> int:
    return len(next(iter(activations.neutral.values())))
