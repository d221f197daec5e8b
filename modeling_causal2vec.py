"""Causal2Vec: text embeddings from a decoder-only LLM whose causal attention stays as it is (Lin et al., ACL 2026).

    encoder(text) -> mean over tokens -> projector -> Contextual token           (section 3.1)
    decoder([instruction] [Contextual token] [text] [EOS]) -> last hidden states  (section 3.2)
    embedding = concat(state of the Contextual token, state of EOS)               (section 3.3)

Every text token comes after the Contextual token and so sees the whole text. The two states are stored interleaved (t0, e0,
t1, e1, ...), which changes no cosine, dot product or distance: any prefix of an embedding is half of each state. Invariant:
both backbones are used as `AutoModel` gives them; nothing here depends on which they are. The ablations of this model are fields of its
configuration; the methods that the paper compares with are in baselines.py, as subclasses.
"""

import json
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer, GgufConfig, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput
from transformers.utils import cached_file, has_file, is_accelerate_available, is_gguf_available, logging


if TYPE_CHECKING:  # never imported here; named so that the Hub's loader and `save_pretrained` carry the file along
    from .sentence_causal2vec import Causal2VecSTModule  # noqa: F401
try:
    from .configuration_causal2vec import PROMPT_TEMPLATES, Causal2VecConfig
    from .packing import ForkSafeLock, Packing, groups_of_like_length, packed_states, sorted_batches, trim
    from .prefix_cache import PrefixCache, device_of, look_both_ways, plan_rows
    from .saving_utils import (
        holds_weights,
        new_files,
        push_to_hub,
        refresh_hashes,
        resolve_base,
        write_plain_card,
        write_sentence_transformers_files,
    )
    from .tokenization_utils import (
        Causal2VecProcessor,
        broadcast_instruction,
        check_texts,
        count_cut,
        describe_cut,
        format_examples,
        load_tokenizers,
    )
except ImportError:
    if __package__:  # a real one: a file is missing, or a package too old
        raise
    # Imported from a clone, where these files are top-level modules.
    from configuration_causal2vec import PROMPT_TEMPLATES, Causal2VecConfig
    from packing import ForkSafeLock, Packing, groups_of_like_length, packed_states, sorted_batches, trim
    from prefix_cache import PrefixCache, device_of, look_both_ways, plan_rows
    from saving_utils import (
        holds_weights,
        new_files,
        push_to_hub,
        refresh_hashes,
        resolve_base,
        write_plain_card,
        write_sentence_transformers_files,
    )
    from tokenization_utils import (
        Causal2VecProcessor,
        broadcast_instruction,
        check_texts,
        count_cut,
        describe_cut,
        format_examples,
        load_tokenizers,
    )


logger = logging.get_logger(__name__)


@dataclass
class Causal2VecModelOutput(ModelOutput):
    """
    Args:
        embeddings (`torch.FloatTensor` of shape `(batch, embedding_size)`):
            By default the states of the Contextual token and of EOS, interleaved (see [`split_states`]); not normalised.
        last_hidden_state (`torch.FloatTensor` of shape `(batch, seq_len, hidden_size)`, *optional*):
            The decoder's, after its final norm; with `output_last_hidden_state=True`.
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


class EvalMode(ForkSafeLock):
    """
    `with eval_mode(model):` keeps a model in eval mode as long as any thread is inside. The last one to leave restores
    what was in training, which a frozen encoder may not have been.
    """

    def __init__(self):
        self._threads, self._training = 0, []
        super().__init__()

    @contextmanager
    def __call__(self, model: PreTrainedModel):
        with self:
            training = [module for module in model.prefix_cache.scan(model).modules if module.training]
            if training:
                self._training += training
                model.eval()
            self._threads += 1
        try:
            yield
        finally:
            with self:
                self._threads -= 1
                if self._threads == 0:
                    self._restore()

    def renew(self) -> None:
        super().renew()
        self._threads = 0
        self._restore()

    def _restore(self) -> None:
        while self._training:
            self._training.pop().training = True


class Causal2VecPreTrainedModel(PreTrainedModel):
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
    The encoder, the projector and the decoder. `encode` goes from texts to vectors; `forward` from tensors to vectors.

    Args:
        config ([`Causal2VecConfig`]): The configuration.
        encoder, decoder (`PreTrainedModel`, *optional*): Backbones to use instead of newly initialised ones.

    Raises:
        ValueError: `encoder_max_seq_length` is more than the encoder has positions for, or the configuration is that of a
            baseline.
    """

    baseline: str | None = None
    processor_class = Causal2VecProcessor

    def __init__(
        self,
        config: Causal2VecConfig,
        encoder: PreTrainedModel | None = None,
        decoder: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        if config.baseline != self.baseline:
            raise ValueError(
                f"{type(self).__name__} is built from a configuration with baseline={self.baseline!r}, got "
                f"{config.baseline!r}. Load its folder with AutoModel."
            )
        self.add_encoder(encoder)
        if decoder is None:
            decoder = AutoModel.from_config(config.decoder_config, dtype=dtype_of(config))
        self.decoder = decoder
        config.decoder_config = self.decoder.config
        if config.bidirectional:
            look_both_ways(self.decoder)
        self._processor: Causal2VecProcessor | None = None
        self._instructions_file = Path(__file__).with_name("instructions.json")  # of a clone; see `from_pretrained`
        self.prefix_cache = PrefixCache()
        self.truncated = Counter()  # see `encode`
        self._eval_mode, self._counting = EvalMode(), ForkSafeLock()
        self.post_init()

    def add_encoder(self, encoder: PreTrainedModel | None) -> None:
        """Adds the encoder, newly initialised unless it is given, and the projector."""
        config = self.config
        if encoder is None:
            encoder = AutoModel.from_config(config.encoder_config, dtype=dtype_of(config))
        self.encoder = encoder
        self.projector = Causal2VecProjector(config).to(dtype_of(config))
        if getattr(self.encoder, "pooler", None) is not None:
            self.encoder.pooler = None  # never used; its parameters would never get a gradient
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

    def get_contextual_token(self, encoder_ids: torch.Tensor, encoder_attention_mask: torch.Tensor) -> torch.Tensor:
        """
        The projected mean of the encoder's states over real tokens (section 3.1): `(batch, hidden_size)`; of several
        Contextual tokens `(batch, num_contextual_tokens, hidden_size)`.
        """
        if self.projector.queries is None:
            return self.project(self.get_encoder_embedding(encoder_ids, encoder_attention_mask))
        device = device_of(self.projector)
        states, mask = (x.to(device) for x in self.get_encoder_states(encoder_ids, encoder_attention_mask))
        return self.projector(self.projector.queries(states, mask))  # (batch, tokens, hidden_size)

    def project(self, encoder_embedding: torch.Tensor) -> torch.Tensor:
        """
        From `get_encoder_embedding`'s result to the Contextual token `(batch, hidden_size)`.

        Raises:
            ValueError: the model has no projector, or makes several Contextual tokens of all of the encoder's states.
        """
        if self.projector is None or self.projector.queries is not None:
            raise ValueError("An `encoder_embedding` is projected by models with one Contextual token; this is none.")
        return self.projector(encoder_embedding.to(device_of(self.projector)))

    def get_encoder_embedding(self, encoder_ids: torch.Tensor, encoder_attention_mask: torch.Tensor) -> torch.Tensor:
        """The mean of the encoder's states over real tokens (section 3.1): `(batch, encoder_hidden_size)`."""
        return masked_mean(*self.get_encoder_states(encoder_ids, encoder_attention_mask))

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

    def find_slots(self, input_ids: torch.Tensor) -> torch.Tensor:
        """
        Which positions of each row the Contextual tokens take: a mask of shape `(batch, seq_len)`.

        Raises:
            ValueError: a row has fewer or more slots than there are Contextual tokens.
        """
        is_slot = input_ids == self.config.contextual_token_id  # (batch, seq_len)
        counts, expected = is_slot.sum(-1), self.config.num_slots  # (batch,)
        if not torch.compiler.is_compiling() and not (counts == expected).all():
            row = int((counts != expected).nonzero()[0])
            raise ValueError(
                f"Every row of `input_ids` must hold the contextual slot (id {self.config.contextual_token_id}) exactly "
                f"{'once' if expected == 1 else f'{expected} times'}; row {row} holds it {int(counts[row])} times. Build "
                "the inputs with `model.processor`."
            )
        return is_slot

    def pool(self, contextual_state: torch.Tensor, eos_state: torch.Tensor, contextual_token: torch.Tensor | None):
        """
        From the two last hidden states (section 3.3) and what the decoder read as Contextual token, `(batch, hidden_size)`
        each, to embeddings `(batch, embedding_size)`, as `config.pooling` says (appendix C.4).
        """
        if self.config.pooling == "eos":
            return eos_state
        if self.config.pooling == "average":
            return (contextual_state + eos_state) / 2
        if self.config.pooling == "eos_encoder":
            contextual_state = contextual_token.to(eos_state)
        return interleave(contextual_state, eos_state)

    def split_states(self, embeddings):
        """
        The two vectors that embeddings `(..., embedding_size)` join, tensors or arrays: the states of the Contextual token
        and of EOS, as `config.pooling` and `config.baseline` say. Of embeddings cut by `truncate_dim`, their halves.

        Raises:
            ValueError: embeddings of this model are one vector.
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
        past_key_values: Cache | None = None,
        contextual_token: torch.FloatTensor | None = None,
        encoder_embedding: torch.FloatTensor | None = None,
        use_cache: bool = False,
        output_last_hidden_state: bool = False,
        right_padded: bool = False,
        share_heads: bool = False,
        packing: Packing | None = None,
        **kwargs,
    ) -> Causal2VecModelOutput:
        """
        Args:
            input_ids (`(batch, seq_len)`): Rows for the decoder, each with exactly one slot per Contextual token.
            attention_mask (`(batch, past_len + seq_len)`, *optional*): 1 for real tokens; padding on either side.
            encoder_ids (`(batch, encoder_seq_len)`): The texts for the encoder.
            encoder_attention_mask (`(batch, encoder_seq_len)`, *optional*): 1 for real tokens.
            past_key_values (`Cache`, *optional*): Keys and values of what stands before `input_ids`.
            contextual_token (*optional*): `get_contextual_token`'s result, computed before; `encoder_ids` are then not
                read.
            encoder_embedding (`(batch, encoder_hidden_size)`, *optional*): `get_encoder_embedding`'s result, computed
                before; its projection is the `contextual_token`.
            use_cache (`bool`): Return the decoder's keys and values.
            output_last_hidden_state (`bool`): Return the decoder's last hidden state.
            right_padded (`bool`): A promise that all padding is on the right and that the decoder is causal. It then needs
                no mask, and attention is free to use its fastest kernel.
            share_heads (`bool`): Read what rows have in common before their slots only once; see [`embed`].
            packing ([`Packing`], *optional*): Read the rows as one, without their padding; see [`packed_states`].
            kwargs: Passed on to the decoder.

        Raises:
            ValueError: a row has not as many slots as it should, none of `encoder_ids`, `contextual_token` and
                `encoder_embedding` is given, or `encoder_embedding` is, and the model has no use for it.
        """
        if encoder_embedding is not None:
            contextual_token = self.project(encoder_embedding)  # (batch, hidden_size)
        if share_heads:
            if past_key_values is not None or use_cache or output_last_hidden_state:
                raise ValueError("With `share_heads`, forward takes whole rows and gives embeddings.")
            if encoder_ids is None and contextual_token is None and self.encoder is not None:
                raise ValueError("With `share_heads`, pass `encoder_ids` (see `model.processor`).")
            inputs = (input_ids, attention_mask, encoder_ids, encoder_attention_mask)
            return Causal2VecModelOutput(self.embed(*inputs, contextual_token=contextual_token, **kwargs))
        is_slot = self.find_slots(input_ids)  # (batch, seq_len)
        if contextual_token is None and self.encoder is not None:
            if encoder_ids is None:
                raise ValueError("Pass `encoder_ids` (see `model.processor`) or a `contextual_token`.")
            if encoder_attention_mask is None:
                encoder_attention_mask = torch.ones_like(encoder_ids)
            contextual_token = self.get_contextual_token(encoder_ids, encoder_attention_mask)  # (batch, hidden_size)

        inputs_embeds = self.get_input_embeddings()(input_ids)  # (batch, seq_len, hidden_size)
        if contextual_token is not None and self.config.num_slots:
            shape = (len(input_ids), self.config.num_slots, inputs_embeds.shape[-1])  # (batch, tokens, hidden_size)
            places = is_slot.unsqueeze(-1).to(inputs_embeds.device)  # (batch, seq_len, 1)
            inputs_embeds = inputs_embeds.masked_scatter(places, contextual_token.to(inputs_embeds).reshape(shape))

        seq_len = input_ids.shape[1]
        if attention_mask is None:
            past_len = 0 if past_key_values is None else past_key_values.get_seq_length()
            attention_mask = input_ids.new_ones(input_ids.shape[0], past_len + seq_len)
        position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -seq_len:]  # (batch, seq_len)
        if right_padded:
            # Nothing looks at padding that comes after it. Positions run on, or padding would look like packed rows.
            position_ids = position_ids[:, :1] + torch.arange(seq_len, device=position_ids.device)  # (batch, seq_len)
        hidden = packed_states(self.decoder, inputs_embeds, packing) if packing and right_padded else None
        if hidden is None:
            outputs = self.decoder(
                inputs_embeds=inputs_embeds,
                attention_mask=None if right_padded else attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
            hidden = outputs.last_hidden_state  # (batch, seq_len, hidden_size)

        rows = torch.arange(input_ids.shape[0], device=hidden.device)  # (batch,)
        slots, ends = (last_true(mask).to(hidden.device) for mask in (is_slot, attention_mask[:, -seq_len:]))
        return Causal2VecModelOutput(
            embeddings=self.pool(hidden[rows, slots], hidden[rows, ends], contextual_token),  # (batch, embedding_size)
            last_hidden_state=hidden if output_last_hidden_state else None,
            past_key_values=outputs.past_key_values if use_cache else None,
        )

    def embed(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None,
        encoder_ids: torch.LongTensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        packed: bool | None = None,
        contextual_token: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """
        `forward`'s embeddings `(batch, embedding_size)`, with every head (what stands before a slot) read only once.

        Without gradients and outside training, heads stay in `prefix_cache` for later calls. With gradients, a head that
        several rows share is read once per call. Where neither is possible, `forward` reads whole rows. With `packed`
        (default: on a CPU without gradients, where it was measured to pay) neither tower reads much padding: the decoder
        reads rows joined into one, the encoder reads rows of like length together.
        """
        if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            warn_of_slow_dtype(self.decoder)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if encoder_attention_mask is None and encoder_ids is not None:
            encoder_attention_mask = torch.ones_like(encoder_ids)
        if packed is None:
            # Compiled code would be made anew for every new set of lengths.
            compiled = self._compiled_call_impl is not None
            packed = input_ids.device.type == "cpu" and not torch.is_grad_enabled() and not compiled
        if contextual_token is None and packed and self.encoder is not None:
            lengths = encoder_attention_mask.sum(-1).tolist()
            groups = groups_of_like_length(lengths)
            tokens = [self.get_contextual_token(*trim(encoder_ids[g], encoder_attention_mask[g])) for g in groups]
            places = torch.tensor([row for group in groups for row in group], device=tokens[0].device)
            contextual_token = torch.cat(tokens)[places.argsort()]  # (batch, hidden_size)
        parts, order = [], []
        for rows, inputs in plan_rows(self, input_ids, attention_mask, packed):
            if contextual_token is not None:
                inputs["contextual_token"] = contextual_token[rows.to(contextual_token.device)]
            elif self.encoder is not None:
                inputs["encoder_ids"] = encoder_ids[rows.to(encoder_ids.device)]
                inputs["encoder_attention_mask"] = encoder_attention_mask[rows.to(encoder_attention_mask.device)]
            parts.append(self(**inputs, **kwargs).embeddings)  # (rows, embedding_size)
            order.append(rows)
        return torch.cat(parts)[torch.cat(order).argsort().to(parts[0].device)]  # (batch, embedding_size)

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
                included and heads left out while `prefix_cache` is on, so that long texts need no smaller `batch_size`.
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
            count_heads=not self.prefix_cache.enabled or self.prefix_cache.scan(self).is_offloaded(),
        )
        embeddings, truncated = torch.empty(len(texts), dim), Counter()
        progress = logging.tqdm(
            total=len(texts),
            desc="Encoding",
            unit="text",
            delay=0 if show_progress_bar else 5,
            disable=None if show_progress_bar is None else not show_progress_bar,
        )
        with progress, self._eval_mode(self):
            for rows, batch, cut in batches:
                with torch.inference_mode():
                    batch = {name: tensor.to(device) for name, tensor in batch.items()}
                    vectors = self.embed(**batch, packed=packed)[:, :dim].float()  # (rows, dim)
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

    def add_truncated(self, counts: Counter) -> None:
        """Adds what `count_cut` has counted to `truncated`."""
        with self._counting:
            self.truncated.update(counts)

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

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info=False, **kwargs):
        """
        As everywhere in transformers; also loads both tokenizers when the folder has them. A folder with one of the
        baselines gives a model of its class. If there is only a PEFT adapter, its base is loaded and the adapter attached;
        a relative base is looked for beside the adapter first. Weights of the folder's own are always the ones loaded;
        an adapter beside them is attached if it names this folder as its base.

        Raises:
            ValueError: the weights or the adapter's lack tensors of this model, hold others or are damaged, the adapter names no
                base, or the folder is not one of Causal2Vec's.
        """
        attention = kwargs.get("attn_implementation")
        if isinstance(attention, dict) and not set(attention) <= {"", *cls.config_class.sub_configs}:
            raise ValueError(
                f"`attn_implementation` per tower has the keys {sorted(cls.config_class.sub_configs)}, got "
                f"{sorted(attention)}."
            )
        source = pretrained_model_name_or_path
        adapter_kwargs = {**_only_hub(kwargs), **(kwargs.pop("adapter_kwargs", None) or {})}
        adapter_name = kwargs.pop("adapter_name", "default")
        # AutoModel may have gone on from an adapter to its base; then it says where it started.
        adapter = adapter_kwargs.pop("_adapter_model_path", source)
        found = _find_adapter(adapter, adapter_kwargs)
        if found is None:
            return cls._load(source, *model_args, output_loading_info=output_loading_info, **kwargs)

        base, attach = found
        if base != adapter != source:
            base = source
        if base != source:  # whose revision is not the base's
            not_its_own = ("revision", "subfolder", "_commit_hash")
            kwargs = {name: value for name, value in kwargs.items() if name not in not_its_own}
        if base == adapter != source:
            kwargs = {**kwargs, **adapter_kwargs, "config": None}
        try:
            model, info = cls._load(base, *model_args, output_loading_info=True, **kwargs)
        except OSError as error:
            if base == adapter:
                raise
            raise OSError(f"The adapter {adapter} needs its base {base}, which cannot be loaded: {error}") from error
        if attach:
            loaded = model.load_adapter(str(adapter), adapter_name=adapter_name, adapter_kwargs=adapter_kwargs)
            if missing := sorted(loaded.missing_keys):
                raise ValueError(
                    f"The adapter {adapter} left {len(missing)} weights unset, such as {missing[:5]}: its file is of "
                    "another model, or transformers is 5.17, which skips modules trained in full; get 5.18."
                )
            if Path(base).is_dir():  # or its relative path would be taken from wherever the adapter is saved next
                model.peft_config[adapter_name].base_model_name_or_path = str(Path(base).resolve())
        return (model, info) if output_loading_info else model

    @classmethod
    def _load(cls, source, *model_args, output_loading_info: bool = False, **kwargs):
        """`from_pretrained` without adapters: a folder's own weights, or those of a `state_dict`."""
        hub_kwargs = _only_hub(kwargs)
        config = kwargs.get("config")
        if isinstance(config, PreTrainedConfig):
            baseline = config.baseline
        elif source is not None or config is not None:
            baseline = cls._checked_config_dict(source if config is None else config, hub_kwargs).get("baseline")
        else:
            baseline = cls.baseline
        if baseline != cls.baseline and (of_folder := _model_class(baseline)) is not None:
            # AutoModel, too, takes the class of one folder for another whose code is the same.
            return of_folder._load(source, *model_args, output_loading_info=output_loading_info, **kwargs)
        _check_weight_files(source, hub_kwargs)
        try:
            model, info = super().from_pretrained(
                source,
                *model_args,
                output_loading_info=True,
                adapter_kwargs={"subfolder": "none"},  # or transformers would attach an adapter by itself
                **kwargs,
            )
        except Exception as error:
            if type(error).__name__ != "SafetensorError":  # its package is none of ours to import
                raise
            raise ValueError(
                f"The weights of {source} are damaged or cut off: {error}. Get the files again."
            ) from error
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info.get(kind):
                keys = sorted(info[kind])
                raise ValueError(
                    f"{source} does not hold this model's weights: {len(keys)} {kind.replace('_', ' ')}, such as "
                    f"{keys[:5]}. Was the folder saved by Causal2Vec?"
                )
        _check_finite(model, source)
        if source is not None:
            try:
                tokenizers = load_tokenizers(
                    str(source), model.config.encoder_config, model.config.decoder_config, **hub_kwargs
                )
            except OSError as error:
                logger.warning("No tokenizers beside the weights, so `encode` will not work: %s", error)
            else:
                _check_tokenizers(model, *tokenizers)
                model.processor = cls.processor_class.from_config(model.config, *tokenizers)
            try:
                model._instructions_file = Path(cached_file(source, "instructions.json", **hub_kwargs))
            except OSError:
                logger.info("No instructions.json beside the weights.")
        return (model, info) if output_loading_info else model

    @classmethod
    def _checked_config_dict(cls, source: str, hub_kwargs: dict) -> dict:
        """Refuses a folder without our config.json: transformers would go on with a new model of default sizes."""
        values = cls.config_class.get_config_dict(source, **hub_kwargs)[0]
        found = values.get("model_type")
        if found == cls.config_class.model_type:
            return values
        what = "no config.json" if found is None else f"the model_type {found!r}"
        raise ValueError(f"{source} must hold a Causal2Vec model, but has {what}. Was it saved completely?")

    def save_pretrained(
        self,
        save_directory,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ):
        """
        As everywhere in transformers; also saves both tokenizers, the code, what sentence-transformers reads, the
        instructions and, where there is none, a model card. The new files stand beside the old ones until all are
        written, so saving into the folder that the model or its code came from is fine. Of a model with a PEFT adapter,
        the adapter alone is saved.

        Raises:
            ValueError: `save_directory` is a file, or an adapter would be ignored there, beside another model's weights.
        """
        hub_kwargs = {name: kwargs.pop(name) for name in _PUSH_KWARGS if name in kwargs}
        target = Path(save_directory)
        if target.is_file():
            raise ValueError(f"`save_directory` must be a folder, got the file {target}.")
        if kwargs.get("distributed_checkpoint") or not is_main_process:
            return super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
        is_adapter, has_weights = getattr(self, "_hf_peft_config_loaded", False), holds_weights(target)
        with new_files(target) as temporary:
            super().save_pretrained(temporary, state_dict=state_dict and dict(state_dict), **kwargs)  # which empties it
            if is_adapter:
                base = _name_base(temporary / "adapter_config.json", target)
                if has_weights and base != ".":
                    raise ValueError(
                        f"{target} holds the weights of another model than the adapter's base, {base!r}, and would load as "
                        "that model. Save the adapter into a folder of its own."
                    )
                if not has_weights:
                    self.config.save_pretrained(temporary)  # so that AutoModel finds the code here
            if self._processor is not None:
                self.processor_class.from_config(
                    self.config, self._processor.tokenizer, self._processor.encoder_tokenizer
                ).save_pretrained(temporary)
            write_sentence_transformers_files(temporary, self.config)
            if self._instructions_file.is_file():
                shutil.copyfile(self._instructions_file, Path(temporary, "instructions.json"))
            if not (target / "README.md").exists():
                write_plain_card(temporary, self.config)
        refresh_hashes(target)
        if push_to_hub:
            self.push_to_hub(hub_kwargs.pop("repo_id", target.name), state_dict=state_dict, **hub_kwargs, **kwargs)

    push_to_hub = push_to_hub

    @classmethod
    def from_encoder_decoder_pretrained(
        cls,
        encoder: str | None,
        decoder: str,
        *,
        dtype: str | torch.dtype | None = None,
        contextual_token: str = "<|contextual|>",
        encoder_kwargs: dict | None = None,
        decoder_kwargs: dict | None = None,
        **config_kwargs,
    ) -> "Causal2VecModel":
        """
        Joins two pretrained backbones into a new model with their tokenizers. The projector is newly initialised.

        Args:
            encoder, decoder (`str`): Local folders or Hub ids. The decoder may be an embedding model with last-token
                pooling (appendix C.3), also one that was saved as an adapter.
            dtype (`str` or `torch.dtype`, *optional*): Of the whole model. Defaults to the decoder's.
            contextual_token (`str`): The token whose place the Contextual token takes. It is added to the decoder's
                tokenizer, and the embedding matrix grows, unless they have it.
            encoder_kwargs, decoder_kwargs (`dict`, *optional*): For the two calls of `from_pretrained`, such as
                `{"revision": ..., "attn_implementation": ...}`. `{"gguf_file": NAME}` reads model and tokenizer from that
                GGUF file of the folder or Hub id; the model is then a plain one, in float32 unless `dtype` says otherwise.
            config_kwargs: Fields of [`Causal2VecConfig`]. `prompt_head` and `prompt_tail` default to the entry of
                `PROMPT_TEMPLATES` that fits the decoder's chat template.

        Example:

        ```python
        >>> model = Causal2VecModel.from_encoder_decoder_pretrained("intfloat/e5-base-v2", "Qwen/Qwen3-0.6B")
        ```
        """
        unknown = sorted(set(config_kwargs) - {field.name for field in fields(cls.config_class)})
        if unknown:
            raise TypeError(f"{cls.config_class.__name__} has no {unknown}; see its documentation for the fields.")
        encoder_kwargs, decoder_kwargs = dict(encoder_kwargs or {}), dict(decoder_kwargs or {})
        decoder_model = load_backbone(decoder, dtype=dtype or "auto", **decoder_kwargs)
        tokenizer = load_backbone_tokenizer(decoder, decoder_model.config, **decoder_kwargs)
        encoder_tokenizer = encoder_model = None
        if encoder is not None:
            encoder_model = load_backbone(encoder, dtype=decoder_model.dtype, **encoder_kwargs)
            encoder_tokenizer = load_backbone_tokenizer(encoder, encoder_model.config, **encoder_kwargs)

        if contextual_token not in tokenizer.get_vocab():
            tokenizer.add_tokens([contextual_token], special_tokens=True)
        if len(tokenizer) > decoder_model.get_input_embeddings().num_embeddings:
            decoder_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        if "prompt_head" not in config_kwargs and "prompt_tail" not in config_kwargs:
            config_kwargs["prompt_head"], config_kwargs["prompt_tail"] = find_prompt_template(tokenizer.chat_template)
        for name, backbone in (
            ("max_seq_length", decoder_model),
            ("icl_max_seq_length", decoder_model),
            ("encoder_max_seq_length", encoder_model),
        ):
            limit = None if backbone is None else position_limit(backbone)
            default = getattr(cls.config_class, name)
            config_kwargs.setdefault(name, default if limit is None else min(default, limit))

        config = cls.config_class(
            encoder_config=None if encoder is None else encoder_model.config,
            decoder_config=decoder_model.config,
            contextual_token_id=tokenizer.convert_tokens_to_ids(contextual_token),
            dtype=decoder_model.dtype,
            **{"baseline": cls.baseline, **config_kwargs},
        )
        if config.has_encoder and encoder is None:
            raise ValueError(f"{cls.__name__} needs an `encoder`, got None.")
        model = cls(config, encoder=encoder_model, decoder=decoder_model)
        model.processor = cls.processor_class.from_config(config, tokenizer, encoder_tokenizer)
        return model.eval()


_PUSH_KWARGS = ("repo_id", "token", "commit_message", "commit_description", "private", "revision", "create_pr", "tags")
_HUB_KWARGS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")


def _model_class(baseline: str | None) -> type["Causal2VecModel"] | None:
    """The class of models with this `baseline` in their configuration, if there is one."""
    try:
        from .baselines import MODELS
    except ImportError:
        if __package__:
            raise
        from baselines import MODELS
    return MODELS.get(baseline)


def _find_adapter(source, hub_kwargs: dict) -> tuple[str, bool] | None:
    """
    For a folder or Hub id with an adapter_config.json: which model to load, and whether to attach the adapter to it. The
    model is `source` itself if it has weights of its own, and then the adapter is ignored unless `source` is its base.
    """
    if source is None:
        return None
    try:
        file = cached_file(source, "adapter_config.json", **hub_kwargs)
    except OSError:
        return None
    named = json.loads(Path(file).read_text(encoding="utf-8")).get("base_model_name_or_path")
    folder = Path(source, hub_kwargs.get("subfolder", ""))
    base = resolve_base(named, folder)
    if any(_has(source, name, hub_kwargs) for name in ("model.safetensors", "model.safetensors.index.json")):
        attach = base is not None and _is_same(base, folder)
        if not attach:
            logger.warning("%s has weights; the adapter beside them, which was made for %r, is ignored.", source, named)
        return source, attach
    if base is None:
        raise ValueError(
            f"The adapter {source} does not say which model it was made for: `base_model_name_or_path` in its "
            f"adapter_config.json is {named!r}. Write the base's folder or Hub id there."
        )
    return base, True


def _is_same(base: str, folder: Path) -> bool:
    """Whether an adapter's base is the folder or Hub id that the adapter lies in."""
    if folder.is_dir() and Path(base).is_dir():
        return os.path.samefile(base, folder)
    return base == str(folder)


def _name_base(config: Path, folder: Path) -> str | None:
    """Makes a local base in adapter_config.json relative to the folder that the adapter goes to; returns the base."""
    values = json.loads(config.read_text(encoding="utf-8"))
    base = values["base_model_name_or_path"]
    if base and Path(base).is_dir():
        base = values["base_model_name_or_path"] = Path(
            os.path.relpath(Path(base).resolve(), folder.resolve())
        ).as_posix()
        config.write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")
    return base


def _has(source, name: str, hub_kwargs: dict) -> bool:
    """Whether a folder or Hub id has a file."""
    known = ("revision", "token", "cache_dir", "local_files_only")
    path = f"{hub_kwargs.get('subfolder', '')}/{name}".strip("/")
    return has_file(source, path, **{key: value for key, value in hub_kwargs.items() if key in known})


def _check_weight_files(source, hub_kwargs: dict) -> None:
    """Refuses weights in one file beside the index of others: transformers would take the one, however old."""
    if source is None:
        return
    try:
        cached_file(source, "model.safetensors.index.json", **hub_kwargs)
    except OSError:
        return
    if _has(source, "model.safetensors", hub_kwargs):
        raise ValueError(
            f"{source} holds model.safetensors and the shards of model.safetensors.index.json, and does not say which are "
            "the weights. Remove the old ones."
        )


def _check_finite(model: PreTrainedModel, source: str) -> None:
    """Refuses weights that hold NaN or infinity: one sum per tensor says so."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.is_meta:
            if not torch.isfinite(parameter.detach().sum(dtype=torch.float32)):
                raise ValueError(f"The weights of {source} are damaged: {name} holds values that are not finite.")


def _check_tokenizers(model: "Causal2VecModel", tokenizer, encoder_tokenizer) -> None:
    """Refuses tokenizers that belong to another model, as far as their sizes tell."""
    slot = model.config.contextual_token_id
    for tower, found, vocab_size in (
        ("decoder", tokenizer, model.get_input_embeddings().num_embeddings),
        ("encoder", encoder_tokenizer, model.config.get_text_config(encoder=True).vocab_size),
    ):
        if found is not None and len(found) > vocab_size:
            raise ValueError(
                f"The {tower}'s tokenizer has {len(found)} tokens, but the {tower} embeds {vocab_size}: it belongs to "
                "another model. Put the right tokenizer files beside the weights."
            )
    if slot not in tokenizer.added_tokens_decoder:
        raise ValueError(
            f"`contextual_token_id` is {slot}, but that is no added token of the decoder's tokenizer, which has "
            f"{len(tokenizer)}: it belongs to another model. Put the right tokenizer files beside the weights."
        )


def _only_hub(kwargs: dict) -> dict:
    return {name: value for name, value in kwargs.items() if name in _HUB_KWARGS and value is not None}


def load_backbone(folder_or_id: str, auto_class=AutoModel, **kwargs) -> PreTrainedModel:
    """
    `auto_class.from_pretrained`, for weights that are all there. LoRA is merged into the weights that it adapts; a
    `gguf_file` is dequantised, so that the model can be trained and saved.

    Raises:
        ImportError: what transformers needs to read a GGUF file is not installed.
        ValueError: tensors are missing; transformers would initialise them anew.
    """
    if kwargs.get("gguf_file") is not None:
        check_gguf_available()
        kwargs["quantization_config"] = GgufConfig(dequantize=True)  # else weights may stay packed, and nothing saves
    model, info = auto_class.from_pretrained(folder_or_id, output_loading_info=True, **kwargs)
    vars(model.config).pop("_model_name_or_path", None)  # a GGUF file's title
    adapted = [(n, module) for n, module in model.named_modules() if hasattr(module, "base_layer")]
    for name, module in adapted:
        module.merge()
        model.set_submodule(name, module.base_layer)
    if adapted:
        model._hf_peft_config_loaded = False  # or `save_pretrained` would look for adapters
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))  # a pooler is never used
    if missing:
        raise ValueError(
            f"{folder_or_id} lacks {len(missing)} tensors of a {type(model).__name__}, such as {missing[:5]}."
        )
    return model


def load_backbone_tokenizer(folder_or_id: str, config, **kwargs):
    """`AutoTokenizer.from_pretrained` with those of a backbone's `kwargs` that it knows. `config` is the backbone's."""
    gguf = {name: value for name, value in kwargs.items() if name == "gguf_file" and value is not None}
    tokenizer = AutoTokenizer.from_pretrained(folder_or_id, **_only_hub(kwargs), **gguf)
    for name in ("bos_token", "eos_token", "pad_token") if gguf else ():
        # transformers 5.17 reads them wrongly: EOS would be BOS
        if isinstance(token_id := getattr(config, f"{name}_id", None), int):
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(token_id))
    return tokenizer


def check_gguf_available() -> None:
    """Raises ImportError unless transformers can read GGUF files here."""
    if not (is_gguf_available() and is_accelerate_available()):
        raise ImportError("Reading a GGUF file takes two more packages: pip install gguf accelerate")


def dtype_of(config: Causal2VecConfig) -> torch.dtype:
    """The one dtype of a new model, whatever the backbones' own configurations say."""
    dtype = config.dtype or torch.get_default_dtype()
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def find_prompt_template(chat_template: str | None) -> tuple[str, str]:
    """Prompt head and tail of the first entry of `PROMPT_TEMPLATES` whose marker the chat template holds."""
    for name, (marker, prompt_head, prompt_tail) in PROMPT_TEMPLATES.items():
        if name == "none" or (isinstance(chat_template, str) and marker in chat_template):
            return prompt_head, prompt_tail


def position_limit(backbone: PreTrainedModel) -> int | None:
    """How many tokens a backbone has positions for; `None` when nothing says so."""
    for name, module in backbone.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa and its kin start counting behind the padding id.
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return getattr(backbone.config.get_text_config(), "max_position_embeddings", None)


@cache
def half_precision_cost(dtype: torch.dtype) -> float:
    """How many times as long a matrix product takes on this CPU as in float32: measured once, in some milliseconds."""
    seconds = dict.fromkeys((torch.float32, dtype), math.inf)
    with torch.autocast("cpu", enabled=False):
        for _ in range(4):
            for kind in seconds:
                matrix = torch.ones(256, 256, dtype=kind, device="cpu")
                start = time.perf_counter()
                matrix @ matrix
                seconds[kind] = min(seconds[kind], time.perf_counter() - start)
    return seconds[dtype] / seconds[torch.float32]


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies in bfloat16 at least as fast as in float32. Without instructions for it, far slower."""
    return half_precision_cost(torch.bfloat16) <= 1


def warn_of_slow_dtype(model: PreTrainedModel) -> None:
    """Says once what a model on the CPU would gain by float32, where it computes in a slower half precision."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else model.dtype
    if dtype in (torch.bfloat16, torch.float16) and half_precision_cost(dtype) > 1:
        logger.warning_once(
            f"{dtype} is slow on this processor: a matrix product took {half_precision_cost(dtype):.1f} times as long as "
            'in float32. Load the model with dtype="float32", and without autocast.'
        )


def masked_mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean of `(batch, seq_len, hidden_size)` over the positions that a mask `(batch, seq_len)` keeps."""
    mask = mask.to(states.device).unsqueeze(-1)  # (batch, seq_len, 1)
    # Half precision has not even all counts: bfloat16 none between 256 and 258.
    total = (states * mask).sum(1, dtype=torch.promote_types(states.dtype, torch.float32))  # (batch, hidden_size)
    count = mask.sum(1, dtype=torch.long).clamp(min=1)  # (batch, 1)
    return (total / count).to(states.dtype)  # (batch, hidden_size)


def last_true(mask: torch.Tensor) -> torch.Tensor:
    """The last position of each row that a mask `(batch, seq_len)` keeps: `(batch,)`."""
    return mask.shape[-1] - 1 - mask.flip(-1).int().argmax(-1)


def interleave(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Two tensors `(..., size)` as one, number by number: `(..., 2 * size)`."""
    return torch.stack([first, second], dim=-1).flatten(-2)


def check_truncate_dim(dim: int, embedding_size: int) -> None:
    """Raises ValueError unless an embedding of `embedding_size` numbers can be cut to `dim`."""
    if not isinstance(dim, int) or isinstance(dim, bool) or not 0 < dim <= embedding_size:
        raise ValueError(f"`truncate_dim` must be an integer between 1 and {embedding_size}, got {dim!r}.")


Causal2VecConfig.register_for_auto_class()
Causal2VecModel.register_for_auto_class("AutoModel")

__all__ = ["Causal2VecModel", "Causal2VecModelOutput", "Causal2VecPreTrainedModel"]
