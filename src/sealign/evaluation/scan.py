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
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from sealign.demonstrations.demonstration import Demonstration
from sealign.evaluation.candidates import Candidate
from sealign.evaluation.layer_combinations import combinations
from sealign.evaluation.sensitivity import PlacedEdit, mean_log_probability_derivatives, sampled_score_derivatives
from sealign.evaluation.strength_choice import DamageTexts, growth
from sealign.fitting.checkpoints import BatchStore
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
        loss: Derivative of the mean loss on neutral text, in nats per token.
    """

    candidate: Candidate
    gain: float
    gain_error: float
    neutral: float
    domain: float
    loss: float

    @property
    def efficiency(self) -> float:
        """Efficiency g / sqrt(A) = gain / sqrt(2 KL), with the larger of both curvatures."""
        return self._per_root_curvature(self.gain)

    @property
    def efficiency_bound(self) -> float:
        """Lower end of the one-sided 95 % interval of the efficiency over demonstrations."""
        return self._per_root_curvature(self.gain - ONE_SIDED * self.gain_error)

    def strength_at(self, damage: float) -> float:
        """Return the strength at which the damage has a value, of its kinds the one that is larger.

        These are the divergence on neutral text and on own answers, and the increase of the loss on neutral text.

        Args:
            damage: Damage in nats per token.
        """
        curvatures = max(self.neutral, self.domain) / 2, self.neutral / 2
        return min(growth(damage, 0.0, curvatures[0]), growth(damage, self.loss, curvatures[1]))

    def gain_at(self, damage: float) -> float:
        """Return the lower end of the one-sided 95 % interval of the gain at the strength with a damage.

        Args:
            damage: Damage in nats per token.
        """
        gain = self.gain - ONE_SIDED * self.gain_error
        return gain * self.strength_at(damage) if math.isfinite(self.efficiency_bound) else -math.inf

    def _per_root_curvature(self, gain: float) -> float:
        curvature = max(self.neutral, self.domain)
        return gain / math.sqrt(curvature) if curvature > 0 and math.isfinite(curvature) else -math.inf


@dataclass(frozen=True)
class Sensitivities:
    """Derivatives with respect to the strengths of c candidates.

    Attributes:
        gains: Derivatives of the preference margin of each development demonstration, (n, c).
        neutral: Derivatives whose squares sum to the curvature of the divergence on neutral text, (k, c).
        domain: The same on own answers, (l, c); empty if there are none.
        losses: Derivatives of the mean loss on neutral text, (c,).
    """

    gains: Float[Tensor, "n c"]
    neutral: Float[Tensor, "k c"]
    domain: Float[Tensor, "l c"]
    losses: Float[Tensor, " c"]

    @classmethod
    def joined(cls, parts: Sequence[Sensitivities]) -> Sensitivities:
        """Return those of several parts of the candidates, one after the other."""
        tables = zip(*((part.gains, part.neutral, part.domain, part.losses) for part in parts), strict=True)
        return cls(*(torch.cat(list(own), dim=-1) for own in tables))

    def scanned(self, candidate: Candidate, members: Sequence[int], weights: Tensor) -> ScannedCandidate:
        """Return what they say of a candidate that combines some of the candidates.

        Args:
            candidate: The candidate.
            members: Indices of those that it combines.
            weights: Their weights.
        """
        gains, neutral, domain = (own[:, members] @ weights for own in (self.gains, self.neutral, self.domain))
        return ScannedCandidate(
            candidate=candidate,
            gain=float(gains.mean()),
            gain_error=float(gains.std() / math.sqrt(len(gains))),
            neutral=float(neutral.square().sum()),
            domain=float(domain.square().sum()),
            loss=float(self.losses[members] @ weights),
        )


def measure_sensitivities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    candidates: Sequence[Candidate],
    demonstrations: Sequence[Demonstration],
    texts: DamageTexts,
    *,
    prompt_format: PromptFormat = PromptFormat(),
    seed: int = 0,
    checkpoint_dir: str | Path | None = None,
    track: Track = no_progress,
) -> Sensitivities:
    """Return effect and damage of every candidate to first order.

    Args:
        model: The base model, without an edit; it must be differentiable.
        tokenizer: Tokenizer of the model.
        candidates: Fitted candidates.
        demonstrations: At least 2 demonstrations that the candidates were not fitted on.
        texts: Neutral text and own answers.
        prompt_format: How prompts are written.
        seed: Seed of the drawn tokens.
        checkpoint_dir: Folder for finished batches, from which an interrupted run continues; they stay there. Batches
            of other candidates, texts or weights are not used.
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

    hashes = [candidate.edit.hash for candidate in candidates]

    def open_store(kind: str, passages: Sequence[Passage]) -> AbstractContextManager[BatchStore]:
        depends_on = [kind, hashes, [[passage.ids, passage.start] for passage in passages], seed, SAMPLES]
        return BatchStore.open(checkpoint_dir, model, depends_on)

    def draws(passages: Sequence[Passage]) -> tuple[Float[Tensor, "k c"], Float[Tensor, " c"]]:
        """Return derivatives whose squares sum to the curvature, and that of the mean loss."""
        if not passages:
            none = torch.zeros(0, len(candidates), dtype=torch.float64)
            return none, none.sum(0)
        with open_store("draws", passages) as store:
            found, means = sampled_score_derivatives(
                model, tokenizer, passages, placed, sites, samples=SAMPLES, seed=seed, store=store, track=track
            )
        tokens = torch.tensor([passage.count for passage in passages], dtype=torch.float64)
        scale = math.sqrt(SAMPLES * float(tokens.sum()))
        return by_candidate(found) / scale, -(tokens / tokens.sum()) @ by_candidate(means)

    pairs = completion_passages(tokenizer, demonstrations, prompt_format=prompt_format)
    both = [passage for pair in pairs for passage in pair]
    with open_store("pairs", both) as store:
        slopes = by_candidate(
            mean_log_probability_derivatives(model, tokenizer, both, placed, sites, store=store, track=track)
        )
    (neutral, losses), (domain, _) = draws(texts.neutral), draws(texts.answers)
    return Sensitivities(slopes[0::2] - slopes[1::2], neutral, domain, losses)


def scanned_alone(candidates: Sequence[Candidate], sensitivities: Sensitivities) -> list[ScannedCandidate]:
    """Return effect and damage of every candidate to first order, in the given order and without combinations.

    Args:
        candidates: Fitted candidates.
        sensitivities: Their sensitivities.
    """
    one = torch.ones(1, dtype=torch.float64)
    return [sensitivities.scanned(candidate, [index], one) for index, candidate in enumerate(candidates)]


def rank_candidates(candidates: Sequence[Candidate], sensitivities: Sensitivities) -> list[ScannedCandidate]:
    """Return effect and damage of every candidate to first order, the most efficient first.

    Combinations of layers are added to the candidates; see ``layer_combinations``. The order is by the lower end of the
    interval of the efficiency, so that a candidate whose gain rests on a few demonstrations does not win by chance.

    Args:
        candidates: Fitted candidates.
        sensitivities: Their sensitivities.
    """
    found = scanned_alone(candidates, sensitivities)
    # The mean of both curvatures is a matrix, which their maximum is not.
    both = torch.cat([sensitivities.neutral, sensitivities.domain]) / math.sqrt(2)
    for each in combinations(candidates, sensitivities.gains, both):
        found.append(sensitivities.scanned(each.candidate, each.members, each.weights))
    return sorted(found, key=lambda each: each.efficiency_bound, reverse=True)


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
    """Return effect and damage of every candidate to first order, the most efficient first; see ``rank_candidates``.

    Args:
        model, tokenizer, candidates, demonstrations, texts, prompt_format, seed, track: As for
            ``measure_sensitivities``.
    """
    found = measure_sensitivities(
        model, tokenizer, candidates, demonstrations, texts, prompt_format=prompt_format, seed=seed, track=track
    )
    return rank_candidates(candidates, found)


def scan_csv(scanned: Sequence[ScannedCandidate]) -> str:
    """Return the scan as CSV: one row for each candidate, in the given order."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ["method", "site", "layers", "layer_weights", "token", "explained_variance", "gain", "gain_error"]
    writer.writerow([*names, "neutral", "domain", "loss", "efficiency", "efficiency_bound"])
    for each in scanned:
        config, edit = each.candidate.config, each.candidate.edit
        variance = getattr(config, "explained_variance", None)
        layers = " ".join(map(str, edit.layers))
        weights = " ".join(f"{float(weight):.6g}" for weight in config.layer_weights or ())
        figures = (
            each.gain,
            each.gain_error,
            each.neutral,
            each.domain,
            each.loss,
            each.efficiency,
            each.efficiency_bound,
        )
        writer.writerow(
            [edit.method, edit.site, layers, weights, config.token, variance, *(f"{value:.6g}" for value in figures)]
        )
    return text.getvalue()
