"""A task's YAML, and the rows that it makes of a source's columns.

Library. `python -m pipeline.prepare task=<name>` reads conf/task/<name>.yaml. A task of your own:

    name: reviews                                # the folder under data/
    source: {type: files, files: my/reviews.csv}
    prompt: "Review: {text}\\nSentiment:"          # {column}; \\n starts a new line
    answer: {column: stars, bins: {negative: [1, 2], positive: [4, 5]}}
    scoring: choice

source    type: files (JSONL, CSV, TSV, Parquet), hub or registry; what it gives no validation or test rows
          for is drawn from its training rows. Sets of any other name are transfer test sets, listed under `transfer`.
columns   {new: old} renames a source's columns; a dot reaches into a nested one ({options: choices.text}), and to an element of a list ({first: choices.0}).
prompt    a template of columns. A list is joined by commas, a whole float loses its ".0", null is empty. Bytes, objects, NaN and a list with null
          inside are refused, with row and column.
messages  in the place of prompt: the column of a row's conversation, OpenAI's messages or ShareGPT's (docs/data.md). Without `answer` the last assistant
          turn is the answer, what comes before it the prompt; a row without one is left out and counted. The model's chat template stands around it.
system    a template of columns: the system turn of a prompt, or of a conversation that has none (chat alone).
tools     the column of what the assistant may call, which is put into the system turn as text.
answer    a template ("{label}"), or one column made into words:
            {column: label, labels: {0: negative, 1: positive, 2: null}}   words for values
            {column: stars, bins: {negative: [null, 2], positive: [4, null]}}   words for numbers; both ends belong to a
                bin, null is open, the first bin that fits counts
            {column: key, of: options}   an element of a list column, by its number from 0 or its letter from A
            {column: total, number: true}   the number as plain text (42, not 42.0)
            {column: label}                the value as it stands
          A row whose label is null, or whose number is in no bin, is left out and counted.
choices   a fixed list of words, or the name of a list column; left out, the words of labels or bins, or else the answers that the training rows have
          (up to 300, counted when prepared).
split     {seed: 0, train: null, validation: null, test: null}: rows, or a share below 1 of what they are drawn from;
          null takes all that there is (drawn: a tenth for validation, a fifth for test). stratify: true draws every label in its share,
          false without a look at them, null the first where the second would leave a label out.
leakage   error (the default) or drop: what to do with a text that stands in two splits.
licence   of the data, as stated there.

The other keys (scoring, metric, format, separator, …) are those of class Task in pipeline/core/settings.py.
"""

from __future__ import annotations

import functools
import math
import reprlib
import string
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from omegaconf import DictConfig

from pipeline.core.compose import plain
from pipeline.core.files import UserError
from pipeline.core.names import name_of
from pipeline.core.schema import unwritable
from pipeline.core.settings import Seed, Task, build
from pipeline.data.conversations import Turns, normalised, transcript

KINDS = ("labels", "bins", "of", "number")
MOST_LABELS = 300
"""Different answers that are taken for labels; more look like free text."""


@dataclass(frozen=True)
class Split:
    """Sizes in rows (int) or as shares (float) of the rows that they are drawn from."""

    seed: Seed = 0
    stratify: bool | None = None
    """Whether drawn validation and test rows have the labels in their shares of all rows; null: where a plain draw would leave a label out."""
    train: int | float | None = None
    validation: int | float | None = None
    test: int | float | None = None

    def check(self) -> None:
        for key in ("train", "validation", "test"):
            size = getattr(self, key)
            if size is not None and (size <= 0 or size >= 1 and size != int(size)):
                raise UserError(f"config key 'task.split.{key}' is {size}; give a number of rows, or a share between 0 and 1")


@dataclass(frozen=True)
class Answer:
    """A column and how its value becomes the answer."""

    column: str
    labels: dict | None = None
    bins: dict | None = None
    of: str | None = None
    number: bool = False

    def check(self) -> None:
        chosen = [kind for kind in KINDS if getattr(self, kind)]
        if len(chosen) > 1:
            raise UserError(f"config key 'task.answer' takes one of {', '.join(KINDS)} beside column, not {' and '.join(chosen)}")
        for word, ends in (self.bins or {}).items():
            numbers = isinstance(ends, (list, tuple)) and len(ends) == 2 and all(e is None or isinstance(e, (int, float)) for e in ends)
            if not numbers or None not in ends and not ends[0] <= ends[1]:
                raise UserError(f"config key 'task.answer.bins.{word}' is {ends}; give [lowest, highest], null where it is open")
        check_words("task.answer.labels", [word for word in (self.labels or {}).values() if word is not None])
        check_words("task.answer.bins", self.bins or ())

    @functools.cached_property
    def by_text(self) -> dict[str, Any]:
        """The labels by what their values are as texts. Raises UserError where two are the same, or one is none."""
        labels: dict[str, Any] = {}
        for value, word in (self.labels or {}).items():
            text = _word("task.answer.labels", value)
            if text in labels:
                raise UserError(f"config key 'task.answer.labels' lists {text!r} twice; take one out")
            labels[text] = word
        return labels

    @property
    def words(self) -> tuple[str, ...]:
        named = self.labels.values() if self.labels else self.bins or ()
        return tuple(dict.fromkeys(text_of(word) for word in named if word is not None))


@dataclass(frozen=True, kw_only=True)
class Recipe(Task):
    """All keys of a task's YAML; the opening of this file says what each takes."""

    source: dict
    prompt: str = ""
    answer: str | dict | None = None
    system: str | None = None
    tools: str | None = None
    columns: dict = field(default_factory=dict)
    choices: tuple | str | None = None
    split: dict = field(default_factory=dict)
    leakage: Literal["error", "drop"] = "error"
    licence: str = "not stated"

    def check(self) -> None:
        super().check()
        name_of(self.source, "task.source")
        self._check_turns()
        for key in ("prompt", "answer"):
            value = getattr(self, key)
            if isinstance(value, str) and value and not columns_of(value, f"task.{key}"):
                raise UserError(f"config key 'task.{key}' is {value!r}; name at least one column in braces, as in {{text}}")
        if isinstance(self.choices, tuple):
            check_words("task.choices", self.choices)
        if self.scoring == "choice" and self.choices is None and self.answer is None:
            raise UserError("config key 'task.choices' is missing; list the answers to choose from, or name the column that holds a row's own")

    def _check_turns(self) -> None:
        missing = next((key for key in ("prompt", "answer") if not getattr(self, key)), None)
        if self.messages is None and missing:
            raise UserError(f"config key 'task.{missing}' is missing; set it, or name the column of conversations: task.messages")
        if self.messages is not None and self.prompt:
            raise UserError("config keys 'task.messages' and 'task.prompt' both say what is asked; take one out")
        if self.tools is not None and self.messages is None:
            raise UserError("config key 'task.tools' goes with task.messages; write the tools into task.system, or take it out")
        if self.system is not None and self.messages is None and not self.chat:
            raise UserError("config key 'task.system' needs the model's chat template; set task.format=chat, or begin task.prompt with it")

    @functools.cached_property
    def spec(self) -> Answer | None:
        """The answer as a column and its treatment; None where it is a template."""
        return build(Answer, dict(self.answer), "task.answer") if isinstance(self.answer, dict) else None

    @property
    def takes_labels(self) -> bool:
        """Whether the choices are the answers that the training rows have (`with_labels`): nothing else says what they are."""
        return self.scoring == "choice" and self.choices is None and self.choice_list is None and self.answer is not None

    @property
    def sizes(self) -> Split:
        return build(Split, dict(self.split), "task.split")

    @functools.cached_property
    def choice_list(self) -> list[str] | None:
        """The fixed choices; None where every row brings its own, or answers are generated."""
        if isinstance(self.choices, tuple):
            return [text_of(choice) for choice in self.choices]
        spec = self.spec
        return list(spec.words) if spec and spec.words and self.scoring == "choice" and self.choices is None else None


def read(cfg: DictConfig) -> Recipe:
    """The checked task of a composed config. Raises UserError naming the key."""
    recipe: Recipe = build(Recipe, plain(cfg)["task"], "task")
    recipe.sizes  # noqa: B018  a wrong size must show before anything is fetched
    return recipe


def with_labels(recipe: Recipe, rows: Iterable[dict[str, Any]], place: str) -> Recipe:
    """The recipe with the answers of the training rows as its choices, in the order of their texts (numbers by value).

    Args:
        rows: the source's. place: where they are from, for the messages.

    Raises:
        UserError: a row without an answer, or more than MOST_LABELS different ones.
    """
    counts: Counter[str] = Counter()
    for number, raw in enumerate(rows, 1):
        where = f"row {number} of {place}"
        answer = _answer(recipe, _renamed(recipe, raw, where), where)
        if not answer:
            raise UserError(f"{where} has an empty answer; fill or remove that row, or list the labels (null leaves rows out): "
                            "task.answer={column: …, labels: {…}}")
        counts[answer] += 1
    if len(counts) > MOST_LABELS:
        few = ", ".join(f"{word!r} ({count})" for word, count in counts.most_common(3))
        raise UserError(f"{place} has {len(counts):,} different answers (most often: {few}), more than the {MOST_LABELS} that labels are taken from; "
                        "task.scoring=generate has the model write its answer, task.choices lists what it may choose from")
    names = sorted(counts, key=lambda word: (_order(word), word))
    chosen: Recipe = replace(recipe, choices=tuple(names))
    check_words("task.choices", chosen.choices or ())
    return chosen


def _order(word: str) -> tuple[int, float]:
    try:
        return 0, float(word)
    except ValueError:
        return 1, 0.0


def text_of(value: Any) -> str:
    """A value as it stands in a prompt or an answer.

    Raises:
        ValueError: it has no text: bytes, an object, a list with null or a list inside, no finite number, characters that no file can hold.
    """
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        if any(item is None or isinstance(item, (list, tuple)) for item in value):
            raise ValueError("a list with null or another list inside")
        if (nested := next((item for item in value if isinstance(item, dict)), None)) is not None:
            text_of(nested)
        return ", ".join(map(text_of, value))
    if isinstance(value, bytes):
        raise ValueError("bytes and no text")
    if isinstance(value, dict):
        if {"role", "content"} <= set(value) or {"from", "value"} <= set(value):
            raise ValueError("a conversation and no text: name its column in task.messages, in the place of task.prompt and task.answer (docs/data.md)")
        raise ValueError("an object and no text: name what is inside it with a dot, as in {column.key}")
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("no finite number")
        value = int(value) if value.is_integer() else value
    text = str(value).strip()
    if reason := unwritable(text):
        raise ValueError(f"a text with {reason}")
    return text


def columns_of(template: str, key: str) -> list[str]:
    """The columns that a template names. Raises UserError for braces that do not pair."""
    return [name for _, name in _parts(template, key) if name is not None]


def make_row(recipe: Recipe, raw: dict[str, Any], identity: str, where: str) -> dict[str, Any] | None:
    """The task's row of a source's row: id, prompt, answer, choices, fields; None where it has no label.

    Args:
        where: the row in words, for the messages ("row 3 of train").

    Raises:
        UserError: a missing column, an unknown label, an empty prompt or answer, an answer that is no choice.
    """
    fields = _renamed(recipe, raw, where)
    turns, said = ([], None) if recipe.messages is None else _conversation(recipe, fields, where)
    answer = said if recipe.answer is None else _answer(recipe, fields, where)
    if answer is None:
        return None
    if recipe.messages is None:
        system = _system(recipe, fields, where)
        turns = [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": _asked(recipe, fields, where)}]
    if not any(turn["role"] == "user" for turn in turns):
        raise UserError(f"{where} has no user turn before the answer; fix or remove that row")
    if not answer:
        raise UserError(f"{where} has an empty answer; fill or remove that row, or map its label to null")
    choices = _choices(recipe, fields, where)
    if choices is not None and answer not in choices:
        raise UserError(
            f"{where} has the answer {answer!r}, which is none of its choices ({', '.join(choices)}); "
            "fix the row or task.choices"
        )
    try:
        row = {"id": identity, "prompt": turns[0]["content"], "answer": answer, "choices": choices, "fields": _plain(fields)}
    except RecursionError as error:
        raise UserError(f"{where} is nested too deeply to be kept; fix or remove that row") from error
    return row if recipe.messages is None and recipe.system is None else {**row, "prompt": transcript(turns), "messages": turns}


def _system(recipe: Recipe, fields: dict[str, Any], where: str) -> str:
    return "" if recipe.system is None else _fill(recipe.system, fields, "task.system", where)


def _conversation(recipe: Recipe, fields: dict[str, Any], where: str) -> tuple[Turns, str | None]:
    """The turns before the answer, and the last assistant turn, which is it (None: there is none, or `answer` says what it is). What was said after it is
    left out. Takes the conversation out of the fields."""
    assert recipe.messages is not None
    system = _system(recipe, fields, where)
    tools = None if recipe.tools is None else _look(fields, recipe.tools, "task.tools", where)
    turns = normalised(_look(fields, recipe.messages, "task.messages", where), where, recipe.messages, system, tools)
    for key in filter(None, (recipe.messages, recipe.tools)):
        fields.pop(key, None)
    if recipe.answer is not None:
        return turns, None
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)
    return (turns, None) if last is None else (turns[:last], turns[last]["content"])


def _asked(recipe: Recipe, fields: dict[str, Any], where: str) -> str:
    """The prompt's template filled. Raises UserError where none of its columns has a text."""
    if not any(column_text(_look(fields, name, "task.prompt", where), name, where) for name in columns_of(recipe.prompt, "task.prompt")):
        raise UserError(f"{where} has no text in the columns of task.prompt; fill or remove that row")
    return _fill(recipe.prompt, fields, "task.prompt", where)


def column_text(value: Any, column: str, where: str) -> str:
    """`text_of`, of a row's value. where: the row in words. Raises UserError naming the row and the column where it has none."""
    try:
        return text_of(value)
    except ValueError as error:
        raise UserError(f"{where} has {column}={reprlib.repr(value)}, which is {error}; fix or remove that row") from error


def _renamed(recipe: Recipe, raw: dict[str, Any], where: str) -> dict[str, Any]:
    fields = {name: value for name, value in raw.items() if name not in recipe.columns.values()}
    return fields | {new: _look(raw, str(old), f"task.columns.{new}", where) for new, old in recipe.columns.items()}


def _look(fields: dict[str, Any], path: str, key: str, where: str) -> Any:
    if path in fields:
        return fields[path]
    value: Any = fields
    for part in path.split("."):
        if isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
            continue
        if not isinstance(value, dict) or part not in value:
            raise UserError(f"{key} names the column {path!r}, which {where} does not have; there are: {', '.join(map(str, fields))}")
        value = value[part]
    return value


def _parts(template: str, key: str) -> list[tuple[str, str | None]]:
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"config key '{key}' is {template!r} ({error}); write {{{{ and }}}} for braces that are text") from error
    wrong = next((name for _, name, spec, conversion in parts if spec or conversion or name == ""), None)
    if wrong is not None:
        raise UserError(f"config key '{key}' is {template!r}; braces hold the name of a column and nothing else")
    return [(text, name) for text, name, _, _ in parts]


def _fill(template: str, fields: dict[str, Any], key: str, where: str) -> str:
    parts = _parts(template, key)
    return "".join(text + ("" if name is None else column_text(_look(fields, name, key, where), name, where)) for text, name in parts).strip()


def _answer(recipe: Recipe, fields: dict[str, Any], where: str) -> str | None:
    if isinstance(recipe.answer, str):
        return _fill(recipe.answer, fields, "task.answer", where)
    spec = recipe.spec
    assert spec is not None
    value = _look(fields, spec.column, "task.answer.column", where)
    if spec.labels is not None:
        words, text = spec.by_text, column_text(value, spec.column, where)
        if text not in words:
            raise UserError(
                f"{where} has {spec.column}={value!r}, which task.answer.labels does not list; "
                "add it (null leaves such rows out)"
            )
        word = words[text]
        return None if word is None else text_of(word)
    if spec.of is not None:
        return _element(_look(fields, spec.of, "task.answer.of", where), value, spec, where)
    if not spec.number and spec.bins is None:
        return column_text(value, spec.column, where)
    number = _number(value, spec.column, where)
    if spec.number:
        return text_of(number)
    return next((text_of(word) for word, ends in (spec.bins or {}).items() if _inside(number, *ends)), None)


def _inside(number: float, low: float | None, high: float | None) -> bool:
    return (low is None or number >= low) and (high is None or number <= high)


def _number(value: Any, column: str, where: str) -> float:
    try:
        number = float(str(value).replace(",", ""))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{where} has {column}={value!r}, which is not a number; fix or remove that row")
    return number


def _element(options: Any, value: Any, spec: Answer, where: str) -> str:
    text = column_text(value, spec.column, where)
    index = int(text) if text.isdecimal() else ord(text.upper()) - ord("A") if len(text) == 1 else -1
    if not isinstance(options, list) or not 0 <= index < len(options):
        raise UserError(
            f"{where} has {spec.column}={value!r}, which is no place (0, 1, … or A, B, …) in the list {spec.of}; "
            "fix or remove that row"
        )
    return column_text(options[index], str(spec.of), where)


def _choices(recipe: Recipe, fields: dict[str, Any], where: str) -> list[str] | None:
    if not isinstance(recipe.choices, str):
        return recipe.choice_list
    options = _look(fields, recipe.choices, "task.choices", where)
    if not isinstance(options, list) or len(options) < 2:
        raise UserError(f"{where} has {recipe.choices}={options!r}; task.choices needs a column that holds a list of at least two")
    return list(dict.fromkeys(column_text(option, recipe.choices, where) for option in options))


def check_words(key: str, words: Iterable[Any]) -> None:
    """Raise UserError for a word of a task's YAML that cannot be an answer, and for two of them that differ in case alone."""
    spelt: dict[str, str] = {}
    for word in words:
        if isinstance(word, bool):
            raise UserError(f"config key '{key}' holds a word that YAML reads as true or false; put yes, no, on, off, true and false in quotes")
        text = "" if isinstance(word, (list, tuple)) else _word(key, word)
        if not text:
            raise UserError(f"config key '{key}' holds {word!r}, which is no word; write a text there")
        other = spelt.setdefault(text.casefold(), text)
        if other != text:
            raise UserError(f"config key '{key}' has {other!r} and {text!r}, which differ in case alone; write one of them for both")


def _word(key: str, value: Any) -> str:
    try:
        return text_of(value)
    except ValueError as error:
        raise UserError(f"config key '{key}' holds {value!r}, which is {error}; write a text there") from error


def _plain(value: Any) -> Any:
    """The value as JSON can hold it."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int, bool)) else None if isinstance(value, bytes) else str(value)
