"""Answer requests of several customers over one base model, each by the artefact of its own cell.

    python -m pipeline.serve experiments=quick requests=requests.jsonl to=answers.jsonl

A request is a line {"adapter": "lora-s0-n160", "prompt": "…"}: the name of a finished cell of the experiment, and a prompt as the
cell's task has it (data/<task>/test.jsonl), or a conversation as `messages`; `choices` where every row of the task brings its own. An
answer is the request with `answer`, and `scores` (choices) or `output` (generated). The base is loaded once. Requests to LoRA cells,
zero-shot, few-shot and retrieval share a batch, whatever their cells; other adapters are put on the base in turn; a cell that changed
the base's own weights is refused by name. `requests=-` reads standard input; without `to` the answers go to standard output.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from omegaconf import DictConfig

from pipeline.core.commands import entry
from pipeline.core.files import UserError, write_jsonl
from pipeline.measure.clock import Stopwatch
from pipeline.records.finished import cell_config, finished
from pipeline.serving.artefact import Artefact, Base, Multiplexer, check_one_base, check_sharing, folder_of, read_requests, with_choices


def run(cfg: DictConfig, overrides: list[str]) -> int:
    """Read the requests, load the base and what they ask for, answer."""
    if not cfg.requests:
        raise UserError("pipeline.serve needs requests; add requests=<file>.jsonl, or requests=- for standard input")
    requests = read_requests(cfg.requests)
    root = Path(cfg.paths.results) / cfg.experiment
    results = {name: finished(folder_of(root, name)) for name in dict.fromkeys(r["adapter"] for r in requests)}
    check_one_base(results)
    artefacts = {name: Artefact.at(name, root / name / "artefact", cell_config(result, cfg)) for name, result in results.items()}
    check_sharing(list(artefacts.values()))
    rows = [with_choices(number, row, artefacts[row["adapter"]]) for number, row in enumerate(requests, 1)]
    base = Base.of(next(iter(artefacts.values())).cfg)
    multiplexer, watch = Multiplexer(base, list(artefacts.values())), Stopwatch(base.device)
    answers = [{**request, **answer} for request, answer in zip(requests, multiplexer.answer(rows), strict=True)]
    print(f"{len(answers)} requests over one {next(iter(results.values())).model} in {watch.lap():.2f} s: {'; '.join(multiplexer.report)}", file=sys.stderr)
    if cfg.to:
        write_jsonl(cfg.to, answers)
    else:
        for answer in answers:
            print(json.dumps(answer, ensure_ascii=False))
    return 0


main = entry(run)

if __name__ == "__main__":
    sys.exit(main())
