"""What a prompt starts from: text, the names of classes, or other prompts; read when the method is applied."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_peft.core.fields import FieldError
from lightning_peft.core.files import AdapterFileError, read_tensors
from lightning_peft.core.sites import TargetError

if TYPE_CHECKING:
    from lightning_peft.methods.prompt_tuning import PromptTuning

Init = Literal["uniform", "normal", "vocabulary", "text", "labels", "prompt"]
START = {"init": "uniform", "text": None, "labels": None, "tokenizer": None, "source": None, "weights": None}
NEEDS = {"text": "text", "labels": "labels", "prompt": "source"}


def check_start(method: PromptTuning) -> None:
    name = type(method).__name__
    for init, field in NEEDS.items():
        if (method.init == init) != bool(getattr(method, field)):
            raise FieldError(
                f"{name}(init={method.init!r}, {field}={getattr(method, field)!r}): init={init!r} and `{field}` go "
                "together."
            )
    strings = isinstance(method.text, str) or any(isinstance(label, str) for label in method.labels or ())
    if strings != (method.tokenizer is not None):
        raise FieldError(f"{name}: `tokenizer` belongs to text or labels that are strings; got {method.tokenizer!r}.")
    if len(method.labels or ()) > method.length:
        raise FieldError(f"{name}: {len(method.labels or ())} labels are more than length={method.length}.")
    many = len(method.source) if isinstance(method.source, list) else 0
    if method.weights is not None and (len(method.weights) != many or sum(method.weights) == 0):
        raise FieldError(f"{name}(weights={method.weights!r}): give one for each of {many} sources, not all zero.")


def ids_of(method: PromptTuning) -> tuple[tuple[int, ...], ...]:
    """Token ids of the text (one list) or of each label."""
    given: list[Any] = [method.text] if method.init == "text" else list(method.labels or ())
    if any(isinstance(item, str) for item in given):
        transformers: Any = importlib.import_module("transformers")
        tokenizer = transformers.AutoTokenizer.from_pretrained(method.tokenizer)
        given = [tokenizer(t, add_special_tokens=False)["input_ids"] if isinstance(t, str) else t for t in given]
    if not all(given):
        raise FieldError(f"{type(method).__name__}: a text or a label has no token.")
    return tuple(tuple(item) for item in given)


def sources(method: PromptTuning, width: int) -> Tensor:
    """The weighed mean of the source prompts: (length, d)."""
    paths = [method.source] if isinstance(method.source, str) else method.source or []
    prompts = [read_prompt(path) for path in paths]
    for path, prompt in zip(paths, prompts, strict=True):
        if tuple(prompt.shape) != (method.length, width):
            raise TargetError(
                f"source={path!r} holds a prompt of {tuple(prompt.shape)}; {(method.length, width)} is needed here. "
                "Use the same base and the same length."
            )
    weights = torch.tensor(method.weights or [1.0] * len(prompts))
    return torch.einsum("n,nld->ld", weights / weights.sum(), torch.stack(prompts))


def read_prompt(directory: str | Path) -> Tensor:
    """The prompt (length, d) of an adapter directory."""
    found = [t for key, t in read_tensors(directory).items() if key.endswith("/prompt.tokens")]
    if len(found) != 1 or found[0].dim() != 2:
        raise AdapterFileError(f"{directory} holds {len(found)} prompts (length, d); one is needed.")
    return found[0].float()
