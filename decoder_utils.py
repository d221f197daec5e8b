"""Other ways to run a decoder: packed rows, and token prepending.

`packed_states` joins the rows of a batch into one without padding, and attention runs over each run of equally long rows by
itself. Invariant: no row sees another. On GPUs in half precision the variable-length kernel of torch 2.12 takes all runs at
once.

Token prepending (TP; Fu et al., ACL 2025) is a method that the paper compares with (Table 6): from the second layer on, the
slot holds the state that the layer before gave EOS, so text tokens see, one layer late, what EOS has seen. Into the first
layer goes the slot's own word embedding.
"""

import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils import logging


try:
    from .runtime_utils import ForkSafeLock
except ImportError:
    if __package__:  # a real one: a file is missing, or a package too old
        raise
    # Imported from a clone, where these files are top-level modules.
    from runtime_utils import ForkSafeLock

try:
    from torch.nn.attention.varlen import varlen_attn

    if not {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys():  # torch 2.11's and older
        varlen_attn = None
except ImportError:
    varlen_attn = None

logger = logging.get_logger(__name__)

PACKED_ATTENTION = f"causal2vec_packed_{__name__.replace('.', '_')}"  # each folder's code has its own
_SWITCHING = ForkSafeLock()  # a decoder's attention is chosen by its configuration, which threads share


def trim(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Drops the columns that are padding in every row."""
    used = mask.any(0)  # (seq_len,)
    return ids[:, used], mask[:, used]


def groups_of_like_length(lengths: Sequence[int], waste: float = 0.15, min_tokens: int = 128) -> list[list[int]]:
    """
    Groups rows, longest first, so that none is padded by more than `waste` of its group's length, except that a group
    has at least `min_tokens`: tiny matrix products are slow.
    """
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[groups[-1][0]] if groups else 0
        if groups and (lengths[row] >= (1 - waste) * longest or len(groups[-1]) * longest < min_tokens):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


@dataclass
class Packing:
    """
    Rows joined into one.

    Args:
        lengths (list of `int`): Tokens per row, without padding.
        prefix ([`SharedPrefix`], *optional*): The prefix that all rows follow.
        windows (list, *optional*): The attention window of each decoder layer; filled in.
    """

    lengths: list[int]
    prefix: object | None = None
    windows: list[int | None] = field(default_factory=list)
    layers_done: list[int] = field(default_factory=list)
    layouts: dict[tuple, "VarlenLayout"] = field(default_factory=dict)

    def varlen_layout(self, kept: int, device: torch.device) -> "VarlenLayout":
        """Where rows begin and end for the variable-length kernel, each with `kept` keys of the prefix before its own."""
        if (kept, device) not in self.layouts:
            ends = list(itertools.accumulate(self.lengths, initial=0))
            keys = [[*range(kept), *range(kept + start, kept + end)] for start, end in itertools.pairwise(ends)]
            self.layouts[kept, device] = VarlenLayout(
                torch.tensor(ends, dtype=torch.int32, device=device),
                torch.tensor([end + kept * row for row, end in enumerate(ends)], dtype=torch.int32, device=device),
                torch.tensor([key for row in keys for key in row], device=device),
            )
        return self.layouts[kept, device]


@dataclass
class VarlenLayout:
    """
    Args:
        query_ends, key_ends (`(rows + 1,)`): Where each row's queries and keys begin and end.
        keys (`(rows * kept + total,)`): Indices of each row's keys in the concatenation of prefix keys and row keys.
    """

    query_ends: torch.Tensor
    key_ends: torch.Tensor
    keys: torch.Tensor


def packed_states(decoder: PreTrainedModel, inputs_embeds: torch.Tensor, packing: Packing) -> torch.Tensor | None:
    """
    The decoder's last hidden states `(total, hidden_size)` of rows padded on the right, row after row without padding.

    Returns `None` if the result would not be exact: attention is not SDPA, or some layer bypasses transformers'
    `AttentionInterface`.
    """
    config = decoder.config
    takes_kwargs = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(decoder.forward).parameters.values())
    if not takes_kwargs or config._attn_implementation not in ("sdpa", PACKED_ATTENTION):
        logger.debug("%s reads rows padded: its attention cannot be replaced.", type(decoder).__name__)
        return None
    start = 0 if packing.prefix is None else packing.prefix.length
    lengths = torch.tensor(packing.lengths, device=inputs_embeds.device)  # (batch,)
    inside = torch.arange(inputs_embeds.shape[1], device=lengths.device) < lengths.unsqueeze(-1)  # (batch, seq_len)
    position_ids = inside.nonzero()[:, 1].unsqueeze(0) + start  # (1, total)
    packing.windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
    packing.layers_done = []
    with _SWITCHING:
        before = config._attn_implementation
        config._attn_implementation = PACKED_ATTENTION
        try:
            hidden = decoder(
                inputs_embeds=inputs_embeds[inside].unsqueeze(0),  # (1, total, hidden_size)
                # A mask with four dimensions is used as it is. One with two, or none, would be expanded to one over all
                # rows.
                attention_mask=inputs_embeds.new_zeros(1, 1, 1, 1),
                position_ids=position_ids,
                use_cache=False,
                packing=packing,
            ).last_hidden_state[0]  # (total, hidden_size)
        finally:
            config._attn_implementation = before
    if sorted(packing.layers_done) != list(range(config.get_text_config().num_hidden_layers)):
        logger.debug("%s reads rows padded: not all of its layers saw where rows end.", type(decoder).__name__)
        return None
    return hidden


def packed_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, packing=None, **kwargs):
    """SDPA within each row of a packed batch, `(1, heads, total, head_dim)`; without `packing`, plain SDPA."""
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    packing.layers_done.append(module.layer_idx)
    window = packing.windows[module.layer_idx]
    prefix = None if packing.prefix is None else packing.prefix.layers[module.layer_idx]
    attend = _attend_runs if dropout or not has_varlen_kernel(query) else _attend_varlen
    return attend(query, key, value, packing, prefix, window, scaling, dropout).unsqueeze(0), None


def _attend_runs(query, key, value, packing: Packing, prefix, window: int | None, scaling, dropout) -> torch.Tensor:
    """One SDPA per run of rows of equal length, on any device and in any dtype: `(total, heads, head_dim)`."""
    outputs, start = [], 0
    for length, run in itertools.groupby(packing.lengths):
        count = len(list(run))
        end = start + count * length
        # (1, heads, count * length, head_dim) -> (count, heads, length, head_dim), for queries, keys and values
        q, k, v = (t[0, :, start:end].unflatten(1, (count, length)).transpose(0, 1) for t in (query, key, value))
        mask = None
        if prefix is not None:
            k = torch.cat(
                [prefix.keys.expand(count, -1, -1, -1), k], dim=-2
            )  # (count, kv_heads, kept + length, head_dim)
            v = torch.cat([prefix.values.expand(count, -1, -1, -1), v], dim=-2)
        kept = k.shape[-2] - length
        if kept or (window is not None and length > window):
            back = torch.arange(kept, kept + length, device=q.device)[:, None] - torch.arange(
                kept + length, device=q.device
            )
            mask = (back >= 0) if window is None else (back >= 0) & (back < window)  # (length, kept + length)
        attended = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling, is_causal=mask is None, enable_gqa=True
        )
        outputs.append(attended.transpose(1, 2).flatten(0, 1))  # (count * length, heads, head_dim)
        start = end
    return torch.cat(outputs)


def _attend_varlen(query, key, value, packing: Packing, prefix, window: int | None, scaling, dropout) -> torch.Tensor:
    """All rows in one call of torch's variable-length kernel: `(total, heads, head_dim)`."""
    query, key, value = (t[0].transpose(0, 1) for t in (query, key, value))  # (total, heads, head_dim) each
    kept = 0 if prefix is None else prefix.keys.shape[-2]
    layout = packing.varlen_layout(kept, query.device)
    if kept:  # each row has the prefix's keys before its own
        key = torch.cat([prefix.keys[0].transpose(0, 1), key])[layout.keys]  # (rows * kept + total, kv_heads, head_dim)
        value = torch.cat([prefix.values[0].transpose(0, 1), value])[layout.keys]
    longest = max(packing.lengths)
    return varlen_attn(
        query,
        key,
        value,
        layout.query_ends,
        layout.key_ends,
        longest,
        kept + longest,
        scale=scaling,
        window_size=(
            -1 if window is None else window - 1,
            0,
        ),  # how far back and ahead; the last key is the last query's
        enable_gqa=True,
    )


def has_varlen_kernel(query: torch.Tensor) -> bool:
    """Whether torch's variable-length kernel takes these: on a GPU, in half precision."""
    return varlen_attn is not None and query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)


@dataclass
class Prepending:
    """
    Which states [`prepend`] moves: in row i, from `ends[i]` to `slots[i]`. `layers_seen` counts the layers that
    received it.
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
    Makes a decoder's layers move states when its `forward` gets `prepending=`, a [`Prepending`].

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
    """Raises ValueError unless every layer received the [`Prepending`]."""
    num_layers = decoder.config.get_text_config().num_hidden_layers
    if prepending.layers_seen != num_layers:
        raise ValueError(
            f"{type(decoder).__name__} told {prepending.layers_seen} of its {num_layers} layers what to prepend: token "
            "prepending is not possible with it."
        )
