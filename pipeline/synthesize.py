"""A teacher's synthetic rows for a prepared task, in synthetic/<task>/<name>/: rows.jsonl and manifest.json.

    python -m pipeline.synthesize task=vader_movies synthetic=labels writer=local writer.temperature=0.9 train_rows=64
    python -m pipeline.synthesize task=instruct synthetic=taxonomy synthetic.seeds=my/taxonomy writer=server writer.temperature=0.9

From labelled training rows (synthetic.seeds=task: those that a cell of this seed and train_rows has, no others), or from InstructLab's qna.yaml
files. Rows near to a validation, test or transfer row are dropped and counted. The writer keeps its texts: an interrupted run goes on, and the
same command writes the same rows. docs/synthetic.md tells more.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline import prepare, settings, synthetic, tasks, taxonomy
from pipeline.config import build, entry, plain
from pipeline.data import load_rows
from pipeline.duplicates import Near
from pipeline.files import UserError, atomic_folder, read_jsonl, sha256, write_json, write_jsonl
from pipeline.sieve import Sieve, near_texts
from pipeline.synthesis import Draft, Writing, branches, check_words
from pipeline.synthetic import Synthesis
from pipeline.tasks import Recipe
from pipeline.taxonomy import Example, Leaf
from pipeline.teachers.writer import Writer

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Form:
    """How a question stands in the task's rows. recipe: the task's, its answer a column of its own name."""

    recipe: Recipe
    question: str
    context: str | None

    def row(self, name: str, number: int, draft: Draft) -> dict[str, Any]:
        """The task's row of a draft."""
        asked = draft.question
        if self.context is None and draft.branch.leaf.kind == "skill" and draft.context:
            asked = f"{draft.context}\n\n{asked}"
        fields = dict.fromkeys(tasks.columns_of(self.recipe.prompt, "task.prompt"), "") | {self.question: asked, "answer": draft.answer}
        if self.context is not None:
            fields[self.context] = draft.context
        row = tasks.make_row(self.recipe, fields, f"{name}-{number}", f"synthetic row {number}")
        assert row is not None
        return row

    def text(self, row: dict[str, Any]) -> str:
        """What of a row is compared: context and question, without the template's words."""
        return " ".join(tasks.text_of(row["fields"].get(column)) for column in (self.context, self.question) if column).strip()

    def example(self, row: dict[str, Any]) -> Example:
        context = tasks.text_of(row["fields"].get(self.context)) if self.context else ""
        return Example(tasks.text_of(row["fields"].get(self.question)), row["answer"], context, row["id"])


def run(cfg: DictConfig) -> int:
    """Write the synthetic rows of a composed config and say what came of it."""
    wanted = synthetic.read(cfg)
    _check(cfg, wanted)
    data = Path(cfg.paths.data) / cfg.task.name
    if not (data / "manifest.json").exists():
        raise UserError(f"{data} is not prepared; run: python -m pipeline.prepare task={cfg.task.name}")
    recipe = tasks.read(cfg)
    form = form_of(recipe, wanted)
    writer: Writer = build(cfg.writer, "writer")
    writer.check()
    if writer.temperature == 0:
        raise UserError("writer.temperature=0 writes the same text every time; set writer.temperature=0.9")
    train = read_jsonl(data / "train.jsonl")
    held_out = near_texts((form.text(row) for row in _held_out(data, recipe)), wanted.near)
    rows: Rows = []
    sets: dict[str, Any] = {}
    for tag, leaves in _sets(cfg, wanted, form).items():
        before = writer.spent.seconds
        known = near_texts([form.text(row) for row in train] + [_whole(e) for leaf in leaves for e in leaf.examples], wanted.near)
        found, told = written(wanted, form, leaves, writer, (held_out, known), tag)
        rows += found
        beside = sum(e.row is None for leaf in leaves for e in leaf.examples)
        sets[tag] = told | {"seconds": round(writer.spent.seconds - before, 3), "examples_beside": beside}
    about = _manifest(cfg, wanted, data, sets, writer.about())
    folder = synthetic.folder_of(cfg)
    with atomic_folder(folder, "manifest.json", "rows_sha256") as beside_it:
        write_jsonl(beside_it / "rows.jsonl", rows)
        write_json(beside_it / "manifest.json", about | {"rows_sha256": sha256(beside_it / "rows.jsonl")})
    for tag, told in sets.items():
        print(f"{folder / 'rows.jsonl'}, {'seed ' * (tag != 'all')}{tag}: {_told(told)}")
    if not rows:
        raise UserError(f"no row of {folder} came through the filters ({_told(next(iter(sets.values())))}); try a larger writer.model")
    return 0


def written(wanted: Synthesis, form: Form, leaves: Sequence[Leaf], writer: Writer, held: tuple[Near, Near], tag: str) -> tuple[Rows, dict[str, Any]]:
    """The rows of one set, and what its part of the manifest says. held: texts held out, and labelled ones."""
    writing = Writing(writer, wanted, Sieve(wanted, form.recipe, form.recipe.prompt, *held), tag)
    writing.run(branches(leaves, form.recipe.choice_list))
    rows = []
    for number, draft in enumerate(writing.kept, 1):
        row = form.row(f"{wanted.name}-{tag}", number, draft)
        rows.append(row | {"source": "synthetic", "set": tag, "leaf": draft.branch.leaf.path, "teacher": _teacher(writer), "seeds": draft.shown})
    unread = sorted({leaf.documents_at for leaf in leaves if leaf.documents_at})
    leaf_rows = {leaf.path: sum(draft.branch.leaf is leaf for draft in writing.kept) for leaf in leaves}
    return rows, writing.account() | {"labels": prepare.balance(rows), "leaves": leaf_rows} | ({"documents_not_read": unread} if unread else {})


def form_of(recipe: Recipe, wanted: Synthesis) -> Form:
    """Raises UserError where it is not clear which column a question fills, or rows bring choices of their own."""
    if isinstance(recipe.choices, str):
        raise UserError(f"rows of task {recipe.name} have choices of their own (column {recipe.choices!r}), synthetic ones have none; choose another task")
    columns = list(dict.fromkeys(tasks.columns_of(recipe.prompt, "task.prompt")))
    for key in ("question_column", "context_column"):
        if getattr(wanted, key) not in (None, *columns):
            raise UserError(f"synthetic.{key}={getattr(wanted, key)} is no column of task.prompt; it has {', '.join(columns)}")
    rest = [column for column in columns if column != wanted.context_column]
    if wanted.question_column is None and len(rest) != 1:
        told = f"task.prompt of {recipe.name} has the columns {', '.join(columns)}"
        raise UserError(f"{told}; say which of them a question fills: synthetic.question_column={columns[0]}")
    choices = tuple(recipe.choice_list) if recipe.choice_list else None
    return Form(replace(recipe, answer="{answer}", choices=choices, columns={}), wanted.question_column or rest[0], wanted.context_column)


def leaves_of(rows: Sequence[dict[str, Any]], wanted: Synthesis, form: Form, seed: int) -> list[Leaf]:
    """A task's labelled rows as a leaf: seed_rows of every answer (of all, without fixed choices), drawn with the cell's seed.

    Raises:
        UserError: an answer that none of the rows has.
    """
    choices = form.recipe.choice_list
    lacking = next((c for c in choices or () if not any(row["answer"] == c for row in rows)), None)
    if lacking is not None:
        raise UserError(f"none of the {len(rows)} labelled rows of seed {seed} has the answer {lacking!r}; raise train_rows")
    groups = [[row for row in rows if row["answer"] == choice] for choice in choices] if choices else [list(rows)]
    shown = [row for group in groups for row in group[: wanted.seed_rows]]  # rows come in the seed's order
    return [Leaf(f"task/{form.recipe.name}", "skill", wanted.description or "", tuple(form.example(row) for row in shown))]


def _sets(cfg: DictConfig, wanted: Synthesis, form: Form) -> dict[str, list[Leaf]]:
    """Leaves by set: of every seed its own, or one for all."""
    if wanted.seeds != synthetic.TASK:
        documents = Path(wanted.documents) if wanted.documents else None
        return {"all": taxonomy.read(Path(str(wanted.seeds)), documents, wanted.passage_words)}
    read, data = settings.read(cfg), Path(cfg.paths.data) / cfg.task.name
    found = {}
    for seed in wanted.row_seeds or (cfg.seed,):
        cell = load_rows(data, read.task, cfg.train_rows, seed, read.evaluate.validation_share, 0, 0)
        found[str(seed)] = leaves_of(cell.train, wanted, form, seed)
    return found


def _check(cfg: DictConfig, wanted: Synthesis) -> None:
    if wanted.name == "none":
        raise UserError("synthetic=none has nothing to write; choose synthetic=labels or synthetic=taxonomy")
    if wanted.seeds is None:
        raise UserError("config key 'synthetic.seeds' is missing; set it to a qna.yaml, to the folder of a taxonomy, or to task")
    if cfg.get("writer") is None:
        raise UserError("synthetic rows need a writer; add writer=local or writer=server")
    check_words(wanted)


def _held_out(data: Path, recipe: Recipe) -> Rows:
    files = [data / "validation.jsonl", data / "test.jsonl", *(data / "transfer" / f"{name}.jsonl" for name in recipe.transfer)]
    return [row for file in files for row in read_jsonl(file)]


def _whole(example: Example) -> str:
    return f"{example.context} {example.question}".strip()


def _teacher(writer: Writer) -> str:
    about = writer.about()
    return f"{about['kind']}:{about['model']}"


def _manifest(cfg: DictConfig, wanted: Synthesis, data: Path, sets: dict[str, Any], writer: dict[str, Any]) -> dict[str, Any]:
    source = {} if wanted.seeds == synthetic.TASK else {"seeds_sha256": sha256(Path(str(wanted.seeds)))}
    return {
        "synthetic": wanted.name, "task": cfg.task.name, "rows": sum(one["rows"] for one in sets.values()), "sets": sets,
        "seconds": writer.pop("seconds"), "teacher": f"{writer['kind']}:{writer['model']}", "writer": writer,
        "data_sha256": sha256(data / "manifest.json"), **source, "config": plain(cfg)["synthetic"],
    }


def _told(told: dict[str, Any]) -> str:
    dropped = ", ".join(f"{reason} {number}" for reason, number in told["dropped"].items()) or "none"
    return f"{told['rows']:,} rows of {told['asked']:,} texts asked for (dropped: {dropped})"


main = entry(run)

if __name__ == "__main__":
    sys.exit(main())
