"""DoLa: contrast the final layer with an earlier layer that is chosen for each token."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sealign.configuration import Config
from sealign.edits.handle import EditHandle
from sealign.methods.contrast import Plausibility, contrast, jensen_shannon
from sealign.methods.method import FitContext, Method, RecordedIntervention, without_demonstrations
from sealign.models.sites import resolve_sites
from sealign.models.structure import text_config, unwrap_model

Bucket = Literal["high", "low"]


class DoLaConfig(Config):
    """Settings of DoLa.

    Attributes:
        bucket: Layers to contrast with: ``high`` (every second layer of the upper half; used for TruthfulQA in the
            paper) or ``low`` (every second layer of the lower half).
        plausibility: Threshold in [0, 1]: a token is plausible if its probability is at least this fraction of the
            highest probability.

    Raises:
        SettingError: A value is unknown or out of range.

    Example:
        >>> DoLaConfig().bucket
        'high'
    """

    bucket: Bucket = "high"
    plausibility: Plausibility = 0.1


class LayerContrast(RecordedIntervention):
    """Decoding by contrasting layers.

    F = log q_N - log q_M on the plausible tokens, with q_j = softmax(head(h_j)) and M the candidate layer whose q_M
    has the largest Jensen-Shannon divergence from q_N, chosen for each token (Chuang et al. 2024, arXiv 2309.03883,
    section 2). As in the authors' code, the head reads the candidates' hidden states without the final norm. Their code
    swaps the distributions in the divergence and normalises over implausible tokens too; this follows the paper in
    both. h_0 is the embedding; it is left out if it is tied to the head, since it then predicts the token just read.
    """

    def install(self, model: Any, handle: EditHandle) -> None:
        """Replace the model's logits by the contrast of two layers."""
        base = unwrap_model(model)
        states: dict[int, Tensor] = {}
        candidates: list[int] = self.settings["candidates"]
        embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
        sites = resolve_sites(base, "residual", [index - 1 for index in candidates if index > 0])
        modules: dict[int, nn.Module] = {0: embedding} if 0 in candidates else {}
        modules |= {site.layer + 1: site.module for site in sites}
        for index, module in modules.items():
            handle.add_hook(module, _keep(states, index, handle))
        plausibility = float(self.settings["plausibility"])

        def hook(_module: nn.Module, _args: Any, kwargs: Any, output: Any) -> Any:
            if not handle.enabled or output.logits is None:
                return None
            final = output.logits
            kept = _kept_positions(kwargs.get("logits_to_keep", 0))
            premature = farthest(final, (head(states[index][:, kept]) for index in candidates))
            output.logits = contrast(final, premature, plausibility=plausibility).to(final.dtype)
            states.clear()
            return output

        handle.add_hook(base, hook, with_kwargs=True)


def _fit(context: FitContext, config: DoLaConfig) -> LayerContrast:
    learned = {"candidates": candidate_layers(context.model, config.bucket)}
    return LayerContrast.build(without_demonstrations(context), DOLA.name, config, learned=learned)


def candidate_layers(model: Any, bucket: Bucket) -> list[int]:
    """Return the indices of the hidden states that may be contrasted; 0 is the embedding and N the final layer.

    The high bucket is every second index of [N/2, N), the low one every second index of [0, N/2), or of [2, N/2) if the
    embedding is tied to the head.

    Args:
        model: The model.
        bucket: ``high`` or ``low``.
    """
    config = text_config(unwrap_model(model))
    depth, half = config.num_hidden_layers, config.num_hidden_layers // 2
    first = 2 if getattr(config, "tie_word_embeddings", False) and half > 2 else 0
    return list(range(half, depth, 2)) if bucket == "high" else list(range(first, half, 2))


def farthest(final: Tensor, candidates: Iterable[Tensor]) -> Tensor:
    """Return, for each position, the candidate logits with the largest Jensen-Shannon divergence from the final ones.

    Args:
        final: Logits of the final layer, (..., v).
        candidates: Logits of each candidate layer, (..., v).
    """
    chosen = final
    largest = torch.full(final.shape[:-1], -1.0, device=final.device)
    for logits in candidates:
        divergence = jensen_shannon(final, logits)
        better = divergence > largest
        chosen = torch.where(better[..., None], logits.to(chosen.dtype), chosen)
        largest = torch.where(better, divergence, largest)
    return chosen


def _keep(states: dict[int, Tensor], index: int, handle: EditHandle) -> Any:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if handle.enabled:
            states[index] = output[0] if isinstance(output, tuple) else output

    return hook


def _kept_positions(logits_to_keep: Any) -> Any:
    """Return the index by which transformers selects the hidden states that its head reads."""
    return slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep


DOLA = Method("dola", DoLaConfig, LayerContrast, _fit, needs_demonstrations=lambda _: False)
"""Decoding by contrasting layers (Chuang et al. 2024, arXiv 2309.03883)."""
