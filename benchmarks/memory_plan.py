"""The memory plan against what the allocator saw: `python -m benchmarks.memory_plan [--device cuda] [--json FILE]`.

Three models x five methods in fp32, and LoRA and full fine-tuning in other settings; random weights. A figure is the
most that lived during the second training step (forward, backward, AdamW), in MB. On the CPU: the running sum of the
allocator's own events (torch.profiler), on top of what was there before. They are recorded from the first step on: of
what is older, the profiler does not see the end. On CUDA: torch.cuda.max_memory_allocated, less what a first product of
matrices leaves behind (cuBLAS' workspace).
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from lightning_peft import BitFit, FullFineTuning, LoRA, PrefixTuning, PromptTuning
from lightning_peft.core import state
from lightning_peft.core.method import Method
from lightning_peft.gradient_checkpointing import checkpoint_blocks
from lightning_peft.planning import Plan, plan
from lightning_peft.precision import quantise

LIMIT = 0.10
BATCH, TIME, VOCABULARY = 4, 256, 2048
LLAMA = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 2, "num_attention_heads": 8}
BERT = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 3, "num_attention_heads": 12}
GPT2 = {"n_embd": 384, "n_layer": 3, "n_head": 6, "bos_token_id": 1, "eos_token_id": 2}
SCALE = {"cpu": 1, "cuda": 4}  # on a GPU small models drown in rounding
SECOND = "the second step"

MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, vocab_size=VOCABULARY)),
    "bert": lambda: BertForSequenceClassification(BertConfig(**BERT, vocab_size=VOCABULARY)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2, vocab_size=VOCABULARY)),
}
METHODS: dict[str, Callable[[], Method]] = {
    "lora": lambda: LoRA(targets="all-linear"),
    "full": FullFineTuning,
    "bitfit": BitFit,
    "prefix": PrefixTuning,
    "prompt": PromptTuning,
}


SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "recompute": {"checkpointing": True},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "nf4": {"precision": "nf4"},
}
CASES = [(model, method, "fp32") for model in MODELS for method in METHODS]
CASES += [(model, "lora", setting) for model in MODELS for setting in SETTINGS if setting != "fp32"]
CASES += [(model, "full", setting) for model in MODELS for setting in ("recompute", "bf16-mixed")]


def batch(model: str, device: str) -> dict[str, Tensor]:
    """Random ids, the last row padded at its end: without padding transformers leaves the mask out."""
    ids = torch.randint(3, VOCABULARY, (BATCH * SCALE[device], TIME), device=device)
    mask = torch.ones_like(ids)
    mask[-1, -8:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids[:, 0] % 2 if model == "bert" else ids}


def prepare(model: nn.Module, method: Method, setting: str) -> nn.Module:
    """What a Trainer would have done to the model before the first step."""
    method.apply(model)
    if setting == "nf4":
        quantise(model)
    if setting == "recompute":
        checkpoint_blocks(model)
    return model


def step(model: nn.Module, inputs: dict[str, Tensor], optimizer: torch.optim.Optimizer, setting: str) -> None:
    """In Lightning's order: gradients are cleared between forward and backward."""
    device = inputs["input_ids"].device.type
    with torch.autocast(device, torch.bfloat16, enabled=setting in ("bf16-mixed", "nf4")):
        loss = model(**inputs).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def resident(model: nn.Module, inputs: dict[str, Tensor], device: str) -> int:
    """Bytes of distinct storages that are there before the first step, copies that methods keep included."""
    kept = [s.original for a in state.all_applied(model) for s in a.selected if s.original is not None]
    tensors = [*model.parameters(), *model.buffers(), *inputs.values(), *(kept if device == "cpu" else [])]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """The profiler writes to the file of stderr, past Python."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def measured_on_cpu(model: nn.Module, inputs: dict[str, Tensor], setting: str) -> int:
    """The most that lived during the second step."""
    before = resident(model, inputs, "cpu")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(model, inputs, optimizer, setting)
        with record_function(SECOND):
            step(model, inputs, optimizer, setting)
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    start = next(e.start_ns() for e in events if e.name() == SECOND)
    changes = sorted(((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"), key=lambda pair: pair[0])
    now, most = before, 0
    for time, change in changes:
        now += change
        most = max(most, now if time >= start else 0)
    return most


def measured_on_cuda(model: nn.Module, inputs: dict[str, Tensor], setting: str) -> int:
    """The same by CUDA's allocator, less the workspace that a product of matrices needs."""
    before = torch.cuda.memory_allocated() - resident(model, inputs, "cuda")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    step(model, inputs, optimizer, setting)
    torch.cuda.reset_peak_memory_stats()
    step(model, inputs, optimizer, setting)
    return torch.cuda.max_memory_allocated() - before


def warm_up() -> None:
    """Let cuBLAS take its workspaces, for the forward and the backward thread."""
    x = torch.randn(64, 64, device="cuda", requires_grad=True)
    (x @ x).sum().backward()


def compare(name: str, method: str, setting: str = "fp32", device: str = "cpu") -> dict[str, Any]:
    """One row: what was planned, what was measured, and by how much the plan is off."""
    torch.manual_seed(0)
    model = MODELS[name]().train().to(device)
    inputs = batch(name, device)
    planned: Plan = plan(model, METHODS[method](), batch=inputs, device=device, **SETTINGS[setting])  # type: ignore[arg-type]
    prepare(model, METHODS[method](), setting)
    measured = {"cpu": measured_on_cpu, "cuda": measured_on_cuda}[device](model, inputs, setting)
    facts = {"model": name, "method": method, "setting": setting, "plan": planned.total, "measured": measured}
    return facts | {"phase": planned.phase, "off": planned.total / measured - 1}


def line(row: dict[str, Any]) -> str:
    mega = f"{row['plan'] / 1e6:10.2f}{row['measured'] / 1e6:13.2f}"
    return f"{row['model']:<7}{row['method']:<8}{row['setting']:<11}{mega}{100 * row['off']:+9.2f} %   {row['phase']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.device == "cuda":
        warm_up()
    head = f"{'model':<7}{'method':<8}{'setting':<11}{'plan MB':>10}{'measured MB':>13}{'off':>11}   when most lives"
    print(head, flush=True)
    rows = []
    for case in CASES:
        rows.append(compare(*case, given.device))
        print(line(rows[-1]), flush=True)
    worst = max(abs(row["off"]) for row in rows)
    print(f"worst: {100 * worst:.2f} % (allowed: {100 * LIMIT:.0f} %)")
    if given.json:
        facts = {"device": given.device, "torch": torch.__version__, "batch": [BATCH * SCALE[given.device], TIME]}
        given.json.write_text(json.dumps({**facts, "worst": worst, "rows": rows}, indent=2) + "\n")
    if worst > LIMIT:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
