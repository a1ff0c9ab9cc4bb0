"""Selective tuning: identify what matters, select within a budget, train exactly that. Lialin, Deshpande, Rumshisky,
Scaling Down to Scale Up, 2023 (section on selective methods). https://arxiv.org/abs/2303.15647
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_peft.callback import PEFT, LifeCycleError, wrap_anew
from lightning_peft.core import heat_map, state
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.budget import in_steps
from lightning_peft.core.calibration import Run, call, plain_run
from lightning_peft.core.candidates import candidates, placed
from lightning_peft.core.fields import FieldError, not_negative, positive
from lightning_peft.core.method import DTYPES, Scope, head_modules
from lightning_peft.core.restart import optimizers_of
from lightning_peft.core.scattered import Entries, Scattered, Slice, forget, place_dtype
from lightning_peft.core.scores import FROM_DATA, Choice, Chooser, Over, Scores, Within, watch
from lightning_peft.core.sites import Site, Sites, TargetError
from lightning_peft.extra_loss import PLACE
from lightning_peft.methods.calibrated import quiet, step_of, training_batches

log = logging.getLogger("lightning_peft")
Score = Literal["magnitude", "gradient", "sensitivity", "fisher", "movement", "relative", "change", "random"]


class SelectiveTuning(PEFT, name="selective", family="selective", paper="2303.15647", mergeable=True):
    """theta = theta_0 + m * v, m of zeros and ones: what a score finds within a budget trains, nothing else moves

    v is kept as a vector of the chosen entries, from zero: the base at step 0. Its gradient, the moments of an
    optimizer and files are of the chosen entries only, and theta_0 itself is never written to. Weight decay draws v to
    zero, not theta. targets: modules whose own parameters are candidates, or slices of packed ones ("q,v"); "*" for
    every one but heads that train. A tensor that is tied to one left out is left out.

    score: "magnitude" |t|, "gradient" |g|, "sensitivity" |t g|, "movement" -t g, "relative" |g| / |t|, "fisher" the
    mean of g^2 over `samples` single examples, "change" |t - t_0| after a share `priming` of the run (or so many steps)
    in which every candidate trains, with `l1` times their mean |t - t_0| added to the loss, or "random". g is the mean
    over `batches` of the training data, seen at the start of `fit` or given to `identify`; none is chosen before.
    expect: for "fisher", the squares are averaged over the labels, too, by the model's own p(y|x), and not taken of the
    given one.
    over: single weights, or rows (an output of a module with its bias), tensors, blocks as a whole, by the mean of
    their scores (mean=False: the sum). select: the "top" ones, or those above a `threshold`, within the budget.
    within: of all together, or of each block or tensor by its size. budget: a share of the candidates, a number of
    parameters or of bytes in a file (measure); the nearest whole number, equal scores by their place; units that do
    not fit are passed over. heads_in_budget: heads that train take their part of it.
    every: epochs after which scores and choice are made anew; what leaves the choice goes back to the base. heat_map: a
    picture and a table of the scores, layers by modules, go to the directory of the run, and to W&B.
    """

    targets: str | list[str] | None = "*"
    score: Score = "sensitivity"
    select: Literal["top", "threshold"] = "top"  # type: ignore[assignment]
    budget: float = 0.005
    measure: Literal["share", "parameters", "bytes"] = "share"
    threshold: float = 0.0
    within: Within = "model"
    over: Over = "weights"
    mean: bool = True
    heads_in_budget: bool = False
    batches: int = 8
    samples: int = 1024
    expect: bool = False
    priming: float = 0.5
    l1: float = 0.0
    every: int = 0
    heat_map: bool = True

    @property
    def scope(self) -> Scope:
        return "nothing"  # adapters do it; `select` is a field here

    def check(self) -> None:
        positive(self, "budget", "batches", "samples", "priming")
        not_negative(self, "l1", "every")
        name = type(self).__name__
        if self.measure == "share" and self.budget > 1:
            raise FieldError(f"{name}(budget={self.budget}): expected a share up to 1, or measure='parameters'.")
        if self.every and self.score == "change":
            raise FieldError(f"{name}(every={self.every}): score='change' needs a run of its own for each choice.")
        if self.expect and self.score != "fisher":
            raise FieldError(f"{name}(expect=True) is for score='fisher', and this is {self.score!r}. Leave it out.")
        if self.l1 and self.score != "change":
            raise FieldError(f"{name}(l1={self.l1}) is for score='change', where every candidate trains. Leave it out.")
        if (self.over, self.within) in (("tensors", "tensor"), ("blocks", "tensor"), ("blocks", "block")):
            raise FieldError(f"{name}(over={self.over!r}, within={self.within!r}): one unit is all there is.")

    # -------------------------------------------------------------- what may train
    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        heads = head_modules(sites.model, self)
        chosen, slices = candidates(sites, heads, self.left_out(sites.model))
        tensors = {id(p): p for _, named in chosen for p in named.values() if p.is_floating_point()}
        if not tensors:
            raise TargetError(
                f"{type(self).__name__}(targets={self.targets!r}) finds no tensor of floating-point numbers that is "
                "neither in a head nor tied to one left out. Name projections, norms or embeddings, or '*'."
            )
        own = {id(p): p for head in heads.values() for p in head.parameters()}
        parts = {number: slices[key] for number, key in enumerate(tensors) if key in slices}
        sizes, kind = [p.numel() for p in tensors.values()], self.score
        total = sum(parts[number].size if number in parts else size for number, size in enumerate(sizes))
        place, change = place_dtype(sum(sizes)), DTYPES.get(self.dtype, next(iter(tensors.values())).dtype)
        count = self.count(total, list(own.values()), place.itemsize + change.itemsize)
        known = count if self.over == "weights" and self.select == "top" else 0
        entries = self.entries(sizes, total if kind == "change" else known, parts)
        entries.dense = kind == "change"
        threshold = self.threshold if self.select == "threshold" else None
        chooser = Chooser(entries, kind, Choice(count, self.over, self.within, threshold, self.mean), self.seed)
        yield from placed(self.scatter, chosen, tensors, entries, chooser)

    def left_out(self, model: nn.Module) -> Iterable[nn.Module]:
        """Modules that are no candidates, by what they are and not by their name."""
        return ()

    def entries(self, sizes: list[int], count: int, slices: dict[int, Slice]) -> Entries:
        """What all adapters share."""
        entries = Entries(sizes, count, slices)
        entries.l1 = self.l1
        return entries

    def scatter(self, entries: Entries, names: dict[str, int], shapes: dict[str, torch.Size]) -> Scattered:
        """The adapter at one module."""
        return Scattered(entries, names, shapes)

    def count(self, total: int, heads: list[nn.Parameter], entry: int) -> int:
        """How many entries the budget has room for; entry: bytes that one takes in a file, its place and its change."""
        within = heads if self.heads_in_budget else []
        own = sum(p.numel() for p in within)
        if self.measure == "bytes":
            count = (int(self.budget) - sum(p.nbytes for p in within)) // entry
        else:
            count = (round(self.budget * (total + own)) if self.measure == "share" else int(self.budget)) - own
        if not 0 < count <= total:
            taken = f" beside {own} of heads" if self.heads_in_budget else ""
            raise TargetError(
                f"{type(self).__name__}(budget={self.budget}, measure={self.measure!r}) leaves room for {count} of "
                f"{total} entries{taken}. Choose another budget, or other targets."
            )
        return count

    # -------------------------------------------------------------- identify and select
    def chooser(self, model: nn.Module) -> Chooser:
        """Candidates and choice of this method on a model."""
        adapter: Any = state.get_applied(model, self.name_on_model).placements[0].adapter
        return adapter.chooser

    def identify(
        self, model: nn.Module, batches: Iterable[Any] = (), run: Run | None = None, optimizers: Iterable[Any] = ()
    ) -> Scores:
        """Score by these batches and choose anew; before `fit`, or without a Trainer. The scores, flat, by candidate.

        run(batch, index) -> loss; by default a LightningModule's training_step, else the model's own call. With
        `expect`, run(batch, index) -> logits; by default the LightningModule's predictions(batch), else those of the
        model's output. Weights, gradients, buffers, modes and random numbers are what they were. optimizers: whose
        moments of v are to follow.
        """
        chooser, found = self.chooser(model), list[Tensor]()
        if self.score in FROM_DATA:
            samples = self.samples if self.score == "fisher" else None
            lightning = isinstance(model, pl.LightningModule) and run is None
            run = run or (logits_of(model) if self.expect else step_of(model) if lightning else plain_run(model))  # type: ignore[arg-type]
            with isolate_rng(), quiet(model) if lightning else nullcontext():  # type: ignore[arg-type]
                found, _ = watch(model, chooser.candidates, batches, run, samples, self.expect)
        if self.score == "change":
            return self.by_change(model)
        return chooser.choose(found, optimizers)

    @torch.no_grad()
    def by_change(self, model: nn.Module) -> Scores:
        """End the run in which every candidate trains: choose, and put heads back, too, where all goes back."""
        chooser = self.chooser(model)
        if not chooser.keep:
            for head in state.get_applied(model, self.name_on_model).selected:
                head.parameter.copy_(head.original)  # type: ignore[arg-type]
        return chooser.by_change()

    # -------------------------------------------------------------- in a run
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        entries = self.chooser(pl_module).entries
        if trainer.global_step == 0:
            vars(self).update(_steps=0, _chosen=-1)
        if self.score == "change" and entries.dense:
            vars(self)["_switch"] = self.switch_at(trainer)
        if not entries.settled and not entries.dense:
            self.renew(trainer, pl_module)
        elif any(not p.numel() for p in entries.parameters()):
            wrap_anew(trainer, pl_module)  # loaded after DDP was told what takes part

    def begin_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch
        if self.every and epoch and epoch % self.every == 0 and vars(self).get("_chosen") != epoch:
            vars(self)["_chosen"] = epoch
            self.renew(trainer, pl_module)

    def renew(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Score on training data and choose."""
        entries, seen = self.chooser(pl_module).entries, copy.copy(self)
        optimizers = optimizers_of(trainer.optimizers, [entries.v])
        if self.score == "fisher":
            seen.batches = self.samples
        given: AbstractContextManager[Iterable[Any]] = nullcontext(())
        if self.score in FROM_DATA:
            given = training_batches(seen, trainer, pl_module)
        with resized(trainer, pl_module, entries), given as batches:
            scores = self.identify(pl_module, batches, optimizers=optimizers)
        self.draw_scores(trainer, pl_module, scores)

    def switch_at(self, trainer: pl.Trainer) -> int:
        """The optimizer step after which the choice is made."""
        return end_of(f"{type(self).__name__}(priming={self.priming})", self.priming, trainer)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if optimizers_of([optimizer], [self.chooser(pl_module).entries.v]):
            vars(self)["_steps"] = self.steps + 1

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *rest)
        chooser = self.chooser(pl_module)
        if chooser.entries.dense and self.steps >= vars(self).get("_switch", math.inf):
            with resized(trainer, pl_module, chooser.entries):
                scores = self.by_change(pl_module)
            heads = state.get_applied(pl_module, self.name_on_model).selected
            forget([*chooser.entries.parameters(), *(head.parameter for head in heads)], trainer.optimizers)
            self.draw_scores(trainer, pl_module, scores)

    @property
    def steps(self) -> int:
        """Optimizer steps of this run so far."""
        return vars(self).get("_steps", 0)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "steps": self.steps, "chosen": vars(self).get("_chosen", -1)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        vars(self).update(_steps=state_dict["steps"], _chosen=state_dict["chosen"])

    # -------------------------------------------------------------- a picture
    def draw_scores(self, trainer: pl.Trainer, pl_module: pl.LightningModule, scores: Scores) -> None:
        """The mean score of each tensor and the share of it that trains, layers by modules: tables and a picture."""
        chooser = self.chooser(pl_module)
        log.info("%s: %d of %d entries train", self.name_on_model, len(chooser.entries.v), chooser.entries.total)
        directory = Path(trainer.log_dir or trainer.default_root_dir)  # asks all ranks
        if not self.heat_map or not trainer.is_global_zero:
            return
        named = [(c.block, f"{c.name}.{c.attribute}", c) for c in chooser.candidates]
        sums = [float(s.double().sum()) for s in scores]
        table = heat_map.table((block, name, one, c.size) for (block, name, c), one in zip(named, sums, strict=True))
        chosen = heat_map.table((block, name, c.chosen, c.size) for block, name, c in named)
        picture = heat_map.write(directory, self.name_on_model, str(self.score), table, chosen)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                import wandb

                logger.experiment.log({f"{self.name_on_model}/scores": wandb.Html(picture, inject=False)})


def logits_of(model: nn.Module) -> Run:
    """What a model predicts of a batch."""
    predictions: Any = getattr(model, PLACE, None)
    if predictions is None and isinstance(model, pl.LightningModule):
        raise LifeCycleError(
            f"expect=True needs logits, and {type(model).__name__} has no predictions(batch) -> (logits, labels). Give "
            "it one, or call identify(module, batches, run) before fit, run(batch, index) -> logits."
        )

    def run(batch: Any, index: int) -> Tensor | None:
        if predictions is not None:
            return predictions(batch)[0]
        out = call(model, batch)
        return out if isinstance(out, Tensor) else getattr(out, "logits", None)

    return run


@contextmanager
def resized(trainer: pl.Trainer, pl_module: pl.LightningModule, entries: Entries) -> Iterator[None]:
    """Within it, parameters may come to another size."""
    before = [p.shape for p in entries.parameters()]
    yield
    if [p.shape for p in entries.parameters()] != before:
        wrap_anew(trainer, pl_module)


def end_of(name: str, priming: float, trainer: pl.Trainer) -> int:
    """The optimizer step with which a priming ends, a share of the run or a number of steps."""
    steps = trainer.estimated_stepping_batches
    if priming < 1 and not math.isfinite(steps):
        raise LifeCycleError(
            f"{name} is a share of a run without an end. Give it in steps, or the Trainer max_steps or max_epochs."
        )
    end = max(1, in_steps(priming, steps))
    if end > steps:
        log.warning("%s: the run ends after %d steps, and nothing is chosen: everything trains", name, steps)
    return end
