"""`lightning-peft plan`: the memory of the run that the same words would start with `train`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from lightning_peft import checks
from lightning_peft.callback import PEFT
from lightning_peft.config import build, check, composed
from lightning_peft.gradient_checkpointing import GradientCheckpointing, configured
from lightning_peft.groups import innermost
from lightning_peft.launch import own_directory
from lightning_peft.methods.full import FullFineTuning
from lightning_peft.methods.lora import LoRA
from lightning_peft.planning.picture import draw
from lightning_peft.planning.planner import image_batch, plan, text_batch
from lightning_peft.planning.precision import QUANTISED, arithmetic
from lightning_peft.planning.report import Plan
from lightning_peft.planning.search import fit, known, text
from lightning_peft.planning.sizes import PlanError, parse, show
from lightning_peft.train import build_task

NOWHERE = "not-needed-for-a-plan"


def options(parser: argparse.ArgumentParser) -> None:
    """What `plan` has beside the overrides."""
    parser.add_argument("--fit", metavar="SIZE", help="search settings that fit, such as --fit 24GiB")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw full, LoRA and QLoRA of this model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to this file as well")
    parser.add_argument("--offload", choices=("optimizer", "weights"), help="what is kept on the host")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: by trainer.accelerator, cuda for auto")


def run(given: argparse.Namespace) -> None:
    """Print the plan, and what else was asked for."""
    if given.multirun:
        raise PlanError("A plan is of one run: leave --multirun out, and ask once for each value.")
    if given.fit:
        parse(given.fit)
    for file in filter(None, (given.plot, given.json)):
        if not file.parent.is_dir():  # not after minutes of searching
            raise PlanError(f"{file}: there is no folder {file.parent}.")
    config = configuration(given.overrides, given.config_dir or given.config_path, given.config_name)
    if given.cfg:
        print(OmegaConf.to_yaml(config[given.package] if given.package else config))
        return
    subject, settings = subjects(config, given)
    made = plan(**subject, **settings)
    print(made)
    found: dict[str, Any] = {"plan": made.as_dict()}
    if given.fit:
        found["choices"] = choices(subject, settings, given.fit)
    if given.plot:
        found["plot"] = pictured(subject, settings, made, given.plot)
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def choices(subject: dict[str, Any], settings: dict[str, Any], size: str) -> list[dict[str, Any]]:
    """Search, and print what fits."""
    rest = {name: settings[name] for name in ("optimizer", "device", "offload", "accumulate")}
    own = settings["precision"]  # a plugin has settings of its own
    rest |= {"precisions": known(subject["module"], None if isinstance(own, str) or own is None else own)}
    rest |= {"checkpointing": (False, settings["checkpointing"] or True)}
    found = fit(**subject, size=size, say=lambda line: print(f"  {line}", file=sys.stderr, flush=True), **rest)
    if not found:
        raise PlanError(
            f"Nothing fits {size}: not one example a batch, with checkpointing, in the smallest precision. Take a "
            "smaller model, shorter texts (data.max_length=...), an optimizer in 8 bits, or --offload weights."
        )
    print(f"\n{text(found, size)}")
    return [choice.as_dict() for choice in found]


def pictured(subject: dict[str, Any], settings: dict[str, Any], made: Plan, file: Path) -> dict[str, Any]:
    """Plans of full fine-tuning, LoRA and QLoRA (and of the method that was asked for) -> a picture"""
    own = subject["method"][0] if subject["method"] else None
    lora = own if isinstance(own, LoRA) else LoRA(targets="all-linear")
    quantised = arithmetic(settings["precision"]).name in QUANTISED
    plain = {**settings, "precision": "bf16-true" if quantised else settings["precision"]}
    four = {**settings, "precision": settings["precision"] if quantised else "nf4"}
    plans = {"full": plan(**{**subject, "method": FullFineTuning(keep_base=False)}, **plain)}
    plans |= {"LoRA": plan(**{**subject, "method": lora}, **plain)}
    plans |= {"QLoRA": plan(**{**subject, "method": lora}, **four)}
    if own is not None and not isinstance(own, (LoRA, FullFineTuning)):
        plans[own.info.name] = made
    draw(plans, file, f"{made.model}, batch {made.batch}, {plans['full'].precision} and {plans['QLoRA'].precision}")
    print(f"\n{', '.join(f'{name} {show(p.total)}' for name, p in plans.items())}: {file}")
    return {name: p.as_dict() for name, p in plans.items()}


# ------------------------------------------------------------------ from a config
def configuration(overrides: list[str], directory: str | None, name: str) -> DictConfig:
    """The config of a run; values that only a run needs (where its data are) may be missing."""
    config = composed(["run_dir=.", *overrides], own_directory(directory), name)
    for key, node in checks.nodes(config):
        if node._is_missing() and key.startswith("data."):
            OmegaConf.update(config, key, NOWHERE)
    check(config)
    return config


def subjects(config: DictConfig, given: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is planned (module, method, batch), and how (precision, optimizer, ...)."""
    with torch.device("meta"):
        task = build_task(config, classes(config))
    callbacks = [build(node) for node in (config.get("callbacks") or {}).values()]
    callbacks += configured(config.get("gradient_checkpointing"))
    methods = [build(node) for node in checks.methods_of(config).values()]
    methods += [callback for callback in callbacks if isinstance(callback, PEFT)]
    recompute = next((c for c in callbacks if isinstance(c, GradientCheckpointing)), False)
    accelerator = "cpu" if config.trainer.get("accelerator") == "cpu" else "cuda"
    optimizer: Any = task.make_optimizer
    settings = {"precision": precision(config), "optimizer": innermost(optimizer), "checkpointing": recompute}
    settings |= {"offload": given.offload, "device": given.device or accelerator}
    batches = config.trainer.get("accumulate_grad_batches")
    settings |= {"accumulate": 1 if batches is None else batches}
    return {"module": task, "method": methods, "batch": batch(config, task)}, settings


def classes(config: DictConfig) -> list[str]:
    """Names of the classes where the data say so without being read; two otherwise, none for language models."""
    if config.get("kind") not in ("classification", "image"):
        return []
    known = getattr(checks.locate("data", config.data._target_), "classes", None)
    return list(known) if isinstance(known, list) else ["0", "1"]


def precision(config: DictConfig) -> Any:
    """The plugin that quantises, where there is one, or the name."""
    return config.trainer.get("precision") if config.get("precision") is None else build(config.precision)


def batch(config: DictConfig, task: pl.LightningModule) -> dict[str, torch.Tensor]:
    """The largest batch that the data would give."""
    kind, count = config.get("kind"), config.data.get("batch_size")
    if not isinstance(count, int) or count < 1:
        raise PlanError(f"data.batch_size={count!r}: a plan needs a number of examples.")
    if kind == "image":
        return image_batch(count, *image_size(task))
    length = config.data.get("max_length")
    if not isinstance(length, int) or length < 1:
        raise PlanError(f"data.max_length={length!r}: a plan needs a number of tokens.")
    check_positions(task, length)
    return text_batch(count, length, "tokens" if kind == "causal-lm" else "classes")


def image_size(task: pl.LightningModule) -> tuple[int, int, int]:
    """channels, height, width by the model's config"""
    known: Any = getattr(task.model, "config", None)
    size = getattr(known, "image_size", None)
    if size is None:
        raise PlanError(f"The config of this {type(task.model).__name__} names no image_size; use `plan` in Python.")
    height, width = (size, size) if isinstance(size, int) else size
    return getattr(known, "num_channels", 3), height, width


def check_positions(module: nn.Module, length: int) -> None:
    """Raise where texts are longer than a table of positions; without values nothing else would notice."""
    for name, child in module.named_modules():
        places = name.rpartition(".")[2]
        table = isinstance(child, nn.Embedding) and places in ("position_embeddings", "embed_positions", "wpe")
        if table and child.num_embeddings < length:  # type: ignore[operator]
            raise PlanError(
                f"data.max_length={length}: this model knows {child.num_embeddings} positions ({name}). Give "
                f"data.max_length={child.num_embeddings} or less."
            )
