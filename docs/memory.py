"""Draws docs/figures/memory.svg: what training a Llama of 7 B parameters takes, by `lightning_peft.planning`.

    python docs/memory.py

No weights are needed; the file is the same every time. Half a minute.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft import FullFineTuning, LoRA
from lightning_peft.planning import Plan, plan, text_batch
from lightning_peft.planning.picture import draw

PICTURE = Path(__file__).with_name("figures") / "memory.svg"
BATCH, LENGTH = 4, 512


def plans() -> dict[str, Plan]:
    """Full fine-tuning and LoRA in 16 bits, QLoRA, and QLoRA with gradient checkpointing."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(use_cache=False)).to(torch.bfloat16)
    ways: dict[str, dict[str, Any]] = {
        "full": {"method": FullFineTuning(keep_base=False)},
        "LoRA": {"method": LoRA(targets="all-linear")},
        "QLoRA": {"method": LoRA(targets="all-linear"), "precision": "nf4"},
        "QLoRA,\nrecomputed": {"method": LoRA(targets="all-linear"), "precision": "nf4", "checkpointing": True},
    }
    return {name: plan(model, batch=text_batch(BATCH, LENGTH), **how) for name, how in ways.items()}


if __name__ == "__main__":
    draw(plans(), PICTURE, f"Llama 7B in bfloat16, AdamW, batch {BATCH} x {LENGTH}")
    print(PICTURE)
