"""Answer requests of several customers over one base model, each by the artefact of its own cell.

    python -m pipeline.serve experiments=quick requests=requests.jsonl to=answers.jsonl

A request is a line {"adapter": "lora-s0-n160", "prompt": "…"}: the name of a finished cell of the experiment, and a prompt as the
cell's task has it (data/<task>/test.jsonl); `choices` where every row of the task brings its own. An answer is the request with
`answer`, and `scores` (choices) or `output` (generated). The base is loaded once. Requests to LoRA cells, zero-shot, few-shot and
retrieval share a batch, whatever their cells; other adapters are put on the base in turn; a cell that changed the base's own weights
is refused by name. `requests=-` reads standard input; without `to` the answers go to standard output.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline import tasks
from pipeline.config import entry
from pipeline.files import UserError, read_jsonl, write_jsonl
from pipeline.measure import Stopwatch
from pipeline.results import Result
from pipeline.serving import Artefact, Base, Door, check_sharing, finished, held


def run(cfg: DictConfig) -> int:
    """Read the requests, load the base and what they ask for, answer."""
    if not cfg.requests:
        raise UserError("pipeline.serve needs requests; add requests=<file>.jsonl, or requests=- for standard input")
    requests = _requests(cfg.requests)
    root = Path(cfg.paths.results) / cfg.experiment
    found = {name: finished(_folder(root, name)) for name in dict.fromkeys(r["adapter"] for r in requests)}
    _check_one_base(found)
    artefacts = {name: Artefact.at(name, root / name / "artefact", held(result, cfg)) for name, result in found.items()}
    check_sharing(list(artefacts.values()))
    rows = [_with_choices(number, row, artefacts[row["adapter"]]) for number, row in enumerate(requests, 1)]
    base = Base.of(next(iter(artefacts.values())).cfg)
    door, watch = Door(base, list(artefacts.values())), Stopwatch(base.device)
    answers = [{**request, **answer} for request, answer in zip(requests, door.answer(rows), strict=True)]
    print(f"{len(answers)} requests over one {next(iter(found.values())).model} in {watch.lap():.2f} s: {'; '.join(door.told)}", file=sys.stderr)
    if cfg.to:
        write_jsonl(cfg.to, answers)
    else:
        for answer in answers:
            print(json.dumps(answer, ensure_ascii=False))
    return 0


def _requests(source: str) -> list[dict[str, Any]]:
    """Raises UserError naming the line of a request that is none."""
    if source == "-":
        try:
            found = [json.loads(line) for line in sys.stdin if line.strip()]
        except json.JSONDecodeError as error:
            raise UserError(f"standard input holds a line that is no JSON ({error}); send one JSON object a line") from error
    else:
        found = read_jsonl(source)
    for number, row in enumerate(found, 1):
        for key in ("adapter", "prompt"):
            if not isinstance(row, dict) or not isinstance(row.get(key), str) or not row[key]:
                raise UserError(f"request {number} of {source} has no text {key!r}; every request is {{adapter, prompt}}, choices where the task needs them")
    if not found:
        raise UserError(f"{source} holds no request; add lines like {{\"adapter\": \"lora-s0-n160\", \"prompt\": \"…\"}}")
    return found


def _folder(root: Path, name: str) -> Path:
    """A cell's folder. Raises UserError where there is no such cell, or the name leads elsewhere."""
    there = sorted(p.parent.name for p in root.glob("*/result.json"))
    if name not in there:
        raise UserError(f"{root} has no cell {name!r} to answer with; there are: {', '.join(there) or 'none'}")
    return root / name


def _check_one_base(found: dict[str, Result]) -> None:
    first, *others = found
    for key in ("model", "precision", "start"):
        for name in others:
            if (mine := _shared(found[name], key)) != (its := _shared(found[first], key)):
                raise UserError(f"{name} has {key} {mine} and {first} has {its}; artefacts share a base of one model in one precision, send them apart")


def _shared(result: Result, key: str) -> Any:
    """What artefacts over one base have in common; their start is a cell of one seed and number of rows."""
    if key != "start":
        return getattr(result, key)
    start = result.config.get("start")
    return start and (start if "/" in start else f"{start}-s{result.seed}-n{result.config['train_rows']} of {result.experiment}")


def _with_choices(number: int, request: dict[str, Any], artefact: Artefact) -> dict[str, Any]:
    """The request with its task's fixed choices, where it brings none. Raises UserError where the task needs some."""
    if artefact.settings.task.scoring != "choice":
        return request
    choices = request.get("choices") or tasks.read(artefact.cfg).choice_list
    if not isinstance(choices, list) or len(set(map(str, choices))) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise UserError(f"request {number}: the task of {request['adapter']} chooses among a row's own choices; give it a list of two or more texts")
    return {**request, "choices": choices}


main = entry(run)

if __name__ == "__main__":
    sys.exit(main())
