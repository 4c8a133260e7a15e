"""Scan: the effect and the damage of many candidates to first order, from a few backward passes for all of them.

For a small strength s, the preference margin changes by s g, and the divergence from the base model is s^2 A / 2 nats
per token. Their ratio, the efficiency g / sqrt(A) = gain / sqrt(2 KL), does not depend on s; it ranks the candidates,
and s = sqrt(2 KL / A) is the strength for a given divergence.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from sealign.demonstrations.demonstration import Demonstration
from sealign.evaluation.candidates import Candidate
from sealign.evaluation.layer_combinations import combinations
from sealign.evaluation.sensitivity import PlacedEdit, mean_log_probability_derivatives, sampled_score_derivatives
from sealign.evaluation.strength_choice import DamageTexts
from sealign.models.passages import Passage, completion_passages
from sealign.models.prompt_format import PromptFormat
from sealign.models.sites import resolve_sites
from sealign.progress import Track, no_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLES = 2
"""Number of draws for each passage; more make the divergence more precise."""

ONE_SIDED = 1.645
"""Standard errors below the mean at which the one-sided 95 % interval of a normal variable ends."""


@dataclass(frozen=True, kw_only=True)
class ScannedCandidate:
    """What the scan found for a candidate.

    Attributes:
        candidate: The candidate.
        gain: Derivative g of the mean preference margin with respect to the strength, in nats per token.
        gain_error: Standard error of ``gain`` over demonstrations.
        neutral: Curvature A of the divergence on neutral text, in nats per token.
        domain: Curvature on the base model's own answers; 0 if there are none.
    """

    candidate: Candidate
    gain: float
    gain_error: float
    neutral: float
    domain: float

    @property
    def efficiency(self) -> float:
        """Efficiency g / sqrt(A) = gain / sqrt(2 KL), with the larger of both curvatures."""
        return self._per_root_curvature(self.gain)

    @property
    def efficiency_bound(self) -> float:
        """Lower end of the one-sided 95 % interval of the efficiency over demonstrations."""
        return self._per_root_curvature(self.gain - ONE_SIDED * self.gain_error)

    def strength_at(self, divergence: float) -> float:
        """Return the strength at which the divergence has a value, on the text where it is larger.

        Args:
            divergence: Mean KL(base || edited), in nats per token.
        """
        return math.sqrt(2 * divergence / max(self.neutral, self.domain))

    def _per_root_curvature(self, gain: float) -> float:
        curvature = max(self.neutral, self.domain)
        return gain / math.sqrt(curvature) if curvature > 0 and math.isfinite(curvature) else -math.inf


def scan(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    candidates: Sequence[Candidate],
    demonstrations: Sequence[Demonstration],
    texts: DamageTexts,
    *,
    prompt_format: PromptFormat = PromptFormat(),
    seed: int = 0,
    track: Track = no_progress,
) -> list[ScannedCandidate]:
    """Return effect and damage of every candidate to first order, the most efficient first.

    Combinations of layers are added to the candidates; see ``layer_combinations``. The order is by the lower end of the
    interval of the efficiency, so that a candidate whose gain rests on a few demonstrations does not win by chance.

    Args:
        model: The base model, without an edit; it must be differentiable.
        tokenizer: Tokenizer of the model.
        candidates: Fitted candidates.
        demonstrations: At least 2 demonstrations that the candidates were not fitted on.
        texts: Neutral text and own answers.
        prompt_format: How prompts are written.
        seed: Seed of the drawn tokens.
        track: Wrapper for iterables that displays progress; see ``sealign.progress.Track``.
    """
    placed = [
        PlacedEdit(candidate.edit.site, layer, own)
        for candidate in candidates
        for layer, own in candidate.edit.layer_edits.items()
    ]
    sites: dict[str, Any] = {
        site: resolve_sites(model, site, sorted({each.layer for each in placed if each.site == site}))
        for site in sorted({each.site for each in placed})
    }
    # An edit of several layers changes a log-probability, to first order, by the sum of what its layers change.
    counts = [len(candidate.edit.layer_edits) for candidate in candidates]
    owner = torch.arange(len(candidates)).repeat_interleave(torch.tensor(counts))

    def by_candidate(found: Float[Tensor, "n m"]) -> Float[Tensor, "n c"]:
        return torch.zeros(len(found), len(candidates), dtype=found.dtype).index_add_(1, owner, found)

    pairs = completion_passages(tokenizer, demonstrations, prompt_format=prompt_format)
    both = [passage for pair in pairs for passage in pair]
    slopes = by_candidate(mean_log_probability_derivatives(model, tokenizer, both, placed, sites, track=track))
    gains = slopes[0::2] - slopes[1::2]

    def draws(passages: Sequence[Passage]) -> Float[Tensor, "k c"]:
        """Return derivatives whose squares sum to the curvature."""
        if not passages:
            return torch.zeros(0, len(candidates), dtype=torch.float64)
        found = sampled_score_derivatives(
            model, tokenizer, passages, placed, sites, samples=SAMPLES, seed=seed, track=track
        )
        return by_candidate(found) / math.sqrt(SAMPLES * sum(passage.count for passage in passages))

    neutral, domain = draws(texts.neutral), draws(texts.answers)
    found = [
        _scanned(candidate, *(table[:, index] for table in (gains, neutral, domain)))
        for index, candidate in enumerate(candidates)
    ]
    # The mean of both curvatures is a matrix, which their maximum is not.
    for each in combinations(candidates, gains, torch.cat([neutral, domain]) / math.sqrt(2)):
        tables = (table[:, each.members] @ each.weights for table in (gains, neutral, domain))
        found.append(_scanned(each.candidate, *tables))
    return sorted(found, key=lambda each: each.efficiency_bound, reverse=True)


def _scanned(
    candidate: Candidate, gains: Float[Tensor, " n"], neutral: Float[Tensor, " k"], domain: Float[Tensor, " l"]
) -> ScannedCandidate:
    """Return what was found for a candidate, from its derivatives."""
    return ScannedCandidate(
        candidate=candidate,
        gain=float(gains.mean()),
        gain_error=float(gains.std() / math.sqrt(len(gains))),
        neutral=float(neutral.square().sum()),
        domain=float(domain.square().sum()),
    )


def scan_csv(scanned: Sequence[ScannedCandidate]) -> str:
    """Return the scan as CSV: one row for each candidate, in the given order."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ["method", "site", "layers", "layer_weights", "token", "explained_variance", "gain", "gain_error"]
    writer.writerow([*names, "neutral", "domain", "efficiency", "efficiency_bound"])
    for each in scanned:
        config, edit = each.candidate.config, each.candidate.edit
        variance = getattr(config, "explained_variance", None)
        layers = " ".join(map(str, edit.layers))
        weights = " ".join(f"{float(weight):.6g}" for weight in config.layer_weights or ())
        figures = (each.gain, each.gain_error, each.neutral, each.domain, each.efficiency, each.efficiency_bound)
        writer.writerow(
            [edit.method, edit.site, layers, weights, config.token, variance, *(f"{value:.6g}" for value in figures)]
        )
    return text.getvalue()
