"""What fits a model, a card and a time, and what to try first: an answer without any result of one's own. Library of `python -m pipeline.fit`.

Memory is forecast from the model's shape, time is reckoned from its arithmetic, accuracy is what was measured and published here (known/evidence.json,
by `python -m benchmarks.evidence`) with a small model on one task: it ranks techniques, and says nothing of what they reach on other data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.compose import ROOT, compose
from pipeline.core.files import read_json
from pipeline.forecasting.whole import Machine, Whole, Work, machine_of, need, whole
from pipeline.intake import known_models, planning, project
from pipeline.models.sources import hub_errors
from pipeline.stats.verdict import SLACK

EVIDENCE = Path(__file__).parent / "known" / "evidence.json"
FORECAST = ROOT / "experiments" / "forecast" / "summary.json"
SHOWN = ("zero_shot", "few_shot", "lora", "qlora", "dora", "ia3", "prompt_tuning", "adapter_pfeiffer", "full")
FEW = 300
"""Training rows below which the page of six techniques at six sizes (16 to 1,500) says more than that of all techniques at 1,000."""


@dataclass(frozen=True)
class Measured:
    """A published accuracy, a fraction with its 95% interval."""

    accuracy: float
    low: float
    high: float
    rows: int
    source: str
    device: str
    date: str


@dataclass(frozen=True)
class Fit:
    """A technique: what it takes, what was measured of it, and why it is out (empty: it is not)."""

    cost: Whole
    measured: Measured | None
    out: str


@dataclass(frozen=True)
class Answer:
    """fits: in the order of what was measured; take: None where nothing fits."""

    model: str
    shape_from: str
    machine: Machine
    rows: int
    hours: float | None
    length: int
    fits: list[Fit]
    take: Fit | None


def config_of(word: str, work: Path = Path(".work")) -> tuple[Path, str]:
    """(a config.json, where it is from) of a model: a file, a folder, a name below models/ or conf/model/, a known repository, or the hub's.

    Raises:
        UserError: no such model, and the hub is out of reach; the message says what is known.
    """
    for path in (Path(word), Path(word) / "config.json", Path("models") / word / "config.json"):
        if path.is_file() and path.suffix == ".json":
            return path, str(path)
    if Path(word).is_dir():
        project.check_folder(Path(word))
    model = project.model_choice(word)
    known, made = known_models.known_model(model), known_models.known_config(model, work)
    if known is not None and made is not None:
        return made, known.words
    return _from_hub(word), "the hub"


def _from_hub(word: str) -> Path:
    from huggingface_hub import hf_hub_download

    near = known_models.near(word)
    with hub_errors(word, f"the hub is out of reach, and the shape of {word} is not among those that ship with alignscope{near}",
                    f"give a config.json or a model's folder, or one of {', '.join(list(known_models.models())[4:8])}, …", near):
        return Path(hf_hub_download(word, "config.json"))


def evidence() -> list[dict[str, Any]]:
    return list(read_json(EVIDENCE))


def measured(technique: str, rows: int) -> Measured | None:
    """A technique's published accuracy on a GPU; None where there is none. With FEW rows or more all techniques' are of one page, so that they compare."""
    held = [row for row in evidence() if row["technique"] == technique and "H200" in row["device"]]
    if not held:
        return None
    near = min(held, key=lambda row: (rows >= FEW and "/techniques/" not in row["source"], abs(math.log(row["rows"] / rows))))
    return Measured(near["accuracy"], near["low"], near["high"], near["rows"], near["source"], near["device"], near["date"])


def fit(model: str, card: str | None, rows: int, hours: float | None, length: int, techniques: Sequence[str] | None = None) -> Answer:
    """What fits, and what to try first.

    Args:
        model: as config_of takes it. card: as planning.card_of. rows: labelled, to train on; length: tokens of a row.

    Raises:
        UserError: as config_of and card_of do.
    """
    config, shape_from = config_of(model)
    machine = machine_of(planning.card_of(card))
    work = Work(length, 2, 5, 0, length, rows, max(1, rows // 5), 200, 3.0)
    names = planning.check_techniques(techniques) if techniques else list(SHOWN)
    batch = ["train.batch_size=8", f"train.micro_batch_tokens={max(1024, length)}", f"train.max_length={max(512, length + 8)}"]
    costs = [whole(need(compose([f"technique={name}", *batch]), work, config, machine), work, machine) for name in names]
    fits = [Fit(cost, measured(cost.technique, rows), _out(cost, machine, hours)) for cost in costs]
    fits.sort(key=lambda one: -(one.measured.accuracy if one.measured else -1))
    return Answer(model, shape_from, machine, rows, hours, length, fits, _choose(fits))


def _out(cost: Whole, machine: Machine, hours: float | None) -> str:
    if cost.fits is False and cost.memory_bytes:
        return f"needs {cost.memory_bytes / 2**30:.1f} of {machine.card.memory_bytes / 2**30:.0f} GiB"
    if cost.memory_bytes is None:
        return cost.memory_basis
    if hours is not None and cost.total_s is not None and cost.total_s > hours * 3600:
        return f"takes {planning.duration(cost.total_s)} of {planning.duration(hours * 3600)}"
    return ""


def _choose(fits: Sequence[Fit]) -> Fit | None:
    """Of those that fit and are as good as the highest the one that needs least memory."""
    live = [(one, one.measured) for one in fits if not one.out and one.measured]
    if not live:
        return None
    top = live[0][1]
    alike = [one for one, seen in live if seen.accuracy >= top.accuracy - SLACK and seen.high >= top.low]
    return min(alike, key=lambda one: one.cost.memory_bytes or math.inf)


def lines(answer: Answer) -> list[str]:
    """The answer for people, each part with how it is known."""
    card, take = answer.machine.card, answer.take
    asked = [f"{answer.rows:,} rows of {answer.length} tokens", planning.words_of(card)]
    asked += [f"{answer.hours:g} h"] if answer.hours else []
    told = [f"{answer.model}: {', '.join(asked)}", ""]
    if take is None:
        reasons = "; ".join(f"{one.cost.technique} {one.out}" for one in answer.fits if one.out)
        told += [f"Nothing fits: {reasons}. Choose a smaller model or a larger card."]
    else:
        assert take.measured
        close = [one.cost.technique for one in answer.fits if one is not take and not one.out and one.measured and one.measured.high >= take.measured.low
                 and one.measured.accuracy >= take.measured.accuracy - SLACK]
        least = f"of those that fit and did as well where it was measured ({', '.join(close)}) it needs the least memory"
        why = least if close else "of those that fit it did best where it was measured"
        told += [f"Try {take.cost.technique} first: {why}. Zero-shot comes before it: it costs one pass over your test rows, and may do."]
    return told


def rows_of(answer: Answer) -> list[list[str]]:
    """[technique, memory, time, measured accuracy, remark] a technique."""
    shown = []
    for one in answer.fits:
        seen = one.measured
        accuracy = f"{100 * seen.accuracy:.0f}% ({100 * seen.low:.0f} to {100 * seen.high:.0f}) at {seen.rows:,} rows" if seen else "not measured"
        shown.append([one.cost.technique, planning.size(one.cost), planning.duration(one.cost.total_s), accuracy, f"out: {one.out}" if one.out else ""])
    return shown


def basis(answer: Answer) -> list[str]:
    """How each part is known: measured, forecast or a guess."""
    error = f"; 95 of 100 forecasts on an H200 were within {100 * read_json(FORECAST)['p95_error']:.1f}%" if FORECAST.exists() else ""
    seen = next((one.measured for one in answer.fits if one.measured), None)
    return [
        f"memory    forecast, from {answer.shape_from}{error}",
        f"time      {answer.machine.basis}, 3 epochs and 200 test rows, scoring included",
        f"accuracy  measured, of SmolLM2-135M on vader_movies_5 (one {seen.device}, {seen.date}: {seen.source}), and of no other model or data" if seen else "",
        "          so it says what to try first, not what it will reach; `alignscope try YOUR_FILE` measures that",
    ]


def as_json(answer: Answer) -> str:
    told = [{
        "technique": one.cost.technique, "memory_bytes": one.cost.memory_bytes, "fits": one.cost.fits, "total_s": one.cost.total_s, "out": one.out or None,
        "measured": vars(one.measured) if one.measured else None, "memory_is": "forecast", "time_is": answer.machine.basis,
    } for one in answer.fits]
    return json.dumps({"model": answer.model, "shape_from": answer.shape_from, "card_bytes": answer.machine.card.memory_bytes, "rows": answer.rows,
                       "hours": answer.hours, "take": answer.take.cost.technique if answer.take else None, "techniques": told}, indent=1)
