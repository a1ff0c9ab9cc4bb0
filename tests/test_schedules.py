"""Methods that act over the steps of a run: AdaLoRA, ReLoRA, LoRA+ and the jagged cosine, LongLoRA, LoRA dropout."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from boring import Boring, data, trainer
from harness import output, perturb
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from test_integers import mixture
from torch import Tensor, nn

from lightning_peft import (
    IA3,
    AdaLoRA,
    FullFineTuning,
    LongLoRA,
    LoRA,
    LoRADropout,
    NF4Precision,
    ReLoRA,
    load_adapter,
    load_checkpoint,
    lora_plus_groups,
    save_adapter,
)
from lightning_peft.callback import LifeCycleError
from lightning_peft.checkpoint import CheckpointError
from lightning_peft.core import state
from lightning_peft.core.adapter import NotMergeableError
from lightning_peft.core.attention import scaled_dot_product
from lightning_peft.core.budget import budget, largest, score, smooth
from lightning_peft.core.fields import FieldError
from lightning_peft.core.init import Draw
from lightning_peft.core.merge import MergeError
from lightning_peft.core.projection import views
from lightning_peft.core.restart import PruneError, prune_state
from lightning_peft.core.sites import TargetError
from lightning_peft.groups import LoRAPlus, optimizer_of, parameter_groups
from lightning_peft.methods.adalora import ranks
from lightning_peft.methods.longlora import ShiftedSparseAttention
from lightning_peft.tasks import cosine_warmup, jagged_cosine
from lightning_peft.tasks.optimisation import jagged_factor
from lightning_peft.train import plus

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


class One(nn.Module):
    """A projection from 6 to 10 in fp64."""

    def __init__(self, kind: str = "linear") -> None:
        super().__init__()
        if kind == "linear":
            self.proj: Any = nn.Linear(6, 10).double()
        else:
            from transformers.pytorch_utils import Conv1D

            self.proj = Conv1D(10, 6).double()
        with torch.no_grad():
            self.proj.weight.copy_(numbers(10, 6) if kind == "linear" else numbers(10, 6).T)
            self.proj.bias.copy_(numbers(10, seed=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def same_as_base(model: str, a: Tensor, b: Tensor) -> None:
    """Bit-equal; nn.MultiheadAttention has a fused kernel of its own."""
    torch.testing.assert_close(a, b, atol=1e-6 if model == "encoder" else 0, rtol=0)


def adapters(net: nn.Module, label: str | None = None) -> list[Any]:
    return [x.adapter for x in state.get_applied(net, label).placements]


def same_through_a_checkpoint(make: Any, directory: Path, at: int, steps: int, **options: Any) -> tuple[Boring, Boring]:
    """A run in one go, and one that is cut at optimizer step `at` and resumed; all that is saved must be equal."""

    def run(ckpt: Path | None = None) -> Boring:
        module = Boring()
        keep = ModelCheckpoint(directory / str(ckpt is None), "{step}", every_n_train_steps=at, save_top_k=-1)
        fit = trainer(directory, [make(), keep], max_steps=steps, max_epochs=-1, **options)
        fit.fit(module, data(), ckpt_path=ckpt, weights_only=None if ckpt is None else True)
        return module

    seed_everything(3)
    through = run()
    resumed = run(directory / "True" / f"step={at}.ckpt")
    assert 0 < len(resumed.losses) < len(through.losses)
    one, two = state.saved(through), state.saved(resumed)
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    return through, resumed


class Watch(Callback):
    """Calls `look(trainer, module)` after every batch."""

    def __init__(self, look: Any) -> None:
        self.look = look

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.look(trainer, pl_module)


# ------------------------------------------------------------------ AdaLoRA
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_adalora_is_its_equation(kind: str) -> None:
    net, base = One(kind), One(kind)
    method = AdaLoRA(targets="proj", rank=3, target=2, alpha=7, heads=None, dtype="float64")
    method.apply(net)
    adapter = adapters(net)[0]
    assert [tuple(p.shape) for p in adapter.parameters()] == [(10, 3), (3,), (3, 6)]
    x = numbers(2, 5, 6, seed=2).requires_grad_()
    assert torch.equal(net(x), base(x))
    perturb(net, 0.4)
    p, l, q = (t.detach().clone().requires_grad_() for t in (adapter.p, adapter.l, adapter.q))
    change = 7 / 3 * p @ torch.diag(l) @ q
    expected = F.linear(x, numbers(10, 6) + change, numbers(10, seed=1))
    found = net(x)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    g = numbers(2, 5, 10, seed=3)
    mine = torch.autograd.grad(found, [x, adapter.p, adapter.l, adapter.q], g)
    for one, two in zip(mine, torch.autograd.grad(expected, [x, p, l, q], g), strict=True):
        torch.testing.assert_close(one, two, atol=1e-10, rtol=1e-10)
    method.merge(net)
    torch.testing.assert_close(net(x), expected, atol=1e-10, rtol=1e-10)


def test_the_budget_of_adalora_falls_along_a_cubic_curve() -> None:
    found = [budget(t, 120, 40, 100, 10, 30) for t in range(1, 101)]
    assert found[:10] == [120] * 10
    assert found[69:] == [40] * 31
    assert found == sorted(found, reverse=True)
    assert found[39] == int(40 + 80 * (1 - (40 - 10) / 60) ** 3) == 50


def test_the_penalty_of_adalora_in_both_forms() -> None:
    for form, expected in (("squared", 0.5 * 2 * 2), ("norm", 0.5 * 2 * 2**0.5 / 4)):
        net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
        AdaLoRA(targets="a,b", rank=2, target=1, orthogonality=0.5, penalty=form, heads=None).apply(net)  # type: ignore[arg-type]
        for adapter in adapters(net):
            with torch.no_grad():
                adapter.p.copy_(torch.eye(4)[:, :2] * 2**0.5)  # P^T P - I = I, |I| = sqrt(2)
                adapter.q.copy_(torch.eye(4)[:2])  # Q Q^T = I
        total = sum(adapter.penalty() for adapter in adapters(net))
        assert float(total.detach()) == pytest.approx(expected)
    net = One()
    AdaLoRA(targets="proj", rank=2, target=1, orthogonality=0, heads=None).apply(net)
    assert adapters(net)[0].penalty() is None


def test_importance_and_threshold_against_a_loop() -> None:
    w, g = [numbers(4, 3), numbers(3, seed=1)], [numbers(4, 3, seed=2), numbers(3, seed=3)]
    mean, spread = [torch.zeros_like(t) for t in w], [torch.zeros_like(t) for t in w]
    expected = [(torch.zeros_like(t), torch.zeros_like(t)) for t in w]
    for step in range(3):
        now = [t * (step + 1) for t in g]
        smooth(mean, spread, w, now, 0.8, 0.6)
        for i, (m, u) in enumerate(expected):
            importance = (w[i] * now[i]).abs()
            m = 0.8 * m + 0.2 * importance
            expected[i] = m, 0.6 * u + 0.4 * (importance - m).abs()
    for i, (m, u) in enumerate(expected):
        torch.testing.assert_close(mean[i], m)
        torch.testing.assert_close(spread[i], u)
    p, l, q = numbers(5, 2), numbers(2, seed=1), numbers(2, 7, seed=2)
    by_hand = [l[k] + sum(q[k]) / 7 + sum(p[:, k]) / 5 for k in range(2)]
    torch.testing.assert_close(score(p, l, q), torch.stack(by_hand))
    kept = largest([torch.tensor([3.0, 1.0]), torch.tensor([2.0, 2.0, 0.0])], 3)
    assert [k.tolist() for k in kept] == [[True, False], [True, True, False]]
    tied = largest([torch.zeros(3), torch.zeros(3)], 4)  # the first step: nothing has an importance yet
    assert sum(int(k.sum()) for k in tied) == 4


class Language(LightningModule):
    """Trains a model of transformers on fixed batches."""

    def __init__(self, net: nn.Module, make: Any = None) -> None:
        super().__init__()
        self.net, self.make = net, make or (lambda p: torch.optim.AdamW(p, lr=3e-2))
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.net(input_ids=batch[0], labels=batch[0]).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return self.make([p for p in self.parameters() if p.requires_grad])


def sentences(count: int, length: int = 6, batch: int = 2) -> Any:
    tokens = torch.randint(3, 90, (count * batch, length), generator=torch.Generator().manual_seed(8))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens), batch_size=batch, shuffle=False)


def test_a_run_of_adalora_is_the_one_of_peft(tmp_path: Path) -> None:
    """The same starting weights, batches and optimizer: the same masks at every allocation, the same logits after it."""
    peft = pytest.importorskip("peft")
    steps, warmup, final, interval = 16, 2, 5, 3
    theirs = peft.get_peft_model(
        zoo.build("llama"),
        peft.AdaLoraConfig(
            init_r=4, target_r=2, lora_alpha=6, tinit=warmup, tfinal=final, deltaT=interval, total_step=steps,
            orth_reg_weight=0.5, target_modules=["q_proj", "v_proj"],
        ),
    )  # fmt: skip
    module = Language(zoo.build("llama"))
    method = AdaLoRA(
        targets="q,v", rank=4, target=2, alpha=6, warmup=warmup, final=final, interval=interval, orthogonality=0.5,
        penalty="norm", heads=None,
    )  # fmt: skip
    layers = {n: m for n, m in theirs.named_modules() if hasattr(m, "lora_E") and "default" in m.lora_E}
    patterns: list[Any] = []

    def start(_: Any, pl_module: Any) -> None:
        for placement in state.get_applied(pl_module).placements:
            layer = next(m for n, m in layers.items() if n.endswith(placement.site.removeprefix("net.")))
            placement.adapter.p.data.copy_(layer.lora_B["default"])
            placement.adapter.q.data.copy_(layer.lora_A["default"])
            placement.adapter.scale = 6 / (4 + 1e-5)  # theirs; ours is alpha / rank

    class Start(Callback):
        on_train_start = staticmethod(start)

    def look(_: Any, pl_module: Any) -> None:
        patterns.append(
            {x.site.removeprefix("net."): x.adapter.l != 0 for x in state.get_applied(pl_module).placements}
        )

    fit = trainer(tmp_path, [method, Start(), Watch(look)], max_steps=steps, max_epochs=-1)
    reference = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=3e-2)
    start_of = {n: m.lora_A["default"].clone() for n, m in layers.items()}
    fit.fit(module, sentences(8))
    assert all(torch.equal(m.lora_A["default"], start_of[n]) for n, m in layers.items())
    theirs.train()
    for step, (tokens,) in enumerate([*sentences(8), *sentences(8)], 1):
        reference.zero_grad()
        theirs.base_model(input_ids=tokens, labels=tokens).loss.backward()  # `theirs(...)` leaves the penalty out
        reference.step()
        theirs.base_model.update_and_allocate(step)
        for name, layer in layers.items():
            mine = next(p for site, p in patterns[step - 1].items() if name.endswith(site))
            assert torch.equal(layer.lora_E["default"][:, 0] != 0, mine), (step, name)
    assert len({tuple(p.tolist()) for p in patterns[-1].values()}) > 1  # the sites differ by now
    assert sum(ranks(module).values()) == 2 * len(layers) == sum(int(p.sum()) for p in patterns[-1].values())
    tokens = torch.arange(3, 12)[None]
    with torch.no_grad():
        a, b = module.net.eval()(input_ids=tokens).logits, theirs.eval()(input_ids=tokens).logits
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_adalora_counts_optimizer_steps_and_not_batches(tmp_path: Path) -> None:
    seen = []
    method = AdaLoRA(targets="q,v", rank=4, target=1, warmup=1, final=2, interval=2)
    watch = Watch(lambda t, m: seen.append((t.global_step, method.allocator.step, sum(ranks(m).values()))))
    fit = trainer(tmp_path, [method, watch], max_steps=6, max_epochs=-1, accumulate_grad_batches=2)
    module = Boring()
    fit.fit(module, data())
    assert [(a, b) for a, b, _ in seen] == [(i // 2, i // 2) for i in range(1, 13)]
    count = len(adapters(module))
    assert method.allocator.steps == 6
    falls = {step: total for _, step, total in seen}
    assert [falls[t] for t in range(1, 7)] == [
        4 * count, *[budget(2, 4 * count, count, 6, 1, 2)] * 2, count, count, count,
    ]  # fmt: skip
    assert all(torch.equal(a.l != 0, a.kept) for a in adapters(module))
    assert method.allocator.mean == []  # not needed any more


def test_adalora_that_keeps_its_ranks(tmp_path: Path) -> None:
    """rank == target: nothing is to be zeroed, where peft asks for the value in place 0 and fails."""
    module = Boring()
    method = AdaLoRA(targets="q", rank=2, target=2, warmup=0, final=1, interval=1)
    trainer(tmp_path, [method], max_steps=3).fit(module, data())
    assert set(ranks(module).values()) == {2}
    assert all((a.l != 0).all() for a in adapters(module))


@pytest.mark.parametrize("at", [3, 7])  # while ranks fall, and when they are final
def test_adalora_resumes_exactly(at: int, tmp_path: Path) -> None:
    made: list[AdaLoRA] = []

    def make() -> AdaLoRA:
        made.append(AdaLoRA(targets="q,v", rank=4, target=2, warmup=1, final=3, interval=2))
        return made[-1]

    through, resumed = same_through_a_checkpoint(make, tmp_path, at, 9)
    assert ranks(through) == ranks(resumed)
    assert made[0].allocator.step == made[1].allocator.step == 9
    saved = torch.load(tmp_path / "True" / f"step={at}.ckpt", weights_only=True)["callbacks"]
    assert saved["lightning_peft.adalora"]["allocator"]["step"] == at
    assert bool(saved["lightning_peft.adalora"]["allocator"]["mean"]) is (at == 3)


def test_the_ranks_of_adalora_are_in_files(tmp_path: Path) -> None:
    module = Boring()
    trainer(tmp_path, [AdaLoRA(targets="q,v", rank=4, target=2, warmup=0, final=2)], max_steps=4).fit(module, data())
    save_adapter(module.net, tmp_path / "a")
    fresh = zoo.build("bert")
    load_adapter(fresh, tmp_path / "a")
    assert [*ranks(fresh).values()] == [*ranks(module).values()]
    assert set(ranks(fresh).values()) != {4}
    assert torch.equal(output(fresh, "bert"), output(module.net.eval(), "bert"))


def test_adalora_leaves_out_what_got_no_gradient_or_an_infinite_one() -> None:
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    method = AdaLoRA(targets="a,b", rank=2, target=1, warmup=0, final=1, total_steps=9, heads=None)
    method.apply(net)
    allocator = method.allocator
    fake: Any = None
    allocator.start(state.get_applied(net), fake)
    optimizer = torch.optim.SGD(net["a"].parameters(), lr=0.1)
    allocator.notice(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    assert not allocator.act()  # another optimizer's step
    allocator.notice(optimizer)
    assert allocator.act()  # no gradient anywhere
    for p in adapters(net)[0].parameters():
        p.grad = torch.full_like(p, math.inf)
    allocator.notice(optimizer)
    assert allocator.act()
    assert allocator.step == 2
    assert all(torch.equal(m, torch.zeros_like(m)) for m in allocator.mean)


def test_adalora_says_what_makes_no_sense(tmp_path: Path) -> None:
    for wrong in ({"rank": 2, "target": 3}, {"beta1": 1.0}, {"total_steps": 0}, {"interval": 0}):
        with pytest.raises(FieldError):
            AdaLoRA(**wrong)  # type: ignore[arg-type]
    for fields in ({"warmup": 5, "final": 5}, {"warmup": 0, "final": 20}):
        with pytest.raises(LifeCycleError, match="leaves no step"):
            trainer(tmp_path, [AdaLoRA(targets="q", **fields)], max_steps=8).fit(Boring(), data())  # type: ignore[arg-type]


# ------------------------------------------------------------------ LoRA+
def rates(net: nn.Module, groups: list[dict[str, Any]]) -> dict[str, tuple[float, float | None]]:
    """name -> learning rate and weight decay of its group."""
    names = {id(p): name for name, p in net.named_parameters()}
    return {names[id(p)]: (g["lr"], g.get("weight_decay")) for g in groups for p in g["params"]}


def plus_model() -> nn.Module:
    net = zoo.build("llama_cls")
    LoRA(targets="q,v,embed", rank=2, lora_bias=True, heads=None).apply(net)
    AdaLoRA(targets="o", rank=2, target=1, heads=None).apply(net)
    FullFineTuning(targets="norm", heads=None).apply(net)
    return net


def test_lora_plus_is_for_b_alone() -> None:
    net = plus_model()
    found = rates(net, lora_plus_groups(net, lr=0.5, ratio=8, embedding_lr=1e-6))
    assert set(found) == set(state.trainable(net))
    for name, (lr, decay) in found.items():
        at_embedding, last = "embed_tokens" in name, name.rpartition(".")[2]
        b = ".lora." in name and last == "b" and not at_embedding
        factor = at_embedding and last in ("a", "b")
        assert lr == (8 * 0.5 if b else 1e-6 if factor else 0.5), name
        assert decay == (None if state.trainable(net)[name].ndim > 1 else 0.0), name
    assert {name.rpartition(".")[2] for name, (lr, _) in found.items() if lr == 0.5} == {*"acplq", "weight"}
    without = rates(net, lora_plus_groups(net, lr=0.5, ratio=8, embedding_lr=None))
    assert {lr for name, (lr, _) in without.items() if "embed_tokens" in name} == {0.5}
    matrices = [p.ndim > 1 for p in state.trainable(net).values()]
    assert [len(g["params"]) for g in parameter_groups(net)] == [sum(matrices), len(matrices) - sum(matrices)]


def test_lora_plus_knows_the_experts_and_that_there_is_nothing_to_speed_up() -> None:
    net = mixture()
    LoRA(targets="q", experts="*.experts.gate_up_proj", rank=2, heads=None).apply(net)
    found = rates(net, lora_plus_groups(net, lr=0.5, ratio=8))
    assert {(name.rpartition(".")[2], lr) for name, (lr, _) in found.items()} == {("a", 0.5), ("b", 4.0)}
    assert any("experts" in name for name in found)
    scaled = zoo.build("bert")
    IA3(heads=None).apply(scaled)
    for make in (lambda: lora_plus_groups(scaled, 0.5), lambda: LoRAPlus(torch.optim.SGD).over(scaled)):
        with pytest.raises(ValueError, match="none trains in this Bert"):
            make()


def test_lora_plus_and_peft_differ_in_vectors_alone() -> None:
    """peft gives every vector the higher rate too (biases, norms, magnitudes); the paper speaks of B."""
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    theirs = peft.get_peft_model(zoo.build("bert"), peft.LoraConfig(r=2, target_modules=["query"], bias="all"))
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=0.5, loraplus_lr_ratio=8)
    peers = rates(theirs, optimizer.param_groups)
    net = zoo.build("bert")
    LoRA(targets="q", rank=2, bias="all", heads=None).apply(net)
    mine = rates(net, lora_plus_groups(net, 0.5, 8))
    for end, theirs_end, expected in ((".a", "lora_A.default.weight", 0.5), (".b", "lora_B.default.weight", 4.0)):
        assert {lr for name, (lr, _) in mine.items() if name.endswith(end)} == {expected}
        assert {lr for name, (lr, _) in peers.items() if name.endswith(theirs_end)} == {expected}
    assert {lr for name, (lr, _) in mine.items() if name.endswith("bias")} == {0.5}
    assert {lr for name, (lr, _) in peers.items() if name.endswith("bias")} == {4.0}


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "adafactor", "paged_adamw", "paged_adamw_8bit", "adamw_8bit"])
def test_lora_plus_with_every_optimizer_of_the_configs(name: str) -> None:
    if "paged" in name or "8bit" in name:
        pytest.importorskip("bitsandbytes")
    from lightning_peft.config import build, compose

    config = compose([f"optimizer={name}", "optimizer.lr=0.25", "lora_plus=4", "run_dir=x"])
    net = plus_model()
    optimizer = optimizer_of(net, plus(build(config.optimizer), config.lora_plus))
    found = rates(net, optimizer.param_groups)
    assert {lr for n, (lr, _) in found.items() if n.endswith("lora.b") and "embed" not in n} == {1.0}
    assert {lr for n, (lr, _) in found.items() if n.endswith("lora.a") and "embed" not in n} == {0.25}
    cosine_warmup(optimizer, total_steps=10, warmup=2)  # which multiplies the rate of each group
    assert [group["lr"] for group in optimizer.param_groups] == [g["initial_lr"] / 2 for g in optimizer.param_groups]
    assert {group["initial_lr"] for group in optimizer.param_groups} == {1.0, 0.25, 1e-6}
    assert optimizer_of(net, plus(build(config.optimizer), None)).param_groups[0]["lr"] == 0.25


def test_one_step_of_lora_plus_moves_b_by_the_ratio() -> None:
    moved = []
    for ratio in (16.0, 1.0):
        net = One()
        LoRA(targets="proj", rank=2, heads=None, dtype="float64").apply(net)
        perturb(net, 0.1)
        optimizer = optimizer_of(net, LoRAPlus(torch.optim.SGD, ratio))
        net(numbers(3, 6, seed=4)).square().sum().backward()
        start = [p.detach().clone() for p in adapters(net)[0].parameters()]
        optimizer.step()
        moved.append([p - before for p, before in zip(adapters(net)[0].parameters(), start, strict=True)])
    (a, b), (plain_a, plain_b) = moved
    torch.testing.assert_close(a, plain_a)
    torch.testing.assert_close(b, 16 * plain_b)
    assert plain_b.abs().max() > 0


def test_lora_plus_with_rates_that_make_no_sense() -> None:
    from lightning_peft.checks import ConfigError

    for ratio, embedding in ((0.0, None), (math.inf, None), (2.0, -1.0)):
        with pytest.raises(ValueError, match="give numbers above 0"):
            LoRAPlus(torch.optim.SGD, ratio, embedding)
        with pytest.raises(ValueError, match="give numbers above 0"):
            lora_plus_groups(nn.Linear(2, 2), 0.1, ratio, embedding)
    for given in ("fast", {"rato": 3}, -2):
        with pytest.raises(ConfigError, match="lora_plus="):
            plus(torch.optim.SGD, given)
    assert plus(torch.optim.SGD, {"ratio": 2.0, "embedding_lr": None}) == LoRAPlus(torch.optim.SGD, 2.0, None)


# ------------------------------------------------------------------ ReLoRA
@pytest.mark.parametrize("model", ["gpt2", "llama", "encoder"])
def test_a_restart_computes_what_was_computed_before(model: str) -> None:
    net = zoo.build(model)
    method = ReLoRA(targets="q,v,down", rank=2, alpha=4, dropout=0.0, heads=None)
    method.apply(net)
    before = {name: p.clone() for name, p in net.named_parameters()}
    first = state.get_applied(net).placements[0]
    original, rank = views(first.place)[0].detach().clone().flatten(0, -2), 0
    for turn in range(3):
        perturb(net, 0.2, adapters_only=True, seed=turn)
        expected = output(net, model)
        old = [adapter.a.clone() for adapter in adapters(net)]
        method.restart(net)
        torch.testing.assert_close(output(net, model), expected, atol=1e-6, rtol=1e-6)
        assert all((adapter.b == 0).all() for adapter in adapters(net))
        assert not any(torch.equal(adapter.a, a) for adapter, a in zip(adapters(net), old, strict=True))
        change = views(first.place)[0].detach().flatten(0, -2) - original
        found = int(torch.linalg.matrix_rank(change.double(), atol=1e-4))
        assert found > rank
        rank = found
    changed = {n for n, p in net.named_parameters() if ".adapters." not in n and not torch.equal(p, before[n])}
    assert changed == {n for n in state.saved(net) if ".adapters." not in n}
    assert not changed & set(state.trainable(net))
    with method.enabled(net, False):
        same_as_base(model, output(net, model), output(zoo.build(model), model))
    torch.testing.assert_close(output(net, model), expected, atol=1e-6, rtol=1e-6)
    method.remove(net)
    assert torch.equal(output(net, model), output(zoo.build(model), model))


def test_the_moments_that_a_restart_prunes() -> None:
    def moments(how: Any, share: float = 0.9) -> list[Tensor]:
        p = nn.Parameter(torch.zeros(40, 25))
        optimizer = torch.optim.AdamW([p])
        p.grad = numbers(40, 25).float()
        optimizer.step()
        before = {name: value.clone() for name, value in optimizer.state[p].items()}
        prune_state(optimizer, [p, nn.Parameter(torch.zeros(2))], how, share, Draw(0, "x"))
        assert optimizer.state[p]["step"] == before["step"] == 1
        found = [optimizer.state[p][name] for name in ("exp_avg", "exp_avg_sq")]
        for name, now in zip(("exp_avg", "exp_avg_sq"), found, strict=True):
            assert torch.equal(now, torch.where(now != 0, before[name], 0))
            if how == "magnitude":
                limit = torch.quantile(before[name].abs().float(), share)
                assert torch.equal(now != 0, before[name].abs() > limit)
        return found

    assert [int((m != 0).sum()) for m in moments("magnitude")] == [100, 100]
    assert [int((m != 0).sum()) for m in moments("magnitude", 1.0)] == [0, 0]
    assert [int((m != 0).sum()) for m in moments("reset")] == [0, 0]
    counts = [int((m != 0).sum()) for m in moments("random", 0.8)]
    assert all(150 < count < 250 for count in counts)
    assert all(torch.equal(one, two) for one, two in zip(moments("random"), moments("random"), strict=True))
    p = nn.Parameter(torch.zeros(4))
    codes = torch.optim.SGD([p])
    codes.state[p] = {"state1": torch.zeros(4, dtype=torch.uint8)}
    with pytest.raises(PruneError, match="codes"):
        prune_state(codes, [p], "reset", 1.0, Draw(0, "x"))


def test_the_jagged_cosine() -> None:
    """The multiplier of the authors' code, at the end of each step: warm-ups climb back to one cosine over all."""
    total, warm, cycle, again, floor = 60, 6, 20, 4, 0.1

    def level(t: float) -> float:
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (t - warm) / (total - warm)))

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = jagged_cosine(optimizer, total, cycle, warm, again, floor)
    found = []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"] / 2)
        optimizer.step()
        scheduler.step()
    for t in range(total):
        n, k = divmod(t, cycle)
        expected = level(t)
        if t < warm:
            expected = (t + 1) / warm
        elif n and k < again:
            expected = (k + 1) / again * level(n * cycle + again)
        assert found[t] == pytest.approx(expected), t
    assert found[20] < found[19] / 2
    assert found[23] == pytest.approx(found[24])
    assert jagged_factor(10**6 + 10, total, warm, cycle, again, floor) == pytest.approx(floor)
    for wrong in ({"cycle": 4, "restart_warmup": 4}, {"cycle": 20, "floor": 2.0}, {"cycle": 5, "warmup": 6}):
        with pytest.raises(ValueError, match="shorter than a cycle"):
            jagged_cosine(optimizer, 60, **{"restart_warmup": 2, "warmup": 0, **wrong})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no whole number of cycles"):
        jagged_cosine(optimizer, 50, 20, 6, 4)


@pytest.mark.parametrize("prune", ["magnitude", "random"])
@pytest.mark.parametrize("at", [5, 6])  # in mid-cycle, and right after a restart
def test_relora_resumes_exactly(at: int, prune: Any, tmp_path: Path) -> None:
    made: list[ReLoRA] = []

    def make() -> ReLoRA:
        made.append(ReLoRA(targets="q,v", rank=2, every=3, prune=prune, share=0.5, dropout=0.1))
        return made[-1]

    through, resumed = same_through_a_checkpoint(make, tmp_path, at, 10)
    assert [method.restarts for method in made] == [3, 3]
    assert through.losses[at:] == resumed.losses
    base = zoo.build("bert").bert.encoder.layer[0].attention.self.query.weight
    assert not torch.equal(base, resumed.net.bert.encoder.layer[0].attention.self.query.weight)
    alone = Boring()
    load_checkpoint(alone, tmp_path / "True" / f"step={at}.ckpt")
    method = state.get_applied(alone).method
    assert (method.restarts, type(method)) == (at // 3, ReLoRA)  # type: ignore[attr-defined]


def test_relora_restarts_by_optimizer_steps_and_prunes(tmp_path: Path) -> None:
    seen: list[tuple[int, bool, float]] = []

    def look(fit: Any, module: Any) -> None:
        own = adapters(module)[0]
        moments = fit.optimizers[0].state[own.b]["exp_avg"] if own.b in fit.optimizers[0].state else torch.ones(1)
        seen.append((fit.global_step, bool((own.b == 0).all()), float((moments == 0).float().mean())))

    method = ReLoRA(targets="q", rank=2, every=2, prune="reset", dropout=0.0)
    fit = trainer(tmp_path, [method, Watch(look)], max_steps=5, max_epochs=-1, accumulate_grad_batches=2)
    fit.fit(Boring(), data())
    by_step = {step: (zero, share) for step, zero, share in seen}
    assert [by_step[t][0] for t in range(1, 6)] == [False, True, False, True, False]
    assert [by_step[t][1] for t in (2, 4)] == [1.0, 1.0]
    assert by_step[3][1] < 0.5
    assert method.restarts == 2


def test_a_run_goes_on_with_the_groups_of_its_checkpoint(tmp_path: Path) -> None:
    def run(ratio: float | None, ckpt: Path | None = None) -> list[float]:
        net = zoo.build("llama").train()
        module = Language(net)
        module.make = lambda _: optimizer_of(net, plus(lambda groups: torch.optim.AdamW(groups, lr=0.5), ratio))
        fit = trainer(tmp_path, [LoRA(rank=2, heads=None)], max_steps=1 if ckpt is None else 2, max_epochs=-1)
        fit.fit(module, sentences(2), ckpt_path=ckpt, weights_only=None if ckpt is None else True)
        fit.save_checkpoint(tmp_path / f"{ratio}.ckpt")
        return [group["lr"] for group in fit.optimizers[0].param_groups]

    assert run(None) == [0.5]
    assert run(8.0) == [0.5, 4.0]
    assert run(8.0, tmp_path / "8.0.ckpt") == [0.5, 4.0]
    for ratio, other in ((None, "8.0"), (8.0, "None")):
        with pytest.raises(CheckpointError, match="in groups of"):
            run(ratio, tmp_path / f"{other}.ckpt")


class Thrice(Boring):
    """Three optimizer steps a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        for _ in range(3):
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()


def test_several_steps_in_a_batch_do_not_pass_by_a_restart_or_a_fall_of_ranks(tmp_path: Path) -> None:
    relora, adalora = ReLoRA(targets="q", rank=2, every=5), AdaLoRA(targets="v", rank=4, target=1, warmup=0, final=3,
                                                                   interval=5, total_steps=24)  # fmt: skip
    kept: list[int] = []
    watch = Watch(lambda t, m: kept.append(sum(ranks(m, "adalora").values())))
    trainer(tmp_path, [relora, adalora, watch]).fit(Thrice(), data())
    assert (relora.steps, relora.restarts) == (24, 4)
    sites = kept[0] // 4
    assert kept == [budget(t, 4 * sites, sites, 24, 0, 3) for t in (0, 6, 6, 12, 15, 15, 24, 24)]


def test_a_file_of_relora_holds_what_was_folded_in(tmp_path: Path) -> None:
    net = zoo.build("gpt2")
    method = ReLoRA(targets="q,v", rank=2, dropout=0.0)
    method.apply(net)
    perturb(net, 0.2, adapters_only=True)
    method.restart(net)
    perturb(net, 0.2, adapters_only=True, seed=5)
    save_adapter(net, tmp_path / "a")
    fresh = zoo.build("gpt2")
    loaded = load_adapter(fresh, tmp_path / "a")
    assert {**loaded.config(), "label": None} == method.config()
    assert method.restarts == 1
    assert torch.equal(output(fresh, "gpt2"), output(net, "gpt2"))
    state.get_applied(fresh).method.remove(fresh)
    assert torch.equal(output(fresh, "gpt2"), output(zoo.build("gpt2"), "gpt2"))


def test_relora_under_four_bits_keeps_its_weights_in_floats(tmp_path: Path) -> None:
    from lightning_peft.core.quantised import Quantised

    module = Boring()
    fit = trainer(
        tmp_path,
        [ReLoRA(targets="q", rank=2, every=1)],
        max_steps=2,
        plugins=[NF4Precision("nf4", compute_dtype="float32")],
    )
    fit.fit(module, data())
    layer = module.net.bert.encoder.layer[0]
    assert isinstance(layer.intermediate.dense, Quantised)
    assert not isinstance(layer.attention.self.query, Quantised)
    with pytest.raises(TargetError, match="no gradient reaches its codes"):
        ReLoRA(targets="up", rank=2, label="two").apply(module.net)


def test_relora_on_what_it_cannot_fold_into(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tied = Language(zoo.build("gpt2"))
    tied.net.transformer.h[1].mlp.c_fc.weight = tied.net.transformer.h[0].mlp.c_fc.weight
    with pytest.raises(MergeError, match="tied"):
        trainer(tmp_path, [ReLoRA(targets="up", rank=2)], max_steps=1).fit(tied, sentences(1))
    inner = IA3()
    with pytest.raises(MergeError, match="lies inside"):
        trainer(tmp_path, [inner, ReLoRA(targets="v", rank=2)], max_steps=1).fit(Boring(), data())
    half = Language(zoo.build("llama").bfloat16())
    trainer(tmp_path, [ReLoRA(targets="v", rank=2)], max_steps=1).fit(half, sentences(1))
    assert "each restart rounds" in caplog.text
    for wrong in ({"every": 0}, {"share": 1.5}, {"restarts": -1}, {"rank": 0}, {"dropout": 1.0}):
        with pytest.raises(FieldError):
            ReLoRA(**wrong)  # type: ignore[arg-type]


# ------------------------------------------------------------------ LongLoRA
def group_of(time: int, groups: int, shifted: bool, wrap: bool) -> list[int]:
    """The group of each token, from the paper's figure."""
    size = -(-time // groups)
    if not shifted:
        return [t // size for t in range(time)]
    found = [(t + size - size // 2) // size for t in range(time)]
    return [0 if wrap and g == max(found) else g for g in found]


def dense(q: Tensor, k: Tensor, v: Tensor, groups: int, wrap: bool, causal: bool, padding: Tensor | None) -> Tensor:
    """Softmax over a dense mask, head by head: (batch, heads, time, head_dim) -> (batch, time, heads, head_dim)"""
    time, heads = q.shape[2], q.shape[1]
    size = -(-time // groups)
    out = []
    for h in range(heads):
        shifted = h >= heads // 2
        group = torch.tensor(group_of(time, groups, shifted, wrap))
        mask = group[:, None] == group[None]
        place = torch.arange(time).roll(size // 2) if shifted and wrap else torch.arange(time)  # after the roll
        if causal:
            mask = mask & (place[:, None] >= place[None])
        mask = mask[None] if padding is None else mask[None] & padding[:, None, :]
        kv = h * k.shape[1] // heads
        scores = q[:, h] @ k[:, kv].transpose(1, 2) / q.shape[-1] ** 0.5
        out.append(scores.masked_fill(~mask, -math.inf).softmax(-1).nan_to_num(0.0) @ v[:, kv])
    return torch.stack(out, 2)


def causal_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> tuple[Tensor, None]:
    """What transformers does: groups of heads share keys, and without a mask it is causal."""
    k, v = (x.repeat_interleave(options["heads"] // options["kv"], 1) for x in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and options["is_causal"])
    return y.transpose(1, 2), None


@pytest.mark.parametrize(("heads", "kv"), [(4, 4), (4, 2), (4, 1), (3, 3), (6, 3)])
@pytest.mark.parametrize(
    ("time", "groups", "wrap"), [(16, 4, False), (16, 4, True), (7, 4, False), (13, 3, False), (3, 4, False)]
)
def test_shifted_sparse_attention_is_dense_attention_under_its_mask(
    heads: int, kv: int, time: int, groups: int, wrap: bool
) -> None:
    q, k, v = numbers(2, heads, time, 5), numbers(2, kv, time, 5, seed=1), numbers(2, kv, time, 5, seed=2)
    adapter = ShiftedSparseAttention(groups, wrap)
    own = {"heads": heads, "kv": kv}
    for causal in (True, False):
        found = adapter(causal_sdpa, q, k, v, None, is_causal=causal, **own)[0]
        torch.testing.assert_close(found, dense(q, k, v, groups, wrap, causal, None), atol=1e-10, rtol=1e-10)
    if not wrap:
        padding = torch.ones(2, time, dtype=torch.bool)
        padding[1, -2:] = False
        seen = torch.ones(time, time, dtype=torch.bool).tril() & padding[:, None]
        additive = torch.zeros(seen.shape, dtype=torch.float64).masked_fill_(~seen, -1e9)
        expected = dense(q, k, v, groups, wrap, True, padding)
        for mask in (seen[:, None], seen[:, None].expand(-1, heads, -1, -1), additive[:, None]):
            found = adapter(causal_sdpa, q, k, v, mask, is_causal=True, **own)[0]
            torch.testing.assert_close(found[0], expected[0], atol=1e-10, rtol=1e-10)
            torch.testing.assert_close(found[1, :-2], expected[1, :-2], atol=1e-10, rtol=1e-10)
        across = padding[:, None, None]  # of keys alone, as torch.nn gives it
        found = adapter(causal_sdpa, q, k, v, across, is_causal=False, **own)[0]
        torch.testing.assert_close(
            found[1, :-2], dense(q, k, v, groups, wrap, False, padding)[1, :-2], atol=1e-10, rtol=1e-10
        )
    adapter.eval()
    assert torch.equal(
        adapter(causal_sdpa, q, k, v, None, is_causal=True, **own)[0],
        causal_sdpa(q, k, v, None, is_causal=True, **own)[0],
    )


def test_position_biases_are_cut_as_masks_are() -> None:
    q, k, v = numbers(2, 4, 8, 5), numbers(2, 4, 8, 5, seed=1), numbers(2, 4, 8, 5, seed=2)
    bias = numbers(1, 4, 8, 8, seed=3)

    def base(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, position_bias: Tensor) -> tuple[Tensor, None]:
        return scaled_dot_product(q, k, v, position_bias)[0], None

    found = ShiftedSparseAttention(4, False)(base, q, k, v, None, position_bias=bias)[0]
    expected = ShiftedSparseAttention(4, False)(scaled_dot_product, q, k, v, bias)[0]
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, ShiftedSparseAttention(4, False)(scaled_dot_product, q, k, v, None)[0])


@pytest.mark.parametrize("model", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_no_token_sees_a_later_one(model: str, implementation: str) -> None:
    for wrap in (False, True) if implementation == "sdpa" else (False,):
        net: Any = zoo.build(model)
        net.set_attn_implementation(implementation)
        LongLoRA(targets="q", rank=2, trained="norm", wrap=wrap).apply(net)
        net.train()
        tokens = torch.arange(3, 19)[None]
        before = net(input_ids=tokens, use_cache=False).logits.detach()
        leaks = 0
        for t in range(1, 16):
            other = tokens.clone()
            other[0, t] = 50
            after = net(input_ids=other, use_cache=False).logits.detach()
            assert not torch.allclose(after[:, t], before[:, t])
            leaks += not torch.allclose(after[:, :t], before[:, :t], atol=1e-6)
        assert bool(leaks) is wrap  # the authors' plain code lets the first tokens see the last


def test_longlora_trains_embeddings_and_norms_and_counts_as_the_paper_does() -> None:
    net = zoo.meta("llama-7b")
    LongLoRA().apply(net)
    sizes = {"lora": 0, "norm": 0, "embed": 0}
    for name, p in state.trainable(net).items():
        sizes["lora" if ".adapters." in name else "norm" if "norm" in name else "embed"] += p.numel()
    assert sizes == {"lora": 8_388_608, "norm": 266_240, "embed": 131_072_000}
    qwen = zoo.build("qwen3")
    qwen.lm_head.weight = nn.Parameter(qwen.lm_head.weight.detach().clone())  # type: ignore[union-attr, operator]
    LongLoRA().apply(qwen)
    assert not any("q_norm" in name or "k_norm" in name for name in state.trainable(qwen))


def test_longlora_refuses_embeddings_that_the_head_is_tied_to() -> None:
    net = zoo.build("gpt2")
    with pytest.raises(TargetError, match="is tied to another module"):
        LongLoRA().apply(net)
    assert not state.applied_to(net)
    LongLoRA(trained="norm").apply(net)
    LongLoRA(trained=None, label="two").apply(net)


def test_interpolated_positions_are_those_of_transformers(tmp_path: Path) -> None:
    import copy

    from transformers import LlamaForCausalLM

    net: Any = zoo.build("llama")
    config = copy.deepcopy(net.config)
    config.rope_parameters = {**config.rope_parameters, "rope_type": "linear", "factor": 4.0}
    linear = LlamaForCausalLM(config).eval()
    linear.load_state_dict(net.state_dict())
    plain = output(net, "llama")
    method = LongLoRA(targets="q", rank=2, interpolation=4.0)
    method.apply(net)
    torch.testing.assert_close(output(net, "llama"), output(linear, "llama"), atol=1e-6, rtol=1e-6)
    with method.enabled(net, False):
        assert torch.equal(output(net, "llama"), plain)
    perturb(net)
    with pytest.raises(NotMergeableError, match="rope_type"):
        method.merge(net)
    save_adapter(net, tmp_path / "a")
    fresh = zoo.build("llama")
    load_adapter(fresh, tmp_path / "a")
    assert torch.equal(output(fresh, "llama"), output(net, "llama"))
    with pytest.raises(TargetError, match="no rotary embedding"):
        LongLoRA(trained="norm", interpolation=2.0).apply(zoo.build("gpt2"))


def test_longlora_in_a_trainer_and_out_of_it(tmp_path: Path) -> None:
    module = Language(zoo.build("llama"))
    method = LongLoRA(rank=2)
    before = output(module.net, "llama")
    fit = trainer(tmp_path, [method], max_steps=8, max_epochs=-1)
    for other in (method, LoRADropout(rank=2, label="other")):
        with pytest.raises(LifeCycleError, match="Call .train"):  # from_pretrained gives models in eval mode
            trainer(tmp_path, [other], max_steps=1).fit(module, sentences(2, 16))
        other.remove(module)
    module.net.train()
    fit.fit(module, sentences(2, 16))
    assert module.losses[-1] < module.losses[0]
    module.eval()
    expected = output(module.net, "llama")
    assert not torch.allclose(expected, before)
    method.merge(module)
    torch.testing.assert_close(output(module.net, "llama"), expected, atol=1e-5, rtol=1e-5)
    method.remove(module)
    assert torch.equal(output(module.net, "llama"), before)


def test_what_longlora_cannot_do() -> None:
    q, k = numbers(1, 2, 6, 4), numbers(1, 2, 9, 4)
    with pytest.raises(ValueError, match="6 queries and 9 keys"):
        ShiftedSparseAttention(2, False)(scaled_dot_product, q, k, k, None)
    for time, groups in ((6, 4), (12, 4)):  # no whole groups; groups of odd size
        x = numbers(1, 2, time, 4)
        with pytest.raises(ValueError, match="groups of even size"):
            ShiftedSparseAttention(groups, True)(scaled_dot_product, x, x, x, None)
    with pytest.raises(ValueError, match="under this mask is not known"):
        ShiftedSparseAttention(2, True)(scaled_dot_product, q, q, q, torch.zeros(1, 1, 6, 6))
    for wrong in ({"groups": 0}, {"rank": 0}, {"interpolation": 0.5}, {"alpha": -1.0}, {"dropout": 1.0}):
        with pytest.raises(FieldError):
            LongLoRA(**wrong)  # type: ignore[arg-type]


# ------------------------------------------------------------------ LoRA dropout
def dropped(**fields: Any) -> tuple[One, LoRADropout, Any]:
    net = One()
    method = LoRADropout(targets="proj", rank=3, alpha=6, heads=None, dtype="float64", **fields)
    method.apply(net)
    perturb(net, 0.4)
    return net, method, adapters(net)[0]


@pytest.mark.parametrize("rescale", [False, True])
def test_rows_and_columns_are_dropped_once_a_forward_for_all_tokens(rescale: bool) -> None:
    net, _, adapter = dropped(p=0.25, rescale=rescale)
    net.train()
    gain = 1 / 0.75 if rescale else 1.0
    x = torch.eye(6).double()
    counts = torch.zeros(2)
    for seed in range(200):
        torch.manual_seed(seed)
        change = (net(x) - F.linear(x, net.proj.weight, net.proj.bias)).T  # (d_out, d_in)
        whole = 2 * adapter.b @ adapter.a
        rows, columns = (change != 0).any(1), (change != 0).any(0)
        torch.testing.assert_close(change, gain**2 * whole * (rows[:, None] & columns), atol=1e-12, rtol=1e-10)
        counts += torch.tensor([rows.float().mean(), columns.float().mean()])
    assert ((counts / 200 - 0.75).abs() < 0.05).all()
    loss = net(x).square().sum()
    gradient = torch.autograd.grad(loss, adapter.b)[0]
    assert ((gradient == 0).all(1) | (gradient != 0).any(1)).all()


@pytest.mark.parametrize("rescale", [False, True])
def test_the_deterministic_mode_is_the_expectation_and_merges(rescale: bool) -> None:
    net, method, adapter = dropped(p=0.25, rescale=rescale, ensemble=0)
    net.eval()
    x = numbers(3, 6, seed=9)
    share = 1.0 if rescale else 0.75**2
    expected = F.linear(x, net.proj.weight + share * 2 * adapter.b @ adapter.a, net.proj.bias)
    torch.testing.assert_close(net(x), expected, atol=1e-10, rtol=1e-10)
    net.train()  # merging does not look at the mode
    method.merge(net)
    torch.testing.assert_close(net(x), expected, atol=1e-10, rtol=1e-10)


def test_an_ensemble_averages_the_outputs_of_its_masks(tmp_path: Path) -> None:
    class Twice(nn.Module):
        """Not linear in its change, so that the mean of outputs is not the output of a mean."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = One(), nn.Linear(10, 2).double()

        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"logits": self.b(torch.tanh(self.a(x))), "classes": torch.tensor([1]), "more": (x, None)}

    torch.manual_seed(1)
    net = Twice()
    method = LoRADropout(targets="proj,b", rank=2, p=0.4, ensemble=5, heads=None, dtype="float64", seed=3)
    method.apply(net)
    perturb(net, 0.5)
    net.eval()
    x = numbers(4, 6, seed=2)
    found = net(x)
    first, second = adapters(net)[:2]
    by_hand = []
    for n in range(5):
        one, two = ((2 / 2 * 8) * (d.b * d.rows[n][:, None]) @ (d.a * d.columns[n]) for d in (first, second))
        z = torch.tanh(F.linear(x, net.a.proj.weight + one, net.a.proj.bias))
        by_hand.append(F.linear(z, net.b.weight + two, net.b.bias))
    torch.testing.assert_close(found["logits"], torch.stack(by_hand).mean(0), atol=1e-10, rtol=1e-10)
    assert found["classes"].tolist() == [1]
    assert found["more"][1] is None
    torch.testing.assert_close(found["more"][0], x)
    assert torch.equal(found["logits"], net(x)["logits"])  # the masks are those of the seed
    with pytest.raises(NotMergeableError, match="ensemble=0"):
        method.merge(net)
    save_adapter(net, tmp_path / "a")
    torch.manual_seed(1)
    fresh = Twice().eval()
    load_adapter(fresh, tmp_path / "a")
    assert torch.equal(fresh(x)["logits"], found["logits"])
    with method.enabled(net, False):
        torch.testing.assert_close(net(x)["logits"], Twice.forward(net, x)["logits"])


def test_an_ensemble_in_a_trainer(tmp_path: Path) -> None:
    module = Boring()
    method = LoRADropout(targets="q,v", rank=2, ensemble=3)
    fit = trainer(tmp_path, [method], max_steps=4, max_epochs=-1)
    fit.fit(module, data())
    placements = state.get_applied(module).placements
    assert [x.site for x in placements if not any(True for _ in x.adapter.parameters())] == ["net"]
    found = torch.cat(fit.predict(module, data(shuffle=False)))  # type: ignore[arg-type]
    member = placements[0].adapter.member
    outputs = []
    module.eval()
    for n in range(3):
        member.now = n
        with torch.no_grad():
            outputs.append(torch.cat([module.net(input_ids=x).logits for x, _ in data(shuffle=False)]))
        member.now = None
    torch.testing.assert_close(found, torch.stack(outputs).mean(0), atol=1e-6, rtol=1e-6)
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-4)
    same_through_a_checkpoint(lambda: LoRADropout(targets="q,v", rank=2), tmp_path / "again", 3, 6)


class Towers(LightningModule):
    """Two networks that see the same."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = zoo.build("bert"), zoo.build("bert")

    def compare(self, x: Tensor) -> Tensor:
        return (self.left(input_ids=x).logits * self.right(input_ids=x).logits).sum(-1)


class Whole(Towers):
    """With a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self.compare(x)


def test_an_ensemble_over_several_networks() -> None:
    x = torch.arange(3, 9)[None]
    towers, whole, direct = Towers(), Whole(), Language(nn.Linear(6, 6))
    for module in (towers, direct):
        with pytest.raises(TargetError, match="has no forward"):  # nothing would call what goes around it
            LoRADropout(targets="*query" if module is towers else "net", rank=2).apply(module)
    LoRADropout(targets="*query", rank=2, ensemble=3).apply(whole)
    perturb(whole, 0.3)
    calls: list[int] = []
    whole.left.register_forward_hook(lambda *_: calls.append(1))
    whole.eval()(x)
    assert len(calls) == 3
    LoRADropout(targets="*query", rank=2, ensemble=0).apply(towers)
    LoRADropout(targets="left.*query", rank=2, label="left").apply(Towers())


def test_an_ensemble_keeps_no_cache() -> None:
    net: Any = zoo.build("llama")
    LoRADropout(targets="q", rank=2, ensemble=2).apply(net)
    tokens = torch.arange(3, 9)[None]
    assert net(input_ids=tokens).past_key_values is None
    with pytest.raises(ValueError, match="use_cache=False"):
        net(input_ids=tokens, use_cache=True)
    assert net.generate(input_ids=tokens, max_new_tokens=2, use_cache=False).shape == (1, 8)
    for wrong in ({"p": 1.0}, {"ensemble": -1}, {"rank": 0}, {"alpha": -1.0}):
        with pytest.raises(FieldError):
            LoRADropout(**wrong)
