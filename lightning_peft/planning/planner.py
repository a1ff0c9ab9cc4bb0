"""The memory of a training step before it is taken.

    print(plan(module, LoRA(rank=8), batch=text_batch(4, 512), precision="nf4"))

Forward, loss, backward and the optimizer's step are really run, on tensors that have shapes and no memory; what lives
when is followed storage by storage. Not seen: what is in a kernel and never a tensor (see `sizes` for the reserve), and
what strategies for several devices keep beside (buckets of DDP, gathered shards of FSDP).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from lightning_peft.core import state
from lightning_peft.core.method import Method
from lightning_peft.core.quantised import Quantised
from lightning_peft.gradient_checkpointing import GradientCheckpointing, checkpoint_blocks, link_of
from lightning_peft.planning import optimizers
from lightning_peft.planning.precision import Arithmetic, arithmetic
from lightning_peft.planning.report import Plan
from lightning_peft.planning.shadow import hollow, tensors
from lightning_peft.planning.sizes import PlanError
from lightning_peft.planning.step import Loss, Setting, Step
from lightning_peft.planning.tracker import ADAPTERS, CONSTANTS, COPIES, GRADIENTS, OPTIMIZER, WEIGHTS

Device = Literal["cuda", "cpu"]
Offload = Literal["optimizer", "weights"]
Labels = Literal["tokens", "classes"] | None
DEVICES, OFFLOADS = ("cuda", "cpu"), (None, "optimizer", "weights")
Methods = Method | Sequence[Method] | None


def plan(
    module: nn.Module,
    method: Methods = None,
    *,
    batch: Any,
    precision: Any = None,
    optimizer: Any = "adamw",
    checkpointing: bool | GradientCheckpointing = False,
    offload: Offload | None = None,
    device: Device = "cuda",
    loss: Loss | None = None,
    accumulate: int = 1,
) -> Plan:
    """Bytes that training `module` with `method` takes on one device; neither is changed, and no memory is taken

    module: a LightningModule, or any model with a loss of its own or with `loss`; real, or on the meta device; its
    dropout counts where it is in training mode. method: none where methods are on it already, one, or several.
    batch: what a step is given; values do not matter, those of a mask are taken to choose everything.
    precision: "32-true" and None (weights keep their dtype), "bf16-mixed", "16-mixed", "bf16-true", "16-true", "nf4",
    "fp4", "int8", or an `NF4Precision`. optimizer: a name in conf/optimizer, or what makes one of parameters.
    checkpointing: whether blocks are computed again in backward, or how.
    offload: "optimizer": its state, gradients and step on the host; "weights": frozen ones on the host, one block at a
    time on the device, which is the least there can be (others keep more there to be faster).
    device: "cpu" counts what torch's CPU operators take; "cuda" its fused ones. accumulate: batches an optimizer step
    (`accumulate_grad_batches`); from 2 on backward finds gradients that are there already. Errors: PlanError.
    """
    how = {"precision": precision, "optimizer": optimizer, "checkpointing": checkpointing, "offload": offload}
    model, setting = begun(module, method, **how, device=device, loss=loss, accumulate=accumulate)
    return summary(model, taken(model, batch, setting), setting, offload, batch)


def begun(
    module: nn.Module,
    method: Methods = None,
    precision: Any = None,
    optimizer: Any = "adamw",
    checkpointing: bool | GradientCheckpointing = False,
    offload: Offload | None = None,
    device: Device = "cuda",
    loss: Loss | None = None,
    accumulate: int = 1,
) -> tuple[nn.Module, Setting]:
    """The model that takes the step, and how it does; settings of `plan`."""
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise PlanError(f"accumulate={accumulate!r} is not a number of batches: give 1 or more.")
    if device not in DEVICES or offload not in OFFLOADS:
        raise PlanError(f"device={device!r}, offload={offload!r}. Known devices: {DEVICES}; offloads: {OFFLOADS}.")
    how = arithmetic(precision)
    return prepared(module, method, how, checkpointing), Setting(how, optimizer, device, loss, accumulate > 1)


def prepared(module: nn.Module, method: Methods, how: Arithmetic, checkpointing: Any) -> nn.Module:
    """A copy on the meta device, as a Trainer would have it when training begins."""
    if all(p.numel() == 0 for p in module.parameters()):
        raise PlanError(f"This {type(module).__name__} has no parameters yet. Build it first (configure_model, setup).")
    try:
        model = hollow(module, "meta")
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise PlanError(f"This {type(module).__name__} cannot be copied ({error}). Plan it before the run.") from error
    for each in [method] if isinstance(method, Method) else list(method or []):
        each.apply(model)
    how.convert(model)
    if isinstance(checkpointing, GradientCheckpointing):
        checkpoint_blocks(model, checkpointing.blocks, checkpointing.every, checkpointing.preserve_rng_state)
    elif checkpointing:
        checkpoint_blocks(model)
    if not any(p.requires_grad for p in model.parameters()):
        raise PlanError(f"Nothing in this {type(module).__name__} requires a gradient. Give a method.")
    return model


def taken(model: nn.Module, batch: Any, setting: Setting) -> Step:
    """The step; an error in it is told as one of the plan."""
    try:
        return Step(model, batch, setting)
    except PlanError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise PlanError(
            f"A step of this {type(model).__name__} cannot be taken without memory ({type(error).__name__}: {reason}). "
            "It may need values of tensors, a Trainer, or other keys in its batch."
        ) from error


def summary(model: nn.Module, step: Step, setting: Setting, offload: str | None, batch: Any) -> Plan:
    """The numbers of a step."""
    phase, peak = step.peak(offload)
    given = tensors(batch)
    return Plan(
        model=title(model),
        method=", ".join(a.method.info.name for a in state.all_applied(model)) or "full",
        precision=setting.arithmetic.name,
        optimizer=optimizers.named(setting.optimizer),
        batch=" x ".join(map(str, given[0].shape)) if given else "?",
        device=setting.device,
        checkpointing=any(link_of(m) is not None for m in model.modules()),
        offload=offload,
        **counts(model),
        weights=weights(step),
        constants=step.size(CONSTANTS),
        adapters=step.size(ADAPTERS),
        copies=step.size(COPIES),
        gradients=step.size(GRADIENTS),
        optimizer_state=step.size(OPTIMIZER),
        activations=step.activations(),
        phase=phase,
        peak={label: count for label, count in peak.items() if count},
        host=host(step, setting.device, offload),
    )


def title(model: nn.Module) -> str:
    """The class of the model, or of the one that a task is around."""
    inner = getattr(model, "model", None)
    return type(inner if isinstance(inner, nn.Module) and hasattr(model, "training_step") else model).__name__


def counts(model: nn.Module) -> dict[str, int]:
    """Parameters, quantised ones by what they stand for, and those that train."""
    own = {id(p): p.numel() for p in model.parameters()}
    for module in model.modules():
        if isinstance(module, Quantised):
            own[id(module.packed)] = module.features[0] * module.features[1]
    return {
        "parameters": sum(own.values()),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def weights(step: Step) -> dict[str, int]:
    """dtype -> bytes of the base"""
    found: dict[str, int] = defaultdict(int)
    seen: set[int] = set()
    for tensor in (*step.model.parameters(), *step.model.buffers()):
        record = step.tracker.record(tensor)
        if record.label == WEIGHTS and id(record) not in seen:
            seen.add(id(record))
            found[str(tensor.dtype).removeprefix("torch.")] += record.bytes
    return dict(found)


def host(step: Step, device: str, offload: str | None) -> dict[str, int]:
    """Bytes in the host's memory, by name."""
    found: dict[str, int] = {}
    if offload == "optimizer":
        found = {label: step.size(label) for label in (GRADIENTS, OPTIMIZER)}
    if offload == "weights":
        found = step.frozen(step.model.modules())
    if device != "cpu":
        found["copies to undo"] = sum(t.nbytes for t in step.copies)
    return {name: size for name, size in found.items() if size}


# ------------------------------------------------------------------ batches
def text_batch(size: int, length: int, labels: Labels = "tokens") -> dict[str, torch.Tensor]:
    """input_ids, attention_mask (size, length), labels of the same shape or (size,): on the meta device"""
    if size < 1 or length < 1:
        raise PlanError(f"A batch of {size} x {length} tokens: both must be at least 1.")

    def ids(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.long, device="meta")

    batch = {"input_ids": ids(size, length), "attention_mask": ids(size, length)}
    return batch if labels is None else batch | {"labels": ids(size, length) if labels == "tokens" else ids(size)}


def image_batch(size: int, channels: int = 3, height: int = 224, width: int | None = None) -> dict[str, torch.Tensor]:
    """pixel_values (size, channels, height, width) in fp32, labels (size,): on the meta device"""
    if min(size, channels, height) < 1:
        raise PlanError(f"A batch of {size} images of {channels} x {height}: all must be at least 1.")
    pixels = torch.empty(size, channels, height, width or height, device="meta")
    return {"pixel_values": pixels, "labels": torch.empty(size, dtype=torch.long, device="meta")}
