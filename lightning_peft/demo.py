"""LoRA beside a linear probe on the same split: what adapting a model is worth over using it as it is."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score
from typing_extensions import override

from lightning_peft.checks import ConfigError, methods_of
from lightning_peft.config import build
from lightning_peft.results import wilson
from lightning_peft.tasks.pooling import PooledClassifier, pool
from lightning_peft.train import build_task, run

log = logging.getLogger("lightning_peft")
PENALTIES = [3.0 * 10**power * step for power in range(-5, -1) for step in (1, 10 / 3)]
"""Of the squared weights: 3e-5, 1e-4, 3e-4, ..., 0.1"""


class Split(NamedTuple):
    """Features (examples, width) and labels (examples,)."""

    features: Tensor
    labels: Tensor


def compare(config: DictConfig) -> dict[str, Any]:
    """Run the config, probe the same model on the same data, and print both. -> the numbers, also in demo.json"""
    tuned = run(config)
    if not tuned:
        return {}  # not the first process
    probe = linear_probe(config)
    numbers = {"method": tuned, "probe": probe}
    directory = Path(config.run_dir)
    (directory / "demo.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    print(report(tuned, probe, directory, method_name(config)))
    return numbers


def method_name(config: DictConfig) -> str:
    """The classes of the methods, for people to read."""
    names = [node._target_.rpartition(".")[2] for node in methods_of(config).values()]
    return " and ".join(names) or "no method"


# ------------------------------------------------------------------ the probe
class Probe(NamedTuple):
    """W (classes, width) and b (classes,) for the features as they are, and what they score."""

    weight: Tensor
    bias: Tensor
    scores: dict[str, float]


def linear_probe(config: DictConfig) -> dict[str, float]:
    """The scores of the best probe of the frozen model."""
    data = build(config.data)
    data.setup("fit")
    model = pooled(build_task(config, data.classes).eval().model)
    return best_probe(features(model, data, ("train", "val", "test")), len(data.classes)).scores


def best_probe(splits: dict[str, Split], classes: int) -> Probe:
    """The penalty, and whether features are standardised, are what scores best on the validation split."""
    tries = [(scaled, penalty) for scaled in (False, True) for penalty in PENALTIES]
    fitted = [fit(splits, scaled, penalty, classes) for scaled, penalty in tries]
    return max(fitted, key=lambda probe: probe.scores["val/accuracy"])


class ProbedHead(pl.Callback):
    """Start the head at the linear probe of the model, then fine-tune both.

    A head that starts at random pulls the features towards itself first, which costs most on data unlike the training
    data. Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution. Kumar et al., ICLR 2022.
    https://arxiv.org/abs/2202.10054
    """

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.ckpt_path is not None:
            return  # the checkpoint has a head
        model, data = pooled(pl_module.model), trainer.datamodule  # type: ignore[attr-defined]
        training = model.training
        probe = best_probe(features(model.eval(), data, ("train", "val")), model.head.out_features)
        model.train(training)
        with torch.no_grad():
            model.head.weight.copy_(probe.weight)
            model.head.bias.copy_(probe.bias)
        log.info("head: starts at the linear probe, val/accuracy %.4f", probe.scores["val/accuracy"])


def pooled(model: Any) -> PooledClassifier:
    """The model, if it has features to probe."""
    if not isinstance(model, PooledClassifier):
        raise ConfigError(
            f"The probe needs a backbone with a pooled head, this model is a {type(model).__name__}. Use model=minilm,"
            " or model=hf with model.pooling=mean."
        )
    return model


@torch.no_grad()
def features(model: PooledClassifier, data: Any, names: Sequence[str]) -> dict[str, Split]:
    """split -> what the head sees"""
    device, found = model.head.weight.device, {}
    for name in names:
        parts = []
        for batch in getattr(data, f"{name}_dataloader")():
            ids, mask, labels = (batch[key].to(device) for key in ("input_ids", "attention_mask", "labels"))
            hidden = model.backbone(input_ids=ids, attention_mask=mask)
            parts.append((pool(getattr(hidden, "last_hidden_state", hidden), mask, model.pooling), labels))
        inputs, targets = zip(*parts, strict=True)
        found[name] = Split(torch.cat(inputs), torch.cat(targets))
    return found


def fit(splits: dict[str, Split], scaled: bool, penalty: float, classes: int) -> Probe:
    """Fit on "train" -> the probe, with accuracy and macro-F1 on the other splits"""
    inputs, labels = splits["train"]
    mean, std = inputs.mean(0) * scaled, inputs.std(0).clamp(min=1e-6) if scaled else torch.ones_like(inputs[0])
    weight, bias = logistic_regression((inputs - mean) / std, labels, penalty, classes)
    weight = weight / std
    bias = bias - weight @ mean
    scores: dict[str, float] = {"penalty": penalty, "scaled": scaled}
    for name in splits.keys() - {"train"}:
        logits, labels = F.linear(splits[name].features, weight, bias), splits[name].labels
        scores[f"{name}/accuracy"] = multiclass_accuracy(logits, labels, classes, average="micro").item()
        scores[f"{name}/f1"] = multiclass_f1_score(logits, labels, classes, average="macro").item()
    return Probe(weight, bias, scores)


def logistic_regression(inputs: Tensor, labels: Tensor, penalty: float, classes: int) -> tuple[Tensor, Tensor]:
    """W (classes, width), b (classes,) at the minimum of mean cross entropy(W x + b) + penalty |W|^2, by L-BFGS

    inputs: (examples, width)
    """
    weight = inputs.new_zeros(classes, inputs.shape[1], requires_grad=True)
    bias = inputs.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(inputs, weight, bias), labels) + penalty * weight.square().sum()
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    return weight.detach(), bias.detach()


# ------------------------------------------------------------------ the report
def report(tuned: dict[str, Any], probe: dict[str, float], directory: Path, name: str) -> str:
    """What the demo prints at its end."""
    count, counts = tuned["test_examples"], tuned["counts"]

    def line(what: str, scores: dict[str, float]) -> str:
        accuracy = scores["test/accuracy"]
        low, high = wilson(accuracy, count)
        return f"{what:<14} accuracy {accuracy:.3f}  (95 %: {low:.3f} to {high:.3f})   macro-F1 {scores['test/f1']:.3f}"

    return "\n".join(
        [
            "",
            f"{count} test examples, {len(tuned['classes'])} classes, of modules that the training data does not have",
            f"{'majority class':<14} accuracy {tuned['majority']:.3f}",
            line("linear probe", probe),
            line(name, tuned["test"]),
            f"{difference(tuned, probe, count)}",
            "",
            f"trained   {counts['trainable']:,} of {counts['total']:,} parameters ({counts['percent']:.2f} %)"
            f" in {tuned['seconds']['fit']:.0f} s",
            f"adapter   {tuned['adapter']['bytes'] / 1e6:.2f} MB on disk: {tuned['adapter']['path']}",
            f'use it    lightning-peft predict --run {directory} "Open a socket and listen for connections."',
        ]
    )


def difference(tuned: dict[str, Any], probe: dict[str, float], count: int) -> str:
    """How far apart the two are, against the half-width of an interval."""
    gap = tuned["test"]["test/accuracy"] - probe["test/accuracy"]
    half = 1.96 * math.sqrt(max(probe["test/accuracy"] * (1 - probe["test/accuracy"]), 1e-12) / count)
    verdict = "beyond it" if abs(gap) > half else "within it"
    return f"difference     {100 * gap:+.1f} points; the 95 % interval is {100 * half:.1f} to either side: {verdict}"
