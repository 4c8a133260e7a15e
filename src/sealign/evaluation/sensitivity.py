"""Sensitivity: derivatives of log-probabilities with respect to the strengths of many edits at once.

Since x' = x + s (edit(x) - x), the derivative of any function L of the logits at strength 0 is

    dL/ds = sum over tokens t of g_t . (edit(x_t) - x_t),      g_t = dL / dx_t.

One backward pass gives g_t at all sites and layers, so the derivatives of a thousand edits cost little more than those
of one. The divergence grows with the square of the strength,

    KL(base || edited) = s^2 / 2 E[(d log p(y) / ds)^2] + O(s^3),      y ~ p,

the Fisher information along the edit, which is estimated from tokens y drawn from the base model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sealign.edits.layer_edit import LayerEdit
from sealign.errors import ModelError, first_sentence
from sealign.fitting.checkpoints import BatchStore
from sealign.models.batching import pad_right, pad_token
from sealign.models.eval_mode import eval_mode
from sealign.models.hooks import add_hook
from sealign.models.passages import Passage
from sealign.models.recorder import Recorder
from sealign.models.sites import ResolvedSite
from sealign.models.structure import input_device, logits_kept
from sealign.progress import Track, no_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Place = tuple[str, int]
"""Site and layer."""

Objective = Callable[[Tensor, Tensor, Tensor, torch.Generator], Tensor]
"""Function of log-probabilities (b, t, vocabulary), targets (b, t), the mask of scored tokens (b, t) and a generator
that returns a scalar, the sum of one value for each row."""


@dataclass(frozen=True)
class PlacedEdit:
    """The edit of one layer, and where it acts.

    Attributes:
        site: Site of the edit.
        layer: Index of the layer.
        layer_edit: The edit.
    """

    site: str
    layer: int
    layer_edit: LayerEdit

    @property
    def place(self) -> Place:
        """Site and layer."""
        return self.site, self.layer


def mean_log_probability_derivatives(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    passages: Sequence[Passage],
    edits: Sequence[PlacedEdit],
    sites: Mapping[str, Sequence[ResolvedSite]],
    *,
    batch_size: int = 8,
    store: BatchStore = BatchStore(None),
    track: Track = no_progress,
) -> Float[Tensor, "n m"]:
    """Return the derivative of the mean log-probability of the scored tokens of each passage, for each edit.

    Args:
        model: The base model; its parameters need no gradient.
        tokenizer: Tokenizer of the model.
        passages: The n passages.
        edits: The m edits, each of one layer and considered alone.
        sites: Modules of each site, for all layers of the edits.
        batch_size: Number of passages to run together.
        store: Store of finished batches of these passages and edits, to go on from.
        track: Wrapper for iterables that displays progress; see ``sealign.progress.Track``.

    Raises:
        ModelError: The model cannot be differentiated.
    """
    (found,) = _derivatives(model, tokenizer, passages, edits, sites, [_mean], 0, batch_size, store, track)
    return found


def sampled_score_derivatives(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    passages: Sequence[Passage],
    edits: Sequence[PlacedEdit],
    sites: Mapping[str, Sequence[ResolvedSite]],
    *,
    samples: int = 2,
    seed: int = 0,
    batch_size: int = 8,
    store: BatchStore = BatchStore(None),
    track: Track = no_progress,
) -> tuple[Float[Tensor, "k m"], Float[Tensor, "n m"]]:
    """Return derivatives a of the log-probability of tokens drawn from the model, for each edit, and of the text's own.

    With N the number of scored tokens of all passages, the mean KL(base || edited) of the edits with strengths s is
    about s^T A s / 2 nats per token, with A = a^T a / (samples N). Tokens are drawn at each scored position
    independently, given the passage before it, so that their derivatives are uncorrelated with mean 0.

    Args:
        model, tokenizer, passages, edits, sites, batch_size, store, track: As for ``mean_log_probability_derivatives``.
        samples: Number of draws for each passage.
        seed: Seed of the draws.

    Returns:
        The derivatives a, one row for each draw of each passage, k = samples n; and those of the mean log-probability
        of the scored tokens of each passage, as by ``mean_log_probability_derivatives``.
    """
    objectives = [*[_drawn] * samples, _mean]
    *draws, means = _derivatives(model, tokenizer, passages, edits, sites, objectives, seed, batch_size, store, track)
    return torch.cat(draws), means


def _mean(logs: Tensor, targets: Tensor, scored: Tensor, _generator: torch.Generator) -> Tensor:
    chosen = logs.gather(2, targets[..., None])[..., 0] * scored
    return (chosen.sum(1) / scored.sum(1)).sum()


def _drawn(logs: Tensor, _targets: Tensor, scored: Tensor, generator: torch.Generator) -> Tensor:
    rows = logs.detach().exp().flatten(0, 1).cpu()
    drawn = torch.multinomial(rows, 1, generator=generator).view(scored.shape).to(logs.device)
    return (logs.gather(2, drawn[..., None])[..., 0] * scored).sum()


def _derivatives(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    passages: Sequence[Passage],
    edits: Sequence[PlacedEdit],
    sites: Mapping[str, Sequence[ResolvedSite]],
    objectives: Sequence[Objective],
    seed: int,
    batch_size: int,
    store: BatchStore,
    track: Track,
) -> list[Float[Tensor, "n m"]]:
    """Return the derivative of each objective for each passage and edit, in float64."""
    by_place: dict[Place, list[int]] = {}
    for number, edit in enumerate(edits):
        by_place.setdefault(edit.place, []).append(number)
    found = [torch.zeros(len(passages), len(edits), dtype=torch.float64) for _ in objectives]
    order = sorted(range(len(passages)), key=lambda index: len(passages[index].ids))
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    pad = pad_token(tokenizer, model)
    with eval_mode(model), _recording(model, sites, by_place) as recorded, torch.enable_grad():
        for number, batch in enumerate(track(batches, "Computing sensitivities", len(batches))):
            tables = store.load("sensitivities", number)
            if tables is None:
                # One generator for each batch, so that a run that goes on draws what a whole one does.
                generator = torch.Generator().manual_seed(seed * len(batches) + number)
                values = _objectives(model, [passages[index] for index in batch], pad, objectives, generator)
                tables = _tables(values, recorded(), by_place, edits, len(batch))
                store.save("sensitivities", number, tables)
            for index, whole in enumerate(found):
                whole[batch] = tables[str(index)]
    return found


def _objectives(
    model: Any, passages: Sequence[Passage], pad: int, objectives: Sequence[Objective], generator: torch.Generator
) -> list[Tensor]:
    """Run passages, and return the value of each objective, with its graph."""
    ids, mask = pad_right([passage.ids for passage in passages], pad, input_device(model))
    skipped = min(passage.start for passage in passages) - 1  # positions that predict no scored token
    kept = logits_kept(model, ids.shape[1] - skipped)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **kept).logits
    logs = torch.log_softmax(logits[:, skipped - ids.shape[1] : -1].float(), dim=-1)
    positions = torch.arange(skipped + 1, ids.shape[1], device=logs.device)
    starts = torch.tensor([passage.start for passage in passages], device=logs.device)
    scored = (positions >= starts[:, None]) & mask[:, skipped + 1 :].bool().to(logs.device)
    targets = ids[:, skipped + 1 :].to(logs.device)
    return [objective(logs, targets, scored, generator) for objective in objectives]


def _tables(
    values: Sequence[Tensor],
    outputs: Mapping[Place, Tensor],
    by_place: Mapping[Place, Sequence[int]],
    edits: Sequence[PlacedEdit],
    rows: int,
) -> dict[str, Float[Tensor, "b m"]]:
    """Return the derivatives of the objectives of one batch, by the number of the objective."""
    found = torch.zeros(len(values), rows, len(edits), dtype=torch.float64)
    try:
        gradients = [
            torch.autograd.grad(value, list(outputs.values()), retain_graph=number < len(values) - 1)
            for number, value in enumerate(values)
        ]
    except RuntimeError as error:
        if "memory" in str(error):
            raise
        raise ModelError(
            f"the model cannot be differentiated ({first_sentence(error)}), which a search needs; fit one method, or "
            "search with the model before quantisation"
        ) from error
    for place, x, *along in zip(outputs, outputs.values(), *gradients, strict=True):
        for index in by_place[place]:
            found[:, :, index] = torch.stack(_along(edits[index].layer_edit, x.detach(), along, rows)).cpu()
    return {str(number): table for number, table in enumerate(found)}


@torch.no_grad()
def _along(layer_edit: LayerEdit, x: Tensor, gradients: Sequence[Tensor], rows: int) -> list[Float[Tensor, " b"]]:
    """Return the sum over the tokens of each row of g . (edit(x) - x), for each gradient g."""
    # A batch row is a row of this view, also where a block flattens batch and tokens.
    change = (layer_edit(x) - x).float().reshape(rows, -1)
    return [(gradient.float().reshape(rows, -1) * change).sum(1, dtype=torch.float64) for gradient in gradients]


@contextmanager
def _recording(
    model: PreTrainedModel, sites: Mapping[str, Sequence[ResolvedSite]], places: Mapping[Place, object]
) -> Iterator[Callable[[], dict[Place, Tensor]]]:
    """Keep the outputs of all places in the graph; yield a function that returns those of the latest forward pass."""
    with ExitStack() as stack:
        recorders = {
            site: stack.enter_context(Recorder([each for each in found if (site, each.layer) in places], _whole))
            for site, found in sites.items()
        }
        embedding = model.get_input_embeddings()
        assert isinstance(embedding, nn.Module)
        # The parameters may be frozen, so the graph begins at the embedding's output.
        stack.callback(add_hook(embedding, lambda _module, _inputs, output: output.detach().requires_grad_()))

        def outputs() -> dict[Place, Tensor]:
            taken = {
                (site, layer): output
                for site, recorder in recorders.items()
                for layer, output in recorder.recorded.items()
            }
            for recorder in recorders.values():
                recorder.recorded.clear()
            return taken

        yield outputs


def _whole(output: Tensor, _layer: int) -> Tensor:
    return output
