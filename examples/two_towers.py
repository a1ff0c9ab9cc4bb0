"""A CLIP of two small towers learned to name upright digits; each tower adapts to inverted ones by its own method.

python examples/two_towers.py
"""

from __future__ import annotations

import copy
import logging

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from lightning_peft import PEFT, Houlsby, LoRA, PromptTuning
from lightning_peft.core import state
from lightning_peft.tasks import Digits

TEXT = LoRA(rank=4, targets="attention", exclude="vision_model.*")
METHODS: dict[str, list[PEFT]] = {
    "LoRA on text": [TEXT],
    "prompts on images, LoRA on text": [PromptTuning(length=8, exclude="text_model.*"), TEXT],
    "adapters on images, LoRA on text": [Houlsby(bottleneck=16, exclude="text_model.*"), TEXT],
}
WORDS = torch.tensor([[1, 3, 4, 5 + digit, 2] for digit in range(10)])  # <start> a digit <which> <end>


class Contrast(pl.LightningModule):
    """The image is to be nearer to its own caption than to all others."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, images: Tensor) -> Tensor:  # (batch, channels, height, width) -> (batch, 10)
        return self.clip(input_ids=WORDS.to(images.device), pixel_values=images).logits_per_image

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(self(batch["pixel_values"]), batch["labels"])

    def test_step(self, batch: dict[str, Tensor]) -> None:
        self.log("accuracy", (self(batch["pixel_values"]).argmax(1) == batch["labels"]).float().mean())

    validation_step = test_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=3e-3)


def clip() -> CLIPModel:
    tower = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"vocab_size": 15, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    image = tower | {"image_size": 8, "patch_size": 2, "num_channels": 1}
    return CLIPModel(CLIPConfig(text_config=tower | text, vision_config=image, projection_dim=24))


def fit(model: Contrast, data: Digits, epochs: int, *methods: PEFT) -> float:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(accelerator="cpu", max_epochs=epochs, callbacks=list(methods), **quiet)
    trainer.fit(model, data)
    return trainer.test(model, data, verbose=False)[0]["accuracy"]


def main(epochs: int = 15, adapt: int = 60) -> dict[str, float]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    pl.seed_everything(0, verbose=False)
    base, upright, inverted = Contrast(clip()), Digits(domain="source"), Digits(domain="target")
    results = {"upright, all weights": fit(base, upright, epochs), "inverted, as it is": fit(base, inverted, 0)}
    for name, methods in METHODS.items():
        results[name] = fit(model := copy.deepcopy(base), inverted, adapt, *methods)
        print(f"{name:34} trains {state.describe(model)['percent']:.2f} %")
    print("\n".join(f"{name:34} accuracy {accuracy:.3f}" for name, accuracy in results.items()))
    return results


if __name__ == "__main__":
    main()
