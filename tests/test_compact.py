"""PHM, Compacter, AdaMix, (IA)^3 and SparseAdapter: dense oracles in fp64, counts, and what is particular to each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from harness import output, perturb
from settings import adapted, make
from test_counts import fresh
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_peft import Compacter, CompacterPP, PHMAdapter, load_adapter, save_adapter
from lightning_peft.core import state
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.fields import FieldError
from lightning_peft.core.hypercomplex import PHM, Rules
from lightning_peft.core.init import Draw
from lightning_peft.core.sites import TargetError


class One(nn.Module):
    """A single projection, 12 to 8."""

    def __init__(self, conv1d: bool = False) -> None:
        super().__init__()
        self.p = Conv1D(8, 12) if conv1d else nn.Linear(12, 8)
        nn.init.normal_(self.p.bias)

    def forward(self, x: Tensor) -> Tensor:  # (..., 12) -> (..., 8)
        return self.p(x)

    def dense(self, x: Tensor) -> Tensor:
        """W x + b, written out."""
        w = self.p.weight if isinstance(self.p, nn.Linear) else self.p.weight.T
        return torch.einsum("oi,...i->...o", w, x) + self.p.bias


def one(method: Any, conv1d: bool = False) -> tuple[One, Adapter, dict[str, Tensor]]:
    """One adapted projection in fp64, its adapter, and copies of the adapter's tensors as leaves."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = One(conv1d).double()
    method.apply(net)
    perturb(net, 0.4)
    adapter = state.get_applied(net).placements[0].adapter
    return net, adapter, {n: p.detach().clone().requires_grad_() for n, p in adapter.named_parameters()}


def agree(net: nn.Module, adapter: Adapter, values: dict[str, Tensor], expected: Callable[[Tensor], Tensor]) -> None:
    """Output, the gradient of x and those of the adapter's tensors, to 1e-10."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 5, 12, generator=generator, dtype=torch.float64)
    goal = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, wanted = net(mine), expected(theirs)
    torch.testing.assert_close(got, wanted, atol=1e-10, rtol=1e-10)
    (got * goal).sum().backward()
    (wanted * goal).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-10, rtol=1e-10)
    for name, p in adapter.named_parameters():
        assert p.grad is not None, name
        assert values[name].grad is not None, name
        torch.testing.assert_close(p.grad, values[name].grad, atol=1e-10, rtol=1e-10)


# ------------------------------------------------------------------ PHM, Compacter
def kron_sum(a: Tensor, b: Tensor) -> Tensor:
    """sum_i A_i kron B_i"""
    return torch.stack([torch.kron(a[i].contiguous(), b[i].contiguous()) for i in range(len(a))]).sum(0)


def gelu_new(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("init", ["zero", "glorot"])
def test_phm_is_the_sum_of_kronecker_products(conv1d: bool, init: str) -> None:
    net, adapter, v = one(PHMAdapter(targets="p", n=2, bottleneck=4, init=init, dtype="float64"), conv1d)

    def expected(x: Tensor) -> Tensor:
        h = net.dense(x)
        z = gelu_new(h @ kron_sum(v["down.rules.a"], v["down.weight"]) + v["down.bias"])
        return h + z @ kron_sum(v["up.rules.a"], v["up.weight"]) + v["up.bias"]

    agree(net, adapter, v, expected)


@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize(("rank", "n"), [(1, 2), (2, 4)])
def test_compacter_shares_its_rules_and_factors_the_rest(conv1d: bool, rank: int, n: int) -> None:
    net, adapter, v = one(Compacter(targets="p", n=n, rank=rank, bottleneck=4, dtype="float64"), conv1d)
    a = v["down.rules.a"]  # named once: that of `up` is the same

    def expected(x: Tensor) -> Tensor:
        h = net.dense(x)
        z = gelu_new(h @ kron_sum(a, v["down.left"] @ v["down.right"]) + v["down.bias"])
        return h + z @ kron_sum(a, v["up.left"] @ v["up.right"]) + v["up.bias"]

    agree(net, adapter, v, expected)


@pytest.mark.parametrize("rank", [None, 1, 3])
@pytest.mark.parametrize(("d_in", "d_out"), [(12, 8), (8, 12), (96, 48)])
@pytest.mark.parametrize("tokens", [1, 50])
def test_built_or_factor_by_factor_is_the_same(rank: int | None, d_in: int, d_out: int, tokens: int) -> None:
    layer = PHM(d_in, d_out, Rules(4, 0.5), rank).double()
    layer.reset(Draw(0, "layer"))
    x = torch.randn(tokens, d_in, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(layer.products(x), x @ layer.matrix(), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(layer(x), x @ layer.matrix() + layer.bias, atol=1e-12, rtol=1e-12)


def test_the_way_that_costs_less_is_taken() -> None:
    def flops(call: Callable[[Tensor], Tensor], x: Tensor) -> int:
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call(x)
        return counter.get_total_flops()

    for rank in (None, 1, 8):
        for d_in, d_out in ((768, 24), (24, 768)):
            layer = PHM(d_in, d_out, Rules(4, 0.01), rank)
            for x in (torch.zeros(1, d_in), torch.zeros(4096, d_in)):
                ways = flops(layer.products, x), flops(lambda x: x @ layer.matrix(), x)  # noqa: B023
                assert flops(layer, x) == min(ways), (rank, d_in, x.shape, ways)


PHM_COUNTS = [
    ("t5-base", Compacter(heads=None), 48 * 2_376 + 64),
    ("t5-base", Compacter(norms=True, heads=None), 161_728),
    ("t5-base", CompacterPP(norms=True, heads=None), 104_704),
    ("t5-base", PHMAdapter(n=12, norms=True, heads=None), 48 * (2 * (768 * 24 // 12 + 12**3) + 768 + 24) + 47_616),
]


@pytest.mark.parametrize(("model", "method", "count"), PHM_COUNTS, ids=lambda v: str(getattr(v, "info", v))[:30])
def test_counts_of_the_paper(model: str, method: Any, count: int) -> None:
    net = method.apply(fresh(model))
    assert state.describe(net)["trainable"] == count
    share = {161_728: 0.073, 104_704: 0.047, 398_976: 0.179}  # table 1, in percent of T5-base
    if count in share:
        assert round(100 * count / 222_903_552, 3) == share[count]


def test_compacter_acts_after_attention_and_feed_forward_and_not_after_cross_attention() -> None:
    net, _ = adapted("compacter", "t5")
    names = [p.site for p in state.get_applied(net).placements]
    assert len(names) == 2 * 5  # two encoder blocks, three of the decoder
    assert not any("EncDecAttention" in name for name in names)
    plus, _ = adapted("compacter_pp", "t5")
    assert all("wo" in p.site for p in state.get_applied(plus).placements)


def test_one_set_of_rules_is_trained_saved_and_copied_once(tmp_path: Path) -> None:
    net, _ = adapted("compacter", "bert")
    named = [n for n in state.saved(net) if n.endswith("rules.a")]
    assert len(named) == 1
    twin = copy.deepcopy(net)
    rules = {id(m) for m in twin.modules() if isinstance(m, Rules)}
    assert len(rules) == 1
    assert rules.isdisjoint({id(m) for m in net.modules()})
    perturb(net)
    save_adapter(net, tmp_path / "a")
    fresh_one = zoo.build("bert")
    load_adapter(fresh_one, tmp_path / "a")
    assert torch.equal(output(fresh_one, "bert"), output(net, "bert"))
    apart, _ = adapted("phm", "bert")
    assert sum(n.endswith("rules.a") for n in state.saved(apart)) == 2 * 4


def test_the_codes_start_is_near_the_base_and_not_equal_to_it() -> None:
    expected = output(zoo.build("bert"), "bert")
    for name, std in (("compacter", 1e-4), ("phm", 0.01)):
        net, _ = adapted(name, "bert", init="glorot", std=std)
        out = output(net, "bert")
        assert torch.allclose(out, expected, atol=1e-2)
        layer = next(m for m in net.modules() if isinstance(m, PHM))
        assert 0.3 * std < layer.rules.a.std() < 3 * std
        with torch.no_grad():
            layer.rules.a.add_(1.0)  # the other factors are no zeros
        assert not torch.allclose(output(net, "bert"), expected, atol=1e-6)


def test_widths_that_n_does_not_divide() -> None:
    with pytest.raises(TargetError, match="n=5 does not divide the 32 features"):
        make("compacter", "bert", n=5, bottleneck=10).apply(zoo.build("bert"))
    with pytest.raises(TargetError, match="n=4 does not divide"):
        make("phm", "bert", bottleneck=6).apply(zoo.build("bert"))
    for bad in ({"bottleneck": 0}, {"n": 0}, {"std": 0.0}, {"rank": 0}):
        with pytest.raises(FieldError, match="above 0"):
            Compacter(**bad)
