"""The frame of commands with ordinary arguments: help in plain words, defaults, did-you-mean, bad input in one sentence.

Library. A command is `main = argument_entry("errors", __doc__, add, run)`; `python -m pipeline.errors …` and `alignscope errors …` are the same.
Exit codes as in commands.py: 0 done, 2 bad input, 130 interrupted, 141 whoever read the output has gone.
`shown_help` prints the same kind of help for commands of Hydra's overrides.
"""

from __future__ import annotations

import argparse
import ast
import functools
import logging
import os
import re
import select
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pipeline.core.files import UserError, closest

PACKAGE = Path(__file__).resolve().parent.parent
SHORT = {"try": "try_file", "ui": "open_ui"}
"""Names on the command line of commands whose module is called otherwise."""
HYDRA = re.compile(r"^main = entry\(", re.MULTILINE)


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are sentences that name the option which was meant."""

    def error(self, message: str) -> NoReturn:
        options = [word for action in self._actions for word in action.option_strings]
        unknown = re.search(r"unrecognized arguments: (\S+)", message)
        if unknown and unknown[1].startswith("-"):
            message = f"there is no option {unknown[1].partition('=')[0]}{closest(unknown[1].partition('=')[0], options)}"
        elif unknown:
            message = f"{unknown[1]!r} is one word too many; options begin with --, a text with spaces stands in quotes"
        raise UserError(f"{message}; {self.prog} --help lists what it takes")


NOISE = ("`is_gradient_checkpointing` is deprecated", "Position ids are not supported for parameter efficient tuning",
         r"Unsupported layer type '<class '[\w.]*Norm")
"""How warnings begin (patterns) that PEFT (0.21), not a user, can fix: it asks transformers 5 by an old name, says what it passes over in every pass, and knows
no norm of transformers' own, which ln_tuning trains all the same."""
LOUD = {"huggingface_hub": logging.ERROR, "absl": logging.WARNING, "bitsandbytes.backends.cpu.ops": logging.ERROR,
        "torch._subclasses.fake_tensor": logging.WARNING}
"""Loggers, and the least they may say: rouge_score tells at every start which tokenizer it takes, bitsandbytes on some CPUs that kernels which this project
does not use are not installed, the hub's client each time that it tries again, torch at the end of a process that was interrupted how its caches did."""


def quiet() -> None:
    """Keep from the terminal what libraries say at every start and no user can change."""
    for beginning in NOISE:
        warnings.filterwarnings("ignore", beginning)
    for name, level in LOUD.items():
        logging.getLogger(name).setLevel(level)
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # the hub's client sets its logger's level when it is imported


def check_above_zero(args: argparse.Namespace, *names: str) -> None:
    """Raise UserError for an option that was given a number which is not above 0."""
    for name in names:
        value = getattr(args, name.replace("-", "_"), None)
        if value is not None and not value > 0:
            raise UserError(f"--{name} {value:g} is no number above 0")


def to_a_reader(main: Callable[..., int]) -> Callable[..., int]:
    """A command's main that ends quietly with 141 (128 + SIGPIPE) where whoever read its output has gone, as `head` does once it has its lines."""

    @functools.wraps(main)
    def whole(argv: Sequence[str] | None = None) -> int:
        try:
            code = main(argv)
            sys.stdout.flush()
            return code
        except BrokenPipeError:
            output = select.poll()
            output.register(sys.stdout.fileno(), 0)
            if output.poll(0):  # an error: nobody reads it any more
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at Python's end
                return 141
            raise  # another pipe's

    return whole


def argument_entry(name: str, about: str | None, add: Callable[[argparse.ArgumentParser], None], run: Callable[[argparse.Namespace], int]) -> Any:
    """The `main(argv=None)` of a command, which returns the exit code; `main.parser()` is its parser."""

    def parser() -> argparse.ArgumentParser:
        made = Parser(prog=f"alignscope {name}", description=(about or "").strip(), formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        add(made)
        return made

    @to_a_reader
    def main(argv: Sequence[str] | None = None) -> int:
        quiet()
        try:
            return run(parser().parse_args(list(sys.argv[1:] if argv is None else argv)))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except SystemExit as end:  # --help
            return int(end.code or 0)
        except KeyboardInterrupt:
            print("interrupted; run the same command again to resume", file=sys.stderr)
            return 130

    main.parser = parser  # type: ignore[attr-defined]
    return main


def typed() -> str:
    """What comes before a command where one types it here: alignscope, or python -m pipeline where that is not on the path."""
    return "alignscope" if shutil.which("alignscope") else "python -m pipeline"


def commands() -> dict[str, str]:
    """Every command's name on the command line -> its module's, in the order of the alphabet."""
    modules = sorted(path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("_"))
    short = {module: name for name, module in SHORT.items()}
    return {short.get(module, module): module for module in modules}


def docstring(module: str) -> str:
    """What a command's file says of itself, without importing it."""
    return ast.get_docstring(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))) or ""


def takes_overrides(module: str) -> bool:
    """Whether a command takes Hydra's overrides, key=value."""
    return bool(HYDRA.search((PACKAGE / f"{module}.py").read_text(encoding="utf-8")))


def takes_options(module: str) -> bool:
    """Whether a command's help comes from its parser."""
    return "\nmain = argument_entry(" in (PACKAGE / f"{module}.py").read_text(encoding="utf-8")


def overrides_help(module: str) -> str:
    """The help of a command of Hydra's overrides: what its file says, and the keys of conf/config.yaml with their defaults."""
    conf = PACKAGE.parent / "conf"
    lines = (conf / "config.yaml").read_text(encoding="utf-8").splitlines()
    keys = [found for line in lines if (found := re.fullmatch(r"(\w+): ([^#\s]\S*) *(?:# (.*))?", line))]
    groups = {folder.name: sorted(p.stem for p in folder.glob("*.yaml")) for folder in sorted(conf.iterdir()) if folder.is_dir()}
    groups = {"experiments": sorted(p.stem for p in (PACKAGE.parent / "experiments").glob("*.yaml"))} | groups
    width = _columns(122) - 22
    told = [docstring(module), "", "Arguments are key=value, in any order. Groups, each a YAML below conf/ (experiments: below experiments/):", ""]
    told += [f"  {name + '=':<14}{_short(', '.join(options), width)}" for name, options in groups.items() if options]
    told += ["", "Keys at the top, with their defaults (a group's own keys: --cfg job, or its YAML):", ""]
    told += [f"  {f'{key[1]}={key[2]}':<22}{_short(key[3] or '', width)}" for key in keys]
    return "\n".join([*told, "", f"  --cfg job   print the whole composed config    Example: {_example(module)}"])


def _columns(most: int) -> int:
    """Of the terminal, at most so many; as many where there is none."""
    return max(60, min(most, shutil.get_terminal_size((most, 24)).columns))


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: text.rfind(" ", 0, width - 2)] + " …"


def _example(module: str) -> str:
    found = re.search(rf"python -m pipeline\.{module}\b[^\n]*?(?=  |\n|$)", docstring(module))
    return found[0] if found else f"python -m pipeline.{module}"


GROUPS = {
    "from a file to an answer": ("try", "more", "errors", "rank", "deploy", "ui", "fit"),
    "an experiment": ("prepare", "base_model", "rationales", "synthesize", "train", "cells", "report", "evaluate", "tune", "sweep", "race", "advise",
                      "compare"),
    "a model that answers": ("export", "serve"),
}
"""Heading -> commands, in the order of their use; all others come last."""


def overview() -> str:
    known, width = commands(), _columns(130) - 15
    rest = [name for name in known if not any(name in names for names in GROUPS.values())]
    told = ["alignscope: compares ways to align a language model with a task: data needed, accuracy, cost", "", "    alignscope try reviews.csv", ""]
    for heading, names in {**GROUPS, "others": tuple(rest)}.items():
        first = {name: " ".join(docstring(known[name]).partition("\n\n")[0].split()) for name in names if name in known}
        told += [heading, *(f"  {name:<13}{_short(line, width)}" for name, line in first.items()), ""]
    return "\n".join([*told, "alignscope COMMAND --help says what each takes; commands of key=value take Hydra's overrides (--cfg job prints the config)"])


def completion(words: Sequence[str]) -> int:
    """Print a shell's completion script: commands, and the options of those that have some."""
    import importlib

    import shtab

    shell = words[0] if words else "bash"
    if shell not in shtab.SUPPORTED_SHELLS:
        print(f"error: no completion for {shell!r}{closest(shell, shtab.SUPPORTED_SHELLS)}; there are: {', '.join(shtab.SUPPORTED_SHELLS)}", file=sys.stderr)
        return 2
    whole = argparse.ArgumentParser(prog="alignscope", description="compares ways to align a language model with a task")
    parts = whole.add_subparsers()
    for name, module in commands().items():
        about = docstring(module).split("\n")[0]
        if takes_overrides(module) or not (made := getattr(importlib.import_module(f"pipeline.{module}").main, "parser", None)):
            parts.add_parser(name, help=about).add_argument("overrides", nargs="*", help="key=value")
        else:
            parts.add_parser(name, help=about, parents=[made()], add_help=False)
    print(shtab.complete(whole, shell))
    return 0
