"""Networks that read a frozen model's states layer by layer and change what comes out at its end: ladder side-tuning, attention fusion.

Library of pipeline/methods/side_network.py. Shapes: B rows, T tokens, d the model's width, w the side network's.
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


class Reader(nn.Module):
    """Holds the states of a pass, without a gradient: the first block's input and every block's output, each [B, T, d]."""

    def __init__(self) -> None:
        super().__init__()
        self.states: list[torch.Tensor] = []
        self.given: dict[str, Any] = {}

    def begin(self, module: Any, args: tuple, kwargs: dict) -> None:
        self.states, self.given = [], kwargs

    def first(self, module: Any, args: tuple, kwargs: dict) -> None:
        self.states.append((args[0] if args else kwargs["hidden_states"]).detach())

    def later(self, module: Any, args: tuple, output: Any) -> None:
        self.states.append((output[0] if isinstance(output, tuple) else output).detach())

    def end(self, module: Any, args: tuple, output: Any) -> Any:
        output.last_hidden_state = self.changed(output.last_hidden_state.detach())
        self.states, self.given = [], {}
        return output

    def changed(self, last: torch.Tensor) -> torch.Tensor:
        """What the output layer reads in the place of `last`, the frozen model's own normalised last states."""
        raise NotImplementedError


def attach(model: Any, reader: Reader) -> None:
    """Let a network read the model's blocks and change its last states.

    Nothing of the frozen model has a gradient or is kept for one. The model is marked as one with a state of its own, so that answers do not
    share a beginning, which the reader would not see.
    """
    inner, layers = model.base_model, blocks(model)
    inner.add_module(NAME, reader.to(model.device))
    inner.register_forward_pre_hook(reader.begin, with_kwargs=True)
    layers[0].register_forward_pre_hook(reader.first, with_kwargs=True)
    for layer in layers:
        layer.register_forward_hook(reader.later)
    inner.register_forward_hook(reader.end)
    model._is_stateful = True


class Ladder(Reader):
    """A decoder of the base's own architecture, `reduction` times narrower, whose layer i goes on from
    μ_i · down_i(state_i) + (1 - μ_i) · its last state, μ_i = sigmoid(α_i / 0.1), α_i beginning at 0.

    States are divided by their root mean square first, since later layers of a decoder have states a hundred times as large as early ones.
    What comes out is led up to the base's width and added to the base's own last states; `up` begins at zero.
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

    def changed(self, last: torch.Tensor) -> torch.Tensor:
        from transformers import DynamicCache

        past = self.given.get("past_key_values")
        if past is not None and past not in self._pasts:
            self._pasts[past] = DynamicCache()
        taken = {key: self.given[key] for key in ("attention_mask", "position_ids", "cache_position") if self.given.get(key) is not None}
        own = self.network(inputs_embeds=self._led(0), past_key_values=self._pasts[past] if past is not None else None, use_cache=past is not None, **taken)
        return last + self.up(own.last_hidden_state).to(last.dtype)

    def _led(self, number: int) -> torch.Tensor:
        state = self.states[number].float()
        return self.down[number](nn.functional.rms_norm(state, state.shape[-1:]))

    def _mixed(self, number: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        share = torch.sigmoid(self.gates[number] / TEMPERATURE)
        state = share * self._led(number + 1) + (1 - share) * (args[0] if args else kwargs.pop("hidden_states"))
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


class Fusion(Reader):
    """Attention of one trained query over the layers: Σ_l a_l · v_l, a = softmax over l of (q · v_l / √d + b_l), v_l the state after layer l as the
    output layer would read it (normalised by the base's last norm); v of the last layer is the base's own (Cao et al., 2022).

    begin: the last layer's b at the start; the others' are 0.
    """

    def __init__(self, norm: Any, d: int, layers: int, begin: float) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(d))
        self.bias = nn.Parameter(torch.tensor([0.0] * (layers - 1) + [begin]))
        self._norm = [norm]  # in a list: it is the base's own, not a part of this module

    def changed(self, last: torch.Tensor) -> torch.Tensor:
        values = torch.stack([*(self._norm[0](state) for state in self.states[1:-1]), last], -2).float()  # [B, T, L, d]
        weights = torch.softmax(values @ self.query / math.sqrt(values.shape[-1]) + self.bias, -1)
        return (weights[..., None, :] @ values)[..., 0, :].to(last.dtype)
