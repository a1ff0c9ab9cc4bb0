"""Gradient checkpointing changes memory and nothing else. Run as a script, one training run for test_two_processes."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import boring
import lightning.pytorch as pl
import pytest
import torch
import zoo
from harness import differences, forward, loss, output, perturb, snapshot
from settings import MODELS, QUICK, RAISES, SETTINGS, adapted, make
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from lightning_peft import LoRA, LoReFT
from lightning_peft import gradient_checkpointing as module_under_test
from lightning_peft.callback import PEFT
from lightning_peft.config import compose
from lightning_peft.core import state
from lightning_peft.core.adapter import Adapter, attach
from lightning_peft.core.attention import UnsupportedSiteError
from lightning_peft.core.method import NothingToTrainError
from lightning_peft.core.sites import TargetError
from lightning_peft.gradient_checkpointing import (
    CheckpointingError,
    GradientCheckpointing,
    Recompute,
    checkpoint_blocks,
    configured,
    link_of,
    uncheckpoint_blocks,
)
from lightning_peft.train import build_trainer


# ------------------------------------------------------------------ what the tests share
@pytest.fixture(autouse=True)
def _said_anew() -> None:
    module_under_test._say.cache_clear()


def with_dropout(net: nn.Module, p: float = 0.2) -> nn.Module:
    for m in net.modules():
        if isinstance(m, nn.Dropout):
            m.p = p
        elif isinstance(getattr(m, "dropout", None), float):
            m.dropout = p
    return net


def gradients(net: nn.Module, call: Callable[[nn.Module], Tensor], train: bool = True) -> dict[str, Tensor]:
    """Loss, gradients by name, and the state of the generator after one step."""
    net.train(train).zero_grad()
    torch.manual_seed(0)
    value = call(net)
    value.backward()
    found = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    return {**found, "loss": value.detach(), "generator": torch.get_rng_state()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def check_exact(net: nn.Module, call: Callable[[nn.Module], Tensor], **options: Any) -> None:
    """One step without, with, and after checkpointing: the same bits, and fewer of them kept."""
    expected = gradients(net, call)
    assert len(expected) > 2
    assert checkpoint_blocks(net, **options)
    assert same(gradients(net, call), expected)
    uncheckpoint_blocks(net)
    assert same(gradients(net, call), expected)
    assert not any(isinstance(vars(m).get("forward"), Recompute) for m in net.modules())


def runs(net: nn.Module, inside: nn.Module, call: Callable[[], Any]) -> int:
    """How often the module `inside` is run."""
    count = 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1

    hook = inside.register_forward_pre_hook(counted)
    try:
        call()
    finally:
        hook.remove()
    return count


def step(net: nn.Module, model: str) -> None:
    loss(net, model).backward()


def saved_bytes(net: nn.Module, call: Callable[[nn.Module], Tensor]) -> int:
    """Distinct storages that autograd keeps for backward, without parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = call(net)
    value.backward()
    return sum(kept.values())


# ------------------------------------------------------------------ exactness
def combinations() -> list[Any]:
    quick = {(name, model) for name, models in QUICK.items() for model in models}
    pairs = [(name, model) for name in SETTINGS for model in MODELS if (name, model) not in RAISES and model != "mlp"]
    return [
        pytest.param(name, model, id=f"{name}-{model}", marks=[] if (name, model) in quick else [pytest.mark.slow])
        for name, model in pairs
    ]


@pytest.mark.parametrize(("name", "model"), combinations())
def test_gradients_are_the_same_bits(name: str, model: str) -> None:
    net, _ = adapted(name, model)
    perturb(net)
    check_exact(with_dropout(net), partial(loss, model=model))


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_gradients_are_the_same_bits_where_no_table_knows_the_names(name: str) -> None:
    own = {"lora": {"targets": "all-linear"}}.get(name, {})
    net = zoo.build("mixer")
    try:
        make(name, "mixer", **own).apply(net)
    except (TargetError, UnsupportedSiteError, NothingToTrainError):
        pytest.skip(f"{name} has nothing to act on in such a model")
    perturb(net)
    check_exact(net, partial(loss, model="mixer"))


def clip_loss(net: nn.Module) -> Tensor:
    return net(**zoo.inputs("clip"), return_loss=True).loss


@pytest.mark.slow
@pytest.mark.parametrize("model", sorted(set(zoo.ZOO) - {"mlp"}))
def test_gradients_are_the_same_bits_in_every_family(model: str) -> None:
    net = with_dropout(zoo.build(model))
    LoRA(targets="all-linear", rank=2).apply(net)
    perturb(net)
    check_exact(net, clip_loss if model == "clip" else partial(loss, model=model))


@pytest.mark.parametrize("model", ["bert", "llama", "timm_vit"])
def test_all_weights_train(model: str) -> None:
    check_exact(with_dropout(zoo.build(model)), partial(loss, model=model))


def test_without_the_generators_state_dropout_is_drawn_anew() -> None:
    quiet, loud = zoo.build("llama"), with_dropout(zoo.build("llama"))
    for net in (quiet, loud):
        LoRA(rank=2, dropout=0.0 if net is quiet else 0.3).apply(net)
        perturb(net)
    check_exact(quiet, partial(loss, model="llama"), preserve_rng_state=False)
    expected = gradients(loud, partial(loss, model="llama"))
    checkpoint_blocks(loud, preserve_rng_state=False)
    assert not same(gradients(loud, partial(loss, model="llama")), expected)
    checkpoint_blocks(loud)
    assert same(gradients(loud, partial(loss, model="llama")), expected)


def test_an_input_without_gradient_is_as_good_as_any() -> None:
    net, _ = adapted("lora", "llama")
    perturb(net)
    needs: list[bool] = []
    first = net.model.layers[0]
    first.register_forward_pre_hook(lambda _, args: needs.append(args[0].requires_grad))
    check_exact(net, partial(loss, model="llama"))
    assert needs == [False] * 3
    assert all(p.grad.abs().sum() > 0 for p in state.trainable(first).values())


def test_mixed_precision() -> None:
    net, _ = adapted("lora", "llama")
    perturb(net)

    def call(net: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss(net, "llama")

    check_exact(net, call)


def test_two_forward_passes_before_one_backward() -> None:
    """LoReFT looks at a mask that only the model sees, and that is gone when blocks are run again."""
    net = zoo.build("llama")
    LoReFT(rank=2, first=1, last=1, heads=None).apply(net)
    perturb(net)
    call = zoo.inputs("llama")
    labels = call["input_ids"].clone()
    labels[0, :3], labels[1, :4] = -100, -100

    def both(net: nn.Module) -> Tensor:
        swapped = {name: value.flip(0) for name, value in call.items()}
        return net(**call, labels=labels).loss + net(**swapped, labels=labels).loss

    check_exact(net, both)


def test_every_output_that_a_model_records() -> None:
    net, _ = adapted("lora", "llama")
    net.set_attn_implementation("eager")
    perturb(net)

    def call(net: nn.Module) -> Tensor:
        out = net(**zoo.inputs("llama"), output_hidden_states=True, output_attentions=True, use_cache=False)
        assert (len(out.hidden_states), len(out.attentions)) == (3, 2)
        return sum((t.pow(2).mean() for t in (*out.hidden_states, *out.attentions)), out.logits.mean())

    check_exact(net, call)


class Counted(nn.Module):
    """Blocks with batch statistics, as in a Conformer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_batch_statistics_are_counted_once() -> None:
    x, found = torch.randn(5, 8), []
    for checkpointed in (False, True):
        net = Counted()
        if checkpointed:
            assert list(checkpoint_blocks(net, "layers.*")) == ["layers.0", "layers.1", "layers.2"]
        found.append(gradients(net, lambda net: net(x).pow(2).sum()) | dict(net.named_buffers()))
    assert same(*found)


# ------------------------------------------------------------------ when
def test_only_while_training_and_with_gradients() -> None:
    net, _ = adapted("lora", "bert")
    checkpoint_blocks(net)
    inside = net.bert.encoder.layer[0].attention
    assert runs(net, inside, lambda: step(net.train(), "bert")) == 2
    assert runs(net, inside, lambda: step(net.eval(), "bert")) == 1
    assert runs(net, inside, lambda: output(net.train(), "bert")) == 1
    uncheckpoint_blocks(net)
    assert runs(net, inside, lambda: step(net.train(), "bert")) == 1


def test_every_other_block_of_each_stack() -> None:
    net = zoo.build("t5")
    found = list(checkpoint_blocks(net, every=2))
    assert found == ["encoder.block.0", "decoder.block.0", "decoder.block.2"]
    assert checkpoint_blocks(net, every=2) == {}
    assert list(checkpoint_blocks(net)) == ["encoder.block.1", "decoder.block.1"]


def test_blocks_by_name_and_parts_of_blocks() -> None:
    net, _ = adapted("lora", "encoder")
    assert list(checkpoint_blocks(net, "layers.1,attend")) == ["encoder.layers.0.self_attn", "encoder.layers.1"]
    uncheckpoint_blocks(net)
    assert list(checkpoint_blocks(net, "re:.*layers.*")) == ["encoder.layers.0", "encoder.layers.1"]
    uncheckpoint_blocks(net)
    check_exact(net, partial(loss, model="encoder"), blocks="attend")
    check_exact(net, partial(loss, model="encoder"), blocks=["ffn", "encoder.layers.0"])


# ------------------------------------------------------------------ memory
@pytest.mark.parametrize("frozen", [True, False])
def test_a_block_keeps_its_input_and_nothing_else(frozen: bool) -> None:
    x = torch.randn(2, 16, zoo.HIDDEN)
    kept: dict[tuple[bool, int], int] = {}
    for depth in (2, 6):
        net = zoo.Mixer(depth=depth).train()
        if frozen:
            LoRA(targets="all-linear", rank=2).apply(net)
        kept[False, depth] = saved_bytes(net, lambda net: net(x).sum())
        checkpoint_blocks(net)
        kept[True, depth] = saved_bytes(net, lambda net: net(x).sum())
    block, recomputed = ((kept[on, 6] - kept[on, 2]) // 4 for on in (False, True))
    assert recomputed == x.nbytes
    assert block > 10 * x.nbytes


def test_memory_of_every_other_block_lies_between() -> None:
    def kept(every: int | None) -> int:
        net = zoo.build("llama").train()
        LoRA(targets="all-linear", rank=2).apply(net)
        if every is not None:
            checkpoint_blocks(net, every=every)
        return saved_bytes(net, partial(loss, model="llama"))

    none, other, every = kept(None), kept(2), kept(1)
    assert none > other > every
    assert abs((none - other) - (other - every)) < 0.1 * none


# ------------------------------------------------------------------ beside adapters
def outermost(net: nn.Module) -> list[bool]:
    return [isinstance(vars(m).get("forward"), Recompute) for m in net.modules() if link_of(m) is not None]


@pytest.mark.parametrize("order", ["link a b", "a link b", "a b link"])
@pytest.mark.parametrize("last", ["a", "b", "link"])
def test_the_link_is_outermost_in_any_order(order: str, last: str) -> None:
    """a and b are around the blocks themselves; what is taken off `last` leaves the model as it was found."""
    net = zoo.build("bert")
    before = snapshot(net)
    a, b = (LoReFT(rank=2, heads=None, label=label) for label in "ab")
    on: dict[str, Callable[[], Any]] = {
        "a": lambda: a.apply(net), "b": lambda: b.apply(net), "link": lambda: checkpoint_blocks(net),
    }  # fmt: skip
    off: dict[str, Callable[[], Any]] = {
        "a": lambda: a.remove(net), "b": lambda: b.remove(net), "link": lambda: uncheckpoint_blocks(net),
    }  # fmt: skip
    for what in order.split():
        on[what]()
    inside = net.bert.encoder.layer[0].attention
    assert outermost(net) == [True, True]
    assert runs(net, inside, lambda: step(net.train(), "bert")) == 2
    for what in sorted(off, key=last.__eq__):
        off[what]()
        if what != "link" and last == "link":
            assert outermost(net) == [True, True]
            assert runs(net, inside, lambda: output(net, "bert")) == 1
    net.eval()
    assert not differences(before, snapshot(net))


class Double(Adapter):
    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        out, weights = base(*args, **kwargs)
        return 2 * out, weights


@pytest.mark.parametrize("late", [False, True])
def test_an_attention_that_is_opened_under_the_link(late: bool) -> None:
    """A rewritten forward goes below the link and below adapters around the whole, whatever came first."""
    net = zoo.build("encoder")
    for layer in net.encoder.layers:
        attach(layer.self_attn, "double", Double())
    if late:
        checkpoint_blocks(net, "attend")
    make("lora", "encoder").apply(net)
    checkpoint_blocks(net, "attend")
    link: Any = vars(net.encoder.layers[0].self_attn)["forward"]
    names = [type(x).__name__ for x in (link, link.inner, link.inner.inner)]
    assert names == ["Recompute", "Route", "MultiheadForward"]
    uncheckpoint_blocks(net)
    check_exact(net, partial(loss, model="encoder"), blocks="attend")


def test_the_first_step_after_a_late_adapter_is_exact() -> None:
    def found(order: list[Callable[[nn.Module], Any]]) -> list[dict[str, Tensor]]:
        net = with_dropout(zoo.build("llama"))
        for act in order:
            act(net)
        return [gradients(net, partial(loss, model="llama")) for _ in range(2)]

    methods: list[Callable[[nn.Module], Any]] = [
        lambda net: LoReFT(rank=2, dropout=0.2).apply(net), lambda net: LoRA(rank=2, dropout=0.2).apply(net), perturb,
    ]  # fmt: skip
    (expected, _), late, early = (
        found(methods),
        found([checkpoint_blocks, *methods]),
        found([*methods, checkpoint_blocks]),
    )
    for other in (*late, *early):
        assert same(other, expected)


def test_merging_and_switching_under_the_link() -> None:
    net, method = adapted("lora", "llama")
    perturb(net)
    expected = output(net, "llama")
    checkpoint_blocks(net)
    method.merge(net)
    assert torch.allclose(forward(net.train(), "llama"), expected, atol=1e-5)
    method.unmerge(net)
    assert torch.equal(forward(net.train(), "llama"), expected)
    with method.enabled(net, False):
        assert torch.equal(forward(net.train(), "llama"), output(zoo.build("llama"), "llama"))
    method.unload(net)
    assert outermost(net) == [True, True]
    assert torch.allclose(forward(net.train(), "llama"), expected, atol=1e-5)


@pytest.mark.parametrize("model", ["gpt2", "encoder"])
def test_rewritten_forwards_inside_of_the_link(model: str) -> None:
    """Packed projections and `nn.MultiheadAttention`, whose own forward is replaced."""
    net = zoo.build(model)
    before = snapshot(net)
    checkpoint_blocks(net)
    lora, prefix = make("lora", model), make("prefix_tuning", model, label="prefix", heads=None)
    lora.apply(net)
    prefix.apply(net)
    step(net.train(), model)
    lora.remove(net.eval().zero_grad() or net)
    prefix.remove(net)
    uncheckpoint_blocks(net)
    left = [key for key in differences(before, snapshot(net)) if ".grad" not in key]
    assert not left


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(how: str, tmp_path: Path) -> None:
    net, _ = adapted("lora", "llama")
    perturb(net)
    checkpoint_blocks(net, preserve_rng_state=False)
    expected = gradients(net, partial(loss, model="llama"))
    if how == "deepcopy":
        other = copy.deepcopy(net)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(net))
    else:
        torch.save(net, tmp_path / "net.pt")
        other = torch.load(tmp_path / "net.pt", weights_only=False)
    link = link_of(other.model.layers[0])
    assert link is not None
    assert link.module is other.model.layers[0]
    assert not link.preserve_rng_state
    assert same(gradients(other, partial(loss, model="llama")), expected)
    uncheckpoint_blocks(other)
    assert outermost(other) == []
    assert outermost(net) == [True, True]


def test_the_state_dict_and_the_signature_are_the_models_own() -> None:
    net, plain = zoo.build("bert"), zoo.build("bert")
    checkpoint_blocks(net)
    layers = [n.bert.encoder.layer[0] for n in (net, plain)]
    assert inspect.signature(layers[0].forward) == inspect.signature(layers[1].forward)
    assert type(layers[0]) is type(layers[1])
    assert list(net.state_dict()) == list(plain.state_dict())


def test_another_library_wraps_the_chain_after_us() -> None:
    net = zoo.build("bert")
    links = checkpoint_blocks(net)
    layer = net.bert.encoder.layer[0]
    wrapped, layer.forward = layer.forward, partial(layer.forward)
    for link in links.values():
        module_under_test.take_off(link)
    assert layer.forward.func is wrapped
    assert runs(net, layer.attention, lambda: step(net.train(), "bert")) == 1


# ------------------------------------------------------------------ caches
@pytest.mark.parametrize("model", ["gpt2", "llama", "t5", "opt"])
def test_a_cache_is_not_extended_twice(model: str, caplog: pytest.LogCaptureFixture) -> None:
    net, _ = adapted("lora", model) if model != "opt" else (zoo.build(model), None)
    with caplog.at_level(logging.INFO, "lightning_peft"):
        check_exact(net, lambda net: forward(net, model, use_cache=True).pow(2).mean())
    assert [r.message for r in caplog.records if "KV cache" in r.message] == [
        "The KV cache of checkpointed blocks stays empty in training. use_cache=False does without one."
    ]


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_a_filled_cache_is_read(model: str, caplog: pytest.LogCaptureFixture) -> None:
    """Without what it holds the model would compute something else."""
    net, _ = adapted("lora", model)
    perturb(net)
    tokens = zoo.inputs(model)["input_ids"]

    def call(net: nn.Module) -> Tensor:
        with torch.no_grad():
            past = net(tokens[:, :3], use_cache=True).past_key_values
        assert past.get_seq_length() == 3
        return net(tokens[:, 3:], past_key_values=past).logits.pow(2).mean()

    with caplog.at_level(logging.INFO, "lightning_peft"):
        check_exact(net, call)
    assert "filled KV cache" in caplog.text


def test_a_tuple_of_old_and_a_reader_of_caches() -> None:
    layer = zoo.build("llama").model.layers[0]
    without = module_under_test.without_cache
    assert without(layer, (1,), {"layer_past": (torch.ones(1), torch.ones(1))}) is None
    layer._can_checkpoint_with_cache = True
    assert without(layer, (1,), {"layer_past": 3, "use_cache": True}) == ((1,), {"layer_past": 3, "use_cache": True})


# ------------------------------------------------------------------ models that checkpoint themselves
@pytest.mark.parametrize("model", ["llama", "vit"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("first", ["theirs", "ours"])
def test_not_twice(model: str, reentrant: bool, first: str, caplog: pytest.LogCaptureFixture) -> None:
    """Reentrant checkpointing of a frozen vision model gives its adapters no gradient; with ours around it does."""
    net, _ = adapted("lora", model, heads=None)
    perturb(net)
    expected = gradients(net, partial(loss, model=model))
    enable = partial(net.activation_checkpointing_enable, {"use_reentrant": reentrant})
    acts: list[Callable[[], Any]] = [enable, lambda: checkpoint_blocks(net)]
    with caplog.at_level(logging.INFO, "lightning_peft"):
        for act in acts if first == "theirs" else acts[::-1]:
            act()
    assert ("2 blocks are checkpointed by the model itself" in caplog.text) == (first == "theirs")
    assert same(gradients(net, partial(loss, model=model)), expected)
    inside = next(m for name, m in net.named_modules() if name.endswith("mlp"))
    assert runs(net, inside, lambda: step(net.train(), model)) == 2


def test_every_other_block_by_the_model_itself_is_left_as_it_is() -> None:
    net = zoo.build("llama")
    net.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=2)
    assert checkpoint_blocks(net) == {}


def test_the_input_of_a_reentrant_checkpoint_is_left_alone_where_nothing_trains() -> None:
    net = zoo.build("llama").requires_grad_(False)
    layer = net.model.layers[0]
    layer._gradient_checkpointing_func = partial(int, use_reentrant=True)
    hidden = torch.ones(2)
    assert module_under_test.reachable(layer, (hidden,))[0] is hidden
    layer.requires_grad_(True)
    made = module_under_test.reachable(layer, (hidden, 3))
    assert made[0].requires_grad
    assert not hidden.requires_grad
    assert made[0].data_ptr() == hidden.data_ptr()
    assert module_under_test.reachable(layer, ("text",)) == ("text",)


# ------------------------------------------------------------------ compiled, and without numbers
def check_compiled(net: nn.Module, model: str) -> None:
    torch._dynamo.reset()
    perturb(net)
    checkpoint_blocks(with_dropout(net))
    expected = gradients(net, partial(loss, model=model))
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    net.zero_grad()
    loss(compiled, model).backward()
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    assert all(torch.allclose(grad, expected[name], rtol=1e-4, atol=1e-7) for name, grad in found.items())
    assert {*found, "loss", "generator"} == set(expected)


def test_compiles_without_a_graph_break() -> None:
    net = zoo.build("mixer")
    LoReFT(rank=2).apply(net)
    check_compiled(net, "mixer")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["bert", "gpt2", "llama", "t5", "encoder", "vit"])
@pytest.mark.parametrize("name", ["lora", "loreft", "houlsby"])
def test_compiles_without_a_graph_break_anywhere(name: str, model: str) -> None:
    check_compiled(adapted(name, model)[0], model)


@pytest.mark.parametrize("how", ["fake", "meta"])
def test_sizes_are_known_without_numbers(how: str) -> None:
    net = zoo.build("llama") if how == "fake" else zoo.build("llama").to("meta")
    LoRA(rank=2).apply(net)
    checkpoint_blocks(net.train())
    tokens = torch.ones(2, 7, dtype=torch.long, device="cpu" if how == "fake" else "meta")
    with FakeTensorMode(allow_non_fake_inputs=True) if how == "fake" else torch.enable_grad():
        net(input_ids=tokens).logits.sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in state.trainable(net).values())


# ------------------------------------------------------------------ errors
def test_a_model_without_blocks() -> None:
    net = zoo.build("mlp")
    with pytest.raises(
        TargetError, match=r"in this MLP.*'block' in blocks='block'. Roles known.*: none.*such as blocks="
    ):
        checkpoint_blocks(net)
    assert list(checkpoint_blocks(net, "body,mlp")) == ["body", "mlp"]
    step(net.train(), "mlp")


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("encoder.lyer", r"'encoder.lyer' in blocks='encoder.lyer'. Roles.*block \(2\).*names: .*layer.*For modules"),
        ("encoder.layer", "what blocks='encoder.layer' matches is never called. For modules"),
        ("re:(", "not a regular expression.*For modules"),
        ([], r"blocks=\[\] is empty.*For modules"),
    ],
)
def test_a_name_that_is_not_there(blocks: Any, message: str) -> None:
    with pytest.raises(TargetError, match=message) as error:
        checkpoint_blocks(zoo.build("bert"), blocks)
    assert "targets" not in str(error.value)


@pytest.mark.parametrize("options", [{"every": 0}, {"every": True}, {"every": 1.5}, {"preserve_rng_state": 1}])
def test_settings_that_make_no_sense(options: dict[str, Any]) -> None:
    (name, value), = options.items()  # fmt: skip
    for use in (GradientCheckpointing, partial(checkpoint_blocks, zoo.build("mlp"))):
        with pytest.raises(CheckpointingError, match=f"{name}={value}"):
            use(**options)


# ------------------------------------------------------------------ in a Trainer
class Watch(pl.Callback):
    """How often the first block's attention is run in each step, and whether links are on while nothing trains."""

    def __init__(self) -> None:
        self.runs: list[int] = []
        self.steps: list[int] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        inside = pl_module.net.bert.encoder.layer[0].attention
        self.hook = inside.register_forward_pre_hook(lambda *_: self.runs.append(1))

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps.append(len(self.runs))
        self.runs.clear()

    def on_validation_end(self, *_: Any) -> None:
        self.runs.clear()

    def on_train_end(self, *_: Any) -> None:
        self.hook.remove()


VAL = boring.data(6, shuffle=False)


def fit(directory: Path, module: boring.Boring, *callbacks: pl.Callback, steps: int = 1) -> pl.Trainer:
    trainer = boring.trainer(directory, list(callbacks), max_steps=steps)
    trainer.fit(module, boring.data(), VAL)
    return trainer


def fitted(directory: Path, where: str, *callbacks: pl.Callback) -> boring.Boring:
    pl.seed_everything(0, verbose=False)
    module = boring.Boring(where)
    fit(directory, module, *callbacks, steps=4)
    return module


def methods() -> list[PEFT]:
    return [LoRA(rank=2), LoReFT(rank=2, heads=None)]


@pytest.fixture(scope="module", name="plain")
def _plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Tensor]]:
    """What a run without checkpointing ends with, by where the model is built."""

    @functools.cache
    def end(where: str) -> dict[str, Tensor]:
        return boring.tensors(fitted(tmp_path_factory.mktemp("plain"), where, *methods()))

    return end


@pytest.mark.parametrize("where", ["init", "setup", "configure_model", "meta"])
@pytest.mark.parametrize("first", ["method", "checkpointing"])
def test_training_ends_at_the_same_bits(where: str, first: str, plain: Callable[..., Any], tmp_path: Path) -> None:
    ours, watch = GradientCheckpointing(), Watch()
    around = [*methods(), ours] if first == "method" else [ours, *methods()]
    module = fitted(tmp_path, where, *around, watch)
    assert watch.steps == [2, 2, 2, 2]
    assert boring.largest_difference(boring.tensors(module), plain(where)) == 0
    assert outermost(module) == []


def test_over_the_whole_life_of_a_module(tmp_path: Path) -> None:
    ours, watch, lora = GradientCheckpointing(every=2), Watch(), LoRA(rank=2)
    module = boring.Boring()
    names = {name for name, m in module.named_modules() if "forward" in vars(m)}
    for _ in range(2):
        trainer = fit(tmp_path, module, ours, lora, watch, steps=2)
        trainer.validate(module, VAL, verbose=False)
        trainer.test(module, VAL, verbose=False)
        trainer.predict(module, VAL)
        assert outermost(module) == []
    assert watch.steps == [2] * 4
    lora.remove(module)
    assert {name for name, m in module.named_modules() if "forward" in vars(m)} == names


def test_a_run_that_breaks_leaves_no_link(tmp_path: Path) -> None:
    class Break(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("enough")

    module, ours = boring.Boring(), GradientCheckpointing()
    with pytest.raises(RuntimeError, match="enough"):
        fit(tmp_path, module, ours, Break())
    assert outermost(module) == []
    with pytest.raises(TargetError, match="blocks='nope'"):
        fit(tmp_path, module, GradientCheckpointing("nope"))


def test_what_was_checkpointed_before_stays_so(tmp_path: Path) -> None:
    module = boring.Boring()
    checkpoint_blocks(module.net, every=2)
    fit(tmp_path, module, GradientCheckpointing())
    assert [link_of(layer) is not None for layer in module.net.bert.encoder.layer] == [True, False]


def test_an_adapter_that_comes_while_training_is_under_the_link(tmp_path: Path) -> None:
    class Late(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            if trainer.global_step == 1:
                LoReFT(rank=2, heads=None).apply(pl_module.net, trainable=False)

    module, watch = boring.Boring(), Watch()

    class Look(pl.Callback):
        def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            assert outermost(pl_module) == [True, True]

    fit(tmp_path, module, GradientCheckpointing(), LoRA(rank=2), Late(), Look(), watch, steps=3)
    assert watch.steps == [2, 2, 2]


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_blocks_in_eval_mode_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = boring.Boring()
    module.net.eval()
    with caplog.at_level(logging.INFO, "lightning_peft"):
        fit(tmp_path, module, GradientCheckpointing())
    assert "2 blocks are in eval mode, where nothing is checkpointed: net.bert.encoder.layer.0" in caplog.text


def test_the_callback_is_its_settings(tmp_path: Path) -> None:
    ours = GradientCheckpointing("layer.*", every=2)
    fit(tmp_path, boring.Boring(), ours)
    other = pickle.loads(pickle.dumps(ours))
    assert (other.blocks, other.every, other.preserve_rng_state) == ("layer.*", 2, True)


# ------------------------------------------------------------------ in a config
def test_the_flag() -> None:
    assert configured(None) == configured(False) == []
    assert isinstance(configured(True)[0], GradientCheckpointing)
    assert configured({"every": 2, "blocks": "layers.*"})[0].every == 2
    with pytest.raises(CheckpointingError, match=r"'evry'.*known are blocks, every"):
        configured({"evry": 2})
    with pytest.raises(CheckpointingError, match=r"gradient_checkpointing='yes'.*give true, false, or settings"):
        configured("yes")


@pytest.mark.parametrize(("override", "every"), [("true", 1), ("{every: 3}", 3), ("false", None)])
def test_the_flag_makes_a_callback(override: str, every: int | None, tmp_path: Path) -> None:
    config = compose([f"run_dir={tmp_path}", "logger=none", f"gradient_checkpointing={override}"])
    callbacks = build_trainer(config, []).callbacks
    assert [c.every for c in callbacks if isinstance(c, GradientCheckpointing)] == ([] if every is None else [every])


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from lightning_peft import cli

    monkeypatch.chdir(tmp_path)
    rows = [f"{'lovely' if i % 2 else 'horrid'} thing {i},{i % 2}" for i in range(40)]
    (tmp_path / "reviews.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    words = ["model=tiny_bert", "data=csv", "data.path=reviews.csv", "trainer=debug", "trainer.accelerator=cpu"]
    quiet = ["trainer.enable_progress_bar=false", "gradient_checkpointing=true", "hydra.run.dir=run"]
    assert cli.main(["train", *words, *quiet]) == 0
    assert "blocks are run again in backward" in (tmp_path / "run" / "train.log").read_text()
    assert "gradient_checkpointing: true" in (tmp_path / "run" / "config.yaml").read_text()
    assert cli.main(["train", *words, *quiet, "gradient_checkpointing=maybe"]) == 1


# ------------------------------------------------------------------ two processes
@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    ends = [launched(tmp_path / name, name, n) for name, n in (("plain", 1), ("ours", 1), ("ours-ddp", 2))]
    assert boring.largest_difference(ends[0][0], ends[1][0]) == 0
    assert boring.largest_difference(ends[2][0], ends[2][1]) == 0
    assert boring.largest_difference(ends[2][0], ends[0][0]) < 1e-6


def launched(directory: Path, how: str, processes: int) -> list[dict[str, Tensor]]:
    directory.mkdir()
    tests = Path(__file__).parent
    paths = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(directory), how, str(processes)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return [torch.load(directory / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]


def main(directory: str, how: str, processes: int) -> None:
    from ddp_run import Share

    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    module = boring.Boring(dropout=0.0, optimizer="sgd")
    watch = Watch()
    callbacks = [LoRA(rank=2), LoReFT(rank=2, heads=None), watch]
    if how != "plain":
        callbacks.insert(0, GradientCheckpointing())
    options = {"strategy": "ddp" if processes > 1 else "auto", "devices": processes, "use_distributed_sampler": False}
    trainer = boring.trainer(directory, callbacks, **options)
    trainer.fit(module, Share(processes))
    if set(watch.steps) != {1 if how == "plain" else 2}:
        raise RuntimeError(f"blocks ran {watch.steps} times")
    torch.save(boring.tensors(module), Path(directory) / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
