"""From texts to what vLLM's decoder reads: token ids, and the Contextual token as the embedding of one of them."""

from collections.abc import Sequence

import torch
from transformers import AutoModel


class Front:
    """
    The encoder and the projector, on the CPU in float32.

    Args:
        model (`str`): Folder or Hub id. Its code is run.
        revision (`str`, *optional*): Of a Hub id.
    """

    def __init__(self, model: str, revision: str | None = None):
        self.model = AutoModel.from_pretrained(
            model, revision=revision or "main", dtype=torch.float32, trust_remote_code=True
        ).eval()
        self.hidden_size = self.model.config.hidden_size
        self.model.decoder = None  # vLLM has it

    def prompts(
        self,
        texts: Sequence[str],
        instruction: str | Sequence[str | None] | None = None,
        max_length: int | None = None,
        truncation: bool = True,
    ) -> list[dict]:
        """
        For `LLM.embed`; arguments and errors are those of `model.processor`. All texts are one batch of the encoder.
        """
        processor = self.model.processor
        rows = processor.rows(texts, instruction, max_length=max_length)
        if not truncation:
            processor.refuse_cut((row.cut for row in rows), processor.limits(max_length))
        batch = processor.pad(rows)
        with torch.inference_mode():
            vectors = self.model.get_encoder_embedding(
                batch["encoder_ids"], batch["encoder_attention_mask"], packed=True
            )
            tokens = self.model.projector(vectors)  # (texts, hidden_size)
        return [self._prompt(row, token) for row, token in zip(rows, tokens)]

    def _prompt(self, row, token: torch.Tensor) -> dict:
        ids = row.prefix_ids + row.ids
        slot = len(row.prefix_ids)
        embeds = torch.zeros(len(ids), self.hidden_size)
        embeds[slot] = token
        return {
            "prompt_token_ids": ids,
            "prompt_is_token_ids": [place != slot for place in range(len(ids))],
            "prompt_embeds": embeds,
        }
