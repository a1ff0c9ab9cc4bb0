"""What the LightningModules of this package share: the optimizer, the scheduler and reading a batch."""

from typing import Any

import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from typing_extensions import override

from lightning_peft.groups import Groups, MakeOptimizer, optimizer_of
from lightning_peft.tasks.optimisation import (
    DEFAULT_OPTIMIZER,
    MakeScheduler,
    linear_warmup,
)

Batch = dict[str, Tensor] | list[Tensor] | tuple[Tensor, ...]


class Task(LightningModule):
    """A model, how it is optimised, and nothing in the hyperparameters but plain values.

    optimizer: groups of the parameters that train -> optimizer; default AdamW(lr=1e-3, weight_decay=0.01).
    scheduler: (optimizer, total_steps=...) -> scheduler, stepped every step; default `linear_warmup`.
    """

    learns = True  # where it is False a run tests only, and the task is built with the data in place of an optimizer

    def __init__(
        self,
        model: nn.Module,
        optimizer: MakeOptimizer | Groups | None = None,
        scheduler: MakeScheduler | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.make_optimizer, self.make_scheduler = optimizer or DEFAULT_OPTIMIZER, scheduler or linear_warmup

    @override
    def configure_optimizers(self) -> Any:
        optimizer = optimizer_of(self, self.make_optimizer)
        scheduler = self.make_scheduler(optimizer, total_steps=self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the model takes -> logits, whether the model returns them or an object with `.logits`."""
        output = self.model(*args, **kwargs)
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"{type(self.model).__name__} returned {type(output).__name__} without logits. Wrap a backbone that"
                " returns hidden states: lightning_peft.tasks.PooledClassifier(backbone, hidden, num_classes)."
            )
        return logits

    def logits(self, batch: Batch) -> Tensor:
        """{...} by name, or (inputs, ...) -> logits"""
        if not isinstance(batch, dict):
            return self(batch[0])
        return self(**{name: value for name, value in batch.items() if name != "labels"})

    def read(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """{..., "labels"} or (inputs, labels) -> logits, labels"""
        labels = batch.get("labels") if isinstance(batch, dict) else dict(enumerate(batch)).get(1)
        if labels is None:
            raise ValueError(
                f"This batch has no labels; it has {list(batch) if isinstance(batch, dict) else len(batch)}."
            )
        return self.logits(batch), labels

    def predictions(self, batch: Any) -> tuple[Tensor, Tensor]:
        """batch -> logits (rows, classes) and labels (rows,) of what the loss is of; methods look here, too"""
        return self.read(batch)


class Classification(Task):
    """loss = cross entropy(model(batch), labels), with accuracy and macro-F1

    num_classes: how many; classes: their names, kept with the checkpoint. Metrics: train/loss,
    {val,test}/{loss,accuracy,f1}.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        optimizer: MakeOptimizer | Groups | None = None,
        scheduler: MakeScheduler | None = None,
        classes: list[str] | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(model, optimizer, scheduler)
        if num_classes < 2 or (classes is not None and len(classes) != num_classes):
            raise ValueError(f"num_classes={num_classes} and classes={classes}: give two at least, one name each.")
        self.classes, self.label_smoothing = None if classes is None else list(map(str, classes)), label_smoothing
        plain = {"num_classes": num_classes, "classes": self.classes, "label_smoothing": label_smoothing}
        self.save_hyperparameters(plain)
        metrics = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(num_classes, average="micro"),
                "f1": MulticlassF1Score(num_classes, average="macro"),
            }
        )
        self.val_metrics, self.test_metrics = metrics.clone(prefix="val/"), metrics.clone(prefix="test/")

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits, labels = self.predictions(batch)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(labels))
        return loss

    def evaluate(self, batch: Batch, name: str, metrics: MetricCollection) -> None:
        """Update and log the metrics of a split."""
        logits, labels = self.read(batch)
        metrics.update(logits, labels)
        self.log(f"{name}/loss", F.cross_entropy(logits, labels), batch_size=len(labels), sync_dist=True)
        self.log_dict(metrics, prog_bar=True, batch_size=len(labels))

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluate(batch, "val", self.val_metrics)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluate(batch, "test", self.test_metrics)

    @override
    def predict_step(self, batch: Batch, batch_idx: int = 0) -> dict[str, Tensor]:
        """-> labels: (batch,) ids, probabilities: (batch, num_classes)"""
        probabilities = self.logits(batch).softmax(-1)
        return {"labels": probabilities.argmax(-1), "probabilities": probabilities}
