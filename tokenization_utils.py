"""From texts to the four tensors that Causal2Vec reads (Causal2Vec, section 3.1 and appendix A.1).

The encoder reads the text alone. The decoder reads

    [BOS if its tokenizer adds one] [template_prefix + examples + instruction] [slot] [text] [template_suffix] [EOS]

with no second BOS or EOS where the template has its own, and where the slot is one reserved id whose embedding the model replaces by the Contextual token. Rows are joined from token
*ids*, segment by segment, and only the text's ids are ever cut. Invariants: EOS is the last real token at every length,
the slot stands exactly once, nothing in a text or an instruction is read as a control token, all rows of a task are the
same up to the slot, and a long text, of which only the beginning is tokenized, has the ids of the whole. Of the paper's
ablations, several Contextual tokens have as many slots next to each other, and before the instruction means
`[template_prefix] [slot] [examples + instruction] [text]` (appendix C.5).
"""

import inspect
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

from transformers import AutoTokenizer, BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.utils import cached_file, logging


try:
    from .runtime_utils import TOKENIZING
    from .saving_utils import new_files, push_to_hub
except ImportError:
    if __package__:  # a real one: a file is missing, or a package too old
        raise
    # Imported from a clone, where these files are top-level modules.
    from runtime_utils import TOKENIZING
    from saving_utils import new_files, push_to_hub


logger = logging.get_logger(__name__)


class Row(NamedTuple):
    """
    One text for both towers, as ids.

    Args:
        prefix_ids: What the decoder reads before the slot: the same for all texts of a task.
        ids: What it reads from there on: slot, text, template suffix and EOS.
        encoder_ids: What the encoder reads, if there is one.
        cut: The towers that read only the text's beginning: `"decoder"`, `"encoder"`.
    """

    prefix_ids: list[int]
    ids: list[int]
    encoder_ids: list[int] | None
    cut: tuple[str, ...]


class Causal2VecProcessor(ProcessorMixin):
    """
    The decoder's tokenizer (`tokenizer`, saved in the root of a folder), the encoder's (`encoder_tokenizer`, saved in a
    subfolder of that name), and the layout of a row. See [`Causal2VecConfig`] for the settings.

    Raises:
        ValueError: a tokenizer has no vocabulary, the decoder's has no EOS token, or the slot's id is also used by
            text, template or padding.
    """

    def __init__(
        self,
        tokenizer,
        encoder_tokenizer,
        contextual_token_id: int = 0,
        template_prefix: str = "",
        template_suffix: str = "",
        text_prefix: str = "",
        max_seq_length: int = 512,
        icl_max_seq_length: int = 2048,
        encoder_max_seq_length: int = 512,
        contextual_position: str = "after_instruction",
        num_slots: int = 1,
    ):
        super().__init__(tokenizer, encoder_tokenizer)
        self.encoder_tokenizer = encoder_tokenizer  # set even where the parent class does not, without an encoder
        self.contextual_token_id = contextual_token_id
        self.template_prefix = template_prefix
        self.template_suffix = template_suffix
        self.text_prefix = text_prefix
        self.max_seq_length = max_seq_length
        self.icl_max_seq_length = icl_max_seq_length
        self.encoder_max_seq_length = encoder_max_seq_length
        self.contextual_position = contextual_position
        self.num_slots = num_slots

        for owner, its_tokenizer in (("decoder", tokenizer), ("encoder", encoder_tokenizer)):
            if its_tokenizer is not None and len(its_tokenizer) <= len(its_tokenizer.all_special_tokens):
                raise ValueError(
                    f"The {owner}'s tokenizer has no vocabulary. Are its files beside the {owner}'s weights?"
                )
        if tokenizer.eos_token_id is None:
            raise ValueError("The decoder's tokenizer has no EOS token; set `tokenizer.eos_token` to one.")
        self._pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        # What the tokenizer itself puts before a text: BOS for Llama, Mistral and Gemma, nothing for Qwen.
        bos_ids = tokenizer("a")["input_ids"][:1]
        self._bos_ids = bos_ids if tokenizer.bos_token_id in bos_ids else []
        # One BOS and one EOS: ChatML's <|im_start|> and <|im_end|> are just these for some tokenizers.
        if self._bos_ids == self._encode_trusted(template_prefix)[:1]:
            self._bos_ids = []
        self._suffix_ids = self._encode_trusted(template_suffix)
        if self._suffix_ids[-1:] == [tokenizer.eos_token_id]:
            self._suffix_ids.pop()
        self._encoder_frame = ([], []) if encoder_tokenizer is None else ids_around(encoder_tokenizer)
        slot_as_text = self._encode_plain(tokenizer, [tokenizer.decode([contextual_token_id])])[0]
        taken_ids = {
            "EOS": [tokenizer.eos_token_id],
            "padding": [self._pad_token_id],
            "BOS": self._bos_ids,
            "template": self._encode_trusted(template_prefix) + self._suffix_ids,
            "text": slot_as_text,
        }
        for use, ids in taken_ids.items():
            if contextual_token_id in ids:
                raise ValueError(
                    f"`contextual_token_id` {contextual_token_id} is also used for {use}; the Contextual token needs an "
                    "id of its own, such as that of an added special token."
                )
        self._control_tokens = [token for token in tokenizer.get_added_vocab() if token]

    @classmethod
    def from_config(cls, config, tokenizer, encoder_tokenizer) -> "Causal2VecProcessor":
        """The processor of a model with this [`Causal2VecConfig`], a [`DecoderProcessor`] where it has no encoder."""
        if not config.has_encoder:
            return DecoderProcessor(tokenizer, **{name: getattr(config, name) for name in PROCESSOR_SETTINGS})
        return cls(tokenizer, encoder_tokenizer, **{name: getattr(config, name) for name in PROCESSOR_SETTINGS})

    def __call__(
        self,
        texts: str | Sequence[str],
        instruction: str | Sequence[str | None] | None = None,
        examples: Sequence[dict] | Sequence[Sequence[dict]] | None = None,
        max_length: int | None = None,
        return_tensors: str | None = "pt",
        truncation: bool = True,
        return_prefix_ids: bool = False,
    ) -> BatchFeature:
        """
        Args:
            texts (`str` or list of `str`): The texts to embed; a string is a batch of one. Any string is accepted.
            instruction (`str` or list of `str`, *optional*): The task, for all texts or one per text.
            examples (list of `dict`, *optional*): In-context examples, each `{"query": ..., "response": ...}` with an
                optional `"instruction"` of its own; they become part of the prefix. A list of such lists gives each
                text its own examples.
            max_length (`int`, *optional*): Limit of the decoder's row in tokens. Defaults to `max_seq_length`, with
                examples to `icl_max_seq_length`.
            return_tensors (`str`, *optional*, defaults to `"pt"`): As everywhere in transformers.
            truncation (`bool`, defaults to `True`): Cut texts that are too long; `False` refuses them.
            return_prefix_ids (`bool`, defaults to `False`): Return the prefix that all rows share separately, so that
                `forward` reads it once. Rows are then padded on the right.

        Returns:
            [`BatchFeature`]: `input_ids` and `attention_mask` (batch, seq_len) for the decoder, `encoder_ids` and
            `encoder_attention_mask` (batch, encoder_seq_len) for the encoder if there is one, padded to the longest row;
            with `return_prefix_ids` also `prefix_ids` (1, prefix_len), of length 0 where rows begin differently.

        Raises:
            TypeError: an argument that should be a string is not, or `max_length` is not an integer.
            ValueError: the number of instructions differs from that of texts, the prefix leaves no room for text, or a
                text is too long and `truncation=False`.
        """
        rows = self.rows(texts, instruction, examples, max_length)
        if not truncation:
            self.refuse_cut((row.cut for row in rows), self.limits(max_length, examples))
        return self.pad(rows, return_prefix_ids, return_tensors)

    def rows(
        self,
        texts: str | Sequence[str],
        instruction: str | Sequence[str | None] | None = None,
        examples: Sequence[dict] | Sequence[Sequence[dict]] | None = None,
        max_length: int | None = None,
    ) -> list[Row]:
        """The ids of each text, without padding; arguments and errors are `__call__`'s."""
        texts = [texts] if isinstance(texts, str) else check_texts(texts)
        instructions = broadcast_instruction(instruction, len(texts))
        max_length = self.limits(max_length, examples)["decoder"]
        if not isinstance(max_length, int) or isinstance(max_length, bool):
            raise TypeError(f"`max_length` must be an integer, got {type(max_length).__name__}: {max_length!r}.")

        if examples and isinstance(examples, (list, tuple)) and isinstance(examples[0], (list, tuple)):
            if len(examples) != len(texts):
                raise ValueError(f"Expected examples for all texts or {len(texts)} lists, got {len(examples)} lists.")
            parts = [self._encode_parts(*arguments) for arguments in zip(instructions, examples)]
        else:
            shared = {instruction: self._encode_parts(instruction, examples) for instruction in set(instructions)}
            parts = [shared[instruction] for instruction in instructions]
        rooms = [self._room(*part, max_length) for part in parts]
        texts = [_clean(text) for text in texts]
        decoder_ids = first_ids(self.tokenizer, texts, max(rooms, default=0) + 1)
        encoder_ids: list[list[int] | None] = [None] * len(texts)
        if self.encoder_tokenizer is not None:
            before, behind = self._encoder_frame
            encoder_room = self.encoder_max_seq_length - len(before) - len(behind)
            encoder_ids = first_ids(self.encoder_tokenizer, texts, encoder_room + 1, self.text_prefix)
        rows = []
        for (prefix, behind_slot), room, ids, its_encoder_ids in zip(parts, rooms, decoder_ids, encoder_ids):
            cut = ("decoder",) * (len(ids) > room)
            slots = [self.contextual_token_id] * self.num_slots
            ids = [*slots, *behind_slot, *ids[:room], *self._suffix_ids, self.tokenizer.eos_token_id]
            if its_encoder_ids is not None:
                cut += ("encoder",) * (len(its_encoder_ids) > encoder_room)
                its_encoder_ids = before + its_encoder_ids[:encoder_room] + behind
            rows.append(Row(prefix, ids, its_encoder_ids, cut))
        return rows

    def pad(
        self, rows: Sequence[Row], return_prefix_ids: bool = False, return_tensors: str | None = "pt"
    ) -> BatchFeature:
        """The tensors of a batch of rows, padded to the longest; arguments and results are `__call__`'s."""
        side = "right" if return_prefix_ids else self.tokenizer.padding_side
        one_prefix = return_prefix_ids and bool(rows) and all(row.prefix_ids == rows[0].prefix_ids for row in rows)
        decoder_ids = [row.ids if one_prefix else row.prefix_ids + row.ids for row in rows]
        arrays = _pad(decoder_ids, self._pad_token_id, side)
        if self.encoder_tokenizer is not None:
            pad_token_id = self.encoder_tokenizer.pad_token_id or 0
            arrays += _pad([row.encoder_ids for row in rows], pad_token_id, self.encoder_tokenizer.padding_side)
        batch = dict(zip(self.model_input_names, arrays))
        if return_prefix_ids:
            batch["prefix_ids"] = [rows[0].prefix_ids if one_prefix else []]
        batch = BatchFeature(batch, tensor_type=return_tensors)
        if return_prefix_ids and return_tensors == "pt":
            batch["prefix_ids"] = batch["prefix_ids"].long()  # also without any
        return batch

    def limits(self, max_length: int | None = None, examples: Sequence | None = None) -> dict[str, int]:
        """How many tokens a row of each tower has at most."""
        if max_length is None:
            max_length = self.icl_max_seq_length if examples else self.max_seq_length
        return {"decoder": max_length, "encoder": self.encoder_max_seq_length}

    def towers_cut(
        self,
        texts: Sequence[str],
        instruction: str | Sequence[str | None] | None = None,
        examples: Sequence[dict] | None = None,
        max_length: int | None = None,
    ) -> Iterator[tuple[str, ...]]:
        """Yields, for each text, the towers that read only its beginning."""
        instructions = broadcast_instruction(instruction, len(texts))
        for start in range(0, len(texts), CHUNK):
            part = slice(start, start + CHUNK)
            yield from (row.cut for row in self.rows(texts[part], instructions[part], examples, max_length))

    @staticmethod
    def refuse_cut(cut: Iterable[tuple[str, ...]], limits: dict[str, int]) -> None:
        """Raises ValueError that names the first text that would be truncated."""
        for position, towers in enumerate(cut):
            if towers:
                raise ValueError(
                    f"The text at position {position} is too long for the {towers[0]}, whose rows have at most "
                    f"{limits[towers[0]]} tokens. Shorten or split it, or allow truncation."
                )

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs) -> list[str]:
        """As everywhere in transformers; also into the folder that this code was imported from."""
        if self.encoder_tokenizer is not None:
            self.encoder_tokenizer("")  # or its file would hold the truncation of its user's last call
        if push_to_hub:
            kwargs.setdefault("repo_id", Path(save_directory).name)
        with new_files(save_directory) as temporary:
            files = super().save_pretrained(str(temporary), push_to_hub=push_to_hub, **kwargs)
        return [str(Path(save_directory, Path(file).relative_to(temporary))) for file in files]

    push_to_hub = push_to_hub

    @property
    def model_input_names(self) -> list[str]:
        names = ["input_ids", "attention_mask", "encoder_ids", "encoder_attention_mask"]
        return names if self.encoder_tokenizer is not None else names[:2]

    def encode_prefix(self, instruction: str | None = None, examples: Sequence[dict] | None = None) -> list[int]:
        """Ids of everything before the text except the slot; the same for every text of a task."""
        before, behind = self._encode_parts(instruction, examples)
        return before + behind

    def fit_examples(
        self, instruction: str | None, examples: Sequence[dict], max_length: int | None = None
    ) -> Sequence[dict]:
        """As many leading examples as leave a quarter of the row, at most 512 tokens, for the text."""
        limit = max_length or self.icl_max_seq_length
        room = min(512, limit // 4)
        while examples and len(self.encode_prefix(instruction, examples)) > limit - room:
            examples = examples[:-1]
        return examples

    def _encode_parts(self, instruction: str | None, examples: Sequence[dict] | None) -> tuple[list[int], list[int]]:
        """Ids before the slot, and ids between the slot and the text."""
        user_part = _clean(format_examples(examples, instruction) + (instruction or ""))
        if self.contextual_position == "before_instruction":
            behind = self._encode_plain(self.tokenizer, [user_part])[0]
            return self._bos_ids + self._encode_trusted(self.template_prefix), behind
        prefix = self.template_prefix + user_part
        if any(prefix.count(token) != self.template_prefix.count(token) for token in self._control_tokens):
            prefix_ids = self._encode_trusted(self.template_prefix) + self._encode_plain(self.tokenizer, [user_part])[0]
        else:
            prefix_ids = self._encode_trusted(prefix)
        return self._bos_ids + prefix_ids, []

    def _room(self, before: list[int], behind: list[int], max_length: int) -> int:
        """How many tokens of a text a row takes. Raises ValueError when there is no place for one."""
        prefix, suffix = len(before + behind), len(self._suffix_ids)
        room = max_length - prefix - suffix - self.num_slots - 1
        if room < 1:
            raise ValueError(
                f"max_length={max_length} leaves no room for text: the prefix (template, examples, instruction) "
                f"has {prefix} tokens, the template's suffix {suffix}, the Contextual token and EOS {self.num_slots + 1}. Use at least "
                f"max_length={max_length - room + 1}, or a shorter prefix."
            )
        return room

    @staticmethod
    def _encode_plain(tokenizer, texts: list[str]) -> list[list[int]]:
        """Ids of user text: what looks like a control token is encoded as plain text."""
        return _plain(tokenizer, [_clean(text) for text in texts])["input_ids"] if texts else []

    def _encode_trusted(self, template: str) -> list[int]:
        """Ids of template text, whose control tokens count."""
        with TOKENIZING:
            return self.tokenizer(template, add_special_tokens=False, split_special_tokens=False)["input_ids"]


class DecoderProcessor(Causal2VecProcessor):
    """[`Causal2VecProcessor`] without the encoder's tokenizer: `input_ids` and `attention_mask` alone."""

    # transformers saves what the signature names, and loads what `__code__` does: the list cannot be its parent's.
    def __init__(
        self,
        tokenizer,
        contextual_token_id: int = 0,
        template_prefix: str = "",
        template_suffix: str = "",
        text_prefix: str = "",
        max_seq_length: int = 512,
        icl_max_seq_length: int = 2048,
        encoder_max_seq_length: int = 512,
        contextual_position: str = "after_instruction",
        num_slots: int = 0,
    ):
        settings = {name: value for name, value in locals().items() if name in PROCESSOR_SETTINGS}
        super().__init__(tokenizer, None, **settings)


PROCESSOR_SETTINGS = tuple(inspect.signature(Causal2VecProcessor.__init__).parameters)[3:]  # behind both tokenizers

CHUNK = 1024  # texts that `towers_cut` tokenizes at a time
CHARS_PER_TOKEN = 8  # of a long text: enough characters for the tokens that are read, nearly always
UNSETTLED = 4  # trailing words whose tokens may depend on the text that follows


def load_tokenizers(folder_or_id: str, encoder_config, decoder_config, subfolder: str = "", **hub_kwargs):
    """
    Loads the tokenizers saved with a model. The sub-configurations determine their classes, so no remote code is
    needed.

    Returns:
        The decoder's tokenizer and the encoder's, which is `None` where there is no `encoder_config`.

    Raises:
        OSError: one of them is missing. `AutoTokenizer` alone would return an empty one.
    """
    tokenizers = []
    for config, folder in ((decoder_config, ""), (encoder_config, "encoder_tokenizer")):
        if config is None:
            tokenizers.append(None)
            continue
        where = {"subfolder": f"{subfolder}/{folder}".strip("/"), **hub_kwargs}
        cached_file(folder_or_id, "tokenizer_config.json", **where)
        tokenizers.append(AutoTokenizer.from_pretrained(folder_or_id, config=config, **where))
    return tuple(tokenizers)


def format_examples(examples: Sequence[dict] | None, instruction: str | None) -> str:
    """
    In-context examples formatted for the prefix (bge-en-icl's format), each followed by a blank line.

    Raises:
        TypeError: an example is not a dict of strings.
        ValueError: an example lacks `query` or `response`.
    """
    if examples is None:
        return ""
    if isinstance(examples, (str, bytes, dict)) or not isinstance(examples, Sequence):
        raise TypeError(f'`examples` must be a list of {{"query", "response"}}, got {type(examples).__name__}.')
    parts = []
    for position, example in enumerate(examples):
        if not isinstance(example, dict):
            raise TypeError(f"Example {position} must be a dict, got {type(example).__name__}: {example!r}.")
        missing = [key for key in ("query", "response") if key not in example]
        if missing:
            raise ValueError(f"Example {position} lacks {missing}; it has {sorted(map(str, example))}.")
        fields = {"instruction": instruction or "", **example}
        for key in ("instruction", "query", "response"):
            if not isinstance(fields[key], str):
                raise TypeError(f"{key!r} of example {position} must be a string, got {type(fields[key]).__name__}.")
        parts.append(f"<instruct>{fields['instruction']}\n<query>{fields['query']}\n<response>{fields['response']}\n\n")
    return "".join(parts)


def check_texts(texts: Sequence[str]) -> list[str]:
    """
    Returns the texts as a list.

    Raises:
        TypeError: not a sequence of strings. Says where and what came instead.
    """
    if isinstance(texts, (bytes, dict)) or not hasattr(texts, "__iter__") or getattr(texts, "shape", None) == ():
        raise TypeError(f"`texts` must be a string or a list of strings, got {type(texts).__name__}: {texts!r:.80}.")
    texts = list(texts)
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(
                f"`texts` must be a string or a list of strings, got {type(text).__name__} at position {position}: "
                f"{text!r:.80}."
            )
    return texts


def broadcast_instruction(instruction: str | Sequence[str | None] | None, count: int) -> list[str | None]:
    """
    One instruction per text.

    Raises:
        TypeError: neither a string nor a list of strings.
        ValueError: a list of another length than the texts'.
    """
    if instruction is None or isinstance(instruction, str):
        return [instruction] * count
    if isinstance(instruction, (bytes, dict)) or not hasattr(instruction, "__iter__"):
        raise TypeError(
            f"`instruction` must be a string or a list with one per text, got {type(instruction).__name__}."
        )
    instructions = list(instruction)
    for position, value in enumerate(instructions):
        if value is not None and not isinstance(value, str):
            raise TypeError(f"`instruction` at position {position} must be a string, got {type(value).__name__}.")
    if len(instructions) != count:
        raise ValueError(f"Expected one instruction or {count}, one per text, got {len(instructions)}.")
    return instructions


def first_ids(tokenizer, texts: Sequence[str], limit: int, prefix: str = "") -> list[list[int]]:
    """
    The first `limit` ids of each text with its prefix. What looks like a control token is encoded as plain text.

    Only the beginning of a long text is tokenized, up to white space a few words beyond the ids that are kept. The rest
    cannot change them, since tokenizers look no further than the end of a word. A text without white space is tokenized
    whole.
    """
    if not texts:
        return []
    if not tokenizer.is_fast:  # does not tell its words
        return [ids[:limit] for ids in _plain(tokenizer, [prefix + text for text in texts])["input_ids"]]
    size = limit * CHARS_PER_TOKEN
    parts = [_beginning(text, size) for text in texts]
    rows = []
    for text, part, encoding in zip(texts, parts, _plain(tokenizer, [prefix + part for part in parts]).encodings):
        longer = size
        while len(part) < len(text) and not _is_settled(tokenizer, encoding, limit):
            longer *= 4
            part = _beginning(text, longer)
            encoding = _plain(tokenizer, [prefix + part]).encodings[0]
        rows.append(encoding.ids[:limit])
    return rows


def _plain(tokenizer, texts: Sequence[str]):
    with TOKENIZING:
        return tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)


def _beginning(text: str, size: int) -> str:
    """The words of a text that end at white space within its first `size` characters; all of a shorter text."""
    if len(text) <= size:
        return text
    return text[: max(0, *(text.rfind(space, 0, size) for space in " \n\t"))].rstrip()


def _is_settled(tokenizer, encoding, count: int) -> bool:
    """Whether the first `count` tokens of an encoding stay the same whatever text follows."""
    words, tokens = encoding.word_ids, encoding.tokens
    starts = [i for i in range(1, len(words)) if words[i] != words[i - 1]]
    if not _leaves(starts, count):  # perhaps the whole text is one word, with ▁ for spaces, as for Llama 2 and Gemma
        joined = _joined_to_spaces(tokenizer)
        starts = [i for i in range(1, len(tokens)) if tokens[i].startswith("▁") and tokens[i - 1][-1:] not in joined]
    return _leaves(starts, count)


def _leaves(starts: list[int], count: int) -> bool:
    """Whether at least `count` tokens come before the last words, which may still change."""
    return len(starts) >= UNSETTLED and starts[-UNSETTLED] >= count


_JOINED: WeakKeyDictionary = WeakKeyDictionary()


def _joined_to_spaces(tokenizer) -> set[str]:
    """
    The characters that precede a space inside some token, across which a token may therefore extend over a word's end.
    """
    if tokenizer not in _JOINED:
        _JOINED[tokenizer] = {c for token in tokenizer.get_vocab() for c in re.findall("(?s).(?=▁)", token)}
    return _JOINED[tokenizer]


def ids_around(tokenizer) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer adds before and after a text, such as [CLS] and [SEP]."""
    whole, text = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    start = next(i for i in range(len(whole) + 1) if whole[i : i + len(text)] == text)
    return whole[:start], whole[start + len(text) :]


def count_cut(cut: Iterable[tuple[str, ...]]) -> Counter:
    """How many texts are truncated (`"texts"`), and by which tower (`"decoder"`, `"encoder"`)."""
    counts = Counter()
    for towers in cut:
        counts.update(towers)
        counts["texts"] += bool(towers)
    return +counts  # empty where none is


def describe_cut(counts: Counter, total: int, limits: dict[str, int]) -> str:
    """A sentence on `counts` from `count_cut`."""
    towers = " and ".join(f"{counts[name]} by the {name} (at {limits[name]} tokens)" for name in limits if counts[name])
    return f"{counts['texts']} of {total} texts are read only in part: {towers}."


def _clean(text: str) -> str:
    """Joins surrogate pairs and replaces lone surrogates, which no tokenizer can encode, by U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _pad(rows: list[list[int]], pad_token_id: int, padding_side: str) -> tuple[list[list[int]], list[list[int]]]:
    """Pads to the longest row; returns the rows and their masks."""
    longest = max(map(len, rows), default=0)
    padded, masks = [], []
    for row in rows:
        padding = longest - len(row)
        filler, mask = [pad_token_id] * padding, [1] * len(row)
        padded.append(filler + row if padding_side == "left" else row + filler)
        masks.append([0] * padding + mask if padding_side == "left" else mask + [0] * padding)
    return padded, masks


Causal2VecProcessor.register_for_auto_class()
DecoderProcessor.register_for_auto_class()

__all__ = ["Causal2VecProcessor", "DecoderProcessor"]
