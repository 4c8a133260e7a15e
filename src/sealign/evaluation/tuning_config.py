"""Settings of tuning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, field_validator

from sealign.errors import SettingError, check_choice
from sealign.evaluation.candidates import SEARCHED
from sealign.evaluation.evaluation_config import TaskConfig, check_unique
from sealign.evaluation.verdict import MAX_DAMAGE
from sealign.fitting.collect_config import TokenChoice
from sealign.models.prompt_format import PromptFormat
from sealign.models.sites import Site, parse_layers


class TuneConfig(TaskConfig):
    """Settings of tuning; see ``TaskConfig`` for the tasks, which finalists are compared on instead of the preference.

    Attributes:
        methods: Names of the methods to search: ``difference_operator``, ``targeted_shift``, ``mean_difference``,
            ``sea``, ``leace`` or ``iti``.
        sites: Sites to search: ``residual``, ``mlp`` or ``attention``.
        tokens: Token choices to search: ``completion``, ``last``, ``mean`` or ``random``.
        layers: Layers to search, as in the configuration of a fit.
        max_damage: Maximum increase of the loss on neutral text, and maximum KL divergence from the base model on it,
            in nats per token. Must be above 0.
        max_domain_damage: Maximum divergence on the base model's own answers to the prompts of the demonstrations;
            ``max_damage`` if None. Must be above 0.
        max_minutes: Largest duration of the search in minutes. Layers are left out of the scan to keep it: one in four
            is scanned first, then those between. None for no limit. Must be above 0.
        finalists: Number of candidates that are measured at full strength on the development part. Must be at least 1.
        deployable: Whether to search only edits that are exactly a LoRA: linear, not rescaled, on the output of a
            matrix.
        holdout: Fraction of the prompts for the final test, in (0, 1).
        development: Fraction of the other prompts on which candidates are compared, in (0, 1).
        prompt_format: How prompts are written.
        seed: Seed of the splits. Must be at least 0.

    Raises:
        SettingError: A value is unknown or out of range.

    Example:
        >>> TuneConfig(methods=["sea"], sites=["mlp"]).finalists
        5
    """

    methods: Sequence[str] = ("difference_operator", "targeted_shift", "mean_difference", "sea")
    sites: Sequence[Site] = ("residual", "mlp", "attention")
    tokens: Sequence[TokenChoice] = ("completion", "last")
    layers: str | Sequence[int] = "all"
    max_damage: Annotated[float, Field(gt=0, examples=[MAX_DAMAGE])] = MAX_DAMAGE
    max_domain_damage: Annotated[float, Field(gt=0, examples=[MAX_DAMAGE])] | None = None
    max_minutes: Annotated[float, Field(gt=0, examples=[10])] | None = None
    finalists: Annotated[int, Field(ge=1)] = 5
    deployable: bool = False
    holdout: Annotated[float, Field(gt=0, lt=1, examples=[0.3])] = 0.3
    development: Annotated[float, Field(gt=0, lt=1, examples=[0.4])] = 0.4
    prompt_format: PromptFormat = PromptFormat()
    seed: Annotated[int, Field(ge=0)] = 0

    @field_validator("methods", "sites", "tokens")
    @classmethod
    def _check_names(cls, names: Any) -> Any:
        if not names:
            raise SettingError("methods, sites and tokens must each have at least 1 name; leave them out for all")
        check_unique("name", names)
        return names

    @field_validator("methods")
    @classmethod
    def _check_methods(cls, methods: Any) -> Any:
        for method in methods:
            check_choice("method", method, tuple(SEARCHED))
        return methods

    @field_validator("layers")
    @classmethod
    def _check_layers(cls, layers: Any) -> Any:
        if str(layers).startswith("signature"):
            raise SettingError(f"layers is '{layers}', but tuning compares layers itself; choose them by position")
        parse_layers(layers)
        return layers
