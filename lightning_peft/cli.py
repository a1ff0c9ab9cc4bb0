"""lightning-peft: fine-tune, look up methods, and use what was trained.

Heavy packages are imported by the command that needs them, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

TRACE = "LIGHTNING_PEFT_TRACE"
ABOUT = f"""\
usage: lightning-peft COMMAND ...

{{commands}}

`lightning-peft COMMAND --help` tells more. Exit codes: 0 done, 1 an error (one line on stderr;
{TRACE}=1 shows where it comes from), 2 a command line that is not understood."""

TRAIN = """\
Fine-tune a model. Everything is a value of a config that is composed from groups of files; `group=name` takes another
file, `key=value` sets a value, `+key=value` adds one, `~key` removes one.

  lightning-peft train                                             MiniLM with LoRA on docstrings, no download
  lightning-peft train peft=bitfit optimizer.lr=0.002 trainer.max_epochs=5
  lightning-peft train data=csv data.path=reviews.csv data.text=review data.label=stars
  lightning-peft train model=hf model.name=roberta-base 'peft.targets=[q,k,v]' peft.rank=16
  lightning-peft train 'peft=[lora,bitfit]' peft.lora.rank=4       several methods on one model
  lightning-peft train --multirun peft=lora,bitfit,ia3 seed=0,1,2  a sweep: every combination, one after the other
  lightning-peft train peft=mam --cfg job                          print the config and stop

Groups: {groups}.
Methods (peft=...): {methods}.
The run directory, outputs/<date>/<time>, gets: config.yaml, train.log, metrics.csv, learning_curve.png, checkpoints/,
adapter/, results.json. The grammar of overrides: https://hydra.cc/docs/advanced/override_grammar/basic/"""

DEMO = """\
Fine-tune MiniLM with LoRA on docstrings of the standard library, and compare with a linear probe on the same split: a
logistic regression on the frozen model's features, its strength of regularisation chosen on the validation split.
Overrides as in `train`; the settings are in conf/experiment/demo.yaml."""


PLAN = """\
The memory that a run would take, before it is started: weights, gradients, optimizer state, activations, the peak, and
the cards that hold it. Words as in `train`; a real step is taken on tensors without memory, nothing is downloaded but
the config.json of a model of the hub.

  lightning-peft plan model=hf model.name=meta-llama/Llama-3.1-8B data=instructions precision=nf4 \\
      optimizer=paged_adamw gradient_checkpointing=true data.batch_size=4 data.max_length=512
  lightning-peft plan experiment=qlora model=hf model.name=some/folder --fit 24GiB
  lightning-peft plan peft=ia3 --plot memory.png --json memory.json"""

METHODS = """\
All methods: family, equation, mergeable, identity at step 0, paper; and what they cost:

  overhead   at inference, when what can be merged is merged: none, products (layers or scales of its own), tokens
             (longer sequences or more keys), prompt (on the prompt alone)
  backprop   whether the backward pass goes through the backbone, whose activations are then kept
  storage    of a task's file: an adapter, weights of the base, the whole model
  batched    whether rows of one batch can be of different adapters"""

CHOOSE = """\
Which method to use: candidates in order, each with its reasons, settings to begin with and where they are from, and the
command that starts a run. Words as in `train` say the model and the data; nothing is asked, trained or downloaded but
the config.json of a model of the hub.

  lightning-peft choose model=minilm --examples 500 --inference
  lightning-peft choose model=hf model.name=some/folder data=instructions data.batch_size=4 --memory 24GiB --tasks 20
  lightning-peft choose model=minilm peft=lora peft.rank=256 peft.alpha=512 optimizer.lr=0.01    also what is risky"""

COMPARE = """\
Several methods, or groupings of layers, on one task with the same seeds: a table of the metric's mean and standard
deviation, trained parameters, bytes on disk, peak memory and time of a step; compare.json, compare.csv, compare.md.
Words as in `train`, where values with commas are rows, every combination of them; --row adds words of a row alone.

  lightning-peft compare peft=lora,bitfit,ia3 seeds=3
  lightning-peft compare peft=lora 'peft.layers="0-1","2-3","4-5"' seeds=3        groupings of layers, as in S4
  lightning-peft compare --row 'peft=lora peft.rank=4' --row 'peft=bitfit optimizer.lr=0.002' seeds=[0,1,2]

A run that fails is a row with its error. Exit code 1 only if all of them do."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {name.ljust(width)}  {about}" for name, (_, about) in COMMANDS.items()]
        print(ABOUT.format(commands="\n".join(lines)))
        return 0
    if argv[0] == "--version":
        import lightning_peft

        print(lightning_peft.__version__)
        return 0
    if argv[0] not in COMMANDS:
        print(f"lightning-peft: no command {argv[0]!r}. Known: {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    return guarded(COMMANDS[argv[0]][0], argv[1:])


def guarded(command: Callable[[list[str]], None], argv: list[str]) -> int:
    """Run a command; an error that its user can mend becomes one line."""
    try:
        command(argv)
    except SystemExit as exit:  # of argparse
        return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BrokenPipeError:  # `| head` has read enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  what is left is written at the interpreter's end
    except Exception as error:
        if os.environ.get(TRACE) == "1" or not expected(error):
            raise
        print(f"lightning-peft: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 1
    return 0


def expected(error: Exception) -> bool:
    """Whether an error says itself what to do, so that a traceback would only hide it."""
    from hydra.errors import HydraException
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
    from omegaconf.errors import OmegaConfBaseException

    from lightning_peft.callback import LifeCycleError
    from lightning_peft.checkpoint import CheckpointError
    from lightning_peft.core.adapter import NotMergeableError
    from lightning_peft.core.attention import UnsupportedSiteError
    from lightning_peft.core.basis import BasisError
    from lightning_peft.core.calibration import CalibrationError
    from lightning_peft.core.files import AdapterFileError
    from lightning_peft.core.merge import MergeError
    from lightning_peft.core.restart import PruneError
    from lightning_peft.extra_loss import NoPredictionsError

    ours = (
        LifeCycleError, CheckpointError, AdapterFileError, CalibrationError, NoPredictionsError, NotMergeableError,
        MergeError, UnsupportedSiteError, BasisError, PruneError,
    )  # fmt: skip
    theirs = (HydraException, OmegaConfBaseException, MisconfigurationException)
    return isinstance(error, (ValueError, OSError, ImportError, *ours, *theirs))


def parser(name: str, about: str, usage: str | None = None) -> argparse.ArgumentParser:
    """A parser whose help keeps its lines."""
    kind = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(f"lightning-peft {name}", usage, about, formatter_class=kind)


# ------------------------------------------------------------------ commands
def train(argv: list[str]) -> None:
    """Compose, check, fit, test, save."""
    from lightning_peft.launch import launch

    launch("train", train_parser("train", TRAIN), argv)


def demo(argv: list[str]) -> None:
    """`train` with the settings of the demo, and a linear probe beside it."""
    from lightning_peft.launch import launch

    launch("demo", train_parser("demo", DEMO), argv, ["experiment=demo"])


def plan(argv: list[str]) -> None:
    """Compose, check, and take a step without memory."""
    from_here = train_parser("plan", PLAN)
    from lightning_peft.planning import command

    command.options(from_here)
    command.run(from_here.parse_intermixed_args(argv))


def choose(argv: list[str]) -> None:
    """Compose, check, and rank the methods."""
    from_here = train_parser("choose", CHOOSE)
    from lightning_peft.choosing import command

    command.options(from_here)
    command.run(from_here.parse_intermixed_args(argv))


def compare(argv: list[str]) -> None:
    """Train every row with every seed, and print the table."""
    from_here = train_parser("compare", COMPARE)
    from lightning_peft.comparing import command

    command.options(from_here)
    command.run(from_here.parse_intermixed_args(argv))


def methods(argv: list[str]) -> None:
    """Print the registry."""
    from_here = parser("methods", METHODS)
    from_here.add_argument("--model", help="count what trains on it: a name of conf/model, of the hub, a folder")
    from_here.add_argument("--markdown", action="store_true", help="a Markdown table")
    options = from_here.parse_args(argv)
    from lightning_peft import catalogue

    what = catalogue.row if options.markdown else catalogue.priced
    table = catalogue.rows(None if options.model is None else catalogue.model_named(options.model), what)
    print(catalogue.markdown(table) if options.markdown else catalogue.text(table))


def predict(argv: list[str]) -> None:
    """Print a label and its probability for each sentence."""
    from_here = parser("predict", "Label sentences (or continue prompts) with the model of a run directory.")
    from_here.add_argument("--run", required=True, metavar="DIR", help="what `lightning-peft train` named at its end")
    from_here.add_argument("sentences", nargs="*", help="without any, lines are read from standard input")
    options = from_here.parse_intermixed_args(argv)
    from lightning_peft.predict import batches, load_run

    run = load_run(options.run)
    if not options.sentences and sys.stdin.isatty():
        print("One sentence a line; end with Ctrl-D.", file=sys.stderr)
    for batch in batches(options.sentences or sys.stdin, 32 if options.sentences else 1):
        for sentence, (label, share) in zip(batch, run.answer(batch), strict=True):
            print(f"{label}\t{share:.3f}\t{sentence}" if run.classes else label, flush=True)


def train_parser(name: str, about: str) -> argparse.ArgumentParser:
    """The options of Hydra that make sense here; what they print lists the choices."""
    found = parser(name, about, usage=f"lightning-peft {name} [options] [group=name | key=value ...]")
    found.add_argument("overrides", nargs="*", metavar="key=value", help="see above")
    found.add_argument("-m", "--multirun", action="store_true", help="a sweep over values given with commas")
    found.add_argument("-c", "--cfg", choices=("job", "hydra", "all"), help="print the config and stop")
    found.add_argument("--resolve", action="store_true", help="with --cfg: fill interpolations in")
    found.add_argument("-p", "--package", help="with --cfg: this part only, such as peft")
    where = found.add_mutually_exclusive_group()
    where.add_argument("-cd", "--config-dir", metavar="DIR", help="your own configs, found before those of the package")
    where.add_argument("-cp", "--config-path", metavar="DIR", help="the same")
    found.add_argument("-cn", "--config-name", default="train", metavar="NAME", help="instead of train")
    return found


COMMANDS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "train": (train, "fine-tune a model with a method, on data of yours or ours"),
    "predict": (predict, "label sentences with a trained adapter"),
    "methods": (methods, "list the methods"),
    "demo": (demo, "LoRA against a linear probe on the embedded data, in a few minutes on a CPU"),
    "plan": (plan, "tell the memory of a run before it is started"),
    "compare": (compare, "train several methods on one task, with the same seeds, and print a table"),
    "choose": (choose, "tell which methods suit a model, and how to begin with them"),
}

if __name__ == "__main__":
    sys.exit(main())
