"""A quantised base in files, and a base from files straight into 4 bits: never more than one layer of it in floats.

    with empty_weights():
        model = AutoModelForCausalLM.from_config(config)          # parameters on the meta device, buffers real
    load_quantised(model, "folder/with/safetensors", mode="nf4")  # read, quantise, free; layer by layer
    save_quantised(model, "base-nf4")                             # codes, scales, and whatever is not quantised
    load_quantised(other, "base-nf4")                             # the same bits, nothing is quantised again

The files have the keys of bitsandbytes' layers; exports of transformers with `load_in_4bit` load too.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_peft.core import state
from lightning_peft.core.codes import CONSTANTS, STATE_KEY, Quantisation
from lightning_peft.core.files import add_prefix, drop_prefix, replace_directory, umask
from lightning_peft.core.method import sorted_modules
from lightning_peft.core.quant import QuantisationError
from lightning_peft.core.quantised import (
    Quantised,
    adopt_file,
    can_quantise,
    foreign,
    load_weight,
    quantise_module,
)
from lightning_peft.core.sites import find
from lightning_peft.precision import choose, quantisation

log = logging.getLogger("lightning_peft")
SINGLE, INDEX, ABOUT = "model.safetensors", "model.safetensors.index.json", "quantisation.json"
SCHEMA = 1
CODED = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "zero")
SHARD = 5 * 10**9  # bytes


class BaseFileError(RuntimeError):
    """Files of a base that cannot be written, read, or put into this model."""


# ------------------------------------------------------------------ models without memory
@contextlib.contextmanager
def empty_weights() -> Iterator[None]:
    """Models built in this block have their parameters on the meta device; buffers (rotary tables, masks) are real."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None and not param.is_meta:
            empty = nn.Parameter(param.detach().to("meta"), param.requires_grad)
            self._parameters[name] = empty

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


# ------------------------------------------------------------------ writing
def save_quantised(model: nn.Module, directory: str | Path, shard_bytes: int = SHARD) -> Path:
    """Write the base (without adapters and their labels) to `directory`; an earlier export there is replaced whole.

    Errors: BaseFileError where nothing is quantised, where layers are bitsandbytes' own, or where other files are
    there.
    """
    directory = Path(directory)
    check_exportable(model, directory)
    tensors = base_tensors(model)
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        write_shards(tensors, fresh, shard_bytes)
        (fresh / ABOUT).write_text(json.dumps(about(model), indent=2) + "\n", encoding="utf-8")
        verify(tensors, fresh)
        fresh.chmod(0o777 & ~umask())
        replace_directory(fresh, directory)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return directory


def check_exportable(model: nn.Module, directory: Path) -> None:
    """Raise where there is nothing to export, or where exporting would lose something."""
    if directory.exists() and not directory.is_dir():
        raise BaseFileError(f"{directory} is a file; an exported base is a directory. Choose another path.")
    ours = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|quantisation\.json")
    others = sorted(p.name for p in directory.iterdir() if not ours.fullmatch(p.name)) if directory.is_dir() else []
    if others or (directory.is_dir() and any(directory.iterdir()) and not (directory / ABOUT).is_file()):
        raise BaseFileError(
            f"{directory} holds other files ({others[:3]}), which replacing it would lose. Choose another path."
        )
    modules = list(state.base_modules(model))
    if any(foreign(m) for m in modules):
        raise BaseFileError("This base has layers of bitsandbytes' own. Export it with model.save_pretrained(...).")
    if not any(isinstance(m, Quantised) for m in modules):
        raise BaseFileError(f"This {type(model).__name__} is not quantised. Quantise it first: quantise(model).")
    for applied in state.all_applied(model):
        if applied.cell.merged or (applied.selected and applied.cell.enabled):
            raise BaseFileError(
                f"{applied.label!r} is merged into this base, or trains parts of it in place, so it is not the base "
                "any more. Unmerge it, or switch it off (enabled(model, False)), and export again."
            )


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """name -> tensor of the base's state dict, each tensor under its first name only"""
    names = {id(m): name for name, m in model.named_modules()}
    out: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}  # kept alive, so that no id is given twice
    for module in sorted_modules(model):
        own: dict[str, Tensor] = {}
        prefix = f"{names[id(module)]}." if names[id(module)] else ""
        module._save_to_state_dict(own, prefix, keep_vars=True)
        for name, tensor in own.items():
            if isinstance(tensor, Tensor) and id(tensor) not in seen and name != f"{prefix}samples":
                seen[id(tensor)] = tensor
                out[name] = tensor.detach()
    return out


def write_shards(tensors: dict[str, Tensor], directory: Path, limit: int) -> None:
    """One file, or several with an index, as transformers writes them."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(plain(shards[0]), directory / SINGLE, metadata={"format": "pt"})
        return
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(plain(shard), directory / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, file)
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, whole, each with memory of its own."""
    return {name: t.cpu().contiguous().clone() for name, t in tensors.items()}


def about(model: nn.Module) -> dict[str, Any]:
    """How it was quantised; a few values of each weight before, which tell the base again."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Quantised)}
    samples = {
        name: m.samples.view(torch.uint8).numpy().tobytes().hex() for name, m in layers.items() if m.samples is not None
    }
    settings = [q.describe() for q in {m.quantisation for m in layers.values()}]
    return {"schema": SCHEMA, "quantisation": settings, "samples": samples}


def verify(tensors: dict[str, Tensor], directory: Path) -> None:
    """Read back what was written, bit for bit."""
    source = Source(directory)
    for name, tensor in tensors.items():
        if not same_bytes(source.read(name), tensor.cpu()):
            raise BaseFileError(f"{name!r} was read back otherwise than it was written. Is the disk full?")


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Bit for bit; packed codes may be declared as floats, of which some are NaN."""
    raw = [t.contiguous().flatten().view(torch.uint8) for t in (a, b)]
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(*raw)


# ------------------------------------------------------------------ reading
class Source:
    """Tensors of a safetensors file, of a directory with one, or of shards with an index; read one at a time."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.files = self._files()

    def _files(self) -> dict[str, Path]:
        """name of a tensor -> its file"""
        if self.path.is_file() and self.path.suffix == ".safetensors":
            return dict.fromkeys(self._keys(self.path), self.path)
        index = self.path if self.path.name.endswith(".index.json") else self.path / INDEX
        if index.is_file():
            try:
                where = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise BaseFileError(
                    f"{index} is no index of shards ({error!r}). Download or export it again."
                ) from error
            return {name: index.parent / file for name, file in where.items()}
        if (self.path / SINGLE).is_file():
            return dict.fromkeys(self._keys(self.path / SINGLE), self.path / SINGLE)
        raise BaseFileError(
            f"{self.path} holds neither {SINGLE} nor {INDEX}. Give a .safetensors file, or a directory with one of "
            f"them; "
            "a pickled checkpoint (.bin, .pt) is never read: convert it with safetensors first."
        )

    def _keys(self, file: Path) -> list[str]:
        try:
            with safe_open(file, framework="pt") as opened:
                return list(opened.keys())
        except (SafetensorError, OSError) as error:
            raise BaseFileError(
                f"{file} cannot be read ({error}): it is cut short or damaged. Copy it again."
            ) from error

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU; a file is open only while it is read, so that its pages can go."""
        try:
            with safe_open(self.files[name], framework="pt") as opened:
                return cast(Tensor, opened.get_tensor(name))
        except (SafetensorError, OSError) as error:
            raise BaseFileError(
                f"{self.files[name]} cannot be read ({error}): it is damaged. Copy it again."
            ) from error

    def samples(self) -> dict[str, Tensor]:
        """module -> a few values of its weight before it was quantised, where an export tells them"""
        file = (self.path if self.path.is_dir() else self.path.parent) / ABOUT
        if not file.is_file():
            return {}
        try:
            found = json.loads(file.read_text(encoding="utf-8"))["samples"]
            return {k: torch.frombuffer(bytearray.fromhex(v), dtype=torch.bfloat16) for k, v in found.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BaseFileError(f"{file} is damaged ({error!r}). Export the base again.") from error


@dataclass
class Loading:
    """One load: from where, into which modules, how."""

    source: Source
    rename: dict[str, str]  # name in the model -> name in the file
    settings: Quantisation
    chosen: dict[str, nn.Module]  # what is quantised on the way
    device: torch.device | None
    dtype: torch.dtype | None

    def entries(self, prefix: str) -> dict[str, str]:
        """What the files hold of one module: attribute (or "weight.absmax", ...) -> name in the file"""
        return self.by_module.get(prefix, {})

    @cached_property
    def by_module(self) -> dict[str, dict[str, str]]:
        found: dict[str, dict[str, str]] = {}
        for name, inside in self.rename.items():
            owner, attribute = split(name)
            found.setdefault(owner, {})[attribute] = inside
        return found


def split(name: str) -> tuple[str, str]:
    """ "a.b.weight.absmax" -> "a.b", "weight.absmax" """
    owner, dot, attribute = name.rpartition(".")
    head, weight, rest = name.rpartition(".weight.")
    if weight and (rest in CODED or rest.startswith("quant_state.")):
        return head, f"weight.{rest}"
    return (owner, attribute) if dot else ("", name)


def load_quantised(
    model: nn.Module,
    path: str | Path,
    settings: Quantisation | None = None,
    *,
    targets: str | list[str] = "all-linear",
    skip: str | list[str] | None = None,
    fresh: str | list[str] | None = None,
    device: torch.device | str | None = None,
    dtype: str | None = None,
    **options: Any,
) -> nn.Module:
    """Fill `model` (built under `empty_weights`, or real) from safetensors, quantising on the way; -> the model

    Weights that the files hold in codes are taken as they are; others are quantised by `settings` or `options` (see
    `quantisation`). fresh: modules that the files need not have, such as a new head; they are initialised by their
    reset_parameters. device: where everything goes. dtype: of what is not quantised; None takes the file's.
    Errors: BaseFileError, QuantisationError.
    """
    if state.all_applied(model):
        raise BaseFileError(
            f"{list(state.applied_to(model))} are on this model. Load the base first, then apply methods."
        )
    source = Source(path)
    rename = aligned(model, source)
    coded = any(STATE_KEY in name or name.endswith(".SCB") for name in rename)
    coded = coded or any(isinstance(m, Quantised) for m in model.modules())
    chosen = {} if coded else choose(model, targets, skip)[0]
    where = None if device is None else torch.device(device)
    loading = Loading(source, rename, settings or quantisation(**options), chosen, where, checked_dtype(dtype))
    ties = tied(model)
    missing = fill(model, loading)
    missing = tie_again(ties, missing)
    missing = initialise(model, missing, fresh, loading)
    check_complete(model, source, missing)
    name_samples(model, source.samples(), rename)
    return model


def name_samples(model: nn.Module, samples: dict[str, Tensor], rename: dict[str, str]) -> None:
    """Give each layer the values that the export tells of its weight."""
    for name, module in model.named_modules():
        inside = rename.get(f"{name}.weight", "").removesuffix(".weight")
        if isinstance(module, Quantised) and inside in samples:
            module.samples = samples[inside]


Holder = tuple[nn.Module, str]


def tied(model: nn.Module) -> list[list[Holder]]:
    """Modules and names that hold one parameter together"""
    holders: dict[int, list[Holder]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((module, name))
    return [group for group in holders.values() if len(group) > 1]


def tie_again(ties: list[list[Holder]], missing: list[Missing]) -> list[Missing]:
    """What was loaded for one holder is that of all; -> what is missing still"""
    absent = {(id(module), name) for _, module, name in missing}
    for group in ties:
        loaded = [(m, n) for m, n in group if (id(m), n) not in absent]
        for module, name in group if loaded else ():
            module._parameters[name] = loaded[0][0]._parameters[loaded[0][1]]
            absent.discard((id(module), name))
    return [entry for entry in missing if (id(entry[1]), entry[2]) in absent]


def checked_dtype(name: str | None) -> torch.dtype | None:
    if name not in (None, "float32", "bfloat16", "float16"):
        raise BaseFileError(f"dtype={name!r} is unknown. Known: float32, bfloat16, float16.")
    return None if name is None else getattr(torch, name)


def names_in(model: nn.Module) -> set[str]:
    """What a state dict of the plain model would hold."""
    return {f"{n}.{p}".lstrip(".") for n, m in model.named_modules() for p in (*m._parameters, *m._buffers)}


def aligned(model: nn.Module, source: Source) -> dict[str, str]:
    """The names of the files as this model spells them -> as the files do: the same, or with one prefix more or
    less.
    """
    own = names_in(model)
    inner = [name for name, _ in model.named_modules() if name and name.count(".") < 2]
    outer = sorted({".".join(name.split(".")[:depth]) for name in source.files for depth in (1, 2)})
    candidates = [{name: name for name in source.files}]
    candidates += [{add_prefix(prefix, name): name for name in source.files} for prefix in inner]
    candidates += [{drop_prefix(prefix, name): name for name in source.files} for prefix in outer]
    return max(candidates, key=lambda names: len(own & set(names)))


Missing = tuple[str, nn.Module, str]  # full name, module, attribute


def fill(model: nn.Module, loading: Loading) -> list[Missing]:
    """Put what the files hold into the modules -> what they do not hold."""
    missing = []
    for prefix, module in model.named_modules():
        entries = loading.entries(prefix)
        try:
            if any(key.startswith(STATE_KEY) or key == "SCB" for key in entries) or (
                isinstance(module, Quantised) and "weight" in entries
            ):
                put_codes(module, {key: loading.source.read(name) for key, name in entries.items()}, loading)
            missing += put_floats(prefix, module, entries, loading)
        except QuantisationError as error:
            raise BaseFileError(f"{loading.source.path}: {prefix}: {error}") from error
    return missing


def put_floats(prefix: str, module: nn.Module, entries: dict[str, str], loading: Loading) -> list[Missing]:
    missing = []
    for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is None or (isinstance(module, Quantised) and attribute in ("packed", *CONSTANTS)):
            if tensor is not None and "weight" not in entries and attribute == "packed":
                missing.append((f"{prefix}.weight".lstrip("."), module, attribute))
            continue
        if attribute in entries:
            put_float(prefix, module, attribute, loading.source.read(entries[attribute]), loading)
        elif attribute not in module._non_persistent_buffers_set:
            missing.append((f"{prefix}.{attribute}".lstrip("."), module, attribute))
    return missing


def put_codes(module: nn.Module, found: dict[str, Tensor], loading: Loading) -> None:
    """Codes (or floats) into a quantised layer, codes into a plain one."""
    own = {key: tensor for key, tensor in found.items() if key != "bias"}
    if isinstance(module, Quantised):
        load_weight(module, own)
    else:
        adopt_file(module, own, loading.settings)
    if loading.device is not None:
        module._apply(lambda t: t if t.is_meta else t.to(loading.device))


@torch.no_grad()
def put_float(prefix: str, module: nn.Module, attribute: str, tensor: Tensor, loading: Loading) -> None:
    """A floating tensor to where it belongs, quantised if it is to be."""
    here = module._parameters.get(attribute, module._buffers.get(attribute))
    name = f"{prefix}.{attribute}".lstrip(".")
    if here is None or tuple(tensor.shape) != tuple(here.shape):
        shape = None if here is None else tuple(here.shape)
        raise BaseFileError(f"{loading.source.path}: {name!r} is {tuple(tensor.shape)}, the model needs {shape}.")
    quantise_it = attribute == "weight" and prefix in loading.chosen and can_quantise(module)
    if quantise_it and not tensor.is_floating_point():
        raise BaseFileError(f"{loading.source.path}: {name!r} is {tensor.dtype}; expected a floating-point dtype.")
    if loading.dtype is not None and tensor.is_floating_point() and not quantise_it:
        tensor = tensor.to(loading.dtype)
    if attribute in module._buffers:
        module._buffers[attribute] = tensor.to(loading.device or (tensor.device if here.is_meta else here.device))
        return
    if quantise_it or here.is_meta or loading.device is not None:
        module._parameters[attribute] = nn.Parameter(tensor, tensor.is_floating_point() and here.requires_grad)
    else:
        here.copy_(tensor)
    del tensor, here
    if quantise_it:
        quantise_module(module, loading.settings, loading.device)
    elif loading.device is not None:
        p = cast(nn.Parameter, module._parameters[attribute])
        p.data = p.data.to(loading.device)


def initialise(
    model: nn.Module, missing: list[Missing], fresh: str | list[str] | None, loading: Loading
) -> list[Missing]:
    """Give what the files lack its initial values, where that was asked for -> what is missing still"""
    new = {id(m): m for root in (find(model, fresh).values() if fresh else ()) for m in root.modules()}
    for module in new.values():
        if any(owner is module for _, owner, _ in missing):
            if not hasattr(module, "reset_parameters"):
                raise BaseFileError(
                    f"A {type(module).__name__} of fresh={fresh!r} has no reset_parameters(). Initialise it."
                )
            module.to_empty(device=loading.device or "cpu", recurse=False)
            module.reset_parameters()  # type: ignore[operator]
    return [entry for entry in missing if id(entry[1]) not in new]


def check_complete(model: nn.Module, source: Source, missing: list[Missing]) -> None:
    """Raise on what the files did not hold, and on what is still without memory."""
    empty = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    found = list(dict.fromkeys([*(name for name, _, _ in missing), *empty]))
    if found:
        raise BaseFileError(
            f"{len(found)} tensors were never loaded: {found[:4]}. {source.path} holds {len(source.files)} tensors, "
            f"such as {sorted(source.files)[:3]}. Use the files of this model; name modules that are new: "
            "fresh='classifier'; build under `empty_weights()`, which leaves buffers that no file holds real."
        )
