"""Parity with the `pyreft` library, from what it computed on a tiny Llama (golden/pyreft.safetensors, written by
make_pyreft.py): the same tensors on the same base give the same logits and the same gradients. It gives logits in fp32.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor

from lightning_peft import DiReFT, LoReFT, NoReFT
from lightning_peft.core import state

WIDTHS = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 24}
ROWS = {"loreft": "r", "noreft": "r", "direft": "w2", "direft_orthonormal": "w2"}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(Path(__file__).parent / "golden" / "pyreft.safetensors")


@pytest.mark.parametrize("kind", ["loreft", "noreft", "direft", "direft_orthonormal"])
def test_reft_is_theirs(kind: str, golden: dict[str, Tensor]) -> None:
    """What they call DiReFT keeps orthonormal rows; with such rows for W_2, ours computes it, too."""
    config = hf.LlamaConfig(**WIDTHS, vocab_size=20, max_position_embeddings=16, num_key_value_heads=2)
    model: Any = hf.LlamaForCausalLM(config).eval()
    model.load_state_dict({k.removeprefix("base/"): v for k, v in golden.items() if k.startswith("base/")})
    cls = {"loreft": LoReFT, "noreft": NoReFT}.get(kind, DiReFT)
    cls(rank=3, first=2, last=1).apply(model.double())
    edits = [x.adapter.edit for x in state.get_applied(model).placements if x.role == "block"]
    source = "w1" if cls is DiReFT else "w"
    for layer, edit in enumerate(edits):
        getattr(edit, ROWS[kind]).data = golden[f"{kind}/{layer}/rows"].clone()
        getattr(edit, source).data = golden[f"{kind}/{layer}/weight"].clone()
        edit.b.data = golden[f"{kind}/{layer}/bias"].clone()
    logits = model(input_ids=golden["batch/input_ids"]).logits
    torch.testing.assert_close(logits, golden[f"{kind}/logits"].double(), atol=2e-6, rtol=2e-6)
    draw = torch.Generator().manual_seed(zlib.crc32(kind.encode()))
    (logits * torch.randn(logits.shape, generator=draw, dtype=torch.float64)).sum().backward()
    for layer, edit in enumerate(edits):
        for ours, theirs in (source, "weight"), ("b", "bias"):
            wanted = golden[f"{kind}/{layer}/grad_{theirs}"]
            torch.testing.assert_close(getattr(edit, ours).grad, wanted, atol=5e-6, rtol=5e-6)
