"""What a plan says, as numbers and as a table for people."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_peft.planning.sizes import CARDS, CONTEXT, FRAGMENTATION, UNITS, need, number, parse, show, unit
from lightning_peft.planning.tracker import (
    ACTIVATIONS,
    ADAPTERS,
    CONSTANTS,
    COPIES,
    GRADIENTS,
    OPTIMIZER,
    TEMPORARIES,
    WEIGHTS,
)


@dataclass(frozen=True)
class Plan:
    """Bytes of one training step on one device, and on the host beside it.

    weights: of the base by dtype, codes of quantised ones and buffers included; constants: scales of quantised weights;
    adapters: parameters and buffers of the methods; copies: masks, and what they hold; activations: what lives from the
    forward to the backward pass, the batch included; gradients, optimizer_state: complete. peak: what lived at the one
    moment when most lived, by the same names, "temporaries" beside them; its sum is the total. host: what is offloaded,
    and copies of base parameters that train, for `remove`.
    """

    model: str
    method: str
    precision: str
    optimizer: str
    batch: str
    device: str
    checkpointing: bool
    offload: str | None
    parameters: int
    trained: int
    weights: dict[str, int]
    constants: int
    adapters: int
    copies: int
    gradients: int
    optimizer_state: int
    activations: int
    phase: str
    peak: dict[str, int]
    host: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes on the device at the peak."""
        return sum(self.peak.values())

    @property
    def temporaries(self) -> int:
        """Bytes at the peak that nobody keeps: results still needed (recomputed ones too), and those in the making."""
        return self.peak.get(TEMPORARIES, 0)

    def fits(self, size: str | int) -> bool:
        """Whether a device with this much memory ("24GiB", "80GB", bytes) holds it, the reserve of `sizes` included."""
        return need(self.total) <= parse(size)

    @property
    def cards(self) -> list[int]:
        """The common cards, by the GB printed on them, that hold it."""
        return [card for card in CARDS if self.fits(card * 10**9)]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "temporaries": self.temporaries, "total": self.total, "cards": self.cards}

    @property
    def rows(self) -> list[tuple[str, int | None, int]]:
        """(name, bytes, bytes at the peak)"""
        sizes: dict[str, int | None] = {
            WEIGHTS: sum(self.weights.values()),
            CONSTANTS: self.constants,
            ADAPTERS: self.adapters,
            COPIES: self.copies,
            GRADIENTS: self.gradients,
            OPTIMIZER: self.optimizer_state,
            ACTIVATIONS: self.activations,
            TEMPORARIES: None,
        }
        return [(name, size, self.peak.get(name, 0)) for name, size in sizes.items()]

    def __str__(self) -> str:
        return "\n".join([*head(self), *table(self), *foot(self)])


def head(plan: Plan) -> list[str]:
    """What was planned."""
    share = 100 * plan.trained / max(plan.parameters, 1)
    how = [plan.precision, plan.optimizer, f"batch {plan.batch}"]
    how += ["gradient checkpointing"] if plan.checkpointing else []
    how += [f"{plan.offload} on the host"] if plan.offload else []
    trains = f"{plan.method} trains {number(plan.trained)} ({share:.2f} %)"
    return [f"{plan.model}, {number(plan.parameters)} parameters; {trains}", f"{', '.join(how)}; for {plan.device}", ""]


def table(plan: Plan) -> list[str]:
    """A line for each kind of memory that there is."""
    decimal, _, form = unit(plan.total)

    def cell(count: int | None) -> str:
        return "" if count is None else f"{count / UNITS[decimal]:,{form}}"

    lines = [f"{'':<24}{decimal:>10}{'at the peak':>14}"]
    for name, size, peak in plan.rows:
        if size or peak:
            lines.append(f"{name:<24}{cell(size):>10}{cell(peak):>14}   {note(plan, name)}".rstrip())
    lines.append(f"{'total':<24}{'':>10}{cell(plan.total):>14}   {show(plan.total)}, {plan.phase}")
    return lines + [f"{f'host: {name}':<24}{cell(size):>10}" for name, size in plan.host.items()]


def note(plan: Plan, name: str) -> str:
    """What the line of this name consists of."""
    if name != WEIGHTS:
        return ""
    parts = sorted(plan.weights.items(), key=lambda item: -item[1])
    shares = {kind: 100 * size / max(sum(plan.weights.values()), 1) for kind, size in parts}
    return ", ".join(f"{kind} {share:.0f} %" for kind, share in shares.items() if share >= 0.5)


def foot(plan: Plan) -> list[str]:
    """Where it fits."""
    if plan.device == "cpu":
        return []
    not_there = [card for card in CARDS if card not in plan.cards]
    fits = f"fits cards of {', '.join(map(str, plan.cards))} GB" if plan.cards else "fits no common card"
    fits += f"; not {', '.join(map(str, not_there))}" if plan.cards and not_there else ""
    reserve = f"{CONTEXT / 10**9:.1f} GB for the CUDA context and {100 * FRAGMENTATION:.0f} % for fragmentation"
    return [f"{fits} (reserve: {reserve}; GB = 10^9 bytes)"]
