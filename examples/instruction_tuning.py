"""A causal language model learns to answer questions; the loss is on the answers only.

    python examples/instruction_tuning.py                                  # a small random Llama, in a minute
    python examples/instruction_tuning.py --model <folder or hub name>     # a real one, with its own tokenizer

The questions are made from this interpreter's own standard library: what does a function do? Its docstring answers.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import math
import os
import shutil
import statistics
import string
import textwrap
from pathlib import Path

import lightning.pytorch as pl
import torch

from lightning_peft import LoRA, save_adapter
from lightning_peft.tasks import CausalLM, Instructions, hf, tiny_llama

MODULES = (math, os.path, shutil, statistics, string, textwrap, inspect, os)


def write_questions(path: Path) -> Path:
    """One JSON object a line: {"question", "answer"}."""
    with path.open("w") as file:
        for module in MODULES:
            for name, function in inspect.getmembers(module, callable):
                answer = (inspect.getdoc(function) or "").partition("\n")[0]
                if answer and not name.startswith("_"):
                    row = {"question": f"What does {module.__name__}.{name} do?", "answer": answer}
                    file.write(json.dumps(row) + "\n")
    return path


def main(model: str = "", epochs: int = 3, batches: int | float = 1.0, folder: str = "outputs/example_llm") -> float:
    pl.seed_everything(0)
    Path(folder).mkdir(parents=True, exist_ok=True)
    data = Instructions(write_questions(Path(folder, "questions.jsonl")), tokenizer=model or "bytes", batch_size=8)
    network = hf(model, "causal-lm") if model else tiny_llama()
    task = CausalLM(network, optimizer=functools.partial(torch.optim.AdamW, lr=2e-3))
    limits = dict.fromkeys(("limit_train_batches", "limit_val_batches", "limit_test_batches"), batches)
    trainer = pl.Trainer(max_epochs=epochs, callbacks=[LoRA(rank=16, targets="all-linear")], logger=False,
    accelerator="cpu",
                         enable_checkpointing=False, **limits)  # fmt: skip
    trainer.fit(task, data)
    loss = trainer.test(task, data)[0]["test/loss"]
    save_adapter(task, f"{folder}/adapter")

    prompt = data.batch([{"question": "What does math.sqrt do?"}])
    tokens = task.model.eval().generate(
        **prompt, max_new_tokens=24, do_sample=False, pad_token_id=data.tokenizer.pad_token_id
    )
    print(data.decode(tokens)[0])
    return loss


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="")
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    main(arguments.model, arguments.epochs)
