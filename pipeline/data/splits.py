"""A task's rows as splits: assembled by its recipe, without leakage, drawn by a seed where the source has none."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

from pipeline.core.files import UserError, sha256
from pipeline.data import recipe as tasks
from pipeline.data.near import normalised
from pipeline.data.recipe import Recipe
from pipeline.data.sources import Loaded

SPLITS = ("train", "validation", "test")
DRAWN = {"test": 0.2, "validation": 0.1}
FEW_ROWS = {"validation": 2, "test": 20}
"""Rows of a split below which a warning is given: one validation row, or fewer test rows than tell 50% from 70%."""
INLINE_CHOICES = 16
"""Of more choices, the same for all rows, a prepared row holds none: the manifest does, once."""
CONTRADICTING = 0.1
"""The largest share of a set's rows that may contradict others; from there on the labels are what has to be fixed first."""
Rows = list[dict[str, Any]]
Sets = dict[str, Rows]
Counts = dict[str, dict[str, int]]


def assemble(recipe: Recipe, loaded: Loaded) -> tuple[Sets, Counts]:
    """The final rows of every split and transfer set, and how many rows were left out, by reason and set. Labels that the recipe does not list are those of
    the training rows.

    Raises:
        UserError: a row that does not fit the task, leakage, too few rows, a label that training never saw.
    """
    _check_names(recipe, loaded)
    if recipe.takes_labels:
        recipe = tasks.with_labels(recipe, loaded.sets["train"], _place(loaded, "train"))
    dropped: Counts = {"unlabelled": {}, "duplicate": {}, "contradicting": {}, "leaked": {}, "unused": {}}
    sets = {}
    for name, raw in loaded.sets.items():
        rows = _rendered(recipe, loaded, name, raw)
        dropped["unlabelled"][name] = len(raw) - len(rows)
        sets[name] = _distinct(recipe, rows, name, dropped, _place(loaded, name))
    sets = _without_leakage(recipe, sets, dropped["leaked"])
    sets = _drawn(recipe, sets, dropped["unused"])
    _check_labels(recipe, sets, loaded)
    return sets, dropped


def balance(rows: Rows) -> dict[str, int]:
    """Rows by answer, in the order of the choices; where every row has other choices, by its place among the choices."""
    lists = {tuple(row["choices"] or ()) for row in rows}
    if lists == {()} or not rows:
        return {"distinct answers": len({row["answer"] for row in rows})}
    if len(lists) == 1:
        counts = Counter(row["answer"] for row in rows)
        return {choice: counts[choice] for choice in rows[0]["choices"]}
    places = Counter(row["choices"].index(row["answer"]) for row in rows)
    return {f"choice {place + 1}": places[place] for place in sorted(places)}


def file_of(name: str) -> str:
    return f"{name}.jsonl" if name in SPLITS else f"transfer/{name}.jsonl"


def in_words(counts: dict[str, int]) -> str:
    if len(counts) > INLINE_CHOICES:
        rows = sorted(counts.values())
        return f" ({len(counts)} labels of {rows[0]:,} to {rows[-1]:,} rows, median {rows[len(rows) // 2]:,})"
    return " (" + ", ".join(f"{count:,} {what}" for what, count in counts.items()) + ")"


def _place(loaded: Loaded, name: str) -> str:
    return loaded.places.get(name, name)


def _check_names(recipe: Recipe, loaded: Loaded) -> None:
    if "train" not in loaded.sets:
        raise UserError(
            f"the source of task {recipe.name} has no set named train, only {', '.join(loaded.sets)}; "
            "name one train in task.source"
        )
    extra = [name for name in loaded.sets if name not in SPLITS]
    if sorted(extra) != sorted(recipe.transfer):
        raise UserError(f"task.transfer lists {list(recipe.transfer)}, but the source's extra sets are {extra}; make them agree")


def _rendered(recipe: Recipe, loaded: Loaded, name: str, raw: Rows) -> Rows:
    stem = name if "test" in loaded.sets or name != "train" else "row"
    rows = (tasks.make_row(recipe, row, f"{stem}-{n}", f"row {n} of {_place(loaded, name)}") for n, row in enumerate(raw, 1))
    return [row for row in rows if row is not None]


def _distinct(recipe: Recipe, rows: Rows, name: str, dropped: Counts, place: str) -> Rows:
    """Every text once, as its first row has it. Rows that give it another of the same choices, or another answer to generate, contradict that one.

    Raises:
        UserError: more than CONTRADICTING of the rows do, where answers are chosen (a text may have several answers to generate).
    """
    first: dict[str, dict] = {}
    others = []
    for row in rows:
        earlier = first.setdefault(normalised(row["prompt"]), row)
        if row["answer"] != earlier["answer"] and set(row["choices"] or ()) == set(earlier["choices"] or ()):
            others.append((earlier, row))
    dropped["contradicting"][name] = len(others)
    dropped["duplicate"][name] = len(rows) - len(first) - len(others)
    if recipe.scoring == "choice" and len(others) > CONTRADICTING * len(rows):
        one, other = others[0]
        raise UserError(
            f"{len(others)} of the {len(rows)} rows of {place} have a text that stands there before with another answer (first: {one['id']} has "
            f"{one['answer']!r}, {other['id']} has {other['answer']!r}); fix their answers, or remove them"
        )
    return list(first.values())


def case_variants(sets: Sets) -> list[list[str]]:
    """Spellings of one answer that differ in case alone, the commonest answer's first; generated answers are compared without it."""
    spelt: dict[str, Counter[str]] = {}
    for row in (row for rows in sets.values() for row in rows if not row["choices"]):
        spelt.setdefault(row["answer"].casefold(), Counter())[row["answer"]] += 1
    return [sorted(spellings) for spellings in sorted(spelt.values(), key=lambda c: -c.total()) if len(spellings) > 1]


def _without_leakage(recipe: Recipe, sets: Sets, dropped: dict[str, int]) -> Sets:
    """The split with fewer rows to spare keeps a shared text: test, then validation, then train; a transfer set last."""
    seen: dict[str, tuple[str, str]] = {}
    left: Sets = {}
    for name in (*reversed(SPLITS), *recipe.transfer):
        if name not in sets:
            continue
        keys = {normalised(row["prompt"]): row for row in sets[name]}
        shared = [key for key in keys if key in seen]
        if shared and recipe.leakage == "error":
            (where, twin), row = seen[shared[0]], keys[shared[0]]
            raise UserError(
                f"{len(shared)} of the texts of {name} stand in another split too (first: {row['id']}, which {where} has as {twin}); "
                "remove them from one file, or set task.leakage=drop"
            )
        left[name] = [row for key, row in keys.items() if key not in seen]
        dropped[name] = len(shared)
        if name in SPLITS:
            seen.update({key: (name, row["id"]) for key, row in keys.items() if key not in seen})
    return {name: left[name] for name in sets}


def _drawn(recipe: Recipe, sets: Sets, dropped: dict[str, int]) -> Sets:
    """Every set in its fixed shuffled order; missing splits taken from train, sizes unchanged."""
    sizes, pool = recipe.sizes, len(sets["train"])
    drawn = {name: _count(DRAWN[name] if getattr(sizes, name) is None else getattr(sizes, name), pool) for name in DRAWN if name not in sets}
    stratify = recipe.choice_list is not None and (sizes.stratify if sizes.stratify is not None else _leaves_out(sets["train"], drawn, sizes.seed))
    shuffled = {name: _shuffled(rows, f"{sizes.seed}/{name}") for name, rows in sets.items()}
    final: Sets = {"train": shuffled["train"]}
    for name in ("test", "validation"):
        if name in shuffled:
            final[name] = _first(shuffled[name], getattr(sizes, name), name)
            dropped[name] = len(shuffled[name]) - len(final[name])
        else:
            final[name], final["train"] = (_by_label if stratify else _from_start)(final["train"], drawn[name])
    if not final["train"]:
        raise UserError(f"{pool} rows are too few for task.split ({_asked(sizes)}); ask for less or add rows")
    left = len(final["train"])
    final["train"] = _first(final["train"], sizes.train, "train", pool)
    dropped["train"] = left - len(final["train"])
    return {**{name: final[name] for name in SPLITS}, **{name: shuffled[name] for name in recipe.transfer}}


def _from_start(rows: Rows, count: int) -> tuple[Rows, Rows]:
    return rows[:count], rows[count:]


def _by_label(rows: Rows, count: int) -> tuple[Rows, Rows]:
    """`count` rows in which every answer has its share of all rows, to a row, and the others; an answer's last row stays among those. Both keep their order."""
    counts = Counter(row["answer"] for row in rows)
    exact = {answer: count * of / len(rows) for answer, of in counts.items()}
    quota = {answer: min(int(share), counts[answer] - 1) for answer, share in exact.items()}
    while sum(quota.values()) < min(count, len(rows)):
        open_ = [answer for answer in quota if quota[answer] < counts[answer] - 1] or [answer for answer in quota if quota[answer] < counts[answer]]
        quota[max(open_, key=lambda answer: (quota[answer] == 0, exact[answer] - quota[answer]))] += 1
    taken: Rows = []
    left: Rows = []
    for row in rows:
        quota[row["answer"]] -= 1
        (taken if quota[row["answer"]] >= 0 else left).append(row)
    return taken, left


def _leaves_out(rows: Rows, drawn: dict[str, int], seed: int) -> bool:
    """Whether splits drawn without a look at their labels would leave one out that has a row for each of them."""
    left, parts = _shuffled(rows, f"{seed}/train"), []
    for count in drawn.values():
        part, left = _from_start(left, count)
        parts.append({row["answer"] for row in part})
    common = {answer for answer, count in Counter(row["answer"] for row in rows).items() if count > len(drawn)}
    return any(common - part for part in [*parts, {row["answer"] for row in left}])


def _shuffled(rows: Rows, seed: str) -> Rows:
    return random.Random(seed).sample(rows, len(rows))


def _count(size: int | float, rows: int) -> int:
    return max(1, round(size * rows)) if size < 1 else int(size)


def _first(rows: Rows, size: int | float | None, name: str, share_of: int | None = None) -> Rows:
    count = len(rows) if size is None else _count(size, share_of or len(rows))
    if count > len(rows):
        raise UserError(f"task.split.{name} is {size}, but {len(rows)} rows are left for it; ask for at most that")
    return rows[:count]


def _asked(sizes: tasks.Split) -> str:
    return ", ".join(f"{name} {getattr(sizes, name) or DRAWN.get(name, 'the rest')}" for name in SPLITS)


def _check_labels(recipe: Recipe, sets: Sets, loaded: Loaded) -> None:
    empty = next((name for name, rows in sets.items() if not rows), None)
    if empty:
        raise UserError(f"no rows are left for {empty} of task {recipe.name} (source: {_place(loaded, empty)}); add rows to it")
    if recipe.scoring != "choice":
        return
    seen = {row["answer"] for row in sets["train"]}
    if len(seen) < 2:
        raise UserError(
            f"all {len(sets['train'])} training rows of task {recipe.name} have the answer {seen.pop()!r}; "
            "training needs two at least"
        )
    if recipe.choice_list is None:
        return
    for name, rows in sets.items():
        row = next((row for row in rows if row["answer"] not in seen), None)
        if row:
            raise UserError(
                f"{name} has the label {row['answer']!r} ({row['id']}), which training never saw; "
                "add such rows to train, or leave it out"
            )


def stored(recipe: Recipe, rows: Rows) -> Rows:
    """The rows as they are written: without the choices where the manifest has them."""
    return [{key: value for key, value in row.items() if key != "choices"} for row in rows] if shared_choices(recipe) else rows


def shared_choices(recipe: Recipe) -> list[str] | None:
    """The choices that stand in the manifest in the place of every row; None where rows have their own, or they are few."""
    return recipe.choice_list if recipe.choice_list and len(recipe.choice_list) > INLINE_CHOICES else None


def warnings(recipe: Recipe, sets: Sets) -> list[str]:
    """What a user should know of the splits before a model is trained on them."""
    said = [f"{name} has {len(sets[name])} row{'s' * (len(sets[name]) > 1)}, which tell next to nothing; add rows"
            for name in ("validation", "test") if len(sets[name]) < FEW_ROWS[name]]
    if recipe.choice_list is None:
        return said
    for name, rows in sets.items():
        lacking = [choice for choice in recipe.choice_list if choice not in {row["answer"] for row in rows}]
        said += [f"{name} has no row of {named(lacking)}"] if lacking else []
    return said


def named(labels: list[str], most: int = 5) -> str:
    """The labels in words; of many, the first few and how many more there are."""
    more = f" and {len(labels) - most} more" if len(labels) > most else ""
    return f"{len(labels)} label{'s' * (len(labels) > 1)} ({', '.join(labels[:most])}{more})"


def left_out(dropped: Counts) -> Counts:
    """The counts as the manifest has them: sets of which nothing was left out are not listed, nor is contradicting where nothing does."""
    counts = {reason: {name: count for name, count in by_set.items() if count} for reason, by_set in dropped.items()}
    return {reason: by_set for reason, by_set in counts.items() if by_set or reason != "contradicting"}


def manifest_of(recipe: Recipe, task: dict[str, Any], loaded: Loaded, sets: Sets, dropped: Counts, folder: Path) -> dict[str, Any]:
    return {
        "task": recipe.name,
        "rows": {name: len(rows) for name, rows in sets.items()},
        "labels": {name: balance(rows) for name, rows in sets.items()},
        "left_out": left_out(dropped),
        "sha256": {file_of(name): sha256(folder / file_of(name)) for name in sets},
        "source": loaded.origin,
        "licence": recipe.licence,
        "seed": recipe.sizes.seed,
        "config": task,
    } | ({"choices": choices} if (choices := shared_choices(recipe)) else {})
