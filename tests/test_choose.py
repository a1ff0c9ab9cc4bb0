"""What methods say about themselves against what they do, and the choice that is made of it."""

from typing import Any

import pytest
import torch
import zoo
from harness import forward, loss
from settings import SETTINGS, make
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_peft.core.files import save_adapter
from lightning_peft.core.method import REGISTRY
from lightning_peft.core.sites import roles

METHODS = sorted(REGISTRY)
BESIDE = [n for n in METHODS if REGISTRY[n].info.batched and REGISTRY[n].info.family != "soft prompt"]
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


def fitting(name: str) -> tuple[str, nn.Module]:
    """The first model of the zoo that the method is meant for."""
    model = "vit" if name == "vpt" else "bert"
    return model, zoo.build(model)


def adapted(name: str) -> tuple[str, nn.Module]:
    model, net = fitting(name)
    method = make(name, model)
    if name == "adapterdrop":
        method.n = 0  # with adapters in the last of two blocks alone, there is no base above them
    return model, method.apply(net)


def operations(net: nn.Module, model: str) -> int:
    """Multiplications and additions of a forward pass, those inside attention among them."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward(net, model)
    return counter.get_total_flops()


# ------------------------------------------------------------------ declared properties
@pytest.mark.parametrize("name", METHODS)
def test_overhead_is_what_is_left_after_merging(name: str) -> None:
    model, net = fitting(name)
    before = operations(net, model)
    method = make(name, model)
    method.apply(net)
    if method.info.mergeable and method.info.overhead == "none":
        method.unload(net)
        assert operations(net, model) == before
    else:
        assert method.info.overhead != "none"
        assert operations(net, model) > before


@pytest.mark.parametrize("name", METHODS)
def test_backprop_says_whether_the_backbone_is_in_the_graph(name: str) -> None:
    model, net = adapted(name)
    seen = []
    modules = {id(s.module): s.module for role, found in roles(net).items() if role in PROJECTIONS for s in found}
    for module in modules.values():
        module.register_forward_hook(lambda module, given, out: seen.append(out.requires_grad))
    loss(net, model).backward()
    assert seen
    assert any(seen) == REGISTRY[name].info.backprop


class Only(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.only = nn.Linear(12, 20, bias=False).double()

    def forward(self, x: Any) -> Any:
        return self.only(x)


@pytest.mark.parametrize("name", BESIDE)
def test_changes_that_batch_are_linear_in_each_row(name: str) -> None:
    net, x = Only(), torch.randn(5, 3, 12, dtype=torch.float64)
    before = net(x)
    method = REGISTRY[name](**{**SETTINGS[name], "targets": "only", "heads": None, "dtype": "float64"})
    method.apply(net)
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
        change = net(x) - before
        assert change.abs().max() > 1e-3
        torch.testing.assert_close(net(x[:2] + 2 * x[2:4]) - before[:2] - 2 * before[2:4], change[:2] + 2 * change[2:4])
        torch.testing.assert_close(net(x[3:4]), before[3:4] + change[3:4])


@pytest.mark.parametrize(("name", "least", "most"), [("full", 0.98, 2), ("relora", 0.1, 0.9), ("bitfit", 0, 0.2),
                                                    ("lora", 0, 0.2), ("linear_probe", 0, 0.2)])  # fmt: skip
def test_storage_is_what_a_file_holds(name: str, least: float, most: float, tmp_path: Any) -> None:
    model, net = fitting(name)
    whole = sum(p.numel() * p.element_size() for p in net.parameters())
    make(name, model).apply(net)
    save_adapter(net, tmp_path)
    share = (tmp_path / "adapter.safetensors").stat().st_size / whole
    assert least <= share <= most
    assert (REGISTRY[name].info.storage == "adapter") == (name in ("lora", "linear_probe"))
