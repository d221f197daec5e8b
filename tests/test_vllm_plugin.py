"""What the vLLM plugin gives the decoder, without vLLM; `python -m serving.check vllm` compares it in vLLM. Some 5 seconds."""

import pytest
import torch

from serving.vllm_plugin.causal2vec_vllm.front import Front


TEXTS = ["a text", "", "Grüße <s>", "word " * 40]


@pytest.fixture(scope="module")
def front(saved_dir):
    return Front(str(saved_dir))


@pytest.mark.parametrize("instruction", [None, "Find", ["Find", None, "", "Find more"]])
def test_prompts_are_what_the_decoder_reads(front, tiny_model, instruction):
    expected = tiny_model.encode(TEXTS, instruction=instruction, truncation="silent", convert_to_tensor=True)
    decoder, slot_id = tiny_model.decoder, tiny_model.config.contextual_token_id
    for prompt, vector in zip(front.prompts(TEXTS, instruction), expected):
        ids = torch.tensor(prompt["prompt_token_ids"])  # (seq_len,)
        is_token = torch.tensor(prompt["prompt_is_token_ids"])  # (seq_len,)
        assert is_token.tolist() == (ids != slot_id).tolist()
        words = decoder.get_input_embeddings()(ids)  # (seq_len, hidden_size)
        embeds = torch.where(is_token[:, None], words, prompt["prompt_embeds"])
        with torch.inference_mode():
            states = decoder(inputs_embeds=embeds[None]).last_hidden_state[0]  # (seq_len, hidden_size)
        joined = torch.stack([states[ids == slot_id][0], states[-1]], dim=-1).flatten()
        torch.testing.assert_close(torch.nn.functional.normalize(joined, dim=0), vector, atol=1e-5, rtol=0)


def test_limits(front):
    (prompt,) = front.prompts(["word " * 40], max_length=9)
    assert len(prompt["prompt_token_ids"]) == len(prompt["prompt_embeds"]) == 9
    with pytest.raises(ValueError, match="position 1 is too long for the decoder"):
        front.prompts(["a", "word " * 40], max_length=9, truncation=False)
