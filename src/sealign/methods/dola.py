"""DoLa: the final layer contrasted with an earlier one, chosen token by token."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sealign.errors import SettingError, unknown_name
from sealign.methods.contrast import check_plausibility, contrast, jensen_shannon
from sealign.methods.method import Attached, FitContext, Method
from sealign.models.sites import resolve_sites
from sealign.models.structure import text_config, unwrap_model

Bucket = Literal["high", "low"]


@dataclass(frozen=True, kw_only=True)
class DoLaConfig:
    """Settings of DoLa.

    Attributes:
        bucket: which layers may be the premature one: ``high``, every second of the upper half, as the paper takes for
            TruthfulQA, or ``low``, every second of the lower half.
        plausibility: alpha in [0, 1]; a token is plausible at alpha times the most probable one.

    Raises:
        SettingError: a value is unknown or out of range.

    Example:
        >>> DoLaConfig().bucket
        'high'
    """

    bucket: Bucket = "high"
    plausibility: float = 0.1

    def __post_init__(self) -> None:
        if self.bucket not in ("high", "low"):
            raise SettingError(unknown_name("bucket", self.bucket, ("high", "low")))
        check_plausibility(self.plausibility)


@dataclass(frozen=True, eq=False)
class DoLa(Method):
    """Decoding by contrasting layers.

    F = log q_N - log q_M on the plausible tokens, with q_j = softmax(head(h_j)) and M the candidate layer whose q_M
    has the largest Jensen-Shannon divergence from q_N, chosen at every token (Chuang et al. 2024, arXiv 2309.03883,
    section 2). As in the authors' code the head reads the candidates' hidden states without the final norm. Their code
    scores with a divergence taken the other way round and normalises over implausible tokens too; here both are as in
    the paper. h_0 is the embedding, left out where it is tied to the head: it predicts the token just read.
    """

    name: ClassVar[str] = "dola"

    @classmethod
    def needs_demonstrations(cls, config: Any) -> bool:
        """It learns nothing."""
        return False

    @classmethod
    def learn(cls, lesson: FitContext, config: DoLaConfig) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Name the candidate layers; nothing is learnt."""
        return {"candidates": candidate_layers(lesson.model, config.bucket)}, {}

    def put_on(self, model: Any, attached: Attached) -> None:
        """Replace the model's logits by the contrast."""
        base = unwrap_model(model)
        states: dict[int, Tensor] = {}
        candidates: list[int] = self.settings["candidates"]
        embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
        sites = resolve_sites(base, "residual", [index - 1 for index in candidates if index > 0])
        modules: dict[int, nn.Module] = {0: embedding} if 0 in candidates else {}
        modules |= {site.layer + 1: site.module for site in sites}
        for index, module in modules.items():
            attached.stack.callback(module.register_forward_hook(_keep(states, index, attached)).remove)
        plausibility = float(self.settings["plausibility"])

        def hook(_module: nn.Module, _args: Any, kwargs: Any, output: Any) -> Any:
            if not attached.enabled or output.logits is None:
                return None
            final = output.logits
            kept = _kept_positions(kwargs.get("logits_to_keep", 0))
            premature = farthest(final, (head(states[index][:, kept]) for index in candidates))
            output.logits = contrast(final, premature, plausibility=plausibility).to(final.dtype)
            states.clear()
            return output

        attached.stack.callback(base.register_forward_hook(hook, with_kwargs=True).remove)


def candidate_layers(model: Any, bucket: Bucket) -> list[int]:
    """Return which hidden states may be contrasted, 0 being the embedding and N the final layer, never itself one.

    The high bucket is every second of [N/2, N), the low one every second of [0, N/2), or of [2, N/2) where the
    embedding is the head.
    """
    config = text_config(unwrap_model(model))
    depth, half = config.num_hidden_layers, config.num_hidden_layers // 2
    first = 2 if getattr(config, "tie_word_embeddings", False) and half > 2 else 0
    return list(range(half, depth, 2)) if bucket == "high" else list(range(first, half, 2))


def farthest(final: Tensor, candidates: Iterable[Tensor]) -> Tensor:
    """Return, position by position, the logits that are farthest from the final ones by Jensen-Shannon divergence."""
    chosen = final
    largest = torch.full(final.shape[:-1], -1.0, device=final.device)
    for logits in candidates:
        divergence = jensen_shannon(final, logits)
        better = divergence > largest
        chosen = torch.where(better[..., None], logits.to(chosen.dtype), chosen)
        largest = torch.where(better, divergence, largest)
    return chosen


def _keep(states: dict[int, Tensor], index: int, attached: Attached) -> Any:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if attached.enabled:
            states[index] = output[0] if isinstance(output, tuple) else output

    return hook


def _kept_positions(logits_to_keep: Any) -> Any:
    """What transformers indexes hidden states with before its head."""
    return slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
