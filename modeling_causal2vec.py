"""Causal2Vec: text embeddings from a decoder-only LLM whose causal attention stays as it is (Lin et al., ACL 2026).

    encoder(text) -> mean over tokens -> projector -> Contextual token           (section 3.1)
    decoder([instruction] [Contextual token] [text] [EOS]) -> last hidden states  (section 3.2)
    embedding = concat(state of the Contextual token, state of EOS)               (section 3.3)

Every text token comes after the Contextual token and so sees the whole text. Invariant: both backbones are used as
`AutoModel` gives them; nothing here depends on which they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging


try:
    from .configuration_causal2vec import PROMPT_TEMPLATES, Causal2VecConfig
    from .tokenization_utils import Causal2VecProcessor, broadcast_instruction, check_texts, load_tokenizers
except ImportError:  # imported from a clone, where these files are top-level modules
    from configuration_causal2vec import PROMPT_TEMPLATES, Causal2VecConfig
    from tokenization_utils import Causal2VecProcessor, broadcast_instruction, check_texts, load_tokenizers


logger = logging.get_logger(__name__)


@dataclass
class Causal2VecModelOutput(ModelOutput):
    """
    Args:
        embeddings (`torch.FloatTensor` of shape `(batch, 2 * hidden_size)`):
            States of the Contextual token and of EOS, concatenated, not normalised.
        last_hidden_state (`torch.FloatTensor` of shape `(batch, seq_len, hidden_size)`, *optional*):
            The decoder's, after its final norm; with `output_last_hidden_state=True`.
        past_key_values (`Cache`, *optional*):
            The decoder's keys and values; with `use_cache=True`.
    """

    embeddings: torch.FloatTensor | None = None
    last_hidden_state: torch.FloatTensor | None = None
    past_key_values: Cache | None = None


class Causal2VecProjector(nn.Module):
    """Lifts the encoder's mean into the decoder's word-embedding space: W2 GELU(W1 c), as in LLaVA-1.5."""

    def __init__(self, config: Causal2VecConfig):
        super().__init__()
        encoder_size = config.encoder_config.get_text_config().hidden_size
        self.linear_1 = nn.Linear(encoder_size, config.projector_hidden_size, bias=config.projector_bias)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(config.projector_hidden_size, config.hidden_size, bias=config.projector_bias)

    def forward(self, contextual_vector: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(contextual_vector)))  # (batch, hidden_size)


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
        ValueError: `encoder_max_seq_length` is more than the encoder has positions for.
    """

    def __init__(
        self,
        config: Causal2VecConfig,
        encoder: PreTrainedModel | None = None,
        decoder: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        self.encoder = AutoModel.from_config(config.encoder_config) if encoder is None else encoder
        self.projector = Causal2VecProjector(config)
        self.decoder = AutoModel.from_config(config.decoder_config) if decoder is None else decoder
        if getattr(self.encoder, "pooler", None) is not None:
            self.encoder.pooler = None  # never used; its parameters would never get a gradient
        self.encoder.config, self.decoder.config = config.encoder_config, config.decoder_config

        limit = position_limit(self.encoder)
        if limit is not None and config.encoder_max_seq_length > limit:
            raise ValueError(
                f"`encoder_max_seq_length` must be at most {limit}, the positions of the {self.encoder.config.model_type}"
                f" encoder, got {config.encoder_max_seq_length}."
            )
        self._processor: Causal2VecProcessor | None = None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.decoder.set_input_embeddings(value)

    def get_contextual_token(self, encoder_ids: torch.Tensor, encoder_attention_mask: torch.Tensor) -> torch.Tensor:
        """The projected mean of the encoder's states over real tokens (section 3.1): `(batch, hidden_size)`."""
        states = self.encoder(input_ids=encoder_ids, attention_mask=encoder_attention_mask).last_hidden_state
        mask = encoder_attention_mask.to(states).unsqueeze(-1)  # (batch, encoder_seq_len, 1)
        contextual_vector = (states * mask).sum(1) / mask.sum(1).clamp(min=1)  # (batch, encoder_hidden_size)
        return self.projector(contextual_vector.to(self.projector.linear_1.weight.device))

    def find_slots(self, input_ids: torch.Tensor) -> torch.Tensor:
        """
        Which position of each row the Contextual token takes: a mask of shape `(batch, seq_len)`.

        Raises:
            ValueError: a row has no slot, or several.
        """
        is_slot = input_ids == self.config.contextual_token_id  # (batch, seq_len)
        counts = is_slot.sum(-1)  # (batch,)
        if not torch.compiler.is_compiling() and not (counts == 1).all():
            row = int((counts != 1).nonzero()[0])
            raise ValueError(
                f"Every row of `input_ids` must hold the contextual slot (id {self.config.contextual_token_id}) exactly "
                f"once; row {row} holds it {int(counts[row])} times. Build the inputs with `model.processor`."
            )
        return is_slot

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        encoder_ids: torch.LongTensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        contextual_token: torch.FloatTensor | None = None,
        use_cache: bool = False,
        output_last_hidden_state: bool = False,
        **kwargs,
    ) -> Causal2VecModelOutput:
        """
        Args:
            input_ids (`(batch, seq_len)`): Rows for the decoder, with exactly one contextual slot each.
            attention_mask (`(batch, past_len + seq_len)`, *optional*): 1 for real tokens; padding on either side.
            encoder_ids (`(batch, encoder_seq_len)`): The texts for the encoder.
            encoder_attention_mask (`(batch, encoder_seq_len)`, *optional*): 1 for real tokens.
            past_key_values (`Cache`, *optional*): Keys and values of what stands before `input_ids`.
            contextual_token (`(batch, hidden_size)`, *optional*): `get_contextual_token`'s result, computed before;
                `encoder_ids` are then not read.
            use_cache (`bool`): Return the decoder's keys and values.
            output_last_hidden_state (`bool`): Return the decoder's last hidden state.
            kwargs: Passed on to the decoder.

        Raises:
            ValueError: a row has no slot or several, or neither `encoder_ids` nor `contextual_token` are given.
        """
        is_slot = self.find_slots(input_ids)  # (batch, seq_len)
        if contextual_token is None:
            if encoder_ids is None:
                raise ValueError("Pass `encoder_ids` (see `model.processor`) or a `contextual_token`.")
            if encoder_attention_mask is None:
                encoder_attention_mask = torch.ones_like(encoder_ids)
            contextual_token = self.get_contextual_token(encoder_ids, encoder_attention_mask)  # (batch, hidden_size)

        inputs_embeds = self.get_input_embeddings()(input_ids)  # (batch, seq_len, hidden_size)
        contextual_token = contextual_token.to(inputs_embeds).unsqueeze(1)  # (batch, 1, hidden_size)
        inputs_embeds = torch.where(is_slot.unsqueeze(-1).to(inputs_embeds.device), contextual_token, inputs_embeds)

        seq_len = input_ids.shape[1]
        if attention_mask is None:
            past_len = 0 if past_key_values is None else past_key_values.get_seq_length()
            attention_mask = input_ids.new_ones(input_ids.shape[0], past_len + seq_len)
        position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -seq_len:]  # (batch, seq_len)
        outputs = self.decoder(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state  # (batch, seq_len, hidden_size)

        rows = torch.arange(input_ids.shape[0], device=hidden.device)  # (batch,)
        slots = is_slot.int().argmax(-1).to(hidden.device)  # (batch,)
        from_the_end = attention_mask[:, -seq_len:].flip(-1).int().argmax(-1).to(hidden.device)  # (batch,)
        embeddings = torch.cat([hidden[rows, slots], hidden[rows, seq_len - 1 - from_the_end]], dim=-1)
        return Causal2VecModelOutput(
            embeddings=embeddings,  # (batch, 2 * hidden_size)
            last_hidden_state=hidden if output_last_hidden_state else None,
            past_key_values=outputs.past_key_values if use_cache else None,
        )

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
        max_length: int | None = None,
        normalize_embeddings: bool = True,
        truncate_dim: int | None = None,
        convert_to_tensor: bool = False,
        show_progress_bar: bool | None = None,
    ):
        """
        Embeds texts.

        Args:
            texts (`str` or list of `str`): What to embed.
            instruction (`str` or list of `str`, *optional*): The task, for all texts or one per text. Queries carry one,
                passages none; both sides of a symmetric task the same.
            examples (list of `dict`, *optional*): In-context examples, each `{"query": ..., "response": ...}`.
            batch_size (`int`, defaults to 32): Texts per forward pass. Never changes a vector.
            max_length (`int`, *optional*): Limit of the decoder's sequence in tokens; see [`Causal2VecConfig`].
            normalize_embeddings (`bool`, defaults to `True`): Scale vectors to length 1, so that a dot product is the
                cosine.
            truncate_dim (`int`, *optional*): Keep this many numbers, the first half of them from each of the two states.
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
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"`batch_size` must be a positive integer, got {batch_size!r}.")
        dim = 2 * self.config.hidden_size if truncate_dim is None else truncate_dim
        self._check_truncate_dim(dim)
        processor, device = self.processor, self.get_input_embeddings().weight.device

        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))  # longest first: too large a batch shows at once
        embeddings = torch.empty(len(texts), dim)
        was_training = self.training
        self.eval()
        try:
            for start in logging.tqdm(
                range(0, len(texts), batch_size),
                desc="Encoding",
                unit="batch",
                delay=0 if show_progress_bar else 5,
                disable=None if show_progress_bar is None else not show_progress_bar,
            ):
                rows = order[start : start + batch_size]
                batch = processor(
                    [texts[i] for i in rows], [instructions[i] for i in rows], examples=examples, max_length=max_length
                )
                with torch.inference_mode():
                    vectors = self(**batch.to(device)).embeddings.float()  # (rows, 2 * hidden_size)
                    vectors = truncate_embeddings(vectors, dim)  # (rows, dim)
                    if normalize_embeddings:
                        vectors = nn.functional.normalize(vectors, dim=-1)
                embeddings[rows] = vectors.cpu()
        finally:
            self.train(was_training)

        embeddings = embeddings[0] if single else embeddings
        return embeddings if convert_to_tensor else embeddings.numpy()

    def encode_query(self, texts: str | Sequence[str], *, instruction: str | Sequence[str | None] | None = None, **kwargs):
        """`encode` with the configuration's `query_instruction`, unless another is given."""
        return self.encode(texts, instruction=self.config.query_instruction if instruction is None else instruction, **kwargs)

    def encode_document(self, texts: str | Sequence[str], **kwargs):
        """`encode` without an instruction: documents carry none."""
        return self.encode(texts, **kwargs)

    def _check_truncate_dim(self, dim: int) -> None:
        full = 2 * self.config.hidden_size
        if not isinstance(dim, int) or dim % 2 or not 0 < dim <= full:
            raise ValueError(f"`truncate_dim` must be an even integer between 2 and {full}, got {dim!r}.")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info=False, **kwargs):
        """
        As everywhere in transformers; also loads both tokenizers when the folder has them.

        Raises:
            ValueError: the weights lack tensors of this model, or hold others.
        """
        hub_kwargs = {name: kwargs[name] for name in _HUB_KWARGS if kwargs.get(name) is not None}
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        for kind in ("missing_keys", "unexpected_keys"):
            if info.get(kind):
                keys = sorted(info[kind])
                raise ValueError(
                    f"{pretrained_model_name_or_path} does not hold this model's weights: {len(keys)} "
                    f"{kind.replace('_', ' ')}, such as {keys[:5]}. Was the folder saved by Causal2Vec?"
                )
        if pretrained_model_name_or_path is not None:
            try:
                tokenizers = load_tokenizers(
                    str(pretrained_model_name_or_path), model.config.encoder_config, model.config.decoder_config, **hub_kwargs
                )
            except OSError as error:
                logger.warning("No tokenizers beside the weights, so `encode` will not work: %s", error)
            else:
                model.processor = Causal2VecProcessor.from_config(model.config, *tokenizers)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, **kwargs):
        """As everywhere in transformers; also saves both tokenizers."""
        super().save_pretrained(save_directory, **kwargs)
        if self._processor is not None:
            Causal2VecProcessor.from_config(
                self.config, self._processor.tokenizer, self._processor.encoder_tokenizer
            ).save_pretrained(save_directory)

    @classmethod
    def from_encoder_decoder_pretrained(
        cls,
        encoder: str,
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
            encoder, decoder (`str`): Local folders or Hub ids.
            dtype (`str` or `torch.dtype`, *optional*): Of the whole model. Defaults to the decoder's.
            contextual_token (`str`): The token whose place the Contextual token takes. It is added to the decoder's
                tokenizer, and the embedding matrix grows, unless they have it.
            encoder_kwargs, decoder_kwargs (`dict`, *optional*): For the two calls of `from_pretrained`, such as
                `{"revision": ..., "attn_implementation": ...}`.
            config_kwargs: Fields of [`Causal2VecConfig`]. `prompt_head` and `prompt_tail` default to the entry of
                `PROMPT_TEMPLATES` that fits the decoder's chat template.

        Example:

        ```python
        >>> model = Causal2VecModel.from_encoder_decoder_pretrained("intfloat/e5-base-v2", "Qwen/Qwen3-0.6B")
        ```
        """
        encoder_kwargs, decoder_kwargs = dict(encoder_kwargs or {}), dict(decoder_kwargs or {})
        tokenizer = AutoTokenizer.from_pretrained(decoder, **_only_hub(decoder_kwargs))
        encoder_tokenizer = AutoTokenizer.from_pretrained(encoder, **_only_hub(encoder_kwargs))
        decoder_model = AutoModel.from_pretrained(decoder, dtype=dtype or "auto", **decoder_kwargs)
        encoder_model = AutoModel.from_pretrained(encoder, dtype=decoder_model.dtype, **encoder_kwargs)

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
            limit = position_limit(backbone)
            default = getattr(cls.config_class, name)
            config_kwargs.setdefault(name, default if limit is None else min(default, limit))

        config = cls.config_class(
            encoder_config=encoder_model.config,
            decoder_config=decoder_model.config,
            contextual_token_id=tokenizer.convert_tokens_to_ids(contextual_token),
            dtype=decoder_model.dtype,
            attn_implementation={  # a composite configuration would reset what the backbones have chosen
                "encoder_config": encoder_model.config._attn_implementation,
                "decoder_config": decoder_model.config._attn_implementation,
            },
            **config_kwargs,
        )
        model = cls(config, encoder=encoder_model, decoder=decoder_model)
        model.projector.to(decoder_model.dtype)
        model.processor = Causal2VecProcessor.from_config(config, tokenizer, encoder_tokenizer)
        return model.eval()


_HUB_KWARGS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


def _only_hub(kwargs: dict) -> dict:
    return {name: value for name, value in kwargs.items() if name in _HUB_KWARGS}


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


def truncate_embeddings(embeddings: torch.Tensor, dim: int) -> torch.Tensor:
    """Keeps the first `dim / 2` numbers of each of the two states: `(..., 2 * hidden_size)` -> `(..., dim)`."""
    contextual, eos = embeddings.chunk(2, dim=-1)  # (..., hidden_size) each
    return torch.cat([contextual[..., : dim // 2], eos[..., : dim // 2]], dim=-1)


Causal2VecConfig.register_for_auto_class()
Causal2VecModel.register_for_auto_class("AutoModel")

__all__ = ["Causal2VecModel", "Causal2VecModelOutput", "Causal2VecPreTrainedModel"]
