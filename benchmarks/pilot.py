"""The pilot behind the default labelling and learning rates: every technique on three labellings of the movie reviews.

    python -m benchmarks.pilot benchmarks/results/pilot.jsonl [minutes]
    python -m benchmarks.pilot benchmarks/results/techniques.jsonl 5 techniques      the rates of all other techniques, five classes alone
    for i in 0 1 2 3; do python -m benchmarks.pilot out.jsonl 5 techniques $i/4 & done; wait; python -m benchmarks.pilot out.jsonl 0 techniques

Needs the tasks vader_movies, vader_movies_3 and vader_movies_5 prepared (the last alone for techniques), their lexicon rationales, and the
model. The test split is never read: validation rows beyond the first 200 stand in for it. Writes one JSON object a cell and resumes where it
stopped; the third form shares the cells among four processes on one GPU and then prints the table.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline.cell import identity
from pipeline.cell import run as cell_run
from pipeline.core.compose import compose
from pipeline.core.files import read_jsonl, write_jsonl
from pipeline.measure import clock as measure

RATES = {
    "full": (5e-5, 1e-4, 2e-5, 2e-4), "lora": (1e-3, 2e-3, 5e-3, 5e-4), "qlora": (1e-3, 2e-3), "prompt_tuning": (3e-2, 1e-1, 3e-1, 1e-2),
    "step_by_step": (5e-5, 1e-4, 2e-4),
}
FURTHER = {
    "top_layers": (1e-4, 3e-4, 5e-5), "frozen_embeddings": (5e-5, 1e-4, 2e-4), "head_only": (1e-3, 1e-4, 1e-2, 3e-2), "bitfit_added": (3e-3, 1e-3, 1e-2),
    "ln_tuning": (3e-3, 1e-3, 1e-2), "from_scratch": (1e-3, 3e-4, 3e-3), "rslora": (1e-3, 5e-4, 2e-3), "dora": (1e-3, 5e-4, 2e-3),
    "adalora": (3e-3, 1e-3, 1e-2, 3e-2), "lora_plus": (2e-4, 1e-4, 5e-4, 5e-5), "pissa": (5e-4, 2e-4, 1e-3), "olora": (5e-4, 2e-4, 1e-3),
    "loha": (2e-3, 5e-4, 5e-3, 1e-2), "lokr": (3e-3, 1e-3, 1e-2), "vera": (3e-2, 1e-2, 1e-1), "oft": (1e-3, 3e-4, 3e-3, 1e-4), "qdora": (1e-3, 5e-4, 2e-3),
    "loftq": (1e-3, 5e-4, 2e-3), "lora_int8": (1e-3, 5e-4, 2e-3), "ia3": (1e-2, 3e-3, 3e-2), "prompt_tuning_text": (1e-1, 3e-2, 3e-1),
    "prompt_tuning_random": (1e-1, 3e-2, 3e-1), "prefix_tuning": (1e-2, 3e-3, 3e-2), "p_tuning": (1e-3, 3e-4, 3e-3), "multitask_prompt": (1e-1, 3e-2, 3e-1),
    "task_distillation": (5e-5, 2e-5, 1e-4), "task_distillation_lora": (1e-3, 5e-4, 2e-3), "rationale_first": (5e-5, 2e-5, 1e-4),
    "step_by_step_lora": (1e-3, 5e-4, 2e-3), "step_by_step_qlora": (1e-3, 5e-4, 2e-3), "dpo": (5e-4, 1e-4, 1e-3, 2e-3), "orpo": (1e-3, 5e-4, 2e-3),
    "kto": (5e-4, 1e-4, 1e-3, 2e-3), "logit_distillation": (1e-3, 5e-4, 2e-3), "logit_distillation_reverse": (1e-3, 5e-4, 2e-3),
    "adapter_houlsby": (1e-3, 3e-4, 3e-3, 1e-4), "adapter_pfeiffer": (1e-3, 3e-4, 3e-3, 1e-4), "adapter_parallel": (5e-4, 2e-4, 2e-3, 1e-3),
    "compacter": (3e-3, 1e-3, 1e-2), "adamix": (1e-3, 3e-4, 3e-3, 5e-4), "ladder": (1e-3, 3e-4, 3e-3), "attention_fusion": (3e-3, 1e-3, 3e-2, 1e-1, 3e-1),
    "ipt": (1e-1, 3e-2, 3e-1), "warp": (3e-2, 1e-2, 1e-1), "boft": (1e-3, 3e-4, 3e-3, 1e-2), "grpo": (1e-4, 3e-5, 3e-4, 2e-4), "rloo": (1e-4, 3e-5, 3e-4, 1e-3),
}
"""The likeliest rate first, then one below and one above it, then one more beyond the best where that was at the edge."""
UNTRAINED = (("zero_shot_int8", "seed=0"), ("zero_shot_nf4", "seed=0"), ("prompt_choice", "seed=0"), *(
    (name, f"method.k={k}") for k in (4, 8, 16) for name in ("retrieval", "retrieval_embedding")))
SHOTS = (4, 8, 16)
LABELLINGS = ("vader_movies_5", "vader_movies", "vader_movies_3")
ROWS, HELD_BACK = 200, 200


def settings() -> Iterator[tuple[str, str, str, int]]:
    """(task, technique, extra override, seed), the most useful first."""
    for task in LABELLINGS:
        yield task, "zero_shot", "seed=0", 0
        yield from ((task, "few_shot", f"method.k={k}", 0) for k in SHOTS)
        yield from ((task, technique, f"train.lr={rates[0]}", 0) for technique, rates in RATES.items())
    for seed, task in itertools.product((0, 1), LABELLINGS[:2]):
        yield from ((task, technique, f"train.lr={lr}", seed) for technique, rates in RATES.items() for lr in rates)


def extra() -> Iterator[tuple[str, str, str, int]]:
    """The same for the other techniques on the first labelling: every first rate, then the others, then a second seed of all."""
    task = LABELLINGS[0]
    yield from ((task, technique, extra, 0) for technique, extra in UNTRAINED)
    for seed, place in itertools.product((0, 1), range(max(map(len, FURTHER.values())))):
        yield from ((task, technique, f"train.lr={rates[place]}", seed) for technique, rates in FURTHER.items() if place < len(rates))


def stand_in(task: str, root: Path) -> None:
    """A copy of a prepared task whose test split is validation rows that training does not see."""
    source, target = Path("data") / task, root / task
    rows = read_jsonl(source / "validation.jsonl")
    write_jsonl(target / "train.jsonl", read_jsonl(source / "train.jsonl"))
    write_jsonl(target / "validation.jsonl", rows[:HELD_BACK])
    write_jsonl(target / "test.jsonl", rows[HELD_BACK:])
    (target / "manifest.json").write_bytes((source / "manifest.json").read_bytes())


def configured(folder: Path, task: str, technique: str, extra: str, seed: int) -> DictConfig:
    """A cell of the pilot."""
    return compose([
        f"task={task}", "teacher=lexicon", f"technique={technique}", extra, f"seed={seed}", f"paths.data={folder}", f"paths.results={folder}/results",
        f"train_rows={ROWS}", "train.epochs=2", "train.validations=1", "evaluate.forgetting=false", "evaluate.transfer_rows=0", "evaluate.latency_rows=0",
        "train.progress=false", "train.max_length=1024",
    ])


KEYS = ("task", "technique", "extra", "seed")


def measured(folder: Path, task: str, technique: str, extra: str, seed: int) -> dict[str, Any]:
    """The line of one cell."""
    cfg = configured(folder, task, technique, extra, seed)
    for path in identity.reads(cfg):  # a cell to begin at, or to be taught by
        if not path.exists():
            first = path.parent.name.rpartition("-s")[0]
            cell_run.run(configured(folder, task, first, "train.epochs=2", seed), folder=path.parent)
    result = cell_run.run(cfg)
    row: dict[str, Any] = {"task": task, "technique": technique, "extra": extra, "seed": seed, "status": result.status, "error": result.error}
    if result.test and result.phases:
        row |= {"held_back_accuracy": result.test.accuracy, "nll": result.test.nll, "rows": result.test.rows, "train_s": result.phases.train_s,
                "wall_s": result.phases.wall_s, "hardware": result.hardware["gpu"] or result.hardware["cpu"], "date": result.provenance["started"][:10]}
    return row


def table(target: Path) -> None:
    """Print the accuracies found, one line a setting."""
    scores: dict[tuple, list[float | None]] = defaultdict(list)
    for row in read_jsonl(target):
        scores[row["task"], row["technique"], row["extra"]].append(row.get("held_back_accuracy"))
    for key, values in sorted(scores.items()):
        print(*key, *(f"{v:.3f}" if v is not None else "oom" for v in values), sep="\t")


def main(target: Path, minutes: float = 600.0, which: str = "pilot", share: str = "0/1") -> None:
    """Run what is missing within the time; of the cells, every `of`-th from `number` on where share is number/of."""
    number, of = map(int, share.split("/"))
    wanted = list(extra() if which == "techniques" else settings())[number::of]
    done = {(r["task"], r["technique"], r["extra"], r["seed"]) for r in (read_jsonl(target) if target.exists() else [])}
    clock = measure.Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        for task in sorted({key[0] for key in wanted}):
            stand_in(task, Path(folder))
        for key in wanted:
            if key in done or clock.peek() > 60 * minutes:
                continue
            done.add(key)
            failed = None
            try:
                row = measured(Path(folder), *key)
            except RuntimeError as error:
                failed, row = error, {**dict(zip(KEYS, key, strict=True)), "status": "failed", "error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
            print(row, flush=True)
            with open(target, "a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")
            if failed:  # the device may be of no more use to this process; the next call resumes
                raise failed


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 600.0, *sys.argv[3:])
    table(Path(sys.argv[1]))
