"""Adapter directories: `adapter.safetensors` + `adapter.json`; written whole or not at all, verified, never pickled.

Tensors are keyed by what they are, not by the label under which they were trained:
`adapter/<module>/<key>/<tensor>` for adapters, `base/<parameter>` for parameters and buffers of the base.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_peft.core import state
from lightning_peft.core.adapter import check_label
from lightning_peft.core.basis import BasisError
from lightning_peft.core.method import REGISTRY, Method, apply_as, check_free, common, remove
from lightning_peft.core.state import Applied

log = logging.getLogger("lightning_peft")
SCHEMA = 1
WEIGHTS, CONFIG = "adapter.safetensors", "adapter.json"


class AdapterFileError(RuntimeError):
    """An adapter directory that cannot be written, read, or used on this model."""


# ------------------------------------------------------------------ saving
def save_adapter(model: nn.Module, directory: str | Path, label: str | None = None) -> Path:
    """Write the method applied under `label` (or the only one) to `directory`; an earlier one there is replaced whole.

    Errors: AdapterFileError where a tensor is not finite or the path is a file; nothing is changed then.
    """
    applied, directory = state.get_applied(model, label), Path(directory)
    if directory.exists() and not directory.is_dir():
        raise AdapterFileError(f"{directory} is a file; an adapter is a directory. Choose another path.")
    if directory.exists() and (
        others := sorted(p.name for p in directory.iterdir() if p.name not in (WEIGHTS, CONFIG))
    ):
        raise AdapterFileError(
            f"{directory} holds other files ({others[:3]}), which replacing it would lose. Choose another path."
        )
    if not applied.cell.on:
        raise AdapterFileError(f"{applied.label!r} is merged or switched off. Unmerge it or switch it on, then save.")
    tensors = {key: tensor.detach().contiguous().cpu().clone() for key, tensor in collected(model, applied).items()}
    if bad := [
        key for key, tensor in tensors.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()
    ]:
        raise AdapterFileError(f"{len(bad)} tensors hold NaN or infinity ({bad[:3]}); nothing was written.")
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        save_file(tensors, fresh / WEIGHTS, metadata={"format": "pt"})
        (fresh / CONFIG).write_text(json.dumps(description(applied), indent=2, sort_keys=True) + "\n")
        verify(fresh, tensors)
        fresh.chmod(0o777 & ~umask())  # mkdtemp makes it for its owner alone
        replace_directory(fresh, directory)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return directory


def umask() -> int:
    """The process's mask of permissions; reading it means setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def collected(model: nn.Module, applied: Applied) -> dict[str, Tensor]:
    """Everything that belongs to a label: collapsed adapters, trained base parameters, changed buffers.

    Shared ones once.
    """
    names = names_of(model)
    out: dict[str, Tensor] = {}
    seen: set[object] = set()
    for placement in applied.placements:
        for name, tensor in placement.adapter.collapsed().items():
            place = (tensor.data_ptr(), tuple(tensor.shape)) if tensor.numel() else (id(placement), name)
            if tensor.is_meta or place not in seen:
                seen.add(place)
                out[adapter_key(names, applied, placement, name)] = tensor
    for selected in applied.selected:
        out[base_key(names, selected.module, selected.attribute)] = selected.parameter
    for registry in state.registries(model):
        for module, name, _ in registry.changed_buffers():
            if id(module) in names:
                out[base_key(names, module, name)] = module._buffers[name]  # type: ignore[assignment]
    return out


def names_of(model: nn.Module) -> dict[int, str]:
    """id of a module -> its name, without what torch.compile puts in between."""
    return {id(m): ".".join(p for p in name.split(".") if p != "_orig_mod") for name, m in model.named_modules()}


def adapter_key(names: dict[int, str], applied: Applied, placement: state.Placement, tensor: str) -> str:
    part = placement.key.removeprefix(applied.label).lstrip("_")  # which of the method's parts, where there are several
    return f"adapter/{names[id(placement.place)]}/{part}/{tensor}"


def base_key(names: dict[int, str], module: nn.Module, attribute: str) -> str:
    return f"base/{names[id(module)]}.{attribute}" if names[id(module)] else f"base/{attribute}"


def description(applied: Applied) -> dict[str, Any]:
    import lightning_peft

    method = applied.method.portable()
    return {
        "schema": SCHEMA,
        "method": method.info.name,
        "config": {k: v for k, v in method.config(defaults=False).items() if k != "label"},
        "label": applied.label,
        "fingerprint": applied.fingerprint,
        "base": state.quantised_as(applied),
        "versions": {"lightning_peft": lightning_peft.__version__, "torch": torch.__version__},
    }


def verify(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Read back what was written, bit for bit."""
    with safe_open(directory / WEIGHTS, framework="pt") as file:
        same = set(file.keys()) == set(tensors) and all(_equal(file.get_tensor(k), t) for k, t in tensors.items())
    if not same:
        raise AdapterFileError(
            f"{directory.parent}: what was read back differs from what was written. Is the disk full?"
        )


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def replace_directory(fresh: Path, target: Path) -> None:
    """Put `fresh` in the place of `target`; if that fails, the old one is still there."""
    if not target.exists():
        os.replace(fresh, target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
    os.replace(target, old / "kept")
    try:
        os.replace(fresh, target)
    except OSError:
        os.replace(old / "kept", target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


# ------------------------------------------------------------------ loading
def read_config(directory: str | Path) -> dict[str, Any]:
    """The checked contents of `adapter.json`."""
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise AdapterFileError(f"{directory} holds no {CONFIG}. An adapter directory has {CONFIG} and {WEIGHTS}.")
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AdapterFileError(f"{path} is not JSON ({error}). Save the adapter again.") from error
    if not isinstance(config, dict) or not {"schema", "method", "config", "fingerprint"} <= set(config):
        raise AdapterFileError(f"{path} lacks one of schema, method, config, fingerprint. Save the adapter again.")
    if not isinstance(config["config"], dict) or not isinstance(config["fingerprint"], str):
        raise AdapterFileError(f"{path} is damaged: config or fingerprint have the wrong type. Save the adapter again.")
    if config["schema"] != SCHEMA:
        raise AdapterFileError(
            f"{path} has schema {config['schema']}; this version of lightning_peft reads schema {SCHEMA}. Update "
            f"the package."
        )
    return config


def read_method(directory: str | Path, label: str | None = None) -> Method:
    """The method with the configuration of an adapter directory, not yet applied to anything."""
    import lightning_peft.methods  # noqa: F401  fills the registry

    config = read_config(directory)
    if not isinstance(config["method"], str) or config["method"] not in REGISTRY:
        raise AdapterFileError(
            f"{directory} was made with the method {config['method']!r}; known: {', '.join(sorted(REGISTRY))}."
        )
    try:
        return REGISTRY[config["method"]](**{**config["config"], "label": label or config.get("label")})
    except (TypeError, ValueError) as error:
        raise AdapterFileError(f"{directory}: the configuration does not fit {config['method']!r}: {error}") from error


def load_adapter(
    model: nn.Module,
    directory: str | Path,
    label: str | None = None,
    *,
    trainable: bool = False,
    check_base: bool = True,
) -> Method:
    """Apply the method of an adapter directory to `model` with its trained tensors, and return it.

    Modules are found by name; a prefix that the whole model has more, less or another (`model.`) is bridged.
    check_base=False allows another base than the one trained on. On any error the model is as it was.
    """
    method = read_method(directory, label)
    tensors, label = read_tensors(directory), check_label(method.label or method.info.name)
    check_free(model, method, label)
    others = [a for a in state.all_applied(model) if a.cell.enabled]
    apply_as(method, model, label, trainable, keep=True)
    applied = state.get_applied(model, label)
    tell_other_precision(Path(directory), applied)
    try:
        own, tensors = matched(model, applied, tensors, Path(directory), check_base)
        check_one_owner(own, tensors, others, Path(directory))
    except Exception:
        remove(model, label)
        raise
    with torch.no_grad():
        for key, target in own.items():
            target.copy_(tensors[key])
    try:
        state.verify_bases(model)
    except BasisError as error:
        remove(model, label)
        raise AdapterFileError(f"{directory}: {error}") from None
    if not method.keeps_original:
        for selected in applied.selected:
            selected.original = None if selected.mask is None else selected.original
    return method


def tell_other_precision(directory: Path, applied: Applied) -> None:
    """A line of log where the base is kept in other bits than the one that the adapter was trained on."""
    before, now = read_config(directory).get("base"), state.quantised_as(applied)
    if before is not None and before != now:
        log.warning(
            "%s was trained on a base in %s, this one is in %s: its outputs will differ.", directory, before, now
        )


def check_one_owner(own: dict[str, Tensor], tensors: dict[str, Tensor], others: list[Applied], directory: Path) -> None:
    """Raise where the file would change a parameter of the base that another method has trained."""
    changed = {
        id(target): key for key, target in own.items() if not torch.equal(target.cpu(), tensors[key].to(target.dtype))
    }
    for other in others:
        if shared := [changed[id(s.parameter)] for s in other.selected if id(s.parameter) in changed]:
            raise AdapterFileError(
                f"{directory} holds other values for {len(shared)} parameters ({shared[:3]}) that {other.label!r} "
                f"trained, "
                f"most often a head. Switch {other.label!r} off first (enabled(model, False)), or remove it."
            )


def read_tensors(directory: str | Path) -> dict[str, Tensor]:
    path = Path(directory) / WEIGHTS
    if not path.is_file():
        raise AdapterFileError(f"{directory} holds no {WEIGHTS}. An adapter directory has {CONFIG} and {WEIGHTS}.")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterFileError(
            f"{path} cannot be read ({error}): it is cut short or damaged. Copy or save it again."
        ) from error
    if bad := [key for key, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]:
        raise AdapterFileError(f"{path} holds NaN or infinity in {len(bad)} tensors ({bad[:3]}). Use an earlier save.")
    return tensors


def matched(
    model: nn.Module, applied: Applied, tensors: dict[str, Tensor], directory: Path, check_base: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Key -> tensor of the model, and key -> tensor of the file, which fit each other; an error where they do not."""
    wanted = collected(model, applied)
    tensors = aligned(tensors, set(wanted))
    names = names_of(model)
    for placement in applied.placements:
        prefix = adapter_key(names, applied, placement, "")
        placement.adapter.expect({key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)})
    wanted = collected(model, applied)
    own = dict(destinations(model, applied, tensors))
    missing, extra = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(own))
    if missing or extra:
        raise AdapterFileError(
            f"{directory} does not fit this {type(model).__name__}. Missing in the file ({len(missing)}): "
            f"{missing[:4]}. "
            f"Unknown to the model ({len(extra)}): {extra[:4]}. Use the model that the adapter was trained on."
        )
    for key, target in own.items():
        if target.is_floating_point() != tensors[key].is_floating_point():
            raise AdapterFileError(f"{directory}: {key!r} is {tensors[key].dtype}, the model needs {target.dtype}.")
        if target.shape != tensors[key].shape:
            raise AdapterFileError(
                f"{directory}: {key!r} is {tuple(tensors[key].shape)}, the model needs {tuple(target.shape)}."
            )
    saved = read_config(directory)["fingerprint"]
    if check_base and not (isinstance(saved, str) and state.same_base(saved, applied.fingerprint)):
        raise AdapterFileError(
            f"{directory} was trained on another base: fingerprint {str(saved)[:24]}..., this "
            f"{type(model).__name__} has "
            f"{applied.fingerprint[:24]}... Load the base it was trained on, or pass check_base=False if you know "
            f"better."
        )
    return own, tensors


def destinations(model: nn.Module, applied: Applied, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Key -> the tensor of the model to copy into, for what the file holds."""
    names = names_of(model)
    for placement in applied.placements:
        for name, tensor in placement.adapter.state_dict(keep_vars=True).items():
            if (key := adapter_key(names, applied, placement, name)) in tensors:
                yield key, tensor
    for selected in applied.selected:
        if (key := base_key(names, selected.module, selected.attribute)) in tensors:
            yield key, selected.parameter
    for module, name, buffer in state.persistent_buffers(model):
        if (key := base_key(names, module, name)) in tensors:
            yield key, buffer


def aligned(tensors: dict[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """The file's keys as this model spells them: the same, or with one prefix less, one more, or one for another.

    A layer is not put in the place of one of another number.
    """
    if wanted <= set(tensors):
        return tensors
    for less, more in itertools.product(*(prefixes([name_in(key) for key in keys]) for keys in (tensors, wanted))):
        numbers = {tuple(part for part in prefix.split(".") if part.isdigit()) for prefix in (less, more)}
        if len(numbers - {()}) > 1:
            continue
        moved = {with_name(key, add_prefix(more, drop_prefix(less, name_in(key)))): t for key, t in tensors.items()}
        if wanted <= set(moved) and len(moved) == len(tensors):
            return moved
    return tensors


def prefixes(names: list[str]) -> list[str]:
    """ "", and the dotted starts that all names have, the shortest first."""
    shared = common(names).split(".") if names else []
    return ["", *(".".join(shared[: i + 1]) for i in range(len(shared)) if shared[i])]


def name_in(key: str) -> str:
    """The module or parameter that a key of a file is about."""
    return key.split("/")[1] if "/" in key else ""


def with_name(key: str, name: str) -> str:
    kind, _, *rest = key.split("/") if "/" in key else (key, "")
    return "/".join([kind, name, *rest]) if "/" in key else key


def add_prefix(prefix: str, name: str) -> str:
    return ".".join(filter(None, (prefix, name)))


def drop_prefix(prefix: str, name: str) -> str:
    return "" if name == prefix else name.removeprefix(f"{prefix}.") if prefix else name
