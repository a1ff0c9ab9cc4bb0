"""Precisions: Lightning's names, those of conf/precision, and plugins; what each does to a model and to a step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_peft.core import state
from lightning_peft.core.quantised import is_quantised
from lightning_peft.planning.sizes import PlanError

BITS = {"bf16": torch.bfloat16, "16": torch.float16, "fp16": torch.float16}
QUANTISED = ("nf4", "fp4", "int8", "int4", "int3", "int2")
NAMES = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", *QUANTISED)
SHORT = {"32": "32-true", "fp32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed", "fp16": "16-mixed"}
SHORT |= {"fp16-mixed": "16-mixed", "fp16-true": "16-true", "fp32-true": "32-true"}


@dataclass(frozen=True)
class Arithmetic:
    """cast: what weights become (None: they stay); autocast: of the forward; plugin: an `NF4Precision`."""

    name: str
    cast: torch.dtype | None = None
    autocast: torch.dtype | None = None
    plugin: Any = None

    def convert(self, module: nn.Module) -> None:
        """What the plugin of a Trainer does to the module, on the meta device."""
        if self.plugin is not None:
            from lightning_peft.precision import quantise

            if not any(is_quantised(m) for m in state.base_modules(module)):
                p = self.plugin
                quantise(module, p.settings, targets=p.targets, skip=p.skip, allow_meta=True)
            self.plugin.cast_rest(module)
        if self.cast is not None:
            module.to(self.cast)

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Around the forward pass."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.cast or before)
        try:
            with torch.autocast("cpu", self.autocast, enabled=self.autocast is not None):
                yield
        finally:
            torch.set_default_dtype(before)


def arithmetic(precision: Any) -> Arithmetic:
    """A name, a plugin or None (weights as they are, products in their dtype) -> what it does"""
    if precision is None:
        return Arithmetic("as it is")
    if hasattr(precision, "prepare_base"):
        return quantising(precision)
    given = str(getattr(precision, "precision", precision)).replace("_", "-")
    name = SHORT.get(given, given)
    if name not in NAMES:
        raise PlanError(f"precision={precision!r} is unknown. Known: {', '.join(NAMES)}, or an NF4Precision.")
    if name in QUANTISED:
        from lightning_peft.precision import NF4Precision

        return quantising(NF4Precision(mode=name))  # type: ignore[arg-type]
    bits, _, kind = name.partition("-")
    dtype = BITS.get(bits)
    return Arithmetic(name, cast=dtype) if kind == "true" else Arithmetic(name, autocast=dtype)


def quantising(plugin: Any) -> Arithmetic:
    """What `NF4Precision` does."""
    dtype = plugin.settings.compute_dtype if plugin.mixed else None
    return Arithmetic(plugin.settings.mode, autocast=dtype, plugin=plugin)
