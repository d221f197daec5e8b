"""Token prepending (TP; Fu et al., ACL 2025), a method that the paper compares with (Table 6).

From the second layer on, the slot holds the state that the layer before gave EOS, so text tokens see, one layer late, what
EOS has seen. Into the first layer goes the slot's own word embedding.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel


@dataclass
class Prepending:
    """
    Which states [`prepend`] moves: in row i the one at `ends[i]` to `slots[i]`. `layers_seen` counts the layers that were
    told.
    """

    slots: torch.Tensor
    ends: torch.Tensor
    layers_seen: int = 0


def prepend(is_first: bool, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Runs before each decoder layer: puts EOS's state, as the layer before left it, into the slot."""
    kwargs = dict(kwargs)
    prepending = kwargs.pop("prepending", None)
    if prepending is None:
        return args, kwargs
    prepending.layers_seen += 1
    if is_first:
        return args, kwargs
    states, *rest = args
    rows = torch.arange(len(states), device=states.device)  # (batch,)
    slots, ends = prepending.slots.to(states.device), prepending.ends.to(states.device)  # (batch,)
    moved = states.clone()  # (batch, seq_len, hidden_size)
    moved[rows, slots] = states[rows, ends]
    return (moved, *rest), kwargs


def prepend_between_layers(decoder: PreTrainedModel) -> None:
    """
    Makes a decoder's layers move states where its `forward` is given `prepending=`, a [`Prepending`].

    Raises:
        ValueError: its layers cannot be found.
    """
    num_layers = decoder.config.get_text_config().num_hidden_layers
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList)]
    layers = next((module for module in lists if len(module) == num_layers), None)
    if layers is None:
        raise ValueError(f"{type(decoder).__name__} has no list of {num_layers} layers to prepend between.")
    for i, layer in enumerate(layers):
        layer.register_forward_pre_hook(partial(prepend, i == 0), with_kwargs=True)


def check_prepended(decoder: PreTrainedModel, prepending: Prepending) -> None:
    """Raises ValueError unless every layer was told what to move."""
    num_layers = decoder.config.get_text_config().num_hidden_layers
    if prepending.layers_seen != num_layers:
        raise ValueError(
            f"{type(decoder).__name__} told {prepending.layers_seen} of its {num_layers} layers what to prepend: token "
            "prepending is not possible with it."
        )
