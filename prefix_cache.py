"""A head's keys and values, computed once for all texts of a task (follows from section 3.2).

Attention is causal and the Contextual token stands behind the instruction, so everything before the slot (template,
in-context examples, instruction) has the same keys and values for every text. They are computed once per head, kept, and
put before the rows of later batches, which then start at the slot. Invariants: vectors equal the plain path's; nothing
kept outlives a change of the decoder's weights, adapters, dtype, device or attention; memory is bounded.
"""

import inspect
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import logging


try:
    from .packing import PACKED_ATTENTION, Packing
    from .runtime_utils import ForkSafeLock, device_of
except ImportError:
    if __package__:  # a real one: a file is missing, or a package too old
        raise
    # Imported from a clone, where these files are top-level modules.
    from packing import PACKED_ATTENTION, Packing
    from runtime_utils import ForkSafeLock, device_of


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class HeadLayer:
    """Keys and values `(1, num_key_value_heads, kept, head_dim)` of one layer; `kept` ends with the head's last token."""

    keys: torch.Tensor
    values: torch.Tensor
    sliding_window: int | None = None


@dataclass(frozen=True)
class SharedHead:
    """What one head leaves in the decoder. Never changed once made, so that threads can share it."""

    length: int
    layers: tuple[HeadLayer, ...]

    @property
    def nbytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)


class PrefixCache:
    """
    The heads that a model has computed, least recently used first.

    Args:
        max_bytes (`int`, defaults to 256 MiB): Most that the kept keys and values may take; 0 or `None` switches
            sharing off.
        max_entries (`int`, defaults to 64): Most heads kept; 0 or `None` switches sharing off.
        min_tokens (`int`, defaults to 4): Shorter heads are not worth an attention over two pieces.

    `hits` and `misses` count heads looked up, per batch, since the last `clear`. All three limits may be changed at any
    time. A copied or pickled model starts with an empty cache of the same limits.
    """

    def __init__(self, max_bytes: int | None = 256 * 2**20, max_entries: int | None = 64, min_tokens: int = 4):
        self.max_bytes, self.max_entries, self.min_tokens = max_bytes, max_entries, min_tokens
        self._lock = ForkSafeLock()
        self.clear()

    @property
    def enabled(self) -> bool:
        return bool(self.max_bytes) and bool(self.max_entries)

    @property
    def nbytes(self) -> int:
        with self._lock:
            return sum(head.nbytes for head in self._heads.values())

    def __len__(self) -> int:
        return len(self._heads)

    def clear(self) -> None:
        """Forgets all heads. Needed by hand only after writing through `.data` into a few single weights."""
        with self._lock:
            self._scan: ModuleScan | None = None
            self._heads: OrderedDict[tuple[int, ...], SharedHead] = OrderedDict()
            self._seen: OrderedDict[tuple[int, ...], None] = OrderedDict()
            self._fingerprint = None
            self.hits = self.misses = 0

    def scan(self, model: PreTrainedModel) -> "ModuleScan":
        """The [`ModuleScan`] of the model that this cache belongs to, made anew when its modules are others than before."""
        scan = self._scan
        if scan is None or not scan.is_current(model):
            scan = self._scan = ModuleScan(model)
        return scan

    def get(self, head_ids: tuple[int, ...], fingerprint: tuple) -> SharedHead | None:
        """The head's keys and values, if they were computed by the decoder that has this fingerprint."""
        with self._lock:
            if fingerprint != self._fingerprint:
                self._heads.clear()
                self._fingerprint = fingerprint
            head = self._heads.get(head_ids)
            if head is None:
                self.misses += 1
            else:
                self.hits += 1
                self._heads.move_to_end(head_ids)
            return head

    def put(self, head_ids: tuple[int, ...], fingerprint: tuple, head: SharedHead) -> None:
        """Keeps a head, and drops the least recently used ones beyond the limits. A head larger than them is not kept."""
        with self._lock:
            if fingerprint == self._fingerprint:
                self._heads[head_ids] = head
            total = sum(head.nbytes for head in self._heads.values())
            while self._heads and (total > (self.max_bytes or 0) or len(self._heads) > (self.max_entries or 0)):
                total -= self._heads.popitem(last=False)[1].nbytes

    def pays(self, head_ids: tuple[int, ...], rows: int) -> bool:
        """Whether to compute a head that is not kept: it serves several rows now, or was asked for before."""
        with self._lock:
            known = head_ids in self._seen
            self._seen[head_ids] = None
            self._seen.move_to_end(head_ids)
            while len(self._seen) > 4 * (self.max_entries or 0):
                self._seen.popitem(last=False)
            return rows > 1 or known

    def __getstate__(self) -> dict:
        return {"max_bytes": self.max_bytes, "max_entries": self.max_entries, "min_tokens": self.min_tokens}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)


class _FullLayer(DynamicLayer):
    """Gives attention the head's keys before the text's own; keeps nothing of the text."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states, value_states, *args, **kwargs):
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


class _SlidingLayer(DynamicSlidingWindowLayer):
    """The same where attention reaches back `sliding_window` tokens: of a longer head only the last ones are kept."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, sliding_window: int, length: int):
        super().__init__(sliding_window)
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.cumulative_length = keys, values, length

    def update(self, key_states, value_states, *args, **kwargs):
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


def expand_heads(heads: Sequence[SharedHead]) -> Cache:
    """
    The cache with which a decoder reads rows that start behind their heads, one head per row.

    Rows with one and the same head see one copy of it, expanded. Different heads are padded on the left to the longest;
    `attention_mask` then has to say where (see [`heads_mask`]).
    """
    longest = max(head.length for head in heads)
    layers = []
    for parts in zip(*(head.layers for head in heads)):
        window = parts[0].sliding_window
        if all(head is heads[0] for head in heads):
            keys = parts[0].keys.expand(len(heads), -1, -1, -1)  # (batch, num_key_value_heads, kept, head_dim)
            values = parts[0].values.expand(len(heads), -1, -1, -1)
        else:
            kept = longest if window is None else min(longest, window - 1)
            keys = torch.cat([_pad_left(part.keys, kept) for part in parts])
            values = torch.cat([_pad_left(part.values, kept) for part in parts])
        layers.append(_FullLayer(keys, values) if window is None else _SlidingLayer(keys, values, window, longest))
    return Cache(layers=layers)


def heads_mask(heads: Sequence[SharedHead], device: torch.device) -> torch.Tensor:
    """1 where a row's head has a token, 0 for its padding on the left: `(batch, longest)`."""
    lengths = torch.tensor([head.length for head in heads], device=device)  # (batch,)
    longest = max(head.length for head in heads)
    return (torch.arange(longest, device=device) >= (longest - lengths).unsqueeze(-1)).long()


def _pad_left(states: torch.Tensor, length: int) -> torch.Tensor:
    return nn.functional.pad(states, (0, 0, length - states.shape[-2], 0))


def compute_head(decoder: PreTrainedModel, head_ids: Sequence[int]) -> SharedHead | None:
    """
    Runs the decoder over a head, with gradients where they are enabled.

    Returns:
        What it leaves, or `None` from a decoder whose state is more than keys and values.
    """
    embeddings = decoder.get_input_embeddings()
    ids = torch.tensor([head_ids], device=device_of(embeddings))  # (1, head_len)
    cache = DynamicCache(config=decoder.config)
    decoder(inputs_embeds=embeddings(ids), past_key_values=cache, use_cache=True)
    layers = []
    for layer in cache.layers:
        window = layer.sliding_window if type(layer) is DynamicSlidingWindowLayer else None
        kept = len(head_ids) if window is None else min(len(head_ids), window - 1)
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or not layer.is_initialized or window == 1:
            return None
        if layer.keys.shape[-2] != kept or layer.keys.shape[0] != 1:
            return None
        layers.append(HeadLayer(layer.keys.contiguous(), layer.values.contiguous(), window))
    return SharedHead(len(head_ids), tuple(layers)) if layers else None


class ModuleScan:
    """
    What every forward pass asks of a model's modules, most of it of its decoder's. They are listed once, since a walk over
    the modules of 30 layers takes milliseconds; `is_current` tells in microseconds whether one was added, replaced or
    removed since.
    """

    def __init__(self, model: PreTrainedModel):
        self.model, self.decoder = model, model.decoder
        self.modules = list(model.modules())
        self.children = [(m._modules, tuple(m._modules.values())) for m in self.modules if m._modules]
        modules = list(model.decoder.modules())
        self.tensors = [tensors for m in modules for tensors in (m._parameters, m._buffers) if tensors]
        self.attentions = [module for module in modules if hasattr(module, "is_causal")]
        self.checkpointed = [module for module in modules if hasattr(module, "gradient_checkpointing")]
        self.dropouts = [module for module in modules if isinstance(module, nn.Dropout)]
        self.adapted = [module for module in modules if hasattr(module, "merged_adapters")]

    def is_current(self, model: PreTrainedModel) -> bool:
        """Whether this is a list of the modules that the model has now."""
        return model is self.model and all(tuple(now.values()) == then for now, then in self.children)

    def is_offloaded(self) -> bool:
        """Whether weights come from elsewhere for each forward pass, so that nothing here shows when they change."""
        return any(tensor.is_meta for group in self.tensors for tensor in group.values() if tensor is not None)

    def is_causal(self) -> bool:
        """Whether every attention looks back only, so that padding on the right can change nothing."""
        config = self.decoder.config.get_text_config()
        if getattr(config, "is_causal", True) is False or getattr(config, "use_bidirectional_attention", None):
            return False
        return bool(self.attentions) and all(module.is_causal for module in self.attentions)

    def why_not_shareable(self) -> str | None:
        """Why a head's keys and values may depend on what follows it, or cannot be handed over; `None` if all is well."""
        if "past_key_values" not in inspect.signature(self.decoder.forward).parameters:
            return "it takes no past_key_values"
        if not self.is_causal():
            return "its attention is not causal"
        for parameters in _rope_parameters(self.decoder.config.get_text_config()):
            if parameters.get("rope_type") in ("dynamic", "longrope"):
                return f"its {parameters['rope_type']} rotary positions depend on the length of the whole row"
        return None

    def trains_with_state(self) -> bool:
        """Whether training sees a head differently each time (dropout), or cannot take keys over (checkpointing)."""
        if not self.decoder.training:
            return False
        return bool(
            any(module.p > 0 and module.training for module in self.dropouts)
            or getattr(self.decoder.config.get_text_config(), "attention_dropout", 0.0)
            or any(module.gradient_checkpointing for module in self.checkpointed)
        )

    def fingerprint(self) -> tuple:
        """
        What a head's keys and values depend on besides its ids: where the weights are, how often they were written, some
        of their numbers (writing through `.data` leaves no other trace), the adapters' state, attention and autocast.
        """
        tensors = [tensor for group in self.tensors for tensor in group.values() if tensor is not None]
        device, attention = tensors[0].device.type, self.decoder.config._attn_implementation
        adapters = [
            (
                tuple(module.active_adapters),
                tuple(module.merged_adapters),
                module.disable_adapters,
                tuple(module.scaling.items()) if isinstance(getattr(module, "scaling", None), dict) else None,
            )
            for module in self.adapted
        ]
        return (
            tuple(map(_identity, tensors)),
            _sample(tensors),
            tuple(adapters),
            attention if attention != PACKED_ATTENTION else "sdpa",  # the same to a head; threads switch between them
            torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        )


def look_both_ways(decoder: PreTrainedModel) -> None:
    """
    Makes a decoder's attention bidirectional (appendix C.6). Masks are made by the configuration; kernels that get none,
    because there is no padding, go by the modules.

    Raises:
        ValueError: no part of the decoder says that it is causal, so none would say that it no longer is.
    """
    attentions = [module for module in decoder.modules() if hasattr(module, "is_causal")]
    if not attentions:
        raise ValueError(f"`bidirectional` is not possible for {type(decoder).__name__}: its attention has no switch.")
    for part in (decoder.config.get_text_config(), *attentions):
        part.is_causal = False


def _rope_parameters(config) -> list[dict]:
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]  # one per kind of layer
    return [parameters, *nested]


def _identity(tensor: torch.Tensor) -> tuple:
    if type(tensor) not in (torch.Tensor, nn.Parameter):
        return id(tensor), tensor.dtype, tensor.device  # quantised or sharded: there may be no pointer to ask for
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.dtype, tensor.device


def _sample(tensors: Sequence[torch.Tensor], tensors_read: int = 24, numbers_read: int = 4) -> tuple:
    """A few numbers of some tensors, evenly spaced; read from each device at once."""
    plain = [t for t in tensors if type(t) in (torch.Tensor, nn.Parameter) and t.numel() and not t.is_meta]
    parts: dict[tuple, list[torch.Tensor]] = {}
    for tensor in plain[:: max(1, len(plain) // tensors_read)]:
        flat = tensor.detach().flatten()
        few = flat[:: max(1, len(flat) // numbers_read)][:numbers_read]
        parts.setdefault((few.device, few.dtype), []).append(few)
    return tuple(number for part in parts.values() for number in torch.cat(part).float().tolist())


def pad_right(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Moves padding to the right and cuts what all rows have too much."""
    order = attention_mask.argsort(dim=-1, descending=True, stable=True)[:, : int(attention_mask.sum(-1).max())]
    return input_ids.gather(-1, order), attention_mask.gather(-1, order)  # (batch, longest) each


def split_heads(input_ids: torch.Tensor, slots: torch.Tensor) -> list[tuple[int, ...]]:
    """The ids before each row's slot, of rows that are padded on the right."""
    slot = int(slots[0])
    heads = input_ids[:, :slot]
    if (slots == slot).all() and (heads == heads[0]).all():
        return [tuple(heads[0].tolist())] * len(input_ids)
    return [tuple(row[:slot]) for row, slot in zip(input_ids.tolist(), slots.tolist())]


def plan_rows(
    model, input_ids: torch.Tensor, attention_mask: torch.Tensor, packed: bool = False
) -> list[tuple[torch.Tensor, dict]]:
    """
    Splits a batch into rows whose head's keys and values are there and rows to be read in one piece. With `packed`, rows
    that all have the same head, or none, come with a [`Packing`].

    Returns:
        At most two pairs of row numbers and the arguments with which `forward` reads these rows.
    """
    input_ids, attention_mask = pad_right(input_ids, attention_mask)
    slots = model.find_slots(input_ids).int().argmax(-1)  # (batch,)
    scan = model.prefix_cache.scan(model)
    is_causal = scan.is_causal()
    heads = find_heads(model, scan, split_heads(input_ids, slots))
    plan = []
    for shared in (True, False):
        rows = [row for row, head in enumerate(heads) if (head is not None) == shared]
        if not rows:
            continue
        rows_heads = [heads[row] for row in rows]
        rows = torch.tensor(rows, device=input_ids.device)
        inputs = {"input_ids": input_ids[rows], "attention_mask": attention_mask[rows], "right_padded": is_causal}
        if shared:
            ids, mask = behind_heads(inputs["input_ids"], inputs["attention_mask"], slots[rows])
            mask = torch.cat([heads_mask(rows_heads, mask.device), mask], dim=-1)  # (rows, head_len + seq_len)
            same = all(head is rows_heads[0] for head in rows_heads)
            inputs = {"input_ids": ids, "attention_mask": mask, "right_padded": same and is_causal}
            inputs["past_key_values"] = expand_heads(rows_heads)
        if packed and inputs["right_padded"]:
            seq_len = inputs["input_ids"].shape[1]
            lengths = inputs["attention_mask"][:, -seq_len:].sum(-1).tolist()
            inputs["packing"] = Packing(lengths, rows_heads[0])
        plan.append((rows, inputs))
    return plan


def find_heads(model, scan: ModuleScan, heads_ids: Sequence[tuple[int, ...]]) -> list[SharedHead | None]:
    """Each row's head, from the model's cache or newly computed where that pays; `None` for rows to be read in one piece."""
    cache, decoder = model.prefix_cache, model.decoder
    counts = {ids: rows for ids, rows in Counter(heads_ids).items() if len(ids) >= cache.min_tokens}
    if not cache.enabled or not counts or scan.is_offloaded():
        return [None] * len(heads_ids)
    keep = not (decoder.training or torch.is_grad_enabled())
    if not keep and scan.trains_with_state():
        return [None] * len(heads_ids)
    state = scan.fingerprint() if keep else None
    found: dict[tuple[int, ...], SharedHead | None] = {}
    for head_ids, rows in counts.items():
        found[head_ids] = cache.get(head_ids, state) if keep else None
        if found[head_ids] is not None or not (cache.pays(head_ids, rows) if keep else rows > 1):
            continue
        reason = scan.why_not_shareable()
        head = compute_head(decoder, head_ids) if reason is None else None
        if head is None:
            logger.debug(
                "%s reads every head anew: %s.", type(decoder).__name__, reason or "its state is more than keys"
            )
            return [None] * len(heads_ids)
        if keep:
            cache.put(head_ids, state, head)
        found[head_ids] = head
    return [found.get(head_ids) for head_ids in heads_ids]


def behind_heads(input_ids: torch.Tensor, attention_mask: torch.Tensor, slots: torch.Tensor):
    """Rows and masks from the slot on, padded on the right."""
    longest = int((attention_mask.sum(-1) - slots).max())
    places = slots.unsqueeze(-1) + torch.arange(longest, device=slots.device)  # (batch, longest)
    inside = places < input_ids.shape[-1]
    places = places.clamp(max=input_ids.shape[-1] - 1)
    return input_ids.gather(-1, places), attention_mask.gather(-1, places) * inside
