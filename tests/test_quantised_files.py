"""Quantised bases in files: bit-equal there and back, float files straight into codes, other libraries' files, damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boring
import lightning.pytorch as pl
import pytest
import torch
import transformers as hf
import zoo
from harness import output, train
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from lightning_peft import BitFit, LoRA, load_checkpoint, quantised_files
from lightning_peft.core import state
from lightning_peft.core.codes import STATE_KEY
from lightning_peft.core.quant import QuantisationError
from lightning_peft.core.quantised import Quantised, is_quantised
from lightning_peft.precision import NF4Precision, quantise
from lightning_peft.quantised_files import BaseFileError, empty_weights, load_quantised, save_quantised

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
SLOW = pytest.mark.slow
INDEX = "model.safetensors.index.json"


MODES: list[dict[str, Any]] = [
    {},
    {"mode": "fp4", "blocksize": 128},
    {"double_quant": False},
    {"mode": "int8"},
    {"storage_dtype": "bfloat16"},
    {"storage_dtype": "float32"},
]


def empty(kind: str) -> nn.Module:
    with empty_weights():
        return zoo.build(kind)


def quantised(kind: str, **options: Any) -> nn.Module:
    net = zoo.build(kind)
    quantise(net, **options)
    return net


@torch.no_grad()
def scrambled(net: nn.Module) -> nn.Module:
    """The same model with other weights."""
    generator = torch.Generator().manual_seed(8)
    for p in net.parameters():
        p.normal_(generator=generator)
    return net


def layers(net: nn.Module) -> dict[str, Quantised]:
    return {name: m for name, m in net.named_modules() if isinstance(m, Quantised)}


def parts(net: nn.Module) -> dict[str, Tensor]:
    """All parameters, all buffers (persistent or not), and the codes."""
    found: dict[str, Tensor] = {}
    for name, module in net.named_modules(remove_duplicate=False):
        own = {**module._parameters, **module._buffers}
        if isinstance(module, Quantised):
            own["weight"] = module.codes
        found |= {f"{name}.{key}": t.detach() for key, t in own.items() if t is not None}
    return found


def differences(one: nn.Module, other: nn.Module) -> list[str]:
    """Names whose bits, shapes or dtypes differ."""
    a, b = parts(one), parts(other)
    return sorted(a.keys() ^ b.keys()) + [n for n in a.keys() & b.keys() if not same_bits(a[n], b[n])]


def same_bits(a: Tensor, b: Tensor) -> bool:
    raw = [t.contiguous().flatten().view(torch.uint8) for t in (a, b)]  # codes that are declared as floats may be NaN
    return (a.dtype, a.shape, a.is_meta) == (b.dtype, b.shape, b.is_meta) and (a.is_meta or torch.equal(*raw))


def files(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory."""
    return {name: t for path in sorted(directory.glob("*.safetensors")) for name, t in load_file(path).items()}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(5)


# ------------------------------------------------------------------ there and back
KINDS = ("bert", "gpt2", "llama", "t5", "vit", "bert_mlm", "mixer")
QUICK = {
    ("bert", 0),
    ("bert", 2),
    ("gpt2", 0),
    ("gpt2", 3),
    ("llama", 1),
    ("llama", 5),
    ("t5", 0),
    ("bert_mlm", 4),
    ("vit", 0),
}


@pytest.mark.parametrize(
    ("kind", "options"),
    [pytest.param(k, m, marks=() if (k, i) in QUICK else SLOW) for k in KINDS for i, m in enumerate(MODES)],
    ids=str,
)
def test_there_and_back_bit_for_bit(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    net = quantised(kind, **options)
    want = output(net, kind)
    save_quantised(net, tmp_path / "base")
    again = {"storage_dtype": options["storage_dtype"]} if "storage_dtype" in options else {}
    for target in (empty(kind), scrambled(zoo.build(kind)), quantised(kind, **options)):
        for layer in layers(target).values():
            layer.packed.zero_()
        assert load_quantised(target, tmp_path / "base", **again) is target
        assert differences(net, target) == []
        assert {layer.source_dtype for layer in layers(target).values()} == {torch.float32}
        assert torch.equal(output(target.eval(), kind), want)


def test_attention_of_torch_works_with_codes_that_were_read(tmp_path: Path) -> None:
    for mode in ("nf4", "int8"):
        net = quantised("encoder", mode=mode)
        save_quantised(net, tmp_path / mode)
        target = load_quantised(empty("encoder"), tmp_path / mode).eval()
        assert differences(net, target) == []
        assert torch.equal(output(target, "encoder"), output(net, "encoder"))


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_every_layer_is_whole_in_the_file(kind: str, tmp_path: Path) -> None:
    """Entries that are made for the file must not be mistaken for ones that were written already."""
    for attempt in range(4):
        net = quantised(kind)
        found = files(save_quantised(net, tmp_path / str(attempt)))
        keys = ["", ".absmax", ".nested_absmax", ".quant_map", ".nested_quant_map", ".quant_state.bitsandbytes__nf4"]
        wanted = {f"{name}.weight{key}" for name in layers(net) for key in keys}
        assert wanted - set(found) == set()


@pytest.mark.parametrize(("kind", "size"), [("bert", 4000), ("gpt2", 4000), ("llama", 1)])
def test_shards_with_an_index(kind: str, size: int, tmp_path: Path) -> None:
    net = quantised(kind)
    directory = save_quantised(net, tmp_path / "base", shard_bytes=size)
    index = json.loads((directory / INDEX).read_text())
    names = {path.name for path in directory.glob("*.safetensors")}
    assert names == set(index["weight_map"].values())
    assert len(names) > 5
    found = files(directory)
    assert found.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    largest = max(t.nbytes for t in found.values())
    assert all(sum(t.nbytes for t in load_file(directory / n).values()) <= max(size, largest) for n in names)
    for path in (directory, directory / INDEX):
        assert differences(net, load_quantised(empty(kind), path)) == []


def test_a_file_can_be_named(tmp_path: Path) -> None:
    net = quantised("bert")
    file = save_quantised(net, tmp_path / "base") / "model.safetensors"
    assert differences(net, load_quantised(empty("bert"), file)) == []
    assert differences(net, load_quantised(empty("bert"), str(tmp_path / "base"))) == []


class Wrapped(nn.Module):
    """Another name in front of every other."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


class Task(pl.LightningModule):
    """Two names in front."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.model = Wrapped(net)


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("wrap", [Wrapped, Task])
def test_a_prefix_more_or_less(kind: str, wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    bare, inside = quantised(kind), wrap(quantised(kind))
    save_quantised(bare, tmp_path / "bare")
    save_quantised(inside, tmp_path / "inside")
    for target in (wrap(empty(kind)), wrap(scrambled(zoo.build(kind)))):
        assert differences(inside, load_quantised(target, tmp_path / "bare")) == []
        assert all(layer.samples is not None for layer in layers(target).values())
    target = load_quantised(empty(kind), tmp_path / "inside")
    assert differences(bare, target) == []
    assert all(layer.samples is not None for layer in layers(target).values())


def test_which_base_it_was_is_still_known(tmp_path: Path) -> None:
    save_quantised(quantised("bert"), tmp_path / "base")
    save_quantised(quantised_other(), tmp_path / "other")
    module = boring.Boring()
    trainer = boring.trainer(tmp_path, [LoRA(rank=2)])
    trainer.fit(module, boring.data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    for name, known in (("base", True), ("other", False)):
        fresh = boring.Boring()
        load_quantised(fresh.net, tmp_path / name)
        if known:
            load_checkpoint(fresh, tmp_path / "a.ckpt")
        else:
            with pytest.raises(RuntimeError, match="another base"):
                load_checkpoint(fresh, tmp_path / "a.ckpt")


def quantised_other() -> nn.Module:
    """Twice the weight: other scales, the same codes."""
    net = zoo.build("bert")
    with torch.no_grad():
        net.bert.encoder.layer[0].attention.self.query.weight.mul_(2)
    quantise(net)
    return net


def test_how_it_computes_is_chosen_when_it_is_read(tmp_path: Path) -> None:
    save_quantised(quantised("bert", compute_dtype="float32"), tmp_path / "base")
    target = load_quantised(empty("bert"), tmp_path / "base", compute_dtype="bfloat16", backend="torch")
    for layer in layers(target).values():
        q = layer.quantisation
        assert (q.mode, q.blocksize, q.compute_dtype, q.backend) == ("nf4", 64, torch.bfloat16, "torch")


def test_a_model_that_was_read_trains_and_is_written_again(tmp_path: Path) -> None:
    save_quantised(quantised("llama"), tmp_path / "base")
    net = load_quantised(empty("llama"), tmp_path / "base")
    LoRA(rank=2, targets="all-linear").apply(net)
    before = parts(net)
    gradients = train(net, "llama", steps=2)
    assert len(gradients[0]) == 28
    moved = {n for n, t in parts(net).items() if not same_bits(t, before[n]) and ".adapters." not in n}
    assert moved == set()
    save_quantised(net, tmp_path / "base")  # over the file that it was read from
    assert differences(quantised("llama"), load_quantised(empty("llama"), tmp_path / "base")) == []
    assert not any("adapters" in name or "lora" in name for name in files(tmp_path / "base"))


def test_a_task_that_reads_codes_in_configure_model_trains(tmp_path: Path) -> None:
    class Read(boring.Boring):
        def configure_model(self) -> None:
            if not hasattr(self, "net"):
                self.net = load_quantised(empty("bert"), tmp_path / "base", compute_dtype="float32").train()

    save_quantised(quantised("bert"), tmp_path / "base")
    ends = []
    for kind, where in ((Read, "nowhere"), (boring.Boring, "configure_model")):
        torch.manual_seed(3)
        module = kind(where, dropout=0.0)
        callbacks: list[Any] = [LoRA(rank=2, targets="all-linear")]
        trainer = boring.trainer(tmp_path, callbacks, plugins=[NF4Precision(compute_dtype="float32")])
        trainer.fit(module, boring.data(shuffle=False))
        ends.append(boring.tensors(module))
    assert boring.largest_difference(*ends) == 0


# ------------------------------------------------------------------ float files straight into codes
def pretrained(kind: str, directory: Path, dtype: torch.dtype, shard: str) -> nn.Module:
    """Written by transformers, as it comes from the hub; -> what from_pretrained makes of it."""
    net = (tied_llama() if kind == "tied_llama" else zoo.build(kind)).to(dtype)
    net.save_pretrained(directory, max_shard_size=shard)
    return type(net).from_pretrained(directory, dtype=dtype)


def tied_llama() -> nn.Module:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(**{**zoo.TEXT, "num_key_value_heads": 2, "tie_word_embeddings": True})
    ).eval()


def unfilled(kind: str) -> nn.Module:
    with empty_weights():
        return tied_llama() if kind == "tied_llama" else zoo.build(kind)


FLOATS = [
    (kind, dtype, shard)
    for kind in ("bert", "gpt2", "llama", "tied_llama", "t5")
    for dtype in (torch.float32, torch.bfloat16)
    for shard in ("1GB", "8KB")
]
QUICK_FLOATS = {("bert", torch.float32, "1GB"), ("gpt2", torch.float32, "8KB"), ("llama", torch.bfloat16, "8KB")}
QUICK_FLOATS |= {("tied_llama", torch.bfloat16, "1GB"), ("t5", torch.float32, "8KB")}


@pytest.mark.parametrize(
    ("kind", "dtype", "shard"),
    [pytest.param(*case, marks=() if case in QUICK_FLOATS else SLOW) for case in FLOATS],
    ids=str,
)
def test_streaming_floats_is_quantising_the_loaded_model(
    kind: str, dtype: torch.dtype, shard: str, tmp_path: Path
) -> None:
    want = pretrained(kind, tmp_path, dtype, shard)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or shard == "1GB"
    quantise(want)
    target = load_quantised(unfilled(kind), tmp_path, mode="nf4")
    assert differences(want, target) == []
    assert {layer.source_dtype for layer in layers(target).values()} == {dtype}
    for name, layer in layers(target).items():
        assert torch.equal(layer.samples, want.get_submodule(name).samples)
    assert torch.equal(output(target.eval(), kind_of(kind)), output(want.eval(), kind_of(kind)))


def kind_of(kind: str) -> str:
    return kind.removeprefix("tied_")


@pytest.mark.parametrize("options", MODES[1:], ids=str)
def test_streaming_takes_all_settings(options: dict[str, Any], tmp_path: Path) -> None:
    want = pretrained("llama", tmp_path, torch.float32, "1GB")
    quantise(want, **options, skip="down")
    target = load_quantised(empty("llama"), tmp_path, **options, skip="down")
    assert differences(want, target) == []
    assert not is_quantised(target.model.layers[0].mlp.down_proj)


def test_streaming_into_a_real_model(tmp_path: Path) -> None:
    want = pretrained("bert", tmp_path, torch.float32, "1GB")
    quantise(want)
    assert differences(want, load_quantised(scrambled(zoo.build("bert")), tmp_path)) == []


def test_floats_into_a_model_that_is_quantised_already(tmp_path: Path) -> None:
    """Either its weights are quantised anew, or the error says what is the matter."""
    want = pretrained("bert", tmp_path, torch.float32, "1GB")
    quantise(want)
    target = scrambled(zoo.build("bert"))
    quantise(target)
    try:
        load_quantised(target, tmp_path)
    except (BaseFileError, QuantisationError) as error:
        assert "quantised already" in str(error)  # noqa: PT017
    else:
        assert differences(want, target) == []


def test_codes_into_a_model_that_is_quantised_otherwise(tmp_path: Path) -> None:
    save_quantised(quantised("bert"), tmp_path / "base")
    with pytest.raises(BaseFileError, match="blocks of 64.*128") as error:
        load_quantised(quantised("bert", blocksize=128), tmp_path / "base")
    assert "Use load_quantised" not in str(error.value)  # that is what was called


@pytest.mark.parametrize("kind", ["gpt2", "tied_llama", "t5", "bert_mlm"])
def test_ties_of_transformers_hold(kind: str, tmp_path: Path) -> None:
    pretrained(kind, tmp_path / "floats", torch.float32, "1GB")
    first = load_quantised(unfilled(kind), tmp_path / "floats")
    save_quantised(first, tmp_path / "codes")
    second = load_quantised(unfilled(kind), tmp_path / "codes")
    third = load_quantised(scrambled(zoo.build(kind) if kind != "tied_llama" else tied_llama()), tmp_path / "codes")
    for net in (first, second, third):
        embedding, head = net.get_input_embeddings(), net.get_output_embeddings()
        assert embedding.weight is head.weight
        assert not embedding.weight.is_meta
    assert differences(first, second) == []
    assert differences(first, third) == []


class Tied(nn.Module):
    """Tied in plain torch, with nobody to tie it again."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 64)
        self.body = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
        self.out = nn.Linear(64, 20, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(self.embed(x)))


@pytest.mark.parametrize("how", ["meta", "real", "device"])
@pytest.mark.parametrize("written", ["floats", "codes"])
def test_ties_of_a_plain_module_hold(how: str, written: str, tmp_path: Path) -> None:
    source = Tied()
    if written == "codes":
        quantise(source, targets="body.*")
        save_quantised(source, tmp_path / "base")
    else:
        (tmp_path / "base").mkdir()
        save_file({n: p.detach() for n, p in source.named_parameters()}, tmp_path / "base" / "model.safetensors")
        quantise(source, targets="body.*")
    with empty_weights():
        target = Tied()
    target = target if how == "meta" else scrambled(Tied())
    load_quantised(target, tmp_path / "base", targets="body.*", device="cpu" if how == "device" else None)
    assert target.out.weight is target.embed.weight
    assert differences(source, target) == []


@pytest.mark.parametrize("kind", ["gpt2", "tied_llama"])
def test_ties_inside_of_a_task_hold(kind: str, tmp_path: Path) -> None:
    pretrained(kind, tmp_path / "floats", torch.float32, "1GB")
    task = load_quantised(Task(unfilled(kind)), tmp_path / "floats")
    net = task.model.net
    assert net.get_input_embeddings().weight is net.get_output_embeddings().weight


def test_a_head_that_the_files_lack_is_asked_for(tmp_path: Path) -> None:
    bare = zoo.build("bert").bert
    bare.save_pretrained(tmp_path)
    with pytest.raises(BaseFileError, match=r"2 tensors were never loaded.*classifier.*fresh='classifier'"):
        load_quantised(empty("bert"), tmp_path)
    target = load_quantised(empty("bert"), tmp_path, fresh="classifier")
    assert len(layers(target)) == 12
    head = target.classifier
    assert head.weight.requires_grad
    assert torch.isfinite(head.weight).all()
    assert 0 < head.weight.std() < 1
    assert not is_quantised(head)
    want = zoo.build("bert")
    quantise(want)
    assert [name for name in differences(want, target) if "classifier" not in name] == []


def test_fresh_does_not_touch_what_the_files_hold(tmp_path: Path) -> None:
    want = pretrained("bert", tmp_path, torch.float32, "1GB")
    target = load_quantised(empty("bert"), tmp_path, fresh=["classifier", "bert.pooler"])
    assert torch.equal(target.classifier.weight, want.classifier.weight)
    assert torch.equal(target.bert.pooler.dense.weight, want.bert.pooler.dense.weight)


def test_fresh_that_cannot_be_made(tmp_path: Path) -> None:
    zoo.build("bert").bert.save_pretrained(tmp_path)
    with pytest.raises((BaseFileError, ValueError), match="nowhere"):
        load_quantised(empty("bert"), tmp_path, fresh="nowhere")

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    with empty_weights():
        net = zoo.build("bert")
        net.classifier = Scale()
    with pytest.raises(BaseFileError, match=r"Scale of fresh='classifier' has no reset_parameters"):
        load_quantised(net, tmp_path, fresh="classifier")


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "t5"])
def test_buffers_that_no_file_holds_are_real(kind: str, tmp_path: Path) -> None:
    want = pretrained(kind, tmp_path, torch.float32, "1GB")
    target = load_quantised(empty(kind), tmp_path)
    buffers = {name: t for name, t in target.named_buffers() if name.rpartition(".")[0] not in layers(target)}
    assert buffers.keys() == {name for name, _ in want.named_buffers()}
    assert all(same_bits(t, want.get_buffer(name)) for name, t in buffers.items())
    with torch.device("meta"):
        unreal = zoo.META["bert-base"]() if kind == "bert" else zoo.ZOO[kind]()
    if kind in ("bert", "llama"):
        with pytest.raises(BaseFileError):
            load_quantised(unreal, tmp_path)


def test_dtype_is_that_of_what_is_not_quantised(tmp_path: Path) -> None:
    want = pretrained("bert", tmp_path, torch.float32, "1GB")
    quantise(want)
    target = load_quantised(empty("bert"), tmp_path, dtype="bfloat16")
    rest = {p.dtype for name, p in target.named_parameters() if name.rpartition(".")[0] not in layers(target)}
    assert rest == {torch.bfloat16}
    for name, layer in layers(target).items():
        assert torch.equal(layer.codes, layers(want)[name].codes), name  # quantised from what the file holds
        assert torch.equal(layer.dequantised(torch.float32), layers(want)[name].dequantised(torch.float32))
    with pytest.raises(BaseFileError, match="dtype='int8' is unknown. Known: float32, bfloat16, float16"):
        load_quantised(empty("bert"), tmp_path, dtype="int8")


@pytest.mark.parametrize("written", ["floats", "codes"])
def test_device(written: str, tmp_path: Path) -> None:
    want = pretrained("gpt2", tmp_path / "floats", torch.float32, "1GB")
    quantise(want)
    save_quantised(want, tmp_path / "codes")
    for target in (empty("gpt2"), scrambled(zoo.build("gpt2"))):
        load_quantised(target, tmp_path / written, device="cpu")
        assert differences(want, target) == []
    target = load_quantised(empty("gpt2"), tmp_path / written, device=torch.device("cpu"))
    assert {t.device.type for t in parts(target).values()} == {"cpu"}


def test_what_trains_is_as_in_the_model(tmp_path: Path) -> None:
    pretrained("bert", tmp_path, torch.float32, "1GB")
    net = empty("bert")
    net.bert.embeddings.requires_grad_(False)
    load_quantised(net, tmp_path)
    flags = {name: p.requires_grad for name, p in net.named_parameters()}
    assert not any(flag for name, flag in flags.items() if "embeddings" in name)
    assert flags["classifier.weight"]
    assert flags["bert.encoder.layer.0.attention.self.query.bias"]
    assert not any(flags[f"{name}.packed"] for name in layers(net))


def test_empty_weights_leaves_torch_as_it_was() -> None:
    register = nn.Module.register_parameter
    with pytest.raises(ArithmeticError), empty_weights():
        raise ArithmeticError
    assert nn.Module.register_parameter is register
    with empty_weights():
        net, unit = zoo.build("llama"), nn.BatchNorm1d(3)
    assert all(p.is_meta for p in (*net.parameters(), *unit.parameters()))
    assert not any(b.is_meta for b in (*net.buffers(), *unit.buffers()))
    assert not nn.Linear(2, 2).weight.is_meta
    with empty_weights():
        tied = Tied()
    assert tied.out.weight is tied.embed.weight


# ------------------------------------------------------------------ memory
class Live(TorchDispatchMode):
    """The most bytes of floating tensors that were alive at once, of those that were made while it watched."""

    def __init__(self) -> None:
        super().__init__()
        self.known, self.peak = WeakIdKeyDictionary(), 0

    def note(self, tensor: Tensor) -> None:
        if not tensor.is_meta and tensor.is_floating_point():
            self.known[tensor] = True
            memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in list(self.known.keys())}
            self.peak = max(self.peak, sum(memory.values()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.note(leaf)
        return out


class Stack(nn.Module):
    """Equal layers."""

    def __init__(self, layer: Callable[[int, int], nn.Module], depth: int = 6, width: int = 1024) -> None:
        super().__init__()
        self.body = nn.Sequential(*(layer(width, width) for _ in range(depth)))


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("layer", [nn.Linear, hf.pytorch_utils.Conv1D], ids=["Linear", "Conv1D"])
def test_no_more_than_one_layer_is_in_floats_while_streaming(
    layer: Any, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with empty_weights():
        target = Stack(layer)
    one = 4 * 1024 * 1024  # bytes of a layer in fp32
    weights = {n: torch.randn(p.shape) for n, p in target.named_parameters()}
    save_file(weights, tmp_path / "model.safetensors")
    del weights
    live, read = Live(), quantised_files.Source.read

    def noted(self: Any, name: str) -> Tensor:
        tensor = read(self, name)
        live.note(tensor)
        return tensor

    monkeypatch.setattr(quantised_files.Source, "read", noted)
    with live:
        load_quantised(target, tmp_path, targets="body.*", backend=backend)
    assert len(layers(target)) == 6
    copies = 1 if layer is nn.Linear else 2  # blocks run along the input, which Conv1D keeps the other way round
    assert one <= live.peak < copies * one + 0.95 * one  # in all there are six
    left = sum(t.untyped_storage().nbytes() for t in live.known.keys())  # noqa: SIM118
    assert left < 0.1 * one


def test_parameters_of_an_empty_model_take_no_memory() -> None:
    live = Live()
    with live, empty_weights():
        net = Stack(nn.Linear)
    assert live.peak <= 4 * 1024 * 1024 + 4 * 1024 * 8  # one layer at a time
    assert all(p.is_meta for p in net.parameters())


# ------------------------------------------------------------------ bitsandbytes
@pytest.fixture
def bnb() -> Any:
    return pytest.importorskip("bitsandbytes")


class Pair(nn.Module):
    """Two projections, the first with a bias. bitsandbytes' CPU kernel needs rows of whole blocks: it confuses others."""

    def __init__(self, linear: Callable[..., nn.Module] = nn.Linear, width: int = 128) -> None:
        super().__init__()
        self.first, self.second = linear(width, 128), linear(128, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("blocksize", "width"), [(64, 128), (128, 100)])
def test_bitsandbytes_reads_what_is_written(
    kind: Any, double: bool, blocksize: int, width: int, bnb: Any, tmp_path: Path
) -> None:
    net = Pair(width=width)
    quantise(net, mode=kind, double_quant=double, blocksize=blocksize, targets="first,second")
    found = files(save_quantised(net, tmp_path / "base"))
    for name in ("first", "second"):
        stats = {key: t for key, t in found.items() if key.startswith(f"{name}.weight.")}
        theirs = bnb.nn.Params4bit.from_prequantized(found[f"{name}.weight"], stats, device="cpu")
        shape = theirs.quant_state.shape
        theirs.quant_state.shape = torch.Size([shape.numel()])
        weight = bnb.functional.dequantize_4bit(theirs.data, theirs.quant_state)
        assert torch.equal(weight.float().view(shape), getattr(net, name).dequantised(torch.float32))
        assert theirs.quant_state.dtype == torch.float32


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_four_bits_written_by_bitsandbytes(kind: str, double: bool, storage: Any, bnb: Any, tmp_path: Path) -> None:
    def linear(*sizes: int, bias: bool = True) -> nn.Module:
        return bnb.nn.Linear4bit(
            *sizes,
            bias=bias,
            compute_dtype=torch.float32,
            compress_statistics=double,
            quant_type=kind,
            quant_storage=storage,
        )

    theirs = Pair(linear)
    theirs.load_state_dict(Pair().state_dict())
    theirs.to("cpu")
    save_file({n: t.contiguous() for n, t in theirs.state_dict().items()}, tmp_path / "model.safetensors")
    with empty_weights():
        ours = Pair()
    load_quantised(ours, tmp_path)
    for name in ("first", "second"):
        layer, inner = getattr(ours, name), getattr(theirs, name).weight
        assert (layer.quantisation.mode, layer.quantisation.double) == (kind, double)
        want = bnb.functional.dequantize_4bit(inner.data, inner.quant_state)
        assert torch.equal(layer.dequantised(torch.float32), want.float())
    x = torch.randn(5, 128)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)
    save_quantised(ours, tmp_path / "again")
    with empty_weights():
        twice = Pair()
    assert differences(ours, load_quantised(twice, tmp_path / "again")) == []


def test_eight_bits_written_by_bitsandbytes(bnb: Any, tmp_path: Path) -> None:
    def linear(*sizes: int, bias: bool = True) -> nn.Module:
        return bnb.nn.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False, threshold=6.0)

    theirs, floats = Pair(linear), Pair()
    theirs.load_state_dict(floats.state_dict())
    theirs.to("cpu")
    saved = theirs.state_dict()
    if "first.SCB" not in saved:
        pytest.skip("bitsandbytes did not quantise to 8 bits on this device")
    save_file({n: t.contiguous() for n, t in saved.items()}, tmp_path / "model.safetensors")
    with empty_weights():
        ours = Pair()
    load_quantised(ours, tmp_path)
    for name in ("first", "second"):
        layer, weight = getattr(ours, name), getattr(floats, name).weight
        assert layer.quantisation.mode == "int8"
        assert torch.equal(layer.codes, saved[f"{name}.weight"])
        step = weight.abs().amax(1, keepdim=True) / 127
        assert ((layer.dequantised(torch.float32) - weight).abs() <= 0.57 * step).all()  # it rounds to float16 before
    x = torch.randn(5, 128)
    assert (ours(x) - floats(x)).norm() < 0.03 * floats(x).norm()
    assert ours(x).dtype == torch.float32


def wide_llama() -> nn.Module:
    """Rows of whole blocks."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**zoo.TEXT, **sizes})).eval()


def four_bits() -> Any:
    kinds = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}
    return hf.BitsAndBytesConfig(load_in_4bit=True, **kinds)


def test_four_bits_written_by_transformers(bnb: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    wide_llama().save_pretrained(tmp_path / "floats")
    options = {"quantization_config": four_bits(), "device_map": "cpu", "dtype": torch.float32}
    theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "floats", **options)
    with pytest.raises(BaseFileError, match="bitsandbytes' own.*save_pretrained"):
        save_quantised(theirs, tmp_path / "refused")
    theirs.save_pretrained(tmp_path / "codes")
    with empty_weights():
        ours = wide_llama()
    load_quantised(ours, tmp_path / "codes")
    assert len(layers(ours)) == 14
    assert torch.allclose(output(ours, "llama"), output(theirs.eval(), "llama"), atol=1e-5)
    want = wide_llama()
    quantise(want)
    assert torch.equal(output(ours, "llama"), output(want, "llama"))


def test_transformers_reads_what_is_written(bnb: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    ours = wide_llama()
    quantise(ours)
    save_quantised(ours, tmp_path / "base")
    config = {**ours.config.to_dict(), "quantization_config": four_bits().to_dict()}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    theirs = hf.LlamaForCausalLM.from_pretrained(tmp_path / "base", device_map="cpu", dtype=torch.float32)
    assert torch.allclose(output(ours, "llama"), output(theirs.eval(), "llama"), atol=1e-5)


# ------------------------------------------------------------------ what must not pass silently
def damaged(directory: Path, name: str, change: Callable[[Tensor], Tensor | None]) -> None:
    """One tensor of an export with one file, changed or (None) left out."""
    tensors = load_file(directory / "model.safetensors")
    found = change(tensors.pop(name))
    tensors |= {} if found is None else {name: found}
    save_file(tensors, directory / "model.safetensors")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_quantised(quantised("bert"), tmp_path / "base")


QUERY = "bert.encoder.layer.0.attention.self.query.weight"
BIAS = "bert.encoder.layer.0.attention.self.query.bias"


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_file_that_is_cut(share: float, base: Path) -> None:
    file = base / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(BaseFileError, match="cannot be read.*Copy it again"):
        load_quantised(empty("bert"), base)


def test_an_index_that_is_damaged(tmp_path: Path) -> None:
    directory = save_quantised(quantised("bert"), tmp_path / "base", shard_bytes=4000)
    index = (directory / INDEX).read_text()
    (directory / INDEX).write_text(index[:100])
    with pytest.raises(BaseFileError, match="is no index of shards"):
        load_quantised(empty("bert"), directory)
    (directory / INDEX).write_text('{"weight_map": 3}')
    with pytest.raises(BaseFileError, match="is no index of shards"):
        load_quantised(empty("bert"), directory)
    (directory / INDEX).write_text(index)
    shard = sorted(directory.glob("*.safetensors"))[2]
    shard.unlink()
    with pytest.raises(BaseFileError, match=shard.name):
        load_quantised(empty("bert"), directory)


def test_an_index_that_points_elsewhere(base: Path) -> None:
    names = dict.fromkeys(load_file(base / "model.safetensors"), "model.safetensors")
    names["bert.embeddings.nowhere"] = "model.safetensors"
    (base / INDEX).write_text(json.dumps({"weight_map": names}))
    assert differences(quantised("bert"), load_quantised(empty("bert"), base)) == []  # what no module has is not read
    names[QUERY] = "../../etc/elsewhere.safetensors"
    (base / INDEX).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(BaseFileError, match="elsewhere"):
        load_quantised(empty("bert"), base)


TENSORS = [
    QUERY,
    BIAS,
    f"{QUERY}.absmax",
    f"{QUERY}.nested_absmax",
    f"{STATE}nf4" if (STATE := f"{QUERY[:-6]}{STATE_KEY}") else "",
]
TENSORS += ["bert.embeddings.word_embeddings.weight", "classifier.bias"]


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("target", ["empty", "real", "quantised"])
def test_a_tensor_that_is_missing(name: str, target: str, base: Path) -> None:
    damaged(base, name, lambda _: None)
    net = {"empty": empty, "real": zoo.build, "quantised": quantised}[target]("bert")
    with pytest.raises((BaseFileError, QuantisationError), match=f"{QUERY[:-7]}|{name}".replace(".", r"\.")):
        load_quantised(net, base)


WRONG: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "codes too short": (QUERY, lambda t: t[:-5]),
    "codes too long": (QUERY, lambda t: torch.cat([t, t])),
    "too few scales": (f"{QUERY}.absmax", lambda t: t[:-1]),
    "scales of another dtype": (f"{QUERY}.absmax", lambda t: t.float()),
    "too few scales of scales": (f"{QUERY}.nested_absmax", lambda t: t[:0]),
    "scales that are not finite": (f"{QUERY}.nested_absmax", lambda t: t * torch.nan),
    "facts that are no json": (f"{STATE}nf4", lambda t: t[:-3]),
    "facts of another shape": (f"{STATE}nf4", lambda t: edited(t, shape=[16, 64])),
    "facts without a shape": (f"{STATE}nf4", lambda t: edited(t, shape=None)),
    "facts of an unknown kind": (f"{STATE}nf4", lambda t: edited(t, quant_type="nf9")),
    "facts with an unknown dtype": (f"{STATE}nf4", lambda t: edited(t, dtype="float12")),
    "facts with something that is no dtype": (f"{STATE}nf4", lambda t: edited(t, dtype="nn")),
    "facts with blocks of another size": (f"{STATE}nf4", lambda t: edited(t, blocksize=128)),
    "facts with blocks of no size": (f"{STATE}nf4", lambda t: edited(t, blocksize="many")),
    "a bias of another shape": (BIAS, lambda t: t[:-1]),
}


def edited(facts: Tensor, **change: Any) -> Tensor:
    known = {**json.loads(bytes(facts.tolist())), **change}
    return torch.frombuffer(bytearray(json.dumps(known), "utf-8"), dtype=torch.uint8)


@pytest.mark.parametrize("what", WRONG)
def test_codes_that_do_not_fit_together(what: str, base: Path) -> None:
    name, change = WRONG[what]
    damaged(base, name, change)
    with pytest.raises((BaseFileError, QuantisationError), match="query"):
        load_quantised(empty("bert"), base)


def test_files_of_another_model(tmp_path: Path) -> None:
    save_quantised(quantised("llama"), tmp_path / "codes")
    zoo.build("llama").save_pretrained(tmp_path / "floats")
    for directory in (tmp_path / "codes", tmp_path / "floats"):
        with pytest.raises(BaseFileError, match="never loaded"):
            load_quantised(empty("bert"), directory)
        with pytest.raises(BaseFileError):
            load_quantised(zoo.build("bert"), directory)


def test_a_tensor_that_is_missing_in_a_float_file(tmp_path: Path) -> None:
    pretrained("bert", tmp_path, torch.float32, "1GB")
    damaged(tmp_path, QUERY, lambda _: None)
    with pytest.raises(BaseFileError, match=r"never loaded: \['bert.encoder.layer.0.attention.self.query.weight'\]"):
        load_quantised(empty("bert"), tmp_path)
    real = zoo.build("bert")
    with pytest.raises(BaseFileError, match="query"):
        load_quantised(real, tmp_path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_named(value: float, tmp_path: Path) -> None:
    pretrained("bert", tmp_path, torch.float32, "1GB")
    damaged(tmp_path, QUERY, lambda t: t.clone().index_fill_(0, torch.tensor([3]), value))
    with pytest.raises((BaseFileError, QuantisationError), match="query"):
        load_quantised(empty("bert"), tmp_path)


def test_weights_of_another_shape_or_kind_are_named(tmp_path: Path) -> None:
    pretrained("bert", tmp_path, torch.float32, "1GB")
    shutil.copytree(tmp_path, tmp_path / "kept")
    damaged(tmp_path, QUERY, lambda t: t[:-1])
    with pytest.raises(BaseFileError, match=r"query.weight' is \(31, 32\), the model needs \(32, 32\)"):
        load_quantised(empty("bert"), tmp_path)
    damaged(tmp_path / "kept", QUERY, lambda t: t.to(torch.int32))
    with pytest.raises((BaseFileError, QuantisationError), match="query"):
        load_quantised(empty("bert"), tmp_path / "kept")


def test_what_is_no_base(tmp_path: Path) -> None:
    torch.save(zoo.build("bert").state_dict(), tmp_path / "pytorch_model.bin")
    torch.save(zoo.build("bert").state_dict(), tmp_path / "model.pt")
    (tmp_path / "empty").mkdir()
    for path in (
        tmp_path,
        tmp_path / "pytorch_model.bin",
        tmp_path / "model.pt",
        tmp_path / "empty",
        tmp_path / "none",
    ):
        with pytest.raises(BaseFileError, match=r"model.safetensors.*a pickled checkpoint.*is never read"):
            load_quantised(empty("bert"), path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.pt").read_bytes())
    with pytest.raises(BaseFileError, match="cannot be read"):
        load_quantised(empty("bert"), tmp_path)


def test_an_about_file_that_is_damaged(base: Path) -> None:
    about = base / "quantisation.json"
    for text in ("{", "{}", "[]", '{"samples": {"a": "zz"}}', '{"samples": {"a": 3}}', '{"samples": {"a": "00"}}'):
        about.write_text(text)
        with pytest.raises(BaseFileError, match="quantisation.json is damaged"):
            load_quantised(empty("bert"), base)
    about.unlink()
    assert differences(quantised("bert"), load_quantised(empty("bert"), base)) == []


def test_a_model_with_adapters_takes_no_base(base: Path) -> None:
    net = zoo.build("bert")
    LoRA(rank=2).apply(net)
    with pytest.raises(BaseFileError, match=r"\['lora'\] are on this model. Load the base first"):
        load_quantised(net, base)


def test_other_files_in_the_directory_are_kept(base: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    (mixed / "notes.txt").write_text("mine")
    with pytest.raises(BaseFileError, match="holds other files"):
        save_quantised(quantised("bert"), mixed)
    assert (mixed / "notes.txt").read_text() == "mine"
    (base / "config.json").write_text("{}")  # beside an export, as transformers wants it
    try:
        save_quantised(quantised("bert"), base)
    except BaseFileError as error:
        assert "config.json" in str(error)  # noqa: PT017
    assert (base / "config.json").read_text() == "{}"
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(BaseFileError, match="is a file"):
        save_quantised(quantised("bert"), file)


def test_an_earlier_export_is_replaced_whole(tmp_path: Path) -> None:
    directory = tmp_path / "base"
    save_quantised(quantised("bert"), directory, shard_bytes=4000)
    save_quantised(quantised("llama"), directory)
    assert {path.name for path in directory.iterdir()} == {"model.safetensors", "quantisation.json"}
    assert differences(quantised("llama"), load_quantised(empty("llama"), directory)) == []
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("where", ["save_file", "verify", "about", "replace_directory"])
def test_a_failed_write_leaves_the_earlier_export_whole(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = save_quantised(quantised("bert"), tmp_path / "base", shard_bytes=4000)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    work, calls = getattr(quantised_files, where), []

    def fails(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == (3 if where == "save_file" else 1):
            raise OSError("No space left on device")
        return work(*args, **kwargs)

    monkeypatch.setattr(quantised_files, where, fails)
    with pytest.raises(OSError, match="No space left"):
        save_quantised(quantised("llama"), directory, shard_bytes=4000)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_what_was_written_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(tensors: dict[str, Tensor], path: Path, **kwargs: Any) -> None:
        save_file({name: torch.zeros_like(t) for name, t in tensors.items()}, path, **kwargs)

    monkeypatch.setattr(quantised_files, "save_file", careless)
    with pytest.raises(BaseFileError, match="read back otherwise than it was written"):
        save_quantised(quantised("bert"), tmp_path / "base")
    assert not (tmp_path / "base").exists()


# ------------------------------------------------------------------ adapters on the model
def test_adapters_are_left_out(tmp_path: Path) -> None:
    plain, net = quantised("bert"), quantised("bert")
    LoRA(rank=2, targets="all-linear", heads=None).apply(net)
    LoRA(rank=2, targets="q,v", heads=None, label="adapters").apply(net)
    train(net, "bert")
    assert files(save_quantised(net, tmp_path / "a")).keys() == files(save_quantised(plain, tmp_path / "b")).keys()
    assert differences(plain, load_quantised(empty("bert"), tmp_path / "a")) == []


@pytest.mark.parametrize("into", ["float32", "requantise"])
def test_a_merged_base_is_refused_until_it_is_unloaded(into: Any, tmp_path: Path) -> None:
    net, lora = quantised("bert"), LoRA(rank=2, targets="q,v", heads=None)
    lora.apply(net)
    train(net, "bert")
    lora.merge(net, into=into)
    with pytest.raises(BaseFileError, match="'lora' is merged into this base.*Unmerge it"):
        save_quantised(net, tmp_path / "base")
    lora.unmerge(net)
    save_quantised(net, tmp_path / "base")
    assert differences(quantised("bert"), load_quantised(empty("bert"), tmp_path / "base")) == []
    lora.unload(net, into=into)
    save_quantised(net, tmp_path / "base")
    again = load_quantised(empty("bert"), tmp_path / "base")
    assert differences(net, again) == []
    assert len(layers(again)) == (12 if into == "requantise" else 8)
    assert torch.equal(output(again.eval(), "bert"), output(net.eval(), "bert"))


def test_a_base_that_was_trained_in_place_is_refused(tmp_path: Path) -> None:
    for method in (BitFit(), LoRA(rank=2)):  # biases; a head
        net = quantised("bert")
        method.apply(net)
        train(net, "bert")
        with pytest.raises(BaseFileError, match="trains parts of it in place.*switch it off"):
            save_quantised(net, tmp_path / "base")
        assert not (tmp_path / "base").exists()
        with method.enabled(net, False):
            save_quantised(net, tmp_path / "base")
        assert differences(quantised("bert"), load_quantised(empty("bert"), tmp_path / "base")) == []
        shutil.rmtree(tmp_path / "base")


def test_a_base_in_floats_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseFileError, match="is not quantised. Quantise it first"):
        save_quantised(zoo.build("bert"), tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_saving_changes_nothing_on_the_model(tmp_path: Path) -> None:
    net = quantised("gpt2")
    LoRA(rank=2).apply(net)
    before, flags = parts(net), {n: p.requires_grad for n, p in net.named_parameters()}
    before = {name: t.clone() for name, t in before.items()}
    save_quantised(net, tmp_path / "base", shard_bytes=3000)
    assert all(same_bits(t, before[name]) for name, t in parts(net).items())
    assert flags == {n: p.requires_grad for n, p in net.named_parameters()}
    assert list(state.applied_to(net)) == ["lora"]


def walk(directory: Path) -> Iterator[Path]:
    yield from directory.rglob("*")


def test_nothing_of_the_export_is_a_pickle_or_for_its_owner_alone(base: Path) -> None:
    assert {path.suffix for path in walk(base)} == {".safetensors", ".json"}
    json.loads((base / "quantisation.json").read_text())
    assert base.stat().st_mode & 0o055 == 0o055 & ~quantised_files.umask()
