"""An artefact's scores on other rows, and what it forgot."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from pipeline.core.files import UserError, read_jsonl
from pipeline.records.results import Forgetting, Score
from pipeline.scoring.answers import score
from pipeline.scoring.probes import Probing
from pipeline.serving.artefact import Artefact, Base, scorer_of


def score_artefact(cfg: DictConfig, artefact: Path, split: str) -> tuple[list[dict], Score]:
    """Predictions and score of an artefact, from the files alone.

    Raises:
        UserError: no such split or artefact, a damaged one, or a technique whose answers come without a model.
    """
    rows = _rows(cfg, split)
    scorer = scorer_of(cfg.technique.name, artefact, cfg)
    for note in scorer.check({split: rows}):
        print(f"note: {note}")
    predictions = scorer.predict(rows)
    return [{"split": split, **p} for p in predictions], score(predictions, scorer.task)


def probe_artefact(cfg: DictConfig, artefact: Path) -> Forgetting:
    """What an artefact forgot against its untouched base, from the files alone."""
    served = Artefact.at(cfg.technique.name, artefact, cfg)
    base = Base.of(cfg)
    probing = Probing(cfg, served.settings, base.tokenizer, base.model)
    if probing.note:
        print(f"note: {probing.note}")
    return probing.forgetting(served.load(base)[0])


def _rows(cfg: DictConfig, split: str) -> list[dict]:
    """The split's first rows, as many as the evaluate settings say."""
    folder = Path(cfg.paths.data) / cfg.task.name
    kinds = {"test": cfg.evaluate.test_rows, "validation": None}
    limit = kinds.get(split, cfg.evaluate.transfer_rows)
    splits = ["validation", "test", *(f"transfer/{p.stem}" for p in sorted((folder / "transfer").glob("*.jsonl")))]
    if split not in splits:
        raise UserError(f"unknown split {split!r} of {folder}; there are: {', '.join(splits)}")
    return read_jsonl(folder / f"{split}.jsonl")[:limit]
