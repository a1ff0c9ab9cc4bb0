"""The contract of every method on every kind of model. The quick run takes the hardest pairs, `-m slow` the full product."""

from __future__ import annotations

import copy
import io
import pickle
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import zoo
from harness import (
    adapter_parameters,
    differences,
    forward,
    loss,
    moved,
    output,
    perturb,
    snapshot,
    tensors,
    train,
)
from settings import COLLAPSED, HEADED, IN_PLACE_OF_STATES, MODELS, QUICK, RAISES, SETTINGS, UNMERGEABLE, adapted, make
from torch import Tensor, nn

from lightning_peft.core import state
from lightning_peft.core.adapter import LabelError, NotMergeableError
from lightning_peft.core.files import load_adapter, save_adapter
from lightning_peft.core.merge import MergeError
from lightning_peft.core.method import REGISTRY, materialize

RANDOM = {
    "s4",
    "spafit",
    "unipelt",
    "krona_b",
    "krona_b_res",
    "glora",
    "fourierft",
    "lokr",
    "krona",
    "lora_dropout",
    "longlora",
    "relora",
    "adalora",
    "houlsby",
    "adapter_fusion",
    "adapterdrop",
    "invertible",
    "output_adapter",
    "input_adapter",
    "adaptformer",
    "bapna",
    "pfeiffer",
    "adamix",
    "phm",
    "sparse_adapter",
    "compacter",
    "compacter_pp",
    "corda",
    "eva",
    "loftq",
    "delora",
    "gralora",
    "hra",
    "lora",
    "lora_ga",
    "lqlora",
    "loreft",
    "noreft",
    "direft",
    "llama_adapter",
    "llama_adapter_v2",
    "p_tuning_v2",
    "mam",
    "parallel",
    "prefix_tuning",
    "prompt_tuning",
    "vpt",
    "multitask_prompt",
    "ipt",
    "p_tuning",
    "dora",
    "lora_fa",
    "vera",
    "dvora",
    "loha",
    "multilora",
    "tied_lora",
    "hira",
    "vb_lora",
    "randlora",
    "nola",
    "qalora",
    "lst",
    "attention_fusion",
    "lets",
    "selective",
    "fish",
}  # have random initial tensors
IN_PLACE = {
    "far",
    "surgical",
    "s4",
    "spafit",
    "bitfit",
    "cross_attention",
    "top_layers",
    "full",
    "linear_probe",
    "llama_adapter_v2",
    "ln_tuning",
    "longlora",
}  # train parameters of the base


REPLACES = {"p_tuning"}  # the last of several has the last word


def pairs(keep: Callable[[str, str], bool] = lambda method, model: True) -> pytest.MarkDecorator:
    """Every (method, model) that works, the slow ones marked."""
    params = []
    for method in SETTINGS:
        for model in MODELS:
            if (method, model) in RAISES or not keep(method, model):
                continue
            marks = [] if model in QUICK[method] else [pytest.mark.slow]
            params.append(pytest.param(method, model, marks=marks, id=f"{method}-{model}"))
    return pytest.mark.parametrize(("name", "model"), params)


def mergeable(method: str, model: str) -> bool:
    return REGISTRY[method].info.mergeable and (method, model) not in UNMERGEABLE


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def same_as_base(model: str, a: Tensor, b: Tensor) -> None:
    """Bit-equal where the same operations run; nn.MultiheadAttention has a fused kernel of its own."""
    close(a, b, 1e-6) if model == "encoder" else torch.testing.assert_close(a, b, atol=0, rtol=0)


# ------------------------------------------------------------------ the settings
def test_every_method_has_settings_and_a_quick_pair() -> None:
    assert set(SETTINGS) == set(REGISTRY) - TOYS, "a method without an entry in tests/settings.py"
    for name in SETTINGS:
        assert len(QUICK[name]) >= min(2, sum((name, model) not in RAISES for model in MODELS))
        assert not any((name, model) in RAISES for model in QUICK[name])
    for model in MODELS:
        assert sum(model in models for models in QUICK.values()) >= 3, model


TOYS = {name for name, cls in REGISTRY.items() if not cls.__module__.startswith("lightning_peft.")}


def test_a_method_without_settings_fails_loudly() -> None:
    with pytest.raises(KeyError, match="has no entry for the method 'nope'"):
        make("nope", "bert")


@pytest.mark.parametrize(("name", "model"), list(RAISES))
def test_nothing_to_do_is_an_error_that_leaves_the_model_alone(name: str, model: str) -> None:
    net = zoo.build(model)
    output(net, model)
    before = snapshot(net)
    with pytest.raises(RAISES[name, model]):
        make(name, model, **({"heads": "auto"} if model == "mlp" else {})).apply(net)
    assert differences(before, snapshot(net)) == []


# ------------------------------------------------------------------ the base stays what it is
@pairs()
def test_names_and_classes_of_the_base_are_unchanged(name: str, model: str) -> None:
    base = zoo.build(model)
    net, _ = adapted(name, model)
    keys, classes = list(base.state_dict()), {n: type(m) for n, m in base.named_modules()}
    assert [key for key in net.state_dict() if key in set(keys)] == keys
    known = dict(base.named_parameters())
    assert [n for n, _ in net.named_parameters() if n in known] == list(known)
    assert {n: type(m) for n, m in net.named_modules() if n in classes} == classes
    added = set(net.state_dict()) - set(keys)
    assert all(".adapters." in f".{key}" for key in added), added
    assert bool(added) == bool(adapter_parameters(net))


@pairs()
def test_identity_at_step_zero(name: str, model: str) -> None:
    base, (net, method) = zoo.build(model), adapted(name, model)
    assert method.info.identity is type(method).info.identity
    if method.info.identity:
        same_as_base(model, output(net, model), output(base, model))
    else:
        assert not torch.equal(output(net, model), output(base, model))


@pairs()
def test_only_the_chosen_parameters_train_and_each_gets_a_gradient(name: str, model: str) -> None:
    net, _ = adapted(name, model)
    chosen = set(state.trainable(net))
    assert {n for n, p in net.named_parameters() if p.requires_grad} == chosen
    before = tensors(net)
    gradients = train(net, model, steps=3)
    after = tensors(net)
    names = dict(net.named_parameters(remove_duplicate=False))
    tied = {n for n, p in names.items() if any(p is names[c] for c in chosen)}
    assert moved(before, after) <= tied
    still = chosen - moved(before, after)
    assert not still, still
    for n in chosen:
        assert n in gradients[0], n
        if ".adapters." in n and not (name == "bitfit" and ".k." in n):  # softmax does not see a bias on keys
            assert any(step[n].abs().sum() > 0 for step in gradients[:2]), n


@pairs()
def test_remove_restores_everything_bit_for_bit(name: str, model: str) -> None:
    net = zoo.build(model)
    output(net, model)
    parameters = list(net.parameters())
    parameters[0].requires_grad_(False)
    before, expected = snapshot(net), output(net, model)
    method = make(name, model)
    method.apply(net)
    train(net, model, steps=2)
    method.remove(net)
    assert differences(before, snapshot(net)) == []
    assert torch.equal(output(net, model), expected)
    method.apply(net)
    perturb(net)
    state.trainable(net)
    method.remove(net)
    assert differences(before, snapshot(net)) == []


def test_remove_of_one_of_two_leaves_the_other() -> None:
    net = zoo.build("gpt2")
    before = snapshot(net)
    lora, ia3 = make("lora", "gpt2"), make("ia3", "gpt2")
    lora.apply(net)
    ia3.apply(net)
    perturb(net)
    alone = zoo.build("gpt2")
    make("ia3", "gpt2").apply(alone)
    assign(alone, dict(net.named_parameters()))
    lora.remove(net)
    assert torch.equal(output(net, "gpt2"), output(alone, "gpt2"))
    assert {n for n, p in net.named_parameters() if p.requires_grad} == set(state.trainable(alone))
    ia3.remove(net)
    assert differences(before, snapshot(net)) == []


@torch.no_grad()
def assign(net: nn.Module, values: Mapping[str, Tensor]) -> None:
    for n, p in state.trainable(net).items():
        p.copy_(values[n])


# ------------------------------------------------------------------ merging
@pairs(mergeable)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_merged_equals_adapted(name: str, model: str, dtype: str) -> None:
    net = zoo.build(model).to(getattr(torch, dtype))
    output(net, model)
    pristine = snapshot(net)
    method = make(name, model, dtype=dtype)
    method.apply(net)
    perturb(net)
    before, expected = snapshot(net), output(net, model)
    report = method.merge(net)
    folded = [p for p in state.get_applied(net).placements if not p.adapter.training_only]
    assert report.places == len({id(p.place) for p in folded})
    assert report.rounding == 0.0
    close(output(net, model), expected, 1e-5 if dtype == "float32" else 1e-10)
    method.unmerge(net)
    assert differences(before, snapshot(net)) == []
    assert torch.equal(output(net, model), expected)
    method.merge(net)
    method.remove(net)
    assert differences(pristine, snapshot(net)) == []


@pairs(mergeable)
def test_unload_leaves_a_plain_model_that_computes_the_same(name: str, model: str) -> None:
    net, method = adapted(name, model)
    fresh = zoo.build(model)
    perturb(net)
    expected = output(net, model)
    method.unload(net)
    close(output(net, model), expected, 1e-5)
    assert list(net.state_dict()) == list(fresh.state_dict())
    assert state.applied_to(net) == {}
    assert all(p.requires_grad for p in net.parameters())


@pairs(lambda method, model: not mergeable(method, model))
def test_what_cannot_be_merged_says_so_and_changes_nothing(name: str, model: str) -> None:
    net, method = adapted(name, model)
    perturb(net)
    before = snapshot(net)
    for call in (method.merge, method.unload):
        with pytest.raises(NotMergeableError):
            call(net)
        assert differences(before, snapshot(net)) == []


@pairs(mergeable)
def test_merging_at_the_wrong_time_is_an_error(name: str, model: str) -> None:
    net, method = adapted(name, model)
    with pytest.raises(MergeError, match="not merged"):
        method.unmerge(net)
    method.merge(net)
    with pytest.raises(MergeError, match="merged already"):
        method.merge(net)
    method.unmerge(net)
    with method.enabled(net, False), pytest.raises(MergeError, match="switched off"):
        method.merge(net)
    method.merge(net)
    method.unmerge(net)


@pairs(mergeable)
def test_merge_and_unmerge_ten_times_in_bf16_is_bit_exact(name: str, model: str) -> None:
    net = zoo.build(model).bfloat16()
    method = make(name, model)
    method.apply(net)
    perturb(net)
    before, expected = tensors(net), output(net, model)
    for _ in range(10):
        report = method.merge(net)
        method.unmerge(net)
    assert moved(before, tensors(net)) == set()
    assert torch.equal(output(net, model), expected)
    assert not report.places or 0 < report.rounding < 1e-2
    assert report.dtypes == (("bfloat16",) if report.places else ())


# ------------------------------------------------------------------ files, copies
class Wrapped(nn.Module):
    """The model as the attribute of another, as in a LightningModule."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.net(*args, **kwargs)


@pairs()
@pytest.mark.parametrize(("saved_from", "loaded_into"), [("bare", "bare"), ("bare", "wrapped"), ("wrapped", "bare")])
def test_save_and_load_into_a_fresh_base(
    name: str, model: str, saved_from: str, loaded_into: str, tmp_path: Path
) -> None:
    net = Wrapped(zoo.build(model)) if saved_from == "wrapped" else zoo.build(model)
    make(name, model).apply(net)
    train(net, model, steps=1)
    save_adapter(net, tmp_path / "a")
    fresh = Wrapped(zoo.build(model)) if loaded_into == "wrapped" else zoo.build(model)
    loaded = load_adapter(fresh, tmp_path / "a")
    assert type(loaded) is type(make(name, model).portable())
    assert not any(p.requires_grad for p in fresh.parameters())
    if name in COLLAPSED:
        close(output(fresh, model), output(net, model), 1e-5)
    elif (name, model) == ("lst", "encoder"):  # torch's attention takes another kernel where its weights train
        close(output(fresh, model), output(net, model), 1e-6)
    else:
        assert torch.equal(output(fresh, model), output(net, model))
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"adapter.json", "adapter.safetensors"}
    assert {p.name for p in tmp_path.iterdir()} == {"a"}


def through_pickle(net: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(net))


def through_torch_save(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pairs()
@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch_save])
def test_copies_compute_the_same_and_are_independent(
    name: str, model: str, duplicate: Callable[[nn.Module], nn.Module]
) -> None:
    net, method = adapted(name, model)
    train(net, model, steps=1)
    expected, before = output(net, model), tensors(net)
    twin = duplicate(net)
    assert torch.equal(output(twin, model), expected)
    assert set(state.trainable(twin)) == set(state.trainable(net))
    train(twin, model, steps=1)
    assert moved(before, tensors(net)) == set()
    trained = output(twin, model)
    assert torch.equal(output(net, model), expected)
    train(net, model, steps=2)
    assert torch.equal(output(twin, model), trained)
    now = output(net, model)
    method.remove(twin)
    assert torch.equal(output(twin, model), output(zoo.build(model), model))
    assert torch.equal(output(net, model), now)
    with method.enabled(net, False):
        assert state.active(net) == []


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in IN_PLACE])
@pytest.mark.parametrize("when", ["built without memory", "lost its memory"])
def test_materialize_draws_what_the_model_would_have_had(name: str, when: str) -> None:
    model = "vit" if (name, "llama") in RAISES else "llama"
    expected, _ = adapted(name, model)
    base = zoo.build(model)
    with torch.device("meta" if when == "built without memory" else "cpu"):
        net = zoo.build(model)
    make(name, model).apply(net)
    net.to("meta").to_empty(device="cpu")
    for tensor in (*net.parameters(), *net.buffers()):
        tensor.detach().fill_(77 if tensor.is_floating_point() else 0)
    own = dict((*net.named_parameters(), *net.named_buffers()))
    for known, values in (*base.named_parameters(), *base.named_buffers()):
        own[known].detach().copy_(values)
    materialize(net)
    found = tensors(net)
    assert set(found) == set(tensors(expected))
    assert moved(tensors(expected), found) == set()


# ------------------------------------------------------------------ switching and labels
@pairs()
def test_switched_off_is_the_base(name: str, model: str) -> None:
    base, (net, method) = zoo.build(model), adapted(name, model)
    flags = [p.requires_grad for p in net.parameters()]
    perturb(net, adapters_only=True)
    on = output(net, model)
    with method.enabled(net, False):
        same_as_base(model, output(net, model), output(base, model))
        with method.enabled(net, True):
            assert torch.equal(output(net, model), on)
        same_as_base(model, output(net, model), output(base, model))
    assert torch.equal(output(net, model), on)
    method.enabled(net, False)
    assert state.active(net) == []
    same_as_base(model, output(net, model), output(base, model))
    method.enabled(net)
    assert [p.requires_grad for p in net.parameters()] == flags


@pairs(lambda method, model: method not in IN_PLACE | REPLACES and (method, model) not in UNMERGEABLE)
def test_two_labels_of_one_method_and_switching(name: str, model: str) -> None:
    net = zoo.build(model)
    pristine = snapshot(net) if model == "mlp" else None
    first, second = (
        make(name, model, label=label, seed=seed, heads=None) for label, seed in (("first", 1), ("second", 2))
    )
    alone, trained = {}, {}
    for method in (first, second):
        one = zoo.build(model)
        method.apply(one)
        perturb(one, seed=method.seed)
        trained |= {n: p.detach().clone() for n, p in state.trainable(one).items()}
        alone[method.label] = output(one, model)
    first.apply(net)
    second.apply(net)
    assign(net, trained)
    assert list(state.applied_to(net)) == state.active(net) == ["first", "second"]
    both = output(net, model)
    with second.enabled(net, False):
        assert state.active(net) == ["first"]
        torch.testing.assert_close(output(net, model), alone["first"], atol=0, rtol=0)
    with first.enabled(net, False):
        torch.testing.assert_close(output(net, model), alone["second"], atol=0, rtol=0)
    assert not torch.equal(both, alone["first"])
    assert name in IN_PLACE_OF_STATES or not torch.equal(both, alone["second"])
    first.remove(net)
    torch.testing.assert_close(output(net, model), alone["second"], atol=0, rtol=0)
    second.remove(net)
    if pristine is not None:
        assert differences(pristine, snapshot(net)) == []


@pairs()
def test_a_label_that_is_taken_is_an_error_that_changes_nothing(name: str, model: str) -> None:
    net, method = adapted(name, model)
    before = snapshot(net)
    with pytest.raises(LabelError, match="is taken"):
        make(name, model).apply(net)
    with pytest.raises(LabelError, match="names no method"):
        method.remove(net, "nobody")
    assert differences(before, snapshot(net)) == []


LABELS = ["self_attn", "0", "lora", "mlp", "keys", "adapters", "forward", "weight", "training", "a/b", "é"]


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize(("name", "model"), [("lora", "mlp"), ("lora", "llama"), ("mam", "bert"), ("lora", "encoder")])
def test_labels_like_modules(label: str, name: str, model: str, tmp_path: Path) -> None:
    net = zoo.build(model)
    output(net, model)
    before = snapshot(net)
    method = make(name, model, label=label)
    method.apply(net)
    train(net, model, steps=1)
    expected = output(net, model)
    assert torch.equal(output(through_pickle(net), model), expected)
    saved = state.saved(net)
    assert set(saved) == set(state.trainable(net))
    save_adapter(net, tmp_path / "adapter")
    fresh = zoo.build(model)
    load_adapter(fresh, tmp_path / "adapter")
    assert list(state.applied_to(fresh)) == [label]
    assert torch.equal(output(fresh, model), expected)
    other = zoo.build(model)
    load_adapter(other, tmp_path / "adapter", label="another")
    assert torch.equal(output(other, model), expected)
    method.remove(net)
    assert differences(before, snapshot(net)) == []


@pytest.mark.parametrize("label", [".", "a.b"])
def test_labels_that_cannot_be(label: str) -> None:
    with pytest.raises(LabelError, match="cannot name an adapter"):
        make("lora", "mlp", label=label).apply(zoo.build("mlp"))


# ------------------------------------------------------------------ random numbers
@pairs()
def test_apply_draws_nothing_from_the_global_generators(name: str, model: str) -> None:
    net = zoo.build(model)
    torch.manual_seed(3)
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    method = make(name, model)
    method.apply(net)
    if mergeable(name, model):
        method.merge(net)
        method.unmerge(net)
    method.remove(net)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert numpy.random.get_state()[1].tolist() == before[2]


@pairs(lambda method, model: method in RANDOM)
def test_tensors_depend_on_the_seed_and_on_nothing_else(name: str, model: str) -> None:
    one, two, other = [adapted(name, model, seed=seed, heads=None)[0] for seed in (4, 4, 5)]
    assert moved(tensors(one), tensors(two)) == set()
    different = moved(tensors(one), tensors(other))
    assert different
    assert different <= set(state.trainable(one)) | {n for n in tensors(one) if ".adapters." in n}  # frozen ones too
    later = zoo.build(model)
    make("bitfit", model).apply(later)
    torch.manual_seed(99)
    make(name, model, seed=4, heads=None).apply(later)
    mine = {n: p for n, p in tensors(later).items() if f".adapters.{name}" in f".{n}"}
    assert mine
    assert moved(tensors(one), mine) == set()


# ------------------------------------------------------------------ dtypes
@pairs()
@pytest.mark.parametrize("when", ["before", "after"])
def test_adapters_stay_fp32_on_a_bf16_base(name: str, model: str, when: str) -> None:
    net = zoo.build(model)
    method = make(name, model)
    if when == "before":
        net.bfloat16()
        method.apply(net)
    else:
        method.apply(net)
        net.bfloat16()
    assert {p.dtype for p in adapter_parameters(net)} <= {torch.float32}
    net.train()
    out = forward(net, model)
    assert out.dtype == torch.bfloat16
    assert torch.isfinite(out).all()
    out.float().pow(2).mean().backward()
    assert all(p.grad is not None for p in state.trainable(net).values())
    net.eval()
    with method.enabled(net, False):
        close(output(net, model), output(zoo.build(model).bfloat16(), model), 2e-2 if model == "encoder" else 0)


@pairs(lambda method, model: method not in {"full", "linear_probe", "ln_tuning"})
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_dtype_base_follows_the_base(name: str, model: str, dtype: str) -> None:
    net = zoo.build(model).to(getattr(torch, dtype))
    make(name, model, dtype="base").apply(net)
    assert {p.dtype for p in net.parameters()} == {getattr(torch, dtype)}
    assert output(net, model).dtype == getattr(torch, dtype)


@pairs()
def test_autocast_gives_what_the_base_gives(name: str, model: str) -> None:
    base, (net, _) = zoo.build(model), adapted(name, model)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = output(net, model), output(base, model)
    with torch.autocast("cpu", torch.bfloat16):  # a new region: the cache of the first holds casts without gradients
        loss(net, model).backward()
    assert out.dtype == expected.dtype
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in state.trainable(net).values())


# ------------------------------------------------------------------ checkpointing and compilation
@pairs(lambda method, model: model not in ("encoder", "mlp"))
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing_gives_the_same_gradients(name: str, model: str, reentrant: bool) -> None:
    gradients = []
    for checkpointed in (False, True):
        net, _ = adapted(name, model)
        perturb(net)
        if checkpointed:
            net.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                net.enable_input_require_grads()
        net.train()
        torch.manual_seed(0)  # for what is drawn in the forward
        loss(net, model).backward()
        gradients.append({n: p.grad for n, p in state.trainable(net).items()})
    assert set(gradients[0]) == set(gradients[1])
    for n, expected in gradients[0].items():
        assert gradients[1][n] is not None, n
        close(gradients[1][n], expected, 1e-6)


def compiled() -> list[Any]:
    params = []
    for name in SETTINGS:
        for model in ("bert", "llama"):
            if (name, model) not in RAISES:
                params.append(pytest.param(name, model, id=f"{name}-{model}"))
    return params


@pytest.mark.slow
@pytest.mark.parametrize(("name", "model"), compiled())
def test_compiles_without_a_graph_break(name: str, model: str) -> None:
    torch._dynamo.reset()
    net, method = adapted(name, model)
    perturb(net)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    close(output(compiled, model), output(net, model), 1e-6)
    method.enabled(net, False)
    close(output(compiled, model), output(net, model), 1e-6)


def test_settings_name_the_models_that_have_a_head() -> None:
    for model in MODELS:
        net = zoo.build(model)
        make("lora", model, heads="auto").apply(net)
        assert any(s.head for s in state.get_applied(net).selected) == (model in HEADED)
