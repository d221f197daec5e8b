"""The place in vLLM where texts become tokens: here they become tokens and a Contextual token."""

from vllm.renderers.base import BaseRenderer
from vllm.renderers.chat_utils import ChatTemplateResolutionError

from .front import Front


class Causal2VecRenderer(BaseRenderer):
    """
    Takes texts, or prompts that [`Front`] has made. An instruction comes as `mm_processor_kwargs={"instruction": ...}`.
    As everywhere in vLLM, a text that is too long is refused unless `truncate_prompt_tokens` is given.
    """

    def __init__(self, config, tokenizer):
        super().__init__(config, tokenizer)
        self.front = Front(self.model_config.model, self.model_config.revision)

    def render_cmpl(self, prompts, tok_params=None, *, prompt_extras=None, skip_mm_cache=False):
        tok_params = tok_params or self.default_cmpl_tok_params
        extras = dict(prompt_extras or {})
        shared = extras.pop("mm_processor_kwargs", None)
        prompts = [self._render_text(prompt, shared, tok_params) for prompt in prompts]
        return super().render_cmpl(prompts, tok_params, prompt_extras=extras, skip_mm_cache=skip_mm_cache)

    def _render_text(self, prompt, shared: dict | None, tok_params) -> dict:
        if isinstance(prompt, dict) and "prompt_is_token_ids" in prompt:
            return prompt
        if not isinstance(prompt, dict) or "prompt" not in prompt or "prompt_token_ids" in prompt:
            raise ValueError("Causal2Vec takes texts: its encoder cannot read the decoder's tokens or embeddings.")
        settings = {**(shared or {}), **(prompt.get("mm_processor_kwargs") or {})}
        if unknown := set(settings) - {"instruction"}:
            raise ValueError(f"`mm_processor_kwargs` may hold 'instruction' alone, got {sorted(unknown)}.")
        limit = min(self.model_config.max_model_len, self.front.model.config.max_seq_length)
        wanted = tok_params.truncate_prompt_tokens
        if wanted is not None and wanted >= 0:
            limit = min(limit, wanted)
        return self.front.prompts([prompt["prompt"]], settings.get("instruction"), limit, wanted is not None)[0]

    def render_messages(self, messages, params):
        raise ChatTemplateResolutionError("Causal2Vec takes texts, no messages.")
