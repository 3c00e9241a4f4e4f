"""Texts that say the same: equal once case, white space and punctuation are set aside, or near by ROUGE-L.

Library of prepare.py and synthesize.py.
"""

from __future__ import annotations

import functools
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any


def normalised(text: str) -> str:
    """The text by which duplicates are recognised: case, white space and punctuation folded.

    Signs that carry meaning in arithmetic and code stay, and so does a minus sign that no letter touches.
    """
    text = re.sub(r"(?<=[^\W\d])-|-(?=[^\W\d])", " ", text.casefold())
    return " ".join(re.sub(r"[^\w\s+*/%=<>^&|~$#@-]", " ", text).split())


class Near:
    """Texts to compare others with: one is near to another from a ROUGE-L (F1 of the longest common subsequence of words) of `least` on.

    Exact, though few pairs are scored: the subsequence is never longer than what two texts have in common as bags of words.
    """

    def __init__(self, least: float) -> None:
        self.least = least
        self._texts: list[str] = []
        self._lengths: list[int] = []
        self._holding: dict[str, list[tuple[int, int]]] = {}
        self._exact: set[str] = set()

    def add(self, text: str) -> None:
        key = normalised(text)
        if key in self._exact:
            return
        self._exact.add(key)
        words = key.split()
        for word, count in Counter(words).items():
            self._holding.setdefault(word, []).append((len(self._texts), count))
        self._texts.append(key)
        self._lengths.append(len(words))

    def holds(self, text: str) -> bool:
        return normalised(text) in self._exact

    def near(self, text: str, least: float | None = None) -> bool:
        """Whether one of them is near to it, or the same. least: another threshold than the index's."""
        least, key = self.least if least is None else least, normalised(text)
        words = key.split()
        common: Counter[int] = Counter()
        for word, count in Counter(words).items():
            for index, other in self._holding.get(word, ()):
                common[index] += min(count, other)
        for index, overlap in common.items():
            if 2 * overlap >= least * (len(words) + self._lengths[index]) and rouge_l(self._texts[index], key) >= least:
                return True
        return key in self._exact


def rouge_l(one: str, other: str) -> float:
    """F1 by the longest common subsequence of words (Lin, 2004); words are those of `normalised`, so that no script is left out."""
    return float(_scorer().score(one, other)["rougeL"].fmeasure)


def own_nearness(texts: Sequence[str]) -> float:
    """How near texts are to each other: the median over them of ROUGE-L with the nearest other one; 0 for a single text."""
    nearest = [max((rouge_l(one, other) for j, other in enumerate(texts) if j != i), default=0.0) for i, one in enumerate(texts)]
    return statistics.median(nearest) if nearest else 0.0


class _Words:
    def tokenize(self, text: str) -> list[str]:
        return normalised(text).split()


@functools.cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Words())
