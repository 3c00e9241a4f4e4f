"""How many rows, which techniques: what a comparison takes, scoring included, held to a budget of hours and a card's memory.

Library of `alignscope try`. Tokens are counted by the model's own tokenizer where it is here, else guessed from letters.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pipeline.core.compose import CONF, compose, plain
from pipeline.core.files import UserError, closest, read_object
from pipeline.core.settings import Task
from pipeline.data.rows import read_rows
from pipeline.forecasting.cell import Card
from pipeline.forecasting.rows import FastTokenizer
from pipeline.forecasting.whole import Machine, Need, Whole, Work, machine_of, need, whole, with_reason
from pipeline.intake.look import Look
from pipeline.intake.project import GENERATION_TOKENS, task_keys
from pipeline.measure import machine as hardware

FIRST = ("zero_shot", "few_shot")
"""Without training, and so what training is measured against: never left out."""
USUAL = {"choice": ("lora", "prompt_tuning", "full"), "number": ("lora", "full"), "text": ("lora", "full"), "pair": ("lora", "dpo")}
"""By what is asked for, techniques to train, the likeliest to win first."""
ON_A_GPU = ("qlora", "ia3")
SAMPLE = 200
"""Rows whose tokens are counted."""
SHOTS = 4
"""Demonstrations of few_shot (conf/method/few_shot.yaml)."""
LEAST_TRAIN, LEAST_TEST = 48, 60
MOST_TRAIN, MOST_TEST, MOST_EPOCHS = 1000, 500, 3.0
USUAL_TRAIN, USUAL_TEST = 160, 200
VALIDATION_SHARE = 0.2
START_S = 15.0
"""Once, before the first cell: imports, and reading the model."""
USED = 0.85
"""Of the budget, what a plan may take: its times are rough."""
CPU_HOURS, GPU_HOURS = 0.25, 0.5
MAX_LENGTH, LONGER = 512, (1024, 2048)
"""Tokens (train.max_length) of a row, its answer among them; more where rows fit and four demonstrations before them do not."""
ALL_BUT = 0.02
"""Of the texts with demonstrations, as many may be longer."""
LETTERS_A_TOKEN = 4.0


@dataclass(frozen=True)
class Plan:
    """The cells in their order, and those that were left out with why."""

    rows: int
    test_rows: int
    epochs: float
    cells: list[Whole]
    left_out: list[Whole]
    machine: Machine
    hours: float
    chat: bool
    notes: list[str]
    max_length: int = MAX_LENGTH

    @property
    def unknown(self) -> dict[str, list[str]]:
        """Why memory is not forecast -> of which techniques."""
        reasons: dict[str, list[str]] = {}
        for cell in self.cells:
            if cell.memory_bytes is None:
                reasons.setdefault(cell.memory_basis.removeprefix("no forecast for "), []).append(cell.technique)
        return reasons

    @property
    def total_s(self) -> float | None:
        times = [cell.total_s for cell in self.cells]
        return None if None in times else START_S + sum(t for t in times if t is not None)


def as_json(name: str, model: str, plan: Plan) -> dict[str, Any]:
    """What --json prints of a plan that is not run. Seconds, bytes, hours; null: not known."""
    cells = {key: [dataclasses.asdict(cell) for cell in some] for key, some in (("cells", plan.cells), ("left_out", plan.left_out))}
    return {"experiment": name, "model": model, "machine": words_of(plan.machine.card), "train_rows": plan.rows, "test_rows": plan.test_rows,
            "epochs": plan.epochs, "hours": plan.hours, "total_s": plan.total_s, "notes": plan.notes, **cells}


def card_of(word: str | None) -> Card:
    """The machine at hand, or a card of so many GiB elsewhere. Raises UserError for a word that is no size."""
    if word is None:
        gpu = hardware.card()
        return Card(True, *gpu) if gpu else Card(False, "this machine", hardware.machine_bytes())
    size = re.fullmatch(r"(?:([\w ]+?)[ :,-]+)?(\d+(?:\.\d+)?)\s*(?:GB|GiB|G)?", word.strip(), re.IGNORECASE)
    if not size or float(size[2]) <= 0:
        raise UserError(f"--card {word} is no size of memory; write it in GiB, as in 24GB, with the card's name before it if it is known (A100:40GB)")
    gib = float(size[2])
    return Card(True, f"{size[1] or 'a card'} of {gib:g} GiB", int(gib * 2**30), at_hand=False)


def words_of(card: Card) -> str:
    """A machine and its memory, for people; a card elsewhere is called by its size already."""
    return f"{card.name} ({card.memory_bytes / 2**30:.0f} GiB)" if card.at_hand else card.name


def check_techniques(names: Iterable[str]) -> list[str]:
    """Raise UserError for a word that is no technique."""
    known = [path.stem for path in CONF.glob("technique/*.yaml")]
    for name in names:
        if name not in known:
            raise UserError(f"there is no technique {name!r}{closest(name, known)}; docs/techniques.md lists them")
    return list(dict.fromkeys(names))


def make(seen: Look, folder: Path | None, config: Path | None, card: Card, hours: float | None, techniques: Sequence[str] | None = None,
         rows: int | None = None, test_rows: int | None = None) -> Plan:
    """The largest comparison that fits the budget.

    Args:
        folder: with the model's tokenizer; None: it is not here. config: its config.json; None: not known.
        techniques, rows, test_rows: as asked for; None: chosen here.

    Raises:
        UserError: an unknown technique, more rows than there are, nothing that fits.
    """
    machine = machine_of(card)
    hours = hours or (GPU_HOURS if card.gpu else CPU_HOURS)
    names = check_techniques(techniques) if techniques else [*FIRST, *USUAL[seen.kind], *(ON_A_GPU if card.gpu else ())]
    held = task_keys(seen, False)["split"]
    available, testable = len(seen.rows) - held["validation"] - held["test"], held["test"]
    if rows is not None and rows > available:
        raise UserError(f"--rows {rows}: of the {len(seen.rows):,} rows {held['test']} are held back to test on and {held['validation']} to choose by, which "
                        f"leaves {available:,} to train on; ask for at most that")
    base, chat, notes, length = _work(seen, folder, config)
    most = rows or min(available, USUAL_TRAIN), min(testable, test_rows or USUAL_TEST)
    work = _sized(base, *most, 1.0)
    needs = [_need(name, seen, chat, length, work, config, machine) for name in names]

    def costed(work: Work) -> list[Whole]:
        return [whole(needed, work, machine) for needed in needs]

    cells = costed(work)
    refused = [with_reason(c, f"needs {c.memory_bytes / 2**30:.1f} GiB, and {card.name} has {card.memory_bytes / 2**30:.1f} GiB")
               for c in cells if c.fits is False and c.memory_bytes]
    kept = [c for c in cells if c.fits is not False]
    if not kept:
        raise UserError(f"no technique fits: {refused[0].technique} {refused[0].reason}; choose a smaller model with --model")
    names = [c.technique for c in kept]
    limit = USED * hours * 3600 - START_S
    work = _shrunk(base, work, names, costed, limit, rows is not None, test_rows is not None)
    cells, late = _within([c for c in costed(work) if c.technique in names], limit, hours, bool(techniques))
    if not late and all(c.total_s is not None for c in cells):
        work = _grown(base, work, [c.technique for c in cells], costed, limit, available, testable, rows is not None, test_rows is not None)
        cells = [c for c in costed(work) if c.technique in {k.technique for k in cells}]
    return Plan(work.train_rows, work.test_rows, work.epochs, cells, [*refused, *late], machine, hours, chat, notes, length)


def _compose(technique: str, seen: Look, chat: bool, length: int) -> Any:
    keys = task_keys(seen, chat)
    words = [f"technique={technique}", f"train.max_length={length}", "train.batch_size=8", "train.micro_batch_tokens=256",
             f"++task.max_new_tokens={keys.get('max_new_tokens', 8)}"]
    if seen.kind in ("text", "number"):
        words += ["task.scoring=generate", f"evaluate.batch_tokens={GENERATION_TOKENS}", f"++task.format={keys.get('format', 'plain')}"]
    cfg = compose(words)
    if "stop" in keys:
        OmegaConf.update(cfg, "task.stop", keys["stop"], force_add=True)
    return cfg


def _need(technique: str, seen: Look, chat: bool, length: int, work: Work, config: Path | None, machine: Machine) -> Need:
    cfg = _compose(technique, seen, chat, length)
    if config is None:
        return Need(technique, plain(cfg), None, None, None, "the model's config.json is not here")
    return need(cfg, work, config, machine)


def _sized(base: Work, rows: int, test_rows: int, epochs: float) -> Work:
    return dataclasses.replace(base, train_rows=rows, validation_rows=max(1, int(VALIDATION_SHARE * rows)), test_rows=test_rows, epochs=epochs)


def _total(cells: Sequence[Whole], names: Sequence[str]) -> float:
    return sum(c.total_s or 0.0 for c in cells if c.technique in names)


def _shrunk(base: Work, work: Work, names: list[str], costed: Any, limit: float, rows_asked: bool, test_asked: bool) -> Work:
    """Fewer test rows, then fewer training rows, until all fit or there are as few as still tell something."""
    least_rows, least_test = min(LEAST_TRAIN, work.train_rows), min(LEAST_TEST, work.test_rows)
    while _total(costed(work), names) > limit:
        if work.test_rows > least_test and not test_asked:
            work = _sized(base, work.train_rows, max(least_test, int(work.test_rows * 0.75)), work.epochs)
        elif work.train_rows > least_rows and not rows_asked:
            work = _sized(base, max(least_rows, int(work.train_rows * 0.75)), work.test_rows, work.epochs)
        else:
            break
    return work


def _within(cells: Sequence[Whole], limit: float, hours: float, asked: bool) -> tuple[list[Whole], list[Whole]]:
    """(those that fit the time in their order, the others with why). Of techniques that were asked for by name none is left out."""
    spent = 0.0
    kept: list[Whole] = []
    late: list[Whole] = []
    for cell in cells:
        if not asked and kept and spent + (cell.total_s or 0.0) > limit:
            late.append(with_reason(cell, f"takes {duration(cell.total_s)}, more than is left of {duration(hours * 3600)}; --hours {2 * hours:g} gives more"))
        else:
            kept.append(cell)
            spent += cell.total_s or 0.0
    return kept, late


def _grown(base: Work, work: Work, names: list[str], costed: Any, limit: float, available: int, testable: int, rows_asked: bool, test_asked: bool) -> Work:
    """More test rows, epochs and training rows, in turn, while there is time."""
    while True:
        steps = [] if test_asked else [_sized(base, work.train_rows, min(testable, MOST_TEST, int(work.test_rows * 1.5)), work.epochs)]
        steps += [_sized(base, work.train_rows, work.test_rows, min(MOST_EPOCHS, work.epochs + 1))]
        steps += [] if rows_asked else [_sized(base, min(available, MOST_TRAIN, int(work.train_rows * 1.5)), work.test_rows, work.epochs)]
        larger = next((w for w in steps if w != work and _total(costed(w), names) <= limit), None)
        if larger is None:
            return work
        work = larger


def _work(seen: Look, folder: Path | None, config: Path | None) -> tuple[Work, bool, list[str], int]:
    """(the tokens of a row, whether the model has a chat template, notes on rows that are too long, most tokens of a row)."""
    tokenizer, count = _counting(folder)
    rows = random.Random(0).sample(seen.rows, min(SAMPLE, len(seen.rows)))
    fixed = count(re.sub(r"\{.*?\}", "", seen.prompt))
    whole_prompts = [fixed + sum(count(str(row.get(c, ""))) for c in seen.text) for row in rows]
    answers = [count(f" {row[seen.label]}") for row in rows]
    if seen.kind == "choice":
        choices = _tree(seen.labels, tokenizer)
    elif seen.kind == "pair":
        choices = sum(count(text) for row in rows for text in row["choices"]) / len(rows)
    else:
        choices = 0.0
    chat = bool(seen.shape and tokenizer and tokenizer.chat_template)
    new = task_keys(seen, False).get("max_new_tokens", 0)
    shots = SHOTS * (sum(whole_prompts) + sum(answers)) / len(rows)
    length = _length([p + max(a, new) for p, a in zip(whole_prompts, answers, strict=True)], shots, config)
    prompts = [min(p, length - 1) for p in whole_prompts]  # what is longer loses its start
    mean = sum(prompts) / len(rows)
    longest = max(p + a for p, a in zip(prompts, answers, strict=True))
    notes = []
    for technique, more in (("", 0.0), (" with few_shot's examples", shots)):
        long = sum(more + p + max(a, new) > length for p, a in zip(whole_prompts, answers, strict=True))
        if long:
            notes.append(f"{long / len(rows):.0%} of the texts{technique} are longer than {length} tokens (train.max_length) and lose their start")
    return Work(mean, sum(answers) / len(rows), choices, new, min(longest, length - 1), 0, 0, 0, 1.0, len(seen.labels)), chat, notes, length


def _counting(folder: Path | None) -> tuple[FastTokenizer | None, Callable[[str], int]]:
    """(a model's tokenizer, where it is here; how many tokens a text has, by it or by the text's letters)."""
    tokenizer = FastTokenizer(folder) if folder is not None and (folder / "tokenizer.json").exists() else None
    return tokenizer, lambda text: len(tokenizer(text)["input_ids"]) if tokenizer else max(1, round(len(text) / LETTERS_A_TOKEN))


def _length(whole: Sequence[float], shots: float, config: Path | None) -> int:
    """Most tokens of a row, by those of rows with their answers: more than MAX_LENGTH for demonstrations alone, and no more than the model takes."""
    held = read_object(config) if config else {}
    context = int(held.get("max_position_embeddings") or held.get("n_positions") or MAX_LENGTH)
    if max(whole) > MAX_LENGTH or context < MAX_LENGTH:
        return min(MAX_LENGTH, context)
    fits = (n for n in (MAX_LENGTH, *LONGER) if n <= context and sum(shots + w > n for w in whole) <= ALL_BUT * len(whole))
    return next(fits, MAX_LENGTH)


def _tree(words: Iterable[str], tokenizer: FastTokenizer | None) -> float:
    """Tokens of all choices, what several begin with counted once: as they are fed."""
    parts = [tuple(tokenizer(f" {word}")["input_ids"]) if tokenizer else tuple(word[i : i + 4] for i in range(0, len(word), 4)) for word in words]
    return float(len({part[:n] for part in parts for n in range(1, len(part) + 1)}))


def work_of(cfg: DictConfig, folder: Path) -> Work:
    """What a cell of a prepared task has to do. folder: the prepared model's. Raises UserError: the rows are not prepared."""
    data, evaluate = Path(cfg.paths.data) / cfg.task.name, cfg.evaluate
    train, test = read_rows(data / "train.jsonl"), read_rows(data / "test.jsonl")
    train, test = train[: cfg.train_rows], test[: evaluate.test_rows]
    tokenizer, count = _counting(folder)
    rows = test[:SAMPLE] or train[:SAMPLE]
    prompts, answers = ([min(count(r["prompt"]), cfg.train.max_length - 1) for r in rows], [count(r["answer"]) for r in rows])
    listed = [r["choices"] or [] for r in rows]
    if len({tuple(words) for words in listed}) == 1:
        choices = _tree(listed[0], tokenizer)
    else:
        choices = sum(count(word) for words in listed for word in words) / len(rows)
    generated = cfg.task.scoring == "generate"
    longest = min(max(p + a for p, a in zip(prompts, answers, strict=True)), cfg.train.max_length - 1)
    new = OmegaConf.select(cfg, "task.max_new_tokens") or Task.max_new_tokens
    validation = max(1, int(len(train) * evaluate.validation_share))
    return Work(sum(prompts) / len(rows), sum(answers) / len(rows), 0.0 if generated else choices, new if generated else 0, longest,
                len(train), validation, len(test), cfg.train.epochs, max(map(len, listed)))


def table(cells: Sequence[Whole], left_out: Sequence[Whole]) -> list[list[str]]:
    """[technique, training, scoring, together, memory, remark] a cell, for people."""
    lines = []
    for cell in cells:
        lines.append([cell.technique, *(duration(t) for t in (cell.train_s, cell.score_s, cell.total_s)), size(cell), ""])
    return lines + [[cell.technique, "", "", duration(cell.total_s), size(cell), f"left out: {cell.reason}"] for cell in left_out]


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    return "—" if not seconds else f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(cell: Whole) -> str:
    return "?" if cell.memory_bytes is None else f"{cell.memory_bytes / 2**30:.1f} GiB"
