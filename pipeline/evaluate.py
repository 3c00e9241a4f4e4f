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

from pipeline.core.commands import entry
from pipeline.core.files import UserError, write_json, write_jsonl
from pipeline.records.finished import cell_config, finished
from pipeline.scoring.answers import headline
from pipeline.serving.artefact import probe_artefact, score_artefact


def run(cfg: DictConfig, overrides: list[str]) -> int:
    """Load the cell's artefact onto its base and score the split; limits and batch size are this command's."""
    if not cfg.cell:
        raise UserError("pipeline.evaluate needs a finished cell; add cell=results/<experiment>/<cell>")
    result = finished(cfg.cell)
    target = Path(cfg.paths.evaluations) / result.experiment / result.cell / cfg.split.replace("/", "-")
    if cfg.split == "probes":
        probes = probe_artefact(cell_config(result, cfg), Path(cfg.cell) / "artefact")
        write_json(target / "forgetting.json", {"cell": result.cell, **dataclasses.asdict(probes)})
        after, before = ("—" if value is None else f"{value:.2f}" for value in (probes.perplexity, probes.perplexity_base))
        print(f"{result.cell}: perplexity {after}, the base's {before}; {probes.probes}; {target}/forgetting.json")
        return 0
    predictions, score = score_artefact(cell_config(result, cfg), Path(cfg.cell) / "artefact", cfg.split)
    write_jsonl(target / "predictions.jsonl", predictions)
    write_json(target / "score.json", {"split": cfg.split, "cell": result.cell, **dataclasses.asdict(score)})
    print(f"{result.cell} on {cfg.split}: {result.metric} {headline(score, result.metric):.3f}, {score.rows} rows; {target}/score.json")
    return 0


main = entry(run)

if __name__ == "__main__":
    sys.exit(main())
