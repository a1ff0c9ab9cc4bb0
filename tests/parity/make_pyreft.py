"""Writes tests/parity/golden/pyreft.safetensors: what the `pyreft` library computes on a tiny Llama.

Not a part of the test run: `pyreft` pins another transformers, so it lives in an environment of its own.

    python -m venv golden
    golden/bin/pip install --constraint constraints.txt torch transformers==4.45.1 accelerate datasets evaluate \
        matplotlib pandas scikit-learn gcsfs plotnine
    golden/bin/pip install --no-deps pyreft==0.1.0 pyvene==0.1.8
    golden/bin/python tests/parity/make_pyreft.py

For every kind of intervention at all blocks, first 2 and last 1 positions, one set of weights for both: its tensors
(drawn anew, far from any initialisation), the logits, and the gradient of their weighted sum by the unconstrained
ones; in fp64. The base model's weights and the ids are in the same file.
"""

from __future__ import annotations

import json
import pathlib
import zlib
from importlib.metadata import version
from typing import Any

import pyreft
import torch
import transformers as hf
from safetensors.torch import save_file
from torch import Tensor

HERE = pathlib.Path(__file__).parent / "golden"
WIDTHS = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 24}
FIRST, LAST, RANK = 2, 1, 3
KINDS = {
    "loreft": pyreft.LoreftIntervention,
    "noreft": pyreft.NoreftIntervention,
    "direft": pyreft.NodireftIntervention,
    "direft_orthonormal": pyreft.DireftIntervention,  # what the library calls DiReFT; the paper's is the one above
}


def noise(name: str, shape: Any, scale: float = 0.3) -> Tensor:
    draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return scale * torch.randn(shape, generator=draw, dtype=torch.float64)


def base() -> Any:
    torch.manual_seed(0)
    config = hf.LlamaConfig(**WIDTHS, vocab_size=20, max_position_embeddings=16, num_key_value_heads=2)
    model = hf.LlamaForCausalLM(config).eval()
    for key, tensor in model.named_parameters():
        tensor.data = (tensor + noise(key, tensor.shape, 0.1)).float().detach()
    return model


def main() -> None:
    ids = torch.randint(1, 20, (2, 7), generator=torch.Generator().manual_seed(1))
    tensors: dict[str, Tensor] = {"batch/input_ids": ids}
    tensors |= {f"base/{key}": p.data for key, p in base().named_parameters()}
    for kind, cls in KINDS.items():
        settings = {"embed_dim": 16, "low_rank_dimension": RANK, "dtype": torch.float64, "add_bias": False}
        parts = [
            {
                "layer": layer,
                "component": f"model.layers[{layer}].output",
                "low_rank_dimension": RANK,
                "intervention": cls(**settings),
            }
            for layer in range(2)
        ]
        model: Any = pyreft.get_reft_model(base().double(), pyreft.ReftConfig(representations=parts))
        trained: dict[str, Tensor] = {}
        for layer, part in enumerate(parts):
            part["intervention"].double()
            trained |= {f"{layer}.{key}": p for key, p in part["intervention"].named_parameters()}
        for key, p in trained.items():
            if ".parametrizations." not in key:  # those of an orthogonal matrix hold its signs; they stay
                p.data = (p.data + noise(key, p.shape)).detach()
        where = [0, 1, ids.shape[1] - 1]
        _, out = model({"input_ids": ids}, unit_locations={"sources->base": (None, [[where] * len(ids)] * 2)})
        (out.logits * noise(kind, out.logits.shape, 1.0)).sum().backward()
        for layer, part in enumerate(parts):
            edit = part["intervention"]
            rows = edit.rotate_layer.weight.T if hasattr(edit, "rotate_layer") else edit.proj_layer.weight
            tensors |= {
                f"{kind}/{layer}/rows": rows.detach(),
                f"{kind}/{layer}/weight": edit.learned_source.weight.detach(),
                f"{kind}/{layer}/bias": edit.learned_source.bias.detach(),
                f"{kind}/{layer}/grad_weight": edit.learned_source.weight.grad,
                f"{kind}/{layer}/grad_bias": edit.learned_source.bias.grad,
            }
        tensors[f"{kind}/logits"] = out.logits.detach()
        print(kind, out.logits.dtype, float(out.logits.detach().norm()))
    HERE.mkdir(exist_ok=True)
    versions = {name: version(name) for name in ("pyreft", "pyvene", "transformers", "torch")}
    path = HERE / "pyreft.safetensors"
    save_file(
        {k: v.contiguous().clone() for k, v in tensors.items()}, path, metadata={"versions": json.dumps(versions)}
    )
    print(path.stat().st_size, versions)


if __name__ == "__main__":
    main()
