"""EditBank: the edits that a served model holds, and which of them each token of the current batch asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sealign.edits.edit import Edit
from sealign.edits.layer_edit import LayerEdit
from sealign.errors import ServingError
from sealign.serving.edit_slots import BankSize, SiteBank
from sealign.serving.rows import Rows, rows_by_slot


class EditBank:
    """The edits that a served model holds, and which of them each token of the current batch asks for.

    On an accelerator, where a graph that was captured once serves every batch, all edits are computed by the same
    operations on buffers that are made here; afterwards only their contents change. On a CPU nothing is captured, and
    each edit is computed alone, for the tokens that ask for it.

    Args:
        modules: dotted paths of the modules that can be edited.
        width: d.
        tokens: the most tokens of a batch.
        size: how much room each module has.
        device: of the buffers.
        captured: whether graphs are captured; by default they are, but on a CPU.

    Example:
        >>> bank = EditBank(["model.layers.0.mlp"], 8, 16, BankSize(edits=2, rank=4))
        >>> bank.free
        2
    """

    def __init__(
        self,
        modules: Sequence[str],
        width: int,
        tokens: int,
        size: BankSize,
        device: str | torch.device = "cpu",
        *,
        captured: bool | None = None,
    ) -> None:
        place = torch.device(device)
        self.size = size
        self._width = width
        self._modules = list(modules)
        self._sites: dict[str, SiteBank] = {}
        if place.type != "cpu" if captured is None else captured:
            self._sites = {module: SiteBank(width, size, place) for module in modules}
        self._alone: dict[str, dict[int, Any]] = {module: {} for module in modules}
        self._token_slots = torch.zeros(tokens, dtype=torch.int64, device=place)
        self._rows: list[tuple[int, Rows]] = []
        self._slots: dict[str, int] = {}

    @property
    def hashes(self) -> list[str]:
        """Hashes of the edits in it."""
        return list(self._slots)

    @property
    def free(self) -> int:
        """How many more edits it has room for."""
        return self.size.edits - len(self._slots)

    def load(self, edit: Edit) -> str:
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
            if self._sites:
                self._sites[module].load(slot, edit.projections[layer], edit.settings)
            else:
                layer_edit = LayerEdit(edit.projections[layer], edit.settings)
                self._alone[module][slot] = partial(layer_edit, strength=edit.settings.strength)
        self._slots[edit_hash] = slot
        return edit_hash

    def _check(self, edit: Edit) -> None:
        settings = edit.settings
        if not self.free:
            raise ServingError(f"all {self.size.edits} places for edits are taken; unload one, or raise --max-edits")
        if settings.normalization == "feature":
            raise ServingError(
                "the edit is rescaled per feature over the tokens of a sequence, which cached decoding never sees "
                "together; fit or load it with normalization 'token' or 'none'"
            )
        missing = [module for module in edit.modules if module not in self._alone]
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
        for site in self._sites.values():
            site.clear(slot)
        for edits in self._alone.values():
            edits.pop(slot, None)
        del self._slots[edit_hash]

    def choose(self, requests: Sequence[tuple[str | None, int]]) -> None:
        """Say which edit each token of the next batch asks for.

        Args:
            requests: the hash of an edit, or None, and the number of tokens, in the order of the batch.

        Raises:
            ServingError: a hash is not in the bank, so that the batch must not run.
        """
        chosen = [(self._slot(name) if name else 0, count) for name, count in requests]
        if not self._sites:
            self._rows = rows_by_slot(chosen)
            return
        slots, counts = torch.tensor(chosen, dtype=torch.int64).T
        per_token = torch.repeat_interleave(slots, counts)
        self._token_slots[: len(per_token)].copy_(per_token)
        self._token_slots[len(per_token) :].zero_()

    def choose_none(self) -> None:
        """Say that the next batch has no edited token, as a warm-up has none."""
        self._rows = []
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
        module = self._modules[site]
        if self._sites:
            tokens.copy_(self._sites[module](tokens, self._token_slots[: tokens.shape[0]]))
        for rows, edit in self._asked(module):
            tokens[rows] = edit(tokens[rows])

    @torch.no_grad()
    def edit_stream(self, site: int, hidden: Float[Tensor, "t d"], residual: Float[Tensor, "t d"]) -> None:
        """Edit the residual stream, the sum of two tensors, by changing the first in place.

        Args:
            site: number of the module, in the order given.
            hidden: (t, d), what the layer adds.
            residual: (t, d), what it adds to.
        """
        module = self._modules[site]
        if self._sites:
            stream = hidden.float() + residual.float()
            hidden.add_(self._sites[module](stream, self._token_slots[: hidden.shape[0]]) - stream)
        for rows, edit in self._asked(module):
            stream = hidden[rows].float() + residual[rows].float()
            hidden[rows] += (edit(stream) - stream).to(hidden.dtype)

    def _asked(self, module: str) -> Iterator[tuple[Rows, Any]]:
        """The edits of a module that tokens of this batch ask for, and the rows of these."""
        edits = self._alone[module]
        return ((rows, edits[slot]) for slot, rows in self._rows if slot in edits)


def size_for(edits: Mapping[str, Edit], *, at_least: int = 1) -> BankSize:
    """Return the room that edits need.

    Args:
        edits: by name.
        at_least: for so many edits, if more than are given.
    """
    ranks = [p.rank_positive + p.rank_negative for edit in edits.values() for p in edit.projections.values()]
    maps = sorted({edit.settings.feature_map for edit in edits.values()} - {"identity"})
    return BankSize(max(at_least, len(edits), 1), max([1, *ranks]), tuple(maps))
