"""MiniLM learns the chapters of the Python library reference from docstrings: LoRA as a callback in plain Lightning.

python examples/text_classification.py
"""

from __future__ import annotations

import functools

import lightning.pytorch as pl
import torch

from lightning_peft import LoRA, load_adapter, save_adapter
from lightning_peft.tasks import StdlibDocs, TextClassification, minilm


def main(epochs: int = 1, batches: int | float = 1.0, folder: str = "outputs/example_text") -> float:
    pl.seed_everything(0)
    data = StdlibDocs(batch_size=32)
    task = TextClassification(
        minilm(data.num_classes),
        num_classes=data.num_classes,
        classes=data.classes,
        optimizer=functools.partial(torch.optim.AdamW, lr=2e-3),
    )
    lora = LoRA(rank=8, alpha=16, targets="attention")  # the head is found and trains too

    trainer = pl.Trainer(
        max_epochs=epochs,
        limit_train_batches=batches,
        limit_test_batches=batches,
        limit_val_batches=batches,
        callbacks=[lora],
        logger=False,
        enable_checkpointing=False,
        accelerator="cpu",
    )
    trainer.fit(task, data)
    accuracy = trainer.test(task, data)[0]["test/accuracy"]

    path = save_adapter(task, f"{folder}/adapter")
    fresh = TextClassification(minilm(data.num_classes), num_classes=data.num_classes, classes=data.classes)
    load_adapter(fresh, path)  # the adapter and the head that was trained with it
    sentence = "Send a request to the server and read the headers of its response."
    with torch.inference_mode():
        answer = fresh.eval().predict_step(data.batch([sentence]))
    print(f"{sentence!r} -> {data.classes[answer['labels'].item()]} ({answer['probabilities'].max():.2f})")
    return accuracy


if __name__ == "__main__":
    main()
