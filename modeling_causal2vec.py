"""Causal2Vec: text embeddings from a decoder-only LLM whose causal attention stays as it is (Lin et al., ACL 2026).

    encoder(text) -> mean over tokens -> projector -> Contextual token           (section 3.1)
    decoder([instruction] [Contextual token] [text] [EOS]) -> last hidden states  (section 3.2)
    embedding = concat(state of the Contextual token, state of EOS)               (section 3.3)

Every text token follows the Contextual token and so sees the whole text. The two states are stored interleaved (t0, e0,
t1, e1, ...), which changes no cosine, dot product or distance: any prefix of an embedding is half of each state.
Invariant: both backbones are used as `AutoModel` returns them, whatever their architecture. The paper's ablations and
baselines are fields of the configuration.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging


if TYPE_CHECKING:  # never imported; named so that the Hub's loader and `save_pretrained` copy the files
    from .handler import EndpointHandler  # noqa: F401
    from .saving_utils import SHIPPED_CODE  # noqa: F401
    from .sentence_causal2vec import Causal2VecSTModule  # noqa: F401
try:
    from .configuration_causal2vec import Causal2VecConfig
    from .decoder_utils import (
        Packing,
        Prepending,
        check_prepended,
        groups_of_like_length,
        packed_states,
        prepend_between_layers,
        trim,
    )
    from .encoding_utils import EncodeMixin
    from .loading_utils import PretrainedMixin, position_limit
    from .prefix_cache import PrefixCache, expand_prefix, find_prefix, is_causal, make_bidirectional, no_prefix
    from .runtime_utils import EvalMode, ForkSafeLock, device_of, warn_of_slow_dtype
    from .tokenization_utils import Causal2VecProcessor
except ImportError:
    if __package__:  # a real one: a file is missing, or a package too old
        raise
    # Imported from a clone, where these files are top-level modules.
    from configuration_causal2vec import Causal2VecConfig
    from decoder_utils import (
        Packing,
        Prepending,
        check_prepended,
        groups_of_like_length,
        packed_states,
        prepend_between_layers,
        trim,
    )
    from encoding_utils import EncodeMixin
    from loading_utils import PretrainedMixin, position_limit
    from prefix_cache import PrefixCache, expand_prefix, find_prefix, is_causal, make_bidirectional, no_prefix
    from runtime_utils import EvalMode, ForkSafeLock, device_of, warn_of_slow_dtype
    from tokenization_utils import Causal2VecProcessor


logger = logging.get_logger(__name__)


@dataclass
class Causal2VecModelOutput(ModelOutput):
    """
    Args:
        embeddings (`torch.FloatTensor` of shape `(batch, embedding_size)`):
            By default the states of the Contextual token and of EOS, interleaved (see [`split_states`]); not normalised.
        last_hidden_state (`torch.FloatTensor` of shape `(batch, seq_len, hidden_size)`, *optional*):
            The decoder's last hidden state, after its final norm; with `output_last_hidden_state=True`.
        past_key_values (`Cache`, *optional*):
            The decoder's keys and values; with `use_cache=True`.
    """

    embeddings: torch.FloatTensor | None = None
    last_hidden_state: torch.FloatTensor | None = None
    past_key_values: Cache | None = None


class Causal2VecQueries(nn.Module):
    """Several vectors of a text: learnable queries that attend to the encoder's states (section 4.4, Table 5)."""

    def __init__(self, config: Causal2VecConfig):
        super().__init__()
        encoder = config.encoder_config.get_text_config()
        self.queries = nn.Embedding(config.num_contextual_tokens, encoder.hidden_size)
        self.attention = nn.MultiheadAttention(encoder.hidden_size, encoder.num_attention_heads, batch_first=True)

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        queries = self.queries.weight.expand(len(states), -1, -1)  # (batch, tokens, encoder_hidden_size)
        return self.attention(queries, states, states, key_padding_mask=mask == 0, need_weights=False)[0]


class Causal2VecProjector(nn.Module):
    """Lifts vectors of the encoder into the decoder's word-embedding space: W2 GELU(W1 c), as in LLaVA-1.5."""

    def __init__(self, config: Causal2VecConfig):
        super().__init__()
        self.queries = Causal2VecQueries(config) if config.num_contextual_tokens > 1 else None
        encoder_size = config.encoder_config.get_text_config().hidden_size
        self.linear_1 = nn.Linear(encoder_size, config.projector_hidden_size, bias=config.projector_bias)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(config.projector_hidden_size, config.hidden_size, bias=config.projector_bias)

    def forward(self, contextual_vector: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(contextual_vector)))  # (..., hidden_size)


class Causal2VecPreTrainedModel(PretrainedMixin, EncodeMixin, PreTrainedModel):
    config_class = Causal2VecConfig
    config: Causal2VecConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]


class Causal2VecModel(Causal2VecPreTrainedModel):
    """
    Encoder, projector and decoder. `encode` takes texts, `forward` takes tensors.

    Args:
        config ([`Causal2VecConfig`]): The configuration.
        encoder, decoder (`PreTrainedModel`, *optional*): Backbones to use instead of newly initialised ones.

    Raises:
        ValueError: `encoder_max_seq_length` exceeds the encoder's number of positions.
    """

    def __init__(
        self,
        config: Causal2VecConfig,
        encoder: PreTrainedModel | None = None,
        decoder: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        self.encoder = self.projector = None
        if config.has_encoder:
            self.add_encoder(encoder)
        if decoder is None:
            decoder = AutoModel.from_config(config.decoder_config, dtype=dtype_of(config))
        self.decoder = decoder
        config.decoder_config = self.decoder.config
        if config.bidirectional:
            make_bidirectional(self.decoder)
        if config.baseline == "token_prepending":
            prepend_between_layers(self.decoder)
        self._processor: Causal2VecProcessor | None = None
        self._instructions_file = Path(__file__).with_name("instructions.json")  # of a clone; see `from_pretrained`
        self.prefix_cache = PrefixCache()
        self.truncated = Counter()  # see `encode`
        self._eval_mode, self._counting = EvalMode(), ForkSafeLock()
        self.post_init()

    def add_encoder(self, encoder: PreTrainedModel | None) -> None:
        """Adds the encoder, newly initialised unless given, and the projector."""
        config = self.config
        if encoder is None:
            encoder = AutoModel.from_config(config.encoder_config, dtype=dtype_of(config))
        self.encoder = encoder
        if config.num_slots:
            self.projector = Causal2VecProjector(config).to(dtype_of(config))
        if getattr(self.encoder, "pooler", None) is not None:
            self.encoder.pooler = None  # never used, so its parameters would never get a gradient
        config.encoder_config = self.encoder.config
        limit = position_limit(self.encoder)
        if limit is not None and config.encoder_max_seq_length > limit:
            raise ValueError(
                f"`encoder_max_seq_length` must be at most {limit}, the positions of the {self.encoder.config.model_type}"
                f" encoder, got {config.encoder_max_seq_length}."
            )

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.decoder.set_input_embeddings(value)

    def _set_gradient_checkpointing(self, enable: bool = True, **kwargs) -> None:
        for backbone in filter(None, (self.encoder, self.decoder)):
            if enable and not backbone.supports_gradient_checkpointing:
                logger.warning("%s keeps its activations: it has no gradient checkpointing.", type(backbone).__name__)
        super()._set_gradient_checkpointing(enable=enable, **kwargs)

    def get_encoder_embedding(
        self, encoder_ids: torch.Tensor, encoder_attention_mask: torch.Tensor | None = None, packed: bool = False
    ) -> torch.Tensor:
        """
        The mean of the encoder's states over real tokens (section 3.1), `(batch, encoder_hidden_size)`; with several
        Contextual tokens the output of their queries, `(batch, num_contextual_tokens, encoder_hidden_size)`. With
        `packed`, rows of similar length are read together.
        """
        if encoder_attention_mask is None:
            encoder_attention_mask = torch.ones_like(encoder_ids)
        if packed:
            groups = groups_of_like_length(encoder_attention_mask.sum(-1).tolist())
            batches = [trim(encoder_ids[rows], encoder_attention_mask[rows]) for rows in groups]
            parts = torch.cat([self.get_encoder_embedding(*batch) for batch in batches])
            return parts[torch.tensor([row for rows in groups for row in rows], device=parts.device).argsort()]
        states, mask = self.get_encoder_states(encoder_ids, encoder_attention_mask)
        if self.projector is None or self.projector.queries is None:
            return masked_mean(states, mask)
        device = device_of(self.projector)
        return self.projector.queries(states.to(device), mask.to(device))

    def get_encoder_states(self, encoder_ids: torch.Tensor, encoder_attention_mask: torch.Tensor):
        """The encoder's last hidden state `(batch, encoder_seq_len, encoder_hidden_size)` and its mask."""
        # Real tokens first: an encoder with absolute positions counts from the left, padding included.
        length = encoder_ids.shape[1]
        places = torch.arange(length, device=encoder_ids.device)  # (encoder_seq_len,)
        places = torch.where(encoder_attention_mask == 0, places + length, places)  # no ties: ONNX has no stable sort
        order = places.argsort(dim=-1)  # (batch, encoder_seq_len)
        encoder_ids, encoder_attention_mask = encoder_ids.gather(-1, order), encoder_attention_mask.gather(-1, order)
        states = self.encoder(input_ids=encoder_ids, attention_mask=encoder_attention_mask).last_hidden_state
        return states, encoder_attention_mask

    def find_slots(self, input_ids: torch.Tensor, check: bool = True) -> torch.Tensor:
        """
        The positions reserved for Contextual tokens, as a mask of shape `(batch, seq_len)`. The check synchronises with
        an accelerator.

        Raises:
            ValueError: a row has fewer or more slots than there are Contextual tokens.
        """
        is_slot = input_ids == self.config.contextual_token_id  # (batch, seq_len)
        counts, expected = is_slot.sum(-1), self.config.num_slots  # (batch,)
        if check and not torch.compiler.is_compiling() and not (counts == expected).all():
            row = int((counts != expected).nonzero()[0])
            raise ValueError(
                f"Every row of `input_ids` must hold the contextual slot (id {self.config.contextual_token_id}) exactly "
                f"{'once' if expected == 1 else f'{expected} times'}; row {row} holds it {int(counts[row])} times. Build "
                "the inputs with `model.processor`."
            )
        return is_slot

    def pool(self, contextual_state: torch.Tensor, eos_state: torch.Tensor, contextual_token: torch.Tensor | None):
        """
        Combines the two last hidden states (section 3.3), or EOS's and the projected Contextual token, `(batch,
        hidden_size)` each, into embeddings `(batch, embedding_size)` as `config.pooling` says (appendix C.4).
        """
        if self.config.pooling == "eos" or not self.config.has_encoder:
            return eos_state
        if self.config.baseline == "embedding_concat":  # (batch, hidden_size), (batch, encoder_hidden_size)
            parts = eos_state, contextual_token.to(eos_state)
            return interleave(*parts) if len(set(self.config.embedding_sizes)) == 1 else torch.cat(parts, dim=-1)
        if self.config.pooling == "average":
            return (contextual_state + eos_state) / 2
        if self.config.pooling == "eos_encoder":
            contextual_state = contextual_token.to(eos_state)
        return interleave(contextual_state, eos_state)

    def split_states(self, embeddings):
        """
        Splits embeddings `(..., embedding_size)`, tensors or arrays, into the two vectors that they combine: by default
        the states of the Contextual token and of EOS. Embeddings cut by `truncate_dim` give the halves of that size.

        Raises:
            ValueError: this model's embeddings are a single vector.
        """
        sizes = self.config.embedding_sizes
        if len(sizes) == 1:
            raise ValueError("There is nothing to split: an embedding of this model is one state.")
        if sizes[0] != sizes[1]:  # `embedding_concat`
            return embeddings[..., : sizes[0]], embeddings[..., sizes[0] :]
        return embeddings[..., 0::2], embeddings[..., 1::2]

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        encoder_ids: torch.LongTensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        encoder_embedding: torch.FloatTensor | None = None,
        prefix_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        output_last_hidden_state: bool = False,
        packed: bool | None = None,
        **kwargs,
    ) -> Causal2VecModelOutput:
        """
        Args:
            input_ids (`(batch, seq_len)`): Rows for the decoder, each with exactly one slot per Contextual token.
            attention_mask (`(batch, past_len + seq_len)`, *optional*): 1 for real tokens; padding on either side.
            encoder_ids (`(batch, encoder_seq_len)`): The texts for the encoder.
            encoder_attention_mask (`(batch, encoder_seq_len)`, *optional*): 1 for real tokens.
            encoder_embedding (*optional*): A precomputed result of `get_encoder_embedding`; `encoder_ids` are then
                ignored.
            prefix_ids (`(1, prefix_len)`, *optional*): The shared beginning of all rows, read once; `input_ids` then
                hold the rest, padded on the right. See `return_prefix_ids` of `model.processor`.
            past_key_values (`Cache`, *optional*): Keys and values of the tokens before `input_ids`.
            use_cache (`bool`): Return the decoder's keys and values.
            output_last_hidden_state (`bool`): Return the decoder's last hidden state.
            packed (`bool`, *optional*): With `prefix_ids`, skip padding in both towers: the decoder's rows are joined
                into one, the encoder's grouped by length. Defaults to `True` on a CPU without gradients, where it is
                faster.
            kwargs: Passed on to the decoder.

        Raises:
            ValueError: a row has the wrong number of slots, neither `encoder_ids` nor `encoder_embedding` is given, or
                arguments contradict each other.
        """
        on_cpu = input_ids.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_cpu:
            warn_of_slow_dtype(self.decoder)
        if prefix_ids is not None and (past_key_values is not None or use_cache or output_last_hidden_state):
            raise ValueError("With `prefix_ids`, forward gives embeddings alone. Put the ids into `input_ids` instead.")
        if self.encoder is None and encoder_embedding is not None:
            raise ValueError("This model has no encoder; leave `encoder_embedding` out.")
        if self.encoder is not None and encoder_ids is None and encoder_embedding is None:
            raise ValueError("Pass `encoder_ids` (see `model.processor`) or an `encoder_embedding`.")
        moves_states = self.config.baseline == "token_prepending"
        if packed and moves_states:
            raise ValueError("`packed` is not possible with token prepending, which moves states within rows.")
        right_padded = prefix_ids is not None and is_causal(self)
        if packed is None:
            packed = on_cpu and not torch.is_grad_enabled() and not moves_states
        packed = packed and right_padded

        batch_size = len(input_ids)
        if attention_mask is None:
            past_len = 0 if past_key_values is None else past_key_values.get_seq_length()
            attention_mask = input_ids.new_ones(batch_size, past_len + input_ids.shape[1])
        prefix = None
        if prefix_ids is not None and prefix_ids.shape[1]:
            prefix = find_prefix(self, prefix_ids, rows=batch_size)
            if prefix is None:  # then every row reads it
                before = prefix_ids.to(input_ids.device).expand(batch_size, -1)  # (batch, prefix_len)
                input_ids = torch.cat([before, input_ids], dim=-1)  # (batch, seq_len)
                attention_mask = torch.cat([torch.ones_like(before), attention_mask], dim=-1)
        is_slot = self.find_slots(input_ids, check=prefix_ids is None or on_cpu)  # (batch, seq_len)

        contextual_token = encoder_embedding
        if self.encoder is not None and encoder_embedding is None:
            contextual_token = self.get_encoder_embedding(encoder_ids, encoder_attention_mask, packed)
        if self.projector is not None:  # (batch, hidden_size), of several tokens (batch, tokens, hidden_size)
            contextual_token = self.projector(contextual_token.to(device_of(self.projector)))

        inputs_embeds = self.get_input_embeddings()(input_ids)  # (batch, seq_len, hidden_size)
        if self.projector is not None:
            shape = (batch_size, self.config.num_slots, inputs_embeds.shape[-1])  # (batch, tokens, hidden_size)
            places = is_slot.unsqueeze(-1).to(inputs_embeds.device)  # (batch, seq_len, 1)
            inputs_embeds = inputs_embeds.masked_scatter(places, contextual_token.to(inputs_embeds).reshape(shape))

        ends = last_true(attention_mask[:, -input_ids.shape[1] :])  # (batch,)
        slots = last_true(is_slot) if self.config.num_slots else ends  # (batch,)
        if moves_states:
            kwargs["prepending"] = Prepending(slots, ends)
        lengths = attention_mask.sum(-1).tolist() if packed else None
        decoder_inputs = (inputs_embeds, None if right_padded else attention_mask, prefix, lengths)
        hidden, starts, outputs = self._decode(*decoder_inputs, past_key_values, use_cache, **kwargs)
        if moves_states:
            check_prepended(self.decoder, kwargs["prepending"])
        contextual_state, eos_state = (hidden[starts + places.to(hidden.device)] for places in (slots, ends))
        return Causal2VecModelOutput(
            embeddings=self.pool(contextual_state, eos_state, contextual_token),  # (batch, embedding_size)
            last_hidden_state=outputs.last_hidden_state if output_last_hidden_state else None,
            past_key_values=outputs.past_key_values if use_cache else None,
        )

    def _decode(
        self, inputs_embeds, attention_mask, prefix, lengths: list[int] | None, past_key_values, use_cache, **kwargs
    ):
        """
        The decoder's last hidden states of all rows, flattened to `(places, hidden_size)`; the start of each row,
        `(batch,)`; and the decoder's output, which is `None` if the rows were packed.
        """
        batch_size, seq_len, _ = inputs_embeds.shape
        device = inputs_embeds.device
        if lengths is not None:
            hidden = packed_states(self.decoder, inputs_embeds, Packing(lengths, prefix))  # (total, hidden_size)
            if hidden is not None:
                lengths = torch.tensor(lengths, device=hidden.device)
                return hidden, lengths.cumsum(0) - lengths, None
        if attention_mask is None:
            # A causal decoder never sees padding on the right. Positions continue over it, or rows would look packed.
            start = 0 if prefix is None else prefix.length
            position_ids = torch.arange(start, start + seq_len, device=device).expand(batch_size, -1)
            if prefix is not None:
                past_key_values = expand_prefix(prefix, batch_size)
            elif device.type != "cpu":
                past_key_values = no_prefix(self)
        else:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -seq_len:]  # (batch, seq_len)
        outputs = self.decoder(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        return hidden.flatten(0, 1), torch.arange(batch_size, device=hidden.device) * seq_len, outputs


def dtype_of(config: Causal2VecConfig) -> torch.dtype:
    """The dtype of a new model, whatever the backbones' configurations say."""
    dtype = config.dtype or torch.get_default_dtype()
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def masked_mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean of `(batch, seq_len, hidden_size)` over the positions where a mask `(batch, seq_len)` is true."""
    mask = mask.to(states.device).unsqueeze(-1)  # (batch, seq_len, 1)
    # Half precision cannot represent all counts: in bfloat16, 256 is followed by 258.
    total = (states * mask).sum(1, dtype=torch.promote_types(states.dtype, torch.float32))  # (batch, hidden_size)
    count = mask.sum(1, dtype=torch.long).clamp(min=1)  # (batch, 1)
    return (total / count).to(states.dtype)  # (batch, hidden_size)


def last_true(mask: torch.Tensor) -> torch.Tensor:
    """The last true position of each row of a mask `(batch, seq_len)`: `(batch,)`."""
    return mask.shape[-1] - 1 - mask.flip(-1).int().argmax(-1)


def interleave(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Interleaves two tensors `(..., size)` number by number: `(..., 2 * size)`."""
    return torch.stack([first, second], dim=-1).flatten(-2)


Causal2VecConfig.register_for_auto_class()
Causal2VecModel.register_for_auto_class("AutoModel")

__all__ = ["Causal2VecModel", "Causal2VecModelOutput", "Causal2VecPreTrainedModel"]
