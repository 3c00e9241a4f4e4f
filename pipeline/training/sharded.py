"""Full fine-tuning whose fp32 weights, gradients and moments lie in parts on the ranks (train.parallel=fsdp): torch's FSDP2 (fully_shard), stepped eagerly.

Library of stepping.py and loop.py. A block's weights are gathered, in the arithmetic's dtype, while it computes, and gradients are summed in fp32 into the
parts. What trains is a twin of the run's model; that model is empty meanwhile, and on the first rank filled (`whole`) to answer. Checkpoints are
torch.distributed.checkpoint's: each rank writes its parts, and any number of ranks reads them.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.core.files import atomic_folder
from pipeline.models.blocks import blocks
from pipeline.training.checkpoint import load_state, shards_of
from pipeline.training.stepping import Eager, Run, checkpoint_activations

STATE = "state.pt"
"""Of a checkpoint: what does not lie in parts. It is written last."""


class Sharded(Eager):
    """The eager step over a sharded twin of run.model.

    Raises UserError where the model has no list of blocks.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.shards = {name: p.to_local() for name, p in self.named.items()}

    def _model(self) -> Any:
        """The twin: the model's modules and buffers again, its parameters in parts; run.model keeps none of their memory."""
        import torch

        run = self.run
        blocks(run.model)
        twin = copy.deepcopy(run.model, {id(p): torch.nn.Parameter(p.data, requires_grad=p.requires_grad) for p in run.model.parameters()})
        self._empty()  # so that a block's whole weights are freed once it lies in parts
        if run.settings.checkpointing:
            checkpoint_activations(twin)
        run.ranks.from_first_(p.data for p in twin.parameters())
        shard(twin, run.dtype, run.device)
        return twin

    def _optimizer(self, groups: list[dict[str, Any]]) -> Any:
        if self.run.settings.optimizer == "paged_adamw":
            self.notes.append("paged_adamw pages whole tensors; plain AdamW ran over the parts")
        return self._adamw(groups)

    def _loss(self, batch: Any) -> Any:
        """The weights come in the arithmetic's dtype; there is nothing left to cast."""
        return self.run.objective.loss(self.model, batch)

    def _sum_gradients(self) -> None:
        """fully_shard has."""

    def _empty(self) -> None:
        import torch

        for parameter in self.run.model.parameters():
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=self.run.device)

    def _fill(self) -> None:
        """Gather all weights; the first rank's run.model takes them, in the arithmetic's dtype."""
        import torch

        plain, run = dict(self.run.model.named_parameters()), self.run
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                whole = parameter.detach().to(run.dtype).full_tensor()
                if run.ranks.leads:
                    plain[name].data = whole
                del whole

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        self._fill()
        self.run.model.eval()
        try:
            yield
        finally:
            self._empty()

    def close(self) -> None:
        """Leave the weights in the first rank's run.model, and nothing in parts."""
        self.optimizer = None
        self._fill()
        self.shards, self.named, self.trained, self.model = None, {}, [], None

    # -- checkpoints

    def parts(self, best: dict[str, Any]) -> dict[str, Any]:
        """All that lies in parts, as DTensors by name: weights, moments and the best weights so far."""
        held: dict[str, Any] = {}
        for name, parameter in self.named.items():
            held[f"weights.{name}"] = parameter.detach()
            state = self.optimizer.state[parameter]
            held |= {f"{key}.{name}": state[key] for key in ("exp_avg", "exp_avg_sq")}
            if name in best:
                held[f"best.{name}"] = like(parameter, best[name].to(self.run.device))
        return held

    def start_moments(self, steps: int) -> None:
        """Give the optimiser the state, of zeros, that it has after so many steps."""
        import torch

        for parameter in self.named.values():
            count = torch.full((), float(steps), device=parameter.device)
            self.optimizer.state[parameter] = {"step": count, **{key: torch.zeros_like(parameter.detach()) for key in ("exp_avg", "exp_avg_sq")}}


def shard(model: Any, dtype: Any, device: Any) -> None:
    """Put a model's parameters in parts, one group a block and one for the rest; gradients are summed over the ranks, not averaged. In place."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy() if dtype == torch.float32 else MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def like(parameter: Any, local: Any) -> Any:
    """A DTensor that lies as `parameter` does, of this rank's part."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(local, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride())


def save(checkpoint: Path, stepping: Sharded, rest: dict[str, Any], best: dict[str, Any]) -> None:
    """Write a checkpoint atomically, in a folder of which every rank writes its part. rest: what the first rank adds; best: this rank's parts."""
    import torch
    import torch.distributed.checkpoint as dcp

    ranks, control = stepping.run.ranks, stepping.run.ranks.control
    with contextlib.ExitStack() as stack:
        folder: Path | None = None
        if ranks.leads:
            folder = stack.enter_context(atomic_folder(shards_of(checkpoint), STATE))
            folder.mkdir()
        folder = ranks.from_first(folder)
        dcp.save(stepping.parts(best), checkpoint_id=folder, process_group=control)
        if ranks.leads:
            torch.save({**rest, "has_best": bool(best)}, folder / STATE)
    ranks.from_first(None)  # it has its name


def load(checkpoint: Path, stepping: Sharded) -> dict[str, Any] | None:
    """Take over a checkpoint's parts, of any number of ranks; its state and generators with this rank's best weights. None where there is none."""
    import torch.distributed.checkpoint as dcp

    folder, ranks = shards_of(checkpoint), stepping.run.ranks
    if not ranks.from_first((folder / STATE).exists()):
        return None
    held = load_state(folder / STATE)
    if held is None:
        return None
    stepping.start_moments(held["state"]["step"])
    best = {name: p.to_local() for name, p in stepping.named.items()} if held.pop("has_best") else {}
    best = {name: value.clone() for name, value in best.items()}
    parts = stepping.parts(best)
    dcp.load(parts, checkpoint_id=folder, process_group=ranks.control)
    held["state"]["best_weights"] = {name: parts[f"best.{name}"].to_local().cpu() for name in best}
    return held
