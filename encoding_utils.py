"""From texts to vectors: batches of texts of like length, `encode` over them, and what tells where vectors came from.

Texts are sorted by their length in tokens, longest first, so that rows of a batch hardly differ and too large a batch
shows at once. Invariant: every text is in exactly one batch, and no vector depends on which.
"""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import nn
from transformers.utils import logging


try:
    from .loading_utils import position_limit
    from .prefix_cache import weights_read_once
    from .runtime_utils import device_of
    from .saving_utils import code_identity
    from .tokenization_utils import (
        Causal2VecProcessor,
        broadcast_instruction,
        check_texts,
        count_cut,
        describe_cut,
        format_examples,
    )
except ImportError:
    if __package__:  # a real one: a file is missing, or a package too old
        raise
    # Imported from a clone, where these files are top-level modules.
    from loading_utils import position_limit
    from prefix_cache import weights_read_once
    from runtime_utils import device_of
    from saving_utils import code_identity
    from tokenization_utils import (
        Causal2VecProcessor,
        broadcast_instruction,
        check_texts,
        count_cut,
        describe_cut,
        format_examples,
    )


logger = logging.get_logger(__name__)

WINDOW = 32  # batches whose texts are tokenized, and sorted by tokens, at a time

# Of a configuration, what has no part in a vector, follows from the rest, or is in a fingerprint by itself.
_NOT_OF_VECTORS = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "decoder_config",
    "dtype",
    "embedding_size",
    "encoder_config",
    "icl_max_seq_length",
    "max_seq_length",
    "query_instruction",
    "transformers_version",
    "use_cache",
}


def sorted_batches(
    processor,
    texts: Sequence[str],
    instructions: Sequence[str | None],
    examples: Sequence[dict] | None = None,
    max_length: int | None = None,
    batch_size: int = 32,
    max_tokens: int | None = None,
    count_prefix: bool = True,
) -> Iterator[tuple[list[int], dict[str, torch.Tensor], list[tuple[str, ...]]]]:
    """
    Cuts texts into batches of at most `batch_size` rows and `max_tokens` decoder tokens, padding included (but of one row
    at least); without `count_prefix`, what stands before the slot is left out of that.

    Returns:
        The texts' positions, the tensors that the model reads, and per text the towers that read only its beginning.
    """
    # Texts of a common instruction stay together, as they share their prefix; the rest is sorted by length alone.
    counts = Counter(instructions)
    groups = {name: i for i, name in enumerate(counts) if counts[name] >= min(batch_size, len(texts))}
    order = sorted(range(len(texts)), key=lambda i: (groups.get(instructions[i], -1), -len(texts[i])))
    for start in range(0, len(order), WINDOW * batch_size):
        window = order[start : start + WINDOW * batch_size]
        rows = processor.rows(
            [texts[i] for i in window], [instructions[i] for i in window], examples=examples, max_length=max_length
        )
        lengths = [len(row.ids) + count_prefix * len(row.prefix_ids) for row in rows]
        keys = [groups.get(instructions[i], -1) for i in window]
        longest_first = sorted(range(len(window)), key=lambda place: (keys[place], -lengths[place]))
        for _, group in itertools.groupby(longest_first, key=keys.__getitem__):
            for places in cut(list(group), lengths, batch_size, max_tokens):
                batch = processor.pad([rows[place] for place in places], return_prefix_ids=True)
                yield [window[place] for place in places], dict(batch), [rows[place].cut for place in places]


def cut(order: Sequence[int], lengths: Sequence[int], batch_size: int, max_tokens: int | None) -> Iterator[list[int]]:
    """Cuts an order of rows into batches under both limits."""
    batch: list[int] = []
    longest = 0
    for place in order:
        longest = max(longest, lengths[place])
        if batch and (len(batch) == batch_size or (max_tokens and (len(batch) + 1) * longest > max_tokens)):
            yield batch
            batch, longest = [], lengths[place]
        batch.append(place)
    if batch:
        yield batch


class EncodeMixin:
    """`encode`, `encode_query` and `encode_document` of a model with `config`, `prefix_cache` and a processor."""

    @property
    def processor(self) -> Causal2VecProcessor:
        """
        Both tokenizers and the layout of a row; loaded with the model.

        Raises:
            ValueError: the model was built without tokenizers.
        """
        if self._processor is None:
            raise ValueError(
                "This model has no tokenizers: load it from a folder that holds them, build it with "
                "`from_encoder_decoder_pretrained`, or set `model.processor`."
            )
        return self._processor

    @processor.setter
    def processor(self, processor: Causal2VecProcessor) -> None:
        self._processor = processor

    def encode(
        self,
        texts: str | Sequence[str],
        *,
        instruction: str | Sequence[str | None] | None = None,
        examples: Sequence[dict] | None = None,
        batch_size: int = 32,
        max_batch_tokens: int | None = 16384,
        packed: bool | None = None,
        max_length: int | None = None,
        normalize_embeddings: bool = True,
        truncate_dim: int | None = None,
        truncation: str = "warn",
        convert_to_tensor: bool = False,
        show_progress_bar: bool | None = None,
    ):
        """
        Embeds texts. Any number of threads may do so at a time, also with a model in training mode.

        Args:
            texts (`str` or list of `str`): What to embed.
            instruction (`str` or list of `str`, *optional*): The task, for all texts or one per text. Queries carry one,
                passages none; both sides of a symmetric task the same.
            examples (list of `dict`, *optional*): In-context examples, each `{"query": ..., "response": ...}`.
            batch_size (`int`, defaults to 32): Most texts per forward pass. Never changes a vector.
            max_batch_tokens (`int`, *optional*, defaults to 16384): Most decoder tokens per forward pass, padding
                included and prefixes left out while `prefix_cache` is on, so that long texts need no smaller `batch_size`.
            packed (`bool`, *optional*): Join the rows of a batch into one without padding. Defaults to `True` on a CPU.
            max_length (`int`, *optional*): Limit of the decoder's sequence in tokens; see [`Causal2VecConfig`].
            normalize_embeddings (`bool`, defaults to `True`): Scale vectors to length 1, so that a dot product is the
                cosine.
            truncate_dim (`int`, *optional*): Keep the first `truncate_dim` numbers, half of them from each of the two
                states that an embedding joins.
            truncation (`str`, defaults to `"warn"`): Texts longer than a tower reads are cut. `"warn"` says how many were,
                `"silent"` does not, `"error"` refuses them before anything is embedded. `model.truncated` counts them.
            convert_to_tensor (`bool`, defaults to `False`): Return a tensor on the CPU instead of a numpy array.
            show_progress_bar (`bool`, *optional*): Defaults to a bar on a terminal when it takes more than 5 seconds.

        Returns:
            fp32 array of shape `(len(texts), dim)`, or `(dim,)` for a single string.

        Raises:
            TypeError: something that should be a string is not.
            ValueError: an argument cannot work; says which and what would.
        """
        single = isinstance(texts, str)
        texts = [texts] if single else check_texts(texts)
        instructions = broadcast_instruction(instruction, len(texts))
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise ValueError(f"`batch_size` must be a positive integer, got {batch_size!r}.")
        if max_batch_tokens is not None and (not isinstance(max_batch_tokens, int) or max_batch_tokens < 1):
            raise ValueError(f"`max_batch_tokens` must be a positive integer or None, got {max_batch_tokens!r}.")
        if truncation not in ("warn", "error", "silent"):
            raise ValueError(f"`truncation` must be 'warn', 'error' or 'silent', got {truncation!r}.")
        dim = self.config.embedding_size if truncate_dim is None else truncate_dim
        check_truncate_dim(dim, self.config.embedding_size)
        if isinstance(max_length, int) and max_length > (limit := position_limit(self.decoder) or max_length):
            raise ValueError(f"`max_length` must be at most {limit}, the positions of the decoder, got {max_length}.")
        format_examples(examples, None)  # refuses what is no list of examples for all texts
        processor, device = self.processor, device_of(self.get_input_embeddings())

        if truncation == "error":
            cut = processor.towers_cut(texts, instructions, examples, max_length)
            processor.refuse_cut(cut, processor.limits(max_length, examples))

        batches = sorted_batches(
            processor,
            texts,
            instructions,
            examples,
            max_length,
            batch_size,
            max_batch_tokens,
            count_prefix=not self.prefix_cache.enabled or self.prefix_cache.scan(self).is_offloaded(),
        )
        embeddings, truncated = torch.empty(len(texts), dim), Counter()
        progress = logging.tqdm(
            total=len(texts),
            desc="Encoding",
            unit="text",
            delay=0 if show_progress_bar else 5,
            disable=None if show_progress_bar is None else not show_progress_bar,
        )
        with progress, self._eval_mode(self), weights_read_once():
            for rows, batch, cut in batches:
                with torch.inference_mode():
                    # A prefix is looked up on the CPU.
                    batch = {name: ids if name == "prefix_ids" else ids.to(device) for name, ids in batch.items()}
                    vectors = self(**batch, packed=packed).embeddings[:, :dim].float()  # (rows, dim)
                    if normalize_embeddings:
                        vectors = nn.functional.normalize(vectors, dim=-1)
                embeddings[rows] = vectors.cpu()
                truncated += count_cut(cut)
                progress.update(len(rows))
        if truncated:
            self.add_truncated(truncated)
            if truncation == "warn":
                logger.warning(describe_cut(truncated, len(texts), processor.limits(max_length, examples)))

        embeddings = embeddings[0] if single else embeddings
        return embeddings if convert_to_tensor else embeddings.numpy()

    def encode_query(
        self, texts: str | Sequence[str], *, instruction: str | Sequence[str | None] | None = None, **kwargs
    ):
        """`encode` with the configuration's `query_instruction`, unless another is given."""
        return self.encode(
            texts, instruction=self.config.query_instruction if instruction is None else instruction, **kwargs
        )

    def encode_document(self, texts: str | Sequence[str], **kwargs):
        """`encode` without an instruction: documents carry none."""
        return self.encode(texts, **kwargs)

    def fingerprint(
        self,
        instruction: str | None = None,
        *,
        examples: Sequence[dict] | None = None,
        max_length: int | None = None,
        truncate_dim: int | None = None,
        normalize_embeddings: bool = True,
    ) -> dict[str, str | int | bool | None]:
        """
        What makes the vectors that `encode` gives for the same arguments, to be kept with them: vectors whose fingerprints
        are equal can be compared, for any batch size, device or files that the weights were loaded from.

        Returns:
            `weights`, `config`, `tokenizers`, `code` (SHA-256 of the weights as they are loaded, adapters included, and of
            what else of a checkpoint has a part in vectors), `instruction`, `examples` (as SHA-256), `max_length`,
            `dimensions`, `normalized` and `dtype`, all of them fit for JSON. Weights are read once for each of their states.

        Raises:
            TypeError: `instruction` is not one string.
            ValueError: an argument cannot work, or weights are not in memory.
        """
        if instruction is not None and not isinstance(instruction, str):
            raise TypeError(
                f"`instruction` must be a string or None, got {type(instruction).__name__}: one per fingerprint."
            )
        dim = self.config.embedding_size if truncate_dim is None else truncate_dim
        check_truncate_dim(dim, self.config.embedding_size)
        return {
            **self._hashes(),
            "instruction": instruction or None,
            "examples": _sha256(format_examples(examples, instruction)) if examples else None,
            "max_length": self.processor.limits(max_length, examples)["decoder"],
            "dimensions": dim,
            "normalized": bool(normalize_embeddings),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def _hashes(self) -> dict[str, str]:
        """The part of a fingerprint that is the checkpoint's."""
        scan, processor = self.prefix_cache.scan(self), self.processor
        state = scan.weights_state(), processor, processor.encoder_max_seq_length
        if scan.hashes is None or scan.hashes[0] != state:
            tokenizers = [t for t in (processor.tokenizer, processor.encoder_tokenizer) if t is not None]
            configs = self.config, self.config.encoder_config, self.config.decoder_config
            found = {
                "weights": _weights_sha256(self, scan.adapters_state()),
                "config": _sha256([*map(_of_vectors, configs), processor.encoder_max_seq_length]),
                "tokenizers": _sha256(list(map(_tokenizer_content, tokenizers))),
                "code": _code_identity(),
            }
            scan.hashes = state, found
        return scan.hashes[1]

    def add_truncated(self, counts: Counter) -> None:
        """Adds what `count_cut` has counted to `truncated`."""
        with self._counting:
            self.truncated.update(counts)


def check_truncate_dim(dim: int, embedding_size: int) -> None:
    """Raises ValueError unless an embedding of `embedding_size` numbers can be cut to `dim`."""
    if not isinstance(dim, int) or isinstance(dim, bool) or not 0 < dim <= embedding_size:
        raise ValueError(f"`truncate_dim` must be an integer between 1 and {embedding_size}, got {dim!r}.")


@cache
def _code_identity() -> str:
    return code_identity(Path(__file__).parent)


def _sha256(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _weights_sha256(model, adapters: tuple) -> str:
    """Of names, dtypes, shapes and values, whatever files they came from."""
    digest = hashlib.sha256(repr(adapters).encode() if adapters else b"")
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_meta:
            raise ValueError(
                f"A fingerprint is made of all weights, and {name} is not in memory. Load the model without offloading."
            )
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _of_vectors(config) -> dict | None:
    """What a configuration says that its class does not, so that a newer transformers, which says more, says the same."""
    if config is None:
        return None
    defaults = type(config)().to_dict()
    own = {key: value for key, value in config.to_dict().items() if value != defaults.get(key)}
    return {"model_type": config.model_type, **{key: own[key] for key in own if key not in _NOT_OF_VECTORS}}


def _tokenizer_content(tokenizer) -> dict:
    """All that ids depend on; not the truncation and padding of a tokenizer's last call."""
    if not tokenizer.is_fast:
        return {"vocabulary": tokenizer.get_vocab(), "special": tokenizer.special_tokens_map}
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    return {name: value for name, value in content.items() if name not in ("truncation", "padding")}
