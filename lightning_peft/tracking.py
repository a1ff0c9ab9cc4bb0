"""Weights & Biases: what was trained, how much of it, how it went, and the adapter itself. An extra: `[wandb]`.

    Trainer(logger=wandb_logger("my-project"), callbacks=[LoRA(), Tracking()])

wandb_logger(project="lightning_peft", save_dir=".", offline=None, **options) -> WandbLogger
Tracking(config=None)     a callback; config: the composed configuration (dict or OmegaConf), logged as plain values
finish(exit_code=None)    for a `finally`: ends the run that is open, if any; never imports wandb
finished_runs()           the same as a `with` block
"""

from __future__ import annotations

import configparser
import contextlib
import logging
import netrc
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from typing_extensions import override

from lightning_peft.core import state
from lightning_peft.core.files import AdapterFileError, save_adapter

log = logging.getLogger("lightning_peft")
POINTS = 1000  # of a metric's learning curve: above this, every other point is dropped


# ------------------------------------------------------------------ the logger
def wandb_logger(
    project: str = "lightning_peft", save_dir: str | Path = ".", offline: bool | None = None, **options: Any
) -> WandbLogger:
    """Lightning's WandbLogger, with a run of its own, offline where nobody is logged in.

    offline: None decides by WANDB_MODE, then by whether there is a key; True and False insist.
    options: of WandbLogger and `wandb.init` (name, group, tags, job_type, log_model, experiment=wandb.run, ...).
    """
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "logger=wandb needs the package wandb, which is not installed. Run: pip install 'lightning_peft[wandb]', "
            "or use logger=csv."
        ) from error
    if offline is None and "WANDB_MODE" not in os.environ and not logged_in():
        offline = True
        rank_zero_info(f"W&B: no API key, so the run stays offline, in {Path(save_dir) / 'wandb'}. Upload: wandb sync.")
    if offline is not None:  # by `mode`: WandbLogger(offline=True) would set WANDB_MODE for the whole process
        options.setdefault("mode", "offline" if offline else "online")
    return RunLogger(project=project, save_dir=save_dir, **options)


def logged_in() -> bool:
    """Whether W&B has a key for its server: in the environment, in its settings file, or in netrc."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    settings = configparser.ConfigParser(interpolation=None)
    server = "https://api.wandb.ai"
    with contextlib.suppress(configparser.Error, OSError, UnicodeDecodeError):
        settings.read(Path(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser() / "settings")
        if settings.get("default", "api_key", fallback=None):
            return True
        server = settings.get("default", "base_url", fallback=server)
    host = urlsplit(os.environ.get("WANDB_BASE_URL", server)).netloc
    with contextlib.suppress(netrc.NetrcParseError, OSError, UnicodeDecodeError):
        return netrc.netrc(Path(os.environ.get("NETRC", "~/.netrc")).expanduser()).authenticators(host) is not None
    return False


class RunLogger(WandbLogger):
    """A WandbLogger that never goes on with a run that is open already, and whose run ends when training fails.

    curve: metric -> [(step, value), ...] as logged so far.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._wandb_init.pop("anonymous", None)  # wandb warns of it where it is passed at all, even as None
        self.curve: dict[str, list[tuple[int, float]]] = {}

    @property
    @override
    def experiment(self) -> Any:
        """The run; opened when first asked for, after ending the one that this process has open."""
        if self._experiment is None:
            import wandb

            Path(self.save_dir or ".").mkdir(parents=True, exist_ok=True)
            if wandb.run is not None:
                rank_zero_info(f"W&B: run {wandb.run.id} ends, another begins. To go on with it: experiment=wandb.run.")
                finish(0)
        return super().experiment

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics, step)
        if step is None:
            return
        for name, value in metrics.items():
            points = self.curve.setdefault(name, [])
            points.append((step, float(value)))
            if len(points) > POINTS:
                del points[1::2]

    @override
    @rank_zero_only
    def finalize(self, status: str) -> None:
        import wandb

        super().finalize(status)
        if status == "failed" and self._experiment is not None and self._experiment is wandb.run:
            finish(1)


def finish(exit_code: int | None = None) -> None:
    """End the open run, if there is one, and W&B's background process; the environment is then as it was before.

    exit_code: None is 1 while an exception is on its way (which a `finally` sees), else 0.
    """
    wandb = sys.modules.get("wandb")
    if wandb is None:
        return
    error = sys.exc_info()[1]
    failed = error is not None and not (isinstance(error, SystemExit) and error.code in (None, 0))
    if wandb.run is not None:
        wandb.run.finish(exit_code=int(failed) if exit_code is None else exit_code)
    wandb.teardown()  # takes WANDB_SERVICE out of the environment


@contextlib.contextmanager
def finished_runs() -> Iterator[None]:
    """Runs opened in this block are ended with it, as failed if it raises."""
    try:
        yield
    finally:
        finish()


# ------------------------------------------------------------------ the callback
class Tracking(Callback):
    """Configuration, methods, counts, learning curve, peak memory and the adapter into the W&B run of a fit.

    config: what the run was composed of; a mapping, also of OmegaConf. It lands in the run's config as plain values,
    beside `methods` (label -> method and its fields); counts are `peft/*` in the summary. Nothing without a W&B logger.
    """

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        self.config = plain(config or {})

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        logger = wandb_of(trainer)
        if logger is None:
            return
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)
        logger.log_hyperparams({**self.config, "methods": methods(pl_module)})
        if state.applied_to(pl_module):
            logger.experiment.summary.update({f"peft/{name}": n for name, n in state.describe(pl_module).items()})

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        logger = wandb_of(trainer)
        if logger is None:
            return
        if trainer.strategy.root_device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(trainer.strategy.root_device)
            logger.experiment.summary["peft/peak_memory_bytes"] = peak
        log_curve(logger)
        if state.applied_to(pl_module):
            log_adapter(logger, pl_module)


def wandb_of(trainer: pl.Trainer) -> WandbLogger | None:
    """The W&B logger of this trainer, on rank zero."""
    found = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
    if len(found) > 1:
        raise ValueError(
            f"The Trainer has {len(found)} W&B loggers, but a process has one open run. Known loggers: "
            f"{[type(logger).__name__ for logger in trainer.loggers]}. Leave one W&B logger among them."
        )
    return found[0] if found and trainer.is_global_zero else None


def plain(value: Any) -> Any:
    """Dicts, lists and scalars only; OmegaConf is resolved, anything else is its text."""
    if type(value).__module__.startswith("omegaconf."):
        from omegaconf import OmegaConf

        value = OmegaConf.to_container(value, resolve=True)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def methods(model: torch.nn.Module) -> dict[str, Any]:
    """label -> method, fingerprint of the base it is on, and its fields"""
    return {
        label: {"method": a.method.info.name, "fingerprint": a.fingerprint, **plain(a.method.config())}
        for label, a in state.applied_to(model).items()
    }


def log_curve(logger: WandbLogger) -> None:
    """Every metric over the steps, as a table with a line plot on it."""
    import wandb

    curve = {name: points for name, points in getattr(logger, "curve", {}).items() if name != "epoch"}
    rows = [[name, step, value] for name, points in curve.items() for step, value in points]
    if rows:
        table = wandb.Table(columns=["metric", "step", "value"], data=rows)
        plot = wandb.plot.line(table, "step", "value", stroke="metric", title="Learning curve")
        logger.experiment.log({"learning_curve": plot})


def log_rows(logger: Any, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of the same columns as a table of W&B; nothing with another logger, or without rows."""
    if not isinstance(logger, WandbLogger) or not rows:
        return
    import wandb

    columns: list[str | int] = list(rows[0])
    logger.experiment.log({name: wandb.Table(columns=columns, data=[list(row.values()) for row in rows])})


def log_adapter(logger: WandbLogger, model: torch.nn.Module) -> None:
    """The adapter directory (one for each label, where there are several) as one artifact of type "adapter"."""
    import wandb

    run, labels = logger.experiment, list(state.applied_to(model))
    if run.disabled:
        return
    directory = Path(logger.save_dir or ".") / "wandb" / f"adapter-{run.id}"  # run.dir is wrong in a spawned process
    try:
        for label in labels:
            save_adapter(model, directory if len(labels) == 1 else directory / label, label)
    except AdapterFileError as error:  # a run that diverged is still worth its record
        log.warning("W&B: no adapter artifact: %s", error)
        return
    metadata = {"methods": methods(model), "counts": state.describe(model)}
    artifact = wandb.Artifact(directory.name, type="adapter", metadata=metadata)
    artifact.add_dir(str(directory), policy="immutable")
    run.log_artifact(artifact)
