"""Whether an experiment's techniques, model and task go together, checked in seconds before the first cell: docs/models.md says what is checked.

Library of `python -m pipeline.check`, and of `pipeline.cells`, which stores in .work/preflight/ what passed and does not check it again.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline.cell import checks, identity
from pipeline.cell.checks import Finding
from pipeline.cell.inputs import Parts, Shared, build_parts, check, encoded, load_base, load_encoder, load_task, load_taught, named, training_rows
from pipeline.core.files import UserError, write_json
from pipeline.data.rows import Encoded, Encoder, Rows
from pipeline.measure.clock import Stopwatch
from pipeline.measure.memory import out_of_memory
from pipeline.methods.base import QUANTISED
from pipeline.objectives.base import Objective
from pipeline.scoring.scorer import Scorer
from pipeline.training.stepping import Run

ROWS = 32
"""Rows whose texts are looked at."""
BATCH = 4
"""Rows that go through the model, from the shortest of those to the longest."""
NO_PART = ("seed", "train_rows", "start", "evaluate")
"""Keys that change no check's outcome; how many training rows there are stands in the key by itself."""
LIMITLESS = 1 << 30


def ahead(cells: Sequence[DictConfig], shared: Shared) -> int:
    """Check what these cells are the first of: exit code 0, or 2 where a check fails, which is then printed. Runs in a process of its own."""
    new = unchecked(cells)
    if not new:
        return 0
    watch = Stopwatch()
    failed = [line for lines in look(new, shared) for line in lines]
    return told(len(new), watch.lap(), failed)


def look(groups: Sequence[Sequence[DictConfig]], shared: Shared) -> Iterator[list[str]]:
    """Check group by group: what failed of each. What passed is remembered. The last one takes the shared base for its own."""
    for number, group in enumerate(groups, 1):
        try:
            results = list(findings(group, shared if number == len(groups) else _copied(shared, group[0])))
        except Exception as error:  # noqa: BLE001 (what ends a check ends the cell, which keeps its trace; the others need not wait for that)
            print(f"preflight: {group[0].technique.name} could not be checked ({type(error).__name__}: {error})", file=sys.stderr)
            yield []
            continue
        wrong = [finding for finding in results if not finding.ok]
        if not wrong:
            write_json(_memory(group[0], key_of(group[0])), [dataclasses.asdict(finding) for finding in results])
        yield [f"{group[0].technique.name}: {finding.check}: {finding.said}" for finding in wrong]


def _copied(shared: Shared, cfg: DictConfig) -> Shared:
    """With a base of the cell's own, where one is read: rounded weights are read from the disk."""
    base = Path(cfg.paths.models) / cfg.model.name
    return dataclasses.replace(shared, stored={k: v if cfg.precision.name in QUANTISED else copy.deepcopy(v) for k, v in shared.stored.items() if k == base})


def told(count: int, seconds: float, failed: Sequence[str]) -> int:
    """Say how the checks of so many techniques went: exit code 0, or 2 where some failed."""
    print(f"preflight: {count} techniques checked on this model and task in {seconds:.0f} s, {len(failed)} checks failed", flush=True)
    for line in failed:
        print(f"preflight: {line}", file=sys.stderr)
    if failed:
        print("error: no cell was started; change what is named above, or add preflight=false to go on regardless", file=sys.stderr)
    return 2 if failed else 0


def report(cells: Sequence[DictConfig]) -> Iterator[tuple[str, bool]]:
    """(a line to print, whether it is good news) on every check of these cells."""
    for group in _groups(cells).values():
        yield f"{group[0].technique.name} on {group[0].model.name} and {group[0].task.name}", True
        for finding in findings(group, Shared()):
            yield f"  {'ok    ' if finding.ok else 'FAILED'} {finding.check}: {finding.said}", finding.ok


def unchecked(cells: Sequence[DictConfig]) -> list[list[DictConfig]]:
    """The cells that some check has not passed for yet, in groups that the same checks are for."""
    return [group for key, group in _groups(cells).items() if not _memory(group[0], key).exists()]


def _groups(cells: Iterable[DictConfig]) -> dict[str, list[DictConfig]]:
    """Cells that the same checks are for, by what those depend on: seeds of one technique."""
    groups: dict[str, list[DictConfig]] = {}
    for cfg in cells:
        groups.setdefault(key_of(cfg), []).append(cfg)
    return groups


def key_of(cfg: DictConfig) -> str:
    """Hash of what the checks of a cell depend on."""
    config = {key: value for key, value in identity.decides(cfg).items() if key not in NO_PART}
    inputs = identity.inputs(cfg)
    key = json.dumps([config, inputs["data"], inputs["model"], cfg.train_rows, cfg.device], sort_keys=True, default=str)
    return hashlib.sha256(key.encode()).hexdigest()[:24]


def _memory(cfg: DictConfig, key: str) -> Path:
    return Path(cfg.paths.work) / "preflight" / f"{key}.json"


def findings(group: Sequence[DictConfig], shared: Shared) -> Iterator[Finding]:
    """What the checks find of cells that differ in their seeds alone. The shared base is changed.

    A refusal is a finding, too; memory that does not suffice is none, since the cell will say so.
    """
    parts = build_parts(group[0])
    if parts.method.answers_without_model:
        return
    try:
        check(parts)
        yield from _of_model(parts, [_rows(parts, cfg) for cfg in group], shared)
    except UserError as error:
        yield Finding("applies", False, str(error))
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise


def _rows(parts: Parts, cfg: DictConfig) -> Rows:
    """What a cell of the group trains on and is asked."""
    cell_parts = dataclasses.replace(parts, cfg=cfg)
    rows = dataclasses.replace(load_task(cell_parts, cfg.seed, cfg.train_rows), rationales=load_taught(cell_parts))
    return training_rows(cell_parts, rows)[0]


def _of_model(parts: Parts, every: Sequence[Rows], shared: Shared) -> Iterator[Finding]:
    rows = every[0]
    base = load_base(parts, shared)
    encoder = load_encoder(parts, shared, base)
    yield checks.tokenizer(encoder.tokenizer, base.get_input_embeddings().weight.shape[0], [f"{r['prompt']} {r['answer']}" for r in rows.train[:ROWS]])
    with named(parts):
        state = parts.method.prepare([parts.objective.label_example(row, parts.settings.task) for row in rows.train], parts.cfg.seed, base)
        model = parts.method.wrap(base)
    state = parts.method.choose(state, lambda _: (0.0, None))
    scorer = functools.partial(Scorer, model, task=parts.settings.task, prompt=lambda p: parts.method.prompt(parts.objective.prompt(p), state),
                               batch_tokens=parts.settings.evaluate.batch_tokens, device=parts.device, dtype=parts.dtype, reasoning=parts.objective.reasoning)
    yield _lengths(parts, encoder, every, scorer(encoder=encoder))
    if parts.method.trains:
        whole = Encoder(encoder.tokenizer, parts.settings.task, LIMITLESS, "error", encoder.start)
        yield checks.trained_as_scored(scorer(encoder=whole), parts.objective, rows.train[:ROWS], rows.rationales)
        yield checks.labels(whole, [e for r in rows.train[:ROWS] for e in parts.objective.examples(r, parts.settings.task, rows.rationales.get(r["id"]))])
        yield from _of_training(parts, encoder, rows, model)


def _lengths(parts: Parts, encoder: Encoder, every: Sequence[Rows], scorer: Scorer) -> Finding:
    """Whether the texts of all seeds fit: those that are trained on, rationales among them, and those that are asked."""
    asked = {name: {r["id"]: r for rows in every for r in rows.scored[name]} for name in every[0].scored}
    train = {r["id"]: r for rows in every for r in rows.train}.values() if parts.method.trains else ()

    def training() -> list[str | None]:
        encoded(parts, encoder, list(train), every[0].rationales)
        return [encoder.check("the training rows")]

    attempts: list[Callable[[], Sequence[str | None]]] = [training, lambda: scorer.check({name: list(rows.values()) for name, rows in asked.items()})]
    notes, refused = [], []
    for attempt in attempts:
        try:
            notes += [note for note in attempt() if note]
        except UserError as error:
            refused.append(str(error))
    return Finding("lengths", not refused, "; ".join(refused or notes) or "no text is longer than the model and train.max_length take")


def _of_training(parts: Parts, encoder: Encoder, rows: Rows, model: Any) -> Iterator[Finding]:
    """What shows when a few rows go through the model as the method leaves it."""
    objective = parts.objective
    if objective.prepares or objective.own_batches or objective.trainer != "loop":
        objective = Objective()  # its own loss asks for more than rows
    examples = _spread(encoded(parts, encoder, rows.train[:ROWS], rows.rationales), encoder.max_length)
    flat = [e for row in examples for e in row]
    precision, where = _precision(parts), (encoder.pad_id, parts.device, parts.dtype)
    settings = dataclasses.replace(parts.settings.train, batch_size=len(examples))
    run = Run(model, parts.method, parts.objective, examples, settings, parts.cfg.seed, 1, *where[1:], encoder.pad_id)
    parts.method.before_training(model, max(10, parts.settings.train.steps or 10))
    yield checks.engine(run, examples, precision)

    # a decoder that is fed its start token alone has one token to attend to, and its queries and keys no gradient, whatever is trained
    longer = [dataclasses.replace(e, ids=(*e.ids, encoder.end_id)) if e.source else e for e in flat]

    def loss() -> Any:
        from pipeline.models.base import autocast

        with autocast(parts.device, parts.dtype):
            return sum(objective.loss(model, batch.to(parts.device)) for batch in objective.batches(longer, settings, encoder.pad_id))

    yield checks.gradients(model, loss)
    alone = checks.losses(model, [[e] for e in flat], *where)
    yield checks.neighbours(alone, checks.losses(model, [flat], *where), precision, parts.method.mixes_rows)
    if parts.method.merges and hasattr(model, "peft_config"):
        yield checks.merged(parts.method, model, [[e] for e in flat], *where, parts.precision if parts.precision in QUANTISED else precision)


def _precision(parts: Parts) -> str:
    import torch

    return "int8" if parts.precision == "int8" else "bf16" if parts.dtype == torch.bfloat16 else "fp32"


def _spread(examples: Sequence[Sequence[Encoded]], longest: int) -> list[Sequence[Encoded]]:
    """A few rows, from the shortest to the longest that fits."""
    fit = sorted((row for row in examples if all(max(len(e.ids), len(e.source)) <= longest for e in row)), key=lambda row: max(e.tokens for e in row))
    count = min(BATCH, len(fit))
    return [fit[i * (len(fit) - 1) // max(1, count - 1)] for i in range(count)]
