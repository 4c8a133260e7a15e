"""The contrast of two next-token distributions under a plausibility constraint, used by DoLa, CD and ICD."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

IMPLAUSIBLE = -1000.0
"""Score of an implausible token, as in the released code of DoLa and ICD; finite, so that sums of scores are finite."""

Plausibility = Annotated[float, Field(ge=0, le=1, examples=[0.1])]
"""alpha in [0, 1]: a token is plausible if its probability is at least alpha times the highest probability."""

Weight = Annotated[float, Field(gt=0, examples=[1])]
"""Weight of the expert's log-probability, above 0."""


def contrast(
    expert: Float[Tensor, "... v"],
    amateur: Float[Tensor, "... v"],
    *,
    plausibility: float = 0.1,
    weight: float = 1.0,
) -> Float[Tensor, "... v"]:
    """Return the scores of contrastive decoding as logits.

    With p the distribution of the expert and q the distribution of the amateur, F(x) = weight log p(x) - log q(x) if
    p(x) >= plausibility max p, and -1000 otherwise (Li et al. 2023, arXiv 2210.15097, section 3; ``weight`` as in Zhang
    et al. 2023, arXiv 2312.15710, section 3.2). The distribution of the next token is softmax(F).

    Args:
        expert: Logits of the expert, (..., v).
        amateur: Logits of the amateur, (..., v).
        plausibility: alpha in [0, 1]; 0 makes every token plausible.
        weight: Weight of the expert's log-probability, above 0.

    Example:
        >>> contrast(torch.tensor([2.0, 1.9, -9.0]), torch.tensor([2.0, 0.0, 0.0])).argmax().item()
        1
    """
    log_p = torch.log_softmax(expert.float(), dim=-1)
    log_q = torch.log_softmax(amateur.float(), dim=-1)
    score = weight * log_p - log_q
    if plausibility <= 0:
        return score
    bound = log_p.max(dim=-1, keepdim=True).values + math.log(plausibility)
    return torch.where(log_p < bound, IMPLAUSIBLE, score)


def jensen_shannon(first: Float[Tensor, "... v"], second: Float[Tensor, "... v"]) -> Float[Tensor, "..."]:
    """Return the Jensen-Shannon divergence of two distributions in nats, in [0, log 2].

    JSD = (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2.

    Args:
        first: Logits of p, (..., v).
        second: Logits of q, (..., v).

    Example:
        >>> jensen_shannon(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 0.0])).item()
        0.0
    """
    log_p, log_q = (torch.log_softmax(logits.float(), dim=-1) for logits in (first, second))
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    divergences = [(log.exp() * (log - log_m)).sum(-1) for log in (log_p, log_q)]
    return (0.5 * (divergences[0] + divergences[1])).clamp_min(0.0)
