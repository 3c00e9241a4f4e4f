"""Look, plan, run, answer: the whole path of `alignscope try`. Library of pipeline/try_file.py."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline.core.arguments import typed
from pipeline.core.commands import call
from pipeline.core.compose import compose, plain
from pipeline.core.files import UserError, read_object
from pipeline.core.settings import Task
from pipeline.forecasting.whole import Machine, Whole, need, whole
from pipeline.intake import look as looking
from pipeline.intake import planning, project, running
from pipeline.intake.known_models import known_config
from pipeline.intake.look import Look
from pipeline.intake.project import ModelChoice
from pipeline.scoring import per_row

GOING_ON = ("hours", "json", "plan", "yes")
"""What an experiment that is written already takes; all else stands in its file."""


def run(args: argparse.Namespace, given: Sequence[str]) -> int:
    """The command: 0 once the answer is there, 130 where it was interrupted (what is done is kept). given: the arguments that are not at their default."""
    path = project.file_of(args.data) if "/" not in args.data and "." not in args.data else None
    if path is not None and path.exists() and not Path(args.data).exists():
        if wrong := next((name.replace("_", "-") for name in given if name not in GOING_ON), None):
            raise UserError(f"--{wrong} is for a file of rows, and {args.data} is an experiment that is written already: edit {shown(path)}, or change its "
                            f"numbers with {typed()} more {args.data}")
        return go(args.data, args, args.plan)
    name = start(args, command_of(args, given))
    return 0 if args.plan or args.card else go(name, args)


def command_of(args: argparse.Namespace, given: Sequence[str]) -> str:
    """What was typed, without what decides nothing of the experiment."""
    values = {f"--{name.replace('_', '-')}": getattr(args, name) for name in given if name not in ("yes", "json", "plan")}
    options = [word for name, value in values.items() for word in ([name] if value is True else [name, str(value)])]
    return shlex.join(["alignscope", "try", args.data, *options]).replace("\n", "\\n")  # a line


def start(args: argparse.Namespace, command: str) -> str:
    """Look at the file, plan, and write the experiment, unless the same command wrote it before. Returns its name."""
    say = _say(args)
    text = tuple(part.strip() for part in (args.text or "").split(",") if part.strip())
    prompt = args.prompt.replace("\\n", "\n") if args.prompt else None
    seen = looking.look(args.data, text, args.label, prompt, args.normalise, args.missing, args.encoding, args.separator)
    seen = dataclasses.replace(seen, name=looking.name_of(args.name) if args.name else seen.name, metric=args.metric)
    say("\n".join(looking.lines(seen)))
    looking.check(seen)
    check_prompt(seen)
    check_metric(seen)
    path = project.file_of(seen.name)
    if not args.plan and not args.card and project.is_of(path, command):
        say(f"\ngoing on with {shown(path)}, which this command wrote before (remove it to begin anew)")
        return seen.name
    model = project.model_choice(args.model)
    card = planning.card_of(args.card)
    techniques = [t.strip() for t in args.techniques.split(",") if t.strip()] if args.techniques else None
    plan = planning.make(seen, *files_of(model), card, args.hours, techniques, args.rows, args.test_rows)
    say("")
    show_plan(plan, model, say)
    if not args.yes and not args.json and not args.plan and sys.stdin.isatty() and input("\nEnter to begin (n: stop here): ").strip().lower().startswith("n"):
        raise KeyboardInterrupt
    written = project.text_of(seen, model, command, [c.technique for c in plan.cells], plan.rows, plan.test_rows, plan.epochs, plan.hours,
                              args.card and f"{card.memory_bytes / 2**30:g}", plan.chat, args.encoding, args.separator,
                              plan.max_length)
    before = project.write(seen.name, written)
    say(f"\n{shown(path)}: the task, the model, the techniques and the budget, to edit{f'; what stood there is in {shown(before)}' if before else ''}")
    if args.card:
        say(f"nothing is run for a card elsewhere; there: alignscope try {seen.name}")
    if args.json and (args.card or args.plan):
        print(json.dumps(planning.as_json(seen.name, model.name, plan), indent=1, ensure_ascii=False))
    return seen.name


def check_prompt(seen: Look) -> None:
    """Raise UserError where a prompt that was given names a column that is not there, or none."""
    from pipeline.data.recipe import columns_of

    known = [c.name for c in seen.columns]
    named = columns_of(seen.prompt, "--prompt")
    if wrong := next((name for name in named if name not in known), None):
        raise UserError(f"--prompt names the column {wrong!r}, which {seen.path} does not have; there are: {', '.join(known)}")
    if not named:
        raise UserError(f"--prompt {seen.prompt!r} names no column; write one in braces, as in {{{seen.text[0]}}}")
    if seen.label in named and seen.kind != "pair":
        raise UserError(f"--prompt names {seen.label!r}, which holds the answer; take it out, or name another column with --label")


def check_metric(seen: Look) -> None:
    """Raise UserError where --metric names none that such answers have, or a function that cannot be had."""
    keys = project.task_keys(seen, False)
    task = Task(seen.name, keys["scoring"], keys["metric"])
    task.check()
    per_row.of(task)


def files_of(model: ModelChoice) -> tuple[Path | None, Path | None]:
    """(the folder with a model's tokenizer, its config.json): as prepared, or where the user has it; None for what is not here."""
    for folder in (Path("models") / model.name, Path(model.source.get("path", ""))):
        if (folder / "config.json").exists() and str(folder) != ".":
            return folder, folder / "config.json"
    return None, known_config(model)


def show_plan(plan: planning.Plan, model: ModelChoice, say: Callable[[Any], None]) -> None:
    """Print what the comparison takes."""
    total = planning.duration(plan.total_s)
    card = plan.machine.card
    say(f"plan for {planning.words_of(card)}, {model.name}: {plan.rows} rows to train on, {plan.test_rows} to test "
        f"on, {plan.epochs:g} epoch{'s' if plan.epochs != 1 else ''}; {total} of {plan.hours * 60:.0f} min")
    show_costs(plan.cells, plan.left_out, plan.machine, say)
    for reason, names in plan.unknown.items():
        say(f"note: no forecast of memory for {', '.join(names)} ({reason})")
    for note in plan.notes:
        say(f"note: {note}")


def show_costs(cells: Sequence[Whole], left_out: Sequence[Whole], machine: Machine, say: Callable[[Any], None]) -> None:
    """Print a line a technique, and what its figures rest on."""
    say(running.grid(["technique", "training", "scoring", "together", "memory", ""], planning.table(cells, left_out)))
    say(f"times: {machine.basis}, within a factor of two; memory: forecast")


def shown(path: Path) -> str:
    """A path as one would type it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _say(args: argparse.Namespace) -> Callable[[Any], None]:
    """Prints for people; with --json nothing."""
    if args.json:
        return lambda what: None
    console = make_console()
    return lambda what: console.print(what, highlight=False, markup=False, soft_wrap=isinstance(what, str) and not console.is_terminal)


def make_console() -> Any:
    """rich's, as wide as a table needs where it is no terminal."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=400)


def go(name: str, args: argparse.Namespace, plan: bool = False) -> int:
    """Prepare what is missing, run what is not done, answer. plan: say what it takes in the place of running it."""
    from pipeline.cell import grid
    from pipeline.intake import answering

    known = grid.grid(name)
    overrides = [f"experiments={name}"]
    cfg = compose(overrides)
    prepare(cfg, overrides, _say(args))
    cells = [grid.compose_cell([*words, "train.progress=false"]) for words in grid.grid_overrides(overrides)]
    source = plain(cfg)["task"]["source"]
    files = source.get("path") or source.get("folder") or source.get("files")
    project.stages(name, known, files if isinstance(files, str) else None, (plain(cfg)["model"].get("source") or {}).get("path"))
    if plan:
        machine = planning.machine_of(planning.card_of(None))
        show_costs(list(costs_of(cells, cfg, machine).values()), (), machine, _say(args))
        return 0
    code, watch = compare(cells, cfg, args)
    return answering.answer(name, cfg, watch, code, args)


def compare(cells: Sequence[DictConfig], cfg: DictConfig, args: argparse.Namespace) -> tuple[int, running.Watch]:
    """Run the cells that are missing: (the exit code, what was seen of them)."""
    from pipeline.cell import grid

    console = make_console()
    console.quiet = args.json
    budget = plain(cfg).get("budget") or {}
    hours = args.hours or budget.get("hours")
    costs = costs_of(cells, cfg)
    log = Path(cfg.paths.work) / "logs" / f"{cfg.experiment}.log"
    watch = running.Watch(cells, costs, log, console, hours and hours * 3600)
    code = 0
    with watch, contextlib.redirect_stdout(io.StringIO()) if args.json else contextlib.nullcontext():
        try:
            code = grid.run_cells(cells, watcher=watch)
        except KeyboardInterrupt:
            code = 130
    return code, watch


def costs_of(cells: Sequence[DictConfig], cfg: DictConfig, machine: Machine | None = None) -> dict[str, Whole]:
    """What each technique takes by the plan, from the prepared rows. machine: None: the one at hand."""
    machine = machine or planning.machine_of(planning.card_of(None))
    folder = Path(cfg.paths.models) / cfg.model.name
    costs = {}
    for cell in cells:
        if cell.technique.name not in costs:
            work = planning.work_of(cell, folder)
            costs[cell.technique.name] = whole(need(cell, work, folder / "config.json", machine), work, machine)
    return costs


def prepare(cfg: DictConfig, overrides: list[str], say: Callable[[Any], None]) -> None:
    """Make the task's rows and fetch the model, where they are not there or the file says otherwise now."""
    values = plain(cfg)
    folders = {"prepare": Path(cfg.paths.data) / cfg.task.name, "base_model": Path(cfg.paths.models) / cfg.model.name}
    held = {name: read_object(folder / "manifest.json") if (folder / "manifest.json").exists() else None for name, folder in folders.items()}
    rows, task = held["prepare"], json.loads(json.dumps(values["task"]))
    stale = {"prepare": rows is None or rows.get("config") != task or _moved(task, rows), "base_model": held["base_model"] is None}
    for command, needed in stale.items():
        if needed:
            say({"prepare": f"preparing {folders[command]}", "base_model": f"fetching {cfg.model.name} into {folders[command]}"}[command])
            with contextlib.redirect_stdout(io.StringIO()):
                call(command, cfg, overrides)


def _moved(task: dict[str, Any], manifest: dict[str, Any]) -> bool:
    """Whether the file of rows is another one than the prepared rows were made of."""
    from pipeline.core.files import sha256

    path = task["source"].get("path")
    return bool(path) and Path(path).exists() and manifest["source"].get("sha256", {}).get(Path(path).name) != sha256(path)
