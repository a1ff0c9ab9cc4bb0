"""What each method costs, beside Hugging Face peft's: `python -m benchmarks.methods [--rounds 9] [names ...]`.

A training step of a small Llama on the CPU, one thread: CPU time over the frozen limit's (the frozen model,
differentiated from the first layer's q, k, v on), and the bytes that autograd keeps over the limit's. The three are
interleaved in one process, the order reversed every other round; a figure is the median of the paired ratio with its
quartiles. Under 15 rounds, or beside other work, differences of 5 % mean nothing. Bytes are exact.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

import lightning_peft.methods  # noqa: F401  fills the registry
from benchmarks.lora_step import interleaved, limit, llama, ratio, saved_bytes, step
from lightning_peft import REGISTRY

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QV = ["q_proj", "v_proj"]
ALL = {"targets": "all-linear"}
Peft = Callable[[], Any]

# method -> its fields here, and the configuration of peft that computes the same (None: peft has no such method)
METHODS: dict[str, tuple[dict[str, Any], Peft | None]] = {
    "lora": ({**ALL, "rank": 16}, lambda: peft.LoraConfig(r=16, lora_alpha=16, target_modules=LINEAR)),
    "lora, dropout": (
        {**ALL, "rank": 16, "dropout": 0.05},
        lambda: peft.LoraConfig(r=16, lora_alpha=16, lora_dropout=0.05, target_modules=LINEAR),
    ),
    "pissa": (
        {**ALL, "rank": 16, "iterations": 4},
        lambda: peft.LoraConfig(r=16, lora_alpha=16, target_modules=LINEAR, init_lora_weights="pissa_niter_4"),
    ),
    "olora": (
        {**ALL, "rank": 16},
        lambda: peft.LoraConfig(r=16, lora_alpha=16, target_modules=LINEAR, init_lora_weights="olora"),
    ),
    "dora": (
        {**ALL, "rank": 16},
        lambda: peft.LoraConfig(r=16, lora_alpha=16, target_modules=LINEAR, use_dora=True),
    ),
    "lora_fa": ({**ALL, "rank": 16}, None),
    "adalora": (
        {**ALL, "rank": 12},
        lambda: peft.AdaLoraConfig(init_r=12, target_r=8, target_modules=LINEAR, total_step=1000),
    ),
    "vera": ({"targets": "q,v", "rank": 256}, lambda: peft.VeraConfig(r=256, target_modules=QV)),
    "dvora": ({"targets": "q,v", "rank": 256}, None),
    "tied_lora": ({"targets": "q,k,v", "rank": 8}, None),
    "multilora": ({**ALL, "rank": 8}, None),
    "nola": ({"targets": "q,v", "coefficients": 100}, None),
    "vb_lora": (
        {"targets": "q,v", "rank": 4},
        lambda: peft.VBLoRAConfig(r=4, num_vectors=256, vector_length=256, target_modules=QV),
    ),
    "randlora": ({"targets": "q,v", "rank": 32}, lambda: peft.RandLoraConfig(r=32, target_modules=QV)),
    "loha": ({**ALL, "rank": 8}, lambda: peft.LoHaConfig(r=8, alpha=8, target_modules=LINEAR)),
    "lokr": ({**ALL, "rank": 8}, lambda: peft.LoKrConfig(r=8, alpha=8, target_modules=LINEAR)),
    "hira": ({**ALL, "rank": 32}, lambda: peft.HiraConfig(r=32, target_modules=LINEAR)),
    "krona": (ALL, None),
    "krona_b": ({}, None),
    "mora": ({**ALL, "rank": 8}, None),
    "glora": ({**ALL, "rank": 4}, lambda: peft.GloraConfig(r=4, target_modules=LINEAR)),
    "fourierft": (
        {"targets": "q,v", "count": 1000},
        lambda: peft.FourierFTConfig(n_frequency=1000, target_modules=QV),
    ),
    "waveft": ({"targets": "q,v", "count": 1000}, lambda: peft.WaveFTConfig(n_frequency=1000, target_modules=QV)),
    "oft": ({**ALL, "block_size": 32}, lambda: peft.OFTConfig(oft_block_size=32, r=0, target_modules=LINEAR)),
    "boft": (  # without its CUDA extension peft has one factor, whatever is asked for
        {"targets": "q,v", "block_size": 8, "factors": 1},
        lambda: peft.BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=1, target_modules=QV),
    ),
    "hra": ({**ALL, "rank": 8}, lambda: peft.HRAConfig(r=8, target_modules=LINEAR)),
    "road": ({**ALL, "group_size": 32}, lambda: peft.RoadConfig(group_size=32, target_modules=LINEAR)),
    "delora": ({**ALL, "rank": 8}, lambda: peft.DeloraConfig(r=8, delora_lambda=15, target_modules=LINEAR)),
    "gralora": ({**ALL, "rank": 32}, lambda: peft.GraloraConfig(r=32, gralora_k=2, target_modules=LINEAR)),
    "miss": ({**ALL, "rank": 16}, lambda: peft.MissConfig(r=16, target_modules=LINEAR)),
    "c3a": ({"targets": "q,v", "block_size": 64}, lambda: peft.C3AConfig(block_size=64, target_modules=QV)),
    "shira": ({"targets": "q,v", "rank": 16}, lambda: peft.ShiraConfig(r=16, target_modules=QV)),
    "ssf": (ALL, None),
    "qalora": ({"targets": "q,v", "rank": 16}, None),
    "ia3": (
        {"targets": "k,v,down"},
        lambda: peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    "ln_tuning": (
        {},
        lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm", "norm"]),
    ),
    "bitfit": ({}, None),
    "prompt_tuning": (
        {"length": 20},
        lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20),
    ),
    "prefix_tuning": (
        {"length": 20},
        lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20),
    ),
}
Rows = list[dict[str, Any]]


def ours(name: str) -> nn.Module:
    fields, _ = METHODS[name]
    return REGISTRY[name.partition(",")[0]](**fields, heads=None).apply(llama())  # type: ignore[call-arg]


def measure(name: str, rounds: int) -> dict[str, Any]:
    """One method: time and bytes over the limit, ours and peft's."""
    models = {"limit": limit(llama()), "ours": ours(name)}
    config = METHODS[name][1]
    if config is not None:
        models["peft"] = peft.get_peft_model(llama(), config())
    seconds = interleaved({who: (lambda m=model: m, step) for who, model in models.items()}, rounds)
    sizes = {who: saved_bytes(model) for who, model in models.items()}
    trained = {w: sum(p.numel() for p in m.parameters() if p.requires_grad) for w, m in models.items() if w != "limit"}
    out: dict[str, Any] = {"method": name, "trained": trained}
    for who in list(models)[1:]:
        out[who] = {"time": ratio(seconds, who, "limit"), "kept": sizes[who] / sizes["limit"]}
    if config is not None:
        out["time, ours / peft"] = ratio(seconds, "ours", "peft")
        out["kept, ours / peft"] = sizes["ours"] / sizes["peft"]
    return out


def line(row: dict[str, Any]) -> str:
    def of(who: str) -> str:
        if who not in row:
            return f"{'-':>24}{'-':>8}"
        t = row[who]["time"]
        return f"{t['median']:8.2f} [{t['low']:.2f}, {t['high']:.2f}]{row[who]['kept']:8.2f}"

    against = ""
    if "peft" in row:
        t = row["time, ours / peft"]
        against = f"{t['median']:8.2f} [{t['low']:.2f}, {t['high']:.2f}]{row['kept, ours / peft']:8.2f}"
    return f"{row['method']:<16}{of('ours')}{of('peft')}{against}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of methods; all of them if none is given")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    given = parser.parse_args()
    known = [name for name in METHODS if name.partition(",")[0] in REGISTRY]
    if wrong := [name for name in given.names if name not in known]:
        sys.exit(f"unknown: {', '.join(wrong)}. Known: {', '.join(known)}.")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"{'':<16}{'ours / limit':>24}{'kept':>8}{'peft / limit':>24}{'kept':>8}{'ours / peft':>24}{'kept':>8}")
    rows: Rows = []
    for name in given.names or known:
        rows.append(measure(name, max(2, given.rounds)))
        print(line(rows[-1]), flush=True)
    print(verdict(rows))
    if given.json:
        facts = {"date": datetime.date.today().isoformat(), "rounds": given.rounds, "torch": torch.__version__}
        given.json.write_text(json.dumps({**facts, "peft": peft.__version__, "rows": rows}, indent=2) + "\n")


def verdict(rows: Rows) -> str:
    """Which methods are slower or keep more than peft's."""
    beside = [row for row in rows if "peft" in row]
    slow = [row["method"] for row in beside if row["time, ours / peft"]["median"] > 1]
    hungry = [row["method"] for row in beside if row["kept, ours / peft"] > 1.001]
    mean = statistics.geometric_mean([row["time, ours / peft"]["median"] for row in beside]) if beside else 1.0
    worse = f"slower: {slow or 'none'}; keep more: {hungry or 'none'}"
    return f"{len(beside)} beside peft, {mean:.2f} of its time on average; {worse}"


if __name__ == "__main__":
    main()
