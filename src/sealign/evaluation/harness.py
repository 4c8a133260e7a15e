"""An edited model as a model of lm-evaluation-harness, with packed scoring and results that survive a crash.

Usable from the harness's own entry points: ``simple_evaluate(model=SealignLM(...))`` from Python, and on its command
line as

    python -m sealign.evaluation.harness --model sealign --model_args pretrained=smollm2,edit=FOLDER --tasks ...
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval.models  # noqa: F401  the registry loads its own models only while it is empty
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from sealign.edits.attach import EditHandle
from sealign.edits.edit import Edit
from sealign.errors import SettingError
from sealign.evaluation.journal import Journal
from sealign.evaluation.scoring import ChoiceRequest, ChoiceScore, layer_kinds, score_choices, supports_packing
from sealign.methods.method import Attached, Method
from sealign.methods.registry import Change, attach_change, load_change, parts_of, prefix_of
from sealign.models.loading import load_model
from sealign.models.shared_prefix import share_beginning
from sealign.progress import Track, no_progress

Tokens = tuple[tuple[str, str], list[int], list[int]]
"""What the harness asks for: the texts, and the token ids of context and continuation."""


@register_model("sealign")
class SealignLM(HFLM):  # type: ignore[misc]
    """The harness's Hugging Face model with an edit, or a method that edits are compared with, on it.

    Log-likelihoods are scored packed (see ``score_choices``) wherever edit and model allow it, and by the harness's own
    code elsewhere: an edit that is rescaled per feature is not causal, so that sequences can share nothing.

    Args:
        pretrained: a loaded model, or a name that ``load_model`` knows.
        edit: an edit or a method, its folder or repository; None is the base model.
        preamble: text before every prompt; a method's own prefix follows it.
        strength: in place of the edit's own.
        tokenizer: the model's own; needed with a loaded model.
        journal: a file in which results are kept; a second run reads them.
        track: shows progress.
        ignore_mismatch: as for ``attach``.
        dtype, device, batch_size: as for the harness's model; the first two only where a name is given.
        **kwargs: everything else that the harness's model takes.

    Raises:
        FingerprintError, EditFileError, ModelError: as ``attach``, ``Edit.from_pretrained`` and ``load_model``.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        edit: Change | str | None = None,
        preamble: str = "",
        strength: float | None = None,
        tokenizer: Any = None,
        journal: str | Path | None = None,
        track: Track = no_progress,
        ignore_mismatch: bool = False,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str | None = 8,
        **kwargs: Any,
    ) -> None:
        if isinstance(pretrained, str):
            pretrained, tokenizer = load_model(pretrained, dtype=dtype, device=device or "auto")
        loaded = load_change(edit) if isinstance(edit, str | Path) else edit
        spectral = loaded if isinstance(loaded, Edit) else None
        self._per_feature = spectral is not None and spectral.settings.normalization == "feature"
        self._shares = _shares_beginnings(pretrained, loaded)
        self._before = preamble + prefix_of(loaded)
        super().__init__(pretrained, tokenizer=tokenizer, batch_size=1 if self._per_feature else batch_size, **kwargs)
        self._journal = Journal(journal)
        self._track = track
        self._handle: EditHandle | Attached | None = None
        if loaded is not None:
            if strength is not None:
                if spectral is None:
                    raise SettingError(
                        "strength is given, but what is on the model is not a spectral edit; leave it out"
                    )
                loaded = spectral.with_settings(strength=float(strength))
            self._handle = attach_change(pretrained, loaded, ignore_mismatch=ignore_mismatch)

    def close(self) -> None:
        """Take the edit off the model."""
        if self._handle is not None:
            self._handle.detach()

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness records of a model, with the edit's hash and strength."""
        info: dict[str, Any] = super().get_model_info()
        if isinstance(self._handle, EditHandle):
            info["sealign_edit_hash"] = self._handle.edit.hash
            info["sealign_edit_strength"] = self._handle.strength
            info["sealign_edited_modules"] = self._handle.modules
        return info

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return log-likelihoods; progress is shown by ``track`` alone."""
        asked = [self._prefixed(request) for request in requests]
        scores: list[tuple[float, bool]] = super().loglikelihood(asked, disable_tqdm=True)
        return scores

    def _prefixed(self, request: Instance) -> Instance:
        """The request with what stands before every prompt."""
        if not self._before:
            return request
        context, *rest = request.args
        return dataclasses.replace(request, arguments=(self._before + context, *rest))

    def _loglikelihood_tokens(
        self, requests: list[Tokens], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        keys = [Journal.key("loglikelihood", context, target) for _, context, target in requests]
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in self._journal}
        if self._per_feature or not supports_packing(self.model):
            self._score_apart(missing, override_bs)
        else:
            self._score_packed(missing)
        return [(float(value), bool(greedy)) for value, greedy in map(self._journal.get, keys)]

    def _score_apart(self, missing: dict[str, Tokens], override_bs: int | None) -> None:
        items, size = list(missing.items()), int(self.batch_size)
        batches = [items[i : i + size] for i in range(0, len(items), size)]
        for batch in self._track(batches, "Scoring", len(batches)):
            scored = super()._loglikelihood_tokens([request for _, request in batch], True, override_bs)
            self._journal.put(dict(zip([key for key, _ in batch], scored, strict=True)))

    def _score_packed(self, missing: dict[str, Tokens]) -> None:
        by_context: dict[tuple[int, ...], list[tuple[str, tuple[int, ...]]]] = {}
        for key, (_, context, target) in missing.items():
            # As the harness does, what is too long for the context loses its beginning.
            kept = (context + target)[-(self.max_length + 1) :][: -len(target)]
            by_context.setdefault(tuple(kept), []).append((key, tuple(target)))
        groups = list(by_context.items())
        requests = [ChoiceRequest(context, tuple(target for _, target in group)) for context, group in groups]

        def keep(scored: Sequence[tuple[int, list[ChoiceScore]]]) -> None:
            pairs = [
                (key, score)
                for index, scores in scored
                for (key, _), score in zip(groups[index][1], scores, strict=True)
            ]
            self._journal.put({key: list(score) for key, score in pairs})

        if requests:
            score_choices(self.model, requests, track=self._track, on_scored=keep)

    @torch.no_grad()
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return greedy or sampled completions, batch by batch, longest first."""
        requests = [self._prefixed(request) for request in requests]
        keys = [Journal.key("generate", *request.args) for request in requests]
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in self._journal}
        items = sorted(missing.items(), key=lambda item: len(item[1].args[0]), reverse=True)
        size = int(self.batch_size)
        batches = [items[i : i + size] for i in range(0, len(items), size)]
        for batch in self._track(batches, "Generating", len(batches)):
            texts = super().generate_until([request for _, request in batch], disable_tqdm=True)
            self._journal.put(dict(zip([key for key, _ in batch], texts, strict=True)))
        return [str(self._journal.get(key)) for key in keys]

    def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
        if not self._per_feature:
            shared = share_beginning(self.model, context, kwargs["attention_mask"]) if self._shares else None
            if shared is not None:
                context, kwargs["attention_mask"], kwargs["past_key_values"] = shared
            return super()._model_generate(context, *args, **kwargs)
        # The harness always asks for a cache, with which per-feature rescaling is not defined.
        generate = self.model.generate
        self.model.generate = lambda **given: generate(**(given | {"use_cache": False}))
        try:
            return super()._model_generate(context, *args, **kwargs)
        finally:
            del self.model.generate


def _shares_beginnings(model: Any, change: Change | None) -> bool:
    """Whether what prompts begin with can be run once, with padding behind it.

    A sliding window would count the padding, and what has a cache beside the model's would miss what was run before.
    """
    if change is not None and any(part.own_cache for part in parts_of(change) if isinstance(part, Method)):
        return False
    return supports_packing(model) and layer_kinds(model) == {"full_attention"}


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
