"""Causal2Vec in vLLM: the renderer makes the Contextual token, vLLM runs the decoder, the pooler joins the two states."""

ARCHITECTURE = "Causal2VecModel"
MODE = "causal2vec"  # of tokenizer and renderer


def register() -> None:
    """Called by vLLM in each of its processes, once or more often."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    from .settings import Causal2VecSettings

    if MODE in RENDERER_REGISTRY.renderers:
        return
    ModelRegistry.register_model(ARCHITECTURE, "causal2vec_vllm.model:Causal2VecForEmbedding")
    MODELS_CONFIG_MAP[ARCHITECTURE] = Causal2VecSettings
    TokenizerRegistry.register(MODE, "vllm.tokenizers.hf", "CachedHfTokenizer")
    RENDERER_REGISTRY.register(MODE, "causal2vec_vllm.renderer", "Causal2VecRenderer")
