"""Which positions of a batch an edit acts on, known inside the blocks: the padding mask is seen by the whole model
only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.adapter import Adapter
from lightning_peft.core.embedding import cached_length

Masks = tuple[Tensor, Tensor]
MASKS = {"attention_mask", "src_key_padding_mask"}


class Positions(Adapter):
    """Around the whole model: notes which tokens are real and which belong to the prompt; changes nothing.

    A token belongs to the prompt if it comes before the first label that counts (labels of shape (batch, time), -100 =
    ignored); without such labels every real token does. While a cache is being extended nothing is edited.
    """

    def __init__(self, owner: nn.Module, answers: bool) -> None:
        super().__init__()
        self.answers = answers  # a causal model: labels tell where the prompt ends
        self.recording = False
        self.names = list(inspect.signature(type(owner).forward).parameters)[1:]
        self.running = False
        self.prompt: Tensor | None = None  # (batch, time), True for the tokens of the prompt; None: all of them
        self.generating = False
        self.remembered: dict[tuple[int, tuple[int, ...]], Masks | None] = {}

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = dict(zip(self.names, args, strict=False)) | kwargs
        self.generating = cached_length(call.get("past_key_values")) > 0
        if packed(call):
            raise ValueError(
                "position_ids start again inside a row and there is no mask: several texts are packed into one, and "
                "the first and last tokens of each are unknown. Give every text a row of its own."
            )
        self.prompt = None if self.generating else self.read(call)
        self.running = True
        self.recording = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        try:
            return base(*args, **kwargs)
        finally:
            self.running = False

    def read(self, call: dict[str, Any]) -> Tensor | None:
        """What a call says about its tokens: (batch, time) or None."""
        return prompt_mask(call, self.answers)

    def mask(self, given: Tensor, first: int, last: int) -> Masks | None:
        """(batch, time) masks of the first `first` and the last `last` prompt tokens; None where nothing is edited.

        given: the block's input (batch, time, d). Activation checkpointing runs a block again when the model is done;
        its input is by then all that tells which call it was.
        """
        if self.running:
            masks = None if self.generating else self.chosen(self.prompt, given, first, last)
            if self.recording:
                self.remember(given, masks)
            return masks
        return self.recall(given, first, last)

    def remember(self, given: Tensor, masks: Masks | None) -> None:
        """By where the tensor lies: what it is called changes between the two runs, and so may the tensor object."""
        self.remembered[given.data_ptr(), tuple(given.shape)] = masks
        while len(self.remembered) > 4096:
            self.remembered.pop(next(iter(self.remembered)))

    def recall(self, given: Tensor, first: int, last: int) -> Masks | None:
        key = given.data_ptr(), tuple(given.shape)
        if torch.is_grad_enabled() and key in self.remembered:
            return self.remembered[key]
        return self.chosen(None, given, first, last)  # the block is called by itself: all tokens are real

    def chosen(self, prompt: Tensor | None, given: Tensor, first: int, last: int) -> Masks:
        """The masks, from where the prompt is."""
        return ends(prompt, given, first, last)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "remembered": {}, "prompt": None}


class RealTokens(Positions):
    """All real tokens, twice, for methods that average over a text; what this module is not told, an outer one may be.

    Generation runs an encoder alone, and inside of a model the mask is (batch, 1, time, source) soon.
    """

    def __init__(self, owner: nn.Module, outer: RealTokens | None) -> None:
        super().__init__(owner, answers=False)
        self.outer: Any
        vars(self)["outer"] = outer  # it is registered where it listens

    def read(self, call: dict[str, Any]) -> Tensor | None:
        """Masks of pairs are left to an outer module, where there is one, which sees them as they were given."""
        masks = (call.get(name) for name in MASKS)
        pairs = any(isinstance(m, Tensor) and m.dim() > 2 for m in masks)
        return None if pairs and self.outer is not None else super().read(call)

    def chosen(self, prompt: Tensor | None, given: Tensor, first: int, last: int) -> Masks:
        outer = self.outer
        while prompt is None and outer is not None:
            prompt, outer = outer.prompt if outer.running else None, outer.outer
        real = full(prompt, given)
        return real, real


def packed(call: dict[str, Any]) -> bool:
    """Whether the rows of a transformers model hold several texts each, told by their positions alone."""
    positions = call.get("position_ids")
    if type(positions) is not Tensor or positions.is_meta or torch.compiler.is_compiling():  # no numbers to look at
        return False
    return call.get("attention_mask") is None and bool((positions.diff(dim=-1) <= 0).any())


def prompt_mask(call: dict[str, Any], answers: bool) -> Tensor | None:
    """(batch, time), True where a token is real and before the first label; None without mask and labels."""
    mask, labels = call.get("attention_mask"), call.get("labels")
    if mask is None and (hidden := call.get("src_key_padding_mask")) is not None:
        mask = ~hidden if hidden.dtype == torch.bool else hidden == 0
    given = next((call[n] for n in ("input_ids", "inputs_embeds") if call.get(n) is not None), None)
    mask = real_tokens(mask, None if given is None else given.shape[1])
    if answers and isinstance(labels, Tensor) and labels.dim() == 2:
        before = (labels != -100).cumsum(1) == 0
        before = before | ~(labels != -100).any(1, keepdim=True)
        if mask is None or mask.shape == before.shape:
            mask = before if mask is None else mask & before
    return mask


def real_tokens(mask: Any, time: int | None) -> Tensor | None:
    """(batch, time), True where a token is real; None without a mask.

    mask: of padding, (batch, time), or of pairs, (batch, 1, time or 1, source), such as `generate` makes for a cache of
    fixed size. One of pairs must be padding alone, causal or not: where it keeps texts of a row apart, nobody knows
    which ends are meant.
    """
    if isinstance(mask, dict):  # transformers: one for each kind of layer
        mask = mask.get("full_attention", mask)
    if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
        return None if mask is None else mask.bool()[:, :time]  # BLOOM's is as long as a cache of fixed size
    if isinstance(mask, Tensor) and mask.dim() == 4:
        seen = (mask == 0 if mask.is_floating_point() else mask.bool())[:, 0]
        time = time or seen.shape[2]
        real = seen[:, -1, :time]  # the last token looks at all that are real
        if seen.shape[1] != time or mask.is_meta or torch.compiler.is_compiling():  # or no numbers to look at
            return real
        if padding_alone(seen[..., :time], real):
            return real
    shown = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    raise ValueError(
        f"An attention mask {shown} that says more than what is padding: which tokens are one text, and which are its "
        "first and last, cannot be told from it. Pass the mask (batch, time), and give every text a row of its own."
    )


def padding_alone(seen: Tensor, real: Tensor) -> bool:
    """Whether pairs (batch, time, time) are those of the real tokens (batch, time), all or the earlier ones.

    Padding may look at real tokens, or at all where softmax needs something.
    """
    column = real[:, :, None]
    stray = seen & ~real[:, None] & (column | ~seen.all(-1, keepdim=True))
    pairs = real[:, None] & column
    read = seen & column
    return not bool(stray.any()) and (torch.equal(read, pairs) or torch.equal(read, pairs.tril()))


def ends(prompt: Tensor | None, hidden: Tensor, first: int, last: int) -> Masks:
    """First min(first, n // 2) and last min(last, n // 2) of the n prompt tokens of each row; both (batch, time)."""
    prompt = full(prompt, hidden)
    count = prompt.cumsum(1)  # 1 for the first token of the prompt
    n = count[:, -1:]
    return prompt & (count <= (n // 2).clamp(max=first)), prompt & (count > n - (n // 2).clamp(max=last))


def full(prompt: Tensor | None, hidden: Tensor) -> Tensor:
    """(batch, time) for `hidden` (batch, time, d): all tokens without a mask, no virtual tokens in front."""
    time = hidden.shape[1]
    if prompt is None:
        return hidden.new_ones(hidden.shape[:2], dtype=torch.bool)
    return prompt if prompt.shape[1] >= time else nn.functional.pad(prompt, (time - prompt.shape[1], 0), value=False)


def mask_owner(ancestors: list[nn.Module]) -> nn.Module | None:
    """The outermost module whose forward takes a padding mask, and no images or sounds, which have none."""
    return next((module for module in ancestors if takes_mask(module)), None)


def takes_mask(module: nn.Module) -> bool:
    """Whether a forward takes a padding mask, and no images or sounds, which have none."""
    names = set(inspect.signature(type(module).forward).parameters)
    return bool(names & MASKS) and not names & {"pixel_values", "input_features"}
