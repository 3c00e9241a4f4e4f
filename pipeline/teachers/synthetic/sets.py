"""Writing a set of synthetic rows: its seeds, its form, its files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline.core import settings
from pipeline.core.compose import plain
from pipeline.core.files import UserError, sha256
from pipeline.data import recipe as tasks
from pipeline.data import splits
from pipeline.data.near import Near
from pipeline.data.recipe import Recipe
from pipeline.data.rows import load_rows, read_rows
from pipeline.teachers.synthetic import rows as synthetic
from pipeline.teachers.synthetic import taxonomy
from pipeline.teachers.synthetic.rows import Synthesis
from pipeline.teachers.synthetic.taxonomy import Leaf, SeedExample
from pipeline.teachers.synthetic.writing import Draft, Filter, Writing, branches, check_words
from pipeline.teachers.writers import Writer

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Form:
    """Which columns of the task's rows a question and its context fill. recipe: the task's, with its answer in the column `answer`."""

    recipe: Recipe
    question: str
    context: str | None

    def row(self, name: str, number: int, draft: Draft) -> dict[str, Any]:
        question = draft.question
        if self.context is None and draft.branch.leaf.kind == "skill" and draft.context:
            question = f"{draft.context}\n\n{question}"
        fields = dict.fromkeys(tasks.columns_of(self.recipe.prompt, "task.prompt"), "") | {self.question: question, "answer": draft.answer}
        if self.context is not None:
            fields[self.context] = draft.context
        row = tasks.make_row(self.recipe, fields, f"{name}-{number}", f"synthetic row {number}")
        assert row is not None
        return row

    def text(self, row: dict[str, Any]) -> str:
        """What of a row is compared: context and question, without the template's words."""
        return " ".join(_column(row, column) for column in (self.context, self.question) if column).strip()

    def example(self, row: dict[str, Any]) -> SeedExample:
        return SeedExample(_column(row, self.question), row["answer"], _column(row, self.context) if self.context else "", row["id"])


def _column(row: dict[str, Any], column: str) -> str:
    return tasks.column_text(row["fields"].get(column), column, f"row {row['id']}")


def write_set(wanted: Synthesis, form: Form, leaves: Sequence[Leaf], writer: Writer, known: tuple[Near, Near], tag: str) -> tuple[Rows, dict[str, Any]]:
    """The rows of one set, and its part of the manifest. known: held-out texts, and labelled ones."""
    writing = Writing(writer, wanted, Filter(wanted, form.recipe, form.recipe.prompt, *known), tag)
    writing.run(branches(leaves, form.recipe.choice_list))
    rows = []
    for number, draft in enumerate(writing.accepted, 1):
        row = form.row(f"{wanted.name}-{tag}", number, draft)
        rows.append(row | {"source": "synthetic", "set": tag, "leaf": draft.branch.leaf.path, "teacher": _teacher(writer), "seeds": draft.shown})
    unread = sorted({leaf.documents_at for leaf in leaves if leaf.documents_at})
    leaf_rows = {leaf.path: sum(draft.branch.leaf is leaf for draft in writing.accepted) for leaf in leaves}
    return rows, writing.report() | {"labels": splits.balance(rows), "leaves": leaf_rows} | ({"documents_not_read": unread} if unread else {})


def form_of(recipe: Recipe, wanted: Synthesis) -> Form:
    """Raises UserError where it is not clear which column a question fills, or every row has its own choices."""
    if isinstance(recipe.choices, str):
        raise UserError(f"rows of task {recipe.name} have their own choices (column {recipe.choices!r}), synthetic ones have none; choose another task")
    if recipe.messages is not None:
        raise UserError(f"rows of task {recipe.name} are conversations (column {recipe.messages!r}), which no teacher here writes; choose another task")
    columns = list(dict.fromkeys(tasks.columns_of(recipe.prompt, "task.prompt")))
    for key in ("question_column", "context_column"):
        if getattr(wanted, key) not in (None, *columns):
            raise UserError(f"synthetic.{key}={getattr(wanted, key)} is no column of task.prompt; it has {', '.join(columns)}")
    rest = [column for column in columns if column != wanted.context_column]
    if wanted.question_column is None and len(rest) != 1:
        what = f"task.prompt of {recipe.name} has the columns {', '.join(columns)}"
        raise UserError(f"{what}; say which of them a question fills: synthetic.question_column={columns[0]}")
    choices = tuple(recipe.choice_list) if recipe.choice_list else None
    return Form(replace(recipe, answer="{answer}", choices=choices, columns={}), wanted.question_column or rest[0], wanted.context_column)


def leaves_of(rows: Sequence[dict[str, Any]], wanted: Synthesis, form: Form, seed: int) -> list[Leaf]:
    """A task's labelled rows as a leaf: seed_rows of every answer (of all, without fixed choices), drawn with the cell's seed.

    Raises:
        UserError: an answer that none of the rows has.
    """
    choices = form.recipe.choice_list
    missing = next((c for c in choices or () if not any(row["answer"] == c for row in rows)), None)
    if missing is not None:
        raise UserError(f"none of the {len(rows)} labelled rows of seed {seed} has the answer {missing!r}; raise train_rows")
    groups = [[row for row in rows if row["answer"] == choice] for choice in choices] if choices else [list(rows)]
    shown = [row for group in groups for row in group[: wanted.seed_rows]]  # rows come in the seed's order
    return [Leaf(f"task/{form.recipe.name}", "skill", wanted.description or "", tuple(form.example(row) for row in shown))]


def sets_of(cfg: DictConfig, wanted: Synthesis, form: Form) -> dict[str, list[Leaf]]:
    """Leaves by set: a set for each seed, or one for all."""
    if wanted.seeds != synthetic.TASK:
        documents = Path(wanted.documents) if wanted.documents else None
        return {"all": taxonomy.read(Path(str(wanted.seeds)), documents, wanted.passage_words)}
    config, data = settings.read(cfg), Path(cfg.paths.data) / cfg.task.name
    sets = {}
    for seed in wanted.row_seeds or (cfg.seed,):
        cell = load_rows(data, config.task, cfg.train_rows, seed, config.evaluate.validation_share, 0, 0)
        sets[str(seed)] = leaves_of(cell.train, wanted, form, seed)
    return sets


def check(cfg: DictConfig, wanted: Synthesis) -> None:
    if wanted.name == "none":
        raise UserError("synthetic=none has nothing to write; choose synthetic=labels or synthetic=taxonomy")
    if wanted.seeds is None:
        raise UserError("config key 'synthetic.seeds' is missing; set it to a qna.yaml, to the folder of a taxonomy, or to task")
    if cfg.get("writer") is None:
        raise UserError("synthetic rows need a writer; add writer=local or writer=server")
    check_words(wanted)


def held_out_rows(data: Path, recipe: Recipe) -> Rows:
    files = [data / "validation.jsonl", data / "test.jsonl", *(data / "transfer" / f"{name}.jsonl" for name in recipe.transfer)]
    return [row for file in files for row in read_rows(file)]


def whole(example: SeedExample) -> str:
    return f"{example.context} {example.question}".strip()


def _teacher(writer: Writer) -> str:
    about = writer.about()
    return f"{about['kind']}:{about['model']}"


def manifest_of(cfg: DictConfig, wanted: Synthesis, data: Path, sets: dict[str, Any], writer: dict[str, Any]) -> dict[str, Any]:
    source = {} if wanted.seeds == synthetic.TASK else {"seeds_sha256": sha256(Path(str(wanted.seeds)))}
    return {
        "synthetic": wanted.name, "task": cfg.task.name, "rows": sum(one["rows"] for one in sets.values()), "sets": sets,
        "seconds": writer.pop("seconds"), "teacher": f"{writer['kind']}:{writer['model']}", "writer": writer,
        "data_sha256": sha256(data / "manifest.json"), **source, "config": plain(cfg)["synthetic"],
    }


def in_words(report: dict[str, Any]) -> str:
    dropped = ", ".join(f"{reason} {number}" for reason, number in report["dropped"].items()) or "none"
    return f"{report['rows']:,} rows of {report['asked']:,} texts asked for (dropped: {dropped})"
