"""The most memory that loading and quantising a model takes: `python -m benchmarks.quantise_memory [--gigabytes 1]`.

A Llama of that size in fp32 is written to a safetensors file. Each case runs in a process of its own, watched from here
every millisecond: RssAnon, the memory that only this process has. The high-water mark of the kernel (VmHWM) is printed
beside it; it misses no moment, but counts pages of the file as well, which the system takes back when it needs them.

    from the file   built without memory, then quantised while it is read: most - before - final size
    in place        in memory in fp32 (or bf16) before, quantised layer by layer: most - before
"""

import argparse
import contextlib
import json
import math
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, TextIO, cast

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft.precision import quantise
from lightning_peft.quantised_files import empty_weights, load_quantised

LIMIT = 0.35e9  # bytes
VOCAB = 512
CASES = [(how, backend) for how in ("from the file", "in place") for backend in ("auto", "torch")]
CASES += [("in place, bf16", "auto")]


def llama(gigabytes: float, hidden: int) -> nn.Module:
    """As many layers as make that size."""
    wide, heads = hidden * 43 // 16, max(1, hidden // 128)
    layers = max(1, math.ceil((gigabytes * 1e9 / 4 - 2 * VOCAB * hidden) / ((4 * hidden + 3 * wide) * hidden)))
    shape = {"hidden_size": hidden, "intermediate_size": wide, "num_attention_heads": heads, "vocab_size": VOCAB}
    return LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=layers, use_cache=False))


def write(folder: Path, gigabytes: float, hidden: int) -> int:
    """A file with random weights; -> its bytes"""
    torch.manual_seed(0)
    with empty_weights():
        model = llama(gigabytes, hidden)
    tensors = {name: torch.randn(p.shape) / 50 for name, p in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(t.nbytes for t in tensors.values())


def status(process: str = "self") -> dict[str, int]:
    """Bytes by the kernel's name"""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    pairs = (entry.split(":") for entry in lines if entry.endswith("kB"))
    return {name: 1024 * int(value.split()[0]) for name, value in pairs}


def held(model: nn.Module) -> int:
    """Bytes of distinct storages, constants of the codes included."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.nbytes for t in tensors}.values())


# ------------------------------------------------------------------ the process that is watched
def child(how: str, backend: str, folder: Path, gigabytes: float, hidden: int) -> None:
    """Everything that is loaded once is, before the parent is told to look."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    warm_up(backend)
    with empty_weights():
        model = llama(gigabytes, hidden)
    if how != "from the file":
        model.to(torch.bfloat16 if "bf16" in how else torch.float32).to_empty(device="cpu")
        for parameter in model.parameters():
            parameter.data.normal_(std=0.02)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
    say(status())
    sys.stdin.readline()
    start = time.process_time()
    if how != "from the file":
        quantise(model, backend=backend)
    else:
        load_quantised(model, folder, backend=backend)
    seconds = time.process_time() - start
    say({**status(), "held": held(model), "seconds": seconds})


def warm_up(backend: str) -> None:
    with tempfile.TemporaryDirectory() as folder, empty_weights():
        write(Path(folder), 0, 64)
        load_quantised(llama(0, 64), folder, backend=backend)


def say(facts: dict[str, Any]) -> None:
    print(json.dumps(facts), flush=True)


# ------------------------------------------------------------------ the one that watches
def measure(how: str, backend: str, folder: Path, gigabytes: float, hidden: int) -> dict[str, Any]:
    """One row; sizes in bytes, those of the process above what it had when it was told to go"""
    command = [sys.executable, "-m", "benchmarks.quantise_memory", "--child", how, backend]
    command += ["--folder", str(folder), "--gigabytes", str(gigabytes), "--hidden", str(hidden)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        told, heard = cast("tuple[TextIO, TextIO]", (process.stdin, process.stdout))
        before = json.loads(heard.readline())
        told.write("go\n")
        told.close()
        most = 0
        while process.poll() is None:
            most = max(most, status(str(process.pid)).get("RssAnon", 0))
            time.sleep(0.001)
        after = json.loads(heard.readline())
    final = after["held"] if how == "from the file" else 0
    return {
        "case": how,
        "backend": backend,
        "final": after["held"],
        "most": most - before["RssAnon"],
        "above": most - before["RssAnon"] - final,
        "high_water": after["VmHWM"] - before["VmRSS"],
        "left": after["RssAnon"] - before["RssAnon"],
        "seconds": after["seconds"],
    }


def line(row: dict[str, Any]) -> str:
    sizes = "".join(f"{row[name] / 1e6:12.1f}" for name in ("final", "most", "above", "high_water", "left"))
    return f"{row['case']:<15}{row['backend']:<8}{sizes}{row['seconds']:9.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of the model in fp32, at least")
    parser.add_argument("--hidden", type=int, default=2048, help="width of the model")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(*given.child, given.folder, given.gigabytes, given.hidden)
        return
    with tempfile.TemporaryDirectory() as name:
        size = write(Path(name), given.gigabytes, given.hidden)
        print(f"{size / 1e6:.1f} MB in fp32; all below in MB, allowed above: {LIMIT / 1e6:.0f}")
        print(f"{'case':<15}{'backend':<8}{'final':>12}{'most':>12}{'above':>12}{'VmHWM':>12}{'left':>12}{'CPU s':>9}")
        rows = []
        for how, backend in CASES:
            rows.append(measure(how, backend, Path(name), given.gigabytes, given.hidden))
            print(line(rows[-1]), flush=True)
    worst = max(row["above"] for row in rows)
    print(f"worst: {worst / 1e6:.1f} MB above")
    if given.json:
        given.json.write_text(
            json.dumps({"fp32": size, "limit": LIMIT, "torch": torch.__version__, "rows": rows}) + "\n"
        )
    if worst > LIMIT:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
