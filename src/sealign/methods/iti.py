"""ITI, inference-time intervention: a shift of the attention heads whose activations separate the labels best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from sealign.edits.affine_edit import AffineEdit
from sealign.edits.edit import Edit
from sealign.errors import DemonstrationError, SiteError
from sealign.fitting.collected import Collected
from sealign.fitting.edit_config import EditConfig
from sealign.methods.activation_fit import LayerFit, activation_method, build_edit, chosen_layers
from sealign.methods.method import FitContext
from sealign.models.output_matrices import HEADS, OutputMatrix, read_weight, resolve_heads
from sealign.models.sites import ResolvedSite
from sealign.models.structure import text_config, unwrap_model
from sealign.progress import Track, no_progress
from sealign.spectral.signature import layer_signature

Direction = Literal["mass_mean", "probe"]
"""Direction of the shift of a head: difference of the class means, or weights of its logistic regression."""


class ITIConfig(EditConfig):
    """Settings of ITI; see ``EditConfig`` and ``CollectConfig`` for the common settings.

    Attributes:
        heads: Number K of heads to shift. Default: 48/1024 of the model's heads, as in the paper.
        alpha: Length of the shift at strength 1, in standard deviations; 15 in the paper.
        direction: Direction of the shift: ``mass_mean`` (difference of class means; best in the paper) or ``probe``
            (weights of the logistic regression).
        validation: Fraction of the demonstrations held out to rank the heads, in (0, 1).
        site: Always ``attention``, because a shift of heads is a shift of the attention output.
        layers: Layers whose heads may be selected: ``all``; ``last:L``; ``first:L``; ``signature:L`` (the L layers of
            highest signature); a fraction of the depth such as ``last:21/32``; the layer at a fraction of the depth
            such as ``at:13/32``; or indices such as ``4,5,-1``, where negative indices count from the end.
        module_pattern: Dotted path of the attention modules, with ``{layer}`` as placeholder for the layer index, such
            as ``model.layers.{layer}.self_attn``. Default: found by structure.
        seed: Seed of the split and the probes.

    Raises:
        SettingError: A value is unknown or out of range.

    Example:
        >>> ITIConfig(heads=12).alpha
        15.0
    """

    needs_rows: ClassVar[bool] = True  # for the probes

    heads: Annotated[int, Field(ge=1)] | None = None
    alpha: Annotated[float, Field(gt=0, examples=[15])] = 15.0
    direction: Direction = "mass_mean"
    validation: Annotated[float, Field(gt=0, lt=1, examples=[0.2])] = 0.2
    site: Literal["attention"] = "attention"
    layers: str | Sequence[int] = "all"

    @property
    def read_site(self) -> str:
        """Always ``heads``: the input of the attention output matrix."""
        return HEADS

    @property
    def read_pattern(self) -> str | None:
        """The module pattern of the attention modules, whose heads are read and whose outputs are edited."""
        return self.module_pattern

    def count_heads(self, model: Any) -> int:
        """Return the number K of heads to shift in a model.

        Args:
            model: Configuration of the model's text decoder.
        """
        return self.heads or max(1, round(48 / 1024 * model.num_hidden_layers * model.num_attention_heads))

    def check_available(self, demonstrations: int, layers: int, model: Any) -> None:  # noqa: ARG002
        """Raise an error if more heads are asked for than the layers have."""
        wanted, available = self.count_heads(model), layers * model.num_attention_heads
        if wanted > available:
            raise SiteError(
                f"heads is {wanted}, but layers '{self.layers}' have {available} heads; choose at most as many"
            )


def _fit(context: FitContext, collected: Collected, config: ITIConfig) -> Edit:
    """Rank the heads, and turn the shifts of the best into shifts of the attention outputs."""
    layers = chosen_layers(context, config, collected)
    settings = text_config(unwrap_model(context.model))
    heads = settings.num_attention_heads
    wanted = config.count_heads(settings)
    rows = {layer: collected.rows(layer) for layer in layers}
    positive, negative = (np.stack([_by_head(rows[layer][role], heads) for layer in layers], axis=1) for role in (1, 2))
    accuracy, probes = probe_accuracy(positive, negative, config.validation, config.seed, track=context.track)
    best = np.argsort(-accuracy.reshape(-1), kind="stable")[:wanted]
    shifts = np.zeros(positive.shape[1:])
    selected = []
    for row, head in (divmod(int(index), heads) for index in sorted(best)):
        direction = probes[row, head] if config.direction == "probe" else None
        shifts[row, head] = config.alpha * head_shift(positive[:, row, head], negative[:, row, head], direction)
        found = round(float(accuracy[row, head]), 4)
        selected.append({"layer": layers[row], "head": head, "accuracy": found})
    edited = sorted({int(index) // heads for index in best})
    matrices = {
        site.layer: site
        for site in resolve_heads(context.model, [layers[row] for row in edited], module_pattern=config.module_pattern)
    }
    fits = {
        layers[row]: _fit_layer(matrices[layers[row]], shifts[row], rows[layers[row]], config.strength)
        for row in edited
    }
    return build_edit(context, ITI.name, config, fits, learned={"selected": selected})


def _by_head(rows: Tensor, heads: int) -> NDArray[np.float64]:
    found: NDArray[np.float64] = rows.double().numpy().reshape(rows.shape[0], heads, -1)
    return found


@torch.no_grad()
def _fit_layer(
    site: ResolvedSite, shift: NDArray[np.float64], rows: tuple[Tensor, Tensor, Tensor], strength: float
) -> LayerFit:
    """Return the shift of an attention output that follows from a shift of its heads, W shift."""
    weight = read_weight(OutputMatrix(site.layer, site.path, site.module))
    # From the weight, not from the module: in a narrow type, adding its bias would round the shift away.
    moved = (weight.double() @ torch.from_numpy(shift.reshape(-1))).float()
    layer_edit = AffineEdit.constant(moved)
    bias = getattr(site.module, "bias", None)
    outputs = rows[0] @ weight.T + (0 if bias is None else bias.float().cpu())
    figures = {"shift_norm": float(moved.norm()), "signature": layer_signature(rows[1], rows[2])}
    return LayerFit(layer_edit, layer_edit.relative_change(outputs, strength), figures)


def head_shift(
    positive: NDArray[np.float64], negative: NDArray[np.float64], direction: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """Return the shift sigma theta of one head, (h,).

    theta is a unit vector, and sigma the standard deviation of all activations along it.

    Args:
        positive, negative: Activations of the head, (n, h) each.
        direction: Direction of theta, (h,). Default: mean of the positives minus mean of the negatives.

    Example:
        >>> head_shift(np.array([[2.0, 0.0], [4.0, 0.0]]), np.array([[0.0, 0.0], [0.0, 0.0]])).round(3)
        array([1.658, 0.   ])
    """
    direction = positive.mean(0) - negative.mean(0) if direction is None else direction
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
        positive, negative: Activations, (n, layers, heads, h) each.
        validation: Fraction of the demonstrations to hold out, in (0, 1).
        seed: Seed of the split.
        track: Wrapper for iterables that displays progress; see ``sealign.progress.Track``.

    Raises:
        DemonstrationError: Fewer than 2 demonstrations remain after some are held out.
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


ITI = activation_method("iti", ITIConfig, _fit, packages=("sklearn",))
"""x_h' = x_h + alpha sigma_h theta_h for the K heads whose logistic regression separates held-out labels best.

theta_h is the normalised difference of the class means (or the normalised weights of the probe), sigma_h the standard
deviation of the activations along it (Li et al. 2023, arXiv 2306.03341, section 3). Heads are read at the last
token of prompt and completion. The shift is the same at every token, as in the authors' baked-in models, where it is a
bias of the output matrix; here it is stored as the shift of the attention output, W x_h' - W x_h.
"""
