"""EditBank: many edits of a model in buffers that stay where they are, and one of them chosen for each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sealign.edit import SpectralEdit
from sealign.errors import ServingError
from sealign.feature_maps import get_feature_map
from sealign.projection import COMBINATION_WEIGHTS, Projection
from sealign.record import EditSettings

_NONLINEAR_WEIGHTS = {
    "both": (1.0, 1.0, 1.0),
    "positive": (1.0, 0.0, 0.0),
    "negative": (0.0, 1.0, 0.0),
    "average": (0.5, 0.5, 0.0),
    "reversed": (1.0, 1.0, 1.0),
}
"""With a feature map y = a kept + b dropped - c Phi^-1(mu), the last where centred: (a, b, c) by combination."""


@dataclass(frozen=True)
class BankSize:
    """How much room an edit bank has.

    Attributes:
        edits: how many edits it holds at once, at least 1.
        rank: the largest k+ + k- of a layer, at least 1.
        feature_maps: names of the maps, other than the identity, that its edits may use.
    """

    edits: int
    rank: int
    feature_maps: tuple[str, ...] = ()


class SiteBank:
    """The edits of one module: all their factors side by side, and for each slot what picks its own.

    With F the (d, slots r) matrix of all factors and w the row of a token's slot, which is zero outside that slot's own
    columns, a linear edit is x + a z + F (w * (F^T z)), z = x - mu: the same operations whatever the tokens ask for, so
    that a graph which was captured once serves every batch. Slot 0 is no edit.

    Args:
        width: d.
        size: how much room it has.
        device: of the buffers, which are float32.
    """

    def __init__(self, width: int, size: BankSize, device: torch.device) -> None:
        slots, columns = size.edits + 1, (size.edits + 1) * size.rank
        self._rank = size.rank
        self._maps = size.feature_maps

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device)

        self._factors = zeros(width, columns)
        self._linear = zeros(slots, columns)
        self._positive = zeros(slots, columns)
        self._negative = zeros(slots, columns)
        self._mean = zeros(slots, width)
        # For each slot: strength, whether rescaled and a; number of the map, and the weights of its three parts.
        self._settings = zeros(slots, 3)
        self._map = zeros(slots, 1)
        self._parts = zeros(3, slots, 1)
        # A graph that was captured on an accelerator has to serve every edit; elsewhere, what none uses is left out.
        self._captured = device.type != "cpu"
        self._shifted: set[int] = set()

    def load(self, slot: int, projection: Projection, settings: EditSettings) -> None:
        """Write one edit's factors into a slot; the buffers keep their addresses."""
        self.clear(slot)
        if settings.combine == "reversed" and settings.feature_map != "identity":
            projection = projection.reversed()
        start = slot * self._rank
        middle, end = start + projection.rank_positive, start + projection.rank_positive + projection.rank_negative
        self._factors[:, start:middle] = projection.positive
        self._factors[:, middle:end] = projection.negative
        if projection.mean is not None:
            self._mean[slot] = projection.mean
        self._settings[slot, 0] = settings.strength
        self._settings[slot, 1] = float(settings.normalization == "token")
        if settings.feature_map == "identity":
            scale, keep, drop = COMBINATION_WEIGHTS[settings.combine]
            self._settings[slot, 2] = scale
            if scale or projection.mean is not None:
                self._shifted.add(slot)
            self._linear[slot, start:middle] = keep
            self._linear[slot, middle:end] = drop
            return
        self._shifted.add(slot)
        self._map[slot] = 1.0 + self._maps.index(settings.feature_map)
        self._positive[slot, start:middle] = 1.0
        self._negative[slot, middle:end] = 1.0
        kept, dropped, origin = _NONLINEAR_WEIGHTS[settings.combine]
        weights = (kept, dropped, origin if projection.mean is not None else 0.0)
        self._parts[:, slot, 0] = torch.tensor(weights, device=self._parts.device)

    def clear(self, slot: int) -> None:
        """Make a slot edit nothing."""
        columns = slice(slot * self._rank, (slot + 1) * self._rank)
        self._factors[:, columns] = 0.0
        for buffer in (self._linear, self._positive, self._negative, self._mean, self._settings, self._map):
            buffer[slot] = 0.0
        self._parts[:, slot] = 0.0
        self._shifted.discard(slot)

    def __call__(self, tokens: Float[Tensor, "t d"], slots: Int[Tensor, " t"]) -> Float[Tensor, "t d"]:
        """Return each token as its slot edits it, in the type it came in; those of slot 0 bit for bit.

        Args:
            tokens: activations; computed in float32.
            slots: of each token.
        """
        x = tokens.float()
        strength, rescaled, scale = torch.split(self._settings[slots], 1, dim=-1)
        if self._captured or self._shifted:
            y = self._shifted_edit(x, slots, scale)
        else:
            y = torch.addmm(x, (x @ self._factors).mul_(self._linear[slots]), self._factors.T)
        before, after = (torch.linalg.vector_norm(part, dim=-1, keepdim=True) for part in (x, y))
        # Where y is zero it stays so, at whatever ratio that is finite.
        ratio = torch.lerp(torch.ones_like(before), before / after.clamp_min(1e-20), rescaled)
        edited = torch.lerp(x, y * ratio, strength)
        return torch.where(slots[:, None] > 0, edited.to(tokens.dtype), tokens)

    def _shifted_edit(self, x: Tensor, slots: Tensor, scale: Tensor) -> Tensor:
        """Y where an edit has a mean, a multiple of z or a feature map."""
        mean = self._mean[slots]
        z = x - mean
        y = torch.addmm(x + scale * z, (z @ self._factors).mul_(self._linear[slots]), self._factors.T)
        for number, name in enumerate(self._maps, start=1):
            y = torch.where(self._map[slots] == number, self._nonlinear(name, x, mean, slots), y)
        return y

    def _nonlinear(self, name: str, x: Tensor, mean: Tensor, slots: Tensor) -> Tensor:
        phi = get_feature_map(name)
        features = phi.forward(x) - mean
        along = features @ self._factors
        kept = phi.inverse(mean + (along * self._positive[slots]) @ self._factors.T, x)
        dropped = phi.inverse(mean + features - (along * self._negative[slots]) @ self._factors.T, x)
        weights = self._parts[:, slots]
        return weights[0] * kept + weights[1] * dropped - weights[2] * phi.inverse(mean, x)


class EditBank:
    """The edits that a served model holds, and which of them each token of the current batch asks for.

    Every buffer is made here, before a model is compiled or a graph captured; afterwards only contents change.

    Args:
        modules: dotted paths of the modules that can be edited.
        width: d.
        tokens: the most tokens of a batch.
        size: how much room each module has.
        device: of the buffers.

    Example:
        >>> bank = EditBank(["model.layers.0.mlp"], 8, 16, BankSize(edits=2, rank=4))
        >>> bank.free
        2
    """

    def __init__(
        self, modules: Sequence[str], width: int, tokens: int, size: BankSize, device: str | torch.device = "cpu"
    ) -> None:
        place = torch.device(device)
        self.size = size
        self._width = width
        self._sites = {module: SiteBank(width, size, place) for module in modules}
        self._ordered = list(self._sites.values())
        self._token_slots = torch.zeros(tokens, dtype=torch.int64, device=place)
        self._slots: dict[str, int] = {}
        self._edits_now = False

    @property
    def hashes(self) -> list[str]:
        """Hashes of the edits in it."""
        return list(self._slots)

    @property
    def free(self) -> int:
        """How many more edits it has room for."""
        return self.size.edits - len(self._slots)

    def load(self, edit: SpectralEdit) -> str:
        """Put an edit into a free slot, and return its hash.

        Raises:
            ServingError: no slot is free, or the edit does not fit; says what would.
        """
        edit_hash = edit.hash  # which reads every factor
        if edit_hash in self._slots:
            return edit_hash
        self._check(edit)
        slot = next(slot for slot in range(1, self.size.edits + 1) if slot not in self._slots.values())
        for layer, module in zip(edit.layers, edit.modules, strict=True):
            self._sites[module].load(slot, edit.projections[layer], edit.settings)
        self._slots[edit_hash] = slot
        return edit_hash

    def _check(self, edit: SpectralEdit) -> None:
        settings = edit.settings
        if not self.free:
            raise ServingError(f"all {self.size.edits} places for edits are taken; unload one, or raise --max-edits")
        if settings.normalization == "feature":
            raise ServingError(
                "the edit is rescaled per feature over the tokens of a sequence, which cached decoding never sees "
                "together; fit or load it with normalization 'token' or 'none'"
            )
        missing = [module for module in edit.modules if module not in self._sites]
        if missing:
            raise ServingError(
                f"the edit acts on '{missing[0]}', for which this server has no place; name the edit when the server "
                "starts, or put it in the folder of --edits-dir before"
            )
        if settings.feature_map not in ("identity", *self.size.feature_maps):
            raise ServingError(
                f"the edit uses the feature map '{settings.feature_map}', for which this server was not started; name "
                "the edit when the server starts, or put it in the folder of --edits-dir before"
            )
        for layer, projection in edit.projections.items():
            rank = projection.rank_positive + projection.rank_negative
            if rank > self.size.rank or projection.width != self._width:
                raise ServingError(
                    f"layer {layer} of the edit is {projection.width} wide and of rank {rank}, but this server has "
                    f"places {self._width} wide and of rank {self.size.rank}; restart it with the edit in --edits-dir"
                )

    def unload(self, edit_hash: str) -> None:
        """Take an edit out; its slot is free at once.

        Raises:
            ServingError: there is no such edit.
        """
        slot = self._slot(edit_hash)
        for site in self._ordered:
            site.clear(slot)
        del self._slots[edit_hash]

    def choose(self, requests: Sequence[tuple[str | None, int]]) -> None:
        """Say which edit each token of the next batch asks for.

        Args:
            requests: the hash of an edit, or None, and the number of tokens, in the order of the batch.

        Raises:
            ServingError: a hash is not in the bank, so that the batch must not run.
        """
        chosen = [(self._slot(name) if name else 0, count) for name, count in requests]
        self._edits_now = any(slot for slot, _ in chosen)
        if not self._edits_now and self._token_slots.device.type == "cpu":
            return  # nothing reads the slots then
        slots, counts = torch.tensor(chosen, dtype=torch.int64).T
        per_token = torch.repeat_interleave(slots, counts)
        self._token_slots[: len(per_token)].copy_(per_token)
        self._token_slots[len(per_token) :].zero_()

    def choose_none(self) -> None:
        """Say that the next batch has no edited token, as a warm-up has none."""
        self._edits_now = False
        self._token_slots.zero_()

    def _slot(self, edit_hash: str) -> int:
        if edit_hash not in self._slots:
            raise ServingError(f"edit {edit_hash[:12]} is not loaded here; load it before requests name it")
        return self._slots[edit_hash]

    @torch.no_grad()
    def edit(self, site: int, tokens: Float[Tensor, "t d"]) -> None:
        """Edit the output of a module, in place.

        Args:
            site: number of the module, in the order given.
            tokens: (t, d), the output for the batch that ``choose`` described.
        """
        if self._applies(tokens):
            tokens.copy_(self._ordered[site](tokens, self._token_slots[: tokens.shape[0]]))

    @torch.no_grad()
    def edit_stream(self, site: int, hidden: Float[Tensor, "t d"], residual: Float[Tensor, "t d"]) -> None:
        """Edit the residual stream, the sum of two tensors, by changing the first in place.

        Args:
            site: number of the module, in the order given.
            hidden: (t, d), what the layer adds.
            residual: (t, d), what it adds to.
        """
        if self._applies(hidden):
            stream = hidden.float() + residual.float()
            hidden.add_(self._ordered[site](stream, self._token_slots[: hidden.shape[0]]) - stream)

    def _applies(self, tokens: Tensor) -> bool:
        # A graph that is captured on an accelerator runs for later batches too, so there nothing may be left out.
        return self._edits_now or tokens.device.type != "cpu"


def size_for(edits: Mapping[str, SpectralEdit], *, at_least: int = 1) -> BankSize:
    """Return the room that edits need.

    Args:
        edits: by name.
        at_least: for so many edits, if more than are given.
    """
    ranks = [p.rank_positive + p.rank_negative for edit in edits.values() for p in edit.projections.values()]
    maps = sorted({edit.settings.feature_map for edit in edits.values()} - {"identity"})
    return BankSize(max(at_least, len(edits), 1), max([1, *ranks]), tuple(maps))
