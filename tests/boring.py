"""A small LightningModule on a tiny BERT, its data, and a quiet Trainer, for the tests of the life cycle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import zoo
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Boring(pl.LightningModule):
    """Classification with dropout; `where` says in which hook the net is built."""

    def __init__(self, where: str = "init", kind: str = "bert", dropout: float = 0.1, optimizer: str = "adamw") -> None:
        super().__init__()
        self.where, self.kind, self.dropout, self.kind_of_optimizer = where, kind, dropout, optimizer
        self.losses: list[float] = []
        if where == "init":
            self.build()

    def build(self) -> None:
        if hasattr(self, "net"):
            return
        self.net = zoo.build(self.kind).train()
        for module in self.net.modules():
            if isinstance(module, nn.Dropout):
                module.p = self.dropout

    def setup(self, stage: str) -> None:
        if self.where == "setup":
            self.build()

    def configure_model(self) -> None:
        if self.where == "configure_model":
            self.build()
        if self.where == "meta" and not hasattr(self, "net"):
            weights = zoo.build(self.kind).state_dict()
            with torch.device("meta"):
                self.net = zoo.build(self.kind)
            self.net.to_empty(device="cpu")
            self.net.load_state_dict(weights)
            self.net.load_state_dict(weights, strict=True)
            rebuilt = zoo.build(self.kind)
            for name, buffer in rebuilt.named_buffers():  # those that are in no state dict
                self.net.get_buffer(name).copy_(buffer)
            self.net.train()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self.net(**self.named(batch)).loss
        self.losses.append(loss.item())
        return loss

    def named(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"pixel_values" if batch[0].dim() == 4 else "input_ids": batch[0], "labels": batch[1]}

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.net(**self.named(batch)).loss)

    test_step = validation_step

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.net(input_ids=batch[0]).logits

    def configure_optimizers(self) -> Any:
        own = [p for p in self.parameters() if p.requires_grad]
        if self.kind_of_optimizer == "sgd":
            return torch.optim.SGD(own, lr=0.1)
        optimizer = torch.optim.AdamW(own, lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Says(Boring):
    """Says where its logits are."""

    as_dict = False

    def predictions(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, y = batch
        return self.net(input_ids=x).logits, y

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Any:  # type: ignore[override]
        loss = nn.functional.cross_entropy(*self.predictions(batch))
        self.losses.append(loss.item())
        return {"loss": loss, "more": 1} if self.as_dict else loss


PSEUDO = 99  # an id that texts do not have


def data(n: int = 24, batch_size: int = 3, shuffle: bool = True, kind: str = "text") -> DataLoader[Any]:
    g = torch.Generator().manual_seed(1)
    x, y = torch.randint(3, 90, (n, 7), generator=g), torch.randint(0, 3, (n,), generator=g)
    if kind == "images":
        x = torch.randn(n, 3, 16, 16, generator=g)
    elif kind == "template":
        x[:, :3] = PSEUDO
    return DataLoader(TensorDataset(x, y), batch_size=batch_size, shuffle=shuffle)


def trainer(directory: str | Path, callbacks: list[pl.Callback] | None = None, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    checkpoints = any(isinstance(c, pl.callbacks.ModelCheckpoint) for c in callbacks or [])
    quiet |= {"enable_checkpointing": checkpoints, "log_every_n_steps": 1, "max_epochs": 1}
    return pl.Trainer(default_root_dir=directory, callbacks=callbacks, **{**quiet, **options})


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert set(a) == set(b)
    return max(
        (x.double() - b[name].double()).abs().max().item()
        for name, x in a.items()
        if x.is_floating_point() and x.numel()
    )
