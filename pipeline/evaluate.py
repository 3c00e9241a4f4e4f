"""Score the artefact of a finished cell on a prepared split, the same task's or another set's.

    python -m pipeline.evaluate cell=results/quick/lora-s0-n160 split=transfer/tweets

Splits: validation, test, transfer/<set>. Writes evaluations/<experiment>/<cell>/<split>/{score.json, predictions.jsonl}.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from pipeline.config import build, entry
from pipeline.files import UserError, read_jsonl, write_json, write_jsonl
from pipeline.results import Score
from pipeline.results import read as read_result
from pipeline.scoring import headline


def run(cfg: DictConfig) -> int:
    """Load the cell's artefact onto its base and score the split; limits and batch size are this command's."""
    if not cfg.cell:
        raise UserError("pipeline.evaluate needs a finished cell; add cell=results/<experiment>/<cell>")
    result = read_result(cfg.cell)
    if result.status != "ok":
        raise UserError(f"{cfg.cell} has status {result.status} and no artefact; choose a cell that finished")
    held = OmegaConf.create({**result.config, "paths": cfg.paths, "device": cfg.device, "evaluate": cfg.evaluate})
    target = Path(cfg.paths.evaluations) / result.experiment / result.cell / cfg.split.replace("/", "-")
    predictions, score = score_artefact(held, Path(cfg.cell) / "artefact", cfg.split)
    write_jsonl(target / "predictions.jsonl", predictions)
    write_json(target / "score.json", {"split": cfg.split, "cell": result.cell, **dataclasses.asdict(score)})
    print(f"{result.cell} on {cfg.split}: {result.metric} {headline(score, result.metric):.3f}, {score.rows} rows; {target}/score.json")
    return 0


def score_artefact(cfg: DictConfig, artefact: Path, split: str) -> tuple[list[dict], Score]:
    """Predictions and score of an artefact, from the files alone.

    Raises:
        UserError: no such split or artefact, a damaged one, or a technique whose answers come without a model.
    """
    from safetensors import SafetensorError

    from pipeline import scoring
    from pipeline.data import Encoder
    from pipeline.model import device_of, load_model, load_tokenizer, most_tokens, resolve
    from pipeline.settings import read

    settings, method, objective = read(cfg), build(cfg.method, "method"), build(cfg.objective, "objective")
    rows = _rows(cfg, split)
    if not (artefact / "artefact.json").exists():
        raise UserError(f"{artefact} holds no artefact; run the cell again, or dvc checkout it")
    if method.name == "teacher":
        raise UserError("the teacher answers without a model; its rows stand in rationales/")
    device = device_of(cfg.device)
    folder = Path(cfg.paths.models) / cfg.model.name
    tokenizer = load_tokenizer(folder)
    base = load_model(folder, settings.precision, device)
    encoder = Encoder(tokenizer, settings.task, most_tokens(base, settings.train.max_length), settings.train.too_long)
    try:
        model, state = method.load(base, artefact)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"{artefact} cannot be loaded ({' '.join(str(error).split())}); run the cell again, or dvc checkout it") from error
    scorer = scoring.Scorer(model, encoder, settings.task, lambda p: method.prompt(objective.prompt(p), state), settings.evaluate.batch_tokens,
                            device, resolve(settings.precision, device)[1])
    for note in scorer.check({split: rows}):
        print(f"note: {note}")
    predictions = scorer.predict(rows)
    return [{"split": split, **p} for p in predictions], scoring.score(predictions, settings.task)


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
