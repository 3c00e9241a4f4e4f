"""What choice scoring feeds and reads off: every row's prompt and choices as token sequences, with what they have in common fed once.

Library, plain lists without torch. `Reads` feeds a choice with which another choice begins only once; `arrange`
lets a row's choices share its prompt, and all rows the tokens that they begin with, where that saves enough tokens.
"""

from __future__ import annotations

import dataclasses
import os.path
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

LEAST = 0.15  # of all tokens, saved: less does not pay for the mask that sharing needs
LEAD = 8  # tokens that rows have in common at least, if they are to share their beginning

Items = Sequence[tuple[list[int], list[list[int]]]]
"""(prompt ids, [choice ids, …]) a row."""


MANY = 16
"""Choices of a row from which on they are searched as a tree, on devices whose passes are not captured (engine/branches.py)."""


@dataclass(frozen=True)
class Contest:
    """What is wanted of many choices: the best one, and one more score. By item: lengths, which a choice's score is divided by before they are compared;
    needed, the choice whose score is to be exact beside the best one's (None: no other)."""

    lengths: Sequence[Sequence[int]]
    needed: Sequence[int | None]


@dataclass(frozen=True)
class Reads:
    """What choice scoring feeds and reads off.

    sequences: token ids to feed. at: for each sequence, its reads (column, target, place): the log-probability of token
    `target` at `column` is added to the sum of places[place]. places: (item, choice).
    """

    sequences: list[list[int]]
    at: list[list[tuple[int, int, int]]]
    places: list[tuple[int, int]]

    @classmethod
    def of(cls, items: Items) -> Reads:
        """A choice's first tokens are read off the longest sequence that contains them, so choices of one token each cost one forward pass
        over the prompt."""
        reads = cls([], [], [])
        for item, (prompt, choices) in enumerate(items):
            heads = [tuple(ids[:-1]) for ids in choices]
            longest = _longest(set(heads))
            homes: dict[tuple[int, ...], list[tuple[int, int, int]]] = {head: [] for head in longest}
            reads.sequences.extend([*prompt, *head] for head in longest)
            reads.at.extend(homes.values())
            first = len(prompt) - 1
            for choice, (head, ids) in enumerate(zip(heads, choices, strict=True)):
                home, place = homes.get(head), len(reads.places)
                if home is None:
                    home = next(homes[longer] for longer in longest if longer[: len(head)] == head)
                reads.places.append((item, choice))
                home.extend([(column, token, place) for column, token in enumerate(ids, first)])
        return reads

    def rows(self) -> list[Row]:
        """The sequences of which something is read, each a row that shares nothing."""
        return [Row(ids, at, self.places[at[0][2]][0]) for ids, at in zip(self.sequences, self.at, strict=True) if at]

    def apart(self) -> list[Group]:
        """The rows, with nothing shared among them."""
        rows = self.rows()
        return [Group([], rows)] if rows else []

    def by_item(self, sums: Sequence[float]) -> list[list[float]]:
        """The sums by place as a list of its choices' sums for every item."""
        choices: list[list[float]] = [[] for _ in range(1 + max((item for item, _ in self.places), default=-1))]
        for (item, _), value in zip(self.places, sums, strict=True):
            choices[item].append(value)
        return choices


@dataclass(frozen=True)
class Row:
    """Tokens that are fed together, and what is read off them.

    reads: (column, target, place): log p of target is read at column and added to place. parents: for the last tokens, the
    column of the token that each follows; all tokens before them follow one another. item: the row of the task.
    """

    ids: list[int]
    reads: list[tuple[int, int, int]]
    item: int
    parents: tuple[int, ...] = ()

    @property
    def trunk(self) -> int:
        """Tokens before the first that has a parent."""
        return len(self.ids) - len(self.parents)

    @property
    def branches(self) -> bool:
        """Whether some token does not follow the one before it."""
        return any(parent != self.trunk + i - 1 for i, parent in enumerate(self.parents))

    def after(self, count: int) -> Row:
        """The row without its first tokens."""
        reads = [(column - count, target, place) for column, target, place in self.reads]
        return Row(self.ids[count:], reads, self.item, tuple(parent - count for parent in self.parents))


@dataclass(frozen=True)
class Group:
    """Rows that follow the same tokens (none: []), which are fed once."""

    prefix: list[int]
    rows: list[Row]
    soft: bool = False
    """Whether they follow the model's soft prompt, fed once, too; else the model puts it before each of them."""

    @property
    def shares(self) -> bool:
        """Whether it takes another mask and positions than a padded batch has, so that a model has to allow it."""
        return bool(self.prefix) or self.soft or any(row.branches for row in self.rows)


def _longest(heads: set[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Those that no other one begins with, in order."""
    if len(heads) < 2:
        return list(heads)
    return sorted(head for head in heads if not any(other != head and other[: len(head)] == head for other in heads))


def joined(items: Items) -> list[Row]:
    """One row an item: the prompt, then every beginning of a choice once; places count the choices of all items."""
    rows, place = [], 0
    for item, (prompt, choices) in enumerate(items):
        ids, parents, reads = list(prompt), [], []
        ends: dict[tuple[int, ...], int] = {(): len(prompt) - 1}  # a choice's beginning -> the column of its last token
        for choice in choices:
            for i, token in enumerate(choice):
                head = tuple(choice[:i])
                if head not in ends:
                    ends[head] = len(ids)
                    parents.append(ends[head[:-1]])
                    ids.append(head[-1])
                reads.append((ends[head], token, place))
            place += 1
        rows.append(Row(ids, reads, item, tuple(parents)))
    return [row for row in rows if row.reads]


def arrange(reads: Reads, items: Items, least: float = LEAST, soft: bool = False) -> list[Group]:
    """The rows of `items` with as much shared as saves `least` of all tokens.

    Args:
        reads: Reads.of(items). soft: whether the model's soft prompt is shared by all rows.
    """
    return [dataclasses.replace(group, soft=soft) for group in _arranged(reads, items, least)]


def _arranged(reads: Reads, items: Items, least: float) -> list[Group]:
    rows = reads.rows()
    if any(len(choice) > 1 for _, choices in items for choice in choices):  # else a row's choices are read off its prompt alone
        together = joined(items)
        rows = together if _tokens(rows) - _tokens(together) >= least * _tokens(rows) else rows
    if not rows:
        return []
    lead = Counter(tuple(row.ids[:LEAD]) for row in rows).most_common(1)[0][0]
    same = [row for row in rows if tuple(row.ids[:LEAD]) == lead]
    first_reads = min(column for row in same for column, _, _ in row.reads)
    count = min(first_reads, len(os.path.commonprefix([row.ids for row in same])))
    if count < LEAD or count * (len(same) - 1) < least * _tokens(rows):
        return [Group([], rows)]
    others = [row for row in rows if tuple(row.ids[:LEAD]) != lead]
    shared = Group(same[0].ids[:count], [row.after(count) for row in same])
    return [shared, Group([], others)] if others else [shared]


def _tokens(rows: list[Row]) -> int:
    return sum(len(row.ids) for row in rows)
