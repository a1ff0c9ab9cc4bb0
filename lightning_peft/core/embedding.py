"""The input site: virtual tokens in front of the text, with the masks, positions and token types that they need.

The tokens are put in where the model embeds its input and taken out of what the model returns, so that logits, labels,
pooling by index and losses outside of it line up with the text as before. In an encoder-decoder they stay in the
encoder's output, since the decoder attends to them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core.adapter import Adapter
from lightning_peft.core.init import Draw


class Tokens(Adapter):
    """P (length, d): uniform in [-0.5, 0.5], normal N(0, 1), or `vocabulary` > 0: some of the first rows of a table."""

    def __init__(self, length: int, width: int, init: str, table: nn.Module | None = None, vocabulary: int = 0) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(length, width))
        self.init, self.vocabulary = init, vocabulary
        self.table: Any
        vars(self)["table"] = table  # not registered: it is the base's own embedding

    def reset(self, draw: Draw) -> None:
        if self.init == "uniform":
            draw.uniform(self.tokens, bound=0.5)
        elif self.init == "normal":
            draw.normal(self.tokens, std=1.0)
        elif not self.tokens.is_meta:
            rows: Tensor = self.table.weight[: self.vocabulary].detach()
            self.tokens.data.copy_(rows[draw.integers(len(rows), len(self.tokens)).to(rows.device)])


class VirtualTokens(Tokens):
    """[P; Emb(x)]: around the module of a transformers model that embeds `input_ids`."""

    def __init__(self, owner: nn.Module, *tokens: Any, strip: bool) -> None:
        super().__init__(*tokens)
        self.strip = strip
        self.owner: Any
        self.names = list(inspect.signature(type(owner).forward).parameters)[1:]
        vars(self)["owner"] = owner  # not registered: it holds this adapter

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = dict(zip(self.names, args, strict=False)) | kwargs
        past = cached_length(call.get("past_key_values"))
        ids, embeds = call.pop("input_ids", None), call.pop("inputs_embeds", None)
        if embeds is None:
            embeds = self.owner.get_input_embeddings()(ids)
        self.extend(call, ids, embeds, fresh=past == 0)
        if past:  # a step of generation: the tokens are in the cache
            return base(inputs_embeds=embeds, **call)
        tokens = self.tokens.to(embeds.dtype).expand(len(embeds), -1, -1)
        out = base(inputs_embeds=torch.cat([tokens, embeds], 1), **call)
        return self.stripped(out) if self.strip else out

    def extend(self, call: dict[str, Any], ids: Tensor | None, embeds: Tensor, fresh: bool) -> None:
        """Make room for the tokens in everything that has one entry per position."""
        length = len(self.tokens)
        check_length(self.owner, length + embeds.shape[1])
        if fresh and packed(call):
            raise ValueError(
                "position_ids start again inside a row and there is no mask: several texts are packed into one, of "
                "which only the first would see the virtual tokens. Give every text a row of its own, or use "
                "prefix_tuning."
            )
        if (mask := call.get("attention_mask")) is not None:
            if not isinstance(mask, Tensor) or mask.dim() != 2:
                raise ValueError(
                    "Virtual tokens need an attention mask of shape (batch, time); got "
                    f"{tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}. Pass the 2-D "
                    f"padding mask, "
                    "and generate with the default dynamic cache."
                )
            call["attention_mask"] = F.pad(mask, (length, 0), value=1)
        if (positions := call.get("position_ids")) is not None:
            call["position_ids"] = self.shifted(positions, fresh)
        elif fresh and ids is not None and (padding := padded_positions(self.owner)) is not None:
            real = F.pad((ids != padding).long(), (length, 0), value=1)
            call["position_ids"] = real.cumsum(1) * real + padding
        if fresh and (types := call.get("token_type_ids")) is not None:
            call["token_type_ids"] = F.pad(types, (length, 0))

    def shifted(self, positions: Tensor, fresh: bool) -> Tensor:
        length = len(self.tokens)
        first = torch.arange(length, device=positions.device).expand(*positions.shape[:-1], -1)
        return torch.cat([first, positions + length], -1) if fresh else positions + length

    def stripped(self, out: Any) -> Any:
        """Take the tokens out of the hidden states; a pooler inside the model reads its token anew."""
        length = len(self.tokens)
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

    def __init__(self, index: int, *tokens: Any) -> None:
        super().__init__(*tokens)
        self.index = index

    def forward(self, base: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:  # (batch, time, d)
        tokens = self.tokens.to(x.dtype).expand(len(x), -1, -1)
        return base(torch.cat([x[:, : self.index], tokens, x[:, self.index :]], 1), *args, **kwargs)


class StripTokens(Adapter):
    """Takes `length` positions from `index` on out of what the last block of a stack returns."""

    def __init__(self, length: int, index: int) -> None:
        super().__init__()
        self.length, self.index = length, index

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        out = base(*args, **kwargs)
        x = out[0] if isinstance(out, tuple) else out
        x = torch.cat([x[:, : self.index], x[:, self.index + self.length :]], 1)
        return (x, *out[1:]) if isinstance(out, tuple) else x


class EncoderTokens(Tokens):
    """[P; x] around a whole `nn.TransformerEncoder`, with its two masks."""

    def __init__(self, batch_first: bool, *tokens: Any) -> None:
        super().__init__(*tokens)
        self.batch_first = batch_first

    def forward(
        self,
        base: Callable[..., Tensor],
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        length, time = len(self.tokens), 1 if self.batch_first else 0
        tokens = (
            self.tokens.to(src.dtype)
            .unsqueeze(1 - time)
            .expand(*(len(src), -1, -1) if time else (-1, src.shape[1], -1))
        )
        if mask is not None:  # all see the tokens, the tokens see each other only
            hidden = True if mask.dtype == torch.bool else -torch.inf
            mask = F.pad(F.pad(mask, (length, 0)), (0, 0, length, 0), value=hidden)
            mask[..., :length, :length] = 0
        if src_key_padding_mask is not None:
            src_key_padding_mask = F.pad(src_key_padding_mask, (length, 0))
        causal = None if mask is None else False
        out = base(torch.cat([tokens, src], time), mask, src_key_padding_mask, causal)
        return out.narrow(time, length, src.shape[time])


# ------------------------------------------------------------------ facts about the model
def cached_length(cache: Any) -> int:
    """Number of positions in a transformers cache; 0 for none."""
    return 0 if cache is None else int(cache.get_seq_length())


def packed(call: dict[str, Any]) -> bool:
    """Whether the rows of a transformers model hold several texts each, told by their positions alone."""
    positions = call.get("position_ids")
    if type(positions) is not Tensor or positions.is_meta or torch.compiler.is_compiling():  # no numbers to look at
        return False
    return call.get("attention_mask") is None and bool((positions.diff(dim=-1) <= 0).any())


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


def padded_positions(owner: nn.Module) -> int | None:
    """The padding index of models that count positions over unpadded tokens (RoBERTa and its like), else None."""
    embeddings: Any = getattr(owner, "embeddings", None)
    if hasattr(embeddings, "create_position_ids_from_inputs_embeds") or hasattr(
        embeddings, "create_position_ids_from_input_ids"
    ):
        return embeddings.padding_idx
    return None
