"""Terms of the loss that a method adds because it has to see outputs: `PEFT.extra_loss(outputs, batch)`.

A LightningModule says where its logits are by a method `predictions(batch) -> (logits, labels)` that its training_step
calls: logits (rows, classes) of what the loss is of, and nothing else (no padding, no prompt), labels (rows,).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

PLACE = "predictions"


class NoPredictionsError(RuntimeError):
    """A module that does not say where its logits are."""


@dataclass(frozen=True)
class Predictions:
    """What one pass of a batch gave: logits (rows, classes), labels (rows,); `again` makes another pass."""

    logits: Tensor
    labels: Tensor
    call: Callable[[], tuple[Tensor, Tensor]]

    def again(self) -> Predictions:
        """Another pass of the same batch: other dropout, other random choices, a graph of its own."""
        return Predictions(*self.call(), self.call)


def check_module(pl_module: pl.LightningModule, method: str) -> None:
    """Raise where the hook could not work."""
    if not callable(getattr(pl_module, PLACE, None)):
        raise NoPredictionsError(
            f"{method} adds to the loss what it takes from logits, and {type(pl_module).__name__} does not say where "
            "they are. Give it a method predictions(batch) -> (logits (rows, classes), labels (rows,)), and use it in "
            "training_step."
        )
    if not pl_module.automatic_optimization:
        raise NoPredictionsError(
            f"{method} adds to the loss that training_step returns, and {type(pl_module).__name__} makes optimizer "
            "steps of its own (automatic_optimization=False). Add method.extra_loss(outputs, batch) in the step itself."
        )


def install(pl_module: pl.LightningModule, terms: Mapping[str, Callable[[Predictions, Any], Tensor | None]]) -> None:
    """Let training_step return its loss plus these, name -> term; until `uninstall`."""
    step = pl_module.training_step

    @functools.wraps(step)  # Lightning looks at the arguments of what is wrapped
    def training_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
        with noted(pl_module) as seen:
            out = step(batch, *args, **kwargs)
        if out is None:
            return None
        if not seen:
            raise NoPredictionsError(
                f"training_step of {type(pl_module).__name__} did not call its predictions(batch), which {list(terms)} "
                "need to see. Take logits and labels from there."
            )
        return plus(out, added(pl_module, terms, seen[0], batch))

    pl_module.training_step = training_step  # type: ignore[method-assign]


def uninstall(pl_module: pl.LightningModule) -> None:
    """Take it away again."""
    vars(pl_module).pop("training_step", None)


@contextmanager
def noted(pl_module: pl.LightningModule) -> Iterator[list[Predictions]]:
    """What `predictions` gives meanwhile."""
    seen: list[Predictions] = []
    predictions: Any = getattr(pl_module, PLACE)

    def note(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        call = functools.partial(predictions, *args, **kwargs)
        logits, labels = call()
        seen.append(Predictions(logits, labels, call))
        return logits, labels

    setattr(pl_module, PLACE, note)
    try:
        yield seen
    finally:
        delattr(pl_module, PLACE)


def added(pl_module: pl.LightningModule, terms: Mapping[str, Any], outputs: Predictions, batch: Any) -> Tensor | None:
    """The sum of the terms, each logged under its name."""
    total: Tensor | None = None
    for name, term in terms.items():
        if (value := term(outputs, batch)) is not None:
            pl_module.log(f"{name}/extra_loss", value.detach())
            total = value if total is None else total + value
    return total


def plus(out: Any, extra: Tensor | None) -> Any:
    """What training_step returned, with more loss."""
    if extra is None:
        return out
    return {**out, "loss": out["loss"] + extra} if isinstance(out, Mapping) else out + extra
