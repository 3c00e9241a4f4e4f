"""Score the artefact of a finished cell on a prepared split, the same task's or another set's.

    python -m pipeline.evaluate cell=results/quick/lora-s0-n160 split=transfer/tweets

Splits: validation, test, transfer/<set>. Writes evaluations/<experiment>/<cell>/<split>/{score.json, predictions.jsonl}. With
split=probes it probes what the artefact forgot (docs/forgetting.md) and writes forgetting.json there.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from omegaconf import DictConfig

from pipeline.config import entry
from pipeline.files import UserError, read_jsonl, write_json, write_jsonl
from pipeline.probes import Probing
from pipeline.results import Forgetting, Score
from pipeline.scoring import headline, score
from pipeline.serving import Artefact, Base, finished, held


def run(cfg: DictConfig) -> int:
    """Load the cell's artefact onto its base and score the split; limits and batch size are this command's."""
    if not cfg.cell:
        raise UserError("pipeline.evaluate needs a finished cell; add cell=results/<experiment>/<cell>")
    result = finished(cfg.cell)
    target = Path(cfg.paths.evaluations) / result.experiment / result.cell / cfg.split.replace("/", "-")
    if cfg.split == "probes":
        found = probe_artefact(held(result, cfg), Path(cfg.cell) / "artefact")
        write_json(target / "forgetting.json", {"cell": result.cell, **dataclasses.asdict(found)})
        print(f"{result.cell}: perplexity {found.perplexity:.2f}, the base's {found.perplexity_base:.2f}; {found.probes}; {target}/forgetting.json")
        return 0
    predictions, score = score_artefact(held(result, cfg), Path(cfg.cell) / "artefact", cfg.split)
    write_jsonl(target / "predictions.jsonl", predictions)
    write_json(target / "score.json", {"split": cfg.split, "cell": result.cell, **dataclasses.asdict(score)})
    print(f"{result.cell} on {cfg.split}: {result.metric} {headline(score, result.metric):.3f}, {score.rows} rows; {target}/score.json")
    return 0


def score_artefact(cfg: DictConfig, artefact: Path, split: str) -> tuple[list[dict], Score]:
    """Predictions and score of an artefact, from the files alone.

    Raises:
        UserError: no such split or artefact, a damaged one, or a technique whose answers come without a model.
    """
    rows = _rows(cfg, split)
    served = Artefact.at(cfg.technique.name, artefact, cfg)
    base = Base.of(cfg)
    scorer = served.scorer(base, *served.load(base))
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
    there = ["validation", "test", *(f"transfer/{p.stem}" for p in sorted((folder / "transfer").glob("*.jsonl")))]
    if split not in there:
        raise UserError(f"unknown split {split!r} of {folder}; there are: {', '.join(there)}")
    return read_jsonl(folder / f"{split}.jsonl")[:limit]


main = entry(run)

if __name__ == "__main__":
    sys.exit(main())
