"""Slots for edits in a served model, and the assignment of the tokens of a batch to slots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sealign.edits.edit import Edit
from sealign.edits.layer_edit import LayerEdit
from sealign.errors import ServingError
from sealign.serving.slot_buffers import SlotBuffers, SlotSizes

TokenIndex = slice | Tensor
"""Index of the tokens of one slot in a batch."""


class EditSlots:
    """Slots for edits in a served model, and the assignment of the tokens of the current batch to slots.

    On GPUs, CUDA graphs are reused for all batches, so edits are applied from preallocated buffers whose contents are
    updated. On CPUs no graph is captured, so each edit is applied separately to its own tokens.

    Args:
        modules: Dotted paths of the modules that can be edited.
        width: Number of features d.
        max_tokens: Maximum number of tokens in a batch.
        sizes: Number and sizes of the slots.
        device: Device of the model.
        captured: Whether graphs are captured. Default: True unless the device is a CPU.

    Example:
        >>> slots = EditSlots(["model.layers.0.mlp"], 8, max_tokens=16, sizes=SlotSizes(edits=2, rank=4))
        >>> slots.free
        2
    """

    def __init__(
        self,
        modules: Sequence[str],
        width: int,
        *,
        max_tokens: int,
        sizes: SlotSizes,
        device: str | torch.device = "cpu",
        captured: bool | None = None,
    ) -> None:
        device = torch.device(device)
        self.sizes = sizes
        self._width = width
        self._modules = list(modules)
        self._buffers: dict[str, SlotBuffers] = {}
        if device.type != "cpu" if captured is None else captured:
            self._buffers = {module: SlotBuffers(width, sizes, device) for module in modules}
        self._uncaptured: dict[str, dict[int, tuple[LayerEdit, float]]] = {module: {} for module in modules}
        self._token_slots = torch.zeros(max_tokens, dtype=torch.int64, device=device)
        self._tokens_by_slot: list[tuple[int, TokenIndex]] = []
        self._slots: dict[str, int] = {}

    @property
    def hashes(self) -> list[str]:
        """Hashes of the loaded edits."""
        return list(self._slots)

    @property
    def free(self) -> int:
        """Number of free slots."""
        return self.sizes.edits - len(self._slots)

    def load(self, edit: Edit) -> str:
        """Load an edit into a free slot and return its hash; does nothing if it is already loaded.

        Args:
            edit: Edit to load.

        Raises:
            ServingError: No slot is free, or the edit does not fit into a slot.
        """
        edit_hash = edit.hash
        if edit_hash in self._slots:
            return edit_hash
        self._check(edit)
        slot = next(slot for slot in range(1, self.sizes.edits + 1) if slot not in self._slots.values())
        for layer, module in zip(edit.layers, edit.modules, strict=True):
            layer_edit = edit.layer_edits[layer]
            if self._buffers:
                self._buffers[module].load(slot, layer_edit, edit.strength)
            elif edit.strength != 0:
                self._uncaptured[module][slot] = layer_edit, edit.strength
        self._slots[edit_hash] = slot
        return edit_hash

    def _check(self, edit: Edit) -> None:
        if not self.free:
            raise ServingError(
                f"all {self.sizes.edits} slots for edits are taken; unload an edit, or restart the server with a "
                "larger --max-edits"
            )
        if not edit.is_causal:
            raise ServingError(
                "the edit is rescaled per feature, which needs the whole sequence at once and is not possible with a "
                "key-value cache; fit an edit with normalization 'token' or 'none'"
            )
        restart = "restart the server with the edit in --edit or in the folder of --edits-dir"
        missing = [module for module in edit.modules if module not in self._uncaptured]
        if missing:
            raise ServingError(f"the edit edits '{missing[0]}', for which this server has no slots; {restart}")
        if edit.feature_map not in ("identity", *self.sizes.feature_maps):
            known = ", ".join(("identity", *self.sizes.feature_maps))
            raise ServingError(
                f"the edit uses the feature map '{edit.feature_map}', but this server was started for {known}; "
                f"{restart}"
            )
        for layer, layer_edit in edit.layer_edits.items():
            if layer_edit.rank > self.sizes.rank or layer_edit.width != self._width:
                raise ServingError(
                    f"layer {layer} of the edit has width {layer_edit.width} and rank {layer_edit.rank}, but the slots "
                    f"of this server have width {self._width} and rank {self.sizes.rank}; {restart}"
                )

    def unload(self, edit_hash: str) -> None:
        """Unload an edit and free its slot.

        Args:
            edit_hash: Hash of the edit.

        Raises:
            ServingError: The edit is not loaded.
        """
        slot = self._slot(edit_hash)
        for buffers in self._buffers.values():
            buffers.clear(slot)
        for edits in self._uncaptured.values():
            edits.pop(slot, None)
        del self._slots[edit_hash]

    def select(self, requests: Sequence[tuple[str | None, int]]) -> None:
        """Set the slot of each token of the next batch.

        Args:
            requests: One pair (edit hash or None, number of tokens) per request, in the order of the batch.

        Raises:
            ServingError: An edit is not loaded. The batch must not run then.
        """
        selected = [(self._slot(edit_hash) if edit_hash else 0, count) for edit_hash, count in requests]
        if not self._buffers:
            self._tokens_by_slot = tokens_by_slot(selected)
            return
        slots, counts = torch.tensor(selected, dtype=torch.int64).reshape(-1, 2).T
        per_token = torch.repeat_interleave(slots, counts)
        self._token_slots[: len(per_token)].copy_(per_token)
        self._token_slots[len(per_token) :].zero_()

    def select_none(self) -> None:
        """Select no edit for the next batch, for example for a warm-up."""
        self._tokens_by_slot = []
        self._token_slots.zero_()

    def _slot(self, edit_hash: str) -> int:
        if edit_hash not in self._slots:
            raise ServingError(f"edit {edit_hash[:12]} is not loaded in this worker; load it before requests name it")
        return self._slots[edit_hash]

    @torch.no_grad()
    def edit_output(self, module_index: int, tokens: Float[Tensor, "t d"]) -> None:
        """Edit the output of a module in place.

        Args:
            module_index: Index of the module in the ``modules`` argument of the constructor.
            tokens: Output of the module for the current batch, (t, d).
        """
        module = self._modules[module_index]
        if self._buffers:
            tokens.copy_(self._buffers[module](tokens, self._token_slots[: tokens.shape[0]]))
        for index, layer_edit, strength in self._selected(module):
            tokens[index] = layer_edit(tokens[index], strength)

    @torch.no_grad()
    def edit_stream(self, module_index: int, hidden: Float[Tensor, "t d"], residual: Float[Tensor, "t d"]) -> None:
        """Edit the residual stream, the sum of two tensors, by changing the first tensor in place.

        Args:
            module_index: Index of the decoder layer in the ``modules`` argument of the constructor.
            hidden: Output of the layer's last module, (t, d).
            residual: Residual input, added to ``hidden``, (t, d).
        """
        module = self._modules[module_index]
        if self._buffers:
            slots = self._token_slots[: hidden.shape[0]]
            stream = hidden.float() + residual.float()
            moved = hidden + (self._buffers[module](stream, slots) - stream)
            hidden.copy_(torch.where(self._buffers[module].edited(slots), moved, hidden))
        for index, layer_edit, strength in self._selected(module):
            stream = hidden[index].float() + residual[index].float()
            hidden[index] = (hidden[index] + (layer_edit(stream, strength) - stream)).to(hidden.dtype)

    def _selected(self, module: str) -> Iterator[tuple[TokenIndex, LayerEdit, float]]:
        """Yield (token index, edit, strength) for each selected slot whose edit acts on a module."""
        edits = self._uncaptured[module]
        return ((index, *edits[slot]) for slot, index in self._tokens_by_slot if slot in edits)


def sizes_for(edits: Mapping[str, Edit], *, at_least: int = 1) -> SlotSizes:
    """Return the smallest ``SlotSizes`` that fit the given edits.

    Args:
        edits: Mapping from name to edit.
        at_least: Minimum number of slots.
    """
    maps = sorted({edit.feature_map for edit in edits.values()} - {"identity"})
    return SlotSizes(max(at_least, len(edits), 1), max([1, *(edit.rank for edit in edits.values())]), tuple(maps))


def tokens_by_slot(requests: Sequence[tuple[int, int]]) -> list[tuple[int, TokenIndex]]:
    """Return (slot, token index) pairs: a slice if the tokens are contiguous, otherwise an index tensor.

    Slot 0, which holds no edit, is left out.

    Args:
        requests: One pair (slot, number of tokens) per request, in the order of the batch.

    Example:
        >>> tokens_by_slot([(0, 2), (3, 1), (3, 4)])
        [(3, slice(2, 7, None))]
    """
    spans: dict[int, list[tuple[int, int]]] = {}
    start = 0
    for slot, count in requests:
        if slot and count:
            own = spans.setdefault(slot, [])
            if own and own[-1][1] == start:
                own[-1] = (own[-1][0], start + count)
            else:
                own.append((start, start + count))
        start += count
    return [
        (slot, slice(*own[0]) if len(own) == 1 else torch.cat([torch.arange(*span) for span in own]))
        for slot, own in spans.items()
    ]
