"""The model that methods are chosen for, without memory, and which methods can be applied to it."""

from __future__ import annotations

import copy
import difflib
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

import lightning_peft.methods  # noqa: F401  fills the registry
from lightning_peft.choosing.candidates import Candidate, ChooseError, Needs
from lightning_peft.choosing.starts import KINDS, STARTS, Kind, Start
from lightning_peft.core import state
from lightning_peft.core.method import REGISTRY, Method, NothingToTrainError
from lightning_peft.core.quant import QuantisationError
from lightning_peft.core.quantised import is_quantised
from lightning_peft.core.sites import TargetError
from lightning_peft.methods.selective import SelectiveTuning
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

    def starts(self, asked: Collection[str] = ()) -> Iterator[Start]:
        """Those for this model and this kind of data, and the defaults of others that are asked for."""
        found = set()
        for start in STARTS:
            fits = self.kind in start.kinds and start.size[0] <= self.parameters < start.size[1]
            if fits and start.quantised in (None, self.needs.quantised):
                found.add(start.method)
                yield start
        yield from (Start(name, None) for name in asked if name not in found)

    def candidates(self, asked: Collection[str] = ()) -> Iterator[Candidate]:
        """Methods with their settings, without their counts."""
        for start in self.starts(asked):
            method = REGISTRY[start.method](**start.settings)
            yield Candidate(method.info, start, method, overrides=words_of(start))

    def counted(self, c: Candidate) -> Candidate | None:
        """With what it trains on this model; None, and a word on why, where it cannot be applied."""
        try:
            model = c.method.apply(copy.deepcopy(self.shadow))
        except (TargetError, NothingToTrainError, QuantisationError, ValueError, NotImplementedError) as error:
            self.left_out[c.info.name] = first_sentence(error)
            return None
        facts = state.describe(model)
        size = facts["bytes"] + chosen_later(c.method, model)
        return replace(c, trained=facts["trainable"], share=facts["trainable"] / self.parameters, bytes=size)


def chosen_later(method: Method, model: nn.Module) -> int:
    """What a file holds more than a checkpoint does before entries are chosen: a place and a value each."""
    if not isinstance(method, SelectiveTuning):
        return 0
    chooser = method.chooser(model)
    entries = chooser.entries
    entry = entries.v.element_size() + entries.index.element_size()
    return entry * chooser.choice.count - sum(t.nbytes for t in (*entries.parameters(), *entries.buffers()))


def known(asked: Sequence[str]) -> tuple[str, ...]:
    """Names of methods."""
    for name in asked:
        if name not in REGISTRY:
            near = difflib.get_close_matches(name, REGISTRY, 3) or sorted(REGISTRY)
            raise ChooseError(f"methods={[*asked]}: {name!r} is no method. Known: {', '.join(near)}.")
    return tuple(dict.fromkeys(asked))


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
    """The command that starts a run: the user's words, then what of the start they leave open.

    Codes of the kind that a method needs are its own to say.
    """
    theirs = ("peft=", "peft.", "peft/", "~peft", "+peft", *(w for w in ("precision=",) if precision_of(overrides)))
    mine = [given for given in words if not given.startswith(theirs)]
    keys = {key_of(given): given.partition("=")[2] for given in mine}
    rest = [each for each in overrides if key_of(each) not in keys and not foreign(key_of(each), keys, overrides)]
    return shlex.join(["lightning-peft", "train", *mine, *rest])


def precision_of(overrides: Sequence[str]) -> str | None:
    """The precision that a start asks for."""
    return next((each.partition("=")[2] for each in overrides if key_of(each) == "precision"), None)


def foreign(key: str, given: Mapping[str, str], overrides: Sequence[str]) -> bool:
    """Whether a setting belongs to another optimizer or scheduler than the user's; all of Adam's kind share a rate."""
    group, _, name = key.partition(".")
    if group not in ("optimizer", "scheduler") or group not in given:
        return False
    own = any(key_of(each) == group for each in overrides)
    return own or not (name == "lr" and "adam" in given[group])


def key_of(override: str) -> str:
    """The part of an override before its value."""
    return override.partition("=")[0].lstrip("+~")
