"""A teacher's answers and reasons for a prepared task, in rationales/<task>/<teacher>/.

    python -m pipeline.rationales task=vader_movies teacher=lexicon

Training rows are there to learn from, test rows only so that the teacher itself can be scored. With train_rows=n the rows that such a cell reads
are explained alone: n training rows of seed (or of teacher.row_seeds), its validation rows, and evaluate.test_rows.

`seconds` in the manifest are those that passed; of a teacher whose texts are kept (local, server) those that passed when each text was written, now
or in an earlier run, so that what was kept does not look free. Everything else is the same at every run.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline import tasks
from pipeline.config import build, entry
from pipeline.data import load_rows
from pipeline.files import UserError, atomic_folder, read_jsonl, sha256, write_json, write_jsonl
from pipeline.measure import now
from pipeline.scoring import canonical
from pipeline.settings import read
from pipeline.teachers.base import Teacher

SPLITS = ("train", "validation", "test")


def run(cfg: DictConfig) -> int:
    """Let the teacher of a composed config explain the rows of its task."""
    data = Path(cfg.paths.data) / cfg.task.name
    if not (data / "manifest.json").exists():
        raise UserError(f"{data} is not prepared; run: python -m pipeline.prepare task={cfg.task.name}")
    splits = wanted(cfg, data)
    teacher: Teacher = build(cfg.teacher, "teacher")
    teacher.check(cfg.task.name, splits["train"][0])
    begin = now()
    teacher.begin(tasks.read(cfg), splits["train"])
    rows = [row for name in SPLITS for row in explained(teacher, name, splits[name])]
    seconds = round(now() - begin, 3) if teacher.works_here else None
    about = {"seconds": seconds, "data_sha256": sha256(data / "manifest.json"), **teacher.account()}
    manifest = {"teacher": teacher.name, "task": cfg.task.name, **summary(rows), **about}
    folder = Path(cfg.paths.rationales) / cfg.task.name / teacher.name
    with atomic_folder(folder, "manifest.json", "teacher", "task") as beside:
        write_jsonl(beside / "rationales.jsonl", rows)
        write_json(beside / "manifest.json", manifest)
    print(f"{folder / 'rationales.jsonl'}: {'; '.join(filter(None, (_told(manifest), teacher.told())))}")
    return 0


def wanted(cfg: DictConfig, data: Path) -> dict[str, list[dict]]:
    """The rows to explain, by split: all, or with train_rows those that such a cell reads."""
    every = {name: read_jsonl(data / f"{name}.jsonl") for name in SPLITS}
    if cfg.train_rows is None:
        return every
    settings = read(cfg)
    found: dict[str, set[str]] = {name: set() for name in SPLITS}
    for seed in cfg.teacher.get("row_seeds") or [cfg.seed]:
        cell = load_rows(data, settings.task, cfg.train_rows, seed, settings.evaluate.validation_share, settings.evaluate.test_rows, 0)
        for name in SPLITS:
            found[name] |= {row["id"] for row in getattr(cell, name)}
    return {name: [row for row in rows if row["id"] in found[name]] for name, rows in every.items()}


def explained(teacher: Teacher, split: str, rows: list[dict]) -> list[dict[str, Any]]:
    """The teacher's row for each of a split's rows that it has something to say about."""
    found = []
    for start in range(0, len(rows), teacher.batch_size):
        batch = rows[start : start + teacher.batch_size]
        for row, said in zip(batch, teacher.explain(batch), strict=True):
            if said is not None:
                right = said.answer is not None and canonical(said.answer) == canonical(row["answer"])
                found.append({"id": row["id"], "split": split, "rationale": said.rationale, "answer": said.answer, "correct": right})
    return found


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """rows: how many; without_rationale: how many of them have an answer alone; accuracy: right answers as a share, by split."""
    by_split = {name: [row["correct"] for row in rows if row["split"] == name] for name in SPLITS}
    accuracy = {name: round(sum(right) / len(right), 4) for name, right in by_split.items() if right}
    return {"rows": len(rows), "without_rationale": sum(not row["rationale"] for row in rows), "accuracy": accuracy}


def _told(manifest: dict[str, Any]) -> str:
    if not manifest["rows"]:
        return f"no rows, because teacher={manifest['teacher']} explains nothing; choose another teacher to learn from rationales"
    accuracy = ", ".join(f"{name} {share:.3f}" for name, share in manifest["accuracy"].items())
    return f"{manifest['rows']:,} rows ({manifest['without_rationale']:,} without a rationale), accuracy {accuracy}"


main = entry(run)

if __name__ == "__main__":
    sys.exit(main())
