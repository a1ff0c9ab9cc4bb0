"""Surgical Fine-Tuning Improves Adaptation to Distribution Shifts. Lee et al., ICLR 2023.
https://arxiv.org/abs/2210.11466
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_peft.callback import PEFT
from lightning_peft.core import state
from lightning_peft.core.calibration import CalibrationError, on_any_rank, reduced
from lightning_peft.core.fields import FieldError, positive
from lightning_peft.core.gradients import untouched
from lightning_peft.core.method import outside_frozen_networks
from lightning_peft.core.scattered import forget
from lightning_peft.core.sites import Site, find, roles, sites
from lightning_peft.methods.calibrated import quiet, step_of, training_batches

EPS = 1e-8
STAGES = ("layer[1-9]", "stages.[0-9]")  # of convolutional networks: torchvision's and timm's, transformers'


class Surgical(PEFT, name="surgical", family="selective", paper="2210.11466", mergeable=True):
    """train one block: the first for shifted inputs, a middle one for shifted features, the last for shifted outputs

    All in place, the base at step 0; an encoder-decoder counts the encoder's blocks first, and the blocks of a residual
    network are its stages (layer1, ...). Heads train beside it.

    shift: what differs between the base's data and yours. "input": the same things look otherwise (noise, blur, another
    camera or script), the first block trains. "feature": other kinds of the same classes, the middle one. "output":
    what the labels say of the same inputs, the last one. "all": the whole model, for the automatic rates. `layers`
    names other blocks.

    rate: "rgn" (Auto-RGN): each tensor learns at lr ||g|| / ||w||, the mean over `batches` of the training data,
    divided by the largest; a tensor of zeros, which has no such number, at lr. "snr" (Auto-SNR): at lr where the mean
    over entries of mean(g)^2 / Var(g) is `threshold` of the largest or more, else not at all; the variance is over
    batches, as in the paper (over the first axis of g in the authors' code). Both are taken in eval mode at the start
    of every epoch, over what all processes see. Gains and biases of batch norms stay as they are then. The rate scales
    what the optimizer does, its weight decay included. fresh: with the optimizer's state of these tensors forgotten
    each epoch. batches: how many the rates are taken from. threshold: for rate="snr". Source: section 3, appendix B.
    """

    unused = ("targets",)

    shift: Literal["input", "feature", "output", "all"] = "input"
    rate: Literal["same", "rgn", "snr"] = "same"
    batches: int = 5
    threshold: float = 0.95
    fresh: bool = True

    def check(self) -> None:
        positive(self, "batches", "threshold")
        if self.rate == "snr" and self.batches < 2:
            raise FieldError(f"Surgical(rate='snr', batches={self.batches}): a variance needs 2 batches at least.")

    def asked(self, model: nn.Module) -> list[Site] | None:
        if self.shift == "all":
            return None
        known = self.roles | self.stages(model)
        blocks = sites(model, "block", layers=self.layers, exclude=self.exclude, roles=known)
        found = outside_frozen_networks(model, blocks)
        index = {"input": 0, "feature": len(found) // 2, "output": -1}[self.shift]
        return found if self.layers is not None else [found[index]]

    def stages(self, model: nn.Module) -> dict[str, str]:
        """The blocks of a model that has none, where it is a network of convolutions in stages."""
        if "block" in self.roles or "block" in roles(model):
            return {}
        found = next((pattern for pattern in STAGES if find(model, f"{pattern}?")), None)
        return {} if found is None else {"block": found}

    def select(self, name: str, parameter: nn.Parameter) -> bool:
        return parameter.is_floating_point()

    # -------------------------------------------------------------- rates
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.global_step == 0:
            vars(self).update(_rates={}, _rated=None)  # of a run before

    def own(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """What this method trains, by name: those of a method beside it learn at their own rate."""
        chosen = {id(s.parameter) for s in state.get_applied(model, self.name_on_model).selected}
        return {name: p for name, p in state.trainable(model).items() if id(p) in chosen}

    def begin_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.rate == "same" or vars(self).get("_rated") == trainer.current_epoch:
            return
        named = self.own(pl_module)
        batch_norms = [m for m in pl_module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        normed = {id(p) for m in batch_norms for p in m.parameters()}
        rated = {name: p for name, p in named.items() if id(p) not in normed}
        instead = "Leave rate='same', and give the optimizer a group for each tensor."
        with quiet(pl_module), training_batches(self, trainer, pl_module, instead) as given, untouched(pl_module):
            run = step_of(pl_module)
            losses = (run(batch, index) for index, batch in enumerate(given))
            rates = self.rates(list(rated.values()), (loss for loss in losses if loss is not None))
        found = dict.fromkeys(named, 0.0) | dict(zip(rated, rates, strict=True))
        vars(self).update(_rates=found, _rated=trainer.current_epoch)
        if self.fresh:
            forget(named.values(), trainer.optimizers)

    def rates(self, parameters: Sequence[nn.Parameter], losses: Iterable[Tensor]) -> list[float]:
        """A factor for each tensor, from the gradients of each loss; neither values nor .grad change."""
        if not parameters:
            return []
        seen = Norms(parameters) if self.rate == "rgn" else Signal(parameters, self.threshold)
        finite = True
        for loss in losses:
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
            seen.add([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)])
            finite = finite and all(bool(g.isfinite().all()) for g in grads if g is not None)
        if on_any_rank([] if finite and seen.count else ["gradient"]):
            raise CalibrationError(
                f"Surgical(rate={self.rate!r}): {seen.count} batches gave no loss, or infinite gradients. Give batches "
                "whose training_step returns a finite loss."
            )
        return seen.rates()

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        rates = vars(self).get("_rates", {})
        slow = {n: p for n, p in self.own(pl_module).items() if rates.get(n, 1.0) != 1.0} if rates else {}
        if "_before" not in vars(self):  # an optimizer may take several steps of a batch
            vars(self)["_before"] = [(p, p.detach().clone(), rates[n]) for n, p in slow.items()]

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        for p, before, rate in vars(self).pop("_before", []):
            p.copy_(before + rate * (p - before) if rate else before)
        super().on_train_batch_end(trainer, pl_module, *args)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "rates": vars(self).get("_rates", {}), "rated": vars(self).get("_rated")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        vars(self).update(_rates=state_dict.get("rates", {}), _rated=state_dict.get("rated"))


class Norms:
    """Auto-RGN: mean over batches of ||g|| / ||w|| of each tensor, by the largest."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters, self.count = parameters, 0
        self.totals = torch.zeros(len(parameters), dtype=torch.float64, device=parameters[0].device)

    def add(self, grads: Sequence[Tensor]) -> None:
        self.count += 1
        self.totals += self.totals.new_tensor([float(g.double().norm()) for g in grads])

    def rates(self) -> list[float]:
        totals, count = reduced([self.totals, self.totals.new_tensor(self.count)])
        means = (totals / count).tolist()
        norms = [float(p.detach().double().norm()) for p in self.parameters]
        found = [mean / norm if norm else None for mean, norm in zip(means, norms, strict=True)]
        largest = max((r for r in found if r is not None), default=0.0) or 1.0
        return [1.0 if r is None else r / largest for r in found]


class Signal:
    """Auto-SNR: 1 where the mean over entries of mean(g)^2 / Var(g), by the largest, reaches the threshold, else 0.

    Means and sums of squared deviations over batches as they come (Welford), two numbers an entry.
    """

    def __init__(self, parameters: Sequence[Tensor], threshold: float) -> None:
        self.threshold, self.count = threshold, 0
        self.means = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        self.squares = [torch.zeros_like(mean) for mean in self.means]

    def add(self, grads: Sequence[Tensor]) -> None:
        self.count += 1
        for mean, square, g in zip(self.means, self.squares, grads, strict=True):
            away = g.float() - mean
            mean += away / self.count
            square += away * (g.float() - mean)

    def rates(self) -> list[float]:
        (whole,) = reduced([torch.tensor(self.count, device=self.means[0].device)])
        count = int(whole)
        if count < 2:
            raise CalibrationError("Surgical(rate='snr'): a variance needs 2 batches at least, and the data have one.")
        found = [self.ratio(mean, square, count) for mean, square in zip(self.means, self.squares, strict=True)]
        largest = max(found, default=0.0) or 1.0
        return [float(r / largest >= self.threshold) for r in found]

    def ratio(self, mean: Tensor, square: Tensor, count: int) -> float:
        """Over `count` batches of all processes."""
        whole = reduced([mean * self.count])[0] / count
        variance = reduced([square + self.count * (mean - whole).square()])[0] / (count - 1)
        return float((whole.square() / (variance + EPS)).double().mean())
