"""Exact resume: the interrupted run continues with the batches, in the order and with the random numbers it would
have had.

Lightning restores counters, weights and optimizers; in mid-epoch a plain DataLoader then starts over, and no
generator is restored. This adds both: the state of the generators when the epoch's iterator was made and when the
checkpoint was saved.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.data import _set_sampler_epoch


def rng_state() -> dict[str, Any]:
    """State of the generators of torch, CUDA, Python and NumPy (where it is imported) as tensors and plain types."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": _to_lists(random.getstate())}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if numpy := _numpy():
        name, keys, *rest = numpy.random.get_state()
        state["numpy"] = [name, torch.from_numpy(keys.astype("int64")), *rest]
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(_to_tuples(state["python"]))
    if "cuda" in state and torch.cuda.is_available():
        for device, value in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(value, device)
    if "numpy" in state and (numpy := _numpy()):
        name, keys, *rest = state["numpy"]
        numpy.random.set_state((name, keys.numpy().astype("uint32"), *rest))


def seed_generators(seed: int, more: Iterable[torch.Generator] = ()) -> None:
    """All of the process, and `more`, from one number; Lightning's own function would note it for the whole run."""
    torch.manual_seed(seed)
    random.seed(seed)
    if numpy := _numpy():
        numpy.random.seed(seed % 2**32)
    for generator in more:
        generator.manual_seed(seed)


def _numpy() -> Any:
    import sys

    return sys.modules.get("numpy")


def _to_lists(value: Any) -> Any:
    return [_to_lists(item) for item in value] if isinstance(value, tuple) else value


def _to_tuples(value: Any) -> Any:
    return tuple(_to_tuples(item) for item in value) if isinstance(value, list) else value


def gathered(value: Any) -> list[Any]:
    """One entry a rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, value)
    return out


class ExactResume:
    """Follows one `fit`; a checkpoint holds its `state_dict`."""

    def __init__(self) -> None:
        self.epoch_start: dict[str, Any] | None = None
        self.loaded: dict[str, Any] | None = None
        self.fresh_iterator = False
        self.over: tuple[dict[str, Any] | None, int] | None = None
        self.trainer: pl.Trainer | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"now": gathered(self.here()), "epoch_start": gathered(self.epoch_start)}

    def here(self) -> dict[str, Any]:
        """The generators of the process, and those that loaders and samplers have of their own."""
        return {**rng_state(), "loaders": [generator.get_state() for generator in loader_generators(self.trainer)]}

    def go_back(self, state: dict[str, Any]) -> None:
        set_rng_state(state)
        for generator, value in zip(loader_generators(self.trainer), state.get("loaders", []), strict=False):
            generator.set_state(value)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state

    def install(self, trainer: pl.Trainer) -> None:
        """From here on, note the generators whenever Lightning makes the training iterator."""
        self.trainer, loop = trainer, trainer.fit_loop
        before_iterator = type(loop)._load_combined_loader_states

        def noted() -> None:
            self._before_iterator(trainer)
            before_iterator(loop)

        loop._load_combined_loader_states = noted  # type: ignore[method-assign]

    @staticmethod
    def uninstall(trainer: pl.Trainer) -> None:
        vars(trainer.fit_loop).pop("_load_combined_loader_states", None)

    def _before_iterator(self, trainer: pl.Trainer) -> None:
        if self.loaded is not None:
            kind = "epoch_start" if processed(trainer) else "now"
            if (state := self._mine(trainer, kind)) is not None:
                self.go_back(state)
        self.epoch_start, self.fresh_iterator = self.here(), True

    def _mine(self, trainer: pl.Trainer, kind: str) -> dict[str, Any] | None:
        """This rank's state; the ranks of a larger world than the saved one start from their own."""
        states = self.loaded[kind] if self.loaded else []
        return states[trainer.global_rank] if trainer.global_rank < len(states) else None

    def on_train_start(self, trainer: pl.Trainer) -> None:
        """Skip the batches that were trained on before the interruption."""
        done = processed(trainer)
        if begins_untold(trainer):
            self.fresh_iterator = False
            self.over = None if done else (self._mine(trainer, "now"), ready(trainer))
        if self.loaded is None or not done:
            self.loaded = None
            return
        fetcher = trainer.fit_loop._data_fetcher
        if not _stateful(trainer):
            for loader in trainer.fit_loop._combined_loader.flattened:  # type: ignore[union-attr]
                _set_sampler_epoch(loader, trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
            for _ in range(done):
                next(fetcher)  # type: ignore[arg-type]
            fetcher.fetched = 0  # type: ignore[union-attr]  # the loop adds what it has done
        if (state := self._mine(trainer, "now")) is not None:
            self.go_back(state)
        self.loaded = None

    def on_train_epoch_start(self, trainer: pl.Trainer) -> None:
        """After an epoch that was over when it was saved: Lightning made an iterator for it, and now makes another."""
        (now, count), self.over = self.over or (None, 0), None
        if now is not None and ready(trainer) == count:
            self.go_back(now)
        if not self.fresh_iterator:
            self.epoch_start = self.here()
        self.fresh_iterator = False


def loader_generators(trainer: pl.Trainer | None) -> list[torch.Generator]:
    """Generators that were given to the training loaders or their samplers; each once, in a fixed order."""
    combined = None if trainer is None else trainer.fit_loop._combined_loader
    found: dict[int, torch.Generator] = {}
    for loader in [] if combined is None else combined.flattened:
        samplers = [getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
        samplers.append(getattr(samplers[1], "sampler", None))
        for holder in (loader, *samplers):
            if isinstance(generator := getattr(holder, "generator", None), torch.Generator):
                found.setdefault(id(generator), generator)
    return list(found.values())


def ready(trainer: pl.Trainer) -> int:
    """Batches that were begun so far, of all epochs."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.ready


def processed(trainer: pl.Trainer) -> int:
    """Batches of the current epoch that were trained on; 0 where the epoch is over."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    return 0 if progress.is_last_batch else progress.current.processed


def begins_untold(trainer: pl.Trainer) -> bool:
    """Whether a resumed run goes on in an epoch, be it at its very start, for which `on_train_epoch_start` is skipped.

    The latter is so for a checkpoint that was made in the last batch of the epoch before.
    """
    loop = trainer.fit_loop
    return loop.restarted_mid_epoch or loop.restarted_on_epoch_end


def _stateful(trainer: pl.Trainer) -> bool:
    """Whether the loaders bring back their own position (torchdata's StatefulDataLoader and its like)."""
    loaders = trainer.fit_loop._combined_loader.flattened  # type: ignore[union-attr]
    return any(hasattr(loader, "load_state_dict") for loader in loaders)
