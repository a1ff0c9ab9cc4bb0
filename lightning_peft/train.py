"""One fine-tuning run, from a composed config to a run directory.

config.yaml       what was run, resolved        metrics.csv          every logged value
train.log         what was said                 learning_curve.png   a picture of it
checkpoints/      best.ckpt, last.ckpt          adapter/             what was trained, to load on the base again
results.json      the test, counts, sizes, times, versions
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

import lightning_peft.strategies  # noqa: F401  registers the names in conf/strategy
from lightning_peft import results, tracking
from lightning_peft.callback import PEFT
from lightning_peft.checks import ConfigError, check_method, locate, methods_of
from lightning_peft.config import build, plain
from lightning_peft.gradient_checkpointing import configured
from lightning_peft.groups import Groups, LoRAPlus, MakeOptimizer
from lightning_peft.logs import closing_loggers, one_log
from lightning_peft.rates import Rates

log = logging.getLogger("lightning_peft")
KEEP = ("best", "last")


def run(config: DictConfig, callbacks: Sequence[pl.Callback] = ()) -> dict[str, Any]:
    """Fit, test and save; -> the contents of results.json. Loggers are closed whatever happens.

    callbacks: beside those of the config.
    """
    check_keep(config)
    check_method(config)
    directory = Path(config.run_dir)
    directory.mkdir(parents=True, exist_ok=True)
    with one_log(), closing_loggers() as loggers:
        loggers += build_loggers(config)
        trainer = build_trainer(config, loggers, callbacks)
        check_sweep(trainer)
        data = build(config.data)
        task = build_task(config, getattr(data, "classes", ()), data)
        if trainer.is_global_zero:
            OmegaConf.save(OmegaConf.create(plain(config)), directory / "config.yaml")
            if getattr(data, "fingerprint", None):
                log.info("data: sha256 %s", data.fingerprint)
        return (fit_and_test if getattr(task, "learns", True) else only_test)(config, trainer, task, data)


def fit_and_test(config: DictConfig, trainer: pl.Trainer, task: Any, data: Any) -> dict[str, Any]:
    """The run itself; the state that is tested is the one that is saved."""
    wall, cpu = time.perf_counter(), time.process_time()
    trainer.fit(task, datamodule=data, ckpt_path=config.ckpt_path)
    seconds = {"fit": round(time.perf_counter() - wall, 2), "fit_cpu": round(time.process_time() - cpu, 2)}
    metrics = trainer.test(task, datamodule=data, ckpt_path=kept(config, trainer), verbose=False)[0]
    if not trainer.is_global_zero:
        return {}
    directory = Path(config.run_dir)
    adapter = results.save_adapters(task, directory / "adapter")
    found = {**results.measured(metrics, task, data), "adapter": adapter, "seconds": seconds}
    (directory / "results.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    draw_curve(directory, config.monitor.name)
    log.info("test: %s | all files in %s", ", ".join(f"{k} {v:.4f}" for k, v in metrics.items()), directory)
    return found


def only_test(config: DictConfig, trainer: pl.Trainer, task: Any, data: Any) -> dict[str, Any]:
    """The row of a table that trains nothing."""
    start = time.perf_counter()
    metrics = trainer.test(task.requires_grad_(False), task.batches(data), verbose=False)[0]
    if not trainer.is_global_zero:
        return {}
    found = results.measured(metrics, task, data)
    found |= {"task": dict(task.hparams), "seconds": {"test": round(time.perf_counter() - start, 2)}}
    directory = Path(config.run_dir)
    (directory / "results.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    log.info("test: %s | nothing was trained | %s", ", ".join(f"{k} {v:.4f}" for k, v in metrics.items()), directory)
    return found


# ------------------------------------------------------------------ building
def build_task(config: DictConfig, classes: Sequence[str] = (), data: Any = None) -> pl.LightningModule:
    """The LightningModule around the model; the names of the classes come from the data, where it has classes.

    Seeded here, so that a random model is the same one again when a run is loaded. A task that does not learn gets the
    data, where its examples come from.
    """
    pl.seed_everything(config.seed, workers=True, verbose=False)
    target = config.task._target_
    if not getattr(locate("task", target), "learns", True):
        check_nothing_learns(config, data)
        return build(config.task, model=build(config.model), data=data)
    count = {"num_classes": len(classes)} if classes else {}
    model = build(config.model, **count)
    names = {**count, "classes": list(classes)} if classes else {}
    steps = {
        "optimizer": rated(plus(build(config.optimizer), plain(config).get("lora_plus")), plain(config).get("rates")),
        "scheduler": build(config.scheduler),
    }
    return build(config.task, model=model, **steps, **names)


def plus(optimizer: MakeOptimizer, given: Any) -> MakeOptimizer | LoRAPlus:
    """The optimizer, or with `lora_plus` the same with a higher rate for B; a ratio, or settings of `LoRAPlus`."""
    if given is None:
        return optimizer
    try:
        return LoRAPlus(optimizer, **(given if isinstance(given, dict) else {"ratio": float(given)}))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"lora_plus={given!r}: {error} Known: a ratio, or {{ratio: 16, embedding_lr: 1e-6}}."
        ) from error


def rated(optimizer: MakeOptimizer | Groups, given: Any) -> MakeOptimizer | Groups:
    """The optimizer, or with `rates` the same with rates of their own for some methods."""
    return Rates(optimizer, given) if given else optimizer


def build_loggers(config: DictConfig) -> list[Logger]:
    """The loggers of the config."""
    return [build(node) for node in (config.logger or {}).values()]


def build_trainer(config: DictConfig, loggers: list[Logger], others: Sequence[pl.Callback] = ()) -> pl.Trainer:
    """The Trainer with the method, the checkpoint and the user's own callbacks."""
    methods: list[PEFT] = [build(node) for node in methods_of(config).values()]
    more = [build(node) for node in (config.get("callbacks") or {}).values()]
    recompute = configured(plain(config).get("gradient_checkpointing"))
    callbacks = [*methods, *recompute, *more, *others, tracking.Tracking(plain(config))]
    if not config.trainer.get("fast_dev_run"):
        callbacks.append(build(config.checkpoint))
    more_options = {} if config.get("precision") is None else {"plugins": [build(config.precision)]}
    return build(config.trainer, callbacks=callbacks, logger=loggers or False, **more_options)


# ------------------------------------------------------------------ checks
def check_nothing_learns(config: DictConfig, data: Any) -> None:
    """A task that does not learn has texts with classes, and nothing to train."""
    name = config.task._target_.rpartition(".")[2]
    if config.get("peft") is not None or config.ckpt_path is not None:
        raise ConfigError(f"{name} trains nothing: leave peft=null and ckpt_path=null.")
    if not hasattr(data, "classes") or not hasattr(data, "splits"):
        raise ConfigError(
            f"{name} is a test on texts with classes and no more: run it with `lightning-peft train` and data=csv, "
            f"json, hf or stdlib_docs; it got {'no data' if data is None else type(data).__name__}."
        )


def check_keep(config: DictConfig) -> None:
    """`keep` is one of two words."""
    if config.keep not in KEEP:
        raise ConfigError(f"keep={config.keep!r}: the state to test and save. Known: {', '.join(KEEP)}.")


def check_sweep(trainer: pl.Trainer) -> None:
    """The child processes of DDP would run the whole sweep again, each in its own directory."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN or trainer.world_size == 1:
        return
    if "basic" in str(HydraConfig.get().launcher._target_).lower():
        raise ConfigError(
            f"--multirun with {trainer.world_size} processes: each child process would run the whole sweep again. Use"
            " trainer.devices=1, or one `lightning-peft train` command for each value, or a launcher that gives every"
            " job a process of its own (hydra/launcher=submitit_local, after pip install hydra-submitit-launcher)."
        )


# ------------------------------------------------------------------ after the fit
def kept(config: DictConfig, trainer: pl.Trainer) -> str | None:
    """The checkpoint to test, None for the state that training ended in."""
    best = getattr(trainer.checkpoint_callback, "best_model_path", "")
    return best if config.keep == "best" and best else None


def draw_curve(directory: Path, metric: str) -> None:
    """learning_curve.png from metrics.csv, where there is one."""
    if not (directory / "metrics.csv").is_file():
        return
    from lightning_peft.curve import draw

    try:
        draw(directory / "metrics.csv", directory / "learning_curve.png", metric)
    except ImportError as error:
        log.info("%s", error)
