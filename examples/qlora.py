"""QLoRA on a causal language model: 4-bit base straight from safetensors, LoRA everywhere, merged out at the end.

python examples/qlora.py                      a small random Llama, made and saved on the spot
python examples/qlora.py path/to/a/folder     config.json, tokenizer and safetensors of a model of yours
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
from pathlib import Path

import lightning.pytorch as pl
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_peft import GradientCheckpointing, LoRA, NF4Precision, empty_weights, load_quantised, paged_adamw
from lightning_peft.tasks import CausalLM, Instructions, constant, tiny_llama

PAIRS = [{"prompt": f"What comes after {n}?", "answer": f"{n + 1}."} for n in range(200)]


class QLoRATask(CausalLM):
    """The model is built and read where Lightning wants it: once, on every rank, before adapters go in."""

    def __init__(self, folder: str, **options: object) -> None:
        super().__init__(torch.nn.Identity(), **options)
        self.folder, self.built = folder, False

    def configure_model(self) -> None:
        if self.built:
            return
        with empty_weights():  # no memory for the model in floats, not even for a moment
            self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.folder))
        load_quantised(self.model, self.folder, mode="nf4")  # read, quantise, free: layer by layer
        self.built = True


def main(folder: str | None = None, epochs: int = 2, examples: int = 200) -> dict[str, float]:
    pl.seed_everything(0)
    with tempfile.TemporaryDirectory() as made:
        if folder is None:
            tiny_llama(hidden_size=64, num_hidden_layers=2).save_pretrained(made)
        pairs = Path(made) / "pairs.jsonl"
        pairs.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS[:examples]))
        data = Instructions(pairs, tokenizer=folder or "bytes", batch_size=8, max_length=64)
        optimizer = functools.partial(paged_adamw, lr=1e-3, weight_decay=0.0)  # on the CPU unpaged, which it says
        task = QLoRATask(folder or made, optimizer=optimizer, scheduler=constant)
        lora = LoRA(targets="all-linear", rank=16, alpha=16, dropout=0.05)
        trainer = pl.Trainer(
            max_epochs=epochs,
            gradient_clip_val=0.3,
            plugins=[NF4Precision(compute_dtype="bfloat16")],
            callbacks=[lora, GradientCheckpointing()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
        )
        trainer.fit(task, data)
        adapted = trainer.test(task, data, verbose=False)[0]["test/loss"]
    report = lora.merge(task, into="bfloat16")  # plain weights again; into="requantise" keeps 4 bits
    print(f"test loss {adapted:.3f}; merging into {report.dtypes[0]} changed outputs by {report.rounding:.1e}")
    return {"test loss": adapted, "rounding": report.rounding}


if __name__ == "__main__":
    main(*sys.argv[1:2])
