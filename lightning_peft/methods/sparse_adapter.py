"""SparseAdapter: An Easy Approach for Improving the Parameter-Efficiency of Adapters. He et al., Findings of EMNLP
2022. https://arxiv.org/abs/2210.04284
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args, get_type_hints

import lightning.pytorch as pl
from torch import nn

from lightning_peft.callback import PEFT
from lightning_peft.core import state
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.calibration import Run, plain_run
from lightning_peft.core.fields import FieldError, positive, probability
from lightning_peft.core.method import REGISTRY, Method
from lightning_peft.core.pruned import WITH_DATA, Group, Pruned, score_and_prune
from lightning_peft.core.sites import Site, Sites
from lightning_peft.methods.calibrated import quiet, step_of, training_batches


class SparseAdapter(PEFT, name="sparse_adapter", family="additive", paper="2210.04284", identity=False):
    """W o M in place of each W of another adapter, M of zeros and ones: the largest scores of all adapters together

    sparsity: the share of the entries of all matrices that is pruned before training, and stays zero; biases are kept.
    The authors' code calls the share that is kept its sparsity. What M keeps counts as trained. Source: section 2.

    over: the name of the method whose adapters are pruned, at its own targets unless others are given here. settings:
    the fields of that method, such as {"bottleneck": 64}. It starts away from zero (init "normal" where there is a
    choice), since W_up = 0 would go as a whole.

    score: "snip" |g W|, "grasp" W (H g), "magnitude" |W|, "synflow" |W dR/dW| of each adapter for ones, or "random".
    The first two need data, and until they have it nothing is pruned. batches: how many of the training data they take
    at the start of `fit`; or call `calibrate`. large: k times the bottleneck or rank with 1 - 1/k of the entries pruned
    in place of `sparsity`, which keeps the count (Large-Sparse); 1 for off.
    """

    over: str = "houlsby"
    settings: dict[str, bool | int | float | str | list[str] | None] = dataclasses.field(default_factory=dict)
    score: Literal["snip", "grasp", "magnitude", "synflow", "random"] = "snip"
    sparsity: float = 0.4
    large: int = 1
    batches: int = 8

    def check(self) -> None:
        positive(self, "large", "batches")
        probability(self, "sparsity")
        self.inner()

    # -------------------------------------------------------------- what is pruned
    def inner(self) -> Method:
        """The method whose adapters are pruned."""
        cls = REGISTRY.get(self.over)
        if cls is None or cls is type(self):
            raise FieldError(
                f"SparseAdapter(over={self.over!r}): no such method. Known: {', '.join(sorted(REGISTRY))}."
            )
        fields: dict[str, Any] = {**started(cls), **self.settings}
        fields |= {"layers": self.layers, "exclude": self.exclude, "roles": self.roles, "seed": self.seed}
        if self.targets is not None:
            fields["targets"] = self.targets
        if self.large > 1:
            fields |= self.widened(cls)
        inner = cls(**fields)
        if more := more_than_adapters(cls, inner):
            raise FieldError(
                f"SparseAdapter(over={self.over!r}): {cls.__name__} is more than adapters ({more}), which pruning "
                "would not follow. Choose a method of adapters alone, such as houlsby, parallel or compacter."
            )
        return inner

    def widened(self, cls: type[Method]) -> dict[str, Any]:
        """The bottleneck, or the rank, times k."""
        defaults = {f.name: f.default for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        name = next((n for n in ("bottleneck", "rank") if n in defaults), None)
        if name is None:
            raise FieldError(f"SparseAdapter(large={self.large}): {cls.__name__} has no bottleneck and no rank.")
        return {name: self.large * self.settings.get(name, defaults[name])}  # type: ignore[operator]

    @property
    def places(self) -> str | list[str] | None:
        return self.inner().places

    def adapters(self, sites: Sites) -> Iterator[tuple[Site, Adapter]]:
        group = Group(self.score, 1 - 1 / self.large if self.large > 1 else self.sparsity)
        for site, adapter in self.inner().adapters(sites):
            if any(p.dim() > 1 for p in adapter.parameters()):
                adapter = Pruned(adapter, group, (site.in_features, site.out_features))
            yield site, adapter
        if sites and not group.members:
            raise FieldError(f"SparseAdapter(over={self.over!r}): its adapters have no matrix to prune.")

    # -------------------------------------------------------------- scores that need data
    def group(self, model: nn.Module) -> Group:
        """The adapters of this method on a model."""
        placements = state.get_applied(model, self.name_on_model).placements
        return next(x.adapter.group for x in placements if isinstance(x.adapter, Pruned))

    def calibrate(self, model: nn.Module, batches: Iterable[Any], run: Run | None = None) -> int:
        """Prune by what these batches say; before `fit`, or without a Trainer.

        run(batch, index) -> loss; by default a LightningModule's training_step, else the model's own call with the
        batch as keywords, positions or as it is. Everything is in eval mode.
        """
        group = self.group(model)
        if self.score not in WITH_DATA:
            raise FieldError(f"SparseAdapter(score={self.score!r}) needs no data: it is pruned already.")
        if not isinstance(model, pl.LightningModule) or run is not None:
            return score_and_prune(model, group, batches, run or plain_run(model))
        with quiet(model):
            return score_and_prune(model, group, batches, step_of(model))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.score not in WITH_DATA or self.group(pl_module).settled:
            return
        with training_batches(self, trainer, pl_module) as given:
            self.calibrate(pl_module, given)


def started(cls: type[Method]) -> dict[str, str]:
    """A start away from zero, where the method has a choice."""
    choices = get_args(get_type_hints(cls).get("init"))
    return {"init": next(c for c in choices if c != "zero")} if "zero" in choices else {}


def more_than_adapters(cls: type[Method], inner: Method) -> str:
    """What a method does beside its adapters."""
    own = [name for c in cls.__mro__ if issubclass(c, PEFT) and c is not PEFT for name in vars(c)]
    hooks = [name for name in own if name.startswith("on_") or name in ("extra_loss", "state_dict")]
    several = ["several methods in one"] if inner.parts() or type(inner).parts_on is not PEFT.parts_on else []
    selects = ["weights of the base"] if cls.select is not Method.select and inner.scope != "nothing" else []
    return ", ".join(hooks + several + selects)
