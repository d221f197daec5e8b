"""Texts to vectors on a CPU, by a folder that `python -m serving.onnx export` made: numpy, tokenizers and onnxruntime alone.

    from onnx_runtime import Causal2VecONNX

    model = Causal2VecONNX("path/to/folder")
    queries = model.encode_query(["how much protein should a female eat"])
    passages = model.encode_document(["Women need 46 grams of protein per day."])

Arguments and results are those of `Causal2VecModel.encode`. Invariants: a text becomes the ids that the model's processor
makes of it; no vector depends on the other texts of a batch.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


WINDOW = 1024  # texts that are tokenized, and sorted by tokens, at a time
MAX_PREFIXES = 16  # whose keys and values are kept
MIN_PREFIX = 4  # tokens; shorter ones are read with every text

logger = logging.getLogger(__name__)


class Row(NamedTuple):
    """One text as ids: what stands before the slot, what follows from there on, the encoder's, and the towers that cut it."""

    prefix_ids: tuple[int, ...]
    ids: list[int]
    encoder_ids: list[int] | None
    cut: tuple[str, ...]


class Causal2VecONNX:
    """
    Args:
        folder (`str` or `Path`): An exported folder.
        num_threads (`int`, *optional*): Of a forward pass. Defaults to the machine's cores.

    Raises:
        FileNotFoundError: the folder is not complete.
    """

    def __init__(self, folder: str | Path, num_threads: int | None = None):
        folder = Path(folder)
        for name in ("onnx_config.json", "model.onnx", "tokenizer.json"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} lacks {name}. Is it what `python -m serving.onnx export` made?")
        self.config = json.loads((folder / "onnx_config.json").read_text(encoding="utf-8"))
        self._trusted, self._plain = (Tokenizer.from_file(str(folder / "tokenizer.json")) for _ in range(2))
        self._plain.encode_special_tokens = True  # what looks like a control token is encoded as the text it is
        self._control_tokens = [t.content for t in self._plain.get_added_tokens_decoder().values() if t.content]
        self._encoder = None
        if self.config["has_encoder"]:
            self._encoder = Tokenizer.from_file(str(folder / "encoder_tokenizer" / "tokenizer.json"))
            self._encoder.encode_special_tokens = True
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads or 0
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        self._prefix_shape = next((i.shape for i in self.session.get_inputs() if i.name == "prefix"), None)
        self._prefixes: dict = {}  # ids -> keys and values (layers, 2, 1, key_value_heads, length, head_dim)

    def encode(
        self,
        texts: str | Sequence[str],
        instruction: str | Sequence[str | None] | None = None,
        examples: Sequence[dict] | None = None,
        batch_size: int = 32,
        max_batch_tokens: int | None = 16384,
        max_length: int | None = None,
        normalize_embeddings: bool = True,
        truncate_dim: int | None = None,
        truncation: str = "warn",
    ) -> np.ndarray:
        """As `Causal2VecModel.encode`: fp32 of shape `(len(texts), dim)`, or `(dim,)` for a single string."""
        single = isinstance(texts, str)
        texts = [texts] if single else list(texts)
        dim = self.config["embedding_size"] if truncate_dim is None else truncate_dim
        if not isinstance(dim, int) or not 0 < dim <= self.config["embedding_size"]:
            raise ValueError(f"`truncate_dim` must be between 1 and {self.config['embedding_size']}, got {dim!r}.")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"`batch_size` must be a positive integer, got {batch_size!r}.")
        if truncation not in ("warn", "error", "silent"):
            raise ValueError(f"`truncation` must be 'warn', 'error' or 'silent', got {truncation!r}.")
        one = instruction is None or isinstance(instruction, str)
        instructions = [instruction] * len(texts) if one else list(instruction)
        if len(instructions) != len(texts):
            raise ValueError(f"Expected one instruction or {len(texts)}, one per text, got {len(instructions)}.")
        for value in [*texts, *(value for value in instructions if value is not None)]:
            if not isinstance(value, str):
                raise TypeError(f"Texts and instructions must be strings, got {type(value).__name__}: {value!r:.80}.")

        order = sorted(range(len(texts)), key=lambda i: (instructions[i] or "", -len(texts[i])))
        vectors, cut = np.empty((len(texts), dim), np.float32), 0
        for start in range(0, len(order), WINDOW):
            window = order[start : start + WINDOW]
            rows = self.rows([texts[i] for i in window], [instructions[i] for i in window], examples, max_length)
            rows = sorted(zip(window, rows), key=lambda item: (item[1].prefix_ids, -len(item[1].ids)))
            for place, row in rows:
                cut += bool(row.cut)
                if row.cut and truncation == "error":
                    raise ValueError(f"The text at position {place} is too long for the {row.cut[0]}.")
            while rows:
                most = min(batch_size, max((max_batch_tokens or 1e9) // len(rows[0][1].ids), 1))
                batch = [item for item in rows[: int(most)] if item[1].prefix_ids == rows[0][1].prefix_ids]
                places, rows = [place for place, _ in batch], rows[len(batch) :]
                vectors[places] = self._run([row for _, row in batch])[:, :dim]
        if normalize_embeddings:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
        if cut and truncation == "warn":
            logger.warning("%d of %d texts are read only in part.", cut, len(texts))
        return vectors[0] if single else vectors

    def encode_query(self, texts: str | Sequence[str], instruction: str | None = None, **kwargs) -> np.ndarray:
        """`encode` with the model's `query_instruction`, unless another is given."""
        return self.encode(texts, self.config["query_instruction"] if instruction is None else instruction, **kwargs)

    def encode_document(self, texts: str | Sequence[str], **kwargs) -> np.ndarray:
        """`encode` without an instruction: documents carry none."""
        return self.encode(texts, **kwargs)

    def rows(self, texts, instructions, examples=None, max_length: int | None = None) -> list[Row]:
        """The ids of each text, without padding, as the model's processor makes them."""
        config = self.config
        limit = max_length or config["icl_max_seq_length" if examples else "max_seq_length"]
        if config["position_limit"] and limit > config["position_limit"]:
            raise ValueError(f"`max_length` must be at most {config['position_limit']}, got {limit}.")
        parts = {value: self._encode_parts(value, examples) for value in set(instructions)}
        texts = [_clean(text) for text in texts]
        decoder_ids = _encode(self._plain, texts)
        encoder_ids: list = [None] * len(texts)
        if self._encoder is not None:
            encoder_ids = _encode(self._encoder, [config["text_prefix"] + text for text in texts])
        before, behind = config["encoder_frame"]
        encoder_room = config["encoder_max_seq_length"] - len(before) - len(behind)
        rows = []
        for value, ids, its_encoder_ids in zip(instructions, decoder_ids, encoder_ids):
            prefix, slots = parts[value]
            fixed = len(prefix) + len(slots) + len(config["suffix_ids"])
            room = limit - fixed
            if room < 1:
                raise ValueError(f"max_length={limit} leaves no room for text; use at least {fixed + 1}.")
            cut = ("decoder",) * (len(ids) > room)
            ids = [*slots, *ids[:room], *config["suffix_ids"]]
            if its_encoder_ids is not None:
                cut += ("encoder",) * (len(its_encoder_ids) > encoder_room)
                its_encoder_ids = [*before, *its_encoder_ids[:encoder_room], *behind]
            rows.append(Row(tuple(prefix), ids, its_encoder_ids, cut))
        return rows

    def _encode_parts(self, instruction: str | None, examples) -> tuple[list[int], list[int]]:
        """Ids before the slots, and those of the slots and of what stands between them and the text."""
        template, bos = self.config["template_prefix"], self.config["bos_ids"]
        slots = [self.config["contextual_token_id"]] * self.config["num_slots"]
        user_part = "".join(
            f"<instruct>{example.get('instruction', instruction or '')}\n<query>{example['query']}\n"
            f"<response>{example['response']}\n\n"
            for example in examples or ()
        )
        user_part = _clean(user_part + (instruction or ""))
        if self.config["contextual_position"] == "before_instruction":
            return bos + _encode(self._trusted, [template])[0], slots + _encode(self._plain, [user_part])[0]
        prefix = template + user_part
        if any(prefix.count(token) != template.count(token) for token in self._control_tokens):
            return bos + _encode(self._trusted, [template])[0] + _encode(self._plain, [user_part])[0], slots
        return bos + _encode(self._trusted, [prefix])[0], slots

    def _run(self, rows: list[Row]) -> np.ndarray:
        """Rows of one prefix to vectors `(len(rows), embedding_size)`. The first to read a prefix leaves it to the others."""
        prefix_ids = rows[0].prefix_ids
        if self._prefix_shape is None or len(prefix_ids) < MIN_PREFIX:
            return self._forward(rows, None)[0]
        prefix = self._prefixes.pop(prefix_ids, None)
        if prefix is not None:
            self._prefixes[prefix_ids] = prefix  # the one used last stands last
            return self._forward(rows, prefix)[0]
        first, states = self._forward(rows[:1], None, ["embeddings", "states"])
        self._prefixes[prefix_ids] = states[..., : len(prefix_ids), :].copy()
        for oldest in list(self._prefixes)[:-MAX_PREFIXES]:
            self._prefixes.pop(oldest, None)
        return np.concatenate([first, self._run(rows[1:])]) if rows[1:] else first

    def _forward(self, rows: list[Row], prefix: np.ndarray | None, outputs=("embeddings",)) -> list[np.ndarray]:
        """The graph's outputs. Without the keys and values of their prefix, rows are read whole."""
        ids = [row.ids if prefix is not None else [*row.prefix_ids, *row.ids] for row in rows]
        inputs = dict(zip(("input_ids", "attention_mask"), _pad(ids, self.config["pad_token_id"])))
        if self._encoder is not None:
            padded = _pad([row.encoder_ids for row in rows], self.config["encoder_pad_token_id"])
            inputs |= dict(zip(("encoder_ids", "encoder_attention_mask"), padded))
        if self._prefix_shape is not None:
            empty = [size if isinstance(size, int) else 0 for size in self._prefix_shape]
            inputs["prefix"] = np.zeros(empty, np.float32) if prefix is None else prefix
        return self.session.run(outputs, inputs)


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def _pad(rows: list[list[int]], pad_token_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows padded on the right to the longest, and their mask: `(batch, seq_len)` each."""
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.full(mask.shape, pad_token_id, np.int64)
    ids[mask] = np.concatenate(rows)
    return ids, mask.astype(np.int64)


def _clean(text: str) -> str:
    """Joins surrogate pairs and replaces lone surrogates, which no tokenizer can encode, by U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
