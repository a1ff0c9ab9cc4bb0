"""What the tests of methods share: one output per model, training, and a snapshot that sees every attribute."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import torch
import zoo
from torch import Tensor, nn

from lightning_peft.core import state


def forward(net: nn.Module, model: str, **more: Any) -> Tensor:
    """The logits of the model's standard input."""
    call = {k: v.to(dtype_of(net)) if v.is_floating_point() else v for k, v in zoo.inputs(model).items()}
    out = net(**{**call, **more})
    return out if isinstance(out, Tensor) else out.logits


def output(net: nn.Module, model: str, **more: Any) -> Tensor:
    with torch.no_grad():
        return forward(net, model, **more)


def dtype_of(net: nn.Module) -> torch.dtype:
    adapters = {id(p) for a in state.applied_to(net).values() for x in a.placements for p in x.adapter.parameters()}
    return next(p.dtype for p in net.parameters() if id(p) not in adapters)


def loss(net: nn.Module, model: str) -> Tensor:
    logits = forward(net, model).float()
    goal = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    return (logits - goal).pow(2).mean()


def train(net: nn.Module, model: str, steps: int = 3, lr: float = 1e-2) -> list[dict[str, Tensor]]:
    """AdamW with weight decay on what requires a gradient; the gradients of each step by name."""
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=lr, weight_decay=0.1)
    gradients = []
    net.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(net, model).backward()
        state.mask_gradients(net)
        gradients.append({n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None})
        optimizer.step()
        state.restore_unselected(net)
    net.eval().zero_grad()
    return gradients


@torch.no_grad()
def perturb(net: nn.Module, scale: float = 0.05, adapters_only: bool = False, seed: int = 1) -> None:
    """Move everything that trains by Gaussian noise, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for p in adapter_parameters(net) if adapters_only else state.trainable(net).values():
        p.add_(torch.randn(p.shape, generator=generator).to(p.dtype), alpha=scale)


def adapter_parameters(net: nn.Module) -> list[nn.Parameter]:
    own = {id(p): p for a in state.applied_to(net).values() for x in a.placements for p in x.adapter.parameters()}
    return list(own.values())


def tensors(net: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers (persistent or not), tied ones under each of their names."""
    named = dict(net.named_parameters(remove_duplicate=False)) | dict(net.named_buffers(remove_duplicate=False))
    return {name: tensor.detach().clone() for name, tensor in named.items()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names in both whose bits differ."""
    return {name for name in before.keys() & after.keys() if not same_bits(before[name], after[name])}


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def snapshot(net: nn.Module) -> dict[str, Any]:
    """Class, attributes, configuration, children, hooks, flags and bits of every module."""
    seen: dict[str, Any] = {}
    for name, module in net.named_modules(remove_duplicate=False):
        seen[f"{name}: class"] = type(module)
        seen[f"{name}: attributes"] = list(vars(module))
        for key, value in vars(module).items():
            seen[f"{name}: {key}"] = _frozen(value)
        seen[f"{name}: signature"] = type(module).forward if "forward" not in vars(module) else vars(module)["forward"]
    return seen


def _frozen(value: Any) -> Any:
    if isinstance(value, Tensor):
        return id(value), value.requires_grad, value.dtype, _bits(value)
    if isinstance(value, dict):
        return [(key, _frozen(item)) for key, item in value.items()]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return id(value)


def _bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return [key for key in {**a, **b} if key not in a or key not in b or a[key] != b[key]]


def reviews(folder: Path) -> Path:
    """The folder, with reviews.csv: sixty rows of a text and a label."""
    generator = random.Random(0)
    with (folder / "reviews.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for number in range(60):
            label = generator.choice(["good", "bad"])
            writer.writerow([f"{'lovely' if label == 'good' else 'horrid'} thing {number}", label])
    return folder


@torch.no_grad()
def plain_after_prefill(net: Any, method: Any, ids: Tensor, tokens: Tensor) -> Tensor:
    """Logits of `tokens` by hand: the method fills the cache with the prompt, the plain model goes on from there."""
    step = net(input_ids=ids, use_cache=True)
    hand = [step.logits[:, -1]]
    with method.enabled(net, False):
        for i in range(tokens.shape[1] - 1):
            step = net(input_ids=tokens[:, i : i + 1], past_key_values=step.past_key_values, use_cache=True)
            hand.append(step.logits[:, -1])
    return torch.stack(hand, 1)
