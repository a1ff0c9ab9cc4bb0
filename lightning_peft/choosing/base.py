"""The model that methods are chosen for, without memory, and which methods can be applied to it."""

from __future__ import annotations

import copy
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

import lightning_peft.methods  # noqa: F401  fills the registry
from lightning_peft.choosing.candidates import Candidate, ChooseError, Needs
from lightning_peft.choosing.starts import KINDS, STARTS, Kind, Start
from lightning_peft.core import state
from lightning_peft.core.method import REGISTRY, NothingToTrainError
from lightning_peft.core.quant import QuantisationError
from lightning_peft.core.quantised import is_quantised
from lightning_peft.core.sites import TargetError
from lightning_peft.planning.planner import counts, title
from lightning_peft.planning.precision import QUANTISED, arithmetic
from lightning_peft.planning.shadow import hollow


class Base:
    """The model that methods are for, without memory; left_out gets why a method cannot be used."""

    def __init__(self, model: nn.Module, kind: Kind, needs: Needs) -> None:
        if kind not in KINDS:
            raise ChooseError(f"kind={kind!r}. Known: {', '.join(KINDS)}.")
        self.kind, self.needs, self.model = kind, needs, model
        self.left_out: dict[str, str] = {}
        self.title = title(model)
        self.shadow = hollow(model, "meta")
        self.parameters = counts(self.shadow)["parameters"]
        if not self.parameters:
            raise ChooseError(f"This {self.title} has no parameters yet. Build it first (configure_model, setup).")
        if needs.quantised:
            try:
                arithmetic("nf4").convert(self.shadow)
            except QuantisationError as error:
                raise ChooseError(f"The base cannot be quantised: {error}") from error

    def starts(self) -> Iterator[Start]:
        """Those for this model and this kind of data."""
        for start in STARTS:
            fits = self.kind in start.kinds and start.size[0] <= self.parameters < start.size[1]
            if fits and start.quantised in (None, self.needs.quantised):
                yield start

    def candidates(self) -> Iterator[Candidate]:
        """Methods that can be applied, with their counts."""
        for start in self.starts():
            method = REGISTRY[start.method](**start.settings)
            try:
                facts = state.describe(method.apply(copy.deepcopy(self.shadow)))
            except (TargetError, NothingToTrainError, QuantisationError, ValueError, NotImplementedError) as error:
                self.left_out[start.method] = first_sentence(error)
                continue
            share = facts["trainable"] / max(self.parameters, 1)
            yield Candidate(method.info, start, method, facts["trainable"], share, overrides=words_of(start))


def in_codes(model: nn.Module, precision: Any) -> bool:
    """Whether weights of the base are quantised, or will be by the precision."""
    return any(is_quantised(m) for m in model.modules()) or arithmetic(precision).name in QUANTISED


def kind_of(model: nn.Module) -> Kind:
    """By the names of the classes: of language models that write, of images; else classification."""
    names = {type(m).__name__ for m in model.modules()}
    if any(name.endswith(("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")) for name in names):
        return "causal-lm"
    images = any("VisionTransformer" in n or "ImageClassification" in n or n.startswith("ViT") for n in names)
    return "image" if images else "classification"


def first_sentence(error: Exception) -> str:
    """What an error says, up to its first full stop."""
    text = " ".join(str(error).split())
    return text.partition(". ")[0].rstrip(".") or type(error).__name__


# ------------------------------------------------------------------ words of a command line
def words_of(start: Start) -> tuple[str, ...]:
    """A start as overrides of Hydra."""
    return (f"peft={start.method}", *(f"peft.{name}={word(v)}" for name, v in start.settings.items()), *start.run)


def word(value: Any) -> str:
    """A value as Hydra reads it; with commas it would be a sweep."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{value}]" if isinstance(value, str) and "," in value else str(value)


def command(overrides: Sequence[str], words: Sequence[str]) -> str:
    """The command that starts a run: the user's words, then what of the start they leave open."""
    mine = [given for given in words if not given.startswith(("peft=", "peft.", "peft/"))]
    keys = {key_of(given) for given in mine}
    rest = [each for each in overrides if key_of(each) not in keys]
    return shlex.join(["lightning-peft", "train", *mine, *rest])


def key_of(override: str) -> str:
    """The part of an override before its value."""
    return override.partition("=")[0].lstrip("+~")
