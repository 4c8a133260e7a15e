"""An edited model as a model of lm-evaluation-harness, with packed scoring and results that survive a crash.

It works with the harness's own entry points: from Python as ``simple_evaluate(model=SealignLM(...))``, and on the
command line as

    python -m sealign.evaluation.harness --model sealign --model_args pretrained=smollm2,edit=FOLDER --tasks ...
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval.models  # noqa: F401  the registry loads its own models only while it is empty
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from sealign.demonstrations.demonstration import Turn
from sealign.edits.attach import attach
from sealign.edits.handle import EditHandle
from sealign.edits.intervention import Intervention
from sealign.edits.provenance import warn_of_other_tokenizer
from sealign.edits.strength import check_strength
from sealign.errors import SealignWarning, SettingError
from sealign.evaluation.choices import ChoiceRequest, ChoiceScore, OnScored
from sealign.evaluation.journal import Journal
from sealign.evaluation.prefix_sharing import can_share_prefix, gap_of_sharing
from sealign.evaluation.scoring import score_choices
from sealign.methods.registry import load_edit
from sealign.models.chat_template import chat_text, dated_template
from sealign.models.eval_mode import eval_mode
from sealign.models.generation import end_tokens, generate_ids
from sealign.models.loading import load_model
from sealign.models.prompt_batches import allowed_batching
from sealign.models.prompt_format import DATE
from sealign.models.rounding import tolerance
from sealign.models.shared_prefix import share_prefix
from sealign.progress import Track, no_progress

Tokens = tuple[tuple[str, str], list[int], list[int]]
"""A request of the harness: the texts of context and continuation, and the token ids of each."""


@register_model("sealign")
class SealignLM(HFLM):  # type: ignore[misc]
    """Hugging Face model of the harness with an edit or other intervention attached to it.

    Log-likelihoods are scored by ``score_choices``, packed where that is right.

    Args:
        pretrained: A loaded model, or a name that ``load_model`` accepts.
        edit: An edit or another intervention, or its folder or repository; None for the base model.
        preamble: Text before every prompt; the prefix of an intervention follows it.
        strength: Strength to use instead of the edit's own.
        tokenizer: Tokenizer of the model; required with a loaded model.
        journal: File in which results are saved, and from which a second run reads them.
        track: Wrapper for iterables that displays progress; see ``sealign.progress.Track``.
        ignore_mismatch: Whether to accept a model with another fingerprint.
        dtype, device: As for ``load_model``; used only if ``pretrained`` is a name.
        date: Date that the chat template gets as today's.
        batch_size: Number of sequences to run together in generation.
        **kwargs: Further arguments of the harness's model.

    Raises:
        FingerprintError, ModelError, SettingError: As for ``attach``.
        EditFileError, ModelError: As for ``load_edit`` and ``load_model``.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        edit: Intervention | str | Path | None = None,
        preamble: str = "",
        strength: float | None = None,
        tokenizer: Any = None,
        journal: str | Path | None = None,
        track: Track = no_progress,
        ignore_mismatch: bool = False,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str | None = 8,
        date: str = DATE,
        **kwargs: Any,
    ) -> None:
        self._date = date
        if isinstance(pretrained, str):
            pretrained, tokenizer = load_model(pretrained, dtype=dtype, device=device or "auto")
        loaded = load_edit(edit) if isinstance(edit, str | Path) else edit
        self._causal = loaded is None or loaded.is_causal
        self._shares_prefix = can_share_prefix(pretrained, loaded)
        self._before = preamble + (loaded.prefix if loaded is not None else "")
        super().__init__(pretrained, tokenizer=tokenizer, batch_size=batch_size if self._causal else 1, **kwargs)
        self._proved_width = 0
        self._journal = Journal(journal)
        self._track = track
        self._handle: EditHandle | None = None
        if loaded is not None:
            # The harness's command line gives the strength as it was typed.
            if not ignore_mismatch:
                warn_of_other_tokenizer(self.tokenizer, loaded)
            chosen = None if strength is None else check_strength(strength)
            self._handle = attach(pretrained, loaded, strength=chosen, ignore_mismatch=ignore_mismatch)

    @property
    def prefix(self) -> str:
        """Text before every prompt: the preamble and the prefix of the intervention."""
        return self._before

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation in the model's chat template, written as everywhere: see ``chat_text``.

        Args:
            chat_history: Turns, each with ``role`` and ``content``.
            add_generation_prompt: Whether an answer of the model follows; otherwise it continues the last turn.

        Raises:
            ModelError: The template refuses the conversation, or leaves out the text of a turn.
        """
        arguments = self.chat_template_args
        if add_generation_prompt and not self.enable_thinking:
            turns: Any = [Turn(turn["role"], turn["content"]) for turn in chat_history]  # type: ignore[arg-type]
            return chat_text(self.tokenizer, turns, arguments=arguments, date=self._date)
        arguments = {**arguments, **dated_template(self.tokenizer, arguments.get("chat_template"), self._date)}
        kinds = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, **kinds, **arguments))

    def score_tokens(self, requests: list[Tokens]) -> list[tuple[float, bool]]:
        """Return log-likelihood, and whether the target is the greedy continuation, of requests given as token ids.

        Args:
            requests: For each, a pair of texts (for messages), the token ids of the context, and those of the target.
        """
        return self._loglikelihood_tokens(requests)

    @property
    def end_tokens(self) -> list[int]:
        """Token ids that end an answer."""
        return end_tokens(self.model)

    @torch.no_grad()
    def answer(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Return the greedy answers to prompts as token ids, up to and with the first end token.

        Args:
            prompts: Token ids of the prompts.
            max_new_tokens: Maximum number of tokens of an answer. Must be at least 1.
        """
        keys = [Journal.key("answer", list(ids), max_new_tokens) for ids in prompts]
        missing = {key: ids for key, ids in zip(keys, prompts, strict=True) if key not in self._journal}
        items = sorted(missing.items(), key=lambda item: len(item[1]), reverse=True)
        size = int(self.batch_size)
        batches = [items[i : i + size] for i in range(0, len(items), size)]
        for batch in self._track(batches, "Answering", len(batches)):
            found = self._answer_batch([prompt for _, prompt in batch], max_new_tokens)
            self._journal.put(dict(zip([key for key, _ in batch], found, strict=True)))
        return [list(map(int, self._journal.get(key))) for key in keys]

    def _answer_batch(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        with eval_mode(self.model):
            rows = generate_ids(
                self.model, self.tokenizer, prompts, max_new_tokens, use_cache=self._causal, keep_end=True
            ).tolist()
        return [[token for token in row if token >= 0] for row in rows]

    def close(self) -> None:
        """Detach the edit from the model."""
        if self._handle is not None:
            self._handle.detach()

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness records of a model, with hash, strength and modules of the edit."""
        info: dict[str, Any] = super().get_model_info()
        if self._handle is not None:
            info["sealign_edit_hash"] = self._handle.edit.hash
            info["sealign_edit_strength"] = self._handle.strength
            info["sealign_edited_modules"] = self._handle.modules
        return info

    def loglikelihood(
        self,
        requests: list[Instance],
        disable_tqdm: bool = False,  # noqa: ARG002  of the harness's interface
    ) -> list[tuple[float, bool]]:
        """Return log-likelihoods; only ``track`` shows progress."""
        asked = [self._prefixed(request) for request in requests]
        scores: list[tuple[float, bool]] = super().loglikelihood(asked, disable_tqdm=True)
        for request, score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, score)
        return scores

    def _prefixed(self, request: Instance) -> Instance:
        """Return the request with preamble and prefix before its context."""
        if not self._before:
            return request
        context, *rest = request.args
        return dataclasses.replace(request, arguments=(self._before + context, *rest))

    def _loglikelihood_tokens(
        self,
        requests: list[Tokens],
        disable_tqdm: bool = False,  # noqa: ARG002
        override_bs: int | None = None,  # noqa: ARG002  sequences are batched by their number of tokens
    ) -> list[tuple[float, bool]]:
        keys = [Journal.key("loglikelihood", context, target) for _, context, target in requests]
        self._score({key: request for key, request in zip(keys, requests, strict=True) if key not in self._journal})
        return [(float(value), bool(greedy)) for value, greedy in map(self._journal.get, keys)]

    def _score(self, missing: dict[str, Tokens]) -> None:
        """Score requests by journal key, and save the scores as they are computed."""
        by_context: dict[tuple[int, ...], list[tuple[str, tuple[int, ...]]]] = {}
        for key, (texts, context, target) in missing.items():
            if len(target) > self.max_length:
                raise SettingError(
                    f"the answer {texts[-1]!r:.60} is {len(target)} tokens long, but the context of the model is "
                    f"{self.max_length} tokens; leave it out or use a model with a longer context"
                )
            # As in the harness, a text that is too long for the context loses its beginning.
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

        self._score_choices(requests, keep)

    def _score_choices(self, requests: Sequence[ChoiceRequest], on_scored: OnScored) -> None:
        score_choices(self.model, requests, track=self._track, on_scored=on_scored)

    @torch.no_grad()
    def generate_until(
        self,
        requests: list[Instance],
        disable_tqdm: bool = False,  # noqa: ARG002
    ) -> list[str]:
        """Return greedy or sampled completions; the longest prompts run first.

        A request that is repeated is answered anew each time, since its samples differ.
        """
        requests = [self._prefixed(request) for request in requests]
        seen: Counter[str] = Counter()
        keys = []
        for request in requests:
            key = Journal.key("generate", *request.args)
            keys.append(f"{key}-{seen[key]}" if seen[key] else key)
            seen[key] += 1
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in self._journal}
        items = sorted(missing.items(), key=lambda item: len(item[1].args[0]), reverse=True)
        if items and self.batch_size == "auto":
            self.batch_size_per_gpu: Any = self._detect_batch_size()
        size = int(self.batch_size) if items else 1
        if size > 1 and len(items) > 1 and not self._runs_batches():
            size = 1
        batches = [items[i : i + size] for i in range(0, len(items), size)]
        for batch in self._track(batches, "Generating", len(batches)):
            texts = super().generate_until([request for _, request in batch], disable_tqdm=True)
            self._journal.put(dict(zip([key for key, _ in batch], texts, strict=True)))
        return [str(self._journal.get(key)) for key in keys]

    def _runs_batches(self) -> bool:
        """Return whether a batch of padded prompts is answered like each prompt alone."""
        return not self._causal or allowed_batching(self.model) == "padded"

    def _share(self, ids: Any, mask: Any) -> Any:
        """Run the common prefix of a batch once; see ``share_prefix``. None if that is not possible, or not right.

        A batch that is padded and wider than any before is first compared, by the next token after its shortest and
        longest row: layers that mask by distance in the row would count the padding.
        """
        lengths = mask.sum(1)
        if ids.shape[1] > self._proved_width and lengths.min() < lengths.max():
            pair = lengths.argsort()[[0, -1]]
            gap = gap_of_sharing(self.model, ids[pair], mask[pair])
            if not gap <= tolerance(self.model.dtype):
                self._shares_prefix = False
                warnings.warn(
                    f"a shared prefix changes the next token of {type(self.model).__name__} by {gap:.2g} nats; "
                    "generating without it, slower",
                    SealignWarning,
                    stacklevel=2,
                )
                return None
            self._proved_width = ids.shape[1]
        return share_prefix(self.model, ids, mask)

    def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
        if self._causal:
            mask = kwargs.get("attention_mask")
            shared = self._share(context, mask) if self._shares_prefix and mask is not None else None
            if shared is not None:
                context, kwargs["attention_mask"], kwargs["past_key_values"] = shared
            return super()._model_generate(context, *args, **kwargs)
        # The harness always requests a cache, with which an edit that is not causal is not defined.
        generate = self.model.generate
        self.model.generate = lambda **given: generate(**(given | {"use_cache": False}))
        try:
            return super()._model_generate(context, *args, **kwargs)
        finally:
            del self.model.generate


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
