"""From hidden states to one vector a text or image, and from that to classes."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

Pooling = Literal["mean", "cls", "last"]
POOLINGS = ("mean", "cls", "last")


def pool(hidden: Tensor, mask: Tensor | None, pooling: Pooling) -> Tensor:
    """hidden: (batch, time, width), mask: (batch, time) with 1 at real tokens -> (batch, width)

    mean over the real tokens, the first position ("cls"), or the last real token, whichever side the padding is on.
    Virtual tokens in front of the text, which the mask does not count, are left out.
    """
    if mask is None:
        mask = hidden.new_ones(hidden.shape[:2])
    hidden, weight = hidden[:, -mask.shape[1] :], mask.to(hidden.dtype).unsqueeze(-1)
    if pooling == "mean":
        return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
    if pooling == "cls":
        return hidden[:, 0]
    last = (mask.bool() * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
    return hidden[torch.arange(len(hidden), device=mask.device), last]


class PooledClassifier(nn.Module):
    """logits = head(dropout(pool(backbone(x)))), with `head` a Linear(hidden, num_classes)

    backbone: returns hidden states (batch, time, hidden), bare or as `.last_hidden_state`, or vectors (batch, hidden).
    """

    def __init__(
        self,
        backbone: nn.Module,
        hidden: int,
        num_classes: int,
        pooling: Pooling = "mean",
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"Unknown pooling={pooling!r}. Known: {', '.join(POOLINGS)}.")
        self.backbone, self.pooling, self.dropout = backbone, pooling, nn.Dropout(dropout)
        self.head = nn.Linear(hidden, num_classes)

    @property
    def config(self) -> Any:
        """The backbone's own, where it has one."""
        return self.backbone.config

    def forward(self, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """What the backbone takes -> (batch, num_classes)"""
        if attention_mask is not None:
            kwargs["attention_mask"] = attention_mask
        output = self.backbone(*args, **kwargs)
        hidden = getattr(output, "last_hidden_state", output)
        pooled = hidden if hidden.ndim == 2 else pool(hidden, attention_mask, self.pooling)
        return self.head(self.dropout(pooled).to(self.head.weight.dtype))
