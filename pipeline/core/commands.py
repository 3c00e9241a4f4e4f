"""The frame of every command: overrides in, exit code out.

A command is `main = entry(run)`; `python -m pipeline.<command> key=value …` then takes Hydra's overrides and flags
(`--cfg job`, `--help`), and `main(["key=value"])` runs it in this process. `run(cfg, overrides)` gets the composed config and the overrides that
composed it, for composing further cells like it. Commands that compose no config take words: `words_entry`.
Exit codes: 0 done, 2 bad input (one sentence on stderr), 130 interrupted, 141 whoever read the output has gone (`| head`); other errors show their trace.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log
from omegaconf import DictConfig, open_dict, read_write

from pipeline.core.arguments import overrides_help, quiet, to_a_reader
from pipeline.core.compose import CONF, WRONG_CONFIG, check_places, compose, explain, names_hydra, spelled_out
from pipeline.core.files import UserError
from pipeline.core.settings import check_top

Run = Callable[[DictConfig, list[str]], int | None]
"""(the composed config, the overrides that composed it) -> the exit code; None: 0."""


def entry(run: Run) -> Callable[..., int]:
    """The `main(argv=None)` of a command, which returns the exit code."""

    @to_a_reader
    def main(argv: Sequence[str] | None = None) -> int:
        if {"-h", "--help"} & set(sys.argv[1:] if argv is None else argv):
            print(overrides_help(run.__module__.rpartition(".")[2] if run.__module__ != "__main__" else Path(sys.argv[0]).stem))
            return 0
        quiet()
        try:
            code = (_command_line(run) if argv is None else _in_process(run, argv)) or 0
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except WRONG_CONFIG as error:
            print(f"error: {explain(error)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            code = 130
        if code == 130:  # also where a child took the signal and saved what it had
            print("interrupted; run the same command again to resume", file=sys.stderr)
        return code

    return main


def _in_process(run: Run, argv: Sequence[str]) -> int | None:
    cfg = compose(argv)
    check_top(cfg)
    return run(cfg, spelled_out(argv))


def _command_line(run: Run) -> int | None:
    words = sys.argv[1:]
    return _by_hydra(run) if any(word.startswith("-") or names_hydra(word) for word in words) else _composed_once(run, words)


def _composed_once(run: Run, words: Sequence[str]) -> int | None:
    """What `_by_hydra` does where no flag and no key of Hydra's is given: Hydra composes a config twice, the first time to look whether it is a sweep."""
    cfg = compose(words, hydra_config=True)
    configure_log(cfg.hydra.job_logging, cfg.hydra.verbose)
    with read_write(cfg), open_dict(cfg):
        del cfg["hydra"]
    check_top(cfg)
    return run(cfg, spelled_out(words))


def _by_hydra(run: Run) -> int:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, so that `explain` words it
    code = 0
    refused: list[UserError] = []

    def task(cfg: DictConfig) -> None:
        nonlocal code
        overrides = list(HydraConfig.get().overrides.task)
        GlobalHydra.instance().clear()  # `run` may compose further cells
        try:
            check_places(cfg, overrides)
            check_top(cfg)
            code = run(cfg, overrides) or 0
        except UserError as error:  # not through Hydra, which would print a line of its own
            refused.append(error)

    GlobalHydra.instance().clear()
    if {"-m", "--multirun"} & set(sys.argv[1:]):
        raise UserError("--multirun runs cells in one process, whose times would add up; python -m pipeline.cells experiments=<name> runs a grid of cells")
    sys.argv[1:] = spelled_out(sys.argv[1:])
    hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(task)()
    if refused:
        raise refused[0]
    return code


def call(command: str, cfg: DictConfig, overrides: list[str]) -> int:
    """Another command's `run`, as if it had been typed: for those that stand for several. Raises UserError as it does."""
    return importlib.import_module(f"pipeline.{command}").run(cfg, overrides) or 0


def key_values(words: Sequence[str], known: Iterable[str], command: str) -> dict[str, str]:
    """The words key=value as a dict. Raises UserError for one with another key or without a value."""
    pairs = [word.partition("=") for word in words]
    wrong = next((word for word, (key, _, value) in zip(words, pairs, strict=True) if key not in known or not value), None)
    if wrong is not None:
        raise UserError(f"{command} does not take {wrong!r}; write key=value with one of {', '.join(known)}")
    return {key: value for key, _, value in pairs}


def words_entry(run: Callable[[list[str]], int]) -> Callable[..., int]:
    """The `main` of a command that takes plain words: run's exit code; a UserError is one sentence on stderr and exit code 2."""

    @to_a_reader
    def main(argv: Sequence[str] | None = None) -> int:
        words = list(sys.argv[1:] if argv is None else argv)
        if {"-h", "--help"} & set(words):
            print(run.__globals__["__doc__"].strip())
            return 0
        try:
            return run(words)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return main
