"""From words on a command line to a checked config: where conf/ is, how it is composed, and what is wrong with it.

config = compose(["peft=lora", "peft.rank=4", "run_dir=runs/first"])     # the config of `lightning-peft train`
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_peft import checks
from lightning_peft.checks import ConfigError

NAME = "train"
PLACES = (Path(__file__).parent / "conf", Path(__file__).parent.parent / "conf")
"""Inside an installed wheel, beside the package in a checkout or an editable install."""


def conf_dir() -> Path:
    """The directory of the configs that come with the package."""
    for place in PLACES:
        if (place / f"{NAME}.yaml").is_file():
            return place
    raise ConfigError(
        f"No {NAME}.yaml in {' or '.join(map(str, PLACES))}. Install lightning-peft again, or use a whole checkout."
    )


def options(group: str) -> list[str]:
    """The names in a group of conf/, such as "peft" or "model"."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def groups() -> list[str]:
    """The names of the groups in conf/."""
    return sorted(path.name for path in conf_dir().iterdir() if path.is_dir())


def compose(overrides: Sequence[str] = (), directory: str | Path | None = None, name: str = NAME) -> DictConfig:
    """Overrides -> the checked config; `directory` is a user's own, whose files are found before ours.

    Errors: ConfigError, which lists the choices. Outside of the command line give run_dir=...
    """
    config = composed(overrides, directory, name)
    check(config)
    return config


def composed(overrides: Sequence[str] = (), directory: str | Path | None = None, name: str = NAME) -> DictConfig:
    """As `compose`, without the checks of the whole."""
    from lightning_peft.composition import named, with_lists
    from lightning_peft.schema import register

    register()
    overrides = named(overrides)
    if nulls := [word for word in overrides if word.removesuffix("=null") in groups() and word.endswith("=null")]:
        raise ConfigError(f"{nulls[0]}: a group takes a name. To leave it out: ~{nulls[0].removesuffix('=null')}.")
    try:
        with found_first(directory), hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return with_lists(lambda: hydra.compose(name, list(overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error


class UserConfigs(SearchPathPlugin):
    """Puts the directories of `found_first` in front of ours."""

    first: list[str] = []

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called by Hydra whenever it starts."""
        for directory in self.first:
            search_path.prepend("user", f"file://{directory}", anchor="main")


@contextlib.contextmanager
def found_first(directory: str | Path | None) -> Iterator[None]:
    """In this block the configs in `directory` are found before ours; None changes nothing."""
    Plugins.instance().register(UserConfigs)
    UserConfigs.first = [] if directory is None else [str(Path(directory).absolute())]
    try:
        yield
    finally:
        UserConfigs.first = []


def check(config: DictConfig) -> None:
    """Raise ConfigError on what only shows in the composed whole."""
    checks.check(config, {name: load("model", name).get("kinds", []) for name in options("model")})


def load(group: str, name: str) -> DictConfig:
    """One file of conf/ as it is, not composed."""
    return cast(DictConfig, OmegaConf.load(conf_dir() / group / f"{name}.yaml"))


# ------------------------------------------------------------------ using a config
def build(node: Any, **more: Any) -> Any:
    """`instantiate`, with the error of the constructor itself where it raises one.

    more: objects that go to the constructor as they are; OmegaConf would take methods, which are dataclasses, apart.
    """
    try:
        return instantiate(node, _partial_=True)(**more) if more else instantiate(node)
    except InstantiationException as error:
        if isinstance(error.__cause__, Exception):
            raise error.__cause__ from None
        raise ConfigError(one_line(str(error))) from error


def plain(config: DictConfig) -> dict[str, Any]:
    """The resolved config as dicts, lists and numbers."""
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


# ------------------------------------------------------------------ errors
def explain(error: Exception) -> str:
    """What is wrong with a command line, in one line, with the choices."""
    if isinstance(error, MissingConfigException):
        return missing_option(error)
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    message = first_lines(error, cause)
    if message.startswith("Ambiguous value"):
        key, _, value = message.partition("'")[2].partition("'")[0].partition("=")
        message = f"{key}={value} has several values: for a list write '{key}=[{value}]', for a sweep add --multirun."
    if isinstance(error, OverrideParseException):
        message = f"{error.override!r} is no override ({message.rstrip('.')}). Write key=value, quoted for the shell."
    if isinstance(cause, OmegaConfBaseException) and " not in " in f"{cause} ":
        return message + known_keys(cause)
    return message


def one_line(text: str) -> str:
    """Lines joined by semicolons."""
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())


def first_lines(*errors: BaseException) -> str:
    """The first line of each error, each once, without Hydra's and OmegaConf's notes on where it was."""
    texts = [str(error).strip().splitlines() or [""] for error in errors]
    texts = [text[: 2 if text[0].endswith("composing config:") else 1] for text in texts]  # the second says what it was
    lines = [" ".join(text).rstrip(".") for text in texts]
    return " ".join(f"{line}." for line in dict.fromkeys(filter(None, lines)))


def missing_option(error: MissingConfigException) -> str:
    """ "Could not find 'peft/lroa'", with the options that there are."""
    head = str(error).strip().partition("\n")[0].rstrip(".")
    group, _, wanted = (error.missing_cfg_file or "").rpartition("/")
    beside = options(group) if group in groups() else groups()
    known = [name for name in error.options or beside if not name.startswith("schema") and "+" not in name]
    return f"{head}.{nearest(wanted, known)} Known: {', '.join(known)}."


def known_keys(cause: OmegaConfBaseException) -> str:
    """The keys that there are where an unknown one was given."""
    node = cause.parent_node
    names = map(str, node) if isinstance(node, DictConfig) else ()
    known = [name for name in names if not name.startswith("_") and name != "hydra"]
    return f"{nearest(str(cause.key), known)} Known: {', '.join(known)}."


def nearest(given: str, known: Sequence[str]) -> str:
    """ " Did you mean ...?" or nothing."""
    close = difflib.get_close_matches(given, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
