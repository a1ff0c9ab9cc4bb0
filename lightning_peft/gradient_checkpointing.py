"""Training Deep Nets with Sublinear Memory Cost. Chen, Xu, Zhang, Guestrin, 2016. https://arxiv.org/abs/1604.06174

Backward needs what forward computed. Of each block its input is kept; the rest is computed anew when backward gets
there. So L blocks with I bytes of input and A bytes of activations each hold L I + A in place of L A, for one more
forward pass. Gradients are what they are without, bit for bit where the operations are deterministic: dropout draws the
same numbers again. What a block does beside giving a result would happen twice; batch statistics and the caches of
transformers are seen to.

    Trainer(callbacks=[LoRA(), GradientCheckpointing()])         any model whose blocks are found, in any order
    checkpoint_blocks(model); ...; uncheckpoint_blocks(model)    without a Trainer
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from lightning_peft.core.adapter import Route, adapters_of, unlink
from lightning_peft.core.sites import Site, TargetError, sites

log = logging.getLogger("lightning_peft")
CACHES = ("past_key_values", "past_key_value", "layer_past")  # what layers of transformers call their KV cache
Call = tuple[tuple[Any, ...], dict[str, Any]]


class CheckpointingError(ValueError):
    """A setting that makes no sense."""


class Recompute(Route):
    """Around all that is around a block: block(x) without keeping what is inside, which backward computes again.

    Only while the block trains and gradients are on. Non-reentrant, so that the graph is that of the block itself: an
    input without gradient is as good as any.
    """

    outermost = True

    def __init__(self, module: nn.Module, preserve_rng_state: bool = True) -> None:
        super().__init__(module)
        self.preserve_rng_state = preserve_rng_state
        self.on = True
        self.counts = any(isinstance(m, _BatchNorm) for m in module.modules())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = self.base()
        if not (self.on and self.module.training and torch.is_grad_enabled()) or apart(self.module):
            return run(*args, **kwargs)
        if has_own(self.module):
            return run(*reachable(self.module, args), **kwargs)
        call = without_cache(self.module, args, kwargs)
        if call is None:
            return run(*args, **kwargs)
        for adapter in () if torch.compiler.is_compiling() else adapters_of(self.module):  # a graph runs no code again
            run = adapter.twice(run, *call) if adapter.cell.on else run
        return self.recomputed(run, *call)

    def recomputed(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": self.preserve_rng_state}
        if self.counts:
            options["context_fn"] = partial(counted_once, self.module)
        return checkpoint(partial(named, run, tuple(kwargs)), *args, *kwargs.values(), **options)


def named(run: Callable[..., Any], names: tuple[str, ...], *values: Any) -> Any:
    """Call `run` with the last of the values under their names.

    `checkpoint` gives what it takes by position, and nothing else, to the hooks that count or offload saved tensors.
    """
    first = len(values) - len(names)
    return run(*values[:first], **dict(zip(names, values[first:], strict=True)))


# ------------------------------------------------------------------ what would go wrong in a second run
def apart(module: nn.Module) -> bool:
    """Whether the block runs without gradients beside a side network, and keeps nothing anyway."""
    return any(adapter.apart and adapter.cell.on for adapter in adapters_of(module))


def without_cache(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """The call without its KV cache, which a second run would extend again; None where the cache must be read.

    As transformers' own layers have it, except that they drop what a cache holds too.
    """
    caches = [v for name, v in [*((None, v) for v in args), *kwargs.items()] if v is not None and is_cache(name, v)]
    if not caches or getattr(module, "_can_checkpoint_with_cache", False):
        return args, kwargs
    layer: Any = next((m.layer_idx for m in module.modules() if isinstance(getattr(m, "layer_idx", None), int)), 0)
    if any(filled(cache, layer) for cache in caches):
        say_once("A block that reads a filled KV cache is not checkpointed: run a second time it would read itself.")
        return None
    say_once("The KV cache of checkpointed blocks stays empty in training. use_cache=False does without one.")
    kwargs = {name: None if is_cache(name, value) else value for name, value in kwargs.items()}
    if "use_cache" in kwargs:
        kwargs["use_cache"] = False
    return tuple(None if is_cache(None, value) else value for value in args), kwargs


def is_cache(name: str | None, value: Any) -> bool:
    """By the argument's name, or because it is a cache of transformers."""
    return name in CACHES or hasattr(value, "get_seq_length")


def filled(cache: Any, layer: int) -> bool:
    """Whether a cache holds keys of this layer; a tuple of old always does."""
    return not hasattr(cache, "get_seq_length") or int(cache.get_seq_length(layer)) > 0


def say_once(message: str) -> None:
    if not torch.compiler.is_compiling():
        _say(message)


@functools.lru_cache
def _say(message: str) -> None:
    log.info(message)


def counted_once(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What the first and the second run happen in, where there are batch statistics."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    return contextlib.nullcontext(), uncounted(norms)


@contextlib.contextmanager
def uncounted(norms: list[_BatchNorm]) -> Iterator[None]:
    """Let the running statistics go to copies, which are forgotten."""
    counted = [dict(norm._buffers) for norm in norms]
    for norm, buffers in zip(norms, counted, strict=True):
        norm._buffers.update({name: None if b is None else b.clone() for name, b in buffers.items()})
    try:
        yield
    finally:
        for norm, buffers in zip(norms, counted, strict=True):
            norm._buffers.update(buffers)


# ------------------------------------------------------------------ models that do it themselves
def has_own(module: nn.Module) -> bool:
    """Whether transformers' checkpointing is on here."""
    return getattr(module, "gradient_checkpointing", False) is True and hasattr(module, "_gradient_checkpointing_func")


def is_reentrant(module: nn.Module) -> bool:
    function: Any = getattr(module, "_gradient_checkpointing_func", None)
    return getattr(function, "keywords", {}).get("use_reentrant", True) is not False


def reachable(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Reentrant checkpointing gives no gradient to a block whose input needs none: let the hidden states need one."""
    if not (args and is_reentrant(module) and any(p.requires_grad for p in module.parameters())):
        return args
    hidden = args[0]
    if not isinstance(hidden, torch.Tensor) or hidden.requires_grad or not hidden.is_floating_point():
        return args
    return (hidden.detach().requires_grad_(), *args[1:])


def owned_above(model: nn.Module, name: str) -> bool:
    """Whether the module `name` or one that holds it has transformers' checkpointing on."""
    return any(has_own(model.get_submodule(path)) for path in ("", *holders(name), name))


# ------------------------------------------------------------------ on and off
def checkpoint_blocks(
    model: nn.Module, blocks: str | list[str] = "block", every: int = 1, preserve_rng_state: bool = True
) -> dict[str, Recompute]:
    """Let backward recompute what is in these blocks; -> name -> link for those that did not so before.

    blocks: roles, globs or `re:` patterns (see `core.sites`), of which the outermost matches count;
    every: the first block of each stack, then each n-th;
    preserve_rng_state: draw the same dropout again, to be left out only where nothing is drawn.
    Adapters may be put on, merged and taken off before and after. Errors: TargetError where there are no such blocks.
    """
    check(every, preserve_rng_state)
    links: dict[str, Recompute] = {}
    left: list[str] = []
    for site in chosen(model, blocks, every):
        if (known := link_of(site.module)) is not None:
            known.preserve_rng_state = preserve_rng_state
            continue
        if owned_above(model, site.name):
            left.append(site.name)
            if not (has_own(site.module) and is_reentrant(site.module)):
                continue
        links[site.name] = link = Recompute(site.module, preserve_rng_state)
        site.module.forward = link
    if left:
        log.info("%d blocks are checkpointed by the model itself and left to it: %s", len(left), shown(left))
    return links


def uncheckpoint_blocks(model: nn.Module) -> None:
    """Take off what `checkpoint_blocks` has put on; adapters stay."""
    for module in model.modules():
        if (link := link_of(module)) is not None:
            take_off(link)


def take_off(link: Recompute) -> None:
    link.on = False  # it stays in the chain where another library has wrapped it
    unlink(link.module, Recompute)


def link_of(module: nn.Module) -> Recompute | None:
    link = vars(module).get("forward")
    while isinstance(link, Route) and not isinstance(link, Recompute):
        link = link.inner
    return link if isinstance(link, Recompute) else None


def chosen(model: nn.Module, blocks: str | list[str], every: int) -> list[Site]:
    """Each n-th of the blocks of each stack; of modules in one another the outer one, of lists what is in them."""
    advice = "For modules of your own name those that are called once a layer, such as blocks='layers.*'."
    try:
        found = {s.name: s for s in sites(model, blocks) if type(s.module).forward is not nn.Module.forward}
    except TargetError as error:
        what = str(error).replace("targets=", "blocks=").partition("; roles=")[0].rstrip(".")
        raise TargetError(f"Nothing to recompute in this {type(model).__name__}. {what}. {advice}") from None
    if not found:
        raise TargetError(f"Nothing to recompute: what blocks={blocks!r} matches is never called. {advice}")
    outer = [site for name, site in found.items() if not any(above in found for above in holders(name))]
    return [s for i, s in enumerate(outer) if (i if s.layer is None else s.layer) % every == 0]


def holders(name: str) -> list[str]:
    """a.b.c -> a, a.b"""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def check(every: Any, preserve_rng_state: Any) -> None:
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise CheckpointingError(f"every={every!r} is not a number of blocks: give 1 for all, 2 for every other one.")
    if not isinstance(preserve_rng_state, bool):
        raise CheckpointingError(f"preserve_rng_state={preserve_rng_state!r} is neither True nor False.")


def shown(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


# ------------------------------------------------------------------ in a Trainer
class GradientCheckpointing(Callback):
    """Keep the inputs of the blocks, compute the rest again in backward.

    blocks, every, preserve_rng_state: see `checkpoint_blocks`. On from the start of a fit, when the model is built,
    adapted and wrapped, to its end; before and after a PEFT method are the same. Under torch.compile it makes no break.
    """

    def __init__(self, blocks: str | list[str] = "block", every: int = 1, preserve_rng_state: bool = True) -> None:
        check(every, preserve_rng_state)
        self.blocks, self.every, self.preserve_rng_state = blocks, every, preserve_rng_state
        self._links: dict[str, Recompute] = {}

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._links |= checkpoint_blocks(pl_module, self.blocks, self.every, self.preserve_rng_state)
        names = [name for name, module in pl_module.named_modules() if link_of(module) is not None]
        if names:
            rank_zero_info(f"Gradient checkpointing: {len(names)} blocks are run again in backward: {shown(names)}")

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        idle = [name for name, link in self._links.items() if not link.module.training]
        if idle:
            log.warning(
                "%d blocks are in eval mode, where nothing is checkpointed: %s. Call .train() on the model before "
                "fit (from_pretrained gives it in eval mode).",
                len(idle),
                shown(idle),
            )

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._take_off()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._take_off()

    def _take_off(self) -> None:
        for link in self._links.values():
            take_off(link)
        self._links.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Settings only: what belongs to a run stays with it."""
        return {**vars(self), "_links": {}}


def configured(value: Any) -> list[GradientCheckpointing]:
    """What the key `gradient_checkpointing` of a config stands for: false, true, or a mapping of settings."""
    if isinstance(value, Mapping):
        try:
            return [GradientCheckpointing(**{str(name): setting for name, setting in value.items()})]
        except TypeError as error:
            raise CheckpointingError(
                f"gradient_checkpointing={dict(value)!r}: known are blocks, every and preserve_rng_state."
            ) from error
    if value is None or isinstance(value, bool):
        return [GradientCheckpointing()] if value else []
    raise CheckpointingError(
        f"gradient_checkpointing={value!r}: give true, false, or settings such as '{{every: 2}}' (blocks, every, "
        "preserve_rng_state)."
    )
