"""Two finished cells' answers to the test rows, judged by another model: wins, with the answers' places swapped, and what the judge cost.

    python -m pipeline.judge experiments=mine judge.cells=[lora-s0-n160,zero_shot-s0-n160] writer=server writer.model=gpt-4o-mini
    python -m pipeline.judge experiments=mine judge.cells=[lora-s0-n160,zero_shot-s0-n160] writer=local writer.model=qwen2_0_5b judge.rows=50

The first cell is held against the second. Every row is asked about twice; answers are kept, so the same command resumes and asks nothing twice.
Writes evaluations/<experiment>/judge/<first>-<second>/: judge.json and judged.jsonl (a value from 0 to 1 a row).
"""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import DictConfig

from pipeline.core.commands import entry
from pipeline.core.compose import build
from pipeline.core.files import UserError, read_jsonl, write_json, write_jsonl
from pipeline.data.rows import read_rows
from pipeline.records.finished import finished
from pipeline.scoring.judge import Pair, as_json, in_words, judge
from pipeline.serving.artefact import folder_of
from pipeline.teachers.writers import Writer


def run(cfg: DictConfig, overrides: list[str]) -> int:
    """Read both cells' answers, ask the judge, write and say what came out."""
    cells = list(cfg.judge.cells or [])
    if len(cells) != 2:
        raise UserError("pipeline.judge holds one cell against another; add judge.cells=[<cell>,<cell>], names of folders under results/<experiment>/")
    if cfg.get("writer") is None:
        raise UserError("pipeline.judge needs a judge; add writer=server writer.model=<name>, or writer=local writer.model=<folder under models/>")
    root = Path(cfg.paths.results) / cfg.experiment
    pairs = pairs_of(cfg, [folder_of(root, name) for name in cells])
    writer: Writer = build(cfg.writer, "writer")
    writer.check()
    judged, lines = judge(pairs, writer.write, cfg.judge.criterion)
    target = Path(cfg.paths.evaluations) / cfg.experiment / "judge" / "-".join(cells)
    write_jsonl(target / "judged.jsonl", lines)
    write_json(target / "judge.json", as_json(judged, cells, cfg.judge.criterion, writer.about()))
    print(f"{in_words(judged, cells[0], cells[1], writer.about())}\n{target}/judge.json")
    return 0


def pairs_of(cfg: DictConfig, folders: list[Path]) -> list[Pair]:
    """The test rows that both cells answered, in the split's order. Raises UserError where the cells are of several tasks, or no row is in both."""
    tasks = {finished(folder).task for folder in folders}
    if len(tasks) > 1:
        raise UserError(f"{' and '.join(map(str, folders))} are cells of the tasks {', '.join(sorted(tasks))}; judge two of one task")
    said = [{p["id"]: str(p.get("output", p["prediction"]) or "") for p in read_jsonl(f / "predictions.jsonl") if p["split"] == "test"} for f in folders]
    rows = [row for row in read_rows(Path(cfg.paths.data) / tasks.pop() / "test.jsonl") if all(row["id"] in answers for answers in said)]
    if not rows:
        raise UserError(f"{' and '.join(map(str, folders))} answered no test row in common; run both with the same evaluate.test_rows")
    shown = cfg.judge.reference
    return [Pair(row["id"], row["prompt"], said[0][row["id"]], said[1][row["id"]], row["answer"] if shown else "") for row in rows[: cfg.judge.rows]]


main = entry(run)

if __name__ == "__main__":
    sys.exit(main())
