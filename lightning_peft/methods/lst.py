"""LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning. Sung, Cho, Bansal, NeurIPS 2022.
https://arxiv.org/abs/2206.06522
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_peft.callback import PEFT, LifeCycleError
from lightning_peft.core import side as beside
from lightning_peft.core import state
from lightning_peft.core.adapter import Adapter, insert, inside
from lightning_peft.core.calibration import Run, plain_run
from lightning_peft.core.fields import FieldError, positive
from lightning_peft.core.init import Draw
from lightning_peft.core.pruning import Cut, Scores, best, carry, fisher, residual
from lightning_peft.core.side import Rung, Tap, first_of, given_to, with_first
from lightning_peft.core.sites import Site, Sites, TargetError
from lightning_peft.methods.calibrated import as_in_training, quiet, step_of

DROPPED = ("input_ids", "inputs_embeds", "token_type_ids", "output_hidden_states", "output_attentions", "return_dict")


class Ladder(Tap):
    """z = Up(s_L): the side network and what connects it, at the stack it stands beside, or at its last block."""

    settled = False  # whether its start was taken from data

    def __init__(self, rail: Rail, taps: list[Tap], source: Ladder | None) -> None:
        super().__init__()
        self.rail, self.taps = rail, taps
        self.source: Ladder | None
        vars(self)["source"] = source  # not registered: it is at a place of its own
        with torch.random.fork_rng(devices=[]):
            self.first = nn.Linear(rail.given, rail.small)
            self.downs = nn.ModuleList(nn.Linear(rail.width, rail.small) for _ in rail.kept)
            self.up = None if rail.feeds else nn.Linear(rail.small, rail.width)
        self.alpha = nn.Parameter(torch.empty(rail.depth))
        self.side = rail.make()
        for block in rail.side_blocks(self.side):
            insert(block, Rung(block), None)

    # -------------------------------------------------------------- computing
    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        args, kwargs, memory = self.split(args, kwargs)
        out = self.frozen(base, *args, **kwargs)
        seen = [tap.take() for tap in self.taps]
        if not self.rail.whole:
            seen.append((given_to(args, kwargs).detach(), first_of(out)))
        h = first_of(out)
        with self.precision(h):
            s = self.climb(seen, args, kwargs, memory, out)
            z = s if self.up is None else self.up(s)
        if self.up is None:  # the decoder's side network attends to it: it goes where the encoder's output goes
            return with_first(out, torch.cat([h, z.to(h.dtype)], -1))
        return with_first(out, z.to(h.dtype))

    def split(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        """Take from the encoder's output the part that is its side network's."""
        if self.source is None:
            return args, kwargs, None
        call = self.named(args, kwargs)
        states, small = call.get("encoder_hidden_states"), self.source.rail.small
        if states is None or states.shape[-1] <= self.source.rail.width:
            found = None if states is None else tuple(states.shape)
            raise ValueError(
                f"The side decoder attends to the side encoder, whose states (..., {small}) come with the encoder's "
                f"output; got {found}. Let the encoder run with the method on."
            )
        call["encoder_hidden_states"] = states[..., :-small]
        return (), call, states[..., -small:]

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        names = list(inspect.signature(type(self.place).forward).parameters)[1:]
        return dict(zip(names, args, strict=False)) | kwargs

    def precision(self, h: Tensor) -> contextlib.AbstractContextManager[Any]:
        """Parameters in fp32 beside a base in 16 bits: products in 16 bits, as autocast does it."""
        low = h.dtype in (torch.bfloat16, torch.float16) and self.alpha.dtype not in (torch.bfloat16, torch.float16)
        if low and not torch.is_autocast_enabled(h.device.type):
            return torch.autocast(h.device.type, h.dtype)
        return contextlib.nullcontext()

    def read(self, h: Tensor) -> Tensor:
        dtype = self.alpha.dtype
        return h if h.dtype == dtype or torch.is_autocast_enabled(h.device.type) else h.to(dtype)

    def climb(self, seen: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any], memory: Any, out: Any) -> Tensor:
        """s_i = Block_i(mu_i s_{i-1} + (1 - mu_i) Down_i(h_i)), s_0 = Down_0(h_0) -> (..., w)"""
        gates = torch.sigmoid(self.alpha / self.rail.temperature)
        if not torch.compiler.is_compiling():
            beside.quiet(self.side)
        for block, down, layer in zip(self.rail.side_blocks(self.side), self.downs, self.rail.kept, strict=True):
            vars(block)["forward"].mixed = gates[layer], down(self.read(seen[layer][1]))
        s = self.first(self.read(seen[0][0]))
        if not self.rail.whole:
            return self.side(s, *self.extras(args), **self.named_extras(args, kwargs))
        return self.beside_stack(s, self.named(args, kwargs), memory, out)

    def beside_stack(self, s: Tensor, call: dict[str, Any], memory: Any, out: Any) -> Tensor:
        """Call the side stack as the stack was called, on its own states and the own part of the cache."""
        names = inspect.signature(type(self.place).forward).parameters
        cache = getattr(out, "past_key_values", None)
        cache = call.get("past_key_values") if cache is None else cache
        call = {name: value for name, value in call.items() if name not in DROPPED} | {"inputs_embeds": s}
        inner = [a for a in inside(self) if isinstance(a, Ladder)]  # of other labels: their layers come before
        mine = self.rail.depth + sum(len(a.rail.kept) for a in inner), len(self.rail.kept)
        view = None if cache is None else beside.behind(cache, *mine)
        if view is not None:
            beside.check_in_step(cache, view, s.shape[1])
        call |= {"past_key_values": view} if "past_key_values" in names else {}
        call |= {"use_cache": view is not None} if "use_cache" in names else {}
        call |= {} if memory is None else {"encoder_hidden_states": self.read(memory)}
        found = first_of(self.side(**call))
        if view is not None:
            beside.keep(cache, view, *mine)
        return found

    def extras(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """What the block is given beside its states, by position."""
        for value in args[1:]:
            self.check_extra(value)
        return args[1:] if self.rail.passes else ()

    def named_extras(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        rest = dict(kwargs)
        if not args:
            del rest[next(name for name, value in kwargs.items() if isinstance(value, Tensor))]
        for value in rest.values():
            self.check_extra(value)
        return rest if self.rail.passes else {}

    def check_extra(self, value: Any) -> None:
        """Raise on what a side block cannot be given."""
        states = isinstance(value, Tensor) and value.is_floating_point() and value.shape[-1:] == (self.rail.width,)
        unread = isinstance(value, Tensor) and not self.rail.passes
        if states or unread or hasattr(value, "get_seq_length"):
            raise ValueError(
                f"{type(self.place).__name__} is given a {type(value).__name__}{tuple(getattr(value, 'shape', ()))} "
                "beside its hidden states, which a side block of another width cannot use. Call the model without it "
                "(use_cache=False for a cache)."
            )

    # -------------------------------------------------------------- initialising
    def reset(self, draw: Draw) -> None:
        """The class's own constants, uniform weights, then what is pruned from the base."""
        with torch.device("cpu"):
            fresh = self.rail.make()
        constants = dict((*fresh.named_buffers(), *(x for x in fresh.named_parameters() if x[1].dim() < 2)))
        with torch.no_grad():
            for name, tensor in (*self.side.named_buffers(), *self.side.named_parameters()):
                if name not in constants:
                    draw.kaiming_uniform(tensor)
                elif not tensor.is_meta:
                    tensor.copy_(constants[name])
        for linear in (self.first, *self.downs, *(() if self.up is None else (self.up,))):
            draw.kaiming_uniform(linear.weight)
            draw.zeros(linear.bias)
        draw.zeros(self.alpha)
        if self.rail.init != "random":
            self.prune({})

    def stream(self, scores: Scores) -> Tensor:  # (w,)
        """The features of the residual stream that the side network is cut from."""
        return best(residual(self.rail.parts, self.rail.width, scores), self.rail.small)

    def prune(self, scores: Scores) -> None:
        """Take the side blocks from the base's, by these scores, else by magnitude."""
        rail = self.rail
        if rail.plain or next(rail.blocks[0].module.parameters()).is_meta or self.alpha.is_meta:
            return
        stream = self.stream(scores)
        memory = None if self.source is None else self.source.stream(scores)
        paired = any(name.endswith("inv_freq") for name, _ in self.side.named_buffers())
        for layer, small in zip(rail.kept, rail.side_blocks(self.side), strict=True):
            block = rail.blocks[layer]
            carry(block.module, small, Cut(block, rail.parts, small, stream, memory, paired, scores).axes, stream)
        if rail.whole:
            rest = {n: m for n, m in self.side.named_children() if n != rail.path}
            carry(self.place, nn.ModuleDict(rest), {}, stream)


class Rail:
    """What one stack of blocks and its side network have to know of each other."""

    def __init__(self, method: LST, model: nn.Module, blocks: list[Site], kept: list[int], parts: list[Site]) -> None:
        self.blocks, self.kept, self.parts, self.depth = blocks, kept, parts, len(blocks)
        self.init, self.temperature = method.init, method.temperature
        last = blocks[-1]
        width = last.facts.hidden if last.role == "block" else last.out_features
        if width is None or width < method.reduction:
            raise TargetError(
                f"LST(reduction={method.reduction}) at {last.name!r}: the width is {width or 'unknown'}. Choose a "
                "reduction up to the width, on blocks of a known one."
            )
        self.width, self.small = width, width // method.reduction
        self.given = width if last.role == "block" else blocks[0].in_features
        self.feeds = False
        self.whole, self.make = beside.recipe(model, last, self.small, method.reduction, kept)
        self.path = last.name.split(".")[-2] if self.whole else "blocks"
        self.plain = not self.whole and getattr(self.make, "func", None) is beside.tower_of_plain
        self.passes = not self.plain

    def side_blocks(self, side: nn.Module) -> list[nn.Module]:
        return list(side.get_submodule(self.path).children())


class LST(PEFT, name="lst", family="additive", paper="2206.06522", identity=False, backprop=False):
    """z = Up(s_L), s_i = Block_i(mu_i s_{i-1} + (1 - mu_i) Down_i(h_i)), mu_i = sigmoid(alpha_i / T)

    h_i (..., d) is what the frozen block i returns, s_0 = Down_0(h_0); Down (w, d) and Up (d, w) with bias,
    w = d / reduction. z takes the place of what the stack returns, its final norm included; the frozen head, or one
    that trains along, follows. Nothing is differentiated, or kept for backward, inside of the blocks.

    Side blocks: in transformers models of the model's own class, with all widths divided and the heads it has; so
    masks, rotations and position biases are the class's own, and its final norm is the side network's. Else torch's
    encoder layers, or plain pre-norm blocks (an MLP where the targets are no blocks), and a LayerNorm. There z takes
    the place of what the last block returns. Side blocks drop hidden states as the base does, but no attention
    weights, which are as many as the base's and would be kept (the paper does not say). `drop`: layers of each stack
    without a side block. In an encoder-decoder the side decoder attends to the side encoder, whose states travel behind
    the encoder's own (encoder_last_hidden_state is d + w wide). With a KV cache the keys of the side network are layers
    of the same cache after those of the base, so that beams take both along. Of two side networks the outermost counts.

    init: "magnitude" or "fisher" cut the side blocks from the base's: the features of the stream, of each head, and of
    each feed-forward layer that matter most, by |w| or by (d loss / d w)^2 over `batches` batches of the training
    data, taken when `fit` starts or by `calibrate`, of a base in floats; "random" draws them, and so are plain blocks.
    Downs and Up are drawn, alpha_i = 0. T = `temperature`. Not the base at step 0. Source: section 3; code: the gate is
    on s.
    """

    targets: str | list[str] | None = "block"
    reduction: int = 8
    drop: list[int] | None = None
    init: Literal["fisher", "magnitude", "random"] = "magnitude"
    temperature: float = 0.1
    batches: int = 8

    def check(self) -> None:
        positive(self, "reduction", "temperature", "batches")
        if min(self.drop or [0]) < 0:
            raise FieldError(f"LST(drop={self.drop}): layers are counted from 0.")

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        ladders: dict[str, Ladder] = {}
        stacks = beside.grouped(sites)
        feeding = {stack: encoder_of(stack, sites, stacks) for stack in stacks}
        for stack in sorted(stacks, key=lambda stack: feeding[stack] is not None):
            blocks = beside.every_block(sites, stacks[stack])
            owner = sites.model.get_submodule(beside.owner_name(blocks[-1]))
            beside.check_stack(sites.model, blocks)
            rail = Rail(self, sites.model, blocks, self.kept(stacks[stack], blocks), parts_of(sites, blocks))
            rail.feeds = stack in feeding.values()
            source = ladders[str(feeding[stack])] if feeding[stack] is not None else None
            check_pair(rail, source, stack)
            taps = [Tap() for _ in (blocks if rail.whole else blocks[:-1])]
            yield from zip(blocks, taps, strict=False)
            ladders[stack] = ladder = Ladder(rail, taps, source)
            yield (Site(beside.owner_name(blocks[-1]), owner, "stack") if rail.whole else blocks[-1]), ladder

    def kept(self, chosen: list[Site], blocks: list[Site]) -> list[int]:
        """Which of the blocks have one beside them."""
        if max(self.drop or [0]) >= len(blocks):
            raise TargetError(f"LST(drop={self.drop}): the stack {chosen[0].stack!r} has {len(blocks)} blocks.")
        names = {site.name for site in chosen}
        kept = [i for i, block in enumerate(blocks) if block.name in names and i not in (self.drop or [])]
        if not kept:
            raise TargetError(f"LST(drop={self.drop}, layers={self.layers}) leaves no side block; drop fewer.")
        return kept

    # -------------------------------------------------------------- from data
    def calibrate(self, model: nn.Module, batches: Iterable[Any], run: Run | None = None) -> int:
        """Cut the side blocks by the Fisher information of these batches; before `fit`, or without a Trainer.

        run(batch, index) -> loss; by default a LightningModule's training_step, else the model's own call with the
        batch as keywords, positions or as it is. Memory: a gradient and a score for each weight of the blocks.
        """
        lightning = isinstance(model, pl.LightningModule) and run is None
        placements = state.get_applied(model, self.name_on_model).placements
        ladders = [x.adapter for x in placements if isinstance(x.adapter, Ladder)]
        modules = [block.module for ladder in ladders for block in ladder.rail.blocks]
        with self.enabled(model, False, self.name_on_model), quiet(model) if lightning else contextlib.nullcontext():  # type: ignore[arg-type]
            found = run or (step_of(model) if lightning else plain_run(model))  # type: ignore[arg-type]
            scores, count = fisher(model, modules, batches, found)
        for ladder in ladders:
            ladder.prune(scores)
            ladder.settled = True
        return count

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        placements = state.get_applied(pl_module, self.name_on_model).placements
        settled = any(x.adapter.settled for x in placements if isinstance(x.adapter, Ladder))
        if self.init != "fisher" or settled or vars(self).get("_resumed"):
            return
        loader: Any = trainer.train_dataloader
        if not pl_module.automatic_optimization or isinstance(loader, (dict, list, tuple)):
            raise LifeCycleError(
                "LST(init='fisher') takes its start from training_step on one dataloader, and this run makes its own "
                "optimizer steps or has several. Call calibrate(module, batches, run) and give init='magnitude'."
            )
        with isolate_rng():
            given = (as_in_training(trainer, pl_module, b) for b in itertools.islice(loader, self.batches))
            with trainer.precision_plugin.train_step_context():
                self.calibrate(pl_module, given)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        vars(self)["_resumed"] = True  # what is resumed has its start


def parts_of(sites: Sites, blocks: list[Site]) -> list[Site]:
    names = {block.name for block in blocks if block.role == "block"}
    return [s for s in sites.known if s.block in names]


def encoder_of(stack: str, sites: Sites, stacks: dict[str, list[Site]]) -> str | None:
    """The stack that this one's blocks attend to; None where they attend to themselves only."""
    blocks = beside.every_block(sites, stacks[stack])
    crosses = [s for s in parts_of(sites, blocks) if (s.role or "").startswith("cross.")]
    if not crosses:
        return None
    encoder = "encoder".join(stack.rsplit("decoder", 1))
    if encoder == stack or encoder not in stacks:
        raise TargetError(
            f"The blocks of {stack or 'this model'!r} attend to another sequence ({crosses[0].name!r}), whose side "
            "network is not there. Known: models with an encoder and a decoder, both among the targets."
        )
    return encoder


def check_pair(rail: Rail, source: Ladder | None, stack: str) -> None:
    if (rail.feeds or source is not None) and not rail.whole:
        raise TargetError(
            f"The stack {stack!r} of an encoder-decoder cannot be made again at another width: its class takes no "
            "`inputs_embeds`. Known: T5, BART and their like."
        )
