"""Reinforcement learning: sampled answers that earn more than a row's others are made likelier. conf/objective/grpo.yaml, rloo.yaml, rlhf_grpo.yaml,
rlhf_rloo.yaml.

An answer earns 1 if what is extracted from it is the row's, else 0, or what a reward model says of it (objective.reward, a cell of technique
reward_model). Either way the model must answer sensibly now and then from the start: start=<a fine-tuned cell>.

A step's texts are drawn from the very weights that it changes, and used once. The ratio of new to old probabilities is then 1, and the gradient of
both losses is that of a weighted cross-entropy of the drawn tokens: with weight A for an advantage A, and with GRPO's KL A + beta (log p_ref - log p)
for a token, the unbiased gradient of the reverse KL (DeepSeek-AI, 2025, V3.2). So any engine that trains on labels trains on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pipeline.core.files import UserError
from pipeline.core.settings import NotNegative, Positive, Task, Within
from pipeline.data.rows import Batch, Encoded, Weighted
from pipeline.objectives.base import Objective, Online, Policy, PreparedExamples, Sample, TrainingContext, drawn_later
from pipeline.scoring.drawing import RewardReader, room_for
from pipeline.scoring.reading import is_right
from pipeline.scoring.scorer import logits_at

if TYPE_CHECKING:
    import torch

APART = 1e-4
"""Added to a group's deviation before dividing by it, as TRL does."""


@dataclass(frozen=True)
class Grpo(Objective):
    """Group-relative policy optimisation (Shao et al., 2024; a mean over the step's tokens as in DAPO, Yu et al., 2025), or REINFORCE with the other
    samples' mean as baseline (RLOO, Ahmadian et al., 2024), whose KL is taken off the reward. TRL's defaults for both.

    A step takes train.batch_size rows and num_generations drawn answers of each.
    """

    prepares = True
    trainer = "online"

    algorithm: Literal["grpo", "rloo"]
    num_generations: Annotated[int, Within(2, why="answers are compared within a row's own")]
    temperature: Positive
    beta: NotNegative = 0.0
    """Weight of the KL to the model as training starts with it; above 0 only for an adapter."""
    reward: str | None = None
    """A finished reward model: a technique of the same experiment, seed and rows, or results/<experiment>/<cell>. null: the right answer earns 1."""
    exact: bool = True
    """Draw and train by one order of sums where the step is by hand and in bf16 (engine/invariant.py)."""
    unproven: Literal["refuse", "use"] = "refuse"
    """What to do with a reward model that is not above chance on held-out pairs."""

    @property
    def name(self) -> str:
        return f"rlhf_{self.algorithm}" if self.reward else self.algorithm

    @property
    def own_loss(self) -> bool:  # type: ignore[override]  # of drawing at another temperature alone
        return self.temperature != 1.0

    @property
    def made_of(self) -> dict[str, str]:
        return {"reward": self.reward} if self.reward else {}

    def prepared(self, examples: list[list[Encoded]], context: TrainingContext) -> PreparedExamples:
        if self.beta and not hasattr(context.model, "peft_config"):
            raise UserError(f"objective.beta is {self.beta}, but only an adapter keeps the model it started from to compare with; set 0 or choose method=lora")
        proxy = None
        if self.reward:
            assert context.rewards
            proxy = context.rewards(self.reward, context.cfg, self.unproven == "use", context.encoder.tokenizer)
        room = room_for(context.rows, context.encoder)
        online = Online(context.encoder, context.rows, self.num_generations, self.temperature, room, context.settings.evaluate.batch_tokens,
                        lambda samples, policy: self._judged(samples, policy, context.encoder.task, proxy), self.exact)
        return PreparedExamples(drawn_later(examples, self.num_generations, room), online=online)

    def _judged(self, samples: Sequence[Sample], policy: Policy, task: Task, proxy: RewardReader | None) -> tuple[list[Encoded], dict[str, float]]:
        right = [float(is_right(sample.text, sample.row, task)) for sample in samples]
        rewards = proxy([s.row for s in samples], [s.example.ids[s.example.start :] for s in samples]) if proxy else right
        seen = {"reward": math.fsum(rewards) / len(rewards), "gold_reward": math.fsum(right) / len(right)}
        apart = None
        if self.beta or policy.watched:
            mine, theirs = policy.log_p(samples), policy.reference(samples)
            if theirs is not None:
                apart = [r - p for p, r in zip(mine, theirs, strict=True)]
                seen["kl"] = -math.fsum(float(one.sum()) for one in apart) / len(samples)
        return self.weighted(samples, rewards, apart), seen

    def weighted(self, samples: Sequence[Sample], rewards: Sequence[float], apart: Sequence[torch.Tensor] | None) -> list[Encoded]:
        """The drawn texts, weighted so that their cross-entropy, a mean over the step's tokens, has the gradient of the algorithm's loss.

        Args:
            rewards: by sample, a row's num_generations one after another. apart: by sample log p_ref - log p of its tokens; None: without a KL.
        """
        if self.algorithm == "rloo":
            if self.beta and apart is not None:
                rewards = [reward + self.beta * float(one.sum()) for reward, one in zip(rewards, apart, strict=True)]
            tokens = sum(len(s.example.ids) - s.example.start for s in samples)
            return [_with(s, advantage * tokens / len(samples)) for s, advantage in zip(samples, self.advantages(rewards), strict=True)]
        advantages = self.advantages(rewards)
        if not self.beta or apart is None:
            return [_with(s, advantage) for s, advantage in zip(samples, advantages, strict=True)]
        return [Weighted(s.example.ids, s.example.start, each=tuple((advantage + self.beta * one.double()).tolist()))
                for s, advantage, one in zip(samples, advantages, apart, strict=True)]

    def advantages(self, rewards: Sequence[float]) -> list[float]:
        """How much more each answer earns than the others of its row: in deviations of all of them (GRPO), or in rewards above the others' mean (RLOO)."""
        found = []
        count = self.num_generations
        for start in range(0, len(rewards), count):
            group = rewards[start : start + count]
            mean = math.fsum(group) / count
            spread = math.sqrt(math.fsum((r - mean) ** 2 for r in group) / (count - 1))
            found += [(r - mean) / (spread + APART) if self.algorithm == "grpo" else (r - mean) * count / (count - 1) for r in group]
        return found

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """As Objective's, of the logits at the temperature."""
        import torch.nn.functional as F

        logits = logits_at(model, batch.input_ids, batch.rows, batch.cols) / self.temperature
        return (F.cross_entropy(logits, batch.targets, reduction="none") * batch.weights).sum()

    def hyperparameters(self) -> dict[str, Any]:
        shown = {"num_generations": self.num_generations, "temperature": self.temperature, "beta": self.beta}
        return shown | ({"reward": self.reward} if self.reward else {})


def _with(sample: Sample, weight: float) -> Encoded:
    return Encoded(sample.example.ids, sample.example.start, weight=weight)
