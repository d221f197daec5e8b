"""The methods that the paper compares Causal2Vec with, on the same backbones, rows, training and evaluation.

    last_token         [instruction] [text] [EOS], embedded by EOS's state; no encoder                   (Table 2)
    embedding_concat   that, concatenated with the encoder's mean, which the decoder never sees          (Table 4)
    token_prepending   [instruction] [slot] [text] [EOS], embedded by EOS's state; from the second layer
                       on, the slot holds the state that the layer before gave EOS; no encoder           (Table 6)

A configuration's `baseline` chooses one of these models, and `from_pretrained` of any of them loads the one that a folder
holds. Invariant: what is no part of a baseline's vectors has no weights in it.
"""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel


if TYPE_CHECKING:  # never imported here; named so that a loader that follows only one file's imports carries all along
    from .packing import Packing  # noqa: F401
    from .prefix_cache import PrefixCache  # noqa: F401
    from .saving_utils import SHIPPED_CODE  # noqa: F401
    from .sentence_causal2vec import Causal2VecSTModule  # noqa: F401
try:
    from .configuration_causal2vec import Causal2VecConfig
    from .modeling_causal2vec import Causal2VecModel, Causal2VecModelOutput, interleave, last_true
    from .tokenization_utils import Causal2VecProcessor
except ImportError:
    if __package__:  # a real one: a file is missing, or a package too old
        raise
    # Imported from a clone, where these files are top-level modules.
    from configuration_causal2vec import Causal2VecConfig
    from modeling_causal2vec import Causal2VecModel, Causal2VecModelOutput, interleave, last_true
    from tokenization_utils import Causal2VecProcessor


class DecoderProcessor(Causal2VecProcessor):
    """[`Causal2VecProcessor`] without the encoder's tokenizer: `input_ids` and `attention_mask` alone."""

    def __init__(
        self,
        tokenizer,
        contextual_token_id: int = 0,
        prompt_head: str = "",
        prompt_tail: str = "",
        text_prefix: str = "",
        max_seq_length: int = 512,
        icl_max_seq_length: int = 2048,
        encoder_max_seq_length: int = 512,
        contextual_position: str = "after_instruction",
        num_slots: int = 0,
    ):
        super().__init__(
            tokenizer,
            None,
            contextual_token_id,
            prompt_head,
            prompt_tail,
            text_prefix,
            max_seq_length,
            icl_max_seq_length,
            encoder_max_seq_length,
            contextual_position,
            num_slots,
        )


class LastTokenModel(Causal2VecModel):
    """The decoder alone, with last-token pooling: what most causal embedding models are."""

    baseline = "last_token"
    processor_class = DecoderProcessor

    def add_encoder(self, encoder: PreTrainedModel | None) -> None:
        self.encoder = self.projector = None

    def pool(self, contextual_state, eos_state: torch.Tensor, contextual_token) -> torch.Tensor:
        return eos_state  # (batch, hidden_size)


class EmbeddingConcatModel(Causal2VecModel):
    """
    Two embedding models side by side (ECat): EOS's state and the encoder's mean, `hidden_size + encoder_hidden_size`
    numbers, interleaved where they are of one size. They are joined as they are, so the longer of the two counts more.
    """

    baseline = "embedding_concat"

    def add_encoder(self, encoder: PreTrainedModel | None) -> None:
        super().add_encoder(encoder)
        self.projector = None

    def get_contextual_token(self, encoder_ids: torch.Tensor, encoder_attention_mask: torch.Tensor) -> torch.Tensor:
        """The mean of the encoder's states `(batch, encoder_hidden_size)`. There is no slot for it to go to."""
        return self.get_encoder_embedding(encoder_ids, encoder_attention_mask)

    def pool(self, contextual_state, eos_state: torch.Tensor, contextual_token: torch.Tensor) -> torch.Tensor:
        contextual_token = contextual_token.to(eos_state)  # (batch, encoder_hidden_size)
        if contextual_token.shape == eos_state.shape:
            return interleave(eos_state, contextual_token)
        return torch.cat([eos_state, contextual_token], dim=-1)


@dataclass
class Prepending:
    """
    Which states [`prepend`] moves: in row i the one at `ends[i]` to `slots[i]`. `layers_seen` counts the layers that were
    told.
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


class TokenPrependingModel(LastTokenModel):
    """
    Token prepending (TP; Fu et al., ACL 2025) at all layers: text tokens see, one layer late, what EOS has seen. Into the
    first layer goes the slot's own word embedding.

    Raises:
        ValueError: the decoder's layers cannot be found, or do not get what its `forward` is given.
    """

    baseline = "token_prepending"

    def __init__(self, config: Causal2VecConfig, encoder=None, decoder: PreTrainedModel | None = None):
        super().__init__(config, encoder, decoder)
        self.num_layers = self.decoder.config.get_text_config().num_hidden_layers
        lists = [module for module in self.decoder.modules() if isinstance(module, nn.ModuleList)]
        layers = next((module for module in lists if len(module) == self.num_layers), None)
        if layers is None:
            raise ValueError(
                f"{type(self.decoder).__name__} has no list of {self.num_layers} layers to prepend between."
            )
        for i, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(prepend, i == 0), with_kwargs=True)

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        share_heads: bool = False,
        **kwargs,
    ) -> Causal2VecModelOutput:
        """See [`Causal2VecModel.forward`]."""
        if share_heads:  # comes back here without
            return super().forward(input_ids, attention_mask, share_heads=True, **kwargs)
        seq_len = input_ids.shape[1]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -seq_len:]
        prepending = Prepending(last_true(self.find_slots(input_ids)), last_true(mask))
        output = super().forward(input_ids, attention_mask, prepending=prepending, **kwargs)
        if prepending.layers_seen != self.num_layers:
            raise ValueError(
                f"{type(self.decoder).__name__} told {prepending.layers_seen} of its {self.num_layers} layers what to "
                "prepend: token prepending is not possible with it."
            )
        return output

    def embed(self, *args, packed: bool | None = None, **kwargs) -> torch.Tensor:
        """See [`Causal2VecModel.embed`]. Raises ValueError for `packed`: places are those of rows by themselves."""
        if packed:
            raise ValueError("`packed` is not possible with token prepending, which moves states within rows.")
        return super().embed(*args, packed=False, **kwargs)


MODELS = {
    model.baseline: model for model in (Causal2VecModel, LastTokenModel, EmbeddingConcatModel, TokenPrependingModel)
}


DecoderProcessor.register_for_auto_class()

__all__ = ["DecoderProcessor", "EmbeddingConcatModel", "LastTokenModel", "TokenPrependingModel"]
