"""The decoder, run by vLLM, and the pooler, which joins the states of the Contextual token and of EOS."""

from collections.abc import Iterable

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.pooler import DispatchPooler, PoolingParamsUpdate
from vllm.model_executor.layers.pooler.activations import PoolerNormalize
from vllm.model_executor.layers.pooler.seqwise import EmbeddingPoolerHead, SequencePooler, SequencePoolingMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.interfaces_base import VllmModelForPooling, default_pooling_type
from vllm.model_executor.models.utils import StageMissingLayer, init_vllm_registered_model, no_init_weights


class TwoStates(SequencePoolingMethod):
    """The states of the Contextual token and of EOS, interleaved: `(requests, 2 * hidden_size)` (section 3.3)."""

    def __init__(self, contextual_token_id: int):
        super().__init__()
        self.contextual_token_id = contextual_token_id

    def get_supported_tasks(self):
        return {"embed"}

    def get_pooling_updates(self, task) -> PoolingParamsUpdate:
        return PoolingParamsUpdate(requires_token_ids=True)

    def forward(self, hidden_states: torch.Tensor, pooling_metadata) -> torch.Tensor:
        cursor = pooling_metadata.get_pooling_cursor()
        if cursor.is_partial_prefill():
            raise RuntimeError("A row was not read whole, so the state of its Contextual token may be missing.")
        ids = pooling_metadata.prompt_token_ids_cpu  # (requests, longest); vLLM's warm-up has no slot in it
        slots = (ids == self.contextual_token_id).int().argmax(-1).to(hidden_states.device)
        contextual = hidden_states[cursor.first_token_indices_gpu + slots]  # (requests, hidden_size)
        return torch.stack([contextual, hidden_states[cursor.last_token_indices_gpu]], dim=-1).flatten(-2)


@default_pooling_type(seq_pooling_type="CLS")
class Causal2VecForEmbedding(nn.Module, VllmModelForPooling):
    is_pooling_model = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        decoder = config.decoder_config
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[decoder.model_type]  # the backbone was saved without its head
        unused = (LogitsProcessor, ParallelLMHead)
        with no_init_weights(self, lambda module: StageMissingLayer("output", module), targets=unused):
            self.decoder = init_vllm_registered_model(
                vllm_config, prefix=prefix, hf_config=decoder, architectures=[architecture]
            )
        head = EmbeddingPoolerHead(head_dtype=vllm_config.model_config.head_dtype, activation=PoolerNormalize())
        self.pooler = DispatchPooler({"embed": SequencePooler(TwoStates(config.contextual_token_id), head)})

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.decoder.embed_input_ids(input_ids)

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
        return self.decoder(input_ids, positions, intermediate_tensors, inputs_embeds)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        names = (
            ("model." + name.removeprefix("decoder."), tensor)
            for name, tensor in weights
            if name.startswith("decoder.")
        )
        return {f"decoder.{name}" for name in self.decoder.load_weights(names)}
