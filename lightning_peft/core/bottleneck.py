"""The bottleneck that adapters are made of: down, activation, up, and the sum with what the base gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core.adapter import Adapter
from lightning_peft.core.init import Draw
from lightning_peft.core.stream import edit_output

Activation = Literal["gelu", "gelu_new", "relu", "silu", "tanh", "identity"]
Init = Literal["zero", "normal", "bert"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


class Bottleneck(Adapter):
    """D(u) = W_up phi(W_dn u + b_dn) + b_up, y = h + s D(h): W_dn (m, d), W_up (d, m); 2md + m + d parameters.

    A method with weights of another form overrides `make` (parameters), `reset` and `weights`; one that acts elsewhere
    overrides `around`.
    """

    def __init__(self, width: int, bottleneck: int, activation: Activation, init: Init, scale: float = 1.0) -> None:
        super().__init__()
        self.width, self.middle = width, bottleneck
        self.activation, self.init, self.scale = activation, init, scale
        self.make()

    def make(self) -> None:
        self.down = nn.Parameter(torch.empty(self.middle, self.width))
        self.down_bias = nn.Parameter(torch.empty(self.middle))
        self.up = nn.Parameter(torch.empty(self.width, self.middle))
        self.up_bias = nn.Parameter(torch.empty(self.width))

    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """W_dn (m, d), b_dn (m,), W_up (d, m), b_up (d,) of this forward."""
        return self.down, self.down_bias, self.up, self.up_bias

    def reset(self, draw: Draw) -> None:
        """zero: Kaiming down, zero up (He et al.); normal: N(0, 0.01^2) cut at two sigma (Houlsby).

        Bert: N(0, 0.02^2).
        """
        if self.init == "zero":
            draw.kaiming_uniform(self.down)
            draw.zeros(self.up)
        else:
            fill = draw.truncated_normal if self.init == "normal" else draw.normal
            for weight in (self.down, self.up):
                fill(weight, std=0.01 if self.init == "normal" else 0.02)
        draw.zeros(self.down_bias)
        draw.zeros(self.up_bias)

    def bottleneck(self, u: Tensor) -> Tensor:  # (..., d) -> (..., d)
        """s D(u)."""
        down, down_bias, up, up_bias = (tensor.to(u.dtype) for tensor in self.weights())
        z = ACTIVATIONS[self.activation](F.linear(u, down, down_bias))
        d = F.linear(z, up, up_bias)
        return d if self.scale == 1 else self.scale * d

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.around(self.bottleneck, base, *args, **kwargs)

    def around(self, change: Callable[[Tensor], Tensor], base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Where the bottleneck acts: on what `base` gives. A method that acts elsewhere overrides this."""
        h = base(*args, **kwargs)
        return h + change(h)


class StreamBottleneck(Bottleneck):
    """y + s D(y) on the hidden states that a block returns."""

    def around(self, change: Callable[[Tensor], Tensor], base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return edit_output(lambda y: y + change(y), base(*args, **kwargs))
