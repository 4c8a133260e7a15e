"""ITI, inference-time intervention: a shift of the attention heads that know best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from sealign.demonstrations.demonstration import Demonstration
from sealign.errors import DemonstrationError, ExportError, SettingError, SiteError, unknown_name
from sealign.fitting.collect_config import CollectConfig
from sealign.fitting.sequences import check_context, plan_sequences
from sealign.methods.method import Attached, FitContext, Method, check_at_least
from sealign.methods.steering import adder, change_input
from sealign.models.batching import pad_right, pad_token
from sealign.models.eval_mode import eval_mode
from sealign.models.output_matrices import matrices_behind
from sealign.models.sites import resolve_sites
from sealign.models.structure import decoder_of, input_device, text_config, unwrap_model
from sealign.progress import Track, no_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Direction = Literal["mass_mean", "probe"]


@dataclass(frozen=True, kw_only=True)
class ITIConfig:
    """Settings of ITI.

    Attributes:
        heads: K, how many are shifted; None is the paper's 48 of 1024, in proportion to the model's heads.
        strength: alpha, standard deviations of the shift; the paper's is 15.
        direction: ``mass_mean``, the paper's best, or ``probe``, the weights of the head's logistic regression.
        validation: share of the demonstrations on which heads are ranked, in (0, 1).
        seed: of the split and the probes.

    Raises:
        SettingError: a value is unknown or out of range.

    Example:
        >>> ITIConfig(heads=12).strength
        15.0
    """

    heads: int | None = None
    strength: float = 15.0
    direction: Direction = "mass_mean"
    validation: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.heads is not None:
            check_at_least("heads", self.heads, 1)
        if self.direction not in ("mass_mean", "probe"):
            raise SettingError(unknown_name("direction", self.direction, ("mass_mean", "probe")))
        if not 0 < self.validation < 1:
            raise SettingError(f"validation is {self.validation}, but it must be in (0, 1); try 0.2")
        if not abs(self.strength) < float("inf"):
            raise SettingError(f"strength is {self.strength}, but it must be finite; try 15")


@dataclass(frozen=True, eq=False)
class ITI(Method):
    """A shift of selected attention heads before the output matrix mixes them.

    x_h' = x_h + alpha sigma_h theta_h for the K heads whose logistic regression tells held-out positives from negatives
    best; theta_h is the unit vector from the mean of the negatives to that of the positives (or the probe's weights),
    sigma_h the standard deviation of the activations along it (Li et al. 2023, arXiv 2306.03341, section 3). Heads are
    read at the last token of prompt and completion. The shift is the same at every token, as in the authors' baked-in
    models, where it is a bias.
    """

    name: ClassVar[str] = "iti"

    @classmethod
    def learn(cls, lesson: FitContext, config: ITIConfig) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Rank the heads and learn their shifts.

        Raises:
            DemonstrationError: too few to hold some out.
            SiteError: more heads than the model has, or heads that cannot be told apart in a layer's output matrix.
        """
        positive, negative = head_activations(lesson.model, lesson.tokenizer, lesson.demonstrations, track=lesson.track)
        layers, count = positive.shape[1:3]
        wanted = max(1, round(48 / 1024 * layers * count)) if config.heads is None else config.heads
        if wanted > layers * count:
            raise SiteError(f"heads is {wanted}, but the model has {layers * count}; ask for at most as many")
        accuracy, probes = probe_accuracy(positive, negative, config.validation, config.seed, track=lesson.track)
        chosen = sorted(np.argsort(-accuracy.reshape(-1), kind="stable")[:wanted].tolist())
        shifts = np.zeros(positive.shape[1:])
        for layer, head in (divmod(index, count) for index in chosen):
            towards = probes[layer, head] if config.direction == "probe" else None
            shifts[layer, head] = head_shift(positive[:, layer, head], negative[:, layer, head], towards)
        tensors = {
            f"layers.{layer}.shift": torch.from_numpy(shifts[layer].reshape(-1)).float()
            for layer in sorted({index // count for index in chosen})
        }
        named = [
            {"layer": i // count, "head": i % count, "accuracy": round(float(accuracy.reshape(-1)[i]), 4)}
            for i in chosen
        ]
        return {"selected": named}, tensors

    def put_on(self, model: object, attached: Attached) -> None:
        """Add each layer's shift to what its output matrix takes in."""
        layers = sorted(int(name.split(".")[1]) for name in self.tensors)
        for layer, module in _output_matrices(model, layers).items():
            shift = self.settings["strength"] * self.tensors[f"layers.{layer}.shift"]
            change_input(module, adder(shift), attached)

    def randomized(self, seed: int) -> ITI:
        """Return random directions of the same lengths, head by head."""
        generator = torch.Generator().manual_seed(seed)
        count = int(self.record.model.fingerprint["num_attention_heads"] or 1)
        tensors = {}
        for name, shift in self.tensors.items():
            lengths = shift.reshape(count, -1).norm(dim=1, keepdim=True)  # zero but for the heads that are shifted
            drawn = torch.randn(count, len(shift) // count, generator=generator)
            tensors[name] = (drawn * (lengths / drawn.norm(dim=1, keepdim=True))).reshape(-1)
        return self.with_tensors(tensors)

    def reversed(self) -> ITI:
        """Return the shift from positive to negative."""
        return self.with_tensors({name: -shift for name, shift in self.tensors.items()})


def head_shift(
    positive: NDArray[np.float64], negative: NDArray[np.float64], towards: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """Return sigma theta of one head, (h,).

    theta is the unit vector along ``towards``, or along the difference of the means; sigma is the standard
    deviation of all activations along it.

    Args:
        positive, negative: (n, h) each.
        towards: a direction, (h,).

    Example:
        >>> head_shift(np.array([[2.0, 0.0], [4.0, 0.0]]), np.array([[0.0, 0.0], [0.0, 0.0]])).round(3)
        array([1.658, 0.   ])
    """
    direction = positive.mean(0) - negative.mean(0) if towards is None else towards
    length = np.linalg.norm(direction)
    if length == 0:
        return np.zeros_like(direction)
    unit = direction / length
    shift: NDArray[np.float64] = unit * np.std(np.concatenate([positive, negative]) @ unit)
    return shift


def probe_accuracy(
    positive: NDArray[np.float64],
    negative: NDArray[np.float64],
    validation: float,
    seed: int,
    *,
    track: Track = no_progress,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the held-out accuracy of each head's logistic regression, (layers, heads), and its weights.

    Both completions of a demonstration are on the same side of the split.

    Args:
        positive, negative: (n, layers, heads, h) each.
        validation: share held out.
        seed: of the split.
        track: shows progress.

    Raises:
        DemonstrationError: too few to hold some out and learn from the rest.
    """
    from sklearn.linear_model import LogisticRegression

    count, layers, heads, width = positive.shape
    held = max(1, round(validation * count))
    if count - held < 2:
        raise DemonstrationError(f"there are {count} demonstrations, but ITI needs at least 3; give more")
    order = np.random.default_rng(seed).permutation(count)
    accuracy, weights = np.zeros((layers, heads)), np.zeros((layers, heads, width))

    def both(chosen: NDArray[np.int64], layer: int, head: int) -> tuple[Any, Any]:
        x = np.concatenate([positive[chosen, layer, head], negative[chosen, layer, head]])
        return x, np.repeat([1, 0], len(chosen))

    for layer in track(range(layers), "Probing", layers):
        for head in range(heads):
            probe = LogisticRegression(max_iter=1000, random_state=seed).fit(*both(order[held:], layer, head))
            accuracy[layer, head] = probe.score(*both(order[:held], layer, head))
            weights[layer, head] = probe.coef_[0]
    return accuracy, weights


@torch.no_grad()
def head_activations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    *,
    config: CollectConfig = CollectConfig(),
    track: Track = no_progress,
) -> tuple[Float[np.ndarray, "n l heads h"], Float[np.ndarray, "n l heads h"]]:
    """Return each head's output for positives and negatives, at the last token: what the output matrix takes in.

    Raises:
        DemonstrationError: one is longer than the model's context.
        SiteError: a layer's attention has no single output matrix.
    """
    count = text_config(unwrap_model(model)).num_attention_heads
    matrices = _output_matrices(model)
    sequences = plan_sequences(tokenizer, demonstrations, config, None)
    check_context(model, sequences, demonstrations)
    order = sorted(sequences, key=lambda sequence: len(sequence.ids), reverse=True)
    batches = [order[i : i + config.batch_size] for i in range(0, len(order), config.batch_size)]
    found: dict[int, dict[int, NDArray[np.float64]]] = {1: {}, 2: {}}
    taken: dict[int, Tensor] = {}
    with eval_mode(model), ExitStack() as stack:
        for layer, module in matrices.items():
            stack.callback(module.register_forward_pre_hook(_keep(taken, layer)).remove)
        for batch in track(batches, "Collecting heads", len(batches)):
            ids, mask = pad_right([item.ids for item in batch], pad_token(tokenizer), input_device(model))
            decoder_of(model)(input_ids=ids, attention_mask=mask, use_cache=False)
            for row, item in enumerate(batch):
                last = torch.stack([taken[layer][row, len(item.ids) - 1].double().cpu() for layer in matrices])
                read = next(read for read in item.reads if read.role in found)
                found[read.role][read.demonstration] = last.reshape(len(matrices), count, -1).numpy()
    positive, negative = (np.stack([rows[i] for i in range(len(demonstrations))]) for rows in found.values())
    return positive, negative


def _keep(taken: dict[int, Tensor], layer: int) -> Any:
    def hook(_module: nn.Module, inputs: Any) -> None:
        taken[layer] = inputs[0]

    return hook


def _output_matrices(model: Any, layers: Sequence[int] | None = None) -> Mapping[int, nn.Module]:
    """The output matrix of each layer's attention."""
    sites = resolve_sites(model, "attention", layers)
    try:
        return {
            matrix.layer: matrix.module for matrix in matrices_behind(model, {site.layer: site.path for site in sites})
        }
    except ExportError as error:
        raise SiteError(f"ITI shifts what the output matrix of attention takes in, but {error}") from error
