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
from pipeline.models.blocks import blocks, decoder

NAME = "beside"
"""What the network is called inside the decoder."""
CACHES = ("past_key_values", "cache_params")
"""What models call the cache that they are given; state space models have the second."""
DIVIDED = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "moe_intermediate_size")
"""Widths of a config beside the hidden one."""
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
    inner, layers = decoder(model), blocks(model)
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
    The output is projected up to the width of the base's last states and added to them; `up` starts at zero.

    Args:
        width: of the base's last states, as its output layer reads them.
    """

    def __init__(self, config: Any, width: int, reduction: int) -> None:
        from transformers import AutoModel

        super().__init__()
        small = narrowed(config, reduction)
        self.network = AutoModel.from_config(small, attn_implementation=config._attn_implementation, dtype=torch.float32)
        self.network.set_input_embeddings(nn.Identity())
        d, w = config.hidden_size, small.hidden_size
        layers = blocks(self.network)
        self.down = nn.ModuleList(nn.Linear(d, w, bias=False) for _ in range(len(layers) + 1))
        self.up = nn.Linear(w, width, bias=False)
        nn.init.zeros_(self.up.weight)
        self.gates = nn.Parameter(torch.zeros(len(layers)))
        self._pasts: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(lambda m, args, kwargs, i=number: self._mixed(i, args, kwargs), with_kwargs=True)

    def change(self, last: torch.Tensor) -> torch.Tensor:
        from transformers import DynamicCache

        shared = {key: self.kwargs[key] for key in ("attention_mask", "position_ids", "cache_position") if self.kwargs.get(key) is not None}
        key, past = next(((key, self.kwargs[key]) for key in CACHES if self.kwargs.get(key) is not None), (None, None))
        if key is not None:
            if past not in self._pasts:
                self._pasts[past] = DynamicCache(config=self.network.config)
            shared[key] = self._pasts[past]
        out = self.network(inputs_embeds=self._projected(0), use_cache=past is not None, **shared)
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
    """A config of the same architecture, `reduction` times narrower. Raises UserError where its width cannot be divided."""
    small = copy.deepcopy(config)
    width, rest = divmod(config.hidden_size, reduction)
    if rest:
        raise UserError(f"the model's width {config.hidden_size} cannot be divided by method.reduction={reduction}; choose another")
    small.hidden_size = width
    if getattr(config, "num_attention_heads", None):
        _narrow_heads(small, config, width, reduction)
    for key in DIVIDED:
        if getattr(config, key, None) is not None:
            setattr(small, key, getattr(config, key) // reduction)
    if getattr(config, "word_embed_proj_dim", None) is not None:  # OPT: the width of embeddings and last states
        small.word_embed_proj_dim = width
    small.vocab_size, small.pad_token_id = 1, None  # its embeddings are not used
    return small


def _narrow_heads(small: Any, config: Any, width: int, reduction: int) -> None:
    """As many heads as have an even width; where heads have widths of their own for keys and values (DeepSeek), fewer heads of the same widths."""
    own_widths = getattr(config, "qk_rope_head_dim", None) is not None
    heads = max(1, config.num_attention_heads // reduction) if own_widths else next(
        (h for h in range(config.num_attention_heads, 0, -1) if width % h == 0 and width // h % 2 == 0), None)
    if heads is None:
        raise UserError(f"the model's width {config.hidden_size} cannot be divided by method.reduction={reduction} into heads of an even width; choose another")
    small.num_attention_heads = heads
    for key in ("num_key_value_heads", "num_kv_heads"):
        if getattr(config, key, None) is not None:
            setattr(small, key, heads if own_widths else next(g for g in range(min(getattr(config, key), heads), 0, -1) if heads % g == 0))
    derived = any(isinstance(vars(kind).get("head_dim"), property) for kind in type(config).__mro__)
    if not own_widths and not derived and getattr(config, "head_dim", None) is not None:
        small.head_dim = width // heads


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
