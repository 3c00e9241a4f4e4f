"""Retrieval-augmented prompts: the labelled rows, or a user's passages, that are nearest to a prompt come before it.

conf/method/retrieval.yaml, retrieval_embedding.yaml, retrieval_documents.yaml.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.files import Unsuited, UserError, read_jsonl, write_jsonl
from pipeline.data.conversations import reworded
from pipeline.data.rows import Example
from pipeline.methods.base import Method, check_counts
from pipeline.models.base import load_tokenizer

if TYPE_CHECKING:
    import torch

ENTRIES = "entries.jsonl"
TEXT_FILES = (".txt", ".md")


@dataclass(frozen=True)
class Index:
    """What can be retrieved, and how: `nearest(query, k)` gives the indices of the k nearest entries, nearest first."""

    entries: list[dict[str, str]]
    nearest: Callable[[str, int], list[int]]


@dataclass(frozen=True)
class Retrieval(Method):
    """k nearest entries before the prompt, the nearest last (Liu et al., 2022: what is next to the question counts most).

    Raises:
        UserError: an unknown `by`, k < 1 or above the number of entries, documents that cannot be read.
    """

    prepares = True
    own_prompt = True

    k: int
    by: str
    """bm25 (Robertson & Zaragoza, 2009; Lucene's variant, through bm25s), or embedding: cosine of the base model's own."""
    documents: str | None = None
    """A .txt or .md file, a .jsonl file, or a folder of such files; null: the labelled training rows, with their answers."""
    column: str = "text"
    """The column of a .jsonl file that holds the text."""
    passage_words: int = 60
    """Documents are cut into passages of at most so many words; a paragraph that fits stays whole."""
    separator: str = "\n\n"
    answer_separator: str = " "

    def __post_init__(self) -> None:
        if self.by not in ("bm25", "embedding"):
            raise UserError(f"method.by is {self.by!r}; choose bm25 or embedding")
        check_counts(self, "k", "passage_words")

    @property
    def decoder_only(self) -> str | None:
        return "method.by=embedding reads a decoder's last states" if self.by == "embedding" else None

    @property
    def name(self) -> str:
        return f"retrieval_{self.by}"

    @property
    def sharing(self) -> str:
        return "together"

    def prepare(self, examples: Sequence[Example], seed: int, base: Any) -> Index:
        if self.documents is None:
            entries = [{"text": e.prompt, "answer": e.answer} for e in examples]
        else:
            entries = [{"text": p} for p in passages(Path(self.documents), self.column, self.passage_words)]
        if self.k > len(entries):
            what = "training rows" if self.documents is None else f"passages in {self.documents}"
            raise Unsuited(f"method.k={self.k}, but there are {len(entries)} {what}; lower k or add some")
        return self._index(entries, base)

    def prompt(self, prompt: str, state: Index) -> str:
        entries = [state.entries[i] for i in reversed(state.nearest(prompt, self.k))]
        texts = [e["text"] + (self.answer_separator + e["answer"] if "answer" in e else "") for e in entries]
        return reworded(prompt, lambda asked: self.separator.join([*texts, asked]))

    def hyperparameters(self) -> dict[str, Any]:
        shown = {"retrieved": self.k, "by": self.by}
        return shown | ({"labels_from": "train"} if self.documents is None else {"documents": self.documents})

    def labelled_rows(self, train: int, validation: int) -> int:
        return train if self.takes_rows else 0

    @property
    def takes_rows(self) -> bool:
        return self.documents is None

    def save(self, model: Any, state: Index, folder: Path) -> None:
        write_jsonl(folder / ENTRIES, state.entries)

    def load(self, base: Any, folder: Path) -> tuple[Any, Any]:
        return base, self._index(read_jsonl(folder / ENTRIES), base)

    def _index(self, entries: list[dict[str, str]], base: Any) -> Index:
        texts = [e["text"] for e in entries]
        return Index(entries, by_bm25(texts) if self.by == "bm25" else by_embedding(texts, base))


def by_bm25(texts: Sequence[str]) -> Callable[[str, int], list[int]]:
    """Nearest by BM25 over lower-case words of two letters or more."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # bm25s starts JAX where it is installed, which would take three quarters of a GPU's memory
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it logs every index that it builds

    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(texts), stopwords=None, show_progress=False), show_progress=False)

    def nearest(query: str, k: int) -> list[int]:
        words = bm25s.tokenize(query, stopwords=None, return_ids=False, show_progress=False)
        return index.retrieve(words, k=k, show_progress=False, backend_selection="numpy").documents[0].tolist()

    return nearest


def by_embedding(texts: Sequence[str], base: Any) -> Callable[[str, int], list[int]]:
    """Nearest by cosine of `embed`."""
    import torch

    tokenizer = load_tokenizer(Path(base.config._name_or_path))
    matrix = torch.stack([embed(text, base, tokenizer) for text in texts])

    def nearest(query: str, k: int) -> list[int]:
        return (matrix @ embed(query, base, tokenizer)).topk(k).indices.tolist()

    return nearest


def embed(text: str, base: Any, tokenizer: Any) -> torch.Tensor:
    """[hidden] of length 1: the last hidden states averaged with weights that grow with the position (SGPT, Muennighoff, 2022)."""
    import torch

    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=getattr(base.config, "max_position_embeddings", None))["input_ids"]
    with torch.inference_mode():
        hidden = base.base_model(input_ids=ids.to(base.device), use_cache=False).last_hidden_state[0].float()
    positions = torch.arange(1, len(hidden) + 1, device=hidden.device, dtype=hidden.dtype)
    return torch.nn.functional.normalize(positions @ hidden, dim=0)


def passages(path: Path, column: str, words: int) -> list[str]:
    """The passages of a file or a folder of files, in name order. Raises UserError where there is nothing to read."""
    files = sorted(p for p in path.rglob("*") if p.suffix in (*TEXT_FILES, ".jsonl")) if path.is_dir() else [path]
    if not path.exists() or not files:
        raise UserError(f"method.documents={path} holds no .txt, .md or .jsonl file; fix the path")
    cut = [p for file in files for text in _texts(file, column) for p in _cut(text, words)]
    if not cut:
        raise UserError(f"method.documents={path} holds no text; add some")
    return cut


def _texts(file: Path, column: str) -> list[str]:
    if file.suffix == ".jsonl":
        rows = read_jsonl(file)
        lacking = next((i for i, row in enumerate(rows, 1) if not isinstance(row.get(column), str)), None)
        if lacking is not None:
            raise UserError(f"{file} row {lacking} has no text in column {column!r} (it has: {', '.join(rows[lacking - 1])}); set method.column")
        return [row[column] for row in rows]
    if file.suffix not in TEXT_FILES:
        raise UserError(f"method.documents={file} is neither .txt, .md nor .jsonl; convert it to one of them")
    try:
        return file.read_text(encoding="utf-8").split("\n\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error


def _cut(text: str, words: int) -> list[str]:
    every = text.split()
    return [" ".join(every[i : i + words]) for i in range(0, len(every), words)]
