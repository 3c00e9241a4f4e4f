"""The result files of the speed benchmarks, updated row by row, and the tables made from them.

Library of `python -m benchmarks.speed`. speed-<set>.json holds everything of every id, targets.json one short object a headline id.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import statistics
from pathlib import Path
from typing import Any

from benchmarks import speed_stats
from benchmarks.speed_targets import HEADLINE, KNOWN, AnyRow
from pipeline.core.files import UserError, read_json, write_json

FOLDER = Path(__file__).parent / "results"
COLUMNS = ("id", "measured", "ratio (95%; lowest to highest)", "required", "aim", "ours", "against", "losses apart", "share of the matmul rate, ours / theirs",
           "device, date")
README_COLUMNS = ("measured", "ratio (95%; lowest to highest)", "required", "ours", "theirs", "device, date")
README = ("lora-1b-plain", "lora-1b-small", "qlora-1b-plain", "sweep8-1b", "eval-generate")
"""The headline rows that stand in README.md."""
GRID_COLUMNS = ("workload", "against (a)", "against (b)", "our tokens/s", "ours", "(a)", "(b)")
TARGET_KEYS = ("id", "ratio", "spread", "interval", "required", "verdict", "hardware", "versions", "date", "command")


def origin(device: Any) -> dict[str, Any]:
    """hardware, versions, date (UTC), command and commit of this process."""
    from pipeline.measure.machine import hardware, provenance

    about = provenance()
    versions = {**about["packages"], "python": about["python"]}
    for name in ("optuna", "liger_kernel", "triton", "flash_attn"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    command = " ".join(word for word in about["command"].split() if not word.startswith("out="))  # where the files went says nothing of how they came about
    return {
        "hardware": hardware(device), "versions": versions, "date": about["started"][:10], "command": command,
        "git_commit": about["git_commit"], "git_dirty": about["git_dirty"],
    }


def keep(folder: Path, row: AnyRow, found: dict[str, Any], about: dict[str, Any]) -> None:
    """Write one id's record into speed-<set>.json and, if it is a headline with a ratio, targets.json; other rows stay.

    A record without a ratio does not displace one that has it: it is kept in that one's `last_failure`.
    """
    record, path = judged({**found, **about}), folder / f"speed-{row.set}.json"
    before = next((held for held in rows(path) if held["id"] == row.id), {})
    failed = found.get("ratio") is None and before.get("ratio") is not None
    _update(path, {**before, "last_failure": record} if failed else record, list(KNOWN))
    if row.id in HEADLINE and found.get("ratio") is not None:
        _update(folder / "targets.json", {key: record[key] for key in TARGET_KEYS}, HEADLINE)


def judged(record: dict[str, Any]) -> dict[str, Any]:
    """The record with its ratio, interval and verdict made from its sides' repeats, where it has a ratio and they are there."""
    if record.get("ratio") is None:
        return record
    sides = [values(record, side) for side in ("over", "under")]
    found = speed_stats.ratio(*sides) if all(sides) else {"ratio": record["ratio"], "interval": None}
    kept = {key: value for key, value in record.items() if key != "iqr"}
    return {**kept, **found, "verdict": speed_stats.verdict(found, record.get("required"))}


def values(record: dict[str, Any], side: str, figure: str | None = None) -> list[float]:
    """What a side took in every repeat: seconds a step (on a CPU the median step's), peak bytes, or seconds of a sweep or an evaluation."""
    entry = record.get(side) or {}
    if runs := entry.get("runs"):
        if (figure or record.get("figure")) == "peak_bytes":
            return [run["peak_bytes"] for run in runs if run["peak_bytes"]]
        return [statistics.median(run["times_s"]) if run.get("times_s") else run["timed_s"] / entry["workload"]["steps"] for run in runs]
    return entry.get("walls_s") or ([entry["wall_s"]["median"]] if entry.get("wall_s") else [])


def refresh(folder: Path) -> None:
    """Judge what is stored by today's rule, and make targets.json of it."""
    for path in sorted(folder.glob("speed-*.json")):
        stored = [judged(record) for record in rows(path)]
        write_json(path, stored)
        for record in stored:
            if record["id"] in HEADLINE and record.get("ratio") is not None:
                _update(folder / "targets.json", {key: record.get(key) for key in TARGET_KEYS}, HEADLINE)


def _update(path: Path, record: dict[str, Any], order: list[str]) -> None:
    stored = {row["id"]: row for row in rows(path)}
    stored[record["id"]] = record
    places = {id: place for place, id in enumerate(order)}
    write_json(path, sorted(stored.values(), key=lambda row: (places.get(row["id"], len(places)), row["id"])))


def rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a result file; none if it is not there. Raises UserError for one that is no list of objects with an id."""
    if not path.exists():
        return []
    stored = read_json(path)
    if not isinstance(stored, list) or not all(isinstance(row, dict) and "id" in row for row in stored):
        raise UserError(f"{path} is not a list of objects with an id; delete it and run the benchmarks again")
    return stored


def table(folder: Path, columns: tuple[str, ...] = COLUMNS, ids: tuple[str, ...] = ()) -> str:
    """Markdown: the headline rows with these columns, of targets.json and the speed files. ids: those alone."""
    details = {row["id"]: row for path in sorted(folder.glob("speed-*.json")) for row in rows(path)}
    short = [row for row in rows(folder / "targets.json") if not ids or row["id"] in ids]
    if not short:
        raise UserError(f"{folder / 'targets.json'} holds no rows; run: python -m benchmarks.speed")
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for row in short:
        more = details.get(row["id"], {})
        loss = (more.get("loss") or {}).get("max_relative")
        cells = {
            "id": f"`{row['id']}`", "measured": more.get("what", ""), "ratio (95%; lowest to highest)": _ratio(row), "required": _required(row),
            "aim": _at_least(more.get("aim")), "ours": cost(more, "under") + same(more), "against": cost(more, "over"), "theirs": cost(more, "over"),
            "losses apart": "" if loss is None else f"{loss:.1g}" if loss < 1e-5 else f"{loss:.2%}", "share of the matmul rate, ours / theirs": share(more),
            "device, date": f"{row['hardware'].get('gpu') or row['hardware'].get('cpu')}, {row['date']}",
        }
        lines.append(f"| {' | '.join(cells[c] for c in columns)} |")
    return "\n".join(lines)


def _ratio(row: dict[str, Any]) -> str:
    """Bold where what is required is reached."""
    bold = "**" if row["verdict"].startswith("reached") else ""
    known = f"95%: {' to '.join(map(number, row['interval']))}" if row["interval"] else "no interval"
    return f"{bold}{number(row['ratio'])}x{bold} ({known}; {' to '.join(map(number, row['spread']))})"


def _required(row: dict[str, Any]) -> str:
    return ", ".join(filter(None, [_at_least(row["required"]), row["verdict"]]))


def grid(folder: Path) -> str:
    """Markdown: every workload of speed-wide.json that was measured against both peers, a line each."""
    stored = {row["id"]: row for row in rows(folder / "speed-wide.json")}
    pairs = [(row, stored.get(id.replace("-plain", "-tuned"), {})) for id, row in stored.items() if id.endswith("-plain")]
    if not pairs:
        raise UserError(f"{folder / 'speed-wide.json'} holds no workload against peer (a); run: python -m benchmarks.speed ids=wide")
    lines = [f"| {' | '.join(GRID_COLUMNS)} |", "| --- " * len(GRID_COLUMNS) + "|"]
    for plain, tuned in pairs:
        ours = plain.get("under") or {}
        tokens = f"{ours['tokens_per_s']:,.0f}" if ours.get("tokens_per_s") else ""
        ratios = [", ".join(filter(None, [f"{number(row['ratio'])}x", row.get("verdict")])) if row.get("ratio") else "" for row in (plain, tuned)]
        cells = [f"`{plain['id'].removesuffix('-plain')}`", *ratios, tokens, cost(plain, "under"), cost(plain, "over"), cost(tuned, "over")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def number(value: float) -> str:
    """Three significant digits at most, no exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _at_least(value: float | None) -> str:
    return "" if value is None else f"≥ {value:g}x"


def cost(record: dict[str, Any], side: str) -> str:
    """What a side took, geometric means over its repeats: seconds of a sweep or an evaluation, or milliseconds a step and the peak memory."""
    entry, took = record.get(side) or {}, values(record, side, "step_s")
    if not took:
        return ""
    if entry.get("wall_s"):
        return f"{number(speed_stats.geometric_mean(took))} s"
    peaks = values(record, side, "peak_bytes")
    peak = f", {speed_stats.geometric_mean(peaks) / 2**30:.1f} GiB" if peaks else ""
    return f"{number(speed_stats.geometric_mean(took) * 1e3)} ms{peak}"


def same(record: dict[str, Any]) -> str:
    """How many of an evaluation's answers are the other side's too."""
    answers = record.get("answers")
    return f", {answers['identical']:.1%} of the answers the same" if answers else ""


def share(record: dict[str, Any]) -> str:
    """Our achieved share of the measured matmul rate, and the other side's."""
    shares = [((record.get(side) or {}).get("limit") or {}).get("matmul_share") for side in ("under", "over")]
    return " / ".join(f"{value:.0%}" for value in shares if value is not None)
