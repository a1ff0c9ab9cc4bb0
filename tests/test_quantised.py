"""Quantised layers and the methods on them: the contract over a base in 4 bits, oracles of the layers, errors, traps."""

from __future__ import annotations

import copy
import functools
import gc
import importlib
import io
import itertools
import json
import logging
import math
import pickle
import shutil
import weakref
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import zoo
from harness import (
    adapter_parameters,
    differences,
    dtype_of,
    loss,
    moved,
    output,
    perturb,
    snapshot,
    tensors,
    train,
)
from settings import COLLAPSED, COMPENSATING, FROM_WEIGHTS, MODELS, QUICK, RAISES, RENAMED, SETTINGS, UNMERGEABLE, make
from torch import Tensor, nn

from lightning_peft import (
    REGISTRY,
    BitFit,
    FullFineTuning,
    LNTuning,
    LoRA,
    kernels,
    load_adapter,
    precision,
    save_adapter,
)
from lightning_peft.core import codes, low_rank, merge, quantised, state
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.codes import CONSTANTS, Quantisation
from lightning_peft.core.files import AdapterFileError
from lightning_peft.core.merge import MergeError
from lightning_peft.core.quant import QuantisationError
from lightning_peft.core.quantised import (
    Quantised,
    adopt_file,
    can_quantise,
    is_quantised,
    load_weight,
    quantise_module,
    thaw,
)
from lightning_peft.core.sites import TargetError
from lightning_peft.precision import NF4Precision, Report, dequantise, footprint, quantisation, quantise

TARGETS: dict[str, list[str]] = {"mlp": ["body.2", "mlp", "lora"]}  # no table knows the names of the plain module
IN_CODES = {  # would change the quantised weights themselves
    "cross_attention",
    "far",
    "full",
    "relora",
    "remora",
    "surgical",
    "top_layers",
}
BACKENDS = ("torch", "bitsandbytes")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}  # of a product, relative to its norm
needs_bitsandbytes = pytest.mark.skipif("bitsandbytes" not in codes.KERNELS, reason="bitsandbytes is not installed")
both_backends = pytest.mark.parametrize("backend", ["torch", pytest.param("bitsandbytes", marks=needs_bitsandbytes)])


def pairs(
    keep: Callable[[str, str], bool] = lambda name, model: name not in IN_CODES,
) -> pytest.MarkDecorator:
    """Every (method, model) that works, the slow ones marked."""
    params = []
    for name, model in itertools.product(SETTINGS, MODELS):
        if (name, model) not in RAISES and keep(name, model):
            marks = [] if quick(name, model) else [pytest.mark.slow]
            params.append(pytest.param(name, model, marks=marks, id=f"{name}-{model}"))
    return pytest.mark.parametrize(("name", "model"), params)


def quick(name: str, model: str) -> bool:
    """One model a method; LoRA on all that the quick run knows, torch.nn's encoder and the plain module once more."""
    special = {("prefix_tuning", "encoder"), ("ia3", "mlp")}
    return model == QUICK[name][0] or (name == "lora" and model in QUICK[name]) or (name, model) in special


def mergeable(name: str, model: str) -> bool:
    return name not in IN_CODES and REGISTRY[name].info.mergeable and (name, model) not in UNMERGEABLE


def reduced(net: nn.Module, model: str, **options: Any) -> Report:
    """Quantise what the tests quantise of this model."""
    return quantise(net, **{"targets": TARGETS.get(model, "all-linear"), **options})


def small(model: str, **options: Any) -> nn.Module:
    net = zoo.build(model)
    reduced(net, model, **options)
    return net


def other_base(model: str) -> nn.Module:
    """The same architecture with other weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(model.encode()) + 99)
        return zoo.ZOO[model]().eval()


def layers(net: nn.Module) -> dict[str, Quantised]:
    return {name: module for name, module in net.named_modules() if isinstance(module, Quantised)}


def kept_bits(net: nn.Module) -> dict[str, Tensor]:
    """Codes and constants of all quantised layers."""
    return {
        f"{name}.{key}": tensor.detach().clone()
        for name, layer in layers(net).items()
        for key, tensor in {"weight": layer.packed, **layer.constants()}.items()
    }


def flags(net: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in net.named_parameters()}


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def near(a: Tensor, b: Tensor, tolerance: float) -> None:
    """|a - b| <= tolerance |b|"""
    assert a.shape == b.shape
    error = (a.double() - b.double()).norm()
    assert error <= tolerance * b.double().norm() + 1e-30, float(error / b.double().norm())


def same_as_base(model: str, a: Tensor, b: Tensor) -> None:
    """Bit-equal where the same operations run; torch.nn's encoder layer has a fused path in eval mode."""
    close(a, b, 1e-6) if model == "encoder" else torch.testing.assert_close(a, b, atol=0, rtol=0)


def unordered(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """`differences`, but attributes may have been set in another order."""
    return [
        key
        for key in differences(before, after)
        if not (
            key.endswith(": attributes")
            and key in before
            and key in after
            and sorted(before[key]) == sorted(after[key])
        )
    ]


@torch.no_grad()
def dequantised_twin(net: nn.Module, model: str) -> nn.Module:
    """A fresh plain model that holds the dequantised weights in fp32."""
    twin = zoo.build(model)
    for name, layer in layers(net).items():
        weight, plain = layer.dequantised(torch.float32), twin.get_submodule(name)
        plain.weight.copy_(weight.T if type(plain).__name__ == "Conv1D" else weight)
    return twin


def as_it_was(name: str, model: str) -> bool:
    """Whether the codes are the same with the method and without."""
    return name not in IN_CODES | COMPENSATING


def in_any_order(name: str, model: str) -> bool:
    """Whether the adapters start the same from floats and from codes."""
    return as_it_was(name, model) and name not in FROM_WEIGHTS


# ------------------------------------------------------------------ the contract: order
@pairs(in_any_order)
def test_the_order_of_quantising_and_applying_does_not_matter(name: str, model: str) -> None:
    before, after = small(model), zoo.build(model)
    make(name, model).apply(before)
    make(name, model).apply(after)
    own = {n: (p, p.detach().clone()) for n, p in after.named_parameters() if ".adapters." in f".{n}"}
    reduced(after, model)
    assert list(layers(before)) == list(layers(after))
    assert layers(before)
    assert {n: type(m) for n, m in before.named_modules()} == {n: type(m) for n, m in after.named_modules()}
    one, two = tensors(before), tensors(after)
    assert list(one) == list(two)
    assert moved(one, two) == set()
    assert flags(before) == flags(after)
    assert list(state.trainable(before)) == list(state.trainable(after))
    assert list(state.saved(before)) == list(state.saved(after))
    assert state.get_applied(before).fingerprint == state.get_applied(after).fingerprint
    assert torch.equal(output(before, model), output(after, model))
    parameters = dict(after.named_parameters())
    for n, (parameter, values) in own.items():  # an adapter is the same object with the same bits
        assert parameters[n] is parameter
        follows = name in ("dora", "dvora") and n.endswith(".m")  # an untrained magnitude is that of the codes
        assert follows or torch.equal(parameter, values)
        assert parameter.dtype == torch.float32
    assert not any(isinstance(m, Adapter) and is_quantised(c) for m in after.modules() for c in m.modules())


@pairs(in_any_order)
def test_a_base_in_bf16_gives_the_same_in_either_order(name: str, model: str) -> None:
    before, after = zoo.build(model).bfloat16(), zoo.build(model).bfloat16()
    reduced(before, model)
    make(name, model).apply(before)
    make(name, model).apply(after)
    reduced(after, model)
    assert moved(tensors(before), tensors(after)) == set()
    assert {p.dtype for p in adapter_parameters(after)} <= {torch.float32}
    assert {layer.source_dtype for layer in layers(after).values()} == {torch.bfloat16}
    out = output(after, model)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, output(before, model))


@pairs(lambda name, model: name not in IN_CODES | {"linear_probe", "ln_tuning"})
def test_dtype_base_is_that_of_the_base_before_it_was_quantised(name: str, model: str) -> None:
    net = zoo.build(model).bfloat16()
    reduced(net, model)
    make(name, model, dtype="base").apply(net)
    assert {p.dtype for p in adapter_parameters(net)} <= {torch.bfloat16}
    assert output(net, model).dtype == torch.bfloat16


# ------------------------------------------------------------------ the contract: what moves and what does not
@pairs()
def test_identity_against_the_quantised_base(name: str, model: str) -> None:
    base, net = small(model), small(model)
    method = make(name, model)
    method.apply(net)
    if method.info.identity:
        same_as_base(model, output(net, model), output(base, model))
    perturb(net, adapters_only=True)
    on = output(net, model)
    with method.enabled(net, False):
        same_as_base(model, output(net, model), output(base, model))
    assert torch.equal(output(net, model), on)
    assert moved(kept_bits(base), kept_bits(net)) == set()


@pairs()
def test_only_the_chosen_parameters_move(name: str, model: str) -> None:
    net = small(model)
    make(name, model).apply(net)
    chosen = set(state.trainable(net))
    assert {n for n, p in net.named_parameters() if p.requires_grad} == chosen
    before, bits = tensors(net), kept_bits(net)
    gradients = train(net, model, steps=3)
    names = dict(net.named_parameters(remove_duplicate=False))
    tied = {n for n, p in names.items() if any(p is names[c] for c in chosen)}
    changed = moved(before, tensors(net))
    assert chosen <= changed <= tied
    assert set(gradients[0]) == chosen
    assert moved(bits, kept_bits(net)) == set()
    assert all(layer.packed.grad is None and not layer.packed.requires_grad for layer in layers(net).values())


@pairs()
def test_gradients_are_those_of_the_dequantised_weights(name: str, model: str) -> None:
    net = small(model)
    twin = dequantised_twin(net, model)
    for one in (net, twin):
        make(name, model).apply(one)
        perturb(one)
        one.train()
        torch.manual_seed(0)  # for what is drawn in the forward
        loss(one, model).backward()
    expected = {n: p.grad for n, p in state.trainable(twin).items()}
    found = {n: p.grad for n, p in state.trainable(net).items()}
    assert list(found) == list(expected)
    scale = max(float(g.abs().max()) for g in expected.values())
    for n, gradient in expected.items():
        assert found[n] is not None, n
        torch.testing.assert_close(found[n], gradient, atol=1e-6 * max(scale, 1.0), rtol=1e-4)
    net.eval(), twin.eval()
    close(output(net, model), output(twin, model), 1e-5)


@pairs()
def test_remove_restores_the_quantised_base_bit_for_bit(name: str, model: str) -> None:
    net = small(model)
    next(p for n, p in net.named_parameters() if p.requires_grad).requires_grad_(False)
    expected, before = output(net, model), snapshot(net)
    method = make(name, model)
    method.apply(net)
    train(net, model, steps=2)
    method.remove(net)
    assert differences(before, snapshot(net)) == []
    assert torch.equal(output(net, model), expected)


@pairs(as_it_was)
def test_remove_after_quantising_under_the_method_leaves_the_quantised_base(name: str, model: str) -> None:
    net, base = zoo.build(model), small(model)
    method = make(name, model)
    method.apply(net)
    reduced(net, model)
    perturb(net)
    method.remove(net)
    assert list(tensors(net)) == list(tensors(base))
    assert moved(tensors(base), tensors(net)) == set()
    assert flags(net) == flags(base)
    assert {n: type(m) for n, m in net.named_modules()} == {n: type(m) for n, m in base.named_modules()}
    assert torch.equal(output(net, model), output(base, model))


# ------------------------------------------------------------------ the contract: copies and files
def through_pickle(net: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(net))


def through_torch_save(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pairs()
def test_copies_are_equal_and_independent(name: str, model: str) -> None:
    check_copy(name, model, copy.deepcopy)


@pytest.mark.parametrize("duplicate", [through_pickle, through_torch_save])
@pytest.mark.parametrize(("name", "model"), [("lora", "gpt2"), ("mam", "t5"), ("bitfit", "bert")])
def test_pickles_are_equal_and_independent(name: str, model: str, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    check_copy(name, model, duplicate)


def check_copy(name: str, model: str, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    net = small(model)
    make(name, model).apply(net)
    perturb(net)
    expected, before = output(net, model), tensors(net)
    twin = duplicate(net)
    assert torch.equal(output(twin, model), expected)
    assert moved(before, tensors(twin)) == set()
    assert list(state.trainable(twin)) == list(state.trainable(net))
    train(twin, model, steps=1)
    with torch.no_grad():
        for layer in layers(twin).values():
            layer.packed.zero_()
            for constant in layer.constants().values():
                constant.zero_()
    assert moved(before, tensors(net)) == set()
    assert torch.equal(output(net, model), expected)


@pairs()
def test_a_state_dict_fills_a_model_that_was_quantised_from_other_weights(name: str, model: str) -> None:
    net, fresh = small(model), other_base(model)
    reduced(fresh, model)
    for one in (net, fresh):
        make(name, model).apply(one)
    perturb(net)
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    fresh.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert moved(tensors(net), tensors(fresh)) == set()
    assert torch.equal(output(fresh, model), output(net, model))


@pairs()
def test_adapter_files_go_between_a_base_and_its_quantised_one(name: str, model: str, tmp_path: Path) -> None:
    nets = {True: small(model), False: zoo.build(model)}
    for in_codes, net in nets.items():
        make(name, model).apply(net)
        perturb(net)
        save_adapter(net, tmp_path / str(in_codes))
    for saved_in_codes, loaded_in_codes in itertools.product((True, False), repeat=2):
        fresh = small(model) if loaded_in_codes else zoo.build(model)
        load_adapter(fresh, tmp_path / str(saved_in_codes), trainable=True)
        origin = nets[saved_in_codes]
        one, two = state.saved(origin), state.saved(fresh)
        assert list(one) == list(two) or name in (*RENAMED, *COLLAPSED)  # of which files hold something plainer
        if name not in COLLAPSED:
            assert moved(one, two) == set()
        if saved_in_codes == loaded_in_codes:
            close(output(fresh, model), output(origin, model), 1e-5 if name in COLLAPSED else 0)
        del fresh
    keys = {in_codes: list(state.saved(net)) for in_codes, net in nets.items()}
    assert keys[True] == keys[False]  # and no codes or scales among them
    stranger = other_base(model)
    reduced(stranger, model)
    before = snapshot(stranger)
    with pytest.raises(AdapterFileError, match="trained on another base"):
        load_adapter(stranger, tmp_path / "False")
    assert differences(before, snapshot(stranger)) == []


# ------------------------------------------------------------------ the contract: merging
@pairs(mergeable)
def test_merged_into_floats_equals_adapted_and_unmerges_to_the_bit(name: str, model: str) -> None:
    net = small(model)
    method = make(name, model)
    method.apply(net)
    perturb(net)
    expected, before = output(net, model), snapshot(net)
    in_codes = any(is_quantised(m) for m in touched(net))
    if not in_codes:
        with pytest.raises(MergeError, match="is for a quantised base, and this one is not"):
            method.merge(net, into="float32")
    else:
        with pytest.raises(MergeError, match=r"into='bfloat16'.*into='float32'.*into='requantise'"):
            method.merge(net)
    assert differences(before, snapshot(net)) == []
    for into in ("float32", "requantise") if in_codes else (None,):
        report = method.merge(net, into=into)
        assert state.active(net) == []
        if into != "requantise":
            close(output(net, model), expected, 1e-5)
            assert report.rounding == 0.0
        else:
            assert 0 < report.rounding < 1
            assert [n for n, m in net.named_modules() if is_quantised(m)] == list(layers(net))
        method.unmerge(net)
        assert unordered(before, snapshot(net)) == []
        assert torch.equal(output(net, model), expected)


def touched(net: nn.Module) -> list[nn.Module]:
    """The modules of the base whose weights adapters would be folded into."""
    return [vars(p.place).get("owner", p.place) for p in state.get_applied(net).placements]


@pairs(mergeable)
def test_unload_leaves_no_adapter(name: str, model: str) -> None:
    net, fresh = small(model), zoo.build(model)
    method = make(name, model)
    method.apply(net)
    perturb(net)
    expected = output(net, model)
    changed = {id(m) for m in touched(net) if is_quantised(m)}
    method.unload(net, into="float32" if changed else None)
    close(output(net, model), expected, 1e-5)
    assert state.applied_to(net) == {}
    assert {n for n, m in net.named_modules() if isinstance(m, Quantised)}.isdisjoint(
        n for n, m in net.named_modules() if id(m) in changed
    )
    for n, module in net.named_modules():
        assert type(module) is type(fresh.get_submodule(n)) or isinstance(module, Quantised)


# ------------------------------------------------------------------ methods that would train codes
@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float16", "float32"])
@pytest.mark.parametrize("model", ["bert", "gpt2", "llama"])
def test_full_fine_tuning_of_a_quantised_base_is_refused(model: str, storage: str) -> None:
    net = small(model, storage_dtype=storage)
    before = snapshot(net)
    with pytest.raises(TargetError, match="which is quantised: no gradient reaches its codes"):
        FullFineTuning().apply(net)
    assert differences(before, snapshot(net)) == []


@pytest.mark.parametrize(("model", "targets"), [("llama", "q"), ("gpt2", "q"), ("bert", "down"), ("encoder", "up")])
@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_selecting_a_quantised_weight_is_refused(model: str, targets: str, storage: str) -> None:
    net = small(model, storage_dtype=storage)
    before = snapshot(net)
    with pytest.raises(TargetError, match="LNTuning trains .*weight, which is quantised.*exclude=.*dequantise"):
        LNTuning(targets=targets).apply(net)
    assert differences(before, snapshot(net)) == []


def test_a_quantised_head_cannot_train() -> None:
    net = zoo.build("timm_vit")
    quantise(net, targets="all-linear,head")
    assert isinstance(net.head, Quantised)
    before = snapshot(net)
    with pytest.raises(TargetError, match="which is quantised"):
        LoRA(rank=2).apply(net)
    assert differences(before, snapshot(net)) == []
    LoRA(rank=2, heads=None).apply(net)


def test_quantising_under_full_fine_tuning_is_refused() -> None:
    net = zoo.build("llama")
    FullFineTuning().apply(net)
    before = snapshot(net)
    with pytest.raises(QuantisationError, match="leave no Linear or Conv1D.*that train: model.layers.0"):
        quantise(net)
    assert differences(before, snapshot(net)) == []


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_the_way_out_that_the_error_names_works(model: str) -> None:
    """`exclude=` of what is quantised leaves a method that trains the rest."""
    net = small(model, storage_dtype="bfloat16")
    FullFineTuning(exclude="attention,ffn").apply(net)
    assert not any(layer.packed.requires_grad for layer in layers(net).values())
    assert any("norm" in n or "ln_" in n for n in state.trainable(net))


@pytest.mark.parametrize("model", ["gpt2", "bert"])
@pytest.mark.parametrize("fields", [{}, {"targets": "q"}, {"exclude": "q"}], ids=["all", "targets", "exclude"])
def test_biases_of_quantised_projections_train(model: str, fields: dict[str, Any]) -> None:
    net, twin = small(model), zoo.build(model)
    for one in (net, twin):
        BitFit(heads=None, **fields).apply(one)
    chosen = {n: int(mask.sum()) for n, mask in masks(net).items()}
    assert chosen == {n: int(mask.sum()) for n, mask in masks(twin).items()}
    assert list(state.trainable(net)) == list(state.trainable(twin))
    before = tensors(net)
    train(net, model, steps=1)
    assert moved(before, tensors(net)) == set(state.trainable(net))


def masks(net: nn.Module) -> dict[str, Tensor]:
    names = {id(p): n for n, p in net.named_parameters()}
    return {names[id(p)]: mask for p, mask in state.masked(net)}


# ------------------------------------------------------------------ oracles of one layer
def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1


def linear(
    d_in: int = 96, d_out: int = 40, bias: bool = True, dtype: torch.dtype = torch.float32, **q: Any
) -> Quantised:
    layer = nn.Linear(d_in, d_out, bias)
    with torch.no_grad():
        layer.weight.copy_(weights(d_out, d_in))
        if bias:
            layer.bias.copy_(weights(1, d_out, 1)[0])
    return quantise_module(layer.to(dtype), Quantisation(**q))


def conv1d(d_in: int = 96, d_out: int = 40, **q: Any) -> Quantised:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(d_out, d_in)
    with torch.no_grad():
        layer.weight.copy_(weights(d_out, d_in).T)
        layer.bias.copy_(weights(1, d_out, 1)[0])
    return quantise_module(layer, Quantisation(**q))


def activations(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 3) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype).requires_grad_()


LEADING = [(), (3,), (2, 3), (2, 1, 3), (0,), (2, 0)]
LAYERS: dict[str, Callable[..., Quantised]] = {
    "bias": linear,
    "no bias": lambda **q: linear(bias=False, **q),
    "conv1d": conv1d,
    "ragged": lambda **q: linear(37, 11, **q),
    "odd": lambda **q: linear(7, 3, **q),
}


@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("mode", ["nf4", "fp4"])
@both_backends
def test_forward_and_gradients_are_those_of_the_dequantised_weight(
    kind: str, leading: tuple[int, ...], mode: str, backend: str
) -> None:
    layer = LAYERS[kind](mode=mode, backend=backend)
    d_out, d_in = layer.features
    bias = None if layer.bias is None else layer.bias.detach().double()
    for dtype in DTYPES:
        x = activations(*leading, d_in, dtype=dtype)
        y = layer(x)
        assert y.shape == (*leading, d_out)
        assert y.dtype == dtype
        weight = layer.dequantised(dtype).double()
        near(y, x.double() @ weight.T + (0 if bias is None else bias), ROUNDING[dtype])
        g = activations(*leading, d_out, dtype=dtype, seed=5).detach()
        y.backward(g)
        assert x.grad.dtype == dtype
        near(x.grad, g.double() @ weight, ROUNDING[dtype])
        if bias is not None:
            near(layer.bias.grad, g.double().reshape(-1, d_out).sum(0), 2 * ROUNDING[dtype])
            layer.bias.grad = None
    assert layer.packed.grad is None


@pytest.mark.parametrize("kind", LAYERS)
@both_backends
def test_the_dequantised_weight_is_rounded_once(kind: str, backend: str) -> None:
    layer = LAYERS[kind](backend=backend)
    exact = layer.dequantised(torch.float32)
    for dtype in (*DTYPES, torch.float64):
        assert torch.equal(layer.dequantised(dtype), exact.to(dtype))
    transposed = kind == "conv1d"
    assert torch.equal(layer.weight, exact.T if transposed else exact)
    assert layer.weight.dtype == torch.float32
    assert layer.weight.shape == ((96, 40) if transposed else exact.shape)
    assert not layer.weight.requires_grad


@pytest.mark.parametrize("mode", ["nf4", "fp4"])
@both_backends
def test_first_and_second_derivatives(mode: str, backend: str) -> None:
    layer = linear(7, 5, mode=mode, backend=backend).double()
    assert torch.autograd.gradcheck(layer, (activations(2, 7, dtype=torch.float64),))
    assert torch.autograd.gradgradcheck(layer, (activations(2, 7, dtype=torch.float64),))
    bias = layer.bias
    x = activations(2, 7, dtype=torch.float64)
    (grad,) = torch.autograd.grad((layer(x).tanh()).sum(), x, create_graph=True)
    found = torch.autograd.grad(grad.pow(2).sum(), [x, bias])
    weight = layer.dequantised(torch.float64)
    (grad,) = torch.autograd.grad(F.linear(x, weight, bias).tanh().sum(), x, create_graph=True)
    expected = torch.autograd.grad(grad.pow(2).sum(), [x, bias])
    for one, two in zip(found, expected, strict=True):
        close(one, two, 1e-12)


@pytest.mark.parametrize("leading", [(3,), (2, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("mode", ["nf4", "int8"])
@pytest.mark.parametrize("bias", [True, False])
def test_what_a_layer_gives_can_be_changed_in_place(mode: str, bias: bool, leading: tuple[int, ...]) -> None:
    layer, x = linear(bias=bias, mode=mode), activations(*leading, 96)
    layer(x).mul_(2).relu_().sum().backward()
    found, x.grad = x.grad, None
    (layer(x) * 2).relu().sum().backward()
    assert torch.equal(found, x.grad)


# ------------------------------------------------------------------ LoRA and codes in one product
class One(nn.Module):
    def __init__(self, layer: Quantised) -> None:
        super().__init__()
        self.proj = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def fused(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of LoRA went the short way, from here on."""
    calls: list[bool] = []
    real = low_rank.takes_low_rank
    monkeypatch.setattr(low_rank, "takes_low_rank", lambda base, x: calls.append(real(base, x)) or calls[-1])
    return calls


def with_lora(layer: Quantised, **fields: Any) -> One:
    net = One(layer)
    LoRA(**{"targets": "proj", "rank": 3, "alpha": 7, "heads": None, "dtype": "base", **fields}).apply(net)
    perturb(net, adapters_only=True)
    return net


@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_lora_over_codes_is_the_dense_formula(
    kind: str, leading: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = LAYERS[kind]()
    d_out, d_in = layer.features
    net = with_lora(layer, dtype="float32").double()
    for p in adapter_parameters(net):
        p.data = p.data.double()
    calls = fused(monkeypatch)
    (adapter,) = net.proj.adapters._modules.values()
    x, g = activations(*leading, d_in, dtype=torch.float64), activations(*leading, d_out, dtype=torch.float64, seed=5)
    inputs = [x, adapter.a, adapter.b]
    y = net(x)
    weight = layer.dequantised(torch.float64)
    expected = F.linear(x, weight + 7 / 3 * adapter.b @ adapter.a, layer.bias)
    near(y, expected, 1e-12)
    for one, two in zip(torch.autograd.grad(y, inputs, g), torch.autograd.grad(expected, inputs, g), strict=True):
        near(one, two, 1e-12)
    assert calls == [True]


def test_second_derivatives_of_lora_over_codes() -> None:
    net = with_lora(linear(7, 5), dtype="float32").double()
    shapes = [p.double().detach().requires_grad_() for p in adapter_parameters(net)]

    def call(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        names = [name for name, _ in net.named_parameters() if ".adapters." in name]
        return torch.func.functional_call(net, dict(zip(names, (a, b), strict=True)), (x,))

    x = activations(2, 3, 7, dtype=torch.float64)
    assert torch.autograd.gradcheck(call, (x, *shapes))
    assert torch.autograd.gradgradcheck(call, (x, *shapes))


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], torch.dtype | None, bool]] = {
    "plain": ({}, {}, None, True),
    "with a bias of its own": ({}, {"lora_bias": True}, None, False),
    "with dropout": ({}, {"dropout": 0.5}, None, False),
    "eight bits": ({"mode": "int8"}, {}, None, False),
    "products in another dtype": ({"compute_dtype": torch.bfloat16}, {}, None, False),
    "autocast to that dtype": ({"compute_dtype": torch.bfloat16}, {}, torch.bfloat16, True),
    "autocast": ({}, {}, torch.bfloat16, True),
}


@pytest.mark.parametrize("case", CASES)
def test_when_lora_goes_the_short_way_and_that_it_gives_the_same(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, fields, autocast, short = CASES[case]
    net = with_lora(linear(**options), **fields).train()
    calls = fused(monkeypatch)
    results = []
    for way in (low_rank.takes_low_rank, lambda base, x: False):
        monkeypatch.setattr(low_rank, "takes_low_rank", way)
        torch.manual_seed(0)
        x = activations(2, 4, 96)
        with torch.autocast("cpu", autocast, enabled=True) if autocast else nullcontext():
            y = net(x)
        y.float().square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in adapter_parameters(net))])
        net.zero_grad()
    assert any(calls) is short
    for one, two in zip(*results, strict=True):
        assert one.dtype == two.dtype
        near(one, two.double(), 1e-6 if autocast is None else 2 * ROUNDING[autocast])


def test_two_lora_on_one_projection_of_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    net = with_lora(linear())
    LoRA(targets="proj", rank=2, heads=None, label="second").apply(net)
    perturb(net, adapters_only=True, seed=2)
    calls = fused(monkeypatch)
    x = activations(2, 96)
    merged = sum(a.delta(net.proj.weight) for a in net.proj.adapters._modules.values())
    near(net(x), F.linear(x.double(), (net.proj.weight + merged).double(), net.proj.bias.double()), 1e-6)
    assert sorted(calls) == [False, True]


def test_lora_over_a_forward_of_another_library() -> None:
    plain, net = with_lora(linear()), One(linear())
    net.proj.forward = functools.partial(lambda module, x: F.linear(x, module.weight, module.bias), net.proj)
    LoRA(targets="proj", rank=3, alpha=7, heads=None, dtype="base").apply(net)
    perturb(net, adapters_only=True)
    x = activations(2, 96)
    near(net(x), plain(x).double(), 1e-6)


def test_lora_over_codes_in_a_backward_under_autocast() -> None:
    net, x = with_lora(linear()), activations(2, 96)
    net(x).sum().backward()
    expected, x.grad = x.grad.double(), None
    y = net(x).sum()
    with torch.autocast("cpu", torch.bfloat16):
        y.backward()
    near(x.grad, expected, 2 * ROUNDING[torch.bfloat16])


@pytest.mark.parametrize(("frozen", "count"), [("", 4), ("a", 3), ("b", 3), ("ab", 2)])
def test_lora_over_codes_keeps_what_its_gradients_need(frozen: str, count: int) -> None:
    net, x, kept = with_lora(linear()), activations(2, 96), []
    for name, p in net.named_parameters():
        p.requires_grad_(".adapters." in name and name[-1] not in frozen)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        net(x)
    assert len(kept) == count


def test_lora_over_codes_compiles_with_dynamic_shapes() -> None:
    net = zoo.build("llama").train()
    quantise(net)
    LoRA(targets="all-linear", rank=4).apply(net)
    call = torch.compile(net, backend="aot_eager", dynamic=True)
    for length in (5, 7):
        x = torch.randint(3, zoo.VOCAB, (2, length))
        near(call(input_ids=x).logits, net(input_ids=x).logits.double(), 1e-5)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_lora_over_codes_compiles_whole(backend: str) -> None:
    net = with_lora(linear())
    results = []
    for call in (net, torch.compile(net, fullgraph=True, backend=backend)):
        x = activations(3, 96)
        y = call(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in adapter_parameters(net))])
        net.zero_grad()
    for one, two in zip(*results, strict=True):
        near(one, two.double(), 1e-6)


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_a_frozen_input_needs_no_gradient(mode: str) -> None:
    layer = linear(mode=mode)
    layer.bias.requires_grad_(False)
    assert not layer(activations(2, 96).detach()).requires_grad
    layer.bias.requires_grad_(True)
    layer(activations(2, 96).detach()).sum().backward()
    close(layer.bias.grad, torch.full((40,), 2.0), 0)


@pytest.mark.parametrize("mode", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_autocast_computes_and_answers_in_its_dtype(mode: str, dtype: torch.dtype, given: torch.dtype) -> None:
    layer, x = linear(mode=mode), activations(2, 3, 96, dtype=given)
    with torch.autocast("cpu", dtype):
        inside = layer(x)
        with torch.autocast("cpu", enabled=False):
            outside = layer(x)
        again = layer(x)
    assert (inside.dtype, outside.dtype) == (dtype, given)
    assert torch.equal(inside, again)
    alone = layer(x.detach().to(dtype))
    assert torch.equal(inside, alone)
    assert torch.equal(outside, layer(x))
    inside.float().sum().backward()
    assert x.grad.dtype == given
    near(x.grad, torch.ones(2, 3, 40) @ layer.dequantised(dtype).float(), ROUNDING[torch.bfloat16])


def test_autocast_leaves_double_precision_alone() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert nn.Linear(96, 40).double()(activations(2, 96, dtype=torch.float64)).dtype == torch.float64
        assert linear()(activations(2, 96, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("compute", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", DTYPES)
def test_the_compute_dtype_is_that_of_the_product(compute: torch.dtype | None, given: torch.dtype) -> None:
    layer, x = linear(compute_dtype=compute), activations(2, 3, 96, dtype=given)
    y = layer(x)
    assert y.dtype == given
    dtype = compute or given
    expected = F.linear(x.detach().to(dtype), layer.dequantised(dtype), layer.bias.detach().to(dtype)).to(given)
    assert torch.equal(y, expected)
    y.float().sum().backward()
    assert (x.grad.dtype, layer.bias.grad.dtype) == (given, torch.float32)
    near(x.grad, torch.ones(2, 3, 40) @ layer.dequantised(torch.float32), 2 * ROUNDING[torch.bfloat16])


def test_rows_that_are_not_contiguous() -> None:
    layer = linear()
    x = activations(96, 5).detach().T
    near(layer(x), x @ layer.dequantised(torch.float32).T + layer.bias.detach(), 1e-6)
    view = nn.Linear(40, 96)
    with torch.no_grad():
        view.weight = nn.Parameter(torch.randn(40, 96).T)
        weight = view.weight.detach().contiguous()
    one, two = quantise_module(view, Quantisation()), nn.Linear(40, 96)
    two.weight = nn.Parameter(weight)
    assert torch.equal(one.codes, quantise_module(two, Quantisation()).codes)


@both_backends
@pytest.mark.parametrize(("width", "blocksize"), [(96, 64), (32, 64), (64, 128), (4304, 64), (160, 128)])
@pytest.mark.parametrize("mode", ["nf4", "fp4"])
def test_the_weight_that_comes_back_is_near_the_one_that_went_in(
    mode: str, width: int, blocksize: int, backend: str
) -> None:
    """The one test here that does not believe `dequantised`."""
    layer = nn.Linear(width, 40)
    with torch.no_grad():
        layer.weight.copy_(weights(40, width))
    made = quantise_module(layer, Quantisation(mode, blocksize, backend=backend))
    for dtype in DTYPES:
        near(made.dequantised(dtype), weights(40, width), 0.14)


@both_backends
@pytest.mark.parametrize("model", ["bert", "gpt2", "llama", "t5"])
def test_a_quantised_model_is_near_the_model(model: str, backend: str) -> None:
    net, plain = small(model, backend=backend), zoo.build(model)
    for name, layer in layers(net).items():
        weight = plain.get_submodule(name).weight
        near(layer.weight, weight, 0.12)


@needs_bitsandbytes
@pytest.mark.parametrize("mode", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(
    ("rows", "columns", "blocksize"), [(40, 192, 64), (11, 37, 64), (64, 64, 32), (8, 512, 128), (3, 4096, 2048)]
)
def test_backends_agree_to_the_bit(mode: str, double: bool, rows: int, columns: int, blocksize: int) -> None:
    made = []
    for backend in BACKENDS:
        layer = nn.Linear(columns, rows)
        with torch.no_grad():
            layer.weight.copy_(weights(rows, columns))
            layer.weight[0] = 0  # blocks of zeros
            layer.bias.zero_()
        made.append(quantise_module(layer, Quantisation(mode, blocksize, double, backend=backend)))
    one, two = made
    assert one.constants().keys() == two.constants().keys()
    assert torch.equal(one.packed, two.packed)
    for name, constant in one.constants().items():
        assert torch.equal(constant, two.constants()[name]), name
    for dtype in DTYPES:
        assert torch.equal(one.dequantised(dtype), two.dequantised(dtype))
        x = activations(3, columns, dtype=dtype)
        assert torch.equal(one(x), two(x))


@needs_bitsandbytes
def test_a_backend_can_go_and_the_layer_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = linear(128, backend="auto")
    expected = layer(activations(2, 128))
    monkeypatch.delitem(codes.KERNELS, "bitsandbytes")
    assert torch.equal(layer(activations(2, 128)), expected)
    with pytest.raises(QuantisationError, match="backend='bitsandbytes' is not there. Known: auto, torch"):
        codes.kernels("bitsandbytes")


# ------------------------------------------------------------------ moves and storage
CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "float": lambda m: m.float(),
    "there and back": lambda m: m.half().double().float(),
    "cpu": lambda m: m.cpu(),
    "device and dtype": lambda m: m.to("cpu", torch.float16),
    "type": lambda m: m.type(torch.bfloat16),
    "deepcopy": copy.deepcopy,
    "pickle": through_pickle,
    "apply": lambda m: m.apply(lambda child: None),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float16", "float32"])
def test_codes_survive_every_cast(storage: str, cast: str) -> None:
    dtype = getattr(torch, storage)
    for double, kind in itertools.product((True, False), ("bias", "ragged", "odd")):
        layer = LAYERS[kind](storage_dtype=dtype, double=double)
        plain = LAYERS[kind](double=double)
        weight, constants = plain.dequantised(torch.float32), {k: v.clone() for k, v in layer.constants().items()}
        assert torch.equal(layer.codes, plain.codes)
        layer = CASTS[cast](layer)
        assert isinstance(layer, Quantised)
        assert layer.packed.dtype == dtype
        assert torch.equal(layer.codes, plain.codes)
        assert torch.equal(layer.dequantised(torch.float32), weight)
        for name, constant in layer.constants().items():
            assert constant.dtype == constants[name].dtype
            assert torch.equal(constant, constants[name])
        assert not layer.packed.requires_grad
        state_dict = layer.state_dict()
        assert state_dict["weight"].dtype == dtype
        plain.load_state_dict(state_dict)
        assert torch.equal(plain.codes, layer.codes)


@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float32"])
def test_a_model_under_a_method_is_cast(storage: str) -> None:
    net = small("llama", storage_dtype=storage)
    LoRA(rank=2, targets="all-linear").apply(net)
    before = kept_bits(net)
    net.bfloat16()
    assert moved(before, kept_bits(net)) == set()
    assert {p.dtype for p in adapter_parameters(net)} == {torch.float32}
    assert output(net, "llama").dtype == torch.bfloat16
    assert set(state.saved(net)) == set(state.trainable(net))


def test_codes_are_shared_between_processes_when_asked() -> None:
    net = small("mlp")
    net.share_memory()
    assert all(t.is_shared() for t in (*net.parameters(), *net.buffers()))


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_a_layer_without_memory_says_the_shape(mode: str) -> None:
    layer = quantise_module(nn.Linear(64, 8, device="meta"), Quantisation(mode))
    assert layer(torch.empty(2, 64, device="meta")).shape == (2, 8)


# ------------------------------------------------------------------ eight bits
def llm_int8(x: Tensor, weight: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    """2208.07339, equations 5 to 8, dense and in double precision: x (t, i), weight (o, i) -> (t, o)."""
    x, weight = x.double(), weight.double()
    row = weight.abs().amax(1, keepdim=True).clamp_min(1e-300)
    integers = (weight * (127 / row)).round()
    apart = (x.abs() >= threshold).any(0) if threshold else torch.zeros(x.shape[1], dtype=torch.bool)
    regular = torch.where(apart, 0.0, x)
    token = regular.abs().amax(1, keepdim=True).clamp_min(1e-300)
    y = ((regular * (127 / token)).round() @ integers.T) * token * row.T / 127**2
    y += torch.where(apart, x, 0.0) @ (integers * row / 127).T
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("threshold", [0.0, 2.0, 6.0])
@pytest.mark.parametrize("kind", LAYERS)
@both_backends
def test_eight_bits_are_those_of_the_paper(kind: str, threshold: float, backend: str) -> None:
    layer = LAYERS[kind](mode="int8", threshold=threshold, backend=backend)
    d_out, d_in = layer.features
    original = weights(d_out, d_in)
    bias = None if layer.bias is None else layer.bias.detach()
    assert layer.codes.dtype == torch.int8
    near(layer.dequantised(torch.float32), original, 1e-2)
    for leading in [(), (5,), (2, 3)]:
        x = activations(*leading, d_in)
        with torch.no_grad():
            x[..., 1] *= 30  # one column of outliers
        y = layer(x)
        assert y.shape == (*leading, d_out)
        near(y, llm_int8(x.detach().reshape(-1, d_in), original, bias, threshold).view(*leading, d_out), 1e-5)
        g = activations(*leading, d_out, seed=5).detach()
        y.backward(g)
        near(x.grad, g @ layer.dequantised(torch.float32), 1e-6)
    assert layer(activations(0, d_in)).shape == (0, d_out)
    zeros = layer(torch.zeros(2, d_in))
    close(zeros, torch.zeros(2, d_out) if bias is None else bias.expand(2, -1), 0)


@needs_bitsandbytes
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_eight_bits_are_those_of_bitsandbytes(threshold: float) -> None:
    import bitsandbytes as bnb

    weight = weights(40, 96).half().float()  # bitsandbytes reads them in fp16
    theirs = bnb.nn.Linear8bitLt(96, 40, has_fp16_weights=False, threshold=threshold)
    theirs.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False)
    ours = nn.Linear(96, 40)
    with torch.no_grad():
        ours.weight.copy_(weight)
        ours.bias.copy_(theirs.bias)
    theirs, layer = theirs.to("cpu").eval(), quantise_module(ours, Quantisation("int8", threshold=threshold))
    x = activations(5, 96).detach().half()
    x[:, 3] *= 20
    with torch.no_grad():
        near(layer(x), theirs(x), 2e-3 if not threshold else 1e-2)  # theirs scales rows by a part of the outliers too
    assert torch.equal(layer.codes, theirs.state.CB)
    assert torch.equal(layer.constants()["absmax"], theirs.state.SCB)
    assert state_keys(layer) - {"samples"} == state_keys(theirs)


def state_keys(module: nn.Module) -> set[str]:
    return set(module.state_dict())


@needs_bitsandbytes
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("mode", ["nf4", "fp4"])
def test_four_bits_are_those_of_bitsandbytes(mode: str, double: bool) -> None:
    import bitsandbytes as bnb

    weight, bias = weights(40, 128), weights(1, 40, 1)[0]
    theirs = bnb.nn.Linear4bit(128, 40, compute_dtype=torch.float32, compress_statistics=double, quant_type=mode)
    theirs.weight = bnb.nn.Params4bit(
        weight.clone(), requires_grad=False, compress_statistics=double, quant_type=mode, module=theirs
    )
    theirs.bias = nn.Parameter(bias.clone())
    theirs = theirs.to("cpu")
    layer = linear(128, mode=mode, double=double)  # its CPU kernel is right for whole blocks a row only
    assert torch.equal(layer.codes, theirs.weight.data)
    one, two = layer.state_dict(), theirs.state_dict()
    assert set(one) - {"samples"} == set(two)
    for key in set(two) - {f"weight.quant_state.bitsandbytes__{mode}"}:
        assert one[key].dtype == two[key].dtype
        assert torch.equal(one[key], two[key]), key
    facts = [json.loads(bytes(d[f"weight.quant_state.bitsandbytes__{mode}"].tolist())) for d in (one, two)]
    assert facts[0] == facts[1]
    for x in (activations(3, 128), activations(2, 3, 128)):
        near(layer(x), theirs(x), 1e-6)
    with torch.no_grad():
        layer.packed.zero_()
    layer.load_state_dict(two)
    assert torch.equal(layer.codes, theirs.weight.data)


# ------------------------------------------------------------------ memory
class Watch:
    """Floating tensors of `size` elements or more that appeared: those that backward keeps, those that python sees."""

    def __init__(self, size: int) -> None:
        self.size, self.saved = size, 0

    def __enter__(self) -> Watch:
        gc.collect()
        gc.freeze()  # what is there now is not looked at
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def keep(self, tensor: Tensor) -> Tensor:
        self.saved += self.large(tensor)
        return tensor

    def large(self, tensor: Tensor) -> bool:
        return tensor.is_floating_point() and tensor.numel() >= self.size

    def alive(self) -> int:
        gc.collect()
        return sum(self.large(o) for o in gc.get_objects() if issubclass(type(o), Tensor))

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)


def test_the_watch_sees_what_is_kept() -> None:
    layer, x = linear(128, 256), activations(2, 128)
    with Watch(128 * 256) as watch:
        y = F.linear(x, layer.weight)
        assert watch.saved == 1
        weight = layer.weight
        assert watch.alive() >= 1
        del y, weight


@pytest.mark.parametrize("leading", [(2,), (2, 3)])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "q",
    [{"backend": "torch"}, {}, {"compute_dtype": torch.bfloat16}, {"mode": "int8"}, {"storage_dtype": torch.bfloat16}],
    ids=str,
)
def test_nothing_of_the_size_of_the_weight_is_kept_for_backward(
    q: dict[str, Any], autocast: bool, leading: tuple[int, ...]
) -> None:
    layer, x = linear(128, 256, **q), activations(*leading, 128)
    with Watch(128 * 256) as watch:
        with torch.autocast("cpu", enabled=autocast):
            y = layer(x)
        assert watch.saved == 0
        assert watch.alive() == 0
        y.float().sum().backward()
        assert watch.alive() == 0
    assert x.grad is not None


@pytest.mark.parametrize("model", ["llama", "gpt2", "encoder"])
def test_a_whole_model_keeps_no_weight_for_backward(model: str) -> None:
    net = small(model)
    LoRA(rank=2, targets="down").apply(net)
    net.train()
    smallest = min(math.prod(layer.features) for layer in layers(net).values())
    own = {p.data_ptr() for p in net.parameters()}
    kept: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.numel() >= smallest and tensor.data_ptr() not in own:
            kept.append(tuple(tensor.shape))
        return tensor

    call = zoo.inputs(model, batch=1, length=2)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        net(**call)
    assert kept == []


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ({}, 4 + 8 / 64 + 32 / (64 * 256)),
        ({"double_quant": False}, 4.5),
        ({"storage_dtype": "bfloat16"}, 4 + 8 / 64 + 32 / (64 * 256)),
        ({"mode": "fp4", "blocksize": 128}, 4 + 8 / 128 + 32 / (128 * 256)),
        ({"mode": "int8"}, 8 + 32 / 1024),
    ],
    ids=str,
)
def test_bits_per_parameter_are_those_of_the_tensors(options: dict[str, Any], bits: float) -> None:
    net = nn.Sequential(nn.Linear(1024, 4096, bias=False))
    report = quantise(net, targets="0", **options)
    measured = sum(8 * t.untyped_storage().nbytes() for t in (*net.parameters(), *net.buffers())) / (1024 * 4096)
    offset = 32 / (1024 * 4096)  # the mean of the scales, one number a weight
    assert measured == pytest.approx(bits, abs=2 * offset)
    assert report.bits_per_parameter == pytest.approx(measured, abs=1e-9)
    counts = footprint(net)
    assert counts["parameters"] == report.parameters == 1024 * 4096
    assert counts["codes"] + counts["constants"] == report.bytes_after == net[0].nbytes
    assert report.bytes_before == 4 * 1024 * 4096
    if not options:
        assert round(measured, 3) == 4.127
        assert "4.127 bits" in str(report)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_samples_of_a_weight_do_not_hold_on_to_it(dtype: torch.dtype) -> None:
    layer = linear(dtype=dtype)
    assert layer.samples.untyped_storage().nbytes() == layer.samples.nbytes


def test_a_float_weight_is_gone_before_the_next_is_quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    net = zoo.build("llama")
    LoRA(rank=2).apply(net)
    alive: list[int] = []
    seen: list[Any] = []
    inner = precision.quantise_module

    def watched(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        alive.append(sum(reference() is not None for reference in seen))
        seen.append(weakref.ref(module._parameters["weight"]))
        return inner(module, *args, **kwargs)

    monkeypatch.setattr(precision, "quantise_module", watched)
    quantise(net)
    assert len(alive) == 14
    assert set(alive) == {0}


def test_codes_are_gone_after_unload() -> None:
    net = small("llama")
    lora = LoRA(rank=2, targets="q")
    lora.apply(net)
    packed = weakref.ref(net.model.layers[0].self_attn.q_proj.packed)
    gc.freeze()
    lora.unload(net, into="float32")
    gc.collect()
    assert packed() is None


# ------------------------------------------------------------------ bitsandbytes' own layers
def foreign_model(model: str, kind: str = "nf4", double: bool = True) -> nn.Module:
    """With the layers that transformers' BitsAndBytesConfig puts in, on the CPU; whole blocks in every row."""
    import bitsandbytes as bnb

    net = zoo.build(model)
    names = [
        n
        for n, m in net.named_modules()
        if type(m) is nn.Linear and not n.endswith(("lm_head", "classifier", "out", "body.0"))
    ]
    for name in names:
        old, (parent, _, child) = net.get_submodule(name), name.rpartition(".")
        shape = (old.in_features, old.out_features, old.bias is not None)
        if kind == "int8":
            new: Any = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False, threshold=6.0)
            new.weight = bnb.nn.Int8Params(old.weight.detach().clone(), requires_grad=False)
        else:
            new = bnb.nn.Linear4bit(*shape, torch.float32, double, kind)
            options = {"blocksize": 32, "compress_statistics": double, "quant_type": kind, "module": new}
            new.weight = bnb.nn.Params4bit(old.weight.detach().clone(), **options)
        if old.bias is not None:
            new.bias = nn.Parameter(old.bias.detach().clone())
        setattr(net.get_submodule(parent), child, new.to("cpu"))
    return net.eval()


def foreign_bits(net: nn.Module) -> dict[str, Tensor]:
    out = {}
    for name, module in net.named_modules():
        if quantised.foreign(module):
            parameter: Any = module._parameters["weight"]
            out[name] = parameter.data.clone()
            quant_state = getattr(parameter, "quant_state", None)
            out[f"{name}.absmax"] = (
                quant_state.absmax
                if quant_state is not None
                else module.state.SCB
                if parameter.SCB is None
                else parameter.SCB
            ).clone()
    return out


@pytest.fixture(params=["emulated", "real"])
def repacking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU on which bitsandbytes repacks the weights of 4-bit layers in eval mode, or as if it were one."""
    functional = pytest.importorskip("bitsandbytes.functional")
    modules = importlib.import_module("bitsandbytes.nn.modules")
    if request.param == "real":
        if not functional.has_avx512bf16():
            pytest.skip("this CPU has no AVX512-BF16")
        return

    def repack(weight: Tensor, quant_state: Any) -> tuple[Tensor, Any]:
        quant_state.packing_format_for_cpu = True
        return weight, quant_state

    def unpack(weight: Tensor, quant_state: Any) -> tuple[Tensor, Any]:
        quant_state.packing_format_for_cpu = False
        return weight, quant_state

    @torch.no_grad()
    def without_gradient(a: Tensor, b: Tensor, out: Any = None, transposed: Any = None, state: Any = None) -> Tensor:
        state.packing_format_for_cpu = False
        weight = functional.dequantize_4bit(b.view(-1, 1), state)
        state.packing_format_for_cpu = True
        return F.linear(a, weight.to(a.dtype))

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(modules, "_convert_weight_packed_for_cpu", repack)
    monkeypatch.setattr(modules, "_convert_weight_packed_for_cpu_inverse", unpack)
    monkeypatch.setattr(functional, "_convert_weight_packed_for_cpu_inverse", unpack)
    monkeypatch.setattr(functional, "gemv_4bit", without_gradient)


def adapter_gradients(net: nn.Module, model: str, evaluate: bool) -> dict[str, Tensor]:
    perturb(net)
    if evaluate:
        net.eval()
        output(net, model)
    net.train()
    loss(net, model).backward()
    found = {n: p.grad.clone() for n, p in state.trainable(net).items()}
    net.zero_grad()
    return found


def equal_gradients(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    assert list(one) == list(two)
    return all(torch.allclose(one[n], two[n], atol=1e-6, rtol=1e-4) for n in one)


@needs_bitsandbytes
@pytest.mark.parametrize("mode", ["nf4", "fp4", "int8"])
def test_an_eval_forward_does_not_change_our_gradients(mode: str) -> None:
    for model in ("llama", "bert", "gpt2"):
        found = []
        for evaluate in (False, True):
            net = small(model, mode=mode)
            LoRA(rank=2, targets="q,down", heads=None).apply(net)
            before = kept_bits(net)
            found.append(adapter_gradients(net, model, evaluate))
            assert moved(before, kept_bits(net)) == set()
        assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


def test_the_bug_of_bitsandbytes_is_there(repacking: None) -> None:
    """What the tests below protect from: if this fails, bitsandbytes has mended it."""
    layer = foreign_model("llama").model.layers[0].mlp.up_proj
    assert layer.support_avx512bf16_for_cpu
    for evaluated in (False, True):
        x = activations(2, 32)
        if evaluated:
            layer.eval()(x.detach())
        assert layer.train()(x).requires_grad is not evaluated


@pytest.mark.parametrize("protect", ["plugin", "plugin first", "method alone"])
def test_layers_of_bitsandbytes_train_right_after_an_eval_forward(repacking: None, protect: str) -> None:
    found = []
    for evaluate in (False, True):
        net = foreign_model("llama")
        if protect == "plugin first":
            NF4Precision().prepare_base(net)
        LoRA(rank=2, targets="q,down", heads=None).apply(net)
        if protect == "plugin":
            NF4Precision().prepare_base(net)
        switches = [m.support_avx512bf16_for_cpu for m in net.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
        assert len(switches) == 14
        assert not any(switches)
        found.append(adapter_gradients(net, "llama", evaluate))
    assert equal_gradients(*found)


@pytest.mark.parametrize(
    "use",
    [
        NF4Precision().prepare_base,
        lambda net: LoRA(rank=2, targets="q,down").apply(net),
        lambda net: dequantise(net, "float32"),
    ],
    ids=["plugin", "method", "dequantise"],
)
def test_layers_of_bitsandbytes_that_were_evaluated_before(repacking: None, use: Callable[[nn.Module], Any]) -> None:
    """The score of the base is often measured first; its codes are then in an order of which no gradient comes."""
    net = foreign_model("llama")
    output(net, "llama")
    assert all(m.weight.quant_state.packing_format_for_cpu for m in net.modules() if quantised.foreign(m))
    before = snapshot(net)
    with pytest.raises((RuntimeError, ValueError), match="(?s)repacked.*Load the model again"):
        use(net)
    assert differences(before, snapshot(net)) == []


@needs_bitsandbytes
@pytest.mark.parametrize(("kind", "double"), [("nf4", True), ("nf4", False), ("fp4", True), ("int8", True)])
@pytest.mark.parametrize("model", ["llama", "bert"])
def test_layers_of_bitsandbytes_train_merge_and_unmerge(model: str, kind: str, double: bool) -> None:
    net = foreign_model(model, kind, double)
    base, bits = output(net, model), foreign_bits(net)
    classes = {n: type(m) for n, m in net.named_modules()}
    lora = LoRA(rank=2, targets="q,down", heads=None)
    lora.apply(net)
    assert torch.equal(output(net, model), base)
    gradients = train(net, model)
    assert set(gradients[0]) == set(state.trainable(net))
    expected = output(net, model)
    assert not torch.equal(expected, base)
    with pytest.raises(MergeError, match="Choose: merge"):
        lora.merge(net)
    for into in ("float32", "bfloat16", "requantise"):
        report = lora.merge(net, into=into)
        assert report.dtypes == ((kind,) if into == "requantise" else (into,))
        assert not any(quantised.foreign(m) for m in touched(net))
        if into != "bfloat16":
            out = output(net, model)
            near(out, expected, 1e-6 if into == "float32" and kind != "int8" else 0.2)
        lora.unmerge(net)
        assert moved(bits, foreign_bits(net)) == set()
        assert torch.equal(output(net, model), expected)
    twin = copy.deepcopy(net)
    assert torch.equal(output(twin, model), expected)
    lora.remove(net)
    assert {n: type(m) for n, m in net.named_modules()} == classes
    assert torch.equal(output(net, model), base)
    assert moved(bits, foreign_bits(net)) == set()


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gradients_through_layers_of_bitsandbytes(kind: str) -> None:
    net, twin = foreign_model("llama", kind), foreign_model("llama", kind)
    assert dequantise(twin, "float32") == 14
    assert not any(is_quantised(m) for m in twin.modules())
    found = []
    for one in (net, twin):
        LoRA(rank=2, targets="q,down").apply(one)
        found.append(adapter_gradients(one, "llama", False))
    for n, gradient in found[1].items():
        near(found[0][n], gradient, 1e-5 if kind == "nf4" else 2e-2)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_plugin_takes_layers_of_bitsandbytes_as_they_are(kind: str) -> None:
    net = foreign_model("bert", kind)
    bits = foreign_bits(net)
    NF4Precision().prepare_base(net)
    NF4Precision(mode="int8").prepare_base(net)
    assert layers(net) == {}
    assert moved(bits, foreign_bits(net)) == set()
    with pytest.raises(QuantisationError, match=r"are quantised already \((Linear4bit|Linear8bitLt)\)"):
        quantise(net)


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_model_that_transformers_quantised(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    import transformers as hf

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        wide = {**zoo.TEXT, "hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2}
        ours = hf.LlamaForCausalLM(hf.LlamaConfig(**wide)).eval()
    ours.save_pretrained(tmp_path)
    config = hf.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32"
    )
    net = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, device_map="cpu", dtype=torch.float32
    ).eval()
    quantise(ours)
    theirs = {n: m for n, m in net.named_modules() if quantised.foreign(m)}
    assert set(theirs) == set(layers(ours))
    assert all(torch.equal(m.weight.data, layers(ours)[n].codes) for n, m in theirs.items())
    LoRA(rank=2, targets="q,down").apply(net)
    save_adapter(net, tmp_path / "adapter")
    load_adapter(ours, tmp_path / "adapter")
    close(output(net, "llama"), output(ours, "llama"), 1e-5)


@needs_bitsandbytes
def test_float_weights_in_a_layer_of_bitsandbytes_are_no_codes() -> None:
    import bitsandbytes as bnb

    net = nn.Sequential(bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=True))
    assert not is_quantised(net[0])
    FullFineTuning().apply(net)


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("kind", "message"), [("4", "4-bit layer is not quantised yet"), ("8", "8-bit layer holds no scales yet")]
)
def test_layers_of_bitsandbytes_that_hold_no_codes_yet(kind: str, message: str) -> None:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(8, 8) if kind == "4" else bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=False)
    before = snapshot(layer)
    with pytest.raises(QuantisationError, match=f"{message}: move the model to its device first"):
        thaw(layer, torch.float32)
    assert differences(before, snapshot(layer)) == []


# ------------------------------------------------------------------ merging
@pytest.mark.parametrize("mode", ["nf4", "fp4"])
@pytest.mark.parametrize("model", ["llama", "bert", "gpt2"])
def test_merging_into_fp32_is_exact(model: str, mode: str) -> None:
    net = small(model, mode=mode)
    lora = LoRA(rank=2, targets="all-linear", heads=None)
    lora.apply(net)
    perturb(net)
    expected = output(net, model)
    report = lora.merge(net, into="float32")
    near(output(net, model), expected, 1e-6)
    assert report.places == len({id(p.place) for p in state.get_applied(net).placements})
    assert (report.rounding, report.dtypes) == (0.0, ("float32",))
    assert layers(net) == {}


@pytest.mark.parametrize("into", ["bfloat16", "float16"])
def test_merging_into_sixteen_bits(into: str) -> None:
    net = small("bert")
    lora = LoRA(rank=2, targets="all-linear", heads=None)
    lora.apply(net)
    perturb(net)
    expected = output(net, "bert")
    report = lora.merge(net, into=into)
    dtype = getattr(torch, into)
    assert report.dtypes == (into,)
    assert 0 < report.rounding < 5e-3
    net.to(dtype)
    near(output(net, "bert"), expected, 3e-2)
    assert {p.dtype for n, p in net.named_parameters() if ".adapters." not in n} == {dtype}


@pytest.mark.parametrize("mode", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_the_rounding_of_requantising_is_measured_and_logged(
    model: str, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    net = small(model, mode=mode)
    lora = LoRA(rank=2, targets="q,v,down")
    lora.apply(net)
    perturb(net)
    exact, settings = copy.deepcopy(net), {n: m.quantisation for n, m in layers(net).items()}
    lora.merge(exact, into="float32")
    with caplog.at_level(logging.INFO, "lightning_peft"):
        report = lora.merge(net, into="requantise")
    found = []
    for name in {p.site for p in state.get_applied(net).placements}:
        layer, plain = net.get_submodule(name), exact.get_submodule(name)
        assert isinstance(layer, Quantised)
        assert layer.quantisation == settings[name]
        weight = (plain.weight.T if model == "gpt2" else plain.weight).detach()
        x = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(0))
        found.append(float(((layer.dequantised(torch.float32) - weight) @ x).norm() / (weight @ x).norm()))
    assert report.rounding == pytest.approx(max(found), rel=1e-4)
    assert report.dtypes == (mode,)
    assert f"merged 'lora' into {mode}: output changed by at most {report.rounding:.2e}" in caplog.text
    near(output(net, model), output(exact, model), 2 * report.rounding)


def test_what_merge_is_asked_for_must_fit() -> None:
    net = small("llama")
    lora = LoRA(rank=2, targets="q")
    lora.apply(net)
    before = snapshot(net)
    with pytest.raises(
        MergeError, match=r"on 2 quantised projections.*Choose: .*bfloat16.*float32.*requantise.*attached"
    ):
        lora.merge(net)
    with pytest.raises(MergeError, match="into='int4' is unknown. Known: float32, bfloat16, float16, requantise"):
        lora.merge(net, into="int4")
    with pytest.raises(MergeError, match="into"):
        lora.unload(net)
    assert differences(before, snapshot(net)) == []
    plain = zoo.build("llama")
    lora.apply(plain)
    before = snapshot(plain)
    with pytest.raises(MergeError, match="into='float32' is for a quantised base, and this one is not. Leave it out"):
        lora.merge(plain, into="float32")
    assert differences(before, snapshot(plain)) == []


def two_slices() -> tuple[nn.Module, LoRA, LoRA]:
    net = small("gpt2")
    one, two = LoRA(rank=2, targets="q", label="one", seed=1), LoRA(rank=2, targets="v", label="two", seed=2)
    one.apply(net)
    two.apply(net)
    perturb(net)
    return net, one, two


@pytest.mark.parametrize("into", [("float32", None), ("requantise", "requantise"), ("requantise", "float32")])
@pytest.mark.parametrize("swap", [False, True])
def test_two_labels_on_slices_of_one_packed_projection(into: tuple[str, str | None], swap: bool) -> None:
    net, one, two = two_slices()
    first, second = (two, one) if swap else (one, two)
    expected, before = output(net, "gpt2"), snapshot(net)
    first.merge(net, into=into[0])
    between = output(net, "gpt2")
    second.merge(net, into=into[1])
    if into[0] == "float32":
        near(output(net, "gpt2"), expected, 1e-6)
    merged = snapshot(net)
    with pytest.raises(MergeError, match=f"merged into the same weights later; unmerge {second.label!r} first"):
        first.unmerge(net)
    assert differences(merged, snapshot(net)) == []
    second.unmerge(net)
    assert torch.equal(output(net, "gpt2"), between)
    first.unmerge(net)
    assert unordered(before, snapshot(net)) == []
    assert torch.equal(output(net, "gpt2"), expected)


def test_labels_on_other_projections_unmerge_in_any_order() -> None:
    net = small("llama")
    one, two = LoRA(rank=2, targets="q", label="one"), LoRA(rank=2, targets="v", label="two")
    one.apply(net)
    two.apply(net)
    perturb(net)
    expected, before = output(net, "llama"), snapshot(net)
    one.merge(net, into="float32")
    two.merge(net, into="requantise")
    one.unmerge(net)
    two.unmerge(net)
    assert unordered(before, snapshot(net)) == []
    assert torch.equal(output(net, "llama"), expected)


def test_quantised_and_plain_projections_in_one_merge() -> None:
    net = small("llama", skip="k")
    lora = LoRA(rank=2, targets="q,k,lm_head")
    lora.apply(net)
    perturb(net)
    expected, before = output(net, "llama"), snapshot(net)
    report = lora.merge(net, into="requantise")
    assert report.dtypes == ("float32", "nf4")
    lora.unmerge(net)
    assert unordered(before, snapshot(net)) == []
    lora.merge(net, into="float32")
    near(output(net, "llama"), expected, 1e-6)
    lora.remove(net)
    assert torch.equal(output(net, "llama"), output(small("llama", skip="k"), "llama"))


@pytest.mark.parametrize("into", ["float32", "bfloat16", "requantise"])
@pytest.mark.parametrize("model", ["llama", "gpt2", "bert"])
def test_a_merge_that_fails_halfway_leaves_everything_as_it_was(model: str, into: str) -> None:
    net = small(model)
    lora = LoRA(rank=2, targets="q,v,down")
    lora.apply(net)
    perturb(net)
    expected, before = output(net, model), snapshot(net)
    last = state.get_applied(net).placements[-1].adapter
    vars(last)["fold"] = lambda weight, bias: (weight * math.nan, bias)
    with pytest.raises(MergeError, match="not finite; nothing was merged"):
        lora.merge(net, into=into)
    with pytest.raises(MergeError, match="not finite; nothing was merged"):
        lora.unload(net, into=into)
    del vars(last)["fold"]
    assert unordered(before, snapshot(net)) == []
    assert torch.equal(output(net, model), expected)
    assert state.active(net) == ["lora"]
    lora.merge(net, into=into)


def test_a_requantisation_that_fails_halfway_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    net = small("llama")
    lora = LoRA(rank=2, targets="q,v")
    lora.apply(net)
    perturb(net)
    before, calls = snapshot(net), itertools.count()
    inner = merge.quantise_module

    def breaks(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 3:
            raise QuantisationError("out of luck")
        return inner(*args, **kwargs)

    monkeypatch.setattr(merge, "quantise_module", breaks)
    with pytest.raises(QuantisationError, match="out of luck"):
        lora.merge(net, into="requantise")
    assert unordered(before, snapshot(net)) == []


@pytest.mark.parametrize("into", ["float32", "requantise"])
def test_unload_is_for_good(into: str) -> None:
    net = small("llama")
    one, two = LoRA(rank=2, targets="q", label="one"), LoRA(rank=2, targets="q", label="two", seed=3)
    one.apply(net)
    two.apply(net)
    perturb(net)
    one.merge(net, into="requantise")
    expected = output(net, "llama")
    two.unload(net, into=into)
    near(output(net, "llama"), expected, 1e-6 if into == "float32" else 0.5)
    with pytest.raises(MergeError, match="'two' was unloaded into the weights that 'one' is merged into"):
        one.unmerge(net)
    one.unload(net)
    assert state.applied_to(net) == {}
    assert len(layers(net)) == (12 if into == "float32" else 14)
    dequantise(net, "float32")
    quantise(net, targets="q")


def test_a_merged_model_is_copied_with_its_codes() -> None:
    net = small("bert")
    lora = LoRA(rank=2, targets="q,down", heads=None)
    lora.apply(net)
    perturb(net)
    expected, bits = output(net, "bert"), kept_bits(net)
    lora.merge(net, into="float32")
    twin = copy.deepcopy(net)
    lora.unmerge(twin)
    assert moved(bits, kept_bits(twin)) == set()
    assert torch.equal(output(twin, "bert"), expected)
    assert state.active(net) == []
    lora.unmerge(net)
    assert torch.equal(output(net, "bert"), expected)


@pytest.mark.parametrize("duplicate", [through_pickle, through_torch_save])
def test_a_merged_model_can_be_pickled(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    net = small("llama")
    lora = LoRA(rank=2, targets="q")
    lora.apply(net)
    perturb(net)
    expected = output(net, "llama")
    lora.merge(net, into="float32")
    twin = duplicate(net)
    lora.unmerge(twin)
    assert torch.equal(output(twin, "llama"), expected)


@pytest.mark.parametrize(
    ("model", "move"),
    [("llama", lambda m: m.to("meta")), ("bert", lambda m: m.bfloat16()), ("gpt2", lambda m: m.half())],
    ids=["device", "bfloat16", "float16"],
)
def test_what_is_put_aside_follows_the_model(model: str, move: Callable[[nn.Module], nn.Module]) -> None:
    """Merge, model.cuda(), unmerge: codes on the GPU."""
    net, moved_net = small(model), small(model)
    lora = LoRA(rank=2, targets="q", heads=None)
    for one in (net, moved_net):
        lora.apply(one)
    move(net)
    lora.merge(moved_net, into="float32")
    move(moved_net)
    lora.unmerge(moved_net)
    expected = {n: (t.device, t.dtype) for n, t in tensors(net).items()}
    assert {n: (t.device, t.dtype) for n, t in tensors(moved_net).items()} == expected


def test_requantising_keeps_the_dtype_that_the_weight_came_in() -> None:
    net = zoo.build("encoder").bfloat16()
    quantise(net)
    lora = LoRA(rank=2, targets="up", heads=None)
    lora.apply(net)
    perturb(net)
    expected = output(net, "encoder")
    lora.unload(net, into="requantise")
    assert {p.dtype for p in net.parameters() if p.is_floating_point()} == {torch.bfloat16}
    assert {layer.source_dtype for layer in layers(net).values()} == {torch.bfloat16}
    near(output(net, "encoder"), expected, 0.3)  # torch.nn's fused path reads the weight in this dtype


def test_merging_draws_no_random_number() -> None:
    net = zoo.build("llama")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    quantise(net)
    lora = LoRA(rank=2)
    lora.apply(net)
    lora.merge(net, into="requantise")
    lora.unload(net)
    dequantise(net)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("change", ["merge", "dequantise"])
def test_a_bias_that_another_method_trains_stays_that_parameter(change: str) -> None:
    net = small("bert")
    BitFit(heads=None).apply(net)
    lora = LoRA(rank=2, targets="q", heads=None)
    lora.apply(net)
    layer = net.bert.encoder.layer[0].attention.self.query
    bias = layer.bias
    if change == "merge":
        lora.merge(net, into="float32")
    else:
        dequantise(net, "float32")
    assert layer.bias is bias


@pytest.mark.parametrize("in_codes", [False, True])
def test_a_bias_that_was_trained_while_another_method_was_merged_is_kept(in_codes: bool) -> None:
    net = small("bert") if in_codes else zoo.build("bert")
    BitFit(heads=None).apply(net)
    lora = LoRA(rank=2, targets="q", heads=None)
    lora.apply(net)
    lora.merge(net, into="float32" if in_codes else None)
    train(net, "bert", steps=1)
    layer = net.bert.encoder.layer[0].attention.self.query
    trained = layer.bias.detach().clone()
    lora.unmerge(net)
    assert torch.equal(layer.bias, trained)


@pytest.mark.parametrize("quantise_first", [False, True])
@pytest.mark.parametrize("way", ["unload", "dequantise"])
def test_what_is_left_trains_as_the_base_did(way: str, quantise_first: bool) -> None:
    net, lora = zoo.build("llama"), LoRA(rank=2, targets="all-linear")
    before = flags(net)
    if quantise_first:
        quantise(net)
    lora.apply(net)
    if not quantise_first:
        quantise(net)
    if way == "unload":
        lora.unload(net, into="float32")
    else:
        dequantise(net, "float32")
        lora.remove(net)
    assert flags(net) == before


# ------------------------------------------------------------------ torch.nn's fused path
@pytest.mark.parametrize(
    ("compute", "base"),
    [
        (None, "float32"),
        ("float32", "float32"),
        (None, "bfloat16"),
        ("bfloat16", "bfloat16"),
        ("bfloat16", "float32"),
        ("float32", "bfloat16"),
    ],
)
def test_the_fused_path_of_an_encoder_computes_the_same(compute: str | None, base: str) -> None:
    net = zoo.build("encoder").to(getattr(torch, base))
    quantise(net, compute_dtype=compute)
    assert len(layers(net)) == 4
    net.train()
    expected = output(net, "encoder")
    net.eval()
    near(output(net, "encoder"), expected, 1e-5 if base == "float32" and compute != "bfloat16" else 3e-2)


def test_the_output_projection_of_multihead_attention_stays_plain() -> None:
    """It is read without a call of the module, so codes would have to be unpacked into what backward keeps."""
    net = zoo.build("encoder")
    for targets in ("all-linear", "attention,ffn", ["*.out_proj", "up"]):
        twin = copy.deepcopy(net)
        report = quantise(twin, targets=targets)
        assert not any("self_attn" in name for name in layers(twin))
        assert "with a forward of their own" in report.left
    lora = LoRA(rank=2, targets="q,v,o,up", heads=None)
    lora.apply(twin)
    perturb(twin)
    expected = output(twin, "encoder")
    lora.merge(twin, into="float32")
    close(output(twin, "encoder"), expected, 1e-5)


# ------------------------------------------------------------------ state dicts
def test_loading_floats_into_codes() -> None:
    for model in ("llama", "gpt2"):
        net = other_base(model)
        quantise(net)
        net.load_state_dict(zoo.build(model).state_dict())
        assert moved(kept_bits(small(model)), kept_bits(net)) == set()
        assert fingerprint(net) == fingerprint(zoo.build(model))


def fingerprint(net: nn.Module) -> str:
    twin = copy.deepcopy(net)
    LoRA(rank=2).apply(twin)
    return state.get_applied(twin).fingerprint


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_loading_codes_makes_it_the_other_base(mode: str, tmp_path: Path) -> None:
    first, second = small("llama", mode=mode), other_base("llama")
    quantise(second, mode=mode)
    adapted = copy.deepcopy(first)
    LoRA(rank=2).apply(adapted)
    save_adapter(adapted, tmp_path / "of-first")
    net = copy.deepcopy(first)
    net.load_state_dict(second.state_dict())
    assert torch.equal(output(net, "llama"), output(second, "llama"))
    assert state.same_base(fingerprint(net), fingerprint(second))
    with pytest.raises(AdapterFileError, match="another base"):
        load_adapter(net, tmp_path / "of-first")


def test_a_round_trip_of_eight_bits_keeps_the_dtype() -> None:
    net = small("encoder", mode="int8")
    before = {n: (m.source_dtype, m.weight.dtype) for n, m in layers(net).items()}
    net.load_state_dict(net.state_dict())
    assert {n: (m.source_dtype, m.weight.dtype) for n, m in layers(net).items()} == before
    output(net, "encoder")


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_loading_is_strict_about_keys(mode: str, assign: bool) -> None:
    net = small("llama", mode=mode)
    whole = net.state_dict()
    before = tensors(net)
    name = "model.layers.0.self_attn.q_proj"
    lacking = {k: v for k, v in whole.items() if k != f"{name}.weight"}
    with pytest.raises(RuntimeError, match=f'Missing key.*"{name}.weight"'):
        net.load_state_dict(lacking, assign=assign)
    with pytest.raises(RuntimeError, match="Unexpected key.*nonsense"):
        net.load_state_dict({**whole, f"{name}.nonsense": torch.ones(1)}, assign=assign)
    net.load_state_dict(lacking, strict=False, assign=assign)
    assert moved(before, tensors(net)) == set()
    net.load_state_dict(whole, assign=assign)
    assert moved(before, tensors(net)) == set()


@pytest.mark.xfail(
    strict=True,
    reason="core/quantised.weight has no `absmax`: torch.distributed walks the key 'weight.absmax' by getattr "
    "(bitsandbytes' parameter has properties for it)",
)
@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_the_state_dict_of_distributed_checkpoints(mode: str) -> None:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    net, fresh = small("llama", mode=mode), other_base("llama")
    quantise(fresh, mode=mode)
    found = get_model_state_dict(net)
    assert set(found) == set(net.state_dict())
    set_model_state_dict(fresh, found)
    assert moved(tensors(net), tensors(fresh)) == set()


def test_a_model_that_was_emptied_is_filled_again() -> None:
    for mode in ("nf4", "int8"):
        net = small("mlp", mode=mode)
        whole, expected = net.state_dict(), output(net, "mlp")
        whole = {key: tensor.clone() for key, tensor in whole.items()}
        for device in ("cpu", "meta"):
            net.to_empty(device=device)
        net.to_empty(device="cpu")
        net.load_state_dict(whole)
        assert torch.equal(output(net, "mlp"), expected)


BAD_FILES: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "shape": (lambda d: {"weight": torch.randn(3, 3)}, r"\(3, 3\) torch.float32 is neither the floating weight \(40, 96\)"),
    "transposed": (lambda d: {"weight": torch.randn(96, 40)}, r"Use a file of this model"),
    "no scales": (lambda d: {"weight": d["weight"]}, r"neither the floating weight.*nor codes with their scales"),
    "NaN": (lambda d: {"weight": torch.full((40, 96), math.nan)}, "NaN or infinity"),
    "damaged": (lambda d: {**d, STATE: torch.tensor([1, 2, 3], dtype=torch.uint8)}, "is damaged.*Export the base again"),
    "lacks absmax": (lambda d: {k: v for k, v in d.items() if k != "weight.absmax"}, "is damaged"),
    "other dtype": (lambda d: {**d, STATE: facts(d, dtype="float99")}, "is damaged"),
    "blocksize": (lambda d: linear(blocksize=128).state_dict(), "blocks of 128 with double.*64, with"),
    "not double": (lambda d: linear(double=False).state_dict(), "without double quantisation.*with"),
    "mode": (lambda d: linear(mode="fp4").state_dict() | {"bias": d["bias"]}, "holds fp4.*this layer is nf4"),
    "eight bits": (lambda d: linear(mode="int8").state_dict(), "holds int8.*settings of the file"),
    "other shape": (lambda d: linear(40, 96).state_dict() | {"bias": d["bias"]}, r"of \(96, 40\).*\(40, 96\)"),
}  # fmt: skip
STATE = "weight.quant_state.bitsandbytes__nf4"


def facts(found: dict[str, Tensor], **changes: Any) -> Tensor:
    text = json.dumps({**json.loads(bytes(found[STATE].tolist())), **changes})
    return torch.frombuffer(bytearray(text, "utf-8"), dtype=torch.uint8)


@pytest.mark.parametrize("case", BAD_FILES)
def test_files_that_do_not_fit_leave_the_layer_alone(case: str) -> None:
    layer = linear()
    change, message = BAD_FILES[case]
    found = {"bias": layer.bias.detach(), **change(layer.state_dict())}
    before = snapshot(layer)
    with pytest.raises(RuntimeError, match=f"(?s)weight: .*{message}"):
        layer.load_state_dict(found, strict=False)
    with pytest.raises(QuantisationError, match=message):
        load_weight(layer, {k: v for k, v in found.items() if k != "bias"})
    assert unordered(before, snapshot(layer)) == []


def test_adopting_what_does_not_fit() -> None:
    found = {k: v for k, v in linear().state_dict().items() if k != "bias"}
    for module, entries, message in (
        (nn.LayerNorm(96), found, "LayerNorm is no projection that these entries could be put into"),
        (nn.Linear(96, 40), {"weight": torch.randn(40, 96)}, "Linear is no projection"),
        (linear(), found, "QuantisedLinear is no projection"),
        (nn.Linear(40, 96), found, r"the file holds a weight of \(40, 96\), the module has \(96, 40\)"),
    ):
        before = snapshot(module)
        with pytest.raises(QuantisationError, match=message):
            adopt_file(module, entries, Quantisation())
        assert differences(before, snapshot(module)) == []
    module = nn.Linear(96, 40, device="meta")
    layer = adopt_file(module, found, Quantisation(storage_dtype=torch.bfloat16, compute_dtype=torch.float32))
    assert torch.equal(layer.codes, linear().codes)
    assert (layer.packed.dtype, layer.source_dtype) == (torch.bfloat16, torch.float32)


def test_a_weight_that_is_assigned_is_used_or_refused() -> None:
    layer, weight = linear(), nn.Parameter(weights(40, 96, 7))
    x = activations(2, 96)
    try:
        layer.weight = weight
    except (TypeError, ValueError, AttributeError):
        return
    near(layer(x), F.linear(x, weight, layer.bias), 0.2)


# ------------------------------------------------------------------ errors: settings and packages
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "nf5"}, "mode='nf5' is unknown. Known: nf4, fp4, int8"),
        ({"mode": "int5"}, "mode='int5' is unknown"),
        ({"blocksize": 63}, "blocksize=63 is unknown. Known: 16, 32, 64"),
        ({"blocksize": "64"}, "blocksize='64' is unknown"),
        (
            {"compute_dtype": "float64"},
            "compute_dtype='float64' is unsupported. Known: bfloat16, float16, float32, None",
        ),
        ({"compute_dtype": torch.bfloat16}, "compute_dtype=torch.bfloat16 is unsupported"),
        ({"storage_dtype": "int8"}, "storage_dtype='int8' is unsupported. Known: uint8, bfloat16, float16, float32"),
        ({"storage_dtype": None}, "storage_dtype=None is unsupported"),
        ({"threshold": -1.0, "mode": "int8"}, "threshold=-1.0: expected 0"),
        ({"mode": "int8", "storage_dtype": "bfloat16"}, "storage_dtype is for 4-bit codes.*Leave it out"),
        ({"backend": "cuda"}, "backend='cuda' is unknown. Known: auto, torch, bitsandbytes"),
    ],
    ids=str,
)
def test_settings_that_do_not_exist(options: dict[str, Any], message: str) -> None:
    net = zoo.build("llama")
    before = snapshot(net)
    for call in (quantisation, NF4Precision, lambda **o: quantise(net, **o)):
        with pytest.raises(QuantisationError, match=message):
            call(**options)
    assert differences(before, snapshot(net)) == []


def test_a_threshold_that_is_no_number() -> None:
    with pytest.raises(QuantisationError, match="threshold"):
        quantisation("int8", threshold=math.nan)


def test_settings_and_options_exclude_each_other() -> None:
    with pytest.raises((QuantisationError, TypeError)):
        quantise(zoo.build("llama"), Quantisation("nf4"), mode="int8")


@pytest.mark.parametrize("settings", [{"mode": "nf3"}, {"storage_dtype": torch.int64}, {"compute_dtype": torch.int8}])
def test_settings_made_by_hand_are_checked_too(settings: dict[str, Any]) -> None:
    net = zoo.build("llama")
    with pytest.raises(QuantisationError):
        quantise(net, Quantisation(**settings))


def test_other_settings_of_the_plugin() -> None:
    with pytest.raises(
        QuantisationError, match="rest_dtype='int8' is unsupported. Known: bfloat16, float16, float32, None"
    ):
        NF4Precision(rest_dtype="int8")
    with pytest.raises(TypeError, match="foo"):
        quantise(zoo.build("llama"), foo=3)


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Let `import bitsandbytes` give this, or raise it."""
    inner = importlib.import_module

    def install(found: Any) -> None:
        def imported(name: str, package: str | None = None) -> Any:
            if name != "bitsandbytes":
                return inner(name, package)
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(importlib, "import_module", imported)
        monkeypatch.setattr(codes, "KERNELS", {"torch": codes.TorchKernels()})
        monkeypatch.setattr(kernels, "KERNELS", codes.KERNELS)

    return install


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (ImportError("no"), "backend='bitsandbytes' needs the package bitsandbytes, which is not installed. Run: pip"),
        (SimpleNamespace(__version__="0.42.0"), r"needs bitsandbytes 0\.\d+ or later; 0.42.0 is installed. Run: pip"),
        (SimpleNamespace(__version__="0.9"), r"or later; 0.9 is installed"),
    ],
    ids=["missing", "old", "very old"],
)
def test_bitsandbytes_missing_or_too_old(without: Callable[[Any], None], found: Any, message: str) -> None:
    without(found)
    net = zoo.build("llama")
    before = snapshot(net)
    for call in (quantisation, NF4Precision, lambda **o: quantise(net, **o)):
        with pytest.raises(ImportError, match=message):
            call(backend="bitsandbytes")
    assert differences(before, snapshot(net)) == []
    kernels.register()
    assert list(codes.KERNELS) == ["torch"]
    quantise(net)
    assert moved(kept_bits(small("llama", backend="torch")), kept_bits(net)) == set()
    small("llama", mode="int8")


def test_a_recent_bitsandbytes_is_taken(without: Callable[[Any], None]) -> None:
    for version in ("0.50.2", "0.51.0.dev0", "1.0", "0.123.4+cpu"):
        without(SimpleNamespace(__version__=version))
        kernels.register()
        assert list(codes.KERNELS) == ["torch", "bitsandbytes"]


@pytest.mark.parametrize("error", [RuntimeError("CUDA setup failed"), OSError("libcudart.so not found")], ids=str)
def test_a_broken_bitsandbytes_does_not_break_the_import(without: Callable[[Any], None], error: Exception) -> None:
    without(error)
    kernels.register()
    assert list(codes.KERNELS) == ["torch"]


# ------------------------------------------------------------------ errors: models
class WithTrainer(pl.LightningModule):
    """As it is while a Trainer fits it."""

    def __init__(self, optimizers: list[Any]) -> None:
        super().__init__()
        self.net = zoo.build("llama")
        vars(self)["_trainer"] = SimpleNamespace(optimizers=optimizers)


def with_gradients() -> nn.Module:
    net = zoo.build("llama")
    loss(net, "llama").backward()
    return net


def with_head_gradients() -> nn.Module:
    net = zoo.build("bert")
    LoRA(rank=2).apply(net)
    loss(net, "bert").backward()
    for p in adapter_parameters(net):
        p.grad = None
    return net


def merged() -> nn.Module:
    net = zoo.build("llama")
    lora = LoRA(rank=2)
    lora.apply(net)
    lora.merge(net)
    return net


@torch.no_grad()
def spoilt(value: float) -> nn.Module:
    net = zoo.build("llama")
    net.model.layers[1].mlp.up_proj.weight[3, 4] = value
    return net


def of_dtype(dtype: torch.dtype) -> nn.Module:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    net[1].weight = nn.Parameter(torch.zeros(8, 8).to(dtype), requires_grad=False)
    return net


Model = Callable[[], nn.Module]
BAD_MODELS: dict[str, tuple[Model, dict[str, Any], str]] = {
    "twice": (lambda: small("llama"), {}, r"14 projections of this LlamaForCausalLM are quantised already \(nf4\).*load the base anew, or `dequantise` it first"),
    "twice, otherwise": (lambda: small("llama", mode="int8"), {"mode": "nf4"}, r"quantised already \(int8\)"),
    "gradients": (with_gradients, {}, "An optimizer is at work.*Quantise before the optimizer is built.*plugins="),
    "gradients of a head": (with_head_gradients, {}, "An optimizer is at work"),
    "optimizer": (lambda: WithTrainer([object()]), {}, "An optimizer is at work"),
    "merged": (merged, {}, "'lora' is merged into this model. Unmerge it first, or unload it for good"),
    "NaN": (lambda: spoilt(math.nan), {}, "'model.layers.1.mlp.up_proj' holds NaN or infinity.*skip='model.layers.1.mlp.up_proj'"),
    "infinity": (lambda: spoilt(-math.inf), {"mode": "int8"}, "holds NaN or infinity"),
    "meta": (lambda: zoo.build("llama").to("meta"), {}, r"'model.layers.0.self_attn.q_proj' is on the meta device: it was never loaded. Use load_quantised\(model, path\)"),
    "complex": (lambda: of_dtype(torch.complex64), {"targets": "*"}, "'1' is torch.complex64; expected one of bfloat16, float16, float32, float64"),
    "integers": (lambda: of_dtype(torch.int8), {"targets": "*"}, "'1' is torch.int8; expected one of bfloat16"),
    "no linear": (lambda: nn.Sequential(nn.ReLU()), {}, "Nothing to quantise in this Sequential: .*all-linear"),
    "convolutions": (lambda: nn.Sequential(nn.Conv1d(3, 3, 1)), {"targets": "0"}, "leave no Linear or Conv1D of this Sequential to quantise .*with a forward of their own: 0.*Choose others, or leave the plugin out"),
    "no parameters": (lambda: nn.Sequential(), {}, "Nothing to quantise"),
    "targets": (lambda: zoo.build("llama"), {"targets": "*.nope"}, r"No module matches '\*.nope'.*Roles known for this model: q"),
    "skip": (lambda: zoo.build("llama"), {"skip": ["*.nope"]}, r"No module matches '\*.nope'.*Roles known for this model: q"),
    "all skipped": (lambda: zoo.build("llama"), {"skip": "all-linear"}, "skip='all-linear' leave no Linear.*skipped: model.layers.0"),
    "tied": (lambda: zoo.build("gpt2"), {"targets": "lm_head"}, "tied to another module: lm_head"),
    "norm": (lambda: zoo.build("llama"), {"targets": "norm"}, "leave no Linear"),
    "embeddings": (lambda: zoo.build("llama"), {"targets": "embed"}, "leave no Linear.*with a forward of their own"),
    "all train": (lambda: LNTuning(targets="q", heads=None).apply(zoo.build("llama")), {"targets": "q"}, "that train"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_MODELS)
def test_models_that_cannot_be_quantised_are_left_alone(case: str) -> None:
    build, options, message = BAD_MODELS[case]
    net = build()
    before = picture(net)
    with pytest.raises(QuantisationError, match=f"(?s){message}"):
        quantise(net, **options)
    assert differences(before, picture(net)) == []


def picture(net: nn.Module) -> dict[str, Any]:
    """`snapshot`, which needs memory to look at."""
    if any(p.is_meta for p in net.parameters()):
        return {n: (type(m), list(vars(m)), [*map(id, m._parameters.values())]) for n, m in net.named_modules()}
    return snapshot(net)


def test_a_skip_that_matches_nothing_is_called_a_skip() -> None:
    with pytest.raises(QuantisationError, match=r"skip=\['\*.nope'\]"):
        quantise(zoo.build("llama"), skip=["*.nope"])


def test_weights_in_eight_bit_floats_are_refused_in_words() -> None:
    with pytest.raises(QuantisationError, match="float8"):
        quantise(of_dtype(torch.float8_e4m3fn), targets="*")


def test_an_optimizer_that_has_not_stepped_yet_is_known_too() -> None:
    net, other = zoo.build("llama"), zoo.build("llama")
    before = snapshot(net)
    optimizer: Any = torch.optim.SGD(net.parameters(), 0.1)
    with pytest.raises(QuantisationError, match="An optimizer is at work"):
        quantise(net)
    assert differences(before, snapshot(net)) == []
    quantise(other)  # which it does not hold
    del optimizer
    quantise(net)


def test_an_optimizer_of_the_adapters_is_none_of_the_base() -> None:
    net = zoo.build("llama")
    LoRA(rank=2).apply(net)
    optimizer = torch.optim.SGD(state.trainable(net).values(), 0.1)
    quantise(net)
    loss(net, "llama").backward()
    optimizer.step()


def test_quantising_again_after_dequantising() -> None:
    net = small("llama")
    weight = net.model.layers[0].self_attn.q_proj.dequantised(torch.float32)
    assert dequantise(net, "float32") == 14
    assert torch.equal(net.model.layers[0].self_attn.q_proj.weight, weight)
    assert type(net.model.layers[0].self_attn.q_proj) is nn.Linear
    assert state_keys(net) == state_keys(zoo.build("llama"))
    assert not any(isinstance(b, Tensor) for n, b in net.named_buffers() if n.rpartition(".")[2] in CONSTANTS)
    quantise(net, mode="fp4")


def test_dequantising_what_is_not_quantised() -> None:
    net = zoo.build("llama")
    with pytest.raises(QuantisationError, match="This LlamaForCausalLM has no quantised projection"):
        dequantise(net)
    net = small("llama")
    lora = LoRA(rank=2, targets="q")
    lora.apply(net)
    lora.merge(net, into="float32")
    before = snapshot(net)
    with pytest.raises(QuantisationError, match="'lora' is merged into this model"):
        dequantise(net)
    assert differences(before, snapshot(net)) == []


@pytest.mark.parametrize("dtype", ["float23", "int8", torch.int8, "nn"])
def test_dequantising_into_something_else(dtype: Any) -> None:
    with pytest.raises(QuantisationError, match="Known"):
        dequantise(small("mlp"), dtype)


def test_dequantised_under_a_method_it_goes_on() -> None:
    net = small("bert")
    LoRA(rank=2, targets="q,down").apply(net)
    perturb(net)
    expected = output(net, "bert")
    assert dequantise(net, "float32") == 12
    close(output(net, "bert"), expected, 1e-6)
    train(net, "bert", steps=1)


@pytest.mark.parametrize("when", ["never", "after", "before"])
def test_dequantised_weights_train_as_before(when: str) -> None:
    net = zoo.build("llama")
    net.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before, lora = flags(net), LoRA(rank=2)
    if when == "before":
        lora.apply(net)
    quantise(net)
    if when == "after":
        lora.apply(net)
    if when != "never":
        lora.remove(net)
    dequantise(net, "float32")
    assert flags(net) == before


def test_modules_that_cannot_be_quantised() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    weird = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    for module in (nn.LayerNorm(8), nn.Embedding(8, 8), Own(8, 8), linear(), nn.Bilinear(2, 2, 2), weird):
        before = snapshot(module)
        assert not can_quantise(module)
        with pytest.raises(QuantisationError, match="cannot be quantised: .*Leave it out with skip="):
            quantise_module(module, Quantisation())
        assert differences(before, snapshot(module)) == []


def test_nan_in_one_module_leaves_it_alone() -> None:
    layer = nn.Linear(8, 8)
    with torch.no_grad():
        layer.weight[0, 0] = math.nan
    before = snapshot(layer)
    for mode in ("nf4", "fp4", "int8"):
        with pytest.raises(QuantisationError, match="NaN or infinity"):
            quantise_module(layer, Quantisation(mode))
        assert differences(before, snapshot(layer)) == []


def test_a_failure_in_the_middle_leaves_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    net = zoo.build("llama")
    LoRA(rank=2, targets="down").apply(net)
    last = state.get_applied(net).placements[-1].adapter
    monkeypatch.setattr(type(last), "compensate", lambda self, weight, rounded: weight * math.nan)
    before = snapshot(net)
    with pytest.raises(QuantisationError, match="NaN"):
        quantise(net)
    assert differences(before, snapshot(net)) == []


# ------------------------------------------------------------------ the plugin's own errors
def test_the_plugin_twice() -> None:
    net = zoo.build("llama")
    plugin = NF4Precision(compute_dtype="float32")
    plugin.prepare_base(net)
    before = tensors(net)
    plugin.prepare_base(net)
    assert plugin.convert_module(net) is net
    assert moved(before, tensors(net)) == set()
    NF4Precision(compute_dtype="bfloat16").prepare_base(net)
    assert {layer.quantisation.compute_dtype for layer in layers(net).values()} == {torch.bfloat16}
    for other in ({"blocksize": 128}, {"mode": "fp4"}, {"double_quant": False}, {"mode": "int8"}):
        with pytest.raises(
            QuantisationError, match="is quantised already, as .*this plugin says .*Use the same settings"
        ):
            NF4Precision(**other).prepare_base(net)
    assert moved(before, tensors(net)) == set()


def test_the_plugin_refuses_a_checkpoint_on_other_bits() -> None:
    saved = NF4Precision(compute_dtype="float32").state_dict()
    NF4Precision(compute_dtype="float32", storage_dtype="bfloat16").load_state_dict(saved)
    with pytest.raises(QuantisationError, match="quantised otherwise.*blocksize: 64 there, 128 here.*load_checkpoint"):
        NF4Precision(blocksize=128).load_state_dict(saved)
    with pytest.raises(QuantisationError, match="mode: 'nf4' there, 'int8' here"):
        NF4Precision(mode="int8").load_state_dict(saved)


def test_quantising_that_changes_what_trains_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    net = zoo.build("bert")
    lora = LoRA(rank=2, heads=None)
    lora.apply(net)
    monkeypatch.setattr(precision, "_quantise", lambda module, *args, **kwargs: lora.remove(module))
    with pytest.raises(QuantisationError, match="an error in lightning_peft. Please report it"):
        NF4Precision().prepare_base(net)


# ------------------------------------------------------------------ what is left alone
class Mixture(nn.Module):
    """Two experts, and three usual names of what chooses between them."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.router, self.gate = nn.Linear(width, 2), nn.Linear(width, 2, bias=False)
        self.shared_expert_gate = nn.Linear(width, 1)
        self.experts = nn.ModuleList(zoo.Mlp(width, inner) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        chosen = (self.router(x) + self.gate(x)).softmax(-1) * self.shared_expert_gate(x).sigmoid()
        return sum(chosen[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


def mixture() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        net = zoo.VisionTransformer()
        for block in net.blocks:
            block.mlp = Mixture(zoo.HIDDEN, zoo.INNER)
    return net


def test_routers_are_left_alone() -> None:
    net = mixture()
    report = quantise(net)
    names = [f"blocks.{i}.mlp.{name}" for i in range(2) for name in ("router", "gate", "shared_expert_gate")]
    assert sorted(report.left["routers"]) == sorted(names)
    assert "6 routers" in str(report)
    assert sorted(layers(net)) == sorted(
        f"blocks.{i}.{name}"
        for i in range(2)
        for name in ("attn.qkv", "attn.proj", *(f"mlp.experts.{e}.fc{k}" for e in range(2) for k in (1, 2)))
    )
    assert net(torch.randn(2, 3, 16, 16)).shape == (2, zoo.CLASSES)


def test_a_router_that_is_named_is_quantised() -> None:
    net = mixture()
    quantise(net, targets=["*.router"])
    assert list(layers(net)) == ["blocks.0.mlp.router", "blocks.1.mlp.router"]


def test_a_gated_feed_forward_layer_is_no_router() -> None:
    assert {n.rpartition(".")[2] for n in layers(small("llama"))} >= {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("model", [*(m for m in zoo.ZOO if m not in ("mlp", "mixer")), "mixer"])
def test_heads_embeddings_and_norms_are_left_alone(model: str) -> None:
    net = zoo.build(model)
    heads = {name for name, m in net.named_modules() if name.rpartition(".")[2] in HEADS}
    quantise(net)
    chosen = set(layers(net))
    assert chosen
    assert not chosen & heads
    assert not any(word in name.rpartition(".")[2] for name in chosen for word in ("embed", "norm", "wte", "wpe"))
    plain = zoo.build(model)
    for name, p in plain.named_parameters():
        if name.rpartition(".")[0] not in chosen:
            assert torch.equal(dict(net.named_parameters())[name], p)
    if model != "clip":
        near(output(net, model), output(plain, model), 0.8)


HEADS = {
    "lm_head",
    "classifier",
    "score",
    "head",
    "qa_outputs",
    "embed_out",
    "pre_classifier",
    "decoder_head",
    "generator",
}


@pytest.mark.parametrize("model", ["gpt2", "t5", "bert_mlm", "opt"])
def test_tied_weights_are_left_alone_even_if_named(model: str) -> None:
    net = zoo.build(model)
    tied = [
        n for n, m in net.named_modules()
        if isinstance(m, nn.Linear) and any(m.weight is e.weight for e in net.modules() if isinstance(e, nn.Embedding))
    ]  # fmt: skip
    assert tied
    report = quantise(net, targets=["all-linear", *tied])
    assert report.left["tied to another module"] == tied
    assert not set(tied) & set(layers(net))


def test_a_head_that_is_not_tied_can_be_named() -> None:
    net = zoo.build("llama")
    quantise(net, targets="all-linear,lm_head")
    assert isinstance(net.lm_head, Quantised)
    LoRA(rank=2, targets="q,lm_head").apply(net)
    train(net, "llama", steps=1)


def test_a_module_with_two_names_is_quantised_once() -> None:
    net = zoo.build("albert")
    report = quantise(net)
    assert report.layers == len(layers(net)) == len({id(m) for m in layers(net).values()})
    twice = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    twice.append(twice[0])
    assert quantise(twice, targets="*").layers == 1
    assert twice[0] is twice[2]


def test_what_trains_is_left_alone() -> None:
    net = zoo.build("mlp")
    LoRA(rank=2, targets="mlp", heads="lora").apply(net)
    report = quantise(net, targets="mlp,lora,body.2")
    assert report.left == {"that train": ["lora"]}
    assert list(layers(net)) == ["body.2", "mlp"]
    assert type(net.lora) is nn.Linear
    assert net.lora.weight.requires_grad
    for name, module in net.named_modules():
        assert not (".adapters." in name and is_quantised(module))


SKIPS: dict[str, tuple[str | list[str], Callable[[str], bool]]] = {
    "role": ("down", lambda n: n.endswith("down_proj")),
    "roles": ("q,v", lambda n: n.endswith(("q_proj", "v_proj"))),
    "group": ("attention", lambda n: ".self_attn." in n),
    "glob": ("*.self_attn.o_proj", lambda n: n.endswith("o_proj")),
    "regex": (r"re:.*layers\.0\..*_proj", lambda n: ".layers.0." in n),
    "parent": ("model.layers.1", lambda n: ".layers.1." in n),
    "list": (["norm", "*.gate_proj"], lambda n: n.endswith("gate_proj")),
    "optional": ("router?,down", lambda n: n.endswith("down_proj")),
    "name": ("model.layers.0.self_attn.q_proj", lambda n: n == "model.layers.0.self_attn.q_proj"),
}


@pytest.mark.parametrize("case", SKIPS)
def test_skip_speaks_the_language_of_targets(case: str) -> None:
    skip, expected = SKIPS[case]
    everything = set(layers(small("llama")))
    for call in (lambda n: quantise(n, skip=skip), NF4Precision(skip=skip).prepare_base):
        net = zoo.build("llama")
        call(net)
        assert set(layers(net)) == {n for n in everything if not expected(n)}
        assert output(net, "llama").isfinite().all()


# ------------------------------------------------------------------ traps
def test_a_quantised_projection_is_no_frozen_network() -> None:
    net = zoo.build("mlp")
    quantise(net, targets="mlp,lora")
    LoRA(rank=2, targets="mlp,lora", heads=None).apply(net)
    assert {p.site for p in state.get_applied(net).placements} == {"mlp", "lora"}


def test_hooks_and_attributes_stay() -> None:
    net, calls = zoo.build("llama"), []
    layer = net.model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda m, args, out: calls.append("after"))
    layer.register_forward_pre_hook(lambda m, args: calls.append("before"))
    layer.note = "mine"
    quantise(net)
    output(net, "llama")
    assert calls == ["before", "after"]
    assert layer.note == "mine"
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (zoo.HIDDEN, zoo.INNER)
    assert "in_features=32, out_features=64, bias=False, nf4, block 64, double" in repr(layer)
    assert "nf=96, nx=32, nf4" in repr(small("gpt2").transformer.h[0].attn.c_attn)


def test_quantising_in_inference_mode_and_then_training() -> None:
    net = zoo.build("llama")
    with torch.inference_mode():
        quantise(net)
        output(net, "llama")
    LoRA(rank=2, targets="q,down").apply(net)
    train(net, "llama", steps=1)


def test_the_default_device_and_dtype_do_not_matter() -> None:
    expected = kept_bits(small("gpt2"))
    for change in (torch.device("meta"), default_dtype(torch.float64), default_dtype(torch.bfloat16)):
        net = zoo.build("gpt2")
        with change:
            quantise(net)
            saved = net.state_dict()
        assert moved(expected, kept_bits(net)) == set()
        assert not any(t.is_meta for t in saved.values())


def test_loading_under_another_default_device() -> None:
    net = small("gpt2")
    saved, before = net.state_dict(), kept_bits(net)
    with torch.device("meta"):
        net.load_state_dict(saved)
    assert moved(before, kept_bits(net)) == set()


class default_dtype:  # noqa: N801
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self.before)


@pytest.mark.parametrize(
    "model",
    [
        "bert",
        "llama",
        "gpt2",
        pytest.param(
            "t5",
            marks=pytest.mark.xfail(
                strict=True, reason="transformers asks T5's `wo.weight` for its dtype: the property unpacks it all"
            ),
        ),
    ],
)
def test_a_forward_unpacks_each_weight_once(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = small(model, backend="torch")
    inner, calls = codes.KERNELS["torch"].dequantise, itertools.count()

    def counted(*args: Any) -> Tensor:
        next(calls)
        return inner(*args)

    monkeypatch.setattr(codes.TorchKernels, "dequantise", staticmethod(counted))
    output(net, model)
    assert next(calls) == len(layers(net))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("model", ["bert", "llama"])
def test_gradient_checkpointing_over_codes(model: str, reentrant: bool) -> None:
    found = []
    for checkpointed in (False, True):
        net = small(model)
        LoRA(rank=2, targets="q,down").apply(net)
        if checkpointed:
            net.gradient_checkpointing_enable({"use_reentrant": reentrant})
            net.enable_input_require_grads()
        found.append(adapter_gradients(net, model, False))
    for n in found[0]:
        close(found[1][n], found[0][n], 1e-6)


def test_functional_call_runs() -> None:
    net = small("mlp")
    LoRA(rank=2, targets="mlp", heads=None).apply(net)
    x = torch.randn(2, 8)
    named = dict(net.named_parameters())
    changed = {n: p + 1 if n in state.trainable(net) else p for n, p in named.items()}
    assert torch.equal(torch.func.functional_call(net, named, (x,)), net(x))
    assert not torch.equal(torch.func.functional_call(net, changed, (x,)), net(x))


def test_functional_gradients() -> None:
    layer = linear()
    x = activations(2, 96).detach()
    found = torch.func.grad(lambda z: layer(z).pow(2).sum())(x)
    weight = layer.dequantised(torch.float32)
    near(found, 2 * (x @ weight.T + layer.bias.detach()) @ weight, 1e-5)


def test_an_optimizer_over_all_parameters_moves_no_code() -> None:
    for storage in ("uint8", "bfloat16"):
        net = small("llama", storage_dtype=storage)
        LoRA(rank=2).apply(net)
        before = kept_bits(net)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.5)
        for _ in range(2):
            optimizer.zero_grad()
            loss(net, "llama").backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
        assert moved(before, kept_bits(net)) == set()


@pytest.mark.parametrize(
    "ema",
    [
        False,
        pytest.param(
            True,
            marks=pytest.mark.xfail(
                strict=True,
                reason="codes are parameters: torch's exponential averages (and Lightning's EMAWeightAveraging) compute "
                "0.9 x + 0.1 x of bytes and cut, so the averaged model holds other codes",
            ),
        ),
    ],
)
def test_averaged_weights_keep_the_codes(ema: bool) -> None:
    net = small("llama")
    LoRA(rank=2).apply(net)
    averages = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9) if ema else None
    averaged = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=averages)
    for _ in range(2):
        averaged.update_parameters(net)
    assert moved(kept_bits(net), kept_bits(averaged.module)) == set()


def test_an_adapter_says_what_to_quantise_in_place_of_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hook that initialisers of the quantisation error use."""
    net, plain = zoo.build("gpt2"), small("gpt2")
    LoRA(rank=2, targets="down").apply(net)
    seen = []

    def compensate(self: Adapter, weight: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
        seen.append(weight.shape)
        back = rounded(weight)
        assert back.shape == weight.shape
        assert not torch.equal(back, weight)
        return weight - 0.5 * back

    monkeypatch.setattr(type(state.get_applied(net).placements[0].adapter), "compensate", compensate)
    quantise(net)
    assert seen == [(zoo.HIDDEN, 4 * zoo.HIDDEN)] * 2
    changed = moved(kept_bits(plain), kept_bits(net))
    assert {n.rpartition(".")[0] for n in changed} == {f"transformer.h.{i}.mlp.c_proj" for i in range(2)}


# ------------------------------------------------------------------ counts
@pytest.mark.parametrize(("mode", "storage"), [("nf4", "uint8"), ("nf4", "bfloat16"), ("int8", "uint8")])
@pytest.mark.parametrize("model", ["bert", "gpt2", "encoder"])
def test_counts_are_those_of_the_unquantised_model(model: str, storage: str, mode: str) -> None:
    plain = zoo.build(model)
    sizes = state.describe(plain)
    LoRA(rank=2, targets="q,down").apply(plain)
    options = {"mode": mode, "storage_dtype": storage}
    for quantise_first in (True, False):
        net = small(model, **options) if quantise_first else zoo.build(model)
        if quantise_first:
            assert state.describe(net) == sizes
        LoRA(rank=2, targets="q,down").apply(net)
        if not quantise_first:
            reduced(net, model, **options)
        assert state.describe(net) == state.describe(plain)
        assert state.table(net) == state.table(plain)
        assert state.describe(net.bfloat16())["total"] == state.describe(plain)["total"]


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_counts_of_layers_of_bitsandbytes(kind: str) -> None:
    net, plain = foreign_model("llama", kind), zoo.build("llama")
    for one in (net, plain):
        LoRA(rank=2, targets="q,down").apply(one)
    assert state.describe(net) == state.describe(plain)


def test_the_report_says_what_was_done() -> None:
    net = zoo.build("llama")
    report = quantise(net, skip="down")
    assert report.layers == len(layers(net)) == 12
    assert report.parameters == sum(math.prod(layer.features) for layer in layers(net).values())
    assert report.bytes_before == 4 * report.parameters
    assert report.bytes_after == sum(layer.nbytes for layer in layers(net).values())
    assert report.left == {"skipped": [f"model.layers.{i}.mlp.down_proj" for i in range(2)]}
    assert str(report).startswith("nf4: 12 projections, ")
    assert "left as they are: heads, embeddings, norms, 2 skipped" in str(report)


# ------------------------------------------------------------------ compilation
def check_compiled(model: str, compiler: str, **options: Any) -> None:
    torch._dynamo.reset()
    net = small(model, **options)
    LoRA(rank=2, targets="mlp" if model == "mlp" else "all-linear", heads=None).apply(net)
    perturb(net)
    twin = copy.deepcopy(net)
    fast = torch.compile(net, fullgraph=True, backend=compiler)
    close(output(fast, model), output(twin, model), 1e-5)
    one, two = adapter_loss(fast, net, model), adapter_loss(twin, twin, model)
    for n, gradient in two.items():
        close(one[n], gradient, 1e-5)


def adapter_loss(call: nn.Module, net: nn.Module, model: str) -> dict[str, Tensor]:
    call.train()
    loss(call, model).backward()
    return {n: p.grad for n, p in state.trainable(net).items()}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"backend": "torch"}, marks=pytest.mark.slow),
        pytest.param({"backend": "bitsandbytes"}, marks=needs_bitsandbytes),
        pytest.param({"compute_dtype": "bfloat16"}, marks=pytest.mark.slow),
        pytest.param({"mode": "int8", "threshold": 0.0}, marks=pytest.mark.slow),
        pytest.param({"mode": "int8"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_quantised_model_compiles_without_a_graph_break(options: dict[str, Any]) -> None:
    check_compiled("mlp", "eager", **options)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llama", "gpt2", "bert"])
def test_larger_quantised_models_compile_without_a_graph_break(model: str) -> None:
    check_compiled(model, "aot_eager")


has_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
by_inductor = pytest.mark.parametrize(
    "backend",
    [
        "torch",
        pytest.param("bitsandbytes", marks=needs_bitsandbytes),
    ],
)


@pytest.mark.slow
@has_compiler
@pytest.mark.filterwarnings("ignore")
@by_inductor
def test_the_default_compiler_computes_the_same(backend: str) -> None:
    check_compiled("mlp", "inductor", backend=backend)


@pytest.mark.slow
@has_compiler
@pytest.mark.filterwarnings("ignore")
@by_inductor
def test_the_default_compiler_computes_the_same_layer(backend: str) -> None:
    for mode, double in itertools.product(("nf4", "fp4"), (True, False)):
        torch._dynamo.reset()
        layer = linear(mode=mode, double=double, backend=backend)
        x = activations(2, 96)
        with torch.no_grad():
            near(torch.compile(layer, fullgraph=True)(x), layer(x), 1e-6)


# ------------------------------------------------------------------ other storage under the contract
@pytest.mark.parametrize("options", [{"storage_dtype": "bfloat16"}, {"mode": "int8"}, {"double_quant": False}], ids=str)
@pytest.mark.parametrize(
    ("name", "model"), [("lora", "gpt2"), ("bitfit", "bert"), ("prefix_tuning", "t5"), ("ia3", "llama")]
)
def test_the_contract_in_other_settings(name: str, model: str, options: dict[str, Any], tmp_path: Path) -> None:
    net, base = small(model, **options), small(model, **options)
    method = make(name, model)
    before = snapshot(net)
    method.apply(net)
    after = zoo.build(model)
    make(name, model).apply(after)
    reduced(after, model, **options)
    assert moved(tensors(net), tensors(after)) == set()
    bits = kept_bits(net)
    chosen = set(state.trainable(net))
    start = tensors(net)
    train(net, model, steps=2)
    assert moved(bits, kept_bits(net)) == set()
    assert moved(start, tensors(net)) == chosen
    assert set(state.saved(net)) == set(state.saved(after))
    save_adapter(net, tmp_path / "a")
    load_adapter(base, tmp_path / "a")
    assert torch.equal(output(base, model), output(net, model))
    assert torch.equal(output(copy.deepcopy(net), model), output(net, model))
    method.remove(net)
    assert differences(before, snapshot(net)) == []


def test_the_standard_input_reaches_floats() -> None:
    """The harness reads the dtype of the first parameter; with codes there the tests would feed them bytes."""
    for model in MODELS:
        assert dtype_of(small(model)).is_floating_point, model


def test_every_setting_has_a_way_to_be_written_down() -> None:
    for options in ({}, {"mode": "int8"}, {"storage_dtype": "bfloat16", "compute_dtype": "float16"}):
        described = quantisation(**options).describe()
        assert json.loads(json.dumps(described)) == described


@pytest.fixture(autouse=True)
def _calm_bitsandbytes(request: pytest.FixtureRequest) -> Iterator[None]:
    """It logs a line for each layer that it casts for, and compiles some of its fallbacks."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with nullcontext() if "compil" in request.node.name else torch.compiler.set_stance("force_eager"):
        yield
    logger.setLevel(level)


@pytest.fixture(autouse=True, scope="module")
def _small_heap() -> Iterator[None]:
    """What is there before is not looked through for optimizers again and again."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
