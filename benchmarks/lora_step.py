"""Our LoRA, Hugging Face peft's, and the frozen limit: `python -m benchmarks.lora_step [--rounds 31] [--json FILE]`.

CPU time on one thread, all variants interleaved in one process, the order reversed every other round; a figure is the
median over rounds of the paired ratio, with its quartiles. Differences under 5 % need 31 rounds to mean something.
The limit is the frozen model, differentiated from the first layer's q, k, v on: what LoRA needs at least.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft import LoRA, load_adapter, save_adapter

SHAPE = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 2, "num_attention_heads": 8}
BATCH, TIME, VOCAB, RANK = 4, 256, 2048, 16
LINEARS, WIDTH = 2002, 64
Setup, Run = Callable[[], Any], Callable[[Any], object]


def llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, vocab_size=VOCAB, use_cache=False))


def stack() -> nn.Module:
    """2002 small projections: injection and files are about their number."""
    torch.manual_seed(0)
    return nn.ModuleDict({f"layer{i}": nn.ModuleDict({"proj": nn.Linear(WIDTH, WIDTH)}) for i in range(LINEARS)})


def limit(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    for name in "qkv":
        projection = model.get_submodule(f"model.layers.0.self_attn.{name}_proj")
        projection.register_forward_hook(lambda _module, _args, out: out.requires_grad_())
    return model


def ours(model: nn.Module, targets: str) -> nn.Module:
    return LoRA(targets=targets, rank=RANK, heads=None).apply(model)


def theirs(model: nn.Module, targets: str) -> nn.Module:
    return peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=targets))


def step(model: nn.Module) -> None:
    tokens = torch.arange(BATCH * TIME).view(BATCH, TIME) % VOCAB
    model(input_ids=tokens, labels=tokens).loss.backward()
    model.zero_grad(set_to_none=True)


def interleaved(variants: dict[str, tuple[Setup, Run]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each run on what its setup made (untimed), after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, (setup, run) in list(variants.items())[:: -1 if turn % 2 else 1]:
            made = setup()
            start = time.process_time()
            run(made)
            if turn:
                seconds[name].append(time.process_time() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], above: str, below: str) -> dict[str, float]:
    paired = [a / b for a, b in zip(seconds[above], seconds[below], strict=True)]
    return dict(zip(("low", "median", "high"), statistics.quantiles(paired, n=4, method="inclusive"), strict=True))


def saved_bytes(model: nn.Module, run: Run = step) -> int:
    """Distinct storages that autograd keeps for backward, without parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        parts = (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,)
        for storage in (part.untyped_storage() for part in parts):
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(model)
    return sum(kept.values())


def steps(rounds: int) -> list[dict[str, Any]]:
    models = {"limit": limit(llama()), "ours": ours(llama(), "all-linear"), "peft": theirs(llama(), "all-linear")}
    seconds = interleaved({name: (lambda m=m: m, step) for name, m in models.items()}, rounds)
    pairs = (("ours", "peft"), ("ours", "limit"), ("peft", "limit"))
    rows = [row(f"training step, {a} / {b}", seconds, a, b) for a, b in pairs]
    kept = {name: saved_bytes(model) for name, model in models.items()}
    return rows + [{"what": f"saved for backward, {name} (MB)", "value": size / 1e6} for name, size in kept.items()]


def files(rounds: int, folder: Path) -> list[dict[str, Any]]:
    """Injection into 2002 projections, saving and loading them; each on a fresh model."""
    mine, other = partial(ours, targets="proj"), partial(theirs, targets=r".*\.proj")
    done, peer, a, b = mine(stack()), other(stack()), folder / "ours", folder / "peft"
    jobs: dict[str, tuple[tuple[Setup, Run], tuple[Setup, Run]]] = {
        "inject": ((stack, mine), (stack, other)),
        "save": ((lambda: done, lambda m: save_adapter(m, a)), (lambda: peer, lambda m: m.save_pretrained(b))),
        "load": ((stack, lambda m: load_adapter(m, a)), (stack, lambda m: peft.PeftModel.from_pretrained(m, b))),
    }
    measured = {job: interleaved(dict(zip(("ours", "peft"), pair, strict=True)), rounds) for job, pair in jobs.items()}
    return [row(f"{job} {LINEARS}, ours / peft", seconds, "ours", "peft") for job, seconds in measured.items()]


def row(what: str, seconds: dict[str, list[float]], above: str, below: str) -> dict[str, Any]:
    milliseconds = {name: 1e3 * statistics.median(seconds[name]) for name in (above, below)}
    return {"what": what, **ratio(seconds, above, below), "ms": milliseconds}


def line(entry: dict[str, Any]) -> str:
    times = " / ".join(f"{value:.1f}" for value in entry.get("ms", {}).values())
    if not times:
        return f"{entry['what']:<36}{entry['value']:8.1f}"
    return f"{entry['what']:<36}{entry['median']:8.3f}   [{entry['low']:.3f}, {entry['high']:.3f}]   {times} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31, help="of the training step; a sixth of them for the files")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        rows = steps(max(2, given.rounds)) + files(max(2, given.rounds // 6), Path(folder))
    print("\n".join(map(line, rows)))
    if given.json:
        given.json.write_text(json.dumps({"rounds": given.rounds, "torch": torch.__version__, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
