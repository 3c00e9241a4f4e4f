"""What a command tells its user to type next, in a message, a help or a report: it is a command that exists, and takes these words.

The texts are read out of the code, f-strings with their places filled in; nothing is run. tests/test_documents.py does the same for README and docs/.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator

import pytest
from test_documents import OWN_WORDS, PLACES, composes

from pipeline.core import arguments
from pipeline.core.compose import CONF, ROOT
from pipeline.core.files import UserError

FILLED = PLACES | {"experiments": "quick", "experiment": "mine", "train_rows": "100", "seed": "1", "start": "full", "cell": "results/quick/lora-s0-n200",
                   "suite": "arc_easy", "to": "tasks"}
"""What stands in a key's place where the code computes it."""
WORDS = {"say": "alignscope", "technique": "lora", "best": "lora"}
"""What a place without a key is filled with, by a word in its expression; anything else: an experiment's name."""
MODULE = re.compile(r"python -m pipeline\.(?P<command>\w+)(?P<words>[^`;\n]*)")
SCRIPT = re.compile(r"(?<![\w/.])(?:alignscope|python -m pipeline) (?P<command>[a-z_]+)(?P<words>[^`;,)\n]*)")
KEYED = re.compile(r"(?<=\s)[+~]*[a-z][\w.]*=(?:'[^']*'|\S+)|(?<=\s)backfill\b")
PROSE = ("__main__", "below", "compares", "from", "quick", "to", "where")
"""What follows the program's name where that is no command."""


def texts(tree: ast.Module) -> Iterator[str]:
    """Every text of a file, docstrings too; of an f-string with its places filled in."""
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node) if part is not node}
    for node in ast.walk(tree):
        if id(node) in inside:
            continue
        if isinstance(node, ast.JoinedStr):
            text = ""
            for part in node.values:
                text += part.value if isinstance(part, ast.Constant) else _filled(text, ast.unparse(part.value))  # type: ignore[attr-defined]
            yield text
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _filled(before: str, expression: str) -> str:
    if key := re.search(r"([\w.]+)=$", before):
        return FILLED.get(key[1], "1")
    return next((value for word, value in WORDS.items() if word in expression), "quick")


def hints() -> list[tuple[str, str, tuple[str, ...]]]:
    """(file, command, words) of everything that a text tells to type."""
    found = set()
    for path in sorted((ROOT / "pipeline").rglob("*.py")):
        for text in texts(ast.parse(path.read_text(encoding="utf-8"))):
            for match in (*MODULE.finditer(text), *SCRIPT.finditer(text)):
                if match["command"] not in PROSE:
                    found.add((path.name, match["command"], _words(match["command"], match["words"])))
    return sorted(found)


def _words(command: str, text: str) -> tuple[str, ...]:
    """Of a command of options all words up to the column beside it; of one of overrides those that are some."""
    text = re.split(r" {2,}(?=\S)", re.sub(r"=(<[^>]*>|{\w+}|…)", lambda _: "=…", text))[0].rstrip(".:, ")
    module = _module(command)
    if (ROOT / f"pipeline/{module}.py").exists() and arguments.takes_options(module):
        return () if "…" in text else tuple(text.split())
    words = (word.partition("=") for word in (w.rstrip(".,):") for w in KEYED.findall(text)))
    return tuple(f"{key}{equals}{FILLED.get(key, value) if value in ('…', '...', '', 'mine') else value}" for key, equals, value in words)


def _module(command: str) -> str:
    return arguments.commands().get(command, command)


EVERY = hints()
"""What the texts of pipeline/ tell to type."""


def test_the_hints_are_found():
    assert len(EVERY) > 90
    assert ("answering.py", "deploy", ("quick", "lora", "--to", "out/quick")) in EVERY, "of an f-string"
    assert ("rows.py", "rationales", ("task=vader_movies", "teacher=lexicon")) in EVERY and ("try_file.py", "try", ("reviews.csv",)) in EVERY


@pytest.mark.parametrize(("file", "command", "words"), EVERY, ids=lambda value: value if isinstance(value, str) else " ".join(value))
def test_what_is_told_to_be_typed_is_taken(file, command, words):
    module = _module(command)
    assert (ROOT / f"pipeline/{module}.py").exists(), f"{file} names the command {command}"
    if arguments.takes_options(module):
        if words and "--help" not in words:
            importlib.import_module(f"pipeline.{module}").main.parser().parse_args(list(words))
    elif module in OWN_WORDS:
        assert OWN_WORDS[module] is None or {word.partition("=")[0] for word in words} <= {*OWN_WORDS[module], "experiments", "tracking.uri"}
    else:
        assert not composes(words), f"{file}: {command} {' '.join(words)}: {composes(words)}"
        given = dict(word.split("=", 1) for word in words if "=" in word)
        if given.get("writer") == "local" and "writer.model" in given:
            assert (CONF / f"model/{given['writer.model']}.yaml").exists(), f"{file} names the model {given['writer.model']}, which nothing fetches"


@pytest.mark.parametrize(("text", "wrong"), [
    ("run: python -m pipeline.prepare task=nothere first", "unknown task 'nothere'"), ("run: python -m pipeline.cells experimnts=quick", "experimnts"),
])
def test_a_hint_that_fails_when_typed_is_found(text, wrong):
    [match] = MODULE.finditer(text)
    assert wrong in composes(_words(match["command"], match["words"]))


def test_an_option_that_is_none_is_found():
    [match] = SCRIPT.finditer("then `alignscope more reviews --sedes 3`")
    with pytest.raises(UserError, match="there is no option --sedes"):
        importlib.import_module("pipeline.more").main.parser().parse_args(list(_words(match["command"], match["words"])))
