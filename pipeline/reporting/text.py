"""The words of the report, made from its numbers: what came out, what is missing, what is not comparable, where it ran; and table.md.

Library of `python -m pipeline.report`. A technique's name stands in backticks; the HTML page sets it in bold.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.records.finished import Cell
from pipeline.records.runs import hardware_name
from pipeline.reporting import evaluated, overoptimisation
from pipeline.reporting import words as f
from pipeline.reporting.figures import METRICS, OTHER_MEMORY, Row, columns, interval, remarks
from pipeline.reporting.rows import by_group, common_notes, tier_notes, timing_notes
from pipeline.reporting.verdict import saying_of, sentences
from pipeline.stats.verdict import SLACK

NO_STEP = re.compile(r"because .+ has(?= no hand-written step)")
CURVES = 2  # sentences about learning curves in the opening
MANY = 8  # names that are all said; of more, the first three


def answer(rows: Sequence[Row]) -> list[str]:
    """The verdict, in sentences; with several numbers of training rows at the largest."""
    compared = _compared(rows)
    if not compared:
        return ["No technique of this experiment has a test result yet."]
    group = next(iter(by_group(compared).values()))
    verdict = group[0].verdict
    if verdict is None or verdict.name is None:
        return [_highest(group), "The answers to single rows are not kept, so nothing is said here about which differences are more than chance."]
    said = sentences(verdict, saying_of(group))
    return [f"With {rows_in_words(group[0].group)}: {said[0]}", *said[1:]] if len(by_group(compared)) > 1 else said


def opening(rows: Sequence[Row], grown: Sequence[str] = ()) -> list[str]:
    """What came out, in sentences: the verdict, what the techniques cost, and what other numbers of training rows or learning curves say.

    Args:
        grown: sentences about learning curves; the first few are taken.
    """
    return [*answer(rows), *context(rows, grown)]


def context(rows: Sequence[Row], grown: Sequence[str] = ()) -> list[str]:
    """What follows the verdict."""
    groups = by_group(_compared(rows))
    if not groups:
        return []
    (_, ranked), *others = groups.items()
    said = [_costs(ranked), *(grown[:CURVES] if grown else [f"With {rows_in_words(name)}: {answer(group)[0]}" for name, group in others]), _teacher(rows)]
    return [text.strip() for text in said if text]


def _compared(rows: Sequence[Row]) -> list[Row]:
    return [r for r in rows if r.test is not None and not r.teacher]


def _highest(ranked: Sequence[Row]) -> str:
    best = ranked[0]
    bounds = f" (95% interval {interval(best)})" if interval(best) else ""
    among = f", the highest of {len(ranked)} techniques" if len(ranked) > 1 else ", the only result so far"
    return f"`{best.technique}` reaches {f.percent(best.test)}% {METRICS.get(best.metric, best.metric)}{bounds}{among}."


def _close(rows: Sequence[Row]) -> list[Row]:
    """All rows, or of many those near to the first."""
    return list(rows) if len(rows) <= MANY else [r for r in rows if (rows[0].test or 0.0) - (r.test or 0.0) < SLACK + 1e-9]


def rows_in_words(group: str) -> str:
    """A group's number of training rows."""
    return "all training rows" if group == "all" else f"{int(group):,} training rows"


def _costs(ranked: list[Row]) -> str:
    """Among the trained techniques that hold up, the cheapest by time, memory and trained parameters."""
    near = [r for r in ranked if r.standing not in ("", "lower", "lost", "control")]
    good = [r for r in _close(near) if r.trainable]
    pool = good if len(good) > 1 else [r for r in ranked if r.trainable]
    claims = [
        _cheapest([r for r in pool if not r.timing and not r.begins], lambda r: r.train_s, f.duration, "trains fastest"),
        _cheapest(_one_kind(pool), lambda r: r.peak_bytes, f.size, "needs the least memory"),
        _cheapest(pool, lambda r: r.trainable, f.count, "trains the fewest parameters"),
    ]
    by_name: dict[str, list[str]] = {}
    for name, claim in filter(None, claims):
        by_name.setdefault(name, []).append(claim)
    if not by_name:
        return ""
    which = "that are not told apart" if len(near) <= MANY else f"within {f.percent(SLACK)} points of the highest"
    whom = f"Of the trained techniques {which}" if pool is good else "Of the trained techniques"
    return f"{whom}, " + "; ".join(f"`{name}` {f.listed(parts)}" for name, parts in by_name.items()) + "."


def _one_kind(rows: list[Row]) -> list[Row]:
    kinds = {r.memory_kind for r in rows if r.peak_bytes is not None}
    return [r for r in rows if r.timing not in OTHER_MEMORY] if len(kinds) == 1 else []


def _cheapest(rows: list[Row], cost: Callable[[Row], float | None], show: Callable[[float], str], claim: str) -> tuple[str, str] | None:
    """(name, claim with the figures of the cheapest and the dearest); None where they do not differ."""
    known = sorted(((value, r.technique) for r in rows if (value := cost(r))), key=lambda pair: pair[0])
    if len(known) < 2 or show(known[0][0]) == show(known[-1][0]):
        return None
    (low, cheap), (high, dear) = known[0], known[-1]
    if f.times(high / low) == f.times(1):
        return None
    return cheap, f"{claim} ({show(low)}; `{dear}`: {show(high)}, {f.times(high / low)} times as much)"


def _teacher(rows: Sequence[Row]) -> str:
    row = next((r for r in rows if r.teacher and r.test is not None), None)
    if row is None:
        return ""
    made = next((r.teacher for r in row.results if r.teacher), None)
    who = f"The teacher `{made.name}`" if made else "The teacher"
    return f"{who}, whose rationales the distilled techniques learn from, is right on {f.percent(row.test)}% itself."


def _few(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names) if len(names) <= most else f"{len(names)} cells, {', '.join(names[:most])}, …"


def warnings(rows: Sequence[Row], missing: Sequence[str]) -> list[str]:
    """What a reader must know before comparing: cells not run, diverged, out of memory, and conditions that differ between cells."""
    texts = [f"not run: {_few(missing)}"] if missing else []
    diverged = [c.result.cell for r in rows for c in r.cells if c.result.status == "diverged"]
    texts += [f"diverged, so without a figure: {_few(diverged)}"] if diverged else []
    lost = [c.result for r in rows for c in r.cells if c.result.status == "oom"]
    if lost:
        where = ", ".join(sorted({hardware_name(r.hardware) or "unknown hardware" for r in lost}))
        texts.append(f"out of memory on {where}: {', '.join(r.cell for r in lost)}")
    cells = [c for r in rows for c in r.cells if c.result.status == "ok"]
    for what, values in _conditions(cells).items():
        if len(values) > 1:
            texts.append(f"the cells differ in {what} ({'; '.join(values)}), so compare them with care")
    return texts + evaluated.told(rows)


def _conditions(cells: Sequence[Cell]) -> dict[str, list[str]]:
    """What should be the same for all cells, each with the values met."""
    results = [c.result for c in cells]
    asked = [r for r in results if r.method != "teacher"]
    return {
        "hardware": _values(_hardware(r.hardware) for r in asked),
        "base model": _values(_short(r.provenance.get("model_sha256")) for r in asked),
        "data": _values(_short(r.provenance.get("data_sha256")) for r in results),
        "number of test rows": _values(r.test.rows if r.test else None for r in results),
        "kind of memory counter": _values(r.memory.kind if r.memory else None for r in asked),
    }


def _values(values: Any) -> list[str]:
    return sorted({str(v) for v in values if v is not None})


def _short(digest: str | None) -> str | None:
    return digest and f"sha256 {digest[:12]}…"


def _hardware(hardware: dict[str, Any]) -> str | None:
    name = hardware_name(hardware)
    memory = hardware.get("gpu_memory_bytes") or hardware.get("memory_bytes")
    return f"{name}, {f.size(memory)}" if name and memory else name


def provenance(cells: Sequence[Cell]) -> list[tuple[str, list[str]]]:
    """Where the numbers come from: (what, the values met)."""
    results = [c.result for c in cells]
    sources = [r.provenance for r in results]
    times = sorted(str(p["started"])[:16].replace("T", " ") for p in sources if p.get("started"))
    commits = _values(_commit(p) for p in sources)
    packages = _values(f"{name} {version}" for p in sources for name, version in (p.get("packages") or {}).items())
    listed: list[tuple[str, list[str]]] = [
        ("Task", _values(r.task for r in results)),
        ("Data (sha256 of its manifest)", _values(p.get("data_sha256") for p in sources)),
        ("Base model", _values(r.model for r in results)),
        ("Base model (sha256)", _values(p.get("model_sha256") for p in sources)),
        ("Notes on every cell", common_notes(cells)),
        ("Hardware", _values(_hardware(r.hardware) for r in results)),
        ("Platform", _values(r.hardware.get("platform") for r in results)),
        ("Packages", [", ".join(packages)] if packages else []),
        ("Python", _values(p.get("python") for p in sources)),
        ("Code (git commit)", commits),
        ("Run (UTC)", [times[0] if times[0] == times[-1] else f"{times[0]} to {times[-1]}"] if times else []),
        ("Forgetting probes", _values(r.forgetting.probes for r in results if r.forgetting)),
    ]
    return [(what, values) for what, values in listed if values]


def _commit(source: dict[str, Any]) -> str | None:
    commit = source.get("git_commit")
    return commit and commit[:12] + (" with uncommitted changes" if source.get("git_dirty") else "")


TABLES = (
    ("name", "labelled_rows", "synthetic_rows", "test", "letters", "test_seed_high", "against_zero_shot"),
    ("name", "train_s", "made_s", "wall_s", "tokens_per_s", "peak_bytes", "trainable", "artefact_bytes"),
    ("name", "macro_f1", "pair_accuracy", "validation", "transfer", "perplexity_change", "pairs_change", "lambada_change", "latency_s"),
    ("name", "merged_bf16", "merged_nf4", "merged_int8", "merged_q8_0"),
)


def markdown(experiment: str, rows: Sequence[Row], missing: Sequence[str], extra: Sequence[str] = ()) -> str:
    """The opening, further sentences, the tables (result, cost, further figures, and where they were measured merges and lm-evaluation-harness's tasks;
    columns aligned, for a terminal too), and the notes."""
    shown, unmeasured = columns(rows)
    by_key = {c.key: c for c in shown}
    lines = [f"# {experiment}: alignment techniques compared", "", *_paragraph(opening(rows, extra))]
    lines += ["", *_paragraph(extra[CURVES:])] if extra[CURVES:] else []
    for keys in TABLES:
        columns_of_it = [by_key[k] for k in keys if k in by_key]
        if len(columns_of_it) < 2:
            continue
        table = [[c.title for c in columns_of_it], *([row.name, *(_joined(c.text(row), c.small(row)) for c in columns_of_it[1:])] for row in rows)]
        if keys is TABLES[0]:
            table = [[*table[0], ""], *([*line, "; ".join(remarks(row))] for line, row in zip(table[1:], rows, strict=True))]
        lines += ["", *_aligned(table)]
    heads, asked = evaluated.suites(rows)
    lines += ["", *_aligned([["Technique", *heads], *([row.name, *(_joined(*texts) for texts in line)] for row, line in asked)])] if asked else []
    lines += ["", *(f"- {text}" for text in [*warnings(rows, missing), *overoptimisation.sentences(rows), *_footnotes(rows, [c.title for c in unmeasured])])]
    return "\n".join(lines).rstrip() + "\n"


def _footnotes(rows: Sequence[Row], unmeasured: Sequence[str]) -> list[str]:
    cells = [c for r in rows for c in r.cells]
    notes = [f"not measured: {', '.join(unmeasured)}"] if unmeasured else []
    notes += tier_notes(rows) + timing_notes(rows)
    if any(interval(r) for r in rows):
        notes.append("brackets after accuracy: 95% interval; with several seeds from the lowest to the highest bound of theirs")
    return notes + common_notes(cells) + _notes_of_some(rows)


def _notes_of_some(rows: Sequence[Row]) -> list[str]:
    """Notes that not every row has, each once with whom it is of; of engines that were taken because each of several has no hand-written step, one."""
    by_note: dict[str, dict[str, str]] = {}
    for row, note in ((r, n) for r in rows for n in [*r.own_notes, *(f"engine: {c.engine}" for c in r.cells if c.engine)]):
        by_note.setdefault(NO_STEP.sub("because they have", note), {}).setdefault(row.name, note)
    return [f"{', '.join(of)}: {note if len(set(of.values())) > 1 else next(iter(of.values()))}" for note, of in by_note.items()]


def _paragraph(sentences: Sequence[str], width: int = 110) -> list[str]:
    return textwrap.wrap(" ".join(sentences), width, break_long_words=False, break_on_hyphens=False)


def _joined(main: str, small: str) -> str:
    return f"{main} ({small})" if small else main


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    safe = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in table]
    widths = [max(3, *(len(line[i]) for line in safe)) for i in range(len(safe[0]))]
    left = [i == 0 or not safe[0][i] for i in range(len(widths))]
    rule = "|" + "|".join("-" * (w + 2) if to_left else "-" * (w + 1) + ":" for w, to_left in zip(widths, left, strict=True)) + "|"
    lines = [[c.ljust(w) if to_left else c.rjust(w) for c, w, to_left in zip(line, widths, left, strict=True)] for line in safe]
    head, *body = ("| " + " | ".join(line) + " |" for line in lines)
    return [head, rule, *body]
