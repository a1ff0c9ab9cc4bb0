"""A vision transformer that learned upright digits adapts to turned and inverted ones with 150 labels.

    python examples/image_classification.py

Pretrains a ViT of 0.1M parameters in seconds, then compares methods on the same few labels.
"""

from __future__ import annotations

import copy
import functools
import logging
import warnings

import lightning.pytorch as pl
import torch

from lightning_peft import PEFT, BitFit, FullFineTuning, LinearProbe, LoRA
from lightning_peft.core import state
from lightning_peft.tasks import Digits, ImageClassification, small_vit

METHODS: dict[str, tuple[PEFT, float]] = {  # with its learning rate
    "linear probe": (LinearProbe(), 1e-2),
    "BitFit": (BitFit(), 1e-2),
    "LoRA on q, v": (LoRA(rank=8, targets="q,v"), 1e-2),
    "LoRA on all": (LoRA(rank=8, targets="all-linear"), 1e-2),
    "full": (FullFineTuning(), 2e-3),
}


def fit(
    model: torch.nn.Module, data: Digits, epochs: int, lr: float, method: PEFT | None = None
) -> tuple[float, float]:
    """Test accuracy, and the share of the parameters that trained in percent."""
    task = ImageClassification(model, num_classes=10, optimizer=functools.partial(torch.optim.AdamW, lr=lr))
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    callbacks = [] if method is None else [method]
    trainer = pl.Trainer(accelerator="cpu", max_epochs=epochs, callbacks=callbacks, **quiet)
    trainer.fit(task, data)
    share = state.describe(task)["percent"] if method else 100.0
    return trainer.test(task, data, verbose=False)[0]["test/accuracy"], share


def main(epochs: int = 30, adapt_epochs: int = 60) -> dict[str, float]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    pl.seed_everything(0, verbose=False)
    base = small_vit()
    accuracy, _ = fit(base, Digits(domain="source"), epochs, 2e-3)
    print(f"upright digits, all weights: {accuracy:.3f}")

    target, results = Digits(domain="target", labels=150), {}
    for name, (method, lr) in METHODS.items():
        pl.seed_everything(1, verbose=False)
        results[name], share = fit(copy.deepcopy(base), target, adapt_epochs, lr, method)
        print(f"{name:14} {results[name]:.3f}   trains {share:6.2f} %")
    return results


if __name__ == "__main__":
    main()
