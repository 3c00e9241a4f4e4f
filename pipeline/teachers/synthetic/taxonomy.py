"""InstructLab's taxonomy: qna.yaml files, each a leaf of skill or knowledge with examples that people wrote (Sudalairaj et al., 2024, LAB).

The format is that of the versions 1 to 3 of InstructLab's schemas:

    version: 3
    created_by: someone
    domain: Astronomy                  # knowledge
    document_outline: The red dwarf's flares   # knowledge, from version 3 on
    task_description: …                # skills; knowledge up to version 2
    seed_examples:
      - context: …                     # skills: optional; knowledge: from version 3 on
        question: …                    # knowledge from version 3 on has them under questions_and_answers, three or more
        answer: …
    document: {repo: …, commit: …, patterns: [phases/*.md]}   # knowledge; version 3 also {folder: …, patterns: […]}
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.core.files import UserError, closest

FILE = "qna.yaml"
BRANCHES = ("knowledge", "compositional_skills", "foundational_skills")
VERSIONS = (1, 2, 3)
FEWEST = {1: 1, 2: 5, 3: 5}
"""Seed examples of a leaf, by version."""
PAIRS = 3
"""Questions of a seed example of knowledge from version 3 on."""


@dataclass(frozen=True)
class SeedExample:
    """A question that people answered. context: what it is about, empty where it stands alone. row: the id of the task's row that it is, if it is one."""

    question: str
    answer: str
    context: str = ""
    row: str | None = None


@dataclass(frozen=True)
class Leaf:
    """A qna.yaml. documents: passages to ask about, besides the examples' contexts."""

    path: str
    """Within the taxonomy: compositional_skills/writing/poetry."""
    kind: str
    """skill or knowledge."""
    description: str
    examples: tuple[SeedExample, ...]
    documents: tuple[str, ...] = ()
    documents_at: str | None = None
    """Where its documents are, by the file, if they were not read."""


def read(path: Path, documents: Path | None = None, passage_words: int = 250) -> list[Leaf]:
    """The leaves of a taxonomy: a qna.yaml, or all of them below a folder, in path order.

    Args:
        documents: a folder (a clone of the `repo` that the files name) with the knowledge's documents; without it the `folder` that a file names.
        passage_words: most words of a passage of a document; a longer paragraph is cut.

    Raises:
        UserError: nothing there, or a file that is not of the format, with its key and the fix.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; name a qna.yaml or a folder of them in synthetic.seeds, or set synthetic.seeds=task")
    files = sorted(path.rglob(FILE)) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} has no {FILE} below it; name the folder of a taxonomy, or one such file")
    return [_leaf(file, path if path.is_dir() else None, documents, passage_words) for file in files]


def _leaf(file: Path, root: Path | None, documents: Path | None, passage_words: int) -> Leaf:
    raw = _yaml(file)
    where = _place(file, root)
    version = raw.get("version", 1)
    if version not in VERSIONS or isinstance(version, bool):
        raise UserError(f"{file} has version: {version!r}; set version to 1, 2 or 3")
    kind = "knowledge" if where.startswith("knowledge") or "document" in raw else "skill"
    _check_keys(file, raw, kind, version)
    examples = tuple(_examples(file, raw["seed_examples"], kind, version))
    texts, at = _documents(file, raw.get("document"), documents, passage_words)
    return Leaf(where, kind, _description(raw, kind), examples, texts, at)


def _yaml(file: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(_utf8(file))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise UserError(f"{file} is not YAML ({line}{getattr(error, 'problem', error)}); fix it") from error
    if not isinstance(raw, dict):
        raise UserError(f"{file} is a {type(raw).__name__} at its top; write keys there: version, created_by, seed_examples, …")
    return raw


def _place(file: Path, root: Path | None) -> str:
    """The leaf's path below the taxonomy's root: from a branch's name on where there is one."""
    parts = file.parent.parts if root is None else file.parent.relative_to(root.parent).parts
    start = next((i for i, part in enumerate(parts) if part in BRANCHES), None)
    if start is not None:
        return "/".join(parts[start:])
    inside = parts[-1:] if root is None else parts[1:] or parts
    return "/".join(inside) or file.stem


def _check_keys(file: Path, raw: dict[str, Any], kind: str, version: int) -> None:
    skill = ["task_description"]
    required = ["created_by", "seed_examples", *(skill if kind == "skill" else ["domain", "document", *(["document_outline"] if version >= 3 else skill)])]
    for key in raw:
        if key not in ("version", *required):
            meant = closest(str(key), required)
            raise UserError(f"{file} has the unknown key {key!r}{meant}; {kind} of version {version} takes {', '.join(['version', *required])}")
    for key in required:
        empty = raw.get(key) == "" and not (key == "task_description" and version == 1)  # as version 1 allows
        if raw.get(key) is None or empty:
            raise UserError(f"{file} has no {key}; {kind} of version {version} needs it")
        if key not in ("seed_examples", "document") and not isinstance(raw[key], str):
            raise UserError(f"{file} has {key}: {raw[key]!r}; write a text")
    seeds = raw["seed_examples"]
    if not isinstance(seeds, list):
        raise UserError(f"{file} has seed_examples that are no list; begin each of them with a dash")
    if len(seeds) < FEWEST[version]:
        raise UserError(f"{file} has {len(seeds)} seed_examples; version {version} needs {FEWEST[version]} at least, add some")


def _examples(file: Path, seeds: list[Any], kind: str, version: int) -> Iterator[SeedExample]:
    grouped = kind == "knowledge" and version >= 3
    seen = set()
    for number, seed in enumerate(seeds, 1):
        where = f"{file}: seed_examples[{number - 1}]"
        allowed = ("context", "questions_and_answers") if grouped else ("context", "question", "answer") if kind == "skill" else ("question", "answer")
        context = _text(where, seed, "context", allowed, needed=grouped)
        pairs = seed.get("questions_and_answers") if grouped else [seed]
        if not isinstance(pairs, list) or grouped and len(pairs) < PAIRS:
            there = len(pairs) if isinstance(pairs, list) else "no"
            raise UserError(f"{where} has {there} questions_and_answers; version {version} needs a list of {PAIRS} at least")
        for place, pair in enumerate(pairs):
            at = f"{where}.questions_and_answers[{place}]" if grouped else where
            keys = ("question", "answer") if grouped else allowed
            example = SeedExample(_text(at, pair, "question", keys), _text(at, pair, "answer", keys), context)
            if example in seen:
                raise UserError(f"{at} is there twice; remove one")
            seen.add(example)
            yield example


def _text(where: str, node: Any, key: str, allowed: tuple[str, ...], needed: bool = True) -> str:
    if not isinstance(node, dict):
        raise UserError(f"{where} is {node!r}; write the keys {', '.join(allowed)} there")
    unknown = next((k for k in node if k not in allowed), None)
    if unknown is not None:
        raise UserError(f"{where} has the unknown key {unknown!r}; it takes {', '.join(allowed)}")
    value = node.get(key)
    if value is None and not needed:
        return ""
    if not isinstance(value, str) or not value.strip():
        quotes = ", put it in quotes" if isinstance(value, (bool, int, float)) else ""
        raise UserError(f"{where} has {key}: {value!r}; write a text there{quotes}")
    return value.strip()


def _description(raw: dict[str, Any], kind: str) -> str:
    if kind == "skill":
        return str(raw["task_description"]).strip()
    about = raw.get("document_outline") or raw["task_description"]
    return f"{raw['domain'].strip()}: {about.strip()}"


def _documents(file: Path, node: Any, root: Path | None, words: int) -> tuple[tuple[str, ...], str | None]:
    """(Passages, or none; where the documents are, if nothing was read)."""
    if node is None:
        return (), None
    patterns = node.get("patterns") if isinstance(node, dict) else None
    if not isinstance(patterns, list) or not patterns or not all(isinstance(p, str) and p for p in patterns):
        raise UserError(f"{file} has no document.patterns; list which files are read, for example: patterns: ['*.md']")
    folder = root or (Path(node["folder"]) if node.get("folder") else None)
    if folder is None:
        if not node.get("repo"):
            raise UserError(f"{file} has neither document.repo nor document.folder; name one")
        return (), f"{node['repo']} at {node.get('commit', 'its head')}"
    files = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    if not files:
        raise UserError(f"{file}: document.patterns {', '.join(patterns)} match no file in {folder}; fix the patterns, or synthetic.documents")
    return tuple(passage for one in files for passage in passages(_utf8(one), words)), None


def _utf8(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8 text") from error


def passages(text: str, most_words: int) -> list[str]:
    """Paragraphs joined to passages of at most so many words; a longer paragraph is cut."""
    joined: list[list[str]] = []
    for paragraph in text.split("\n\n"):
        words = paragraph.split()
        for part in (words[i : i + most_words] for i in range(0, len(words), most_words)):
            if joined and len(joined[-1]) + len(part) <= most_words:
                joined[-1] += part
            else:
                joined.append(part)
    return [" ".join(words) for words in joined]
