"""What a Causal2Vec model asks of vLLM's configuration."""

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from . import MODE


SUPPORTED = {"baseline": None, "bidirectional": False, "pooling": "concat", "num_contextual_tokens": 1}


class Causal2VecSettings(VerifyAndUpdateConfig):
    @staticmethod
    def verify_and_update_model_config(model_config) -> None:
        """
        Raises:
            ValueError: the model is one of the paper's ablations or baselines, or it is not run as a pooling model.
        """
        config = model_config.hf_config
        for name, expected in SUPPORTED.items():
            if (found := getattr(config, name)) != expected:
                raise ValueError(f"In vLLM `{name}` must be {expected!r}, got {found!r}. Use `model.encode` instead.")
        if model_config.pooler_config is None:
            raise ValueError('Causal2Vec gives embeddings alone: use runner="pooling".')
        model_config.tokenizer_mode = MODE
        model_config.enable_prompt_embeds = True
        # With it vLLM reads every row whole; in parts, or partly from its cache, the state of the slot would be missing.
        model_config.pooler_config.seq_pooling_type = "CLS"
        config.is_matryoshka = True  # any prefix of an embedding is half of each state
        # Cohere's `input_type`: vLLM would put an instruction into the text, where the encoder reads it too.
        config.task_instructions = {"document": ""}

    @staticmethod
    def verify_and_update_config(vllm_config) -> None:
        """
        Raises:
            ValueError: rows may be read in part.
        """
        if vllm_config.scheduler_config.enable_chunked_prefill or vllm_config.cache_config.enable_prefix_caching:
            raise ValueError("Causal2Vec's rows must be read whole: leave chunked prefill and prefix caching off.")
