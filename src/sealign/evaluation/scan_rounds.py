"""Rounds of a scan: layers in an order that is useful wherever a time limit stops it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sealign.demonstrations.demonstration import Demonstration
from sealign.errors import SettingError
from sealign.evaluation.candidates import Candidate, fit_candidates
from sealign.evaluation.scan import (
    ScannedCandidate,
    Sensitivities,
    measure_sensitivities,
    rank_candidates,
    scanned_alone,
)
from sealign.evaluation.strength_choice import DamageTexts
from sealign.evaluation.time_limit import TimeLimit
from sealign.fitting.activations import Activations
from sealign.fitting.collect_config import TokenChoice
from sealign.fitting.edit_config import EditConfig
from sealign.models.prompt_format import PromptFormat
from sealign.progress import Track, no_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OnRound = Callable[[list[ScannedCandidate]], None]
"""Function that is called with the candidates of each round when the round has been scanned."""


def ignore_round(scanned: list[ScannedCandidate]) -> None:
    """Do nothing with the candidates of a round."""


def scan_rounds(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rounds: Sequence[Sequence[EditConfig]],
    collected: Mapping[tuple[str, TokenChoice], Activations],
    fitted: Sequence[Demonstration],
    development: Sequence[Demonstration],
    texts: DamageTexts,
    *,
    limit: TimeLimit,
    rest: float,
    deployable: bool = False,
    prompt_format: PromptFormat = PromptFormat(),
    seed: int = 0,
    checkpoint_dir: str | Path | None = None,
    on_round: OnRound = ignore_round,
    track: Track = no_progress,
) -> tuple[list[ScannedCandidate], list[int]]:
    """Fit and scan the candidates of one round after the other; return what was found, and the layers left out.

    A round is left out, with those after it, if it would not leave enough time for the rest of the search. It is
    expected to take as long as the one before, or longer in the measure in which it has more layers.

    Args:
        model: The base model; it must be differentiable.
        tokenizer: Tokenizer of the model.
        rounds: Configurations of the candidate families of each round, all with the layers of the round.
        collected: Activations of all layers; see ``collect_for_candidates``.
        fitted: Demonstrations to fit on.
        development: Demonstrations to scan on.
        texts: Neutral text and own answers.
        limit: The time limit.
        rest: Seconds that the rest of the search takes.
        deployable: Whether only candidates that are exactly a LoRA are scanned.
        on_round: Function of the candidates of each round; they come without combinations of layers.
        prompt_format, seed, checkpoint_dir, track: As for ``measure_sensitivities``.

    Raises:
        SettingError: No candidate is left.
    """
    candidates: list[Candidate] = []
    parts: list[Sensitivities] = []
    took, before = 0.0, 1
    left_out: list[int] = []
    for number, configs in enumerate(rounds):
        count = len(configs[0].layers)
        if number and took * max(1.0, count / before) + rest > limit.left:
            left_out = sorted({int(layer) for later in rounds[number:] for layer in later[0].layers})
            break
        started = time.perf_counter()
        found = fit_candidates(model, tokenizer, fitted, configs, collected, track=track)
        found = [each for each in found if each.is_lora or not deployable]
        if found:
            candidates += found
            parts.append(
                measure_sensitivities(
                    model,
                    tokenizer,
                    found,
                    development,
                    texts,
                    prompt_format=prompt_format,
                    seed=seed,
                    checkpoint_dir=checkpoint_dir,
                    track=track,
                )
            )
            on_round(scanned_alone(found, parts[-1]))
        took, before = time.perf_counter() - started, count
    if not candidates:
        raise SettingError("no candidate is left; search more methods or sites, or without deployable")
    return rank_candidates(candidates, Sensitivities.joined(parts)), left_out
