"""Where messages go during a run, and what is closed after it: log files, loggers, warnings."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

from lightning.pytorch.loggers import Logger

from lightning_peft import tracking

NOISE = ("litlogger", "TPU", "`Trainer(val_check_interval", "Loading `train_dataloader`")
"""In messages of Lightning that tell a reader of train.log nothing."""
WARNINGS = (
    ".*LeafSpec.*",  # a deprecation inside Lightning
    ".*does not have many workers.*",
    ".*exists and is not empty.*",  # the run directory has Hydra's files in it
    ".*dirpath has changed.*",  # a run that goes on from another one's checkpoint
)


@contextlib.contextmanager
def one_log() -> Iterator[None]:
    """Lightning's messages go where all others go, into train.log too, where logging is set up."""
    handlers = logging.getLogger().handlers[:]
    loggers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric") if handlers]
    before = [(logger, logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [], True
    for handler in handlers:
        handler.addFilter(telling)
    try:
        with warnings.catch_warnings():
            for message in WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger, own, propagate in before:
            logger.handlers, logger.propagate = own, propagate
        for handler in handlers:
            handler.removeFilter(telling)


def telling(record: logging.LogRecord) -> bool:
    """Whether a message tells something."""
    return not any(words in record.getMessage() for words in NOISE)


@contextlib.contextmanager
def closing_loggers() -> Iterator[list[Logger]]:
    """A list of loggers that are finished after the block, whatever happens in it: the next run has its own."""
    loggers: list[Logger] = []
    status = "failed"
    try:
        yield loggers
        status = "success"
    finally:
        for logger in loggers:
            logger.finalize(status)
        tracking.finish(int(status == "failed"))


@contextlib.contextmanager
def clean_logging() -> Iterator[None]:
    """The root logger as it was, and the files that Hydra opened for it closed."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        for handler in set(root.handlers) - set(handlers):
            root.removeHandler(handler)
            handler.close()
        root.handlers, root.level = handlers, level


@contextlib.contextmanager
def only_warnings() -> Iterator[None]:
    """Of this package, for the time of many runs whose lines nobody would read."""
    logger = logging.getLogger("lightning_peft")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
