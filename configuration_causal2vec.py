"""Configuration of Causal2Vec: one bidirectional encoder, one causal decoder, and how a text is laid out for both.

Invariant: a configuration that can be constructed describes a model that can run. Everything else is refused here, with
an error that says what would work.
"""

import copy
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import transformers


if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
    raise ImportError(f"Causal2Vec needs torch 2.11 or newer, got {torch.__version__}: pip install -U torch")
if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 17):
    raise ImportError(
        f"Causal2Vec needs transformers 5.17 or newer, got {transformers.__version__}: pip install -U transformers"
    )

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.utils import logging


def _check_siblings() -> None:
    """In a clone these files are top-level modules: refuses a module of the same name from another folder."""
    for name in (
        "decoder_utils",
        "encoding_utils",
        "loading_utils",
        "prefix_cache",
        "runtime_utils",
        "saving_utils",
        "tokenization_utils",
    ):
        expected, spec = Path(__file__).with_name(f"{name}.py"), importlib.util.find_spec(name)
        found = spec and spec.origin
        if found is None or Path(found).resolve() != expected.resolve():
            raise ImportError(
                f"`import {name}` must give {expected}, but sys.path leads to {found}. Rename or move that file, or load "
                "the model with AutoModel and trust_remote_code=True, which needs no clone on sys.path."
            )


try:
    from .saving_utils import is_hub_id, new_files, push_to_hub
except ImportError:
    if __package__:  # a real one: a file is missing, or a package too old
        raise
    _check_siblings()
    from saving_utils import is_hub_id, new_files, push_to_hub


logger = logging.get_logger(__name__)

if TYPE_CHECKING:
    # Never imported. The loader tells local folders of the same name apart by this file and the files it names; without
    # this line it could run one folder's model code for another with the same configuration file.
    from .modeling_causal2vec import Causal2VecModel  # noqa: F401


# Prompt templates of instruction-tuned decoders (Causal2Vec, appendix A.1), found by a marker in the chat template that
# the decoder's tokenizer carries: name -> (marker, template_prefix, template_suffix). The paper's suffix for
# Qwen2.5-Instruct, <|im_end|>, is that model's EOS token as well: a row then ends in it once, not twice.
PROMPT_TEMPLATES = {
    "llama-3": ("<|start_header_id|>", "<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_start|>user\n", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<start_of_turn>user\n", "<end_of_turn>"),
    "inst": ("[INST]", "[INST] ", " [/INST]"),
    "none": ("", "", ""),
}


BASELINES = ("last_token", "embedding_concat", "token_prepending")
WITHOUT_ENCODER = ("last_token", "token_prepending")  # those that are the decoder alone


@strict
class Causal2VecConfig(PreTrainedConfig):
    """
    Configuration of a [`Causal2VecModel`].

    Args:
        encoder_config (`PreTrainedConfig` or `dict`, *optional*, defaults to BERT's):
            Any encoder that `AutoModel` knows. A dict needs its `model_type`. Baselines without encoder have `None`.
        decoder_config (`PreTrainedConfig` or `dict`, *optional*, defaults to Llama's):
            Any decoder-only model that `AutoModel` knows. A dict needs its `model_type`.
        contextual_token_id (`int`, defaults to 0):
            Id in the decoder's vocabulary that is reserved for the Contextual token's place. Its own embedding is never
            used and text is never encoded to it.
        hidden_size (`int`, *optional*):
            The decoder's hidden size; filled in. An embedding has `embedding_size` numbers, by default twice as many;
            config.json says how many, for engines that do not run this code.
        template_prefix (`str`, defaults to `""`):
            Template text before the instruction. Control tokens in it are encoded as such.
        template_suffix (`str`, defaults to `""`):
            Template text between the input text and the EOS token. One that ends in the EOS token gets no second one.
        text_prefix (`str`, defaults to `""`):
            What the encoder expects before every text, such as `"query: "`.
        query_instruction (`str`, *optional*):
            The default instruction of `encode_query`.
        max_seq_length (`int`, defaults to 512):
            Longest decoder sequence in tokens: template, instruction, Contextual token, text and EOS. Longer texts are cut
            at their end.
        icl_max_seq_length (`int`, defaults to 2048):
            The same limit for inputs with in-context examples.
        encoder_max_seq_length (`int`, defaults to 512):
            Longest encoder sequence in tokens, its special tokens included.
        projector_hidden_size (`int`, *optional*):
            Width between the projector's two linear layers. Defaults to `hidden_size`.
        projector_hidden_act (`str`, defaults to `"gelu"`):
            Activation between them.
        projector_bias (`bool`, defaults to `True`):
            Whether the two linear layers have biases.
        pooling (`str`, defaults to `"concat"`):
            How an embedding is pooled (Table 12): `"concat"` of the states of the Contextual token and EOS, their
            `"average"`, `"eos"` alone, or `"eos_encoder"`, EOS's state and the projected output of the encoder.
        contextual_position (`str`, defaults to `"after_instruction"`):
            Or `"before_instruction"` (Table 14), between the template's prefix and the instruction.
        num_contextual_tokens (`int`, defaults to 1):
            If more than one, learnable queries read them from the encoder's states by cross-attention (Table 5), and
            the state of the last one, which sees the others, goes into the embedding.
        bidirectional (`bool`, defaults to `False`):
            Whether the decoder's attention looks both ways (Table 15).
        baseline (`str`, *optional*):
            One of the methods that the paper compares with, each with its own pooling: `"last_token"` (Table 2),
            `"embedding_concat"` (Table 4) or `"token_prepending"` (Table 6).

    Raises:
        StrictDataclassFieldValidationError: a value has the wrong type, or is none of a field's choices.
        ValueError: a value cannot work with the two backbones.

    Example:

    ```python
    >>> from transformers import BertConfig, LlamaConfig
    >>> config = Causal2VecConfig(encoder_config=BertConfig(), decoder_config=LlamaConfig(), contextual_token_id=0)
    >>> config.hidden_size
    4096
    ```
    """

    model_type = "causal2vec"
    sub_configs = {"encoder_config": AutoConfig, "decoder_config": AutoConfig}

    encoder_config: dict | PreTrainedConfig | None = None
    decoder_config: dict | PreTrainedConfig | None = None
    contextual_token_id: int = 0
    hidden_size: int | None = None
    template_prefix: str = ""
    template_suffix: str = ""
    text_prefix: str = ""
    query_instruction: str | None = None
    max_seq_length: int = 512
    icl_max_seq_length: int = 2048
    encoder_max_seq_length: int = 512
    projector_hidden_size: int | None = None
    projector_hidden_act: str = "gelu"
    projector_bias: bool = True
    pooling: Literal["concat", "average", "eos", "eos_encoder"] = "concat"
    contextual_position: Literal["after_instruction", "before_instruction"] = "after_instruction"
    num_contextual_tokens: int = 1
    bidirectional: bool = False
    baseline: Literal[BASELINES] | None = None

    def __post_init__(self, **kwargs):
        for part, values in (
            ("", kwargs),
            ("encoder_config", self.encoder_config),
            ("decoder_config", self.decoder_config),
        ):
            if isinstance(values, dict) and "_attn_implementation_internal" in values:
                raise ValueError(
                    f"`_attn_implementation_internal` is not accepted from a configuration{part and f' ({part})'}; pass "
                    "`attn_implementation=` to `from_pretrained` instead."
                )
        saved_size = kwargs.pop("embedding_size", None)  # there for engines that do not run this code
        if self.has_encoder:
            self.encoder_config = _sub_config("encoder_config", self.encoder_config, default="bert")
        elif self.encoder_config is not None:
            raise ValueError(f"The baseline {self.baseline!r} has no encoder; leave `encoder_config` out.")
        self.decoder_config = _sub_config("decoder_config", self.decoder_config, default="llama")
        super().__post_init__(**kwargs)
        # A field that nothing reads may come from a newer transformers, so the checkpoint still loads; a typo gets a
        # warning.
        read = {
            name for name in kwargs if name not in vars(self) and (hasattr(self, name) or hasattr(self, f"_{name}"))
        }
        unknown = sorted(name for name in kwargs.keys() - read - _OF_TRANSFORMERS if not name.startswith("_"))
        for name in unknown:
            vars(self).pop(name, None)
        if unknown:
            logger.warning(
                "%s has no %s: ignored. Its fields are %s.",
                type(self).__name__,
                unknown,
                sorted(type(self).__annotations__),
            )

        decoder = self.decoder_config.get_text_config()
        if self.hidden_size is None:
            self.hidden_size = decoder.hidden_size
        elif self.hidden_size != decoder.hidden_size:
            raise ValueError(
                f"`hidden_size` must be the decoder's, {decoder.hidden_size}, got {self.hidden_size}. Leave it out."
            )
        if self.projector_hidden_size is None:
            self.projector_hidden_size = self.hidden_size
        if not 0 <= self.contextual_token_id < decoder.vocab_size:
            raise ValueError(
                f"`contextual_token_id` must lie in the decoder's vocabulary, 0 to {decoder.vocab_size - 1}, got "
                f"{self.contextual_token_id}. Add a token and call `resize_token_embeddings` first."
            )
        if self.projector_hidden_act not in ACT2FN:
            raise ValueError(
                f"`projector_hidden_act` must be one of {sorted(ACT2FN)}, got {self.projector_hidden_act!r}."
            )
        for name, minimum in _MINIMUM.items():
            if name in ("max_seq_length", "icl_max_seq_length"):
                minimum += self.num_contextual_tokens - 1
            if getattr(self, name) < minimum:
                raise ValueError(f"`{name}` must be at least {minimum}, got {getattr(self, name)}.")
        _check_combinations(self)
        if saved_size not in (None, self.embedding_size):
            raise ValueError(
                f"`embedding_size` must be {self.embedding_size}, as the other fields say, got {saved_size!r}. Leave it out."
            )
        for name, backbone in (
            ("max_seq_length", decoder),
            ("icl_max_seq_length", decoder),
            ("encoder_max_seq_length", self.encoder_config),
        ):
            limit = getattr(backbone, "max_position_embeddings", None)
            if isinstance(limit, int) and limit > 0 and getattr(self, name) > limit:
                raise ValueError(
                    f"`{name}` must be at most {limit}, the `max_position_embeddings` of the {backbone.model_type} "
                    f"backbone, got {getattr(self, name)}."
                )

    @property
    def has_encoder(self) -> bool:
        """Whether there is an encoder beside the decoder."""
        return self.baseline not in WITHOUT_ENCODER

    @property
    def num_slots(self) -> int:
        """How many positions of a decoder's row are reserved for Contextual tokens, or for token prepending's token."""
        return 0 if self.baseline in ("last_token", "embedding_concat") else self.num_contextual_tokens

    @property
    def embedding_sizes(self) -> tuple[int, ...]:
        """The sizes of the one or two vectors that make up an embedding."""
        if self.baseline == "embedding_concat":
            return self.hidden_size, self.encoder_config.get_text_config().hidden_size
        if self.baseline is not None or self.pooling in ("average", "eos"):
            return (self.hidden_size,)
        return self.hidden_size, self.hidden_size

    @property
    def embedding_size(self) -> int:
        """How many numbers an embedding has."""
        return sum(self.embedding_sizes)

    def to_dict(self) -> dict:
        """As in transformers, with `embedding_size` and without the paths of the folders that the backbones came from."""
        values = {**super().to_dict(), "embedding_size": self.embedding_size}
        for part in (values, values["encoder_config"], values["decoder_config"]):
            if part is not None and not is_hub_id(part.get("_name_or_path")):
                part.pop("_name_or_path", None)
        return values

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """As in transformers; the folder that this code was imported from is fine too."""
        if push_to_hub:
            kwargs.setdefault("repo_id", Path(save_directory).name)
        with new_files(save_directory) as temporary:
            super().save_pretrained(str(temporary), push_to_hub=push_to_hub, **kwargs)

    push_to_hub = push_to_hub

    def get_text_config(self, decoder=None, encoder=None) -> PreTrainedConfig:
        """The decoder's text configuration (the encoder's for `encoder=True` alone): vocabulary, layers, cache."""
        backbone = self.encoder_config if encoder and not decoder and self.has_encoder else self.decoder_config
        return backbone.get_text_config()


# A decoder row holds at least the slot, one text token and EOS; an encoder row one text token between two specials.
_MINIMUM = {
    "num_contextual_tokens": 1,
    "max_seq_length": 3,
    "icl_max_seq_length": 3,
    "encoder_max_seq_length": 3,
    "projector_hidden_size": 1,
}

# Attributes that transformers and its Trainer set on configurations and that end up in config.json.
_OF_TRANSFORMERS = {
    "auto_map",
    "bos_token_id",
    "custom_pipelines",
    "distributed_config",
    "eos_token_id",
    "loss_type",
    "model_type",
    "pad_token_id",
    "quantization_config",
    "tie_word_embeddings",
    "use_cache",
}


def _check_combinations(config: Causal2VecConfig) -> None:
    """Refuses settings that contradict each other."""
    if config.pooling == "eos_encoder" and config.num_contextual_tokens > 1:
        raise ValueError(
            "`pooling='eos_encoder'` needs `num_contextual_tokens=1`: several tokens are no single output of the encoder."
        )
    if config.baseline is None:
        return
    reasons = {
        "pooling": "it pools in its own way",
        "num_contextual_tokens": "it has no Contextual token",
    }
    if config.num_slots == 0:
        reasons["contextual_position"] = "it has no Contextual token"
    if config.baseline == "token_prepending":
        reasons["bidirectional"] = "with attention both ways every token sees EOS already"
    for name, reason in reasons.items():
        default = getattr(type(config), name)
        if getattr(config, name) != default:
            raise ValueError(f"`{name}` must be {default!r} for the baseline {config.baseline!r}: {reason}.")


def _sub_config(name: str, value: dict | PreTrainedConfig | None, default: str) -> PreTrainedConfig:
    if value is None:
        return AutoConfig.for_model(default)
    if isinstance(value, PreTrainedConfig):
        config = copy.deepcopy(value)  # ours to change: transformers resets its attention and dtype
    elif "model_type" not in value:
        raise ValueError(f"`{name}` needs a `model_type` that AutoModel knows, got keys {sorted(value)}.")
    elif value["model_type"] not in CONFIG_MAPPING:
        raise ValueError(
            f"The `model_type` of `{name}` must be one of {', '.join(sorted(CONFIG_MAPPING))}, got "
            f"{value['model_type']!r}."
        )
    else:
        config = AutoConfig.for_model(**copy.deepcopy(value))
    text_config = config.get_text_config()
    for size in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        count = getattr(text_config, size, 1)
        if isinstance(count, (int, float, str)) and (not isinstance(count, int) or count < 1):
            raise ValueError(f"`{size}` of `{name}` must be a positive integer, got {count!r}.")
    if config.is_encoder_decoder:
        raise ValueError(
            f"`{name}` must be one backbone of its own, but {config.model_type} is an encoder-decoder model."
        )
    return config


__all__ = ["Causal2VecConfig", "PROMPT_TEMPLATES"]
