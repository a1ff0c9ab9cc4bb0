"""Selective tuning: scores and choices by dense oracles, exact masks in every kind of run, memory, files, phases."""

from __future__ import annotations

import copy
import math
import random
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boring
import lightning.pytorch as pl
import numpy
import pytest
import torch
import torch.nn.functional as F
import zoo
from harness import output, perturb
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_peft import LTSFT, DiffPruning, FishMask, LoRA, SelectiveTuning, Surgical, load_adapter, save_adapter
from lightning_peft.callback import LifeCycleError
from lightning_peft.core import heat_map, scores, state
from lightning_peft.core.calibration import CalibrationError
from lightning_peft.core.fields import FieldError
from lightning_peft.core.scattered import Product, rechosen
from lightning_peft.core.scores import Choice, top
from lightning_peft.core.sites import TargetError
from lightning_peft.methods.diff_pruning import diff_pruning_groups, gate
from lightning_peft.optim import adamw_8bit
from lightning_peft.tasks.hub import minilm_folder

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]


class Net(nn.Module):
    """Two projections, widths that differ, a norm, an unused buffer, dropout and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(5, 7), nn.BatchNorm1d(7)
        self.down, self.drop = Conv1D(3, 7), nn.Dropout(0.3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.down(self.drop(torch.tanh(self.norm(self.up(x))))), y)


def net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        made = Net().double()
        nn.init.normal_(made.down.weight)
        return made


def batches(count: int = 3, rows: int = 4) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(2)
    return [
        (torch.randn(rows, 5, generator=g).double(), torch.randint(0, 3, (rows,), generator=g)) for _ in range(count)
    ]


def gradient(model: Net, given: list[Any], square: bool = False) -> list[Tensor]:
    """The mean over batches of the gradient, or of its square, with nothing of the package."""
    model = copy.deepcopy(model).eval()
    total = [torch.zeros_like(p) for p in model.parameters()]
    for x, y in given:
        grads = torch.autograd.grad(model(x, y), list(model.parameters()))
        total = [t + (g.square() if square else g) for t, g in zip(total, grads, strict=True)]
    return [(t / len(given)).flatten() for t in total]


def effective(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter as the model computes with it."""
    base = {n: p.detach().clone() for n, p in model.named_parameters() if ".adapters." not in f".{n}"}
    for applied in state.applied_to(model).values():
        for x in applied.placements:
            for name, change in x.adapter.changes().items():  # type: ignore[attr-defined]
                key = f"{x.site}.{name}"
                if key in base and not x.adapter.mirrors:
                    base[key] = base[key] + change.detach().to(base[key])
    return base


# ------------------------------------------------------------------ scores
ORACLES: dict[str, Callable[[list[Tensor], list[Tensor]], list[Tensor]]] = {
    "magnitude": lambda t, g: [a.abs() for a in t],
    "gradient": lambda t, g: [b.abs() for b in g],
    "sensitivity": lambda t, g: [(a * b).abs() for a, b in zip(t, g, strict=True)],
    "movement": lambda t, g: [-a * b for a, b in zip(t, g, strict=True)],
    "relative": lambda t, g: [b.abs() / (a.abs() + 1e-8) for a, b in zip(t, g, strict=True)],
}


@pytest.mark.parametrize("score", ORACLES)
def test_scores_and_the_choice_of_the_largest(score: str) -> None:
    model = net()
    theta = [p.detach().flatten() for p in model.parameters()]
    expected = ORACLES[score](theta, gradient(model, batches()))
    method = SelectiveTuning(score=score, budget=0.3, heads=None)  # type: ignore[arg-type]
    method.apply(model)
    found = method.identify(model, batches())
    torch.testing.assert_close(torch.cat(found).double(), torch.cat(expected), rtol=2e-4, atol=1e-6)
    index = method.chooser(model).entries.index.long()
    assert len(index) == len(method.chooser(model).entries.v) == round(0.3 * 80)
    assert torch.equal(index, index.unique())
    kept = torch.cat(found)[index]
    assert kept.min() >= torch.cat(found).sort(descending=True).values[len(index) - 1]


def test_fisher_is_of_single_examples_and_not_of_a_batch() -> None:
    given = batches()
    single = [(x[i : i + 1], y[i : i + 1]) for x, y in given for i in range(len(x))]
    model = net()
    method = FishMask(samples=10, budget=9, measure="parameters", heads=None)
    method.apply(model)
    found = torch.cat(method.identify(model, given)).double()
    expected = torch.cat(gradient(net(), single[:10], square=True))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)
    of_batches = torch.cat(gradient(net(), given, square=True))
    assert (of_batches / expected.clamp(min=1e-12)).median() < 0.6  # the square of a mean is another, smaller score
    assert len(method.chooser(model).entries.v) == 9


class Says(Net):
    """Logits, as transformers' outputs hold them."""

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return SimpleNamespace(logits=self.down(self.drop(torch.tanh(self.norm(self.up(x))))))


def test_fisher_that_is_expected_is_the_mean_over_what_the_model_predicts() -> None:
    model = Says().double()
    model.load_state_dict(net().state_dict())
    xs = torch.cat([x for x, _ in batches()])[:7]
    expected = [torch.zeros(p.shape).double() for p in model.parameters()]
    for x in xs:
        p = copy.deepcopy(model).eval()(x[None]).logits[0].softmax(0)
        for y in range(3):
            grads = gradient(net(), [(x[None], torch.tensor([y]))], square=True)
            expected = [e + p[y].detach() * g.view_as(e) / len(xs) for e, g in zip(expected, grads, strict=True)]
    method = FishMask(expect=True, samples=7, budget=0.1, heads=None)
    method.apply(model)
    found = torch.cat(method.identify(model, [x for x, _ in batches()])).double()
    torch.testing.assert_close(found, torch.cat([e.flatten() for e in expected]), rtol=1e-5, atol=1e-9)


def test_what_a_classifier_expects_is_asked_of_predictions(tmp_path: Path) -> None:
    module, method = boring.Says(), FishMask(expect=True, samples=4)
    boring.trainer(tmp_path, [method], max_steps=1).fit(module, boring.data(), boring.data(6, shuffle=False))
    assert len(method.chooser(module).entries.v) == round(0.005 * method.chooser(module).entries.total)
    method = FishMask(expect=True, budget=0.1)
    method.apply(mute := boring.Boring())
    with pytest.raises(LifeCycleError, match="no predictions"):
        method.identify(mute, boring.data())
    method = FishMask(expect=True, budget=0.1)
    method.apply(llama := zoo.build("llama"))
    with pytest.raises(CalibrationError, match="one prediction an example.*language models"):
        method.identify(llama, [zoo.inputs("llama")])


def test_looking_changes_nothing() -> None:
    model = net().train()
    method = FishMask(budget=0.1, heads=None)
    method.apply(model)
    model.up.weight.grad = torch.ones_like(model.up.weight)
    model.norm.eval()
    tensors = {n: t.detach().clone() for n, t in model.named_buffers() if ".adapters." not in f".{n}"}
    tensors |= {n: p.detach().clone() for n, p in model.named_parameters() if ".adapters." not in f".{n}"}
    modes, flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    torch.manual_seed(4)
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()

    def run(batch: Any, index: int) -> Tensor:
        torch.rand(1), random.random(), numpy.random.rand()
        model.norm.running_mean.add_(1)  # type: ignore[operator]
        return model(*batch)

    method.identify(model, batches(), run)
    now = dict(model.named_buffers()) | dict(model.named_parameters())
    assert all(torch.equal(now[n], t) for n, t in tensors.items())
    assert torch.equal(model.up.weight.grad, torch.ones_like(model.up.weight))
    assert sum(p.grad is not None for p in model.parameters()) == 1
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == before[1:]


def test_looking_leaves_the_tensors_that_buffers_are_and_what_modules_count() -> None:
    model = net()
    model.passes = 0  # type: ignore[assignment]
    model.register_buffer("seen", None)
    mean = model.norm.running_mean
    method = SelectiveTuning(budget=0.1, heads=None)
    method.apply(model)

    def run(batch: Any, index: int) -> Tensor:
        model.seen, model.norm.running_mean = batch[0], model.norm.running_mean + 1  # type: ignore[operator, assignment]
        model.passes += 1  # type: ignore[operator]
        model.register_buffer("made", batch[0])
        return model(*batch)

    method.identify(model, batches(), run)
    assert (model.passes, "made" in dict(model.named_buffers())) == (0, False)
    assert model.norm.running_mean is mean
    assert not mean.any()  # type: ignore[union-attr, operator]
    assert model.seen is None


# ------------------------------------------------------------------ choices
def test_the_largest_with_ties_by_place() -> None:
    found = top([torch.tensor([1.0, 3.0, 1.0]), torch.tensor([1.0, 2.0, 1.0])], 4)
    assert [f.tolist() for f in found] == [[0, 1, 2], [1]]
    assert [f.tolist() for f in top([torch.ones(3), torch.ones(3)], 4)] == [[0, 1, 2], [0]]
    assert [f.tolist() for f in top([torch.tensor([5.0, 1.0]), torch.tensor([4.0])], 3, 2.0)] == [[0], [0]]
    assert [len(f) for f in top([torch.ones(2)], 0)] == [0]


def chosen(**fields: Any) -> tuple[Net, Any, Tensor]:
    model = net()
    method = SelectiveTuning(**{"score": "sensitivity", "heads": None, **fields})
    method.apply(model)
    found = method.identify(model, batches())
    return model, method.chooser(model), torch.cat(found)


def test_budgets_are_exact_and_local_ones_by_size() -> None:
    sizes = [35, 7, 7, 7, 21, 3]
    for budget, measure, count in ((0.25, "share", 20), (13, "parameters", 13), (95, "bytes", 11)):
        _, chooser, all_scores = chosen(budget=budget, measure=measure)
        assert len(chooser.entries.index) == count
        _, local, _ = chosen(budget=budget, measure=measure, within="tensor")
        parts = [b - a for a, b in zip(local.entries.cuts, local.entries.cuts[1:], strict=False)]
        assert sum(parts) == count
        assert all(abs(part - count * size / 80) < 1 for part, size in zip(parts, sizes, strict=True))
        best, here = (all_scores[c.entries.index.long()].sum() for c in (chooser, local))
        assert best >= here  # a global choice has the largest total there is


@pytest.mark.parametrize("fields", [{}, {"dtype": "float64"}, {"dtype": "bfloat16", "heads_in_budget": True}])
def test_bytes_are_those_of_the_file(fields: dict[str, Any], tmp_path: Path) -> None:
    model = zoo.build("bert")
    SelectiveTuning(score="random", budget=9999, measure="bytes", **fields).apply(model)
    save_adapter(model, tmp_path / "a")
    saved = load_file(tmp_path / "a" / "adapter.safetensors")
    counted = [t.nbytes for name, t in saved.items() if fields.get("heads_in_budget") or "entries" in name]
    assert 9999 - 12 < sum(counted) <= 9999


def test_a_threshold_within_a_budget() -> None:
    middle = float(chosen(budget=1.0)[2].median()) + 1e-9
    _, chooser, values = chosen(select="threshold", threshold=middle, budget=1.0)
    assert 20 < len(chooser.entries.index) == int((values > middle).sum()) < 80
    _, few, _ = chosen(select="threshold", threshold=middle, budget=5, measure="parameters")
    assert len(few.entries.index) == 5
    with pytest.raises(CalibrationError, match="Lower the threshold"):
        chosen(select="threshold", threshold=1e9, budget=1.0)


def test_whole_rows_with_their_bias() -> None:
    _, chooser, values = chosen(over="rows", budget=30, measure="parameters")
    mask = torch.zeros(80, dtype=torch.bool)
    mask[chooser.entries.index.long()] = True
    up, up_bias, gain, shift, down, down_bias = mask.split([35, 7, 7, 7, 21, 3])
    assert torch.equal(up.view(7, 5).all(1), up.view(7, 5).any(1))
    assert torch.equal(up.view(7, 5).all(1), up_bias)
    assert torch.equal(gain, shift)  # one feature of a norm
    assert torch.equal(down.view(7, 3).all(0), down.view(7, 3).any(0))  # a Conv1D's outputs are columns
    assert torch.equal(down.view(7, 3).all(0), down_bias)
    s_up, s_bias, s_gain, s_shift, s_down, s_last = values.double().split([35, 7, 7, 7, 21, 3])
    means = [(s_up.view(7, 5).sum(1) + s_bias) / 6, (s_gain + s_shift) / 2, (s_down.view(7, 3).sum(0) + s_last) / 8]
    sizes, left, expected = [6] * 7 + [2] * 7 + [8] * 3, 30, 0
    for i in torch.cat(means).argsort(descending=True).tolist():
        if sizes[i] <= left:
            left, expected = left - sizes[i], expected + sizes[i]
    assert int(mask.sum()) == expected


OUTPUTS = [
    (nn.ConvTranspose1d(6, 4, 3, groups=2), "weight", [(i // 3 * 2 + o) for i in range(6) for o in range(2)]),
    (nn.ConvTranspose2d(3, 3, 2), "weight", [o for _ in range(3) for o in range(3)]),
    (nn.Conv1d(4, 6, 3, groups=2), "weight", [o for o in range(6) for _ in range(2)]),
    (nn.Bilinear(2, 3, 4), "weight", [o for o in range(4) for _ in range(6)]),
]


@pytest.mark.parametrize(("module", "name", "expected"), OUTPUTS)
def test_rows_are_outputs(module: nn.Module, name: str, expected: list[int]) -> None:
    model = nn.ModuleDict({"layer": module})
    method = SelectiveTuning(score="random", over="rows", budget=0.5, heads=None)
    method.apply(model)
    weight, bias = method.chooser(model).candidates
    where = weight.row_of().view(len(expected), -1)
    assert torch.equal(where, torch.tensor(expected)[:, None].expand_as(where))
    assert weight.outputs == bias.outputs == ("layer", "", len(module.bias))  # type: ignore[arg-type]


def test_separate_projections_of_attention_are_outputs_of_their_own() -> None:
    model = nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2, kdim=5, vdim=5)})
    method = SelectiveTuning(score="random", over="rows", budget=0.5, heads=None)
    method.apply(model)
    outputs = {c.attribute: c.outputs for c in method.chooser(model).candidates}
    assert outputs["out_proj.weight"] == outputs["out_proj.bias"]
    assert len({outputs[f"{p}_proj_weight"] for p in "qkv"} | {outputs["out_proj.weight"]}) == 4


@pytest.mark.parametrize(("over", "mean"), [("tensors", True), ("blocks", False)])
def test_whole_tensors_and_blocks(over: str, mean: bool) -> None:
    model = zoo.build("bert")
    method = SelectiveTuning(score="relative", over=over, mean=mean, budget=0.4)  # type: ignore[arg-type]
    method.apply(model)
    x = zoo.inputs("bert")
    method.identify(model, [{**x, "labels": torch.tensor([0, 2])}])
    chooser = method.chooser(model)
    parts = [b - a for a, b in zip(chooser.entries.cuts, chooser.entries.cuts[1:], strict=False)]
    assert all(part in (0, c.size) for part, c in zip(parts, chooser.candidates, strict=True))
    assert 0 < sum(parts) <= round(0.4 * chooser.entries.total)
    if over == "blocks":
        by_block: dict[str, set[bool]] = {}
        for part, c in zip(parts, chooser.candidates, strict=True):
            by_block.setdefault(c.block or c.name, set()).add(part > 0)
        assert all(len(kept) == 1 for kept in by_block.values())


def test_relative_scores_of_units_are_ratios_of_norms() -> None:
    model = net()
    g, theta = gradient(model, batches()), [p.detach().flatten() for p in model.parameters()]
    expected = torch.stack([b.norm() / (a.norm() + 1e-8) for a, b in zip(theta, g, strict=True)])
    _, chooser, _ = chosen(score="relative", over="tensors", budget=35, measure="parameters")
    left, taken = 35, set()
    for i in expected.argsort(descending=True).tolist():
        if len(g[i]) <= left:
            left, taken = left - len(g[i]), taken | {i}
    cuts = chooser.entries.cuts
    assert {i for i in range(6) if cuts[i + 1] > cuts[i]} == taken


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"budget": 1.5}, FieldError, "a share up to 1"),
        ({"every": 2, "score": "change"}, FieldError, "a run of its own"),
        ({"expect": True}, FieldError, "is for score='fisher'"),
        ({"l1": 0.1}, FieldError, "is for score='change'"),
        ({"over": "blocks", "within": "block"}, FieldError, "one unit"),
        ({"budget": 0.0001}, TargetError, "leaves room for 0 of 80"),
        ({"targets": "drop"}, TargetError, "finds no tensor"),
    ],
)
def test_what_makes_no_sense_is_an_error(fields: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        SelectiveTuning(**{"heads": None, **fields}).apply(net())


def test_batches_that_say_nothing_are_errors() -> None:
    model = net()
    method = SelectiveTuning(heads=None, budget=0.1)
    method.apply(model)
    with pytest.raises(CalibrationError, match="no loss"):
        method.identify(model, batches(), lambda batch, index: torch.zeros(()))
    with pytest.raises(CalibrationError, match="no gradient"):
        method.identify(model, batches(), lambda batch, index: model.up.weight.sum() * 0)
    method = FishMask(heads=None, budget=0.1)
    method.apply(fresh := net())
    with pytest.raises(CalibrationError, match="one first dimension"):
        method.identify(fresh, [(torch.zeros(4, 5), torch.zeros(3))])
    with pytest.raises(CalibrationError, match="not finite"):
        Choice(1)([scores.Candidate(None, "", "", "")], [torch.tensor([math.nan])])  # type: ignore[arg-type]


def test_what_is_used_without_a_call_of_its_module_is_not_chosen(caplog: pytest.LogCaptureFixture) -> None:
    class Borrows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(self.a(x), self.b.weight), y)

    method = SelectiveTuning(budget=0.5, heads=None)
    method.apply(model := Borrows().double())
    method.identify(model, batches())
    cuts = method.chooser(model).entries.cuts
    assert cuts[2] == cuts[-1] > 0
    assert "b.weight is used without a call" in caplog.text


def test_a_tensor_tied_to_one_left_out_is_left_out() -> None:
    model = zoo.build("gpt2")
    method = SelectiveTuning(score="random", budget=0.1, exclude="*lm_head")
    method.apply(model)
    names = {f"{c.name}.{c.attribute}" for c in method.chooser(model).candidates}
    assert "transformer.wte.weight" not in names
    assert "transformer.wpe.weight" in names
    whole = SelectiveTuning(score="random", budget=0.1)
    whole.apply(both := zoo.build("gpt2"))
    tied = [c for c in whole.chooser(both).candidates if c.parameter is both.lm_head.weight]
    assert len(tied) == 1  # once


PACKED = {"gpt2": ("attn.c_attn", 1), "encoder": ("self_attn.in_proj_", 0)}  # where q, k and v are, and along what


def of_q_and_v(model: str, name: str, p: Tensor) -> Tensor:
    """A mask, from what is known of the layouts."""
    mask, (packed, dim) = torch.zeros(p.shape, dtype=torch.bool), PACKED[model]
    if packed in name:
        q, _, v = mask.chunk(3, dim if p.dim() == 2 else 0)
        q.fill_(True), v.fill_(True)
    return mask


def slices_of(model: str, adapted: nn.Module) -> tuple[Tensor, Tensor]:
    """theta_0 and theta of the entries of q and v, flat; everything else is checked to be the base's."""
    found, now = list[tuple[Tensor, Tensor]](), effective(adapted)
    for name, p in zoo.build(model).named_parameters():
        mask = of_q_and_v(model, name, p)
        assert torch.equal(now[name][~mask], p[~mask])
        found.append((p.detach()[mask], now[name][mask]))
    return torch.cat([one for one, _ in found]), torch.cat([other for _, other in found])


@pytest.mark.parametrize("model", PACKED)
def test_slices_of_packed_projections_are_candidates(model: str) -> None:
    for over in ("weights", "rows"):
        method = SelectiveTuning(score="magnitude", over=over, targets="q,v", budget=0.3, heads=None)  # type: ignore[arg-type]
        method.apply(adapted := zoo.build(model))
        perturb(adapted, scale=1.0)
        before, now = slices_of(model, adapted)
        chosen, count = now != before, round(0.3 * len(before))
        assert method.chooser(adapted).entries.total == len(before)
        if over == "weights":
            best = before.abs().sort(descending=True, stable=True).indices[:count]
            assert torch.equal(chosen, torch.zeros(len(before)).index_fill(0, best, 1) > 0)
            continue
        assert 0.25 * len(before) < int(chosen.sum()) <= count
        mask = torch.zeros(method.chooser(adapted).entries.ends[-1]).index_fill(
            0, method.chooser(adapted).entries.index.long(), 1
        )
        first = method.chooser(adapted).candidates[0]
        rows = mask[: first.shape.numel()].view(first.shape).movedim(PACKED[model][1], 0)
        assert torch.equal(rows.any(1), rows.all(1))


@pytest.mark.parametrize("model", PACKED)
@pytest.mark.parametrize("kind", [LTSFT, DiffPruning])
def test_slices_that_train_as_a_whole_before_the_choice(model: str, kind: Any) -> None:
    method = kind(targets="q,v", exclude=None, budget=0.2, heads=None)
    method.apply(adapted := zoo.build(model))
    perturb(adapted.eval())
    before, moved = slices_of(model, adapted)
    assert len(before) == method.chooser(adapted).entries.total
    assert (before != moved).float().mean() > 0.9
    method.chooser(adapted).keep = True
    method.identify(adapted)
    best = (moved - before).abs().topk(round(0.2 * len(before))).indices
    torch.testing.assert_close(slices_of(model, adapted)[1], before.index_copy(0, best, moved[best]))


# ------------------------------------------------------------------ the moved tensors
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_product_is_that_of_the_scattered_weight(turned: bool, bias: bool) -> None:
    g = torch.Generator().manual_seed(0)
    draw = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_()  # noqa: E731
    x, w, b, v = draw(2, 4, 5), draw(*((5, 7) if turned else (7, 5))), draw(7) if bias else None, draw(6)
    index = torch.randperm(35, generator=g)[:6].sort().values
    ours = Product.apply(x, w, b, index, v, turned)
    moved = w.flatten().index_put((index,), v, accumulate=True).view_as(w)
    theirs = F.linear(x, moved.T if turned else moved, b)
    assert torch.allclose(ours, theirs, atol=1e-12)
    goal = torch.randn(ours.shape, generator=g, dtype=torch.float64)
    tensors = [t for t in (x, w, b, v) if t is not None]
    for one, two in zip(
        torch.autograd.grad((ours * goal).sum(), tensors),
        torch.autograd.grad((theirs * goal).sum(), tensors),
        strict=True,
    ):
        assert torch.allclose(one, two, atol=1e-12)


@pytest.mark.parametrize("model", ["gpt2", "t5", "vit", "encoder"])
def test_forward_and_gradients_are_those_of_masked_training_in_place(model: str) -> None:
    adapted, plain = zoo.build(model).double(), zoo.build(model).double()
    method = SelectiveTuning(score="random", budget=0.2, heads=None, dtype="float64")
    method.apply(adapted)
    perturb(adapted)
    entries = method.chooser(adapted).entries
    with torch.no_grad():
        for name, value in effective(adapted).items():
            plain.get_parameter(name).copy_(value)
    x = {k: v.double() if v.is_floating_point() else v for k, v in zoo.inputs(model).items()}
    results = []
    for one in (adapted, plain):
        out = one(**x)
        out = out if isinstance(out, Tensor) else out.logits
        out.square().mean().backward()
        results.append(out.detach())
    assert torch.allclose(*results, atol=1e-10)
    cuts = zip(method.chooser(adapted).candidates, entries.cuts, entries.cuts[1:], strict=False)
    for number, (c, first, last) in enumerate(cuts):
        grad = plain.get_parameter(f"{c.name}.{c.attribute}").grad
        local = entries.index[first:last].long() - entries.starts[number]
        expected = grad.flatten()[local] if grad is not None else torch.zeros(last - first).double()
        assert torch.allclose(entries.v.grad[first:last], expected, atol=1e-10)


def test_nothing_as_large_as_the_weights_is_kept_for_backward() -> None:
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])
    SelectiveTuning(score="random", budget=0.01, heads=None).apply(model)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(torch.randn(2, 64)).sum()
    own = {layer.weight.data_ptr() for layer in model}  # type: ignore[union-attr]
    assert {t.data_ptr() for t in kept if t.numel() >= 4096} == own
    loss.backward()
    assert not [p for p in model.parameters() if p.numel() >= 4096 and p.grad is not None]


# ------------------------------------------------------------------ runs
def fit(directory: Path, method: pl.Callback, ckpt: Path | None = None, **options: Any) -> boring.Boring:
    torch.manual_seed(9)
    module = boring.Boring(optimizer=options.pop("optimizer", "adamw"))
    saver = ModelCheckpoint(directory, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = boring.trainer(directory, [method, saver], **{"max_epochs": 2, **options})
    trainer.fit(module, boring.data(), boring.data(6, shuffle=False), ckpt_path=ckpt)
    return module


def check_masked(module: boring.Boring, method: Any) -> None:
    """All but the head and the chosen entries is the base's, bit for bit; all chosen ones may have moved."""
    base, now = boring.Boring(), effective(module)
    mask: dict[str, Tensor] = {}
    chooser = method.chooser(module)
    for c, n in zip(chooser.candidates, range(len(chooser.candidates)), strict=True):
        part = torch.zeros(c.size, dtype=torch.bool)
        if (found := chooser.entries.of(n)) is not None:
            part[found[0].long()] = True
        mask[f"{c.name}.{c.attribute}"] = part.view(c.shape)
    assert sum(int(m.sum()) for m in mask.values()) == len(chooser.entries.v) > 0
    for name, before in base.named_parameters():
        if "classifier" in name:
            continue
        outside = ~mask.get(name, torch.zeros(before.shape, dtype=torch.bool))
        assert torch.equal(now[name][outside].view(torch.int32), before.detach()[outside].view(torch.int32)), name
    assert any(not torch.equal(now[n], p) for n, p in base.named_parameters() if "classifier" not in n)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": "sgd"},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
        {"precision": "bf16-mixed"},
        {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))},  # type: ignore[attr-defined]
    ],
    ids=["adamw", "sgd", "accumulation and clipping", "bf16", "fp16 with a scaler"],
)
def test_entries_outside_of_the_mask_never_move(options: dict[str, Any], tmp_path: Path) -> None:
    method = SelectiveTuning(budget=0.02, batches=2)
    module = fit(tmp_path, method, **options)
    check_masked(module, method)
    assert len(method.chooser(module).entries.v) == round(0.02 * method.chooser(module).entries.total)
    picture = (tmp_path / "selective-scores.svg").read_text()
    assert xml.etree.ElementTree.fromstring(picture).tag.endswith("svg")
    lines = (tmp_path / "selective-scores.csv").read_text().splitlines()
    assert lines[0].startswith("layer,")
    assert len(lines) == 4  # the header, what is outside of blocks, two layers
    assert len((tmp_path / "selective-chosen.csv").read_text().splitlines()) == 4
    method.remove(module)
    plain = boring.Boring()
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), plain.parameters(), strict=True))


METHODS = {
    "selective": lambda: SelectiveTuning(budget=0.02, batches=2),
    "every epoch": lambda: SelectiveTuning(budget=0.02, batches=2, every=1),
    "lt_sft": lambda: LTSFT(budget=0.02, priming=5.0, l1=0.1),
    "diff_pruning": lambda: DiffPruning(budget=0.02, priming=5.0, penalty=1e-3),
}


@pytest.mark.parametrize("name", METHODS)
def test_resumed_in_each_phase_to_the_bit(name: str, tmp_path: Path) -> None:
    method = METHODS[name]()
    through = fit(tmp_path / "a", method, max_steps=10)
    check_masked(through, method)
    for step in (3, 7, 8):  # 8: the last batch of an epoch, after which Lightning skips `on_train_epoch_start`
        other = METHODS[name]()
        resumed = fit(tmp_path / f"b{step}", other, tmp_path / "a" / f"step={step}.ckpt", max_steps=10)
        one, two = state.saved(through), state.saved(resumed)
        assert set(one) == set(two)
        assert all(torch.equal(one[n], two[n]) for n in one)
        assert resumed.losses[-1] == through.losses[-1]


def test_nothing_is_chosen_anew_for_an_epoch_that_does_not_come(tmp_path: Path) -> None:
    through = fit(tmp_path / "a", METHODS["every epoch"](), max_epochs=1)
    resumed = fit(tmp_path / "b", METHODS["every epoch"](), tmp_path / "a" / "step=8.ckpt", max_epochs=1)
    one, two = state.saved(through), state.saved(resumed)
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_rates_are_taken_after_a_resume_from_the_end_of_an_epoch(tmp_path: Path) -> None:
    through = fit(tmp_path / "a", Surgical(rate="rgn"), max_steps=10)
    resumed = fit(tmp_path / "b", Surgical(rate="rgn"), tmp_path / "a" / "step=8.ckpt", max_steps=10)
    one, two = state.saved(through), state.saved(resumed)
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_lt_sft_chooses_what_moved_most_rewinds_and_begins_anew(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            entries = method.chooser(pl_module).entries
            if trainer.global_step == 3:
                seen["v"], seen["dense"] = entries.v.detach().clone(), entries.dense
            if trainer.global_step == 4:
                seen.update(index=entries.index.clone(), start=entries.v.detach().clone())
                head, held = pl_module.net.classifier.weight, trainer.optimizers[0].state  # type: ignore[union-attr]
                seen.update(state=held.get(entries.v), head_state=held.get(head), head=head.detach().clone())

    class Before(pl.Callback):  # sees the fourth step before the switch
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            if trainer.global_step == 4:
                seen["moved"] = method.chooser(pl_module).entries.v.detach().clone()

    method = LTSFT(budget=50, measure="parameters", priming=0.5)
    module = boring.Boring()
    trainer = boring.trainer(tmp_path, [Before(), method, Look()], max_steps=8)
    trainer.fit(module, boring.data(), boring.data(6, shuffle=False))
    assert seen["dense"]
    assert len(seen["v"]) == len(seen["moved"]) == method.chooser(module).entries.total
    best = seen["moved"].abs().sort(descending=True, stable=True).indices[:50].sort().values
    assert torch.equal(seen["index"].long(), best)
    assert len(seen["start"]) == 50
    assert not seen["start"].any()
    assert seen["state"] is seen["head_state"] is None
    assert torch.equal(seen["head"], boring.Boring().net.classifier.weight)
    assert len(method.chooser(module).entries.v) == 50
    assert method.chooser(module).entries.v.any()


def test_changes_of_two_files_add_up(tmp_path: Path) -> None:
    deltas, expected = {}, {}
    for label, seed in (("language", 1), ("task", 2)):
        model = zoo.build("bert")
        SelectiveTuning(score="random", budget=0.1, seed=seed, label=label, heads=None).apply(model)
        perturb(model, seed=seed)
        save_adapter(model, tmp_path / label)
        deltas[label] = {n: t - zoo.build("bert").get_parameter(n) for n, t in effective(model).items()}
    both, plain = zoo.build("bert"), zoo.build("bert")
    for label in deltas:
        load_adapter(both, tmp_path / label)
    with torch.no_grad():
        for name, p in plain.named_parameters():
            expected[name] = p + deltas["language"][name] + deltas["task"][name]
        for name, p in plain.named_parameters():
            p.copy_(expected[name])
    assert torch.allclose(output(both, "bert"), output(plain, "bert"), atol=1e-6)
    other = zoo.build("bert")
    for label in reversed(deltas):
        load_adapter(other, tmp_path / label)
    assert torch.allclose(output(both, "bert"), output(other, "bert"), atol=1e-6)


@pytest.mark.parametrize("model", ["bert_mlm", "gpt2", "llama"])
def test_lt_sft_leaves_out_norms_and_the_output_embedding_with_what_is_tied_to_it(model: str) -> None:
    net: Any = zoo.build(model)
    output_ids = {id(p) for p in net.get_output_embeddings().parameters()}
    norms = {id(p) for n, m in net.named_modules() if "norm" in n.lower() or "ln_" in n for p in m.parameters()}
    method = LTSFT(heads=None)
    method.apply(net)
    mine = {id(c.parameter) for c in method.chooser(net).candidates}
    assert mine == {id(p) for n, p in net.named_parameters() if ".adapters." not in n} - output_ids - norms


def test_a_module_with_a_bias_alone_merges() -> None:
    model = zoo.build("bert_mlm")  # whose bias beside the tied embeddings is of the head as a whole
    method = SelectiveTuning(score="random", budget=0.5, heads=None)
    method.apply(model)
    perturb(model)
    before, base = output(model, "bert_mlm"), zoo.build("bert_mlm")
    method.merge(model)
    torch.testing.assert_close(output(model, "bert_mlm"), before, atol=1e-5, rtol=1e-5)
    assert not torch.equal(model.get_parameter("cls.predictions.bias"), base.get_parameter("cls.predictions.bias"))
    method.unmerge(model)
    assert torch.equal(output(model, "bert_mlm"), before)


def test_l1_is_of_the_mean_change(tmp_path: Path) -> None:
    model = net()
    method = LTSFT(l1=0.5, heads=None, budget=0.1, exclude=None)
    method.apply(model)
    perturb(model)
    v = method.chooser(model).entries.v
    terms = [t for x in state.get_applied(model).placements if (t := x.adapter.penalty()) is not None]
    assert len(terms) == 1
    torch.testing.assert_close(terms[0], 0.5 * v.abs().mean())
    method.identify(model)
    assert all(x.adapter.penalty() is None for x in state.get_applied(model).placements)


def test_chosen_anew_keeps_what_stays() -> None:
    model = net()
    method = SelectiveTuning(score="random", budget=6, measure="parameters", heads=None)
    method.apply(model)
    entries = method.chooser(model).entries
    optimizer = torch.optim.AdamW([entries.v], lr=0.1)
    entries.choose(torch.tensor([1, 4, 9, 30, 50, 79]))
    entries.v.grad = torch.arange(1.0, 7.0)
    optimizer.step()
    before, moments = entries.v.detach().clone(), optimizer.state[entries.v]["exp_avg"].clone()
    rechosen(entries, torch.tensor([0, 4, 9, 31, 50, 51]), [optimizer])
    assert torch.equal(entries.v.detach(), before[[0, 1, 2, 0, 4, 0]] * torch.tensor([0, 1, 1, 0, 1, 0]))
    assert torch.equal(
        optimizer.state[entries.v]["exp_avg"], moments[[0, 1, 2, 0, 4, 0]] * torch.tensor([0, 1, 1, 0, 1, 0])
    )
    assert entries.v.grad.tolist() == [0, 2, 3, 0, 5, 0]
    optimizer.step()


def test_moments_in_codes_begin_anew_with_another_choice() -> None:
    pytest.importorskip("bitsandbytes")
    model = nn.Sequential(nn.Linear(100, 100))
    method = SelectiveTuning(score="random", budget=5000, measure="parameters", heads=None)
    method.apply(model)
    entries = method.chooser(model).entries
    optimizer = adamw_8bit([entries.v], lr=0.1)
    model(torch.randn(2, 100)).square().sum().backward()
    optimizer.step()
    assert optimizer.state[entries.v]["state1"].dtype is torch.uint8
    other = torch.arange(1, 10_001, 2)
    new = ~torch.isin(other, entries.index)
    rechosen(entries, other, [optimizer])
    entries.v.grad = torch.zeros_like(entries.v)
    optimizer.step()
    assert not entries.v[new].any()  # no momentum that others left


def test_lbfgs_begins_anew_with_the_second_phase(tmp_path: Path) -> None:
    class Curved(boring.Boring):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS([p for p in self.parameters() if p.requires_grad], lr=1e-3, max_iter=2)

    method, module = LTSFT(budget=0.02, priming=4.0), Curved()
    boring.trainer(tmp_path, [method]).fit(module, boring.data(), boring.data(6, shuffle=False))
    check_masked(module, method)


def test_a_share_of_a_run_without_an_end_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LifeCycleError, match="without an end"):
        fit(tmp_path, LTSFT(), max_epochs=-1)


def test_loops_that_cannot_be_looked_at_are_errors_with_a_way_out(tmp_path: Path) -> None:
    module = boring.Boring()
    module.automatic_optimization = False
    with pytest.raises(LifeCycleError, match=r"steps of its own.*Call identify\(module"):
        boring.trainer(tmp_path, [SelectiveTuning()]).fit(module, boring.data(), boring.data(6, shuffle=False))


def test_heads_inside_the_budget() -> None:
    one, other = zoo.build("bert"), zoo.build("bert")
    outside, inside = (
        FishMask(score="magnitude", budget=0.05),
        FishMask(score="magnitude", budget=0.05, heads_in_budget=True),
    )
    outside.apply(one)
    inside.apply(other)
    head = sum(p.numel() for p in other.classifier.parameters())
    total = outside.chooser(one).entries.total
    assert len(outside.chooser(one).entries.v) == round(0.05 * total)
    assert len(inside.chooser(other).entries.v) + head == round(0.05 * (total + head))
    with pytest.raises(TargetError, match="beside 99 of heads"):
        FishMask(budget=50, measure="parameters", heads_in_budget=True).apply(zoo.build("bert"))


@pytest.mark.parametrize(("name", "count"), [("bert-base", 547_411), ("bert-large", 1_675_709)])
def test_counts_of_half_a_percent(name: str, count: int) -> None:
    model = zoo.meta(name)
    FishMask(heads=None).apply(model)
    assert sum(p.numel() for p in state.trainable(model).values()) == count
    assert state.describe(model)["trainable"] == count


# ------------------------------------------------------------------ memory and files
def sizes(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Bytes of gradients and of the optimizer's moments."""
    grads = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    moments = (t for held in optimizer.state.values() for t in held.values() if isinstance(t, Tensor) and t.dim())
    return grads, sum(t.nbytes for t in moments)


@pytest.mark.skipif(minilm_folder() is None, reason="the pretrained MiniLM comes with the extra [demo]")
def test_half_a_percent_of_minilm_in_memory_and_on_disk(tmp_path: Path) -> None:
    from transformers import AutoModel

    base = AutoModel.from_pretrained(minilm_folder())
    model, method = copy.deepcopy(base), SelectiveTuning(score="magnitude", heads=None)
    method.apply(model)
    total, x = sum(p.numel() for p in base.parameters()), torch.randint(1000, 9000, (2, 6))
    chosen_count = round(0.005 * method.chooser(model).entries.total)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model(x).last_hidden_state.square().mean().backward()
    optimizer.step()
    assert sizes(model, optimizer) == (4 * chosen_count, 8 * chosen_count)
    assert 8 * chosen_count < 0.0051 * 8 * total  # dense moments: two numbers for each of all parameters
    save_adapter(model, tmp_path / "delta")
    size = sum(p.stat().st_size for p in (tmp_path / "delta").iterdir())
    assert size < 0.015 * sum(p.nbytes for p in base.parameters())
    with torch.no_grad():
        expected, before = model.eval()(x).last_hidden_state, base.eval()(x).last_hidden_state
        again = copy.deepcopy(base)
        loaded = load_adapter(again, tmp_path / "delta")
        assert torch.equal(again.eval()(x).last_hidden_state, expected)
        loaded.merge(again)
        assert torch.allclose(again(x).last_hidden_state, expected, atol=1e-5)
        loaded.unmerge(again)
        loaded.remove(again)
        assert torch.equal(again(x).last_hidden_state, before)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), base.parameters(), strict=True))


@pytest.mark.parametrize("fields", [{"over": "rows"}, {"over": "tensors"}, {"select": "threshold", "threshold": 1e-6}])
def test_files_of_choices_whose_size_the_data_decide(fields: dict[str, Any], tmp_path: Path) -> None:
    model = zoo.build("bert")
    method = SelectiveTuning(budget=0.3, **fields)
    method.apply(model)
    save_adapter(model, tmp_path / "empty")  # before anything is chosen
    method.identify(model, [{**zoo.inputs("bert"), "labels": torch.tensor([0, 2])}])
    perturb(model)
    save_adapter(model, tmp_path / "chosen")
    for name in ("empty", "chosen"):
        fresh = zoo.build("bert")
        loaded: Any = load_adapter(fresh, tmp_path / name)
        assert len(loaded.chooser(fresh).entries.v) == (0 if name == "empty" else len(method.chooser(model).entries.v))
        if name == "chosen":
            assert torch.equal(output(fresh, "bert"), output(model, "bert"))


# ------------------------------------------------------------------ DiffPruning
def test_gates_and_their_penalty() -> None:
    alpha, u = torch.tensor([5.0, 0.0, -4.0, 0.3]), torch.tensor([0.5, 0.9, 0.2, 0.01])
    expected = [
        min(1.0, max(0.0, 3 / (1 + math.exp(-(math.log(b / (1 - b)) + a))) - 1.5))
        for a, b in zip(alpha.tolist(), u.tolist(), strict=True)
    ]
    torch.testing.assert_close(gate(alpha, u), torch.tensor(expected))
    torch.testing.assert_close(gate(alpha, None), gate(alpha, torch.full((4,), 0.5)))
    for structured in (True, False):
        model = net()
        DiffPruning(penalty=2.0, structured=structured, heads=None, budget=0.1).apply(model)
        perturb(model, scale=1.0)
        first = state.get_applied(model).placements[0].adapter
        entries: Any = first.entries  # type: ignore[attr-defined]
        open_ = torch.sigmoid(entries.alpha)
        if structured:
            groups = torch.sigmoid(entries.group)
            open_ = torch.cat([a * g for a, g in zip(open_.split([35, 7, 7, 7, 21, 3]), groups, strict=True)])
        torch.testing.assert_close(first.penalty(), 2.0 * open_.sum())
    DiffPruning(penalty=0.0, heads=None, budget=0.1).apply(off := net())
    assert state.get_applied(off).placements[0].adapter.penalty() is None


def test_one_draw_a_step_and_none_outside_of_training() -> None:
    model = zoo.build("llama")
    method = DiffPruning(alpha=0.5, budget=0.1)
    method.apply(model)
    perturb(model)
    entries = method.chooser(model).entries
    model.train()
    one, same = output(model, "llama"), output(model, "llama")
    assert torch.equal(one, same)
    entries.step += 1
    assert not torch.equal(output(model, "llama"), one)
    u = torch.cat([entries.u(0, 5000), entries.u(entries.total, 1)])
    assert 1e-4 <= u.min() < 0.01 < 0.99 < u.max() <= 1 - 1e-4
    assert abs(u.mean() - 0.5) < 0.02
    model.eval()
    quiet = output(model, "llama")
    entries.step += 1
    assert torch.equal(output(model, "llama"), quiet)
    model.train()
    method.merge(model)  # folds what eval mode computes
    torch.testing.assert_close(output(model, "llama"), quiet, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("by_hand", "accumulate"), [(True, 1), (False, 2)])
def test_a_draw_for_each_optimizer_step(by_hand: bool, accumulate: int, tmp_path: Path) -> None:
    drawn: list[int] = []

    class Module(boring.Boring):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            for _ in range(2 if by_hand else 1):
                drawn.append(int(method.chooser(self).entries.step))
                loss = super().training_step(batch, batch_idx)
                if by_hand:
                    self.manual_backward(loss)
                    self.optimizers().step()  # type: ignore[union-attr]
            return loss

    method, module = DiffPruning(budget=0.1, priming=1.0, heads=None), Module(optimizer="sgd")
    module.automatic_optimization = not by_hand
    trainer = boring.trainer(tmp_path, [method], accumulate_grad_batches=accumulate)
    trainer.fit(module, boring.data(12), boring.data(6, shuffle=False))
    assert drawn == ([0, 1, 2, 3, 4, 5, 6, 7] if by_hand else [0, 0, 1, 1])


def test_projection_keeps_the_largest_changes_and_drops_the_gates(tmp_path: Path) -> None:
    model = net()
    method = DiffPruning(budget=8, measure="parameters", heads=None)
    method.apply(model)
    perturb(model, scale=0.5)
    chooser = method.chooser(model)
    entries = chooser.entries
    with torch.no_grad():
        z = gate(entries.alpha, None) * gate(entries.group, None).repeat_interleave(torch.tensor([35, 7, 7, 7, 21, 3]))
        change = z * entries.v
    chooser.keep = True
    method.identify(model)
    best = change.abs().argsort(descending=True)[:8].sort().values
    assert torch.equal(entries.index.long(), best)
    torch.testing.assert_close(entries.v.detach(), change[best])
    assert len(entries.alpha) == len(entries.group) == 0
    save_adapter(model, tmp_path / "a")
    fresh = net()
    assert type(load_adapter(fresh, tmp_path / "a")) is SelectiveTuning
    x, y = batches(1)[0]
    assert torch.equal(fresh.eval()(x, y), model.eval()(x, y))


def test_files_before_the_projection_hold_the_open_gates(tmp_path: Path) -> None:
    model = net()
    DiffPruning(alpha=-3.0, structured=False, heads=None, budget=0.1).apply(model)
    perturb(model)
    save_adapter(model, tmp_path / "closed")  # all gates are: one entry of zero
    fresh = net()
    method: Any = load_adapter(fresh, tmp_path / "closed")
    assert not method.chooser(fresh).entries.v.any()


def test_groups_for_the_gates() -> None:
    model = zoo.build("bert")
    DiffPruning(budget=0.1).apply(model)
    rest, gates = diff_pruning_groups(model, lr=1e-5)
    assert (gates["lr"], gates["weight_decay"], rest["lr"]) == (0.1, 0.0, 1e-5)
    assert {id(p) for g in (rest, gates) for p in g["params"]} == {id(p) for p in state.trainable(model).values()}
    assert len(gates["params"]) == 2
    for fields in ({"score": "fisher"}, {"l1": 0.1}):
        with pytest.raises(FieldError, match="gates choose"):
            DiffPruning(**fields)


# ------------------------------------------------------------------ pictures
def test_heat_map_is_a_table_of_means() -> None:
    items = [("h.0", "h.0.q", 6.0, 3), ("h.0", "h.0.q", 2.0, 1), ("", "embed", 1.0, 4), ("h.1", "h.1.a,b", 5.0, 1)]
    table = heat_map.table(items)
    assert table[2] == {("h.0", "q"): 2.0, ("outside of blocks", "embed"): 0.25, ("h.1", "a,b"): 5.0}
    assert heat_map.csv(table).splitlines() == ['layer,q,embed,"a,b"', "h.0,2,,", "outside of blocks,,0.25,", "h.1,,,5"]
    picture = heat_map.svg(
        table, "a < b", heat_map.table([("h.0", "h.0.q", 1, 8), ("", "embed", 0, 4), ("h.1", "h.1.a,b", 1, 1)])
    )
    assert picture.count("<rect x=") == 3
    assert all(f">{words}</text>" in picture for words in ("a &lt; b", "12", "", "100", "h.0", "outside of blocks"))
    assert xml.etree.ElementTree.fromstring(picture).tag.endswith("svg")


def test_beside_another_method() -> None:
    model = zoo.build("bert")
    SelectiveTuning(score="random", budget=0.1, layers=[0]).apply(model)
    LoRA(rank=2, layers=[1], heads=None).apply(model)
    perturb(model)
    assert set(state.applied_to(model)) == {"selective", "lora"}
    state.applied_to(model)["selective"].method.merge(model)


def test_torchs_own_loading_takes_the_choice_with_it() -> None:
    one, other = zoo.build("bert"), zoo.build("bert")
    for model, seed, budget in ((one, 1, 0.1), (other, 2, 0.05)):
        SelectiveTuning(score="random", budget=budget, seed=seed).apply(model)
    perturb(one)
    other.load_state_dict(one.state_dict())
    assert torch.equal(output(other, "bert"), output(one, "bert"))


@pytest.mark.filterwarnings("ignore")
def test_wandb_gets_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    logged: list[dict[str, Any]] = []
    logger = WandbLogger(save_dir=tmp_path, mode="disabled")
    monkeypatch.setattr(type(logger.experiment), "log", lambda self, data, *_, **__: logged.append(data))
    module = boring.Boring()
    boring.trainer(tmp_path, [SelectiveTuning(batches=1)], logger=logger, max_steps=1).fit(module, boring.data())
    pictures = [value for data in logged for name, value in data.items() if name == "selective/scores"]
    assert [type(p) for p in pictures] == [wandb.Html]
    assert "<svg" in pictures[0].html
    wandb.finish()


def test_the_benchmark_of_memory_says_what_a_mask_saves() -> None:
    from benchmarks import selective_memory

    rows = {
        n: selective_memory.measure(m, 1, 48, 1)
        for n, m in selective_memory.METHODS.items()
        if "5 %" in n or n == "full"
    }
    dense, sparse = rows["full"], rows["mask of 0.5 %"]
    for what in ("gradients", "moments"):
        assert sparse[what] < 0.0051 * dense[what]
    assert sparse["file"] < 0.015 * dense["file"]
