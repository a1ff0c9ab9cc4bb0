"""AdamW with its state in 8 bits, in memory that is paged out to the host when the device is full, or both.

8-bit Optimizers via Block-wise Quantization, Dettmers, Lewis, Shleifer & Zettlemoyer, ICLR 2022,
https://arxiv.org/abs/2110.02861 · QLoRA: Efficient Finetuning of Quantized LLMs, Dettmers, Pagnoni, Holtzman &
Zettlemoyer, NeurIPS 2023, https://arxiv.org/abs/2305.14314

    def configure_optimizers(self):
        return paged_adamw(self.parameters(), lr=2e-4)        # or optimizer=paged_adamw on the command line

The arithmetic is that of bitsandbytes (`pip install 'lightning_peft[quant]'`). Here is what makes a run resume exactly:
state is paged again after loading, and a state that the optimizer cannot go on with is refused.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_peft.checkpoint import BEGIN_ANEW, HIDDEN, CheckpointError, check_optimizer
from lightning_peft.groups import lora_plus_groups as lora_plus_groups

log = logging.getLogger("lightning_peft")

PAGED_DEVICES = ("cuda", "xpu")
PAGED_FROM = 100_000
"""Elements of the smallest tensor that is paged."""
SMALL, BLOCK = 4096, 256
"""Tensors with fewer elements keep 32 bits; a block of 8-bit numbers shares one fp32 scale."""
MOMENTS = ("state1", "state2")  # m and v, each of the parameter's shape


# ------------------------------------------------------------------ the optimizers
def paged_adamw(
    params: Iterable[Any],
    lr: float = 1e-3,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> Optimizer:
    """w <- (1 - lr wd) w - lr m^ / (sqrt(v^) + eps); m, v in fp32, in pages that the host takes when the GPU is full

    m <- b1 m + (1 - b1) g, v <- b2 v + (1 - b2) g^2; m^ = m / (1 - b1^t), v^ = v / (1 - b2^t); m, v of w's shape

    8 bytes of state for each trained number, whatever the dtype of w. Only tensors of 100,000 elements and more are
    paged (a LoRA `a` of rank 8 on width 4096 is not), on CUDA and XPU; elsewhere none is, which is said once.
    params: parameters, or groups of them with settings of their own; those without a gradient are passed over.
    """
    return adamw("PagedAdamW", params, lr, betas, eps, weight_decay, optim_bits=32, is_paged=True)


def paged_adamw_8bit(
    params: Iterable[Any],
    lr: float = 1e-3,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> Optimizer:
    """`adamw_8bit` in the pages of `paged_adamw`: 2 + 2 * 4 / 256 bytes for each trained number"""
    return adamw("PagedAdamW8bit", params, lr, betas, eps, weight_decay, optim_bits=8, is_paged=True)


def adamw_8bit(
    params: Iterable[Any],
    lr: float = 1e-3,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> Optimizer:
    """`paged_adamw`'s step with m, v ~ Q[code] * absmax, code: uint8 of w's shape, absmax: fp32 (ceil(n / 256),)

    Q: the 256 levels of a dynamic map, signed for m, unsigned for v; each block of 256 numbers has its own absmax.

    2 + 2 * 4 / 256 = 2.03 bytes of state for each trained number. Tensors of fewer than 4096 elements (biases, norms,
    adapters of a small rank) keep 32 bits: 8 bytes. Never paged.
    """
    return adamw("AdamW8bit", params, lr, betas, eps, weight_decay, optim_bits=8, is_paged=False)


def adamw(
    name: str,
    params: Iterable[Any],
    lr: float,
    betas: Sequence[float],
    eps: float,
    weight_decay: float,
    **memory: Any,
) -> Optimizer:
    """AdamW of bitsandbytes under a name of its own. memory: optim_bits, is_paged."""
    for key, value in {"lr": lr, "eps": eps, "weight_decay": weight_decay}.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{key}={value}: it must be a finite number that is not negative.")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas={betas}: give two numbers from 0 to below 1, such as (0.9, 0.999).")
    return kind(name)(params, lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, **memory)


@cache
def kind(name: str) -> Any:
    """The class, made when it is first needed: bitsandbytes is an extra."""
    from lightning_peft.kernels import bitsandbytes_or_raise

    base = bitsandbytes_or_raise(name).optim.AdamW
    return type(name, (ResumableState, base), {"__module__": __name__, "__doc__": f"{name} through bitsandbytes"})


# ------------------------------------------------------------------ state that comes back
class Waiting:
    """A loaded moment on the host until the next step: nobody moves it to the device whole, where it may not fit."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class ResumableState:
    """Put before an optimizer of bitsandbytes in the bases. What is saved are plain tensors; what is loaded is checked
    and, where the optimizer is paged, becomes pages again at the next step.
    """

    is_paged: bool
    state: dict[Any, dict[str, Any]]
    param_groups: list[dict[str, Any]]
    page_mng: Any

    def get_state_buffer(self, p: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Zeros of the parameter's shape, contiguous: the kernels go through memory in order."""
        if not self._pages(p):
            return torch.zeros(p.shape, dtype=dtype, device=p.device)
        from bitsandbytes import functional

        pages = functional.get_paged(*p.shape, dtype=dtype, device=p.device)
        functional.fill(pages, 0)  # and wait: the host may write now
        self.page_mng.paged_tensors.append(pages)
        return pages

    def prefetch_state(self, p: Tensor) -> None:
        """Called before each update of a parameter. Whatever loaded or moved the state since then, it is paged here."""
        if self.is_paged and p.device.type not in PAGED_DEVICES:
            say_unpaged(p.device.type)
        own = self.state[p]
        for key in MOMENTS:
            waits = isinstance(own[key], Waiting)
            if waits or (self._pages(p) and not getattr(own[key], "is_paged", False)):
                loaded = own[key].tensor if waits else own[key]
                own[key] = self.get_state_buffer(p, loaded.dtype).copy_(loaded)
        super().prefetch_state(p)  # type: ignore[misc]

    def state_dict(self) -> dict[str, Any]:
        return plain(super().state_dict())  # type: ignore[misc]

    def load_state_dict(self, state_dict: Mapping[str, Any], move_to_device: bool = True) -> None:
        """Go on with a state of the same kind; any other is refused before anything is changed."""
        check_optimizer(self, state_dict)
        self._check_moments(state_dict)
        super().load_state_dict(plain(state_dict), move_to_device=False)  # type: ignore[misc]
        for p, own in self.state.items():
            for key, value in own.items() if isinstance(p, Tensor) else ():
                if key in MOMENTS and self._pages(p):
                    own[key] = Waiting(value)
                elif isinstance(value, Tensor) and move_to_device:
                    own[key] = value.to(p.device)

    def _pages(self, p: Tensor) -> bool:
        return self.is_paged and p.device.type in PAGED_DEVICES and p.numel() >= PAGED_FROM

    def _check_moments(self, given: Mapping[str, Any]) -> None:
        """A state of another shape or width would be written past its end, or go on in its own width, silently."""
        numbers = [number for group in given["param_groups"] for number in group["params"]]
        own = [(g, i, p) for g, group in enumerate(self.param_groups) for i, p in enumerate(group["params"])]
        for number, (g, i, p) in zip(numbers, own, strict=False):  # other counts are refused by bitsandbytes
            entry = given["state"].get(number, {})
            saved = entry.get(HIDDEN, entry).get(MOMENTS[0])
            config = self.get_config(g, i, self.param_groups[g])  # type: ignore[attr-defined]
            bits = config["optim_bits"] if p.numel() >= config["min_8bit_size"] else 32
            if saved is not None and (saved.shape != p.shape or 8 * saved.itemsize != bits):
                raise CheckpointError(
                    f"The checkpoint holds the state of parameter {number} as {tuple(saved.shape)} in "
                    f"{8 * saved.itemsize} bits; {type(self).__name__} keeps {tuple(p.shape)} in {bits} bits. Resume "
                    f"with the optimizer of the checkpoint (8 bits: adamw_8bit, paged_adamw_8bit; 32 bits: "
                    f"paged_adamw), {BEGIN_ANEW}"
                )


def plain(value: Any) -> Any:
    """A state without marks of pages: they are saved with a tensor, and would be believed of the memory it is loaded
    to.
    """
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, Waiting):
        return value.tensor
    return value.detach() if isinstance(value, Tensor) else value


@cache
def say_unpaged(device: str) -> None:
    """Once in a process for each kind of device."""
    where = ", ".join(PAGED_DEVICES)
    log.warning("A paged optimizer pages on %s only; on %s its state stays in ordinary memory.", where, device)


# ------------------------------------------------------------------ arithmetic
def state_bytes(name: str, numel: int | Sequence[int], itemsize: int = 4) -> int:
    """Bytes that an optimizer of conf/optimizer keeps for one parameter.

    numel: the number of elements, or the shape; Adafactor needs the shape of a matrix, else it is taken for a vector.
    itemsize: bytes of one element of the parameter, which torch's optimizers take for their state too.
    """
    shape = (numel,) if isinstance(numel, int) else tuple(numel)
    n = math.prod(shape)
    factors = math.prod(shape[:-1]) + math.prod(shape[:-2] + shape[-1:]) if len(shape) > 1 else n
    eight = 2 * n + 2 * 4 * -(-n // BLOCK) if n >= SMALL else 8 * n
    step = 4  # torch counts in an fp32 number for each parameter
    known = {
        "adafactor": itemsize * factors + step,
        "adam": 2 * itemsize * n + step,
        "adamw": 2 * itemsize * n + step,
        "adamw_8bit": eight,
        "paged_adamw": 8 * n,
        "paged_adamw_8bit": eight,
        "sgd": itemsize * n,  # with momentum
    }
    if name not in known:
        raise ValueError(f"The state of optimizer {name!r} is not known. Known: {', '.join(known)}.")
    return known[name]
