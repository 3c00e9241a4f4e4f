"""Networks that read a frozen model's hidden states layer by layer and change the last ones: ladder side-tuning, attention fusion.

Library of pipeline/methods/side_network.py. Shapes: B rows, T tokens, d the model's width, w the side network's. A state is a hidden state.
"""

from __future__ import annotations

import copy
import math
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from pipeline.core.files import UserError
from pipeline.models.blocks import blocks

NAME = "beside"
"""What the network is called inside the model without its output layer."""
TEMPERATURE = 0.1  # of the ladder's gates (Sung et al., 2022, section 3.3)


class StateReader(nn.Module):
    """Collects the states of a forward pass, detached: the first block's input and every block's output, each [B, T, d]. `kwargs`: the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.states: list[torch.Tensor] = []
        self.kwargs: dict[str, Any] = {}

    def start(self, module: Any, args: tuple, kwargs: dict) -> None:
        self.states, self.kwargs = [], kwargs

    def read_input(self, module: Any, args: tuple, kwargs: dict) -> None:
        self.states.append((args[0] if args else kwargs["hidden_states"]).detach())

    def read_output(self, module: Any, args: tuple, output: Any) -> None:
        self.states.append((output[0] if isinstance(output, tuple) else output).detach())

    def finish(self, module: Any, args: tuple, output: Any) -> Any:
        output.last_hidden_state = self.change(output.last_hidden_state.detach())
        self.states, self.kwargs = [], {}
        return output

    def change(self, last: torch.Tensor) -> torch.Tensor:
        """What the output layer reads in the place of `last`, the frozen model's normalised last states [B, T, d]."""
        raise NotImplementedError


def attach(model: Any, network: StateReader) -> None:
    """Let a network read the model's blocks and change its last states.

    The frozen model has no gradients and keeps no activations for any. It is marked as stateful, so that answers are not scored over a shared
    prefix's cache, whose states the network would not see.
    """
    inner, layers = model.base_model, blocks(model)
    inner.add_module(NAME, network.to(model.device))
    inner.register_forward_pre_hook(network.start, with_kwargs=True)
    layers[0].register_forward_pre_hook(network.read_input, with_kwargs=True)
    for layer in layers:
        layer.register_forward_hook(network.read_output)
    inner.register_forward_hook(network.finish)
    model._is_stateful = True


class LadderNetwork(StateReader):
    """A decoder of the base's own architecture, `reduction` times narrower, whose layer i takes
    μ_i · down_i(state_i) + (1 - μ_i) · the layer before's output, μ_i = sigmoid(α_i / 0.1), α_i starting at 0.

    States are divided by their root mean square first, since later layers of a decoder have states a hundred times as large as early ones.
    The output is projected up to the base's width and added to the base's last states; `up` starts at zero.
    """

    def __init__(self, config: Any, reduction: int) -> None:
        from transformers import AutoModel

        super().__init__()
        small = narrowed(config, reduction)
        self.network = AutoModel.from_config(small, attn_implementation="sdpa", dtype=torch.float32)
        self.network.set_input_embeddings(nn.Identity())
        d, w = config.hidden_size, small.hidden_size
        layers = blocks(self.network)
        self.down = nn.ModuleList(nn.Linear(d, w, bias=False) for _ in range(len(layers) + 1))
        self.up = nn.Linear(w, d, bias=False)
        nn.init.zeros_(self.up.weight)
        self.gates = nn.Parameter(torch.zeros(len(layers)))
        self._pasts: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(lambda m, args, kwargs, i=number: self._mixed(i, args, kwargs), with_kwargs=True)

    def change(self, last: torch.Tensor) -> torch.Tensor:
        from transformers import DynamicCache

        past = self.kwargs.get("past_key_values")
        if past is not None and past not in self._pasts:
            self._pasts[past] = DynamicCache()
        shared = {key: self.kwargs[key] for key in ("attention_mask", "position_ids", "cache_position") if self.kwargs.get(key) is not None}
        cache = None if past is None else self._pasts[past]
        out = self.network(inputs_embeds=self._projected(0), past_key_values=cache, use_cache=past is not None, **shared)
        return last + self.up(out.last_hidden_state).to(last.dtype)

    def _projected(self, number: int) -> torch.Tensor:
        """down(normalised state), [B, T, w]."""
        state = self.states[number].float()
        return self.down[number](nn.functional.rms_norm(state, state.shape[-1:]))

    def _mixed(self, number: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        share = torch.sigmoid(self.gates[number] / TEMPERATURE)
        state = share * self._projected(number + 1) + (1 - share) * (args[0] if args else kwargs.pop("hidden_states"))
        return (state, *args[1:]), kwargs


def narrowed(config: Any, reduction: int) -> Any:
    """A config of the same architecture, widths divided, with as many heads as have an even width. Raises UserError where it cannot be divided."""
    small = copy.deepcopy(config)
    width = config.hidden_size // reduction
    heads = next((h for h in range(config.num_attention_heads, 0, -1) if width % h == 0 and width // h % 2 == 0), None)
    if config.hidden_size % reduction or heads is None:
        raise UserError(f"the model's width {config.hidden_size} cannot be divided by method.reduction={reduction} into heads of an even width; choose another")
    small.hidden_size, small.num_attention_heads = width, heads
    groups = getattr(config, "num_key_value_heads", None)
    if groups is not None:
        small.num_key_value_heads = next(g for g in range(min(groups, heads), 0, -1) if heads % g == 0)
    for key, value in (("head_dim", width // heads), ("intermediate_size", None), ("n_inner", None), ("ffn_dim", None)):
        if getattr(config, key, None) is not None:
            setattr(small, key, value or getattr(config, key) // reduction)
    small.vocab_size, small.pad_token_id = 1, None  # its embeddings are not used
    return small


class FusionNetwork(StateReader):
    """Attention of one trained query over the layers: Σ_l a_l · v_l, a = softmax over l of (q · v_l / √d + b_l), v_l the state after layer l as the
    output layer would read it (normalised by the base's last norm) (Cao et al., 2022).

    begin: the last layer's initial b; the others' are 0.
    """

    def __init__(self, norm: Any, d: int, layers: int, begin: float) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(d))
        self.bias = nn.Parameter(torch.tensor([0.0] * (layers - 1) + [begin]))
        self._norm = [norm]  # in a list: it belongs to the base and is no submodule of this one

    def change(self, last: torch.Tensor) -> torch.Tensor:
        values = torch.stack([*(self._norm[0](state) for state in self.states[1:-1]), last], -2).float()  # [B, T, L, d]
        weights = torch.softmax(values @ self.query / math.sqrt(values.shape[-1]) + self.bias, -1)
        return (weights[..., None, :] @ values)[..., 0, :].to(last.dtype)
