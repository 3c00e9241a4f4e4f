"""Best of n (Stiennon et al., 2020): a model draws n answers, and the one that a reward model likes best is given.

Library. What was drawn is kept with every prediction, so that the best of any fewer can be told, too: its true and its learnt reward over
KL = log k - (k - 1) / k from the model that draws (an upper bound; Beirami et al., 2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.core import progress
from pipeline.scoring.drawing import Drawing, RewardReader, room_for
from pipeline.scoring.reading import agrees, answer_in
from pipeline.scoring.scorer import Scorer

ROWS = 64
"""That are drawn for at a time."""


@dataclass(frozen=True)
class Selection:
    """n answers drawn at a temperature; reward: the finished reward model that chooses; unproven: also one that is not above chance."""

    n: int
    temperature: float
    reward: str
    unproven: bool


class BestOf(Scorer):
    """Answers as `scorer` with the best of what its model draws by `rewards`. seed: of the draws, a row's being a function of it and of the row's place."""

    def __init__(self, scorer: Scorer, selection: Selection, rewards: RewardReader, seed: int) -> None:
        super().__init__(scorer.model, scorer.encoder, scorer.task, scorer.prompt, scorer.batch_tokens, scorer.device, scorer.dtype, scorer.notes)
        self.selection, self.reader, self.seed = selection, rewards, seed

    @property
    def alone(self) -> bool:
        return True

    def predict(self, rows: Sequence[dict]) -> list[dict]:
        """As Scorer.predict, with the text that was chosen (`output`), its `reward`, and of all that were drawn [reward, right] (`drawn`)."""
        from pipeline.engine.answering import by_hand

        if not rows:
            return []
        n, predictions = self.selection.n, list[dict]()
        prompts = [prompt for prompt, _ in self.items(rows)]
        parts = [slice(start, start + ROWS) for start in range(0, len(rows), ROWS)]
        with by_hand(self.model, self.dtype, self.device, n * len(rows)) as written:
            lengths, most = [max(map(len, prompts[part])) for part in parts], n * min(ROWS, len(rows))
            drawing = Drawing(self.model, self.encoder, lengths, most, room_for(rows, self.encoder), self.selection.temperature, self.batch_tokens,
                              self.device, self.dtype, written, self.notes)
            try:
                for number, part in enumerate(parts):
                    asked = [row for row in rows[part] for _ in range(n)]
                    drawn, _ = drawing.draw(asked, [list(prompt) for prompt in prompts[part] for _ in range(n)], self.seed * 1_000_003 + number)
                    texts, values = drawing.texts(drawn), self.reader(asked, drawn)
                    for index, row in enumerate(rows[part]):
                        mine = slice(index * n, (index + 1) * n)
                        predictions.append(self._chosen(row, texts[mine], values[mine]))
                    progress.part(len(predictions), len(rows))
            finally:
                drawing.close()
        return predictions

    def _chosen(self, row: dict, texts: Sequence[str], values: Sequence[float]) -> dict:
        answers = [answer_in(text, row, self.task) for text in texts]
        right = [agrees(answer, row["answer"], self.task.answer_pattern) for answer in answers]
        best = max(range(len(values)), key=lambda i: values[i])
        return {"id": row["id"], "answer": row["answer"], "prediction": answers[best], "correct": right[best], "output": texts[best],
                "reward": round(values[best], 6), "drawn": [[round(value, 6), int(hit)] for value, hit in zip(values, right, strict=True)]}


def curve(predictions: Sequence[dict]) -> list[dict[str, float]]:
    """Of the best of k = 1, 2, 4, … n drawn answers: k, kl, reward (learnt) and gold_reward (true), means over rows; empty where nothing was drawn.

    A row's figure is the mean over all choices of k of its n answers.
    """
    every = [p["drawn"] for p in predictions if "drawn" in p]
    if not every:
        return []
    n = min(map(len, every))
    points = []
    for k in sorted({*(2**i for i in range(n.bit_length()) if 2**i <= n), n}):
        means = [_best_of(k, [(float(value), float(hit)) for value, hit in one]) for one in every]
        reward, gold = (math.fsum(column) / len(means) for column in zip(*means, strict=True))
        points.append({"k": float(k), "kl": math.log(k) - (k - 1) / k, "reward": reward, "gold_reward": gold})
    return points


def _best_of(k: int, drawn: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(reward, gold) that the best of k of the drawn answers has on average; equal rewards share their golds."""
    golds: dict[float, list[float]] = {}
    for value, gold in drawn:
        golds.setdefault(value, []).append(gold)
    below, reward, gold = 0, 0.0, 0.0
    for value, group in sorted(golds.items()):
        chance = (math.comb(below + len(group), k) - math.comb(below, k)) / math.comb(len(drawn), k)
        below += len(group)
        reward, gold = reward + chance * value, gold + chance * math.fsum(group) / len(group)
    return reward, gold
