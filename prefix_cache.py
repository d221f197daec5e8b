"""A prefix's keys and values, computed once for all texts of a task (follows from section 3.2).

Attention is causal and the Contextual token follows the instruction, so everything before the slot (template,
in-context examples, instruction) has the same keys and values for every text. They are computed once per prefix,
cached, and prepended to the rows of later batches, which then start at the slot. Invariants: vectors equal the uncached
path's; no entry outlives a change of the decoder's weights, adapters, dtype, device or attention; memory is bounded.
"""

import inspect
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import logging


try:
    from .decoder_utils import PACKED_ATTENTION
    from .runtime_utils import ForkSafeLock, device_of
except ImportError:
    if __package__:  # a real one: a file is missing, or a package too old
        raise
    # Imported from a clone, where these files are top-level modules.
    from decoder_utils import PACKED_ATTENTION
    from runtime_utils import ForkSafeLock, device_of


logger = logging.get_logger(__name__)

PLAIN = (torch.Tensor, nn.Parameter)  # others are quantised or sharded
_SAMPLES: ContextVar[dict | None] = ContextVar("samples", default=None)


@dataclass(frozen=True)
class PrefixLayer:
    """Keys and values `(1, num_key_value_heads, kept, head_dim)` of one layer; `kept` ends with the prefix's last token."""

    keys: torch.Tensor
    values: torch.Tensor
    sliding_window: int | None = None


@dataclass(frozen=True)
class SharedPrefix:
    """The decoder's state after one prefix. Immutable, so threads can share it."""

    length: int
    layers: tuple[PrefixLayer, ...]

    @property
    def nbytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)


class PrefixCache:
    """
    An LRU cache of a model's prefixes.

    Args:
        max_bytes (`int`, defaults to 256 MiB): Limit for all cached keys and values; 0 or `None` turns sharing off.
        max_entries (`int`, defaults to 64): Limit for the number of prefixes; 0 or `None` turns sharing off.
        min_tokens (`int`, defaults to 4): Prefixes shorter than this are not shared.

    `hits` and `misses` count lookups, one per batch, since the last `clear`. All three limits can be changed at any
    time. A copied or pickled model starts with an empty cache with the same limits.
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
            return sum(prefix.nbytes for prefix in self._prefixes.values())

    def __len__(self) -> int:
        return len(self._prefixes)

    def clear(self) -> None:
        """Drops all prefixes. Only needed after writing single weights through `.data`."""
        with self._lock:
            self._scan: ModuleScan | None = None
            self._prefixes: OrderedDict[tuple[int, ...], SharedPrefix] = OrderedDict()
            self._seen: OrderedDict[tuple[int, ...], None] = OrderedDict()
            self._fingerprint = None
            self.hits = self.misses = 0

    def scan(self, model: PreTrainedModel) -> "ModuleScan":
        """The [`ModuleScan`] of the model that owns this cache, renewed when its modules have changed."""
        scan = self._scan
        if scan is None or not scan.is_current(model):
            scan = self._scan = ModuleScan(model)
        return scan

    def get(self, prefix_ids: tuple[int, ...], fingerprint: tuple) -> SharedPrefix | None:
        """The prefix's keys and values, if a decoder with this fingerprint computed them."""
        with self._lock:
            if fingerprint != self._fingerprint:
                self._prefixes.clear()
                self._fingerprint = fingerprint
            prefix = self._prefixes.get(prefix_ids)
            if prefix is None:
                self.misses += 1
            else:
                self.hits += 1
                self._prefixes.move_to_end(prefix_ids)
            return prefix

    def put(self, prefix_ids: tuple[int, ...], fingerprint: tuple, prefix: SharedPrefix) -> None:
        """
        Adds a prefix and evicts the least recently used ones beyond the limits. A prefix larger than the limits is not
        added.
        """
        with self._lock:
            if fingerprint == self._fingerprint:
                self._prefixes[prefix_ids] = prefix
            total = sum(prefix.nbytes for prefix in self._prefixes.values())
            while self._prefixes and (total > (self.max_bytes or 0) or len(self._prefixes) > (self.max_entries or 0)):
                total -= self._prefixes.popitem(last=False)[1].nbytes

    def pays(self, prefix_ids: tuple[int, ...], rows: int) -> bool:
        """Whether to compute a prefix that is not cached: it serves several rows now, or was requested before."""
        with self._lock:
            known = prefix_ids in self._seen
            self._seen[prefix_ids] = None
            self._seen.move_to_end(prefix_ids)
            while len(self._seen) > 4 * (self.max_entries or 0):
                self._seen.popitem(last=False)
            return rows > 1 or known

    def __getstate__(self) -> dict:
        return {"max_bytes": self.max_bytes, "max_entries": self.max_entries, "min_tokens": self.min_tokens}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)


class _FullLayer(DynamicLayer):
    """Gives attention the prefix's keys followed by the text's own, and stores nothing."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states, value_states, *args, **kwargs):
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


class _SlidingLayer(DynamicSlidingWindowLayer):
    """The same for sliding-window attention: of a longer prefix, only the last tokens are kept."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, sliding_window: int, length: int):
        super().__init__(sliding_window)
        # The sliding layer's own version copies a scalar to the device.
        DynamicLayer.lazy_initialization(self, keys, values)
        self.keys, self.values, self.cumulative_length = keys, values, length

    def update(self, key_states, value_states, *args, **kwargs):
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


class _NoLayer(DynamicLayer):
    """Passes the text's own keys and values through and stores nothing."""

    def update(self, key_states, value_states, *args, **kwargs):
        return key_states, value_states


class _NoSlidingLayer(DynamicSlidingWindowLayer):
    """The same for sliding-window attention."""

    update = _NoLayer.update


def expand_prefix(prefix: SharedPrefix, batch_size: int) -> Cache:
    """The cache for rows that follow a prefix: one copy of its keys and values, expanded over the batch."""
    layers = []
    for layer in prefix.layers:
        keys = layer.keys.expand(batch_size, -1, -1, -1)  # (batch, num_key_value_heads, kept, head_dim)
        values = layer.values.expand(batch_size, -1, -1, -1)
        window = layer.sliding_window
        layers.append(
            _FullLayer(keys, values) if window is None else _SlidingLayer(keys, values, window, prefix.length)
        )
    return Cache(layers=layers)


def no_prefix(model: PreTrainedModel) -> Cache | None:
    """
    An empty cache for rows without a prefix: without any cache, transformers checks the position ids for packed rows, which
    waits for the accelerator. `None` if the decoder takes no cache.
    """
    layers = DynamicCache(config=model.decoder.config).layers
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return None
    if not layers or model.training or model.prefix_cache.scan(model).why_not_shareable() is not None:
        return None
    return Cache(
        layers=[
            _NoSlidingLayer(layer.sliding_window) if type(layer) is DynamicSlidingWindowLayer else _NoLayer()
            for layer in layers
        ]
    )


def compute_prefix(decoder: PreTrainedModel, prefix_ids: Sequence[int]) -> SharedPrefix | None:
    """
    Runs the decoder over a prefix, with gradients if they are enabled.

    Returns:
        The state, or `None` if the decoder's state is more than keys and values.
    """
    embeddings = decoder.get_input_embeddings()
    ids = torch.tensor([prefix_ids], device=device_of(embeddings))  # (1, head_len)
    cache = DynamicCache(config=decoder.config)
    decoder(inputs_embeds=embeddings(ids), past_key_values=cache, use_cache=True)
    layers = []
    for layer in cache.layers:
        window = layer.sliding_window if type(layer) is DynamicSlidingWindowLayer else None
        kept = len(prefix_ids) if window is None else min(len(prefix_ids), window - 1)
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or not layer.is_initialized or window == 1:
            return None
        if layer.keys.shape[-2] != kept or layer.keys.shape[0] != 1:
            return None
        layers.append(PrefixLayer(layer.keys.contiguous(), layer.values.contiguous(), window))
    return SharedPrefix(len(prefix_ids), tuple(layers)) if layers else None


class ModuleScan:
    """
    What every forward pass needs to know about a model's modules. They are listed once, since walking the modules of 30
    layers takes milliseconds; `is_current` tells in microseconds whether one was added, replaced or removed since.
    """

    def __init__(self, model: PreTrainedModel):
        self.model, self.decoder = model, model.decoder
        self.modules = list(model.modules())
        self.children = [(m._modules, tuple(m._modules.values())) for m in self.modules]
        self.all_tensors, self.all_adapted = _tensors_of(self.modules), _adapted_of(self.modules)
        self.hashes: tuple | None = None  # see `EncodeMixin.fingerprint`
        modules = list(model.decoder.modules())
        self.tensors, self.adapted = _tensors_of(modules), _adapted_of(modules)
        self.attentions = [module for module in modules if hasattr(module, "is_causal")]
        self.checkpointed = [module for module in modules if hasattr(module, "gradient_checkpointing")]
        self.dropouts = [module for module in modules if isinstance(module, nn.Dropout)]

    def is_current(self, model: PreTrainedModel) -> bool:
        """Whether the model still has exactly these modules."""
        return model is self.model and all(tuple(now.values()) == then for now, then in self.children)

    def is_offloaded(self) -> bool:
        """Whether weights are loaded for each forward pass, so that a change of them cannot be seen here."""
        return any(tensor.is_meta for group in self.tensors for tensor in group.values() if tensor is not None)

    def is_causal(self) -> bool:
        """Whether every attention is causal, so that padding on the right cannot change anything."""
        config = self.decoder.config.get_text_config()
        if getattr(config, "is_causal", True) is False or getattr(config, "use_bidirectional_attention", None):
            return False
        return bool(self.attentions) and all(module.is_causal for module in self.attentions)

    def why_not_shareable(self) -> str | None:
        """
        Why a prefix cannot be shared: its keys and values may depend on what follows, or cannot be passed on. `None` if
        it can.
        """
        if "past_key_values" not in inspect.signature(self.decoder.forward).parameters:
            return "it takes no past_key_values"
        if not self.is_causal():
            return "its attention is not causal"
        for parameters in _rope_parameters(self.decoder.config.get_text_config()):
            if parameters.get("rope_type") in ("dynamic", "longrope"):
                return f"its {parameters['rope_type']} rotary positions depend on the length of the whole row"
        return None

    def trains_with_state(self) -> bool:
        """
        Whether training reads a prefix differently each time (dropout), or cannot take cached keys (checkpointing).
        """
        if not self.decoder.training:
            return False
        return bool(
            any(module.p > 0 and module.training for module in self.dropouts)
            or getattr(self.decoder.config.get_text_config(), "attention_dropout", 0.0)
            or any(module.gradient_checkpointing for module in self.checkpointed)
        )

    def fingerprint(self) -> tuple:
        """What a prefix's keys and values depend on besides its ids: the decoder's weights, attention and autocast."""
        device = next(tensor for group in self.tensors for tensor in group.values() if tensor is not None).device.type
        attention = self.decoder.config._attn_implementation
        return (
            *_weights_state(self.tensors, self.adapted, _SAMPLES.get()),
            attention if attention != PACKED_ATTENTION else "sdpa",  # the same to a prefix; threads switch between them
            self.is_causal(),
            torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        )

    def weights_state(self) -> tuple:
        """A value that changes whenever a weight does; takes about a millisecond."""
        return _weights_state(self.all_tensors, self.all_adapted)

    def adapters_state(self) -> tuple:
        """The active adapters and their scaling."""
        return tuple(map(_adapter_state, self.all_adapted))


def make_bidirectional(decoder: PreTrainedModel) -> None:
    """
    Makes a decoder's attention bidirectional (appendix C.6). Masks follow the configuration; kernels that get no mask,
    because there is no padding, follow the modules.

    Raises:
        ValueError: the decoder has neither a configuration field nor a module attribute that controls causality.
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


def _tensors_of(modules: Sequence[nn.Module]) -> list[dict]:
    return [tensors for module in modules for tensors in (module._parameters, module._buffers)]


def _adapted_of(modules: Sequence[nn.Module]) -> list[nn.Module]:
    return [module for module in modules if hasattr(module, "merged_adapters")]


def _weights_state(groups: Sequence[dict], adapted: Sequence[nn.Module], samples: dict | None = None) -> tuple:
    """
    The tensors' addresses and version counters, a sample of their values (writing through `.data` leaves no other
    trace), and the adapters' state. A sample that `samples` holds is not read again.
    """
    tensors = [tensor for group in groups for tensor in group.values() if tensor is not None]
    samples = {} if samples is None else samples
    if id(groups) not in samples:
        samples[id(groups)] = _sample(tensors)
    return tuple(map(_identity, tensors)), samples[id(groups)], tuple(map(_adapter_state, adapted))


def _adapter_state(module: nn.Module) -> tuple:
    return (
        tuple(module.active_adapters),
        tuple(module.merged_adapters),
        module.disable_adapters,
        tuple(module.scaling.items()) if isinstance(getattr(module, "scaling", None), dict) else None,
    )


def _identity(tensor: torch.Tensor) -> tuple:
    if type(tensor) not in PLAIN:
        return id(tensor), tensor.dtype, tensor.device  # there may be no pointer to ask for
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.dtype, tensor.device


def _sample(tensors: Sequence[torch.Tensor], tensors_read: int = 24, numbers_read: int = 4) -> tuple:
    """A few evenly spaced values of some tensors, in one read per device."""
    plain = [t for t in tensors if type(t) in PLAIN and t.numel() and not t.is_meta]
    parts: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in plain[:: max(1, len(plain) // tensors_read)]:
        flat = tensor.detach().flatten()
        few = flat[:: max(1, len(flat) // numbers_read)][:numbers_read]
        parts.setdefault(few.device, []).append(few.float())
    return tuple(number for part in parts.values() for number in torch.cat(part).tolist())


@contextmanager
def weights_read_once() -> Iterator[None]:
    """
    Samples the weights' values for the first batch only, since reading them waits for the accelerator. Every batch still
    checks addresses, version counters and adapters.
    """
    token = _SAMPLES.set({})
    try:
        yield
    finally:
        _SAMPLES.reset(token)


@torch.compiler.disable
def is_causal(model: PreTrainedModel) -> bool:
    """Whether the model's decoder is causal; see [`ModuleScan`]."""
    return model.prefix_cache.scan(model).is_causal()


@torch.compiler.disable
def find_prefix(model: PreTrainedModel, prefix_ids: torch.Tensor, rows: int) -> SharedPrefix | None:
    """
    The decoder's state after a prefix `(1, prefix_len)` shared by `rows` rows, from the model's `prefix_cache` or
    computed now if that pays; `None` if the rows are to be read with their prefix.

    Outside training and without gradients it is cached for later calls.
    """
    cache, decoder = model.prefix_cache, model.decoder
    if not cache.enabled or prefix_ids.shape[1] < cache.min_tokens:
        return None
    scan = cache.scan(model)
    keep = not (decoder.training or torch.is_grad_enabled())
    if scan.is_offloaded() or (not keep and (rows < 2 or scan.trains_with_state())):
        return None
    ids = tuple(prefix_ids[0].tolist())
    state = scan.fingerprint() if keep else None
    if keep and (prefix := cache.get(ids, state)) is not None:
        return prefix
    if keep and not cache.pays(ids, rows):
        return None
    reason = scan.why_not_shareable()
    prefix = compute_prefix(decoder, ids) if reason is None else None
    if prefix is None:
        reason = reason or "its state is more than keys"
        logger.debug("%s reads every prefix anew: %s.", type(decoder).__name__, reason)
    elif keep:
        cache.put(ids, state, prefix)
    return prefix
