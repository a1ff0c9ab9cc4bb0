"""What goes into a Lightning checkpoint and comes back: adapters, trained parameters and changed buffers, never the
base.

One implementation for the callback alone (it lends these functions to a plain strategy) and for the strategy mixin.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.core import state
from lightning_peft.core.basis import BasisError
from lightning_peft.core.method import REGISTRY, Method

log = logging.getLogger("lightning_peft")


class CheckpointError(RuntimeError):
    """A checkpoint that does not belong to this model and these methods."""


def model_state(module: nn.Module, full: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of the module's state dict that a checkpoint keeps; all of them where no method is applied."""
    if not state.applied_to(module):
        return dict(full)
    known = nn.Module.state_dict(module)
    return {name: t for name, t in full.items() if name not in known} | state.saved(module)  # what a module adds stays


def load_model_state(module: nn.Module, given: Mapping[str, Tensor], strict: bool = True) -> None:
    """Load what `model_state` kept. Each adapter and trained parameter must be there; nothing may be left over."""
    if not state.applied_to(module):
        module.load_state_dict(dict(given), strict=strict)
        return
    required, own = state.required(module), nn.Module.state_dict(module)
    theirs = set(module.state_dict()) - set(own)  # of a module that overrides state_dict
    missing, extra = sorted(required - set(given)), sorted(set(given) - set(own) - theirs)
    if missing or extra:
        raise CheckpointError(
            f"The checkpoint does not fit. Missing: {_some(missing)}. Unknown to this model: {_some(extra)}. It holds "
            f"{len(given)} tensors, this model with {list(state.applied_to(module))} needs {len(required)}. Use "
            f"the method, "
            "configuration and model that the checkpoint was made with."
        )
    own = expecting(module, given)
    for name, tensor in given.items():
        if name in own and own[name].shape != tensor.shape:
            raise CheckpointError(
                f"{name!r} is {tuple(tensor.shape)} in the checkpoint and {tuple(own[name].shape)} here."
            )
    module.load_state_dict(dict(given), strict=False)
    try:
        state.verify_bases(module)
    except BasisError as error:
        raise CheckpointError(str(error)) from None


def expecting(module: nn.Module, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The module's state dict, when the adapters have the sizes of what they are given."""
    names = {id(m): f"{name}." if name else "" for name, m in module.named_modules()}
    for placement in (x for a in state.all_applied(module) for x in a.placements):
        prefix = names.get(id(placement.adapter))
        if prefix is not None:
            placement.adapter.expect({n.removeprefix(prefix): t for n, t in given.items() if n.startswith(prefix)})
    return nn.Module.state_dict(module)


def load_checkpoint(module: nn.Module, path: str | Path, methods: Sequence[Method] | None = None) -> nn.Module:
    """Put the methods and the weights of a Lightning checkpoint into a freshly built module, without a Trainer.

    methods: those of a checkpoint that was saved with `weights_only`, which does not name them. Never unpickles.
    """
    import lightning_peft.methods  # noqa: F401  fills the registry

    saved = torch.load(path, map_location="cpu", weights_only=True)
    entries = [entry for key, entry in saved.get("callbacks", {}).items() if key.startswith("lightning_peft.")]
    if methods is None and not entries:
        raise CheckpointError(
            f"{path} does not say which methods it was made with (saved with weights_only?). Name them: "
            "load_checkpoint(module, path, methods=[LoRA(...)])."
        )
    known = [REGISTRY[e["method"]](**e["config"]) for e in entries if e["method"] in REGISTRY]
    if methods is None and len(known) < len(entries):
        raise CheckpointError(
            f"{path} was made with {[e['method'] for e in entries]}; known: {', '.join(sorted(REGISTRY))}. Import the "
            "module that defines the method first."
        )
    done: list[Method] = []
    try:
        for method in known if methods is None else methods:
            done.append(method)
            method.apply(module)
        for entry in entries:
            check_base(module, entry["label"], entry.get("fingerprint"))
            tell_other_precision(module, entry["label"], entry.get("base"))
            check_config(module, entry["label"], entry["config"])
            if (applied := state.applied_to(module).get(entry["label"])) is not None:
                applied.method.go_on(entry["config"])
        load_model_state(module, saved["state_dict"])
    except Exception:
        for method in done:
            if (method.label or method.info.name) in state.applied_to(module):
                method.remove(module)
        raise
    return module


# fields that place adapters (the keys tell), or that matter at the start or in training only
FREE = {
    "label",
    "seed",
    "init",
    "identity",
    "dropout",
    "keep_base",
    "dtype",
    "targets",
    "layers",
    "exclude",
    "roles",
    "restarts",
    "learners",
}


def check_config(module: nn.Module, label: str, saved: Mapping[str, Any]) -> None:
    """Raise where the method would compute something else than the one that was trained."""
    applied = state.applied_to(module).get(label)
    own = applied.method.config() if applied is not None else {}
    other = {k: (v, own[k]) for k, v in saved.items() if k in own and k not in FREE | {"heads"} and v != own[k]}
    if other:
        shown = ", ".join(f"{name}: {before!r} there, {now!r} here" for name, (before, now) in other.items())
        raise CheckpointError(
            f"{label!r} was trained with other settings ({shown}), so the result would be another. Use those of the "
            "checkpoint."
        )


def tell_other_precision(module: nn.Module, label: str, before: str | None) -> None:
    """A line of log where the base is kept in other bits than when the checkpoint was made."""
    applied = state.applied_to(module).get(label)
    if before is not None and applied is not None and before != (now := state.quantised_as(applied)):
        log.warning("%r was trained on a base in %s, this one is in %s: its outputs will differ.", label, before, now)


def check_base(module: nn.Module, label: str, fingerprint: str | None) -> None:
    """Raise where the methods were trained on another base than this one."""
    applied = state.applied_to(module).get(label)
    if applied is not None and fingerprint is not None and not state.same_base(fingerprint, applied.fingerprint):
        raise CheckpointError(
            f"The checkpoint was made on another base model: fingerprint {fingerprint[:24]}... there, "
            f"{applied.fingerprint[:24]}... here ({type(module).__name__}). Load the base weights that it was "
            f"trained on."
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5]) or "nothing"
    return f"{shown}, ... ({len(names)})" if len(names) > 5 else shown


def optimizer_state(module: nn.Module, optimizer: Optimizer, given: Mapping[str, Any]) -> dict[str, Any]:
    """The optimizer's state with parameter names in place of numbers, so that it survives another order or strategy."""
    if not given:
        return dict(given)
    names = _names(module, optimizer)
    return {
        **given,
        "state": {names[index]: value for index, value in given["state"].items()},
        "param_groups": [{**group, "params": [names[i] for i in group["params"]]} for group in given["param_groups"]],
    }


def numbered_optimizer_state(module: nn.Module, optimizer: Optimizer, given: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `optimizer_state`, for the order of parameters in `optimizer`.

    States with numbers pass through.
    """
    check_optimizer(optimizer, given)
    if not any(isinstance(p, str) for group in given.get("param_groups", []) for p in group["params"]):
        return dict(given)
    names = _names(module, optimizer)
    saved = {name for group in given["param_groups"] for name in group["params"]}
    if saved != set(names):
        raise CheckpointError(
            f"The optimizer's parameters differ. Only in the checkpoint: {_some(sorted(saved - set(names)))}. Only "
            f"here: "
            f"{_some(sorted(set(names) - saved))}. Resume with the same method and the same heads."
        )
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    check_groups(names, [group["params"] for group in given["param_groups"]], sizes)
    number = {name: index for index, name in enumerate(names)}
    groups, start = [], 0
    for group, own in zip(given["param_groups"], optimizer.param_groups, strict=True):
        groups.append({**group, "params": list(range(start, start + len(own["params"])))})
        start += len(own["params"])
    return {**given, "state": {number[name]: value for name, value in given["state"].items()}, "param_groups": groups}


def check_groups(names: list[str], saved: list[list[str]], sizes: list[int]) -> None:
    """Raise where the saved groups are not those of the optimizer, whose settings the saved ones would take over."""
    ends = itertools.accumulate(sizes)
    own = [names[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    if [set(group) for group in own] != [set(group) for group in saved]:
        raise CheckpointError(
            f"The checkpoint has its {len(names)} trained parameters in groups of {[len(g) for g in saved]}, the "
            f"optimizer in groups of {sizes} or in others. Each group has a learning rate of its own: resume with the "
            f"groups of the checkpoint (the same lora_plus), {BEGIN_ANEW}"
        )


HIDDEN = "__bnb_optimizer_quant_state__"  # under which bitsandbytes saves the tensors of a parameter's state
BEGIN_ANEW = (
    "or keep the trained weights and begin the optimizer's state anew: load_checkpoint(module, path), then fit without "
    "ckpt_path. The checkpoint is as it was."
)


def check_optimizer(optimizer: Any, given: Mapping[str, Any]) -> None:
    """Raise where one of torch's optimizers is given a state of bitsandbytes, or the other way round."""
    entries = [entry for entry in given.get("state", {}).values() if isinstance(entry, Mapping)]
    held = {key for entry in entries for key in entry.get(HIDDEN, entry)} - {"step"}
    theirs, ours = "state1" in held, any(c.__module__.startswith("bitsandbytes.") for c in type(optimizer).__mro__)
    if held and theirs != ours:
        names = ("one of torch's optimizers", "one of bitsandbytes (paged_adamw, paged_adamw_8bit, adamw_8bit)")
        raise CheckpointError(
            f"The checkpoint holds the optimizer state of {names[theirs]}: {_some(sorted(held))}. "
            f"{type(optimizer).__name__} is {names[ours]} and cannot go on from it. Resume with the optimizer of the "
            f"checkpoint, {BEGIN_ANEW}"
        )


def _names(module: nn.Module, optimizer: Optimizer) -> list[str]:
    known = {id(parameter): name for name, parameter in module.named_parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [known.get(id(p), f"#{index}") for index, p in enumerate(parameters)]
