"""PHM, Compacter, AdaMix, (IA)^3 and SparseAdapter: dense oracles in fp64, counts, and what is particular to each."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boring
import hydra
import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
import zoo
from harness import output, perturb, train
from settings import adapted, make
from test_counts import fresh
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.pytorch_utils import Conv1D

from lightning_peft import (
    IA3,
    AdaMix,
    Compacter,
    CompacterPP,
    Houlsby,
    PHMAdapter,
    SparseAdapter,
    load_adapter,
    save_adapter,
    tasks,
)
from lightning_peft.core import state
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.calibration import CalibrationError
from lightning_peft.core.fields import FieldError
from lightning_peft.core.hypercomplex import PHM, Rules
from lightning_peft.core.init import Draw
from lightning_peft.core.pruned import Pruned
from lightning_peft.core.sites import TargetError
from lightning_peft.extra_loss import NoPredictionsError
from lightning_peft.methods.adamix import consistency
from lightning_peft.schema import schema
from lightning_peft.tasks import multiple_choice as choices

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]


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


# ------------------------------------------------------------------ AdaMix
def experts_of(v: dict[str, Tensor], i: int, j: int, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
    """One bottleneck of the mixture, written out."""
    h = base(x)
    z = 0.5 * (h @ v["down"][i].T + v["down_bias"][i])
    z = z * (1 + torch.erf(z * 2**0.5))
    return h + z @ v["up"][j].T + v["up_bias"][j]


@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("share", ["up", "down", "none"])
def test_adamix_draws_one_expert_of_each_side(conv1d: bool, share: str) -> None:
    net, adapter, v = one(AdaMix(targets="p", experts=3, share=share, bottleneck=4, dtype="float64"), conv1d)
    sizes = (1 if share == "down" else 3), (1 if share == "up" else 3)
    assert (len(v["down"]), len(v["up"])) == sizes
    torch.manual_seed(5)
    drawn = [int(torch.randint(count, (1,))) for count in sizes]
    torch.manual_seed(5)
    net.train()
    agree(net, adapter, v, lambda x: experts_of(v, *drawn, x, net.dense))
    for name, p in adapter.named_parameters():  # the others take part, with zeros
        chosen = drawn[0] if name.startswith("down") else drawn[1]
        assert [bool(g.any()) for g in p.grad] == [index == chosen for index in range(len(p))]


def test_adamix_averages_weights_in_eval_mode() -> None:
    net, adapter, v = one(AdaMix(targets="p", experts=3, share="none", bottleneck=4, dtype="float64"))
    mean = {name: t.mean(0, keepdim=True) for name, t in v.items()}
    net.eval()
    agree(net, adapter, v, lambda x: experts_of(mean, 0, 0, x, net.dense))


def test_experts_are_drawn_uniformly_and_apart_for_each_layer() -> None:
    net, _ = adapted("adamix", "bert", share="none")
    perturb(net)
    layers = [x.adapter for x in state.get_applied(net).placements]
    seen = []
    net.train()
    torch.manual_seed(0)
    for _ in range(200):
        drawn = []
        for layer in layers:
            down, _, up, _ = layer.weights()
            sides = (down, layer.down), (up, layer.up)
            drawn += [next(i for i in range(3) if torch.equal(t, experts[i])) for t, experts in sides]
        seen.append(drawn)
    counts = torch.tensor(seen)
    for column in counts.T:
        assert torch.bincount(column, minlength=3).min() > 40
    assert 0.2 < (counts[:, 0] == counts[:, 2]).float().mean() < 0.47
    assert 0.2 < (counts[:, 0] == counts[:, 1]).float().mean() < 0.47


ADAMIX_COUNTS = [
    ("roberta-large", AdaMix(bottleneck=16, experts=4, heads=None), 1_992_192),
    ("roberta-large", AdaMix(bottleneck=16, experts=4, heads=None).portable(), 811_392),
    ("bert-base", AdaMix(bottleneck=48, heads=None).portable(), 894_528),
]


@pytest.mark.parametrize(("model", "method", "count"), ADAMIX_COUNTS, ids=["training", "merged", "merged base"])
def test_counts_of_adamix(model: str, method: Any, count: int) -> None:
    assert state.describe(method.apply(fresh(model)))["trainable"] == count


def test_files_hold_the_average_and_are_loaded_as_one_bottleneck(tmp_path: Path) -> None:
    net, method = adapted("adamix", "llama", layers="last:1", share="none", activation="relu")
    perturb(net)
    save_adapter(net, tmp_path / "a")
    other = zoo.build("llama")
    loaded = load_adapter(other, tmp_path / "a")
    assert isinstance(loaded, Houlsby)
    assert (loaded.targets, loaded.bottleneck, loaded.layers, loaded.activation) == ("down", 6, "last:1", "relu")
    torch.testing.assert_close(output(other, "llama"), output(net, "llama"))
    assert sum(t.numel() for t in state.saved(net).values()) == 3 * sum(t.numel() for t in state.saved(other).values())


def test_consistency_is_symmetric_and_leads_each_side_to_the_other() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(6, 5, generator=g, dtype=torch.float64).float().requires_grad_() for _ in range(2))
    p, q = a.softmax(-1), b.softmax(-1)
    both = 0.5 * ((p * (p.log() - q.log())).sum() + (q * (q.log() - p.log())).sum()) / 6
    torch.testing.assert_close(consistency(a, b), both)
    consistency(a, b).backward()
    torch.testing.assert_close(a.grad, 0.5 * (p - q).detach() / 6)  # the gradient of KL(q || p) alone: p - q
    torch.testing.assert_close(b.grad, 0.5 * (q - p).detach() / 6)
    assert consistency(a, a).abs() < 1e-7


@pytest.mark.parametrize("as_dict", [False, True])
def test_the_step_returns_its_loss_and_the_consistency_of_a_second_pass(as_dict: bool, tmp_path: Path) -> None:
    passes, generators = [], []

    class Passes(boring.Says):
        def predictions(self, batch: Any) -> Any:
            generators.append(torch.get_rng_state())
            found = super().predictions(batch)
            passes.append(found[0])
            return found

        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)
            grads.append({n: p.grad.clone() for n, p in self.named_parameters() if p.grad is not None})

    grads: list[dict[str, Tensor]] = []
    module, method = Passes(dropout=0.0), AdaMix(bottleneck=4, init="normal", consistency=7.0, share="none")
    module.as_dict = as_dict
    pl.seed_everything(0, verbose=False)
    run = boring.trainer(tmp_path, [method], limit_train_batches=1)
    run.fit(module, boring.data(shuffle=False))
    assert len(passes) == 2
    assert not torch.equal(passes[0], passes[1])
    assert len(module.losses) == 1
    expected = 7.0 * consistency(*passes).detach()
    torch.testing.assert_close(run.callback_metrics["adamix/extra_loss"], expected)
    twin = Passes(dropout=0.0)
    AdaMix(bottleneck=4, init="normal", consistency=7.0, share="none").apply(twin)
    twin.train()
    batch = next(iter(boring.data(shuffle=False)))
    replayed = []
    for generator in generators[:2]:  # the same experts again
        torch.set_rng_state(generator)
        replayed.append(twin.predictions(batch)[0])
    one_, two = replayed
    assert torch.equal(one_, passes[0])
    assert torch.equal(two, passes[1])
    total = F.cross_entropy(one_, batch[1]) + 7.0 * consistency(one_, two)
    total.backward()
    for name, p in twin.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(grads[0][name], p.grad, atol=1e-6, rtol=1e-5)


def test_nothing_of_the_hook_is_left_behind(tmp_path: Path) -> None:
    module = boring.Says()
    for method in (AdaMix(bottleneck=4), AdaMix(bottleneck=4, label="other")):
        boring.trainer(tmp_path, [method], limit_train_batches=1).fit(module, boring.data())
        assert {"training_step", "predictions", "_peft_extra_losses"}.isdisjoint(vars(module))
        method.remove(module)
        pickle.dumps(module.net)


class Silent(boring.Says):
    """Has `predictions`, which the step does not use."""

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.net(input_ids=batch[0], labels=batch[1]).loss


class ByHand(boring.Says):
    """Steps of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (boring.Boring, "does not say where they are. Give it a method predictions"),
        (Silent, "did not call its predictions"),
        (ByHand, "steps of its own"),
    ],
)
def test_modules_that_do_not_show_their_logits(module: Any, message: str, tmp_path: Path) -> None:
    net = module()
    with pytest.raises(NoPredictionsError, match=message):
        boring.trainer(tmp_path, [AdaMix(bottleneck=4)], limit_train_batches=1).fit(net, boring.data())
    assert "training_step" not in vars(net)


def test_without_consistency_any_module_will_do(tmp_path: Path) -> None:
    module = boring.Boring()
    boring.trainer(tmp_path, [AdaMix(bottleneck=4, consistency=0.0)], limit_train_batches=2).fit(module, boring.data())
    assert len(module.losses) == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_of_two_passes_meet_their_own_experts_again(reentrant: bool) -> None:
    gradients = []
    for checkpointed in (False, True):
        net, _ = adapted("adamix", "bert", share="none", experts=5)
        perturb(net)
        if checkpointed:
            net.gradient_checkpointing_enable({"use_reentrant": reentrant})
            net.enable_input_require_grads()
        net.train()
        torch.manual_seed(4)
        one_, two = (net(**zoo.inputs("bert")).logits for _ in range(2))
        assert not torch.equal(one_, two)
        (one_.pow(2).mean() + consistency(one_, two)).backward()
        gradients.append({n: p.grad for n, p in state.trainable(net).items()})
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, atol=1e-6, rtol=1e-5)


def test_a_language_model_compares_the_tokens_that_count(tmp_path: Path) -> None:
    module = tasks.CausalLM(zoo.build("gpt2"))
    labels = zoo.inputs("gpt2")["input_ids"].clone()
    labels[:, :3] = -100
    batch = {**zoo.inputs("gpt2"), "labels": labels}
    seen: list[Any] = []

    class Look(AdaMix):
        def extra_loss(self, outputs: Any, batch: Any) -> Tensor:
            seen.append((outputs.logits.shape, outputs.labels, outputs.again().logits.shape))
            return super().extra_loss(outputs, batch)

    run = boring.trainer(tmp_path, [Look(bottleneck=4)], max_steps=1)
    run.fit(module, DataLoader([batch], batch_size=None))
    rows = int((labels[:, 1:] != -100).sum())
    assert seen[0][0] == seen[0][2] == (rows, zoo.VOCAB)
    assert torch.equal(seen[0][1], labels[:, 1:][labels[:, 1:] != -100])


# ------------------------------------------------------------------ (IA)^3
LAYOUTS = (
    "gpt2", "gpt2_cross", "llama", "phi3", "qwen3", "gemma2", "gptj", "gpt_neox", "bloom", "opt", "t5", "t5_gated", "bart",
    "whisper", "deberta", "modernbert", "timm_vit", "encoder", "transformer",
)  # fmt: skip


@pytest.mark.parametrize("model", LAYOUTS)
def test_ia3_is_merged_exactly_in_every_layout(model: str) -> None:
    net = zoo.build(model).double()
    base = output(net, model)
    method = IA3(dtype="float64", heads=None)
    method.apply(net)
    roles = [x.role.removeprefix("cross.") for x in state.get_applied(net).placements]
    assert roles.count("k") == roles.count("v") >= roles.count("down") > 1
    torch.testing.assert_close(output(net, model), base, atol=1e-12, rtol=1e-12)
    perturb(net, 0.3)
    adapted_output = output(net, model)
    assert (adapted_output - base).abs().max() > 1e-5
    method.merge(net)
    torch.testing.assert_close(output(net, model), adapted_output, atol=1e-10, rtol=1e-10)
    method.unmerge(net)
    assert torch.equal(output(net, model), adapted_output)


def keys_of(net: nn.Module, model: str) -> Tensor:
    """What the first attention layer is given as keys, before any rotation."""
    seen: list[Tensor] = []
    handle = net.model.layers[0].self_attn.k_norm.register_forward_hook(lambda m, a, out: seen.append(out))
    output(net, model)
    handle.remove()
    return seen[0]


def test_a_scale_before_the_norm_of_keys_is_not_one_after_it() -> None:
    """Qwen3: the norm takes the size of a head out again; after it the equation of the paper holds."""
    plain = keys_of(zoo.build("qwen3").double(), "qwen3")
    keys = {}
    for where in ("projection", "norm"):
        net = zoo.build("qwen3").double()
        IA3(keys=where, dtype="float64").apply(net)
        first = next(x for x in state.get_applied(net).placements if x.role in ("k", "norm.qk"))
        assert first.site.endswith("k_proj" if where == "projection" else "k_norm")
        with torch.no_grad():
            first.adapter.l.fill_(3.0)
        keys[where] = keys_of(net, "qwen3")
    torch.testing.assert_close(keys["projection"], plain, atol=1e-3, rtol=1e-3)  # but for the norm's epsilon
    torch.testing.assert_close(keys["norm"], 3 * plain, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("model", "count"), [("qwen3", 2 * (16 + 2 * 16 + 64)), ("llama", 2 * (16 + 16 + 64))])
def test_a_scale_after_the_norm_of_keys_is_folded_into_its_gain(model: str, count: int) -> None:
    net = zoo.build(model).double()
    method = IA3(keys="norm", dtype="float64", heads=None)
    method.apply(net)
    assert state.describe(net)["trainable"] == count
    perturb(net, 0.3)
    expected = output(net, model)
    method.merge(net)
    torch.testing.assert_close(output(net, model), expected, atol=1e-10, rtol=1e-10)
    method.unload(net)
    torch.testing.assert_close(output(net, model), expected, atol=1e-10, rtol=1e-10)


def test_a_gain_that_is_stored_less_one() -> None:
    """Gemma 3: norm(x) (1 + w)"""
    config = hf.Gemma3TextConfig(**{**zoo.TEXT, "num_key_value_heads": 2, "head_dim": 8})
    torch.manual_seed(0)
    net = hf.Gemma3ForCausalLM(config).double().eval()
    method = IA3(keys="norm", dtype="float64")
    method.apply(net)
    assert {x.role for x in state.get_applied(net).placements} == {"norm.qk", "v", "down"}
    perturb(net, 0.3)
    norm, x = net.model.layers[0].self_attn.k_norm, torch.randn(2, 3, 2, 8, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.normal_()
        expected = norm(x)
        method.unload(net)
        torch.testing.assert_close(norm(x), expected, atol=1e-5, rtol=1e-5)  # it computes in fp32


# ------------------------------------------------------------------ T-Few
ROWS = [
    {"input_ids": [5, 6, 7, 8], "choices": [[11, 12], [13, 14, 15], [16]], "labels": 1},
    {"input_ids": [9, 4], "choices": [[21], [22, 23, 24, 25]], "labels": 0},
]


def slow_scores(net: nn.Module, seq2seq: bool) -> list[list[list[Tensor]]]:
    """log p of each token of each choice, one choice at a time and without padding."""
    out = []
    for row in ROWS:
        out.append([])
        for choice in row["choices"]:
            prompt, answer = torch.tensor([row["input_ids"]]), torch.tensor([choice])
            if seq2seq:
                before = torch.cat([torch.zeros(1, 1, dtype=torch.long), answer[:, :-1]], 1)
                logp = net(input_ids=prompt, decoder_input_ids=before).logits[0].log_softmax(-1)
            else:
                whole = torch.cat([prompt, answer], 1)
                logp = net(input_ids=whole).logits[0].log_softmax(-1)[prompt.shape[1] - 1 : -1]
            out[-1].append([logp[t, token] for t, token in enumerate(choice)])
    return out


@pytest.mark.parametrize("model", ["t5", "gpt2", "llama"])
def test_losses_of_t_few(model: str) -> None:
    """Equations 1 to 3 of the paper, written out choice by choice, and their gradients."""
    seq2seq = model == "t5"
    nets = [zoo.build(model) for _ in range(2)]
    for net in nets:
        IA3().apply(net)
        perturb(net, 0.3)
    task = tasks.MultipleChoice(nets[0], choices=3, unlikelihood=0.7, normalised=1.3)
    batch = tasks.CollateChoices(0, seq2seq)(ROWS)
    loss = task.loss(*task.likelihoods(batch), batch["labels"])
    scores = slow_scores(nets[1], seq2seq)
    right = [logp for own, row in zip(scores, ROWS, strict=True) for logp in own[row["labels"]]]
    wrong = [
        logp
        for own, row in zip(scores, ROWS, strict=True)
        for i, choice in enumerate(own)
        if i != row["labels"]
        for logp in choice
    ]
    betas = [torch.stack([torch.stack(choice).mean() for choice in own]) for own in scores]
    lm = -torch.stack(right).mean()
    unlikely = -torch.stack([torch.log(1 - logp.exp() + 0.01) for logp in wrong]).mean()
    normal = torch.stack([-(b[r["labels"]] - b.logsumexp(0)) for b, r in zip(betas, ROWS, strict=True)]).mean()
    expected = lm + 0.7 * unlikely + 1.3 * normal
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    loss.backward()
    expected.backward()
    for mine, theirs in zip(state.trainable(nets[0]).values(), state.trainable(nets[1]).values(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-4)
    answer = task.predict_step(batch)
    assert answer["labels"].tolist() == [int(b.argmax()) for b in betas]
    assert answer["scores"][1, 2] == -torch.inf  # there is no third choice
    plain = tasks.MultipleChoice(nets[0], 3, unlikelihood=0.0, normalised=0.0)
    torch.testing.assert_close(plain.loss(*plain.likelihoods(batch), batch["labels"]), lm, atol=1e-5, rtol=1e-5)


def test_unlikelihood_is_finite_where_a_wrong_choice_is_certain() -> None:
    logp = torch.zeros(1, 2, 3, requires_grad=True)
    loss = choices.unlikelihood_loss(logp, torch.ones(1, 2, 3, dtype=torch.bool), torch.tensor([0]))
    torch.testing.assert_close(loss, -torch.log(torch.tensor(0.01)))
    loss.backward()
    assert torch.isfinite(logp.grad).all()
    assert (logp.grad[0, 1] > 0).all()
    assert not logp.grad[0, 0].any()


@pytest.mark.parametrize("method", [IA3(), AdaMix(bottleneck=4)], ids=["ia3", "adamix"])
def test_choices_are_learned_in_a_trainer(method: Any, tmp_path: Path) -> None:
    module = tasks.MultipleChoice(zoo.build("t5"), 3, optimizer=lambda p: torch.optim.Adam(p, lr=0.05))
    loader = DataLoader(ROWS, batch_size=2, collate_fn=tasks.CollateChoices(0, seq2seq=True))
    run = boring.trainer(tmp_path, [method], max_epochs=25, log_every_n_steps=1)
    run.fit(module, loader, loader)
    assert run.callback_metrics["val/accuracy"] == 1.0
    assert run.test(module, loader, verbose=False)[0]["test/loss"] < 6
    assert [p.tolist() for p in (run.predict(module, loader)[0]["labels"],)] == [[1, 0]]


def test_choices_that_make_no_sense() -> None:
    for bad in ({"choices": 1}, {"choices": 3, "unlikelihood": -1.0}, {"choices": 3, "normalised": -0.1}):
        with pytest.raises(ValueError, match="two choices at least"):
            tasks.MultipleChoice(nn.Linear(2, 2), **bad)


@pytest.mark.parametrize("seq2seq", [True, False])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"labels": 2}, "choices of .2, 1. tokens, and choice 2 is right"),
        ({"labels": -100}, "choice -100 is right"),
        ({"choices": [[8, 9], []]}, "choices of .2, 0. tokens"),
        ({"choices": []}, "choices of .. tokens"),
        ({"input_ids": []}, "0 tokens of a prompt"),
    ],
)
def test_rows_without_a_likelihood(changed: dict[str, Any], message: str, seq2seq: bool) -> None:
    rows = [{"input_ids": [5, 6], "choices": [[8, 9], [10]], "labels": 1}]
    assert choices.CollateChoices(0, seq2seq)(rows)["labels"].tolist() == [1]
    with pytest.raises(ValueError, match=message):
        choices.CollateChoices(0, seq2seq)([*rows, {**rows[0], **changed}])


# ------------------------------------------------------------------ SparseAdapter
def sparse(**more: Any) -> SparseAdapter:
    fields = {"settings": {"bottleneck": 4, "activation": "tanh"}, "score": "magnitude", "sparsity": 0.5, **more}
    return SparseAdapter(**fields)


def pruned(net: nn.Module) -> list[Pruned]:
    return [x.adapter for x in state.get_applied(net).placements if isinstance(x.adapter, Pruned)]


def kept(net: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Mask and tensor of every matrix."""
    return [(getattr(a.kept, n.replace(".", "_")), p) for a in pruned(net) for n, p in a.matrices()]


@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
def test_only_kept_entries_compute_and_learn(conv1d: bool) -> None:
    net, adapter, v = one(sparse(targets="p", dtype="float64"), conv1d)
    m = {"down": adapter.kept.down.double(), "up": adapter.kept.up.double()}
    assert 0 < m["down"].mean() < 1
    assert 0 < m["up"].mean() < 1

    def expected(x: Tensor) -> Tensor:
        h = net.dense(x)
        z = torch.tanh(h @ (v["inner.down"] * m["down"]).T + v["inner.down_bias"])
        return h + z @ (v["inner.up"] * m["up"]).T + v["inner.up_bias"]

    agree(net, adapter, v, expected)  # `one` has moved the pruned entries away from zero: they do not count
    for mask, p in kept(net):
        assert not p.grad[~mask].any()
        assert p.grad[mask].all()


@pytest.mark.parametrize("sparsity", [0.0, 0.4, 0.8])
def test_the_largest_of_all_adapters_together_are_kept(sparsity: float) -> None:
    dense = zoo.build("bert")
    make("houlsby", "bert", init="normal", label="sparse_adapter").apply(dense)
    net, _ = adapted("sparse_adapter", "bert", sparsity=sparsity)
    entries = torch.cat([p.flatten() for _, p in kept(net)])
    masks = torch.cat([mask.flatten() for mask, _ in kept(net)])
    assert int(masks.sum()) == round((1 - sparsity) * len(masks))  # the share that is pruned, as in the paper
    assert not entries[~masks].any()
    per_tensor = {round(float(mask.float().mean()), 4) for mask, _ in kept(net)}
    assert len(per_tensor) > 1 or not sparsity  # one threshold for all, not one for each
    whole = [p for a in pruned(net) for n, p in a.inner.named_parameters() if p.dim() == 1]
    assert state.describe(net)["trainable"] == int(masks.sum()) + sum(p.numel() for p in whole) + 99  # the head
    if sparsity:
        assert entries[masks].abs().min() > 0


def test_large_sparse_keeps_the_count() -> None:
    counts = []
    for method in (sparse(sparsity=0.0), sparse(large=4)):
        net = zoo.build("bert")
        method.apply(net)
        counts.append(sum(int(mask.sum()) for mask, _ in kept(net)))
        widths = {len(a.inner.down) for a in pruned(net)}
    assert counts[0] == counts[1]
    assert widths == {16}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adam"])
def test_pruned_entries_stay_zero_under_decay_and_momentum(optimizer: str) -> None:
    make_optimizer = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.5),
        "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.5),
    }[optimizer]
    net, _ = adapted("sparse_adapter", "bert")
    before = [(mask.clone(), p.detach().clone()) for mask, p in kept(net)]
    steps = make_optimizer([p for p in net.parameters() if p.requires_grad])
    net.train()
    for _ in range(4):
        steps.zero_grad()
        net(**zoo.inputs("bert"), labels=torch.tensor([0, 2])).loss.backward()
        steps.step()
    for (mask, p), (mask_before, p_before) in zip(kept(net), before, strict=True):
        assert torch.equal(mask, mask_before)
        assert not p[~mask].any()
        assert (p[mask] != p_before[mask]).all()


class Loss(nn.Module):
    """A loss of one projection, for scores."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.net(x) - y).pow(2).mean()


@pytest.mark.parametrize("score", ["snip", "grasp", "synflow", "magnitude"])
def test_scores(score: str) -> None:
    """snip |g W|, grasp W (H g), synflow |W dR/dW|, magnitude |W|: from a dense gradient and Hessian of a flat vector."""
    torch.manual_seed(2)
    net = Loss(One()).double()
    method = sparse(targets="net.p", score=score, sparsity=0.0, dtype="float64", settings={"bottleneck": 3})
    method.apply(net)
    (adapter,) = pruned(net)
    names = [n for n, _ in adapter.matrices()]
    with torch.no_grad():
        for p in adapter.inner.parameters():
            p.normal_(0, 0.5)
    shapes = {n: p.shape for n, p in adapter.inner.named_parameters()}
    fixed = {n: p.detach() for n, p in adapter.inner.named_parameters()}
    start = torch.cat([fixed[n].flatten() for n in names])
    batches = [tuple(torch.randn(4, width, dtype=torch.float64) for width in (12, 8)) for _ in range(2)]

    def values(vector: Tensor) -> dict[str, Tensor]:
        pieces = vector.split([shapes[n].numel() for n in names])
        return {**fixed, **{n: piece.view(shapes[n]) for n, piece in zip(names, pieces, strict=True)}}

    def through(v: dict[str, Tensor], h: Tensor) -> Tensor:
        return h + F.gelu(h @ v["down"].T + v["down_bias"]) @ v["up"].T + v["up_bias"]

    def total(vector: Tensor) -> Tensor:
        return sum((through(values(vector), net.net.dense(x)) - y).pow(2).mean() for x, y in batches)

    def flow(vector: Tensor) -> Tensor:
        v = {n: t.abs() for n, t in values(vector).items()}
        return through(v, torch.ones(1, 8, dtype=torch.float64)).mean()

    g, h = torch.func.grad(total)(start), torch.func.hessian(total)(start)
    expected = {
        "snip": (g * start).abs(),
        "grasp": start * (h @ g),
        "synflow": (torch.func.grad(flow)(start) * start).abs(),
        "magnitude": start.abs(),
    }[score]
    group = method.group(net)
    if score in ("snip", "grasp"):
        from lightning_peft.core.calibration import plain_run
        from lightning_peft.core.pruned import WITH_DATA

        found = WITH_DATA[score](group, batches, plain_run(net))
    else:
        from lightning_peft.core.pruned import WITHOUT_DATA

        found = WITHOUT_DATA[score](group)
    torch.testing.assert_close(torch.cat([t.flatten() for t in found.values()]), expected, atol=1e-10, rtol=1e-9)
    if score == "grasp":  # what is kept is what |g|^2 would miss most
        lost = [
            torch.func.grad(total)(start - 1e-4 * start[i] * row).pow(2).sum()
            for i, row in enumerate(torch.eye(len(start), dtype=start.dtype))
        ]
        drop = (g.pow(2).sum() - torch.stack(lost)) / 2e-4
        torch.testing.assert_close(drop, expected, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("score", ["snip", "grasp"])
def test_batches_prune_at_the_start_of_fit_and_draw_nothing(score: str, tmp_path: Path) -> None:
    def fit(method: Any, module: Any, **more: Any) -> Any:
        pl.seed_everything(0, verbose=False)
        run = boring.trainer(tmp_path, [method], limit_train_batches=3, **more)
        run.fit(module, boring.data())
        return run

    method = sparse(score=score, sparsity=0.8, batches=2)
    module = boring.Boring(dropout=0.0)
    fit(method, module)
    masks = [mask.clone() for mask, _ in kept(module)]
    assert sum(int(m.sum()) for m in masks) == round(0.2 * sum(m.numel() for m in masks))
    assert all(not p[~mask].any() for mask, p in kept(module))
    assert len(module.losses) == 3 + (2 if score == "snip" else 4)
    save_adapter(module, tmp_path / "a")
    again = boring.Boring(dropout=0.0)
    loaded = load_adapter(again, tmp_path / "a", trainable=True)
    assert [torch.equal(a, b[0]) for a, b in zip(masks, kept(again), strict=True)] == [True] * len(masks)
    fit(loaded, again)
    assert len(again.losses) == 3  # what is loaded has its masks
    assert all(torch.equal(a, b[0]) for a, b in zip(masks, kept(again), strict=True))


def test_a_resumed_run_keeps_its_masks(tmp_path: Path) -> None:
    def fit(directory: Path, path: Path | None = None) -> boring.Boring:
        pl.seed_everything(0, verbose=False)
        module = boring.Boring()
        saver = pl.callbacks.ModelCheckpoint(directory, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        run = boring.trainer(tmp_path, [sparse(score="snip", batches=2), saver], max_steps=6)
        run.fit(module, boring.data(), ckpt_path=path)
        return module

    whole = fit(tmp_path / "a")
    resumed = fit(tmp_path / "b", tmp_path / "a" / "step=3.ckpt")
    assert len(resumed.losses) == 3
    assert boring.largest_difference(boring.tensors(whole), boring.tensors(resumed)) == 0


def test_without_a_trainer_batches_are_given_by_hand() -> None:
    net = zoo.build("bert")
    method = sparse(score="snip", sparsity=0.75)
    method.apply(net)
    assert all(mask.all() for mask, _ in kept(net))
    net.train()
    batch = {**zoo.inputs("bert"), "labels": torch.tensor([0, 2])}
    before = torch.get_rng_state()
    assert method.calibrate(net, [batch, batch]) == 2
    assert torch.equal(before, torch.get_rng_state())
    assert all(m.training for m in net.modules())
    assert all(p.grad is None for p in net.parameters())
    assert sum(int(m.sum()) for m, _ in kept(net)) == round(0.25 * sum(m.numel() for m, _ in kept(net)))
    with pytest.raises(CalibrationError, match="no loss with a gradient"):
        method.calibrate(net, [zoo.inputs("bert")])
    with pytest.raises(FieldError, match="needs no data"):
        sparse().calibrate(net, [batch])


@pytest.mark.parametrize("score", ["snip", "grasp", "magnitude", "synflow"])
def test_a_start_at_zero_cannot_be_scored(score: str) -> None:
    """W_up = 0: its own entries have no magnitude, and no gradient reaches W_dn."""
    net = zoo.build("bert")
    method = sparse(score=score, settings={"bottleneck": 4, "init": "zero"})
    batch = {**zoo.inputs("bert"), "labels": torch.tensor([0, 2])}

    def prune() -> None:
        method.apply(net)
        method.calibrate(net, [batch])

    with pytest.raises(CalibrationError, match="nothing but zeros.*or choose score='random'"):
        prune()
    chance = sparse(score="random", settings={"bottleneck": 4, "init": "zero"}, label="chance")
    other = zoo.build("bert")
    chance.apply(other)
    assert torch.equal(output(other, "bert"), output(zoo.build("bert"), "bert"))
    shares = torch.tensor([float(mask.float().mean()) for mask, _ in kept(other)])
    assert (shares - 0.5).abs().max() < 0.15


@pytest.mark.parametrize(
    ("over", "settings", "score"),
    [
        ("parallel", {"bottleneck": 4}, "synflow"),
        ("compacter", {"bottleneck": 8}, "magnitude"),
        ("compacter", {"bottleneck": 8, "std": 1.0}, "synflow"),
        ("lora", {"rank": 4, "targets": "q,v"}, "random"),
        ("phm", {"bottleneck": 8}, "snip"),
    ],
)
def test_over_other_adapters(over: str, settings: Any, score: str, tmp_path: Path) -> None:
    net = zoo.build("bert")
    method = SparseAdapter(over=over, settings=settings, score=score, sparsity=0.5)
    method.apply(net)
    if score == "snip":
        method.calibrate(net, [{**zoo.inputs("bert"), "labels": torch.tensor([0, 2])}])
    own = {id(p): (mask, p) for mask, p in kept(net)}
    assert sum(int(m.sum()) for m, _ in own.values()) == round(0.5 * sum(m.numel() for m, _ in own.values()))
    perturb(net)
    save_adapter(net, tmp_path / "a")
    other = zoo.build("bert")
    load_adapter(other, tmp_path / "a")
    assert torch.equal(output(other, "bert"), output(net, "bert"))
    assert all(not p[~mask].any() for mask, p in kept(other))
    before = {id(p): p.detach().clone() for _, p in kept(net)}
    train(net, "bert", steps=2)  # what computes is what trains, in the second step as well
    assert {id(p) for _, p in kept(net)} == set(before)
    assert all((p != before[id(p)]).any() for mask, p in kept(net) if mask.any())
    rules = {id(mask): mask for (mask, p) in kept(net) if over == "compacter" and p.shape == (4, 4, 4)}
    assert all(torch.equal(mask, next(iter(rules.values()))) for mask in rules.values())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"over": "nope"}, "no such method"),
        ({"over": "sparse_adapter"}, "no such method"),
        ({"over": "mam", "settings": {}}, "several methods in one"),
        ({"over": "adamix"}, "extra_loss"),
        ({"over": "bitfit", "settings": {}}, "more than adapters"),
        ({"over": "ia3", "settings": {}, "large": 2}, "no bottleneck and no rank"),
        ({"sparsity": 1.0}, "a probability"),
        ({"batches": 0}, "above 0"),
    ],
)
def test_what_cannot_be_pruned(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(FieldError, match=message):
        sparse(**{"settings": {"bottleneck": 4}, **fields})
    with pytest.raises(FieldError, match="no matrix to prune"):
        sparse(over="ia3", settings={}).apply(zoo.build("bert"))


def test_settings_come_from_a_configuration() -> None:
    config = schema(SparseAdapter)
    config.settings = {"bottleneck": 12, "activation": "relu"}
    config.score = "random"
    method = hydra.utils.instantiate(config)
    net = method.apply(zoo.build("bert"))
    assert {(len(a.inner.down), a.inner.activation) for a in pruned(net)} == {(12, "relu")}
