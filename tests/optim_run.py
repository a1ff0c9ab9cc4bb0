"""Two runs on two CPU processes, one without a break and one resumed from its middle. Started by test_optim.py."""

import sys
from pathlib import Path

import boring
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_peft import LoRA, PEFTDDPStrategy, optim


class Task(boring.Boring):
    """`optimizer` names one of lightning_peft.optim; the adapters are large enough for 8 bits."""

    def configure_optimizers(self):
        optimizer = getattr(optim, self.kind_of_optimizer)(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def lora() -> LoRA:
    return LoRA(rank=130, dropout=0.2)


def fit(directory: Path, module: pl.LightningModule, *callbacks: pl.Callback, ckpt: str | None = None, **options):
    options = {"max_epochs": 2, "accumulate_grad_batches": 2, "gradient_clip_val": 0.1, **options}
    trainer = boring.trainer(directory, list(callbacks), **options)
    trainer.fit(module, boring.data(n=30), boring.data(6, shuffle=False), ckpt_path=ckpt)
    return trainer


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    ends = []
    for ckpt in (None, str(directory / "step=4.ckpt")):
        pl.seed_everything(0, verbose=False)  # the sampler's seed, too
        if ckpt is not None:
            torch.manual_seed(99)
        module: nn.Module = Task(optimizer="paged_adamw_8bit")
        saver = ModelCheckpoint(directory, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        callbacks = [lora(), saver] if ckpt is None else [lora()]
        trainer = fit(directory, module, *callbacks, ckpt=ckpt, strategy=PEFTDDPStrategy(), devices=2)
        ends.append(boring.tensors(module))
    torch.save(ends, directory / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
