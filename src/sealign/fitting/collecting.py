"""Run a model over demonstrations and collect one activation vector per demonstration, role and layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from sealign.demonstrations.demonstration import Demonstration, check_demonstrations
from sealign.fitting.activations import Activations
from sealign.fitting.collect_config import CollectConfig, TokenChoice
from sealign.fitting.collector import Collector
from sealign.models.output_matrices import HEADS, input_width, resolve_heads
from sealign.models.sites import ResolvedSite, resolve_sites
from sealign.models.structure import text_config, unwrap_model
from sealign.progress import Track, no_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def collect_activations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    *,
    site: str = "mlp",
    layers: Sequence[int] | None = None,
    config: CollectConfig = CollectConfig(),
    module_pattern: str | None = None,
    checkpoint_dir: str | Path | None = None,
    track: Track = no_progress,
) -> Activations:
    """Run a model over demonstrations and return one vector per demonstration, role and layer.

    The result is H, H+ and H- of Qiu et al. 2024 (arXiv 2405.09719), section 3. Sequences run in batches sorted by
    length. A prefix common to all sequences is run once. A neutral prompt is read from the positive sequence, which
    begins with it. Beside the model, peak memory is the result plus one layer's output for one batch.

    Args:
        model: Any decoder of transformers.
        tokenizer: Tokenizer of the model.
        demonstrations: Demonstrations to run; must not be empty.
        site: ``mlp``, ``attention``, ``residual``, or ``heads`` for the concatenated outputs of all attention heads.
        layers: Indices of the layers. Default: all.
        config: Collection settings.
        module_pattern: Dotted path of the modules, with ``{layer}`` as placeholder for the layer index; see
            ``resolve_sites``. For ``heads``, the path of the attention modules. Default: found by structure.
        checkpoint_dir: Folder for finished batches, from which an interrupted run continues. Batches computed with
            other settings, weights or demonstrations are not used.
        track: Wrapper for iterables that displays progress; see ``sealign.progress.Track``.

    Raises:
        DemonstrationError: There are no demonstrations, or one is longer than the model's context.
        ActivationError: An activation is NaN or infinite; the message names the layer and the demonstration.
        ModelError: The tokenizer gives a token that the model does not embed.
        SiteError: The modules of a layer cannot be identified, or are not what the site's name says.
    """
    sites = resolve_read_sites(model, site, layers, module_pattern=module_pattern)
    collector = Collector(model, tokenizer, {site: sites}, [config.token], config, track)
    demonstrations = check_demonstrations(demonstrations)
    with collector.open_store(checkpoint_dir, demonstrations) as store:
        (found,) = collector.run(demonstrations, store).values()
        store.clear()
    return found


def collect_together(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    *,
    sites: Sequence[str],
    tokens: Sequence[TokenChoice],
    layers: Sequence[int] | None = None,
    config: CollectConfig = CollectConfig(),
    checkpoint_dir: str | Path | None = None,
    track: Track = no_progress,
) -> dict[tuple[str, TokenChoice], Activations]:
    """Run a model over demonstrations once, and return the activations for each of several sites and token choices.

    Args:
        model, tokenizer, demonstrations, layers, track: As for ``collect_activations``.
        checkpoint_dir: Folder for finished batches, from which a run continues; the caller removes them.
        sites: Sites to read, as for ``collect_activations``.
        tokens: Token choices; that of ``config`` is not used.
        config: Other collection settings.

    Returns:
        Mapping from site and token choice to activations, each equal to those of ``collect_activations``.

    Raises:
        DemonstrationError, ActivationError, ModelError, SiteError: As for ``collect_activations``.

    Example:
        >>> import sealign
        >>> model, tokenizer = sealign.load_model("smollm2")
        >>> demonstrations = sealign.load_demonstrations("bundled:truthfulness", limit=8)
        >>> found = collect_together(
        ...     model, tokenizer, demonstrations, sites=["mlp", "residual"], tokens=["last", "mean"], layers=[12, 14]
        ... )
        >>> found["residual", "mean"].neutral[14].shape
        torch.Size([8, 576])
    """
    resolved = {site: resolve_read_sites(model, site, layers) for site in sites}
    collector = Collector(model, tokenizer, resolved, tokens, config, track)
    demonstrations = check_demonstrations(demonstrations)
    with collector.open_store(checkpoint_dir, demonstrations) as store:
        return collector.run(demonstrations, store)


def resolve_read_sites(
    model: nn.Module, site: str, layers: Sequence[int] | None = None, *, module_pattern: str | None = None
) -> tuple[ResolvedSite, ...]:
    """Find the module to read in each given layer; for ``heads``, its input is read, otherwise its output.

    Args:
        model, site, layers, module_pattern: As for ``collect_activations``.

    Raises:
        SiteError: A module cannot be identified.
    """
    if site == HEADS:
        return resolve_heads(model, layers, module_pattern=module_pattern)
    return resolve_sites(model, site, layers, module_pattern=module_pattern)


def read_width(model: nn.Module, resolved: ResolvedSite) -> int:
    """Return the number of features: the hidden size, or the number of heads times the head size for ``heads``.

    Args:
        model: Model that contains the module.
        resolved: Module to read.
    """
    if resolved.reads == "output":
        return int(text_config(unwrap_model(model)).hidden_size)
    return input_width(resolved.module)
