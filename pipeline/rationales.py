"""A teacher's answers and reasons for a prepared task, in rationales/<task>/<teacher>/.

    python -m pipeline.rationales task=vader_movies teacher=lexicon

Training rows are there to learn from, test rows only so that the teacher itself can be scored. With train_rows=n the rows that such a cell reads
are explained alone: n training rows of seed (or of teacher.row_seeds), its validation rows, and evaluate.test_rows.

`seconds` in the manifest are those that passed; of a teacher whose texts are stored (local, server) those that passed when each text was written, now
or in an earlier run, so that stored texts do not look free. Everything else is the same at every run.
"""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import DictConfig

from pipeline.core.commands import entry
from pipeline.core.compose import build
from pipeline.core.files import atomic_folder, sha256, write_json, write_jsonl
from pipeline.data import recipe
from pipeline.data.rows import check_prepared
from pipeline.data.splits import SPLITS
from pipeline.measure.clock import now
from pipeline.teachers.base import Teacher
from pipeline.teachers.rationales import explained, in_words, summary, wanted


def run(cfg: DictConfig, overrides: list[str]) -> int:
    """Let the teacher of a composed config explain the rows of its task."""
    data = Path(cfg.paths.data) / cfg.task.name
    check_prepared(data, cfg.task.name)
    splits = wanted(cfg, data)
    teacher: Teacher = build(cfg.teacher, "teacher")
    teacher.check(cfg.task.name, splits["train"][0])
    begin = now()
    teacher.begin(recipe.read(cfg), splits["train"])
    rows = [row for name in SPLITS for row in explained(teacher, name, splits[name], cfg.task.get("answer_pattern"))]
    seconds = round(now() - begin, 3) if teacher.works_here else None
    about = {"seconds": seconds, "data_sha256": sha256(data / "manifest.json"), **teacher.report()}
    manifest = {"teacher": teacher.name, "task": cfg.task.name, **summary(rows), **about}
    folder = Path(cfg.paths.rationales) / cfg.task.name / teacher.name
    with atomic_folder(folder, "manifest.json", "teacher", "task") as beside:
        write_jsonl(beside / "rationales.jsonl", rows)
        write_json(beside / "manifest.json", manifest)
    print(f"{folder / 'rationales.jsonl'}: {'; '.join(filter(None, (in_words(manifest), teacher.in_words())))}")
    return 0


main = entry(run)

if __name__ == "__main__":
    sys.exit(main())
