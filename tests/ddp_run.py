"""Training runs on `processes` CPU processes; writes what each rank ends with. Started by test_ddp.py."""

import sys
from pathlib import Path
from typing import Any

import boring
import lightning.pytorch as pl
import torch
import torch.distributed as dist
from settings import make
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils.data import DataLoader, DistributedSampler

from lightning_peft import LoRA, PEFTDDPStrategy, PEFTSingleDeviceStrategy
from lightning_peft.callback import PEFT
from lightning_peft.core.method import REGISTRY

MORE: dict[str, dict[str, Any]] = {  # from data, and of sizes that are known in the run only
    "sparse_adapter": {"score": "snip"},
    "lt_sft": {"budget": 0.02, "priming": 3.0, "l1": 0.1},
    "diff_pruning": {"budget": 0.02, "priming": 3.0, "penalty": 1e-3, "heads": None},
    "selective": {"score": "sensitivity", "over": "rows", "budget": 0.05, "batches": 2, "every": 1},
    "fish": {"samples": 8, "budget": 0.02},
    "surgical": {"shift": "input", "rate": "rgn", "batches": 2},
    "far": {"prime": 2},
}


def main(directory: str, hows: str, processes: int) -> None:
    torch.set_num_threads(1)
    for how in hows.split(","):
        one(str(Path(directory, how)), how, processes)


def one(directory: str, how: str, processes: int) -> None:
    """`<how>+resumed` is made of two runs, the second of which goes on from the fourth step of the first."""
    Path(directory).mkdir(exist_ok=True)
    name, _, resumed = how.partition("+")
    half = Path(directory) / "half.ckpt" if resumed else None
    if half is not None:
        first = fit(directory, name, processes, max_steps=4)[1]
        first.save_checkpoint(half)
    module, trainer, watch = fit(directory, name, processes, half)
    frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
    if hasattr(module, "_ddp_params_and_buffers_to_ignore"):
        raise RuntimeError("left behind on the module")
    traffic = {"reduced": watch.reduced // trainer.global_step, "broadcast": watch.broadcast}
    result = {**traffic, "tensors": boring.tensors(module), "ignored": sorted(watch.ignored), "frozen": sorted(frozen)}
    torch.save(result, Path(directory) / f"rank{trainer.global_rank}.pt")


def fit(
    directory: str, how: str, processes: int, ckpt: Path | None = None, **more: Any
) -> tuple[boring.Boring, pl.Trainer, "Watch"]:
    pl.seed_everything(0, verbose=False)
    module = (boring.Says if how == "adamix" else boring.Boring)(dropout=0.0, optimizer="sgd")
    if how == "unequal":  # a base that differs from rank to rank
        import os

        with torch.no_grad():
            module.net.bert.embeddings.word_embeddings.weight.add_(int(os.environ.get("LOCAL_RANK", 0)))
    lora: PEFT = make(how, "bert", **MORE.get(how, {})) if how in REGISTRY else LoRA(rank=2)
    callbacks: list[pl.Callback] = [] if how == "strategy" else [lora]
    watch = Watch()
    callbacks.append(watch)
    callbacks.append(pl.callbacks.ModelCheckpoint(directory, filename="end", save_last=False))
    options = {"strategy": strategy(how, processes, lora), "devices": processes, "use_distributed_sampler": False}
    options["max_epochs"] = 1 + bool(MORE.get(how, {}).get("every"))
    trainer = boring.trainer(directory, callbacks, **options, **more)
    trainer.fit(module, Share(processes), ckpt_path=ckpt)
    return module, trainer, watch


class Watch(pl.Callback):
    """What DDP was told to leave alone, while it runs."""

    ignored: list[str] = []

    reduced: int = 0  # numbers that one backward pass sends
    broadcast: int = 0  # floating-point numbers that wrapping the model sent

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        send = dist._broadcast_coalesced

        def counted(group: Any, tensors: Any, *rest: Any) -> Any:
            self.broadcast += sum(t.numel() for t in tensors if t.is_floating_point())
            return send(group, tensors, *rest)

        dist._broadcast_coalesced = counted

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.ignored = list(getattr(pl_module, "_ddp_params_and_buffers_to_ignore", []))
        wrapped: Any = trainer.strategy.model
        if wrapped is not pl_module:
            wrapped.register_comm_hook(None, self.reduce)

    def reduce(self, _: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        self.reduced += bucket.buffer().numel()
        return allreduce_hook(None, bucket)


class Share(pl.LightningDataModule):
    """The ranks' shares of a batch of 4 are together the batch of 4 that one process sees."""

    def __init__(self, processes: int) -> None:
        super().__init__()
        self.processes = processes

    def train_dataloader(self) -> DataLoader:
        whole = boring.data(shuffle=False).dataset
        sampler = DistributedSampler(whole, self.processes, self.trainer.global_rank, shuffle=False)
        return DataLoader(whole, batch_size=4 // self.processes, sampler=sampler)


def strategy(how: str, processes: int, lora: PEFT) -> object:
    if how in ("callback", "unequal") or how in REGISTRY:
        return "ddp" if processes > 1 else "auto"
    if how == "registered":
        return "peft_ddp" if processes > 1 else "peft_single_device"
    return PEFTDDPStrategy(method=lora) if processes > 1 else PEFTSingleDeviceStrategy(method=lora)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
