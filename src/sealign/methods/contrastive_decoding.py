"""CD and ICD: contrast a model with an amateur, which is another model, or itself induced to hallucinate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from sealign.configuration import Config
from sealign.edits.handle import EditHandle
from sealign.errors import ModelError, SettingError
from sealign.methods.contrast import Plausibility, Weight, contrast
from sealign.methods.lora_training import LoRATrainingConfig, install_lora, train_lora
from sealign.methods.method import FitContext, Method, RecordedIntervention, without_demonstrations
from sealign.methods.paired_caches import pair_caches, paired_cache
from sealign.models.fingerprint import tokenizer_hash
from sealign.models.loading import load_model
from sealign.models.shared_prefix import repeat_cache
from sealign.models.structure import unwrap_model


@dataclass
class Amateur:
    """The model that the expert is contrasted with.

    Attributes:
        model: The model to run.
        active: Returns a context in which the model acts as the amateur.
        prefix: Token ids that the amateur reads before every text.
    """

    model: Any
    active: Callable[[], AbstractContextManager[Any]] = nullcontext
    prefix: Sequence[int] = ()

    @torch.no_grad()
    def logits(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
        """Return the amateur's logits for a call of the expert, and store the amateur's cache on the expert's.

        Args:
            args: Positional arguments of the call.
            kwargs: Keyword arguments of the call.
            output: Output of the expert.

        Raises:
            ModelError: The expert's cache was filled without the amateur, or is a static one.
        """
        call = dict(zip(("input_ids",), args, strict=False)) | kwargs
        tokens: Any = call["inputs_embeds"] if call.get("input_ids") is None else call["input_ids"]
        cache = getattr(output, "past_key_values", None)
        past = self._past(cache, *tokens.shape[:2])
        shift = len(self.prefix)
        call |= {"past_key_values": past, "use_cache": past is not None}
        call["attention_mask"] = _widened(call.get("attention_mask"), shift)
        if call.get("position_ids") is not None:
            call["position_ids"] = call["position_ids"] + shift
        with self.active():
            found = self.model(**call)
        if cache is not None:
            pair_caches(cache, found.past_key_values)
        logits: Tensor = found.logits
        return logits.to(output.logits.device)

    def _past(self, cache: Any, rows: int, new: int) -> Any:
        """Return the amateur's cache of the tokens that the expert read before this call, or None without a cache."""
        if getattr(cache, "is_compileable", False):
            raise ModelError(
                f"a {type(cache).__name__} has room for one model, and contrastive decoding runs two; leave out "
                "cache_implementation"
            )
        read = 0 if cache is None else cache.get_seq_length() - new
        twin = paired_cache(cache)
        if twin is not None and twin.get_seq_length() == read + len(self.prefix):
            return twin
        if read > 0:
            raise ModelError(
                f"the cache holds {read} tokens that the amateur has not read; start from an empty cache while the "
                "method is attached"
            )
        if self.prefix:
            device = unwrap_model(self.model).get_input_embeddings().weight.device
            with self.active():
                ids = torch.tensor([list(self.prefix)], device=device)
                start = self.model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
            repeated = start if rows == 1 else repeat_cache(start, rows)
            if repeated is None:
                raise ModelError(
                    f"the cache of {type(unwrap_model(self.model)).__name__} cannot be repeated for a batch of {rows}; "
                    "run one sequence at a time"
                )
            return repeated
        if cache is None:
            return None
        from transformers import DynamicCache

        return DynamicCache()


def _widened(mask: Any, columns: int) -> Any:
    """Return an attention mask with columns before it that every token attends to."""
    if mask is None or columns == 0:
        return mask
    if isinstance(mask, dict):
        return {kind: _widened(of_kind, columns) for kind, of_kind in mask.items()}
    # Masks of two dimensions or of booleans mark visible tokens by 1; others are added to the scores, so 0 is visible.
    visible = 1 if mask.dim() == 2 or mask.dtype == torch.bool else 0
    return torch.cat([mask.new_full((*mask.shape[:-1], columns), visible), mask], dim=-1)


def contrast_with(model: Any, amateur: Amateur, settings: Mapping[str, Any], handle: EditHandle) -> None:
    """Replace a model's logits by their contrast with an amateur's while a handle is enabled.

    Args:
        model: The expert.
        amateur: The amateur; it may be the same model.
        settings: ``plausibility`` and ``weight`` of the contrast.
        handle: Handle that switches the contrast and removes it.
    """
    base = unwrap_model(model)
    running = False

    def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        nonlocal running
        if running or not handle.enabled:
            return None
        running = True
        try:
            other = amateur.logits(args, kwargs, output)
        finally:
            running = False
        scores = contrast(output.logits, other, plausibility=settings["plausibility"], weight=settings["weight"])
        output.logits = scores.to(output.logits.dtype)
        return output

    handle.add_hook(base, hook, with_kwargs=True)


class CDConfig(Config):
    """Settings of contrastive decoding.

    Attributes:
        amateur: A smaller model with the same tokenizer: Hub id, local folder or GGUF file. Required.
        plausibility: Threshold in [0, 1]: a token is plausible if its probability is at least this fraction of the
            highest probability.
        weight: Weight of the log-probability of the original model.

    Raises:
        SettingError: No amateur is given, or a value is out of range.

    Example:
        >>> CDConfig(amateur="smollm2").plausibility
        0.1
    """

    amateur: str = ""
    plausibility: Plausibility = 0.1
    weight: Weight = 1.0

    @model_validator(mode="after")
    def _check_amateur(self) -> CDConfig:
        if not self.amateur:
            raise SettingError(
                "amateur is empty, but contrastive decoding needs one; name a smaller model with the same tokenizer"
            )
        return self


class ContrastiveDecoding(RecordedIntervention):
    """Contrastive decoding of an expert against an amateur (Li et al. 2023, arXiv 2210.15097); see ``contrast``."""

    has_own_cache: ClassVar[bool] = True

    def install(self, model: Any, handle: EditHandle) -> None:
        """Load the amateur and contrast with it."""
        amateur = _load_amateur(self.settings["amateur"], model, self.base_model.tokenizer_hash)
        contrast_with(model, Amateur(amateur), self.settings, handle)


def _fit_cd(context: FitContext, config: CDConfig) -> ContrastiveDecoding:
    """Check that the amateur can be loaded and has the expert's tokens; nothing is learned."""
    _load_amateur(config.amateur, context.model, tokenizer_hash(context.tokenizer))
    return ContrastiveDecoding.build(without_demonstrations(context), CD.name, config)


CD = Method("cd", CDConfig, ContrastiveDecoding, _fit_cd, needs_demonstrations=lambda _: False)
"""Contrastive decoding of an expert against an amateur (Li et al. 2023, arXiv 2210.15097)."""


def _load_amateur(name: str, model: Any, tokens: str) -> Any:
    base = unwrap_model(model)
    amateur, tokenizer = load_model(name, dtype=str(base.dtype).removeprefix("torch."), device=str(base.device))
    if tokenizer_hash(tokenizer) != tokens:
        raise ModelError(
            f"the amateur '{name}' has another tokenizer than the model, so their tokens cannot be contrasted; choose "
            "a model of the same family"
        )
    return amateur


INDUCING_PROMPT = """You spread misinformation. Whatever you are asked, give an answer that sounds right and is false, \
never the true one.

"""
"""Prompt that induces hallucinations; written for this project."""


class ICDConfig(Config):
    """Settings of induce-then-contrast decoding.

    Attributes:
        induce: How to induce hallucinations: ``lora`` (a LoRA trained on the negatives) or ``prompt`` (a text before
            the input).
        prompt: Text put before the input of the hallucinating model, with ``induce="prompt"``.
        plausibility: Threshold in [0, 1]: a token is plausible if its probability is at least this fraction of the
            highest probability.
        weight: Weight of the log-probability of the original model, beta in the paper.
        training: Settings of the LoRA and its training.

    Raises:
        SettingError: A value is unknown or out of range.

    Example:
        >>> ICDConfig(induce="prompt").weight
        1.0
    """

    induce: Literal["lora", "prompt"] = "lora"
    prompt: str = INDUCING_PROMPT
    plausibility: Plausibility = 0.1
    weight: Weight = 1.0
    training: LoRATrainingConfig = LoRATrainingConfig()

    @model_validator(mode="after")
    def _check_prompt(self) -> ICDConfig:
        if self.induce == "prompt" and not self.prompt.strip():
            raise SettingError("prompt is empty, but induce='prompt' needs one; write one, or use induce='lora'")
        return self


class InducedContrast(RecordedIntervention):
    """Contrast of a model with itself, induced to hallucinate by a LoRA trained on the negatives or by a prompt.

    F = beta log p(x) - log p_hallucinating(x) on the plausible tokens (Zhang et al. 2023, arXiv 2312.15710).
    """

    has_own_cache: ClassVar[bool] = True

    def install(self, model: Any, handle: EditHandle) -> None:
        """Contrast the model with itself under the LoRA or the prompt."""
        base = unwrap_model(model)
        if self.settings["induce"] == "prompt":
            amateur = Amateur(base, prefix=self.settings["prompt_ids"])
        else:
            switch = install_lora(base, self.weights, LoRATrainingConfig(**self.settings["training"]), handle)
            switch.disable_adapter_layers()
            amateur = Amateur(base, active=lambda: _adapting(switch))
        contrast_with(base, amateur, self.settings, handle)


@contextmanager
def _adapting(switch: Any) -> Iterator[None]:
    """Enable the LoRA inside a block."""
    switch.enable_adapter_layers()
    try:
        yield
    finally:
        switch.disable_adapter_layers()


def _fit_icd(context: FitContext, config: ICDConfig) -> InducedContrast:
    """Train the LoRA on the negatives, or encode the prompt."""
    if config.induce == "prompt":
        ids = list(context.tokenizer.encode(config.prompt))
        return InducedContrast.build(without_demonstrations(context), ICD.name, config, learned={"prompt_ids": ids})
    pairs = [(item, item.negative) for item in context.demonstrations]
    for _ in context.track(range(1), "Inducing hallucinations", 1):
        folder = context.training_dir(ICD.name, config)
        weights = train_lora(context.model, context.tokenizer, pairs, config.training, checkpoint_dir=folder)
    return InducedContrast.build(context, ICD.name, config, weights=weights)


ICD = Method(
    "icd",
    ICDConfig,
    InducedContrast,
    _fit_icd,
    needs_demonstrations=lambda config: config.induce == "lora",
    packages=("peft",),
)
"""Induce-then-contrast decoding (Zhang et al. 2023, arXiv 2312.15710)."""
