"""TokenRanges: mean activations over ranges of tokens, for all reads of a batch at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sealign.fitting.sequences import Read


@dataclass(frozen=True)
class TokenRanges:
    """Ranges of tokens to average, by tensor operations for all reads of a batch: on a GPU, one kernel each is slow.

    Attributes:
        rows: Row of each read in the batch, (n,).
        starts, stops: Ends of its range, counted from the beginning of the sequence, (n,).
        shared: Number of tokens of the shared prefix, which the rows leave out.
        slots: Partition of the reads, with each row at most once in a part.
    """

    rows: Tensor
    starts: Tensor
    stops: Tensor
    shared: int
    slots: list[list[int]]

    @classmethod
    def of(cls, reads: Sequence[tuple[int, Read]], shared: int) -> TokenRanges:
        """Build the ranges of a batch.

        Args:
            reads: Row and read, for each read of the batch.
            shared: Number of tokens of the shared prefix.
        """
        slots: list[list[int]] = []
        seen: dict[int, int] = {}
        for index, (row, _) in enumerate(reads):
            number = seen[row] = seen.get(row, -1) + 1
            if number == len(slots):
                slots.append([])
            slots[number].append(index)
        rows, starts, stops = zip(*((row, read.start, read.stop) for row, read in reads), strict=True)
        return cls(torch.tensor(rows), torch.tensor(starts), torch.tensor(stops), shared, slots)

    def means(self, hidden: Float[Tensor, "b t d"], before: Float[Tensor, "p d"]) -> Float[Tensor, "n d"]:
        """Return the mean activation of each read in float32, (n, d).

        Args:
            hidden: Activations of the rows of the batch, without the shared prefix, (b, t, d).
            before: Activations of the shared prefix, (p, d).
        """
        rows, starts, stops = (each.to(hidden.device) for each in (self.rows, self.starts, self.stops))
        if bool((self.stops - self.starts == 1).all()):
            own = hidden[rows, (starts - self.shared).clamp(min=0)].float()
            inside = (starts < self.shared)[:, None]
            return torch.where(inside, before[starts.clamp(max=self.shared - 1)], own) if self.shared else own
        sums = hidden.new_zeros(len(rows), hidden.shape[-1], dtype=torch.float32)
        positions = torch.arange(hidden.shape[1], device=hidden.device) + self.shared
        for slot in self.slots:
            chosen = torch.tensor(slot, device=hidden.device)
            inside = (positions >= starts[chosen, None]) & (positions < stops[chosen, None])
            sums[chosen] = (hidden[rows[chosen]].float() * inside[..., None]).sum(1)
        if self.shared and bool((self.starts < self.shared).any()):
            # The range can begin, or end, inside the shared prefix.
            totals = torch.cat([before.new_zeros(1, before.shape[1]), before]).double().cumsum(0)
            sums += (totals[stops.clamp(max=self.shared)] - totals[starts.clamp(max=self.shared)]).float()
        return sums / (stops - starts)[:, None]
