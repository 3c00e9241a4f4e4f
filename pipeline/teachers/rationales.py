"""Which rows a teacher is asked about, and what it answered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline.core.settings import read
from pipeline.data.rows import load_rows, read_rows
from pipeline.data.splits import SPLITS
from pipeline.scoring.reading import agrees
from pipeline.teachers.base import Teacher


def wanted(cfg: DictConfig, data: Path) -> dict[str, list[dict]]:
    """The rows to explain, by split: all, or with train_rows those that such a cell reads."""
    every = {name: read_rows(data / f"{name}.jsonl") for name in SPLITS}
    if cfg.train_rows is None:
        return every
    settings = read(cfg)
    ids: dict[str, set[str]] = {name: set() for name in SPLITS}
    for seed in cfg.teacher.get("row_seeds") or [cfg.seed]:
        cell = load_rows(data, settings.task, cfg.train_rows, seed, settings.evaluate.validation_share, settings.evaluate.test_rows, 0)
        for name in SPLITS:
            ids[name] |= {row["id"] for row in getattr(cell, name)}
    return {name: [row for row in rows if row["id"] in ids[name]] for name, rows in every.items()}


def explained(teacher: Teacher, split: str, rows: list[dict], pattern: str | None = None) -> list[dict[str, Any]]:
    """The rows of rationales.jsonl for a split's rows, without those that the teacher does not explain."""
    explanations = []
    for start in range(0, len(rows), teacher.batch_size):
        batch = rows[start : start + teacher.batch_size]
        for row, one in zip(batch, teacher.explain(batch), strict=True):
            if one is not None:
                right = agrees(one.answer, row["answer"], pattern)
                explanations.append({"id": row["id"], "split": split, "rationale": one.rationale, "answer": one.answer, "correct": right})
    return explanations


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """rows: how many; without_rationale: how many of them have an answer alone; accuracy: right answers as a share, by split."""
    by_split = {name: [row["correct"] for row in rows if row["split"] == name] for name in SPLITS}
    accuracy = {name: round(sum(right) / len(right), 4) for name, right in by_split.items() if right}
    return {"rows": len(rows), "without_rationale": sum(not row["rationale"] for row in rows), "accuracy": accuracy}


def in_words(manifest: dict[str, Any]) -> str:
    """A manifest's counts and accuracy as a sentence."""
    if not manifest["rows"]:
        return f"no rows, because teacher={manifest['teacher']} explains nothing; choose another teacher to learn from rationales"
    accuracy = ", ".join(f"{name} {share:.3f}" for name, share in manifest["accuracy"].items())
    return f"{manifest['rows']:,} rows ({manifest['without_rationale']:,} without a rationale), accuracy {accuracy}"
