"""A small diffusion UNet of the diffusers library learned to draw digits; LoRA and adapters teach it inverted ones.

python examples/diffusion.py
"""

from __future__ import annotations

import copy
import logging

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import PEFT, Houlsby, LoRA
from lightning_peft.core import state

METHODS: dict[str, PEFT] = {
    "LoRA on attention": LoRA(rank=4, targets="attention,cross.q,cross.k,cross.v,cross.o"),
    "LoRA on all": LoRA(rank=4, targets="all-linear,*.resnets.*.conv?"),
    "adapters": Houlsby(bottleneck=8, targets="o,cross.o,down"),
}
SHAPE = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (16, 32), "layers_per_block": 1}
BLOCKS = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}


class Diffusion(pl.LightningModule):
    """Predicts the noise in images (batch, 1, 8, 8) in [-1, 1], given the digit."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet, self.schedule = unet, DDPMScheduler(num_train_timesteps=100)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        images, digits = batch
        noise, step = torch.randn_like(images), torch.randint(100, (len(images),), device=images.device)
        words = F.one_hot(digits, 16).to(images)[:, None]
        return F.mse_loss(self.unet(self.schedule.add_noise(images, noise, step), step, words).sample, noise)

    def test_step(self, batch: list[Tensor]) -> None:
        self.log("error", self.training_step(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=3e-3)


def fit(model: Diffusion, images: Tensor, digits: Tensor, epochs: int, *methods: PEFT) -> float:
    """Mean squared error of the predicted noise on the last 400 images."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(accelerator="cpu", max_epochs=epochs, callbacks=list(methods), **quiet)
    trainer.fit(model, DataLoader(TensorDataset(images[:-400], digits[:-400]), 100, shuffle=True))
    pl.seed_everything(7, verbose=False)
    rest = DataLoader(TensorDataset(images[-400:], digits[-400:]), 400)
    return trainer.test(model, rest, verbose=False)[0]["error"]


def main(epochs: int = 15, adapt: int = 5) -> dict[str, float]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    pl.seed_everything(0, verbose=False)
    images, digits = (torch.tensor(array) for array in load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8) / 8 - 1
    base = Diffusion(UNet2DConditionModel(**SHAPE, **BLOCKS, cross_attention_dim=16, norm_num_groups=8))
    results = {
        "upright, all weights": fit(base, images, digits, epochs),
        "inverted, as it is": fit(base, -images, digits, 0),
    }
    for name, method in METHODS.items():
        results[name] = fit(model := copy.deepcopy(base), -images, digits, adapt, method)
        print(f"{name:20} trains {state.describe(model)['percent']:.2f} %")
    print("\n".join(f"{name:20} error {error:.3f}" for name, error in results.items()))
    return results


if __name__ == "__main__":
    main()
