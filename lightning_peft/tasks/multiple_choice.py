"""Choices scored by their likelihood: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
Learning. Liu et al., NeurIPS 2022. https://arxiv.org/abs/2205.05638

    data = DataLoader(rows, collate_fn=CollateChoices(pad_id, seq2seq=True))
    Trainer(callbacks=[IA3()]).fit(MultipleChoice(t5, choices=4), data)
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from lightning_peft.groups import Groups, MakeOptimizer
from lightning_peft.tasks.batches import IGNORE, pad
from lightning_peft.tasks.optimisation import MakeScheduler
from lightning_peft.tasks.task import Task


# ------------------------------------------------------------------ losses: log p (batch, choices, time), 0 for padding
def likelihood_loss(logp: Tensor, counted: Tensor, labels: Tensor) -> Tensor:
    """L_LM = - mean log p over the tokens of the right choices"""
    rows = torch.arange(len(labels), device=labels.device)
    return -logp[rows, labels].sum() / counted[rows, labels].sum()


def unlikelihood_loss(logp: Tensor, counted: Tensor, labels: Tensor, floor: float = 0.01) -> Tensor:
    """L_UL = - mean log(1 - p + floor) over the tokens of all wrong choices; the authors' code has the floor, too"""
    wrong = counted & (torch.arange(logp.shape[1], device=labels.device) != labels[:, None])[..., None]
    return -(1 - logp[wrong].exp() + floor).log().sum() / wrong.sum().clamp(min=1)


def length_normalised(logp: Tensor, counted: Tensor) -> Tensor:
    """beta = mean log p over the tokens of each choice: (batch, choices), -inf for one that is not there"""
    length = counted.sum(-1)
    return (logp.sum(-1) / length.clamp(min=1)).masked_fill(length == 0, -torch.inf)


def choice_loss(logp: Tensor, counted: Tensor, labels: Tensor) -> Tensor:
    """L_LN = - mean log (exp beta of the right choice / sum of exp beta over all)"""
    return F.cross_entropy(length_normalised(logp, counted), labels)


# ------------------------------------------------------------------ the module and its batches
class MultipleChoice(Task):
    """loss = L_LM + unlikelihood L_UL + normalised L_LN; the choice with the largest mean log p is the answer

    model: an encoder-decoder or a causal language model, which says by the batch what it is (`CollateChoices`).
    choices: the largest number of them, for the metric. Metrics: train/loss, {val,test}/{loss,accuracy}. Each choice is
    a row of the model's batch. Source: section 3.2; the weights are 1 there, and L_LM alone is the usual loss.
    """

    def __init__(
        self,
        model: nn.Module,
        choices: int,
        unlikelihood: float = 1.0,
        normalised: float = 1.0,
        optimizer: MakeOptimizer | Groups | None = None,
        scheduler: MakeScheduler | None = None,
    ) -> None:
        super().__init__(model, optimizer, scheduler)
        if choices < 2 or min(unlikelihood, normalised) < 0:
            raise ValueError(
                f"choices={choices}, unlikelihood={unlikelihood}, normalised={normalised}: give two choices at least, "
                "and weights of 0 or more."
            )
        self.unlikelihood, self.normalised = unlikelihood, normalised
        self.save_hyperparameters({"choices": choices, "unlikelihood": unlikelihood, "normalised": normalised})
        metrics = {split: MulticlassAccuracy(choices, average="micro") for split in ("val", "test")}
        self.accuracies = nn.ModuleDict(metrics)

    @override
    def logits(self, batch: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        """-> (batch * choices, time, vocabulary), of what comes next"""
        ids, mask, targets = batch["input_ids"], batch["attention_mask"], batch["targets"].flatten(0, 1)
        if ids.dim() == 3:
            return self(input_ids=ids.flatten(0, 1), attention_mask=mask.flatten(0, 1))[:, -targets.shape[1] :][:, :-1]
        count = batch["targets"].shape[1]
        ids, mask = ids.repeat_interleave(count, 0), mask.repeat_interleave(count, 0)
        return self(input_ids=ids, attention_mask=mask, labels=targets)

    @override
    def predictions(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """-> (tokens of all choices, vocabulary), (tokens,)"""
        targets = goals(batch).flatten(0, 1)
        counted = targets != IGNORE
        return self.logits(batch)[counted], targets[counted]

    def likelihoods(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """log p and which tokens there are, both (batch, choices, time)"""
        logits, tokens = self.predictions(batch)
        counted = goals(batch) != IGNORE
        found = -F.cross_entropy(logits.float(), tokens, reduction="none")
        return torch.zeros(counted.shape, device=found.device).masked_scatter(counted, found), counted

    def loss(self, logp: Tensor, counted: Tensor, labels: Tensor) -> Tensor:
        """The sum of the three."""
        total = likelihood_loss(logp, counted, labels)
        if self.unlikelihood:
            total = total + self.unlikelihood * unlikelihood_loss(logp, counted, labels)
        return total + self.normalised * choice_loss(logp, counted, labels) if self.normalised else total

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(*self.likelihoods(batch), batch["labels"])
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def evaluate(self, batch: dict[str, Tensor], split: str) -> None:
        """Update and log the metrics of a split."""
        logp, counted = self.likelihoods(batch)
        labels, metric = batch["labels"], cast(MulticlassAccuracy, self.accuracies[split])
        metric.update(length_normalised(logp, counted).argmax(-1), labels)
        self.log(f"{split}/loss", self.loss(logp, counted, labels), batch_size=len(labels), sync_dist=True)
        self.log(f"{split}/accuracy", metric, prog_bar=True, batch_size=len(labels))

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "val")

    @override
    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "test")

    @override
    def predict_step(self, batch: dict[str, Tensor], batch_idx: int = 0) -> dict[str, Tensor]:
        """-> labels: (batch,) ids, scores: (batch, choices) mean log p"""
        scores = length_normalised(*self.likelihoods(batch))
        return {"labels": scores.argmax(-1), "scores": scores}


def goals(batch: dict[str, Tensor]) -> Tensor:
    """(batch, choices, time): the token that each position is to give; of a causal model the next one"""
    targets = batch["targets"]
    return targets[..., 1:] if batch["input_ids"].dim() == 3 else targets


def check_row(row: dict[str, Any]) -> None:
    """Raise on a row without a likelihood of its right choice: the loss would be infinite, or no number."""
    lengths = [len(choice) for choice in row["choices"]]
    if not len(row["input_ids"]) or not all(lengths) or not 0 <= int(row["labels"]) < len(lengths):
        raise ValueError(
            f"A row has {len(row['input_ids'])} tokens of a prompt, choices of {lengths} tokens, and choice "
            f"{int(row['labels'])} is right. Give a prompt (a start token at least), choices that are not empty, and "
            "the number of one of them, counted from 0."
        )


class CollateChoices:
    """Rows {"input_ids": ids of the prompt, "choices": [ids, ...], "labels": which is right} -> the batch.

    input_ids, attention_mask: (batch, time) and targets (batch, choices, length) where the model is an encoder-decoder,
    else all (batch, choices, time) of prompt and choice; labels (batch,). What is no token of a choice is -100.
    """

    def __init__(self, pad_id: int | None, seq2seq: bool) -> None:
        self.pad_id, self.seq2seq = pad_id or 0, seq2seq

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Rows -> batch"""
        for row in rows:
            check_row(row)
        prompts, choices = [list(row["input_ids"]) for row in rows], [row["choices"] for row in rows]
        count = max(map(len, choices))
        every: list[list[list[int]]] = [[*map(list, own), *[[]] * (count - len(own))] for own in choices]
        answers = [answer for own in every for answer in own]
        labels = torch.tensor([row["labels"] for row in rows])
        if self.seq2seq:
            ids, targets = prompts, answers
            shape: tuple[int, ...] = (len(rows), -1)
        else:
            before = [prompt for prompt, own in zip(prompts, every, strict=True) for _ in own]
            ids = [prompt + answer for prompt, answer in zip(before, answers, strict=True)]
            targets = [[IGNORE] * len(prompt) + answer for prompt, answer in zip(before, answers, strict=True)]
            shape = (len(rows), count, -1)
        return {
            "input_ids": pad(ids, self.pad_id).view(shape),
            "attention_mask": pad([[1] * len(own) for own in ids], 0).view(shape),
            "targets": pad(targets, IGNORE).view(len(rows), count, -1),
            "labels": labels,
        }
