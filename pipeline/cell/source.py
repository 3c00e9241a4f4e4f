"""What a Python file does and imports, found in its syntax tree and remembered by its content.

Library of identity.py. What was found is kept where Python keeps compiled files, and as it does: not where it writes none (PYTHONDONTWRITEBYTECODE).
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import json
import sys
from collections.abc import Iterator
from importlib.util import cache_from_source
from pathlib import Path
from typing import NamedTuple

from pipeline.core.files import UserError, write_text

MOST = 2000
"""Files whose content is remembered; with more of them all are forgotten but those of this process."""


class Source(NamedTuple):
    """digest: of what the file does. imports: the project's modules, at the top or within a function, and names of what may be one."""

    digest: str
    imports: list[str]


_found: dict[str, Source] = {}
"""What this process had to look for, by the content's sha256."""


@functools.cache
def look(path: Path) -> Source:
    """The file at this path, as it is when it is asked for first."""
    content = path.read_bytes()
    key = hashlib.sha256(content).hexdigest()
    known = _kept().get(key)
    if known is None:
        known = _found[key] = _look(content)
    return known


def keep() -> None:
    """Keep what was found for processes to come, where it can be."""
    if not _found or sys.dont_write_bytecode:
        return
    kept = _kept() if len(_kept()) + len(_found) <= MOST else {}
    with contextlib.suppress(UserError):  # a folder that cannot be written
        write_text(_place(), json.dumps(kept | _found))
    _kept.cache_clear()
    _found.clear()


def _place() -> Path:
    """Named after what this file does, too: another way to find a digest finds others."""
    own = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
    return Path(cache_from_source(__file__)).with_suffix(f".{own}.json")


@functools.cache
def _kept() -> dict[str, Source]:
    try:
        return {key: Source(digest, imports) for key, (digest, imports) in json.loads(_place().read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError):  # none yet, or damaged
        return {}


def _look(content: bytes) -> Source:
    """The digest is of the syntax tree without docstrings: comments and layout do not count."""
    tree = ast.parse(content)
    imports = list(_imports(tree))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body:
            node.body = [part for part in body if not _is_text(part)] or [ast.Pass()]  # type: ignore[attr-defined]
    return Source(hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16], imports)


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in _run_nodes(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{name}" for name in names)] if node.module else []
        yield from (name for name in names if name.startswith("pipeline."))


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _run_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that type checkers alone read."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and getattr(child.test, "id", None) == "TYPE_CHECKING":
            continue
        yield child
        yield from _run_nodes(child)
