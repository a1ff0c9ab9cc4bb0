"""QLoRA here, in peft + bitsandbytes, and the frozen NF4 base alone: `python -m benchmarks.qlora [--rounds 31]`.

On the CPU: process time on one thread; on CUDA: events around the run. All variants interleaved in one process, the
order reversed every other round; a figure is the median over rounds of the paired ratio, with its quartiles. Under 15
rounds, or beside other work, differences of 5 % mean nothing.
"frozen" is bitsandbytes' Linear4bit, frozen, differentiated to its input only; in the Llama from the first layer's q, k
and v on. "frozen, ours" is the same on our layers. All hold the same codes, which is checked. bitsandbytes' kernel for
inference on AVX512-BF16 is off. With a 16-bit --dtype everything runs under autocast, as a Trainer does it.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.lora_step import Run, limit, row, saved_bytes
from lightning_peft import LoRA
from lightning_peft.core.codes import kernels
from lightning_peft.core.quant import quantise as codes_of
from lightning_peft.gradient_checkpointing import checkpoint_blocks
from lightning_peft.precision import footprint, quantise

GOAL, BITS, RANK = 1.10, 4.127, 16
LAYERS = ((1024, 1024), (2048, 256))  # width, tokens
BATCH, TIME, VOCAB = 4, 256, 2048
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAIRS = (("ours", "frozen"), ("ours", "peft"), ("ours, torch", "peft"), ("peft", "frozen"), ("frozen, ours", "frozen"))
Rows = list[dict[str, Any]]


# ------------------------------------------------------------------ the variants
class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def llama(hidden: int) -> nn.Module:
    torch.manual_seed(0)
    wide = hidden * 43 // 1024 * 64  # whole blocks a row: else bitsandbytes' CPU kernel takes scales of other blocks
    shape = {"hidden_size": hidden, "intermediate_size": wide, "num_attention_heads": hidden // 64}
    return LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=2, vocab_size=VOCAB, use_cache=False))


def ours(model: nn.Module, targets: str, backend: str = "auto", rank: int = RANK) -> nn.Module:
    """QLoRA of this library; rank 0 for the frozen base."""
    model.requires_grad_(False)
    if rank:
        LoRA(targets=targets, rank=rank, heads=None).apply(model)
    quantise(model, targets=targets, backend=backend)
    return model.to(DEVICE)


def theirs(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """bitsandbytes' layers in place of all projections but the head."""
    model.requires_grad_(False)
    for owner in list(model.modules()):
        for name, child in list(owner.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                setattr(owner, name, four_bits(child, dtype))
    return model.to(DEVICE)


def four_bits(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, False, dtype, True, "nf4")
    layer.weight = bnb.nn.Params4bit(
        linear.weight.data, False, compress_statistics=True, quant_type="nf4", module=layer
    )
    layer.support_avx512bf16_for_cpu = False
    return layer.to(DEVICE)  # which quantises


def with_peft(model: nn.Module) -> nn.Module:
    """peft's layer around each of bitsandbytes', called as peft's models call it."""
    config = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear")
    for owner in list(model.modules()):
        for name, child in list(owner.named_children()):
            if isinstance(child, bnb.nn.Linear4bit):
                setattr(owner, name, PeftLinear4bit(child, "default", config=config, r=RANK, lora_alpha=16))
    return model.to(DEVICE)


def variants(make: Callable[[], nn.Module], targets: str, dtype: torch.dtype) -> dict[str, nn.Module]:
    return {
        "frozen": theirs(make(), dtype),
        "frozen, ours": ours(make(), targets, rank=0),
        "ours": ours(make(), targets),
        "ours, torch": ours(make(), targets, "torch"),
        "peft": with_peft(theirs(make(), dtype)),
    }


# ------------------------------------------------------------------ measuring
def layer_step(width: int, tokens: int, dtype: torch.dtype) -> Run:
    x = torch.randn(1, tokens, width, device=DEVICE, dtype=dtype, requires_grad=True)
    up = torch.randn(1, tokens, width, device=DEVICE, dtype=dtype)

    def step(model: nn.Module) -> Tensor:
        y = forward(model, dtype, x)
        y.backward(up)
        x.grad = None
        model.zero_grad(set_to_none=True)
        return y

    return step


def llama_step(dtype: torch.dtype) -> Run:
    tokens = torch.arange(BATCH * TIME, device=DEVICE).view(BATCH, TIME) % VOCAB

    def step(model: nn.Module) -> Tensor:
        out = forward(model, dtype, input_ids=tokens, labels=tokens)
        out.loss.backward()
        model.zero_grad(set_to_none=True)
        return out.logits

    return step


def forward(model: nn.Module, dtype: torch.dtype, *args: Any, **kwargs: Any) -> Any:
    with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
        return model(*args, **kwargs)


def seconds_of(run: Callable[[], object]) -> float:
    """CPU time, or the time on the GPU from the first kernel to the last."""
    if DEVICE.type == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3


def interleaved(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in list(runs.items())[:: -1 if turn % 2 else 1]:
            taken = seconds_of(run)
            if turn:  # the first round warms up
                seconds[name].append(taken)
    return seconds


def compare(what: str, models: dict[str, nn.Module], step: Run, rounds: int) -> Rows:
    """Paired ratios of step times, bytes kept, and by how much the outputs of the same codes differ."""
    first = step(models["frozen"]).detach()
    apart = max(float((step(model).detach() - first).abs().max()) for model in models.values())
    seconds = interleaved({name: partial(step, model) for name, model in models.items()}, rounds)
    rows = [row(f"{what}: {a} / {b}", seconds, a, b) for a, b in PAIRS if {a, b} <= models.keys()]
    rows += [{"what": f"{what}: kept, {name} (MB)", "value": saved_bytes(m, step) / 1e6} for name, m in models.items()]
    return [*rows, {"what": f"{what}: outputs differ by", "value": apart}]


# ------------------------------------------------------------------ the tables
def layers(rounds: int, dtype: torch.dtype) -> Rows:
    rows: Rows = []
    for width, tokens in LAYERS:
        step = layer_step(width, tokens, dtype)
        rows += compare(f"{width} x {tokens}", variants(partial(Layer, width), "proj", dtype), step, rounds)
    return rows


def models(rounds: int, dtype: torch.dtype, hidden: int) -> Rows:
    """A small Llama, then the same with checkpointed blocks: transformers' for the others, ours for ours."""
    made = variants(partial(llama, hidden), "all-linear", dtype)
    for name in ("frozen", "frozen, ours"):
        limit(made[name])
    rows = [{"what": "bits per parameter", "value": bits(made["ours"])}]
    rows += compare(f"Llama {hidden}", made, llama_step(dtype), rounds)
    for name, model in made.items():
        if "ours" in name:
            checkpoint_blocks(model)
        else:
            model.gradient_checkpointing_enable({"use_reentrant": False})
    return rows + compare(f"Llama {hidden}, checkpointed", made, llama_step(dtype), rounds)


def bits(model: nn.Module) -> float:
    held = footprint(model)
    return 8 * (held["codes"] + held["constants"]) / held["parameters"]


def dequantisers(rounds: int, dtype: torch.dtype) -> Rows:
    """W from its codes, double quantisation included."""
    rows: Rows = []
    for width in (1024, 4096):
        weight = torch.randn(width, width, device=DEVICE)
        packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True, blocksize=64)
        state.dtype, blocks = dtype, codes_of(weight)
        runs: dict[str, Callable[[], object]] = {"bitsandbytes": partial(dequantize_4bit, packed, state)}
        for name in ("ours", "ours, torch"):
            backend = kernels("torch" if "torch" in name else "auto")
            runs[name] = partial(backend.dequantise, blocks, dtype)
        seconds = interleaved(runs, rounds)
        what = f"dequantise {width} x {width}"
        rows += [
            row(f"{what}: {name} / bitsandbytes", seconds, name, "bitsandbytes")
            for name in runs
            if name != "bitsandbytes"
        ]
    return rows


def verdict(rows: Rows) -> str:
    """Which of the goals the figures miss."""
    missed = []
    for entry in rows:
        what, value = entry["what"], entry.get("median", entry.get("value"))
        if what.endswith(": ours / frozen") and value > GOAL:
            missed.append(f"{what} is {value:.3f}, above {GOAL}")
        if what.endswith(": ours / peft") and value > 1:
            missed.append(f"{what} is {value:.3f}, above 1")
        if what == "bits per parameter" and round(value, 3) > BITS:
            missed.append(f"{value:.4f} bits per parameter, above {BITS}")
    return "all goals are met" if not missed else "missed: " + "; ".join(missed)


def line(entry: dict[str, Any]) -> str:
    times = " / ".join(f"{value:.1f}" for value in entry.get("ms", {}).values())
    if not times:
        return f"{entry['what']:<52}{entry['value']:8.{2 if entry['value'] > 10 else 3}f}"
    return f"{entry['what']:<52}{entry['median']:8.3f}   [{entry['low']:.3f}, {entry['high']:.3f}]   {times} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31, help="of each comparison")
    parser.add_argument(
        "--hidden", type=int, default=1024, help="width of the Llama, a multiple of 64; 0 leaves it out"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the products")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rounds, dtype = max(2, given.rounds), getattr(torch, given.dtype)
    tables = [dequantisers, layers, *([partial(models, hidden=given.hidden)] if given.hidden else [])]
    rows: Rows = []
    for table in tables:
        rows += (found := table(rounds, dtype))
        print("\n".join(map(line, found)), flush=True)
    print(verdict(rows))
    if given.json:
        facts = {"rounds": rounds, "device": DEVICE.type, "dtype": given.dtype, "torch": torch.__version__}
        versions = {"peft": peft.__version__, "bitsandbytes": bnb.__version__}
        given.json.write_text(json.dumps({**facts, **versions, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
