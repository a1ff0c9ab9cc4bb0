"""The input site: virtual tokens in front of the text, with the masks, positions and token types that they need.

The tokens are put in where the model embeds its input and taken out of what the model returns, so that logits, labels,
pooling by index and losses outside of it line up with the text as before. In an encoder-decoder they stay in the
encoder's output, since the decoder attends to them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core.adapter import Adapter
from lightning_peft.core.init import Draw
from lightning_peft.core.prompt import Prompt, TaskPrompt


class Tokens(Adapter):
    """P (length, d), or (batch, length, d): what a prompt gives for this batch."""

    def __init__(self, prompt: Prompt) -> None:
        super().__init__()
        self.prompt = prompt
        self.given: Tensor | None = None  # (n, length, d) to use in place of the prompt, row by row of the batch

    @property
    def tokens(self) -> nn.Parameter:
        return self.prompt.tokens

    @property
    def length(self) -> int:
        return self.prompt.length

    def rows(self, x: Tensor, batch: int) -> Tensor:
        """(batch, length, d) in the dtype of x."""
        rows = self.prompt(batch) if self.given is None else self.repeated(self.given, batch)
        return rows.to(x.dtype).expand(batch, -1, -1)

    @staticmethod
    def repeated(given: Tensor, batch: int) -> Tensor:
        if batch % len(given):
            raise ValueError(f"{len(given)} prompts do not go into a batch of {batch}; replicate each example for all.")
        return given.repeat_interleave(batch // len(given), 0)  # beams are copies of an example

    def twice(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
        return functools.partial(self._told, self.said(), run)

    def said(self) -> dict[str, Any]:
        """What this call was told: the task of each example, or the prompts."""
        return {name: vars(part)[name] for part, name in self._where()}

    def _where(self) -> list[tuple[nn.Module, str]]:
        tasks = isinstance(self.prompt, TaskPrompt)
        return [(self, "given"), *([(self.prompt, "ids"), (self.prompt, "held")] if tasks else [])]

    def _told(self, said: dict[str, Any], run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before = self.said()
        try:
            self._say(said)
            return run(*args, **kwargs)
        finally:
            self._say(before)

    def _say(self, said: dict[str, Any]) -> None:
        for part, name in self._where():
            setattr(part, name, said[name])

    def reset(self, draw: Draw) -> None:
        self.prompt.reset(draw)

    def penalty(self) -> Tensor | None:
        return self.prompt.penalty()

    def collapsed(self) -> dict[str, Tensor]:
        return {f"prompt.{name}": tensor for name, tensor in self.prompt.collapsed().items()}


class Turn(Adapter):
    """Takes `task_ids` out of what a model is called with, and tells the prompt whose turn it is."""

    def __init__(self, prompt: TaskPrompt) -> None:
        super().__init__()
        self.prompt: Any
        vars(self)["prompt"] = prompt  # it is registered where its rows are used

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.prompt.ids = kwargs.pop("task_ids", None)  # kept for what is computed again in the backward pass
        return base(*args, **kwargs)


class VirtualTokens(Tokens):
    """[P; Emb(x)]: around the module of a transformers model that embeds `input_ids`."""

    def __init__(self, owner: nn.Module, prompt: Prompt, strip: bool, causal: bool = False) -> None:
        super().__init__(prompt)
        self.strip, self.causal = strip, causal
        self.counts = causal and "position_ids" in inspect.signature(type(owner).forward).parameters
        self.counts = self.counts and not counts_itself(owner)
        self.owner: Any
        self.names = list(inspect.signature(type(owner).forward).parameters)[1:]
        vars(self)["owner"] = owner  # not registered: it holds this adapter

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = dict(zip(self.names, args, strict=False)) | kwargs
        if isinstance(self.prompt, TaskPrompt) and "task_ids" in call:  # nothing is around the model that embeds
            self.prompt.ids = call.pop("task_ids")
        past = cached_length(call.get("past_key_values"))
        ids, embeds = call.pop("input_ids", None), call.pop("inputs_embeds", None)
        if embeds is None:
            embeds = self.owner.get_input_embeddings()(ids)
        self.extend(call, ids, embeds, fresh=past == 0)
        if past:  # a step of generation: the tokens are in the cache
            return base(inputs_embeds=embeds, **call)
        out = base(inputs_embeds=torch.cat([self.rows(embeds, len(embeds)), embeds], 1), **call)
        return self.stripped(out) if self.strip else out

    def extend(self, call: dict[str, Any], ids: Tensor | None, embeds: Tensor, fresh: bool) -> None:
        """Make room for the tokens in everything that has one entry per position."""
        length = self.length
        check_length(self.owner, length + embeds.shape[1])
        mask = call.get("attention_mask")
        if mask is None and fresh and texts_apart(self.owner, call):
            mask = blocks_of(call["position_ids"], embeds)
        if mask is not None:
            call["attention_mask"] = self.widened(mask, embeds.shape[1] if fresh else None)
        if (positions := call.get("position_ids")) is not None:
            call["position_ids"] = self.shifted(positions, fresh)
        elif self.counts and mask is not None and mask.dim() == 2:
            call["position_ids"] = self.numbered(mask, embeds.shape[1])
        elif fresh and ids is not None and (padding := padded_positions(self.owner)) is not None:
            real = F.pad((ids != padding).long(), (length, 0), value=1)
            call["position_ids"] = real.cumsum(1) * real + padding
        if fresh and (types := call.get("token_type_ids")) is not None:
            call["token_type_ids"] = F.pad(types, (length, 0))

    def widened(self, mask: Any, time: int | None) -> Tensor:
        """(batch, time), or the blocks of packed texts (batch, 1, time, time) in a causal model.

        Every text of a pack has the prompt in front of it: it is there once, sees itself alone, and is seen by all.
        """
        length = self.length
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return F.pad(mask, (length, 0), value=1)
        known = isinstance(mask, Tensor) and (mask.dtype == torch.bool or mask.is_floating_point())
        if known and self.causal and tuple(mask.shape[-2:]) == (time, time):
            seen, hidden = (1, 0) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
            wide = F.pad(F.pad(mask, (length, 0), value=seen), (0, 0, length, 0), value=hidden)
            later = torch.ones(length, length, dtype=torch.bool, device=mask.device).triu(1)
            own = torch.full(later.shape, seen, dtype=mask.dtype, device=mask.device).masked_fill(later, hidden)
            wide[..., :length, :length] = own
            return wide
        shown = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"Virtual tokens need an attention mask of shape (batch, time); got {shown}. Pass the 2-D padding mask, or "
            "in a causal model (batch, 1, time, time) for packed texts, and generate with the default dynamic cache."
        )

    def numbered(self, mask: Tensor, time: int) -> Tensor:
        """Positions that do not count padding on the left, so that the prompt is as near as in a text alone."""
        text = torch.arange(mask.shape[1], device=mask.device) - (mask.cumsum(1) == 0).sum(1, keepdim=True)
        every = self.shifted(text.clamp(min=0), fresh=True)
        return every if time == mask.shape[1] else every[:, -time:]

    def shifted(self, positions: Tensor, fresh: bool) -> Tensor:
        length = self.length
        first = torch.arange(length, device=positions.device).expand(*positions.shape[:-1], -1)
        return torch.cat([first, positions + length], -1) if fresh else positions + length

    def stripped(self, out: Any) -> Any:
        """Take the tokens out of the hidden states; a pooler inside the model reads its token anew."""
        length = self.length
        pooled = self.owner._modules.get("pooler") is not None
        if not isinstance(out, dict):  # a plain tuple: hidden states first, then the pooled one where there is a pooler
            hidden = out[0][:, length:]
            return (hidden, *((self.pooled(hidden), *out[2:]) if pooled else out[1:]))
        out["last_hidden_state"] = out["last_hidden_state"][:, length:]
        if out.get("hidden_states") is not None:
            out["hidden_states"] = tuple(h[:, length:] for h in out["hidden_states"])
        if pooled and out.get("pooler_output") is not None:
            out["pooler_output"] = self.pooled(out["last_hidden_state"])
        return out

    def pooled(self, hidden: Tensor) -> Tensor:  # (batch, time, d) -> (batch, d)
        pooler: Any = self.owner.pooler
        if isinstance(pooler, nn.Linear):  # ALBERT takes the first token and the activation outside of it
            return self.owner.pooler_activation(pooler(hidden[:, 0]))  # type: ignore[operator]
        return pooler(hidden)


class CrossMask(Adapter):
    """Widens the decoder's mask over the encoder's output by the virtual tokens that are in it."""

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        mask, states = kwargs.get("encoder_attention_mask"), kwargs.get("encoder_hidden_states")
        if mask is not None and states is not None and mask.shape[-1] < states.shape[1]:
            kwargs["encoder_attention_mask"] = F.pad(mask, (states.shape[1] - mask.shape[-1], 0), value=1)
        return base(*args, **kwargs)


class StackTokens(Tokens):
    """[x_cls; P; x] at the first of a stack of blocks that see no mask (a vision transformer)."""

    def __init__(self, index: int, prompt: Prompt) -> None:
        super().__init__(prompt)
        self.index = index

    def forward(self, base: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:  # (batch, time, d)
        return base(self.put_in(x), *args, **kwargs)

    def put_in(self, x: Tensor) -> Tensor:  # (batch, time, d) -> (batch, time + length, d)
        return torch.cat([x[:, : self.index], self.rows(x, len(x)), x[:, self.index :]], 1)


class StripTokens(Adapter):
    """Takes `length` positions from `index` on out of what the last block of a stack returns."""

    def __init__(self, length: int, index: int) -> None:
        super().__init__()
        self.length, self.index = length, index

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return taken_out(base(*args, **kwargs), self.index, self.length)


def taken_out(out: Any, index: int, length: int) -> Any:
    """What a block returns without `length` positions from `index` on."""
    x = out[0] if isinstance(out, tuple) else out
    x = torch.cat([x[:, :index], x[:, index + length :]], 1)
    return (x, *out[1:]) if isinstance(out, tuple) else x


class BlockTokens(StackTokens):
    """[x_cls; P; x] into one block, and P out of what it returns: the next block gets its own."""

    def forward(self, base: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return taken_out(base(self.put_in(x), *args, **kwargs), self.index, self.length)


class EncoderTokens(Tokens):
    """[P; x] around a whole `nn.TransformerEncoder`, with its two masks."""

    def __init__(self, batch_first: bool, prompt: Prompt) -> None:
        super().__init__(prompt)
        self.batch_first = batch_first

    def forward(
        self,
        base: Callable[..., Tensor],
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        length, time = self.length, 1 if self.batch_first else 0
        tokens = self.rows(src, src.shape[1 - time])
        tokens = tokens if time else tokens.transpose(0, 1)
        if mask is not None:  # all see the tokens, the tokens see each other only
            hidden = True if mask.dtype == torch.bool else -torch.inf
            mask = F.pad(F.pad(mask, (length, 0)), (0, 0, length, 0), value=hidden)
            mask[..., :length, :length] = 0
        if src_key_padding_mask is not None:
            src_key_padding_mask = F.pad(src_key_padding_mask, (length, 0))
        causal = is_causal if mask is None else False  # a mask says it all
        out = base(torch.cat([tokens, src], time), mask, src_key_padding_mask, causal)
        return out.narrow(time, length, src.shape[time])


# ------------------------------------------------------------------ facts about the model
def cached_length(cache: Any) -> int:
    """Number of positions in a transformers cache; 0 for none."""
    return 0 if cache is None else int(cache.get_seq_length())


def texts_apart(owner: nn.Module, call: dict[str, Any]) -> bool:
    """Whether positions that begin anew tell texts of one row apart, as transformers does without mask and cache."""
    positions = call.get("position_ids")
    cached = call.get("use_cache", getattr(getattr(owner, "config", None), "use_cache", None))
    if positions is None or positions.dim() != 2 or cached or torch.compiler.is_compiling():
        return False
    return bool((positions.diff(dim=-1) != 1).any())


def blocks_of(positions: Tensor, embeds: Tensor) -> Tensor:
    """The mask (batch, 1, time, time) of packed texts, 0 where a token may look and the least number elsewhere."""
    text = F.pad((positions.diff(dim=-1) != 1).cumsum(-1), (1, 0))  # (batch, time): which text of the row
    seen = (text[:, :, None] == text[:, None]).tril().expand(len(embeds), -1, -1)
    mask = torch.zeros(seen.shape, dtype=embeds.dtype, device=embeds.device)
    return mask.masked_fill(~seen, torch.finfo(embeds.dtype).min)[:, None]


def check_length(owner: nn.Module, wanted: int) -> None:
    """Raise where learned absolute positions do not reach that far."""
    limit = getattr(getattr(owner, "config", None), "max_position_embeddings", None)
    if limit is not None and _learned_positions(owner) and wanted > limit - _offset(owner):
        raise ValueError(
            f"{wanted} positions (text and virtual tokens) in a {type(owner).__name__} with "
            f"{limit - _offset(owner)} learned "
            "positions. Shorten the text or the prompt."
        )


def _learned_positions(owner: nn.Module) -> bool:
    names = {name.rpartition(".")[2] for name, m in owner.named_modules() if isinstance(m, nn.Embedding)}
    return bool(names & {"position_embeddings", "wpe", "embed_positions"})


def _offset(owner: nn.Module) -> int:
    padding = padded_positions(owner)
    return 0 if padding is None else padding + 1


def counts_itself(owner: nn.Module) -> bool:
    """Whether a causal model makes its positions of the mask by itself (OPT)."""
    tables = (m for m in owner.modules() if isinstance(m, nn.Embedding))
    return any("attention_mask" in inspect.signature(type(m).forward).parameters for m in tables)


def padded_positions(owner: nn.Module) -> int | None:
    """The padding index of models that count positions over unpadded tokens (RoBERTa and its like), else None."""
    embeddings: Any = getattr(owner, "embeddings", None)
    if hasattr(embeddings, "create_position_ids_from_inputs_embeds") or hasattr(
        embeddings, "create_position_ids_from_input_ids"
    ):
        return embeddings.padding_idx
    return None
