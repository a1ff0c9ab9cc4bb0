"""Two CPU processes around quantised bases: DDP in a Trainer, FSDP2 on plain modules. Started by test_precision.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import boring
import lightning.pytorch as pl
import torch
import torch.distributed as dist
import zoo
from ddp_run import Share, Watch
from torch import Tensor, nn

from lightning_peft import LoRA
from lightning_peft.core import state
from lightning_peft.precision import NF4Precision, quantise

STORAGES = ("uint8", "bfloat16", "float32")


# ------------------------------------------------------------------ DDP
class Traffic(Watch):
    """All that collectives of DDP send, codes and scales in bytes included."""

    sent = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        send = dist._broadcast_coalesced

        def counted(group: Any, tensors: Any, *rest: Any) -> Any:
            self.sent += sum(t.numel() for t in tensors if t.is_floating_point() or t.dtype == torch.uint8)
            return send(group, tensors, *rest)

        dist._broadcast_coalesced = counted


def ddp(directory: str, how: str, processes: int) -> None:
    pl.seed_everything(0, verbose=False)
    module = boring.Boring(dropout=0.0, optimizer="sgd")
    spoil(module, how, int(os.environ.get("LOCAL_RANK", 0)))
    watch = Traffic()
    lora = LoRA(rank=2, targets="all-linear")
    options: dict[str, Any] = {"strategy": "peft_ddp" if how == "registered" else "ddp"} if processes > 1 else {}
    options |= {"devices": processes, "use_distributed_sampler": False}
    options["plugins"] = [NF4Precision(compute_dtype="float32")]
    trainer = boring.trainer(directory, [lora, watch], **options)
    trainer.fit(module, Share(processes))
    trainer.save_checkpoint(Path(directory) / "end.ckpt")
    constants = state.constant_names(module)
    result = {"tensors": boring.tensors(module), "sent": watch.sent, "ignored": watch.ignored, "constants": constants}
    result |= {"trainable": sum(p.numel() for p in state.trainable(module).values()), "losses": module.losses}
    torch.save(result, Path(directory) / f"rank{trainer.global_rank}.pt")


@torch.no_grad()
def spoil(module: boring.Boring, how: str, rank: int) -> None:
    """A base that differs on the second process: in the codes, or in nothing but the scales."""
    weight = module.net.bert.encoder.layer[0].attention.self.query.weight
    if how == "noise" and rank:
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(rank)), alpha=0.05)
    if how == "scale":
        weight.mul_(2**rank)


# ------------------------------------------------------------------ FSDP2
def llama(storage: str) -> nn.Module:
    net = zoo.build("llama").train()
    with torch.no_grad():
        net.lm_head.weight.mul_(20)  # so that there is something to learn
    quantise(net, compute_dtype="float32", storage_dtype=storage)
    return LoRA(rank=4, targets="all-linear").apply(net)


def batch(step: int, share: slice) -> Tensor:
    """(2, time), of which each process takes one"""
    return torch.randint(3, zoo.VOCAB, (2, 9), generator=torch.Generator().manual_seed(step))[share]


def train(net: nn.Module, share: slice, steps: int = 3) -> tuple[list[float], list[dict[str, Tensor]]]:
    """-> losses, and the gradients of each step"""
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    losses, gradients = [], []
    for step in range(steps):
        x = batch(step, share)
        loss = net(input_ids=x, labels=x).loss
        optimizer.zero_grad()
        loss.backward()
        gradients.append({name: whole(p.grad) for name, p in net.named_parameters() if p.grad is not None})
        optimizer.step()
        losses.append(loss.item())
    return losses, gradients


def whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def fsdp(directory: str, rank: int, processes: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    store = dist.FileStore(f"{directory}/store", processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    mesh = init_device_mesh("cpu", (processes,))
    found: dict[str, Any] = {}
    for storage in STORAGES:
        alone, sharded = llama(storage), llama(storage)
        for block in sharded.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        losses, gradients = train(sharded, slice(rank, rank + 1))
        mean = torch.tensor(losses)
        dist.all_reduce(mean)
        packed = {n: type(p).__name__ for n, p in sharded.named_parameters() if not p.requires_grad and "proj" in n}
        one = train(alone, slice(0, 2))
        found[storage] = {"losses": (mean / processes).tolist(), "gradients": gradients, "kinds": packed}
        found[storage] |= {"single_losses": one[0], "single_gradients": one[1]}
    torch.save(found, Path(directory) / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "fsdp":
        fsdp(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        ddp(sys.argv[2], sys.argv[1], int(sys.argv[3]))
