"""Writes tests/parity/golden/adapters.safetensors: what the `adapters` library computes on tiny models.

Not a part of the test run: `adapters` pins another transformers, so it lives in an environment of its own.

    python -m venv golden
    golden/bin/pip install --constraint constraints.txt torch adapters==1.3.0
    golden/bin/python tests/parity/make_adapters.py

For every case: the tensors that `adapters` trains (drawn anew, far from any initialisation), the last hidden states
of the model, and the gradient of their weighted sum by each of these tensors; all in fp64. The base models' weights
and inputs are in the same file.
"""

from __future__ import annotations

import json
import pathlib
import warnings
import zlib
from typing import Any

import adapters
import torch
import transformers as hf
from safetensors.torch import save_file
from torch import Tensor, nn

HERE = pathlib.Path(__file__).parent / "golden"
WIDTHS = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 24}
TEXT = {**WIDTHS, "vocab_size": 20, "max_position_embeddings": 16}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT2 = {"n_embd": 16, "n_head": 4, "n_layer": 2, "n_positions": 16, "n_inner": 24, "vocab_size": 20}
GPT2_QUIET = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
EAGER = {"attn_implementation": "eager"}  # boolean masks of sdpa hide the prefixes of `adapters`
MODELS: dict[str, Any] = {
    "bert": lambda: hf.BertModel(hf.BertConfig(**TEXT, **QUIET), add_pooling_layer=False),
    "gpt2": lambda: hf.GPT2Model(hf.GPT2Config(**GPT2, **GPT2_QUIET, **EAGER)),
    "llama": lambda: hf.LlamaModel(hf.LlamaConfig(**TEXT, num_key_value_heads=2, **EAGER)),
}
REFT = {"prefix_positions": 2, "suffix_positions": 1, "r": 3, "dropout": 0.0}
CASES: dict[str, Any] = {
    "double_seq_bn": adapters.DoubleSeqBnConfig(reduction_factor=4),
    "seq_bn": adapters.SeqBnConfig(reduction_factor=4),
    "seq_bn_inv": adapters.SeqBnInvConfig(reduction_factor=4),
    "par_bn": adapters.ParBnConfig(reduction_factor=4),
    "compacter": adapters.CompacterConfig(reduction_factor=2, phm_dim=4),
    "compacter_pp": adapters.CompacterPlusPlusConfig(reduction_factor=2, phm_dim=4),
    "prefix": adapters.PrefixTuningConfig(flat=True, prefix_length=3),
    "prefix_mlp": adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=6),
    "prompt": adapters.PromptTuningConfig(prompt_length=3),
    "lora": adapters.LoRAConfig(r=3, alpha=6),
    "dora": adapters.DoRAConfig(r=3, alpha=3),
    "ia3": adapters.IA3Config(),
    "loreft": adapters.LoReftConfig(**REFT),
    "loreft_tied": adapters.LoReftConfig(**REFT, tied_weights=True),
    "noreft": adapters.NoReftConfig(**REFT),
    "direft": adapters.DiReftConfig(**REFT),
    "fusion": adapters.SeqBnConfig(reduction_factor=4),
    "mam": adapters.MAMConfig(
        adapters.PrefixTuningConfig(flat=True, prefix_length=3), adapters.ParBnConfig(reduction_factor=4)
    ),
    "unipelt": adapters.UniPELTConfig(
        prefix_tuning=adapters.PrefixTuningConfig(flat=True, prefix_length=3, use_gating=True),
        adapter=adapters.SeqBnConfig(reduction_factor=4, use_gating=True),
        lora=adapters.LoRAConfig(r=3, alpha=2, use_gating=True),
    ),
}

UNSUPPORTED = {("gpt2", "prompt"), ("llama", "prompt"), ("gpt2", "dora")}  # `add_adapter` raises


def generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def noise(name: str, shape: Any, scale: float = 0.3) -> Tensor:
    return scale * torch.randn(shape, generator=generator(name), dtype=torch.float64)


def base(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for key, tensor in model.named_parameters():
        # rounded to fp32, so that the file holds the base in half the room
        tensor.data = (tensor + noise(key, tensor.shape, 0.1)).float().detach()
    return model


def batch() -> dict[str, Tensor]:
    ids = torch.randint(1, 20, (2, 7), generator=generator("ids"))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def run(model: nn.Module, case: str) -> dict[str, Tensor]:
    """Draws what is trained, and gives it with the states and the gradients."""
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    for key, p in trained.items():
        if ".parametrizations." not in key:  # those of an orthogonal matrix hold its signs; they stay
            p.data = (p.data.float() + noise(key, p.shape).float()).double()
    found = {f"tensor/{key}": p.detach().clone() for key, p in trained.items()}
    given = batch()
    if "reft" in case:
        del given["attention_mask"]  # they count positions from the ends of the row, padding or not
    states = model(**given).last_hidden_state
    (states * noise(case, states.shape, 1.0)).sum().backward()
    found["states"] = states.detach()
    found |= {f"grad/{key}": p.grad for key, p in trained.items() if p.grad is not None}
    for key, module in model.named_modules():  # an orthogonal parametrisation: what it stands for
        if hasattr(module, "parametrizations"):
            found |= {f"tensor/{key}.{n}": getattr(module, n).detach() for n in module.parametrizations}
    return found


def main() -> None:
    warnings.simplefilter("ignore")
    tensors: dict[str, Tensor] = {f"batch/{key}": value for key, value in batch().items()}
    for name in MODELS:
        tensors |= {f"base/{name}/{key}": p.data for key, p in base(name).named_parameters()}
        for case, config in CASES.items():
            model: Any = base(name).double()
            adapters.init(model)
            if (name, case) in UNSUPPORTED:
                continue
            for label in "ab" if case == "fusion" else "a":
                model.add_adapter(label, config=config)
            if case == "fusion":
                for key, p in model.named_parameters():
                    if ".adapters." in key:  # the adapters that are fused: frozen, far from zero
                        p.data = (p.data + noise(key, p.shape).float()).float()
                        tensors[f"{name}/fusion/frozen/{key}"] = p.detach().double().clone()
                fused = adapters.Fuse("a", "b")
                model.add_adapter_fusion(fused)
                model.double().train_adapter_fusion(fused)
            else:
                model.double().train_adapter("a")
            found = run(model.eval(), case)
            tensors |= {f"{name}/{case}/{key}": value.contiguous().clone() for key, value in found.items()}
            print(name, case, len(found))
    HERE.mkdir(exist_ok=True)
    versions = {"adapters": adapters.__version__, "transformers": hf.__version__, "torch": torch.__version__}
    path = HERE / "adapters.safetensors"
    save_file(tensors, path, metadata={"versions": json.dumps(versions)})
    print(path.stat().st_size, versions)


if __name__ == "__main__":
    main()
