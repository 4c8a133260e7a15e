"""The figures of Qiu et al. 2024 (arXiv 2405.09719), for any model."""

from __future__ import annotations

import dataclasses
import random

from sealign import figures
from sealign.errors import DemonstrationError
from sealign.evaluation.results import BASE
from sealign.fitting.activations import Activations
from sealign.models.structure import text_config, unwrap_model
from sealign.reproduce.paper_tables import LINEAR, LINEAR_FAIR, MC
from sealign.reproduce.reproduce_config import FAIRNESS, TRUTHFULNESS
from sealign.reproduce.saved_activations import select_rows
from sealign.reproduce.target_page import Drawing
from sealign.reproduce.workbench import Workbench

COUNTS = (25, 50, 100, 250, 500, 1000, 2000)
"""Numbers of demonstrations on the curve, as far as the source has as many."""

SEEDS = (0, 1, 2)
"""Seeds of the draws of demonstrations, for each number."""

SHOWN = 200
"""Maximum number of demonstrations in figures of activations; more points would hide one another."""


def data(bench: Workbench) -> Drawing:
    """Return the curve of the score over the number of demonstrations.

    Raises:
        DemonstrationError: The source has fewer demonstrations than the second number of the curve.
    """
    bench.model()
    most = len(bench.demonstrations(TRUTHFULNESS))
    counts = [count for count in COUNTS if count <= most]
    if len(counts) < 2:
        raise DemonstrationError(
            f"{TRUTHFULNESS} has {most} demonstrations, but a curve needs at least {COUNTS[1]}; use more"
        )
    scores: list[list[float]] = []
    base = float("nan")
    for count in counts:
        # There is only one way to draw all demonstrations.
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
        [f"demonstrations of {TRUTHFULNESS}, drawn with seeds {', '.join(map(str, SEEDS))}; all of them in one run"],
    )


def tsne(bench: Workbench) -> Drawing:
    """Return the t-SNE of positives and negatives at the first, middle and last layer."""
    bench.model()
    activations = _shown(bench, TRUTHFULNESS)
    points = figures.tsne_points(activations, seed=bench.config.seed)
    title = "Activations of positives and negatives, by t-SNE"
    note = f"MLP outputs at the last token, {_count(activations)} demonstrations of {TRUTHFULNESS}"
    return Drawing("figure-tsne", title, figures.plane(points, "tsne"), points, [note])


def edit(bench: Workbench) -> Drawing:
    """Return neutral activations before and after a non-linear edit."""
    bench.model()
    fitted = bench.edit(FAIRNESS, LINEAR_FAIR.replace(feature_map="squared_exponential"))
    before = _shown(bench, FAIRNESS)
    after = dataclasses.replace(before, neutral=fitted.apply_to(before.neutral))
    points = figures.effect_points(before, after, fitted.layers, seed=bench.config.seed)
    title = "Effect of a non-linear edit on activations"
    note = f"squared exponential, fitted from {fitted.record.demonstrations_count} demonstrations of {FAIRNESS}"
    return Drawing("figure-edit", title, figures.plane(points, "pca"), points, [note])


def signature(bench: Workbench) -> Drawing:
    """Return the signature of each layer of several models, for both behaviours."""
    signatures: dict[str, dict[int, float]] = {}
    depths: dict[str, int] = {}
    for name in (bench.config.model, *bench.config.models):
        model, _ = bench.model(name)
        for source in (TRUTHFULNESS, FAIRNESS):
            label = f"{name}, {source}"
            signatures[label] = figures.activation_signatures(_shown(bench, source))
            depths[label] = text_config(unwrap_model(model)).num_hidden_layers
    return Drawing(
        "figure-signature",
        "Signature of each layer",
        figures.signature(signatures, depths=depths),
        figures.signature_points(signatures, depths=depths),
        [f"MLP outputs at the last token, at most {SHOWN} demonstrations of each source"],
    )


def spectrum(bench: Workbench) -> Drawing:
    """Return the singular values of the cross-covariances of each layer."""
    bench.model()
    activations = _shown(bench, TRUTHFULNESS)
    spectra = figures.activation_spectra(activations)
    note = f"not centred; {_count(activations)} demonstrations of {TRUTHFULNESS}"
    title = "Singular values of the cross-covariances"
    return Drawing("figure-spectrum", title, figures.spectrum(spectra), figures.spectrum_points(spectra), [note])


def _shown(bench: Workbench, source: str) -> Activations:
    """Return the activations of the first demonstrations of a source."""
    found = bench.activations(source, LINEAR.collect_config())
    return select_rows(found, range(min(SHOWN, _count(found))))


def _count(activations: Activations) -> int:
    return len(next(iter(activations.neutral.values())))
