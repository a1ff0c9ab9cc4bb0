"""Causal language modelling where only some tokens, the answer, are learned."""

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric
from typing_extensions import override

from lightning_peft.groups import Groups, MakeOptimizer
from lightning_peft.tasks.batches import IGNORE
from lightning_peft.tasks.optimisation import MakeScheduler
from lightning_peft.tasks.task import Task


class Perplexity(MeanMetric):
    """exp(mean negative log-likelihood of a token); update with the mean of a batch and its number of tokens"""

    @override
    def compute(self) -> Tensor:
        return super().compute().exp()


def token_metrics() -> nn.ModuleDict:
    """The metrics of one split."""
    return nn.ModuleDict({"loss": MeanMetric(), "accuracy": MeanMetric(), "perplexity": Perplexity()})


def shift(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """logits (batch, time, vocabulary), labels (batch, time) -> those that count: (tokens, vocabulary), (tokens,)

    Logits in front of the first position of the labels belong to virtual tokens (prompt tuning) and are left out.
    """
    logits, labels = logits[:, -labels.shape[1] :][:, :-1], labels[:, 1:]
    counted = labels != IGNORE
    return logits[counted], labels[counted]


class CausalLM(Task):
    """loss = - mean log p(token | tokens before it) over the tokens whose label is not -100

    {input_ids, attention_mask, labels: (batch, time)}; labels are the ids themselves, not shifted. Metrics: train/loss
    and {val,test}/{loss,accuracy,perplexity}, each a mean over the counted tokens. `predict_step` writes answers
    greedily.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: MakeOptimizer | Groups | None = None,
        scheduler: MakeScheduler | None = None,
        max_new_tokens: int = 64,
    ) -> None:
        super().__init__(model, optimizer, scheduler)
        self.max_new_tokens = max_new_tokens
        self.save_hyperparameters({"max_new_tokens": max_new_tokens})
        self.val_metrics, self.test_metrics = token_metrics(), token_metrics()

    def predictions(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """batch -> (tokens, vocabulary), (tokens,)"""
        logits, labels = self.read(batch)
        return shift(logits, labels)

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits, labels = self.predictions(batch)
        loss = F.cross_entropy(logits.float(), labels)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(labels))
        return loss

    def evaluate(self, batch: dict[str, Tensor], split: str, metrics: nn.ModuleDict) -> None:
        """Update and log the metrics of a split."""
        logits, labels = self.predictions(batch)
        loss, hits = F.cross_entropy(logits.float(), labels), (logits.argmax(-1) == labels).float().mean()
        for name, value in {"loss": loss, "accuracy": hits, "perplexity": loss}.items():
            metric = cast(MeanMetric, metrics[name])
            metric.update(value, weight=len(labels))
            self.log(f"{split}/{name}", metric, prog_bar=True, batch_size=len(labels))

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "val", self.val_metrics)

    @override
    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "test", self.test_metrics)

    @override
    def predict_step(self, batch: dict[str, Tensor], batch_idx: int = 0) -> Tensor:
        """Prompts padded on the left -> the new tokens (batch, at most max_new_tokens)"""
        prompts: dict[str, Any] = {name: batch[name] for name in ("input_ids", "attention_mask")}
        output = cast(Any, self.model).generate(**prompts, max_new_tokens=self.max_new_tokens, do_sample=False)
        return output[:, batch["input_ids"].shape[1] :]
