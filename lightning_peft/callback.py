"""PEFT: a method as a Lightning callback. The life cycle in a Trainer, once for all methods."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_peft import checkpoint
from lightning_peft.core import state
from lightning_peft.core.method import Method, NothingToTrainError, freeze
from lightning_peft.extra_loss import Predictions, check_module, install, uninstall
from lightning_peft.resume import ExactResume, begins_untold, processed

log = logging.getLogger("lightning_peft")
IGNORED = "_ddp_params_and_buffers_to_ignore"  # where DDP looks
PLAIN_STRATEGIES = (SingleDeviceStrategy, DDPStrategy)


class LifeCycleError(RuntimeError):
    """The Trainer, the strategy or the model is used in a way that would train the wrong thing."""


class PEFT(Method, Callback):
    """A method that is put into a model by `Trainer(callbacks=[...])`, or by `apply(model)` without a Trainer.

    Order: the module is built (`__init__`, `setup`, `configure_model`) -> adapters go in, the base is frozen ->
    weights are restored -> the strategy moves and wraps -> optimizers are made. Idempotent over fit, validate, test
    and predict.
    """

    @property
    def adds_loss(self) -> bool:
        """Whether `extra_loss` has something to add."""
        return type(self).extra_loss is not PEFT.extra_loss

    # -------------------------------------------------------------- injection
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        check_strategy(trainer.strategy)
        check_callbacks(trainer)
        lend(trainer.strategy, pl_module)
        patches: list[Any] = vars(pl_module).setdefault("_peft_pending", [])
        if not patches:
            build = pl_module.configure_model

            def configure_model() -> None:  # no functools.wraps: is_overridden follows __wrapped__ and would skip it
                build()
                inject(pl_module)
                quantise_base(trainer, pl_module)
                if stage == "fit":
                    check_something_trains(pl_module)
                leave_frozen_alone(trainer.strategy, pl_module)

            pl_module.configure_model = configure_model  # type: ignore[method-assign]
        if self not in patches:
            patches.append(self)

    def extra_loss(self, outputs: Predictions, batch: Any) -> Tensor | None:
        """A scalar to add to the loss of `training_step`, for methods that have to see outputs; None for none."""
        return None

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        unpatch(pl_module)
        ExactResume.uninstall(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        unpatch(pl_module)
        ExactResume.uninstall(trainer)

    @property
    def name_on_model(self) -> str:
        return self.label or self.info.name

    @property
    def state_key(self) -> str:
        """By label; before the first run by instance, so that a label given twice is our error and not the
        Trainer's.
        """
        return f"lightning_peft.{self.name_on_model if '_module' in vars(self) else id(self)}"

    # -------------------------------------------------------------- audit
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        audit(trainer, pl_module)
        if self._leads(pl_module):
            vars(self).update(_masks=any(True for _ in state.masked(pl_module)), _checked_gradients=False)
            self._resume.install(trainer)
            add_losses(trainer, pl_module)
            announce(trainer, pl_module)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._leads(pl_module):
            return
        if vars(self)["_masks"]:
            state.mask_gradients(pl_module)
        if not vars(self).get("_checked_gradients"):
            vars(self)["_checked_gradients"] = True
            warn_without_gradient(pl_module)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Add the gradients of the adapters' penalties: once a step, after all batches of it and before clipping."""
        applied = state.applied_to(pl_module).get(self.name_on_model)
        if applied is not None and applied.trainable:
            add_penalties(pl_module, applied)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self._leads(pl_module) and vars(self)["_masks"]:
            state.restore_unselected(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._leads(pl_module):
            self._resume.on_train_start(trainer)
        if begins_untold(trainer) and not processed(trainer) and not trainer.fit_loop.done:
            self.begin_epoch(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._leads(pl_module):
            self._resume.on_train_epoch_start(trainer)
        self.begin_epoch(trainer, pl_module)

    def begin_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What a method does before the first batch of each epoch, also where a resumed run begins with one."""

    def _leads(self, pl_module: pl.LightningModule) -> bool:
        """Whether this is the first of the Trainer's methods: what concerns them all is done once."""
        return leader(pl_module) is self

    @property
    def _resume(self) -> ExactResume:
        return vars(self).setdefault("_exact_resume", ExactResume())

    # -------------------------------------------------------------- checkpoint
    def state_dict(self) -> dict[str, Any]:
        model = vars(self).get("_module", lambda: None)()
        applied = state.applied_to(model).get(self.name_on_model) if model is not None else None
        entry: dict[str, Any] = {"method": self.info.name, "config": self.config(), "label": self.name_on_model}
        if applied is not None:
            entry |= {"fingerprint": applied.fingerprint, "base": state.quantised_as(applied)}
            if self._leads(model):
                entry["rng"] = self._resume.state_dict()
        return entry

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        model = vars(self).get("_module", lambda: None)()
        if state_dict.get("method") != self.info.name:
            raise checkpoint.CheckpointError(
                f"The checkpoint was made with {state_dict.get('method')!r} under the label {self.name_on_model!r}; "
                f"this is {self.info.name!r}. Use the same method."
            )
        if model is not None:
            checkpoint.check_base(model, self.name_on_model, state_dict.get("fingerprint"))
            checkpoint.tell_other_precision(model, self.name_on_model, state_dict.get("base"))
            checkpoint.check_config(model, self.name_on_model, state_dict.get("config", {}))
        self.go_on(state_dict.get("config", {}))
        if "rng" in state_dict and model is not None:
            (leader(model) or self)._resume.load_state_dict(state_dict["rng"])

    def __getstate__(self) -> dict[str, Any]:
        """Configuration only: what belongs to a run stays with it."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}


# ------------------------------------------------------------------ pieces of the life cycle
def leader(pl_module: pl.LightningModule) -> PEFT | None:
    trainer = pl_module._trainer
    return None if trainer is None else next((c for c in trainer.callbacks if isinstance(c, PEFT)), None)  # type: ignore[attr-defined]


def inject(pl_module: pl.LightningModule) -> None:
    """Apply every pending method once; called when the module is completely built."""
    for name, parameter in pl_module.named_parameters():
        if parameter.is_meta:
            raise LifeCycleError(
                f"{name!r} is on the meta device when the model should be complete. Give it memory and weights at "
                f"the end of "
                "configure_model (to_empty, then load_state_dict), so that adapters go onto real weights."
            )
    pending: list[PEFT] = vars(pl_module).get("_peft_pending", [])
    if any(not state.reachable(pl_module, applied) for applied in state.all_applied(pl_module)):
        state.drop(pl_module)  # `setup` or `configure_model` built the network anew: the adapted one is gone
    for method in pending:
        vars(method)["_module"] = weakref.ref(pl_module)
        known = state.applied_to(pl_module).get(method.name_on_model)
        if known is None or (known.method is not method and known.method in pending):
            method.apply(pl_module)  # which says so if the label is taken
        elif known.method is not method:
            adopt(pl_module, known, method)
    for label, applied in state.applied_to(pl_module).items():
        if applied.trainable and applied.method not in pending:
            log.warning("%r trains too: it was applied before and is not among the Trainer's callbacks.", label)


def quantise_base(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """With a plugin that quantises: now, when initialisers have seen the full weights and nothing is wrapped yet."""
    plugin: Any = trainer.precision_plugin
    if hasattr(plugin, "prepare_base"):
        plugin.prepare_base(pl_module, trainer.strategy.root_device)


def adopt(pl_module: pl.LightningModule, known: state.Applied, method: PEFT) -> None:
    """Go on with a method that was put on this module by another Trainer, by `apply` or by `load_adapter`."""
    if type(known.method) is type(method):
        method.go_on(known.method.config())
    before, now = known.method.config(), method.config()
    other = {name: (before[name], now[name]) for name in now if name != "label" and before.get(name) != now[name]}
    if type(known.method) is not type(method) or other:
        shown = ", ".join(f"{name}: {old!r} on the model, {new!r} now" for name, (old, new) in other.items())
        raise LifeCycleError(
            f"{known.label!r} is on this {type(pl_module).__name__} already, as {type(known.method).__name__} with "
            f"other "
            f"settings ({shown}). Use the same, `remove` it from the module first, or give the new one a label of "
            f"its own."
        )
    known.method, known.trainable = method, True
    freeze(pl_module)


def unpatch(pl_module: pl.LightningModule) -> None:
    """Take away what belongs to one run; the adapters stay."""
    if vars(pl_module).pop("_peft_pending", None) is not None:
        vars(pl_module).pop("configure_model", None)
    if vars(pl_module).pop("_peft_extra_losses", False):
        uninstall(pl_module)
    if "_peft_ignored_before" in vars(pl_module):
        before = vars(pl_module).pop("_peft_ignored_before")
        vars(pl_module).pop(IGNORED, None)
        if before is not None:
            setattr(pl_module, IGNORED, before)


def check_strategy(strategy: Strategy) -> None:
    if isinstance(strategy, PLAIN_STRATEGIES) or getattr(strategy, "supports_peft", False):
        return
    raise LifeCycleError(
        f"{type(strategy).__name__} shards or wraps the model in a way that a callback alone cannot follow "
        f"(silently training "
        "the wrong parameters). Known: SingleDeviceStrategy, DDPStrategy, and strategies made with PEFTStrategyMixin "
        "(strategy='peft_single_device', 'peft_ddp')."
    )


def check_callbacks(trainer: pl.Trainer) -> None:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
            raise LifeCycleError(
                f"{type(callback).__name__} copies the whole model and writes the copy into checkpoints, the "
                f"frozen base "
                "included. It does not work beside a PEFT method; leave one of the two out."
            )


def lend(strategy: Strategy, pl_module: pl.LightningModule) -> None:
    """Give a plain strategy the checkpoint functions that the mixin has built in; picklable, and kept after the run."""
    if getattr(strategy, "supports_peft", False) or "lightning_module_state_dict" in vars(strategy):
        return
    for name in LENT:
        plain = functools.partial(getattr(type(strategy), name), strategy)
        setattr(strategy, name, functools.partial(LENT[name], strategy, plain))


# What a strategy does for adapters, `plain` being its own way: lent to plain strategies, built into the mixin.
def module_state(strategy: Any, plain: Callable[..., Any]) -> dict[str, Tensor]:
    return checkpoint.model_state(strategy.lightning_module, plain())


def load_module_state(strategy: Any, plain: Callable[..., Any], loaded: Any, strict: bool = True) -> None:
    checkpoint.load_model_state(strategy.lightning_module, loaded["state_dict"], strict)


def optimizer_state(strategy: Any, plain: Callable[..., Any], optimizer: Any) -> dict[str, Any]:
    inner = getattr(optimizer, "_optimizer", optimizer)
    return checkpoint.optimizer_state(strategy.lightning_module, inner, plain(optimizer))


def load_optimizer_state(strategy: Any, plain: Callable[..., Any], loaded: Any) -> None:
    pairs = zip(strategy.optimizers, loaded["optimizer_states"], strict=True)
    module = strategy.lightning_module
    states = [checkpoint.numbered_optimizer_state(module, optimizer, saved) for optimizer, saved in pairs]
    plain({**loaded, "optimizer_states": states})


def leave_frozen_alone(strategy: Strategy, pl_module: pl.LightningModule) -> None:
    """Under DDP: frozen parameters are the same on all ranks, which is checked, so they are never broadcast or
    reduced.
    """
    if not isinstance(strategy, DDPStrategy):
        return
    frozen = [name for name, p in pl_module.named_parameters() if not p.requires_grad]
    frozen += state.constant_names(pl_module)
    check_equal_across_ranks(pl_module, frozen)
    vars(pl_module).setdefault("_peft_ignored_before", getattr(pl_module, IGNORED, None))
    ignored = [*frozen, *(vars(pl_module)["_peft_ignored_before"] or [])]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(pl_module, ignored)


def wrap_anew(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Under DDP, when what trains has other sizes than before: gradients are exchanged by the sizes it was made for.

    Between two steps. What has no entries any more takes no part. A communication hook of the strategy is registered
    again, one put on by hand is not.
    """
    strategy: Any = trainer.strategy
    if not isinstance(strategy, DDPStrategy) or not isinstance(strategy.model, DistributedDataParallel):
        return
    wrapped: Any = strategy.model
    strategy.model = pl_module
    wrapped._remove_autograd_hooks()
    del wrapped.logger, wrapped.reducer  # which keep what accumulates gradients of the old sizes
    leave_frozen_alone(strategy, pl_module)
    empty = [name for name, p in pl_module.named_parameters() if p.requires_grad and not p.numel()]
    ignored = [*getattr(pl_module, IGNORED), *empty]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(pl_module, ignored)
    strategy.configure_ddp()


LENT: dict[str, Any] = {
    "lightning_module_state_dict": module_state,
    "load_model_state_dict": load_module_state,
    "optimizer_state": optimizer_state,
    "load_optimizer_state_dict": load_optimizer_state,
}


def check_equal_across_ranks(module: nn.Module, names: list[str]) -> None:
    """Raise where ranks hold different values under these names: nothing would ever make them equal."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    parameters: dict[str, Tensor] = dict(module.named_buffers(remove_duplicate=False))  # a shared one by any name
    parameters |= dict(module.named_parameters(remove_duplicate=False))
    mine = {name: state.fingerprint([(name, parameters[name])], samples=64) for name in names}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            different = sorted(n for n in set(theirs) | set(everyone[0]) if theirs.get(n) != everyone[0].get(n))
            raise LifeCycleError(
                f"Rank {rank} holds another base than rank 0: {different[:5]} ({len(different)} parameters). "
                f"Frozen parameters "
                "are not synchronised: load them from a file, or call seed_everything before building the model."
            )


def check_something_trains(pl_module: pl.LightningModule) -> None:
    if not state.trainable(pl_module):
        raise NothingToTrainError(
            f"The methods on this {type(pl_module).__name__} ({list(state.applied_to(pl_module))}) train no "
            f"parameter. Apply "
            "one with trainable=True."
        )


def audit(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """What trains = what the methods chose = what the optimizers hold; equal names and values on all ranks."""
    for label, applied in state.applied_to(pl_module).items():
        if applied.trainable and not applied.cell.on:
            raise LifeCycleError(
                f"{label!r} is merged or switched off, so its adapters would not train. Unmerge it or switch it on "
                f"first."
            )
    wanted = state.trainable(pl_module)
    moving = {name for name, p in pl_module.named_parameters() if p.requires_grad}
    held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    problems = {
        "have requires_grad but belong to no method": sorted(moving - set(wanted)),
        "belong to a method but have no requires_grad": sorted(set(wanted) - moving),
        "belong to a method but are in no optimizer": sorted(n for n, p in wanted.items() if id(p) not in held),
    }
    for what, names in problems.items():
        if names:
            raise LifeCycleError(
                f"{len(names)} parameters {what}: {names[:5]}. Leave requires_grad to the methods, and give the "
                f"optimizer "
                "self.parameters() (or those with requires_grad) in configure_optimizers."
            )
    check_equal_across_ranks(pl_module, sorted(wanted))


def check_in_training(pl_module: pl.LightningModule, method: PEFT) -> None:
    """Raise where a method does in eval mode something else than it trains with, and the model is in eval mode."""
    placements = state.get_applied(pl_module, method.name_on_model).placements
    if idle := [x.site or type(pl_module).__name__ for x in placements if not x.place.training]:
        raise LifeCycleError(
            f"{type(method).__name__} acts in training mode, and {len(idle)} of its {len(placements)} places are in "
            f"eval mode ({idle[0]!r}, ...), as from_pretrained gives them. Call .train() on the network before fit."
        )


def announce(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """A table of the methods and one line of counts, on rank zero."""
    facts = state.describe(pl_module)
    rank_zero_info(
        f"{state.table(pl_module)}\n"
        f"PEFT: {', '.join(state.applied_to(pl_module))} at {facts['sites']} sites | trainable "
        f"{facts['trainable']:,} of "
        f"{facts['total']:,} ({facts['percent']:.4f} %) | weights in a checkpoint {facts['bytes'] / 2**20:.2f} MiB"
    )


def add_penalties(pl_module: pl.LightningModule, applied: state.Applied) -> None:
    """grad += d(sum of penalties)/dp; the same on all ranks, so that nothing is reduced again."""
    with torch.enable_grad():
        found = [p for x in applied.placements if (p := x.adapter.penalty()) is not None]
        if not found:
            return
        total = torch.stack(found).sum()
    mine = [p for x in applied.placements for p in x.adapter.parameters() if p.requires_grad]
    parameters = list({id(p): p for p in mine}.values())
    for parameter, grad in zip(parameters, torch.autograd.grad(total, parameters, allow_unused=True), strict=True):
        if grad is not None:
            parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
    pl_module.log(f"{applied.label}/penalty", total.detach())


def add_losses(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Let `training_step` return the terms of the methods that have some, too (`PEFT.extra_loss`)."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    own = [c for c in callbacks if isinstance(c, PEFT) and c.adds_loss]
    for method in own:
        check_module(pl_module, type(method).__name__)
    if own:
        vars(pl_module)["_peft_extra_losses"] = True
        install(pl_module, {method.name_on_model: method.extra_loss for method in own})


def warn_without_gradient(pl_module: pl.LightningModule) -> None:
    """Name what the first backward did not reach: most often a part of the model that the loss does not use."""
    missing = [name for name, p in state.trainable(pl_module).items() if p.grad is None and p.numel()]
    if missing:
        log.warning("%d trainable parameters got no gradient in the first backward: %s", len(missing), missing[:5])
