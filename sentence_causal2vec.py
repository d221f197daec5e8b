"""Causal2Vec as a sentence-transformers module, and so for everything built on sentence-transformers.

    SentenceTransformer("path or id", trust_remote_code=True).encode(texts, prompt="an instruction")

A prompt is an instruction: the processor puts it before the Contextual token, and the encoder never reads it.
Invariants: vectors equal those of `Causal2VecModel.encode`, with or without a prompt (truncated ones have length 1 only
with `normalize_embeddings=True`, as in all of sentence-transformers); no feature name but `input_ids` ends in
`_input_ids`, which sentence-transformers' trainer would take for another sentence. This is the only shipped file that
imports sentence_transformers, and nothing imports this file.
"""

from collections import Counter
from pathlib import Path

import torch
from torch import nn
from transformers.utils import logging


try:
    from sentence_transformers.base.modules import InputModule
except ImportError as error:
    raise ImportError("This needs sentence-transformers 6 or newer: pip install -U sentence-transformers") from error

try:
    from .loading_utils import position_limit
    from .modeling_causal2vec import Causal2VecModel
    from .tokenization_utils import Causal2VecProcessor, count_cut, describe_cut
except ImportError:
    if __package__:  # a real one: a file is missing, or a package too old
        raise
    # Imported from a clone, where these files are top-level modules.
    from loading_utils import position_limit
    from modeling_causal2vec import Causal2VecModel
    from tokenization_utils import Causal2VecProcessor, count_cut, describe_cut


logger = logging.get_logger(__name__)


class Causal2VecSTModule(InputModule):
    """
    Args:
        model ([`Causal2VecModel`]): The model, with its processor.
        normalize (`bool`, defaults to `True`): Whether vectors are scaled to length 1, as by `Causal2VecModel.encode`.
    """

    config_file_name = "sentence_causal2vec_config.json"
    config_keys = ["normalize"]
    save_in_root = True
    forward_kwargs = {"examples"}  # encode(texts, examples=[{"query": ..., "response": ...}])

    def __init__(self, model: Causal2VecModel, normalize: bool = True):
        super().__init__()
        self.model = model
        self.normalize = normalize

    def preprocess(self, inputs, prompt: str | None = None, examples=None, **kwargs) -> dict[str, torch.Tensor]:
        """The four tensors of a batch of texts; `prompt` is the instruction. Warns once if texts are truncated."""
        processor = self.model.processor
        rows = processor.rows(inputs, instruction=prompt or None, examples=examples)
        counts = count_cut([row.cut for row in rows])
        if counts and not self.truncated:
            told = describe_cut(counts, len(rows), processor.limits(examples=examples))
            logger.warning(f"{told} `model[0].truncated` goes on counting.")
        self.model.add_truncated(counts)
        # `encode` needs no gradients; in training, losses cut a batch's tensors along their first dimension.
        return dict(processor.pad(rows, return_prefix_ids=not torch.is_grad_enabled()))

    @property
    def truncated(self) -> Counter:
        """How many texts were truncated: by either tower (`"texts"`), by the `"decoder"` and by the `"encoder"`."""
        return self.model.truncated

    def forward(self, features: dict, **kwargs) -> dict:
        """Adds `sentence_embedding` of shape `(batch, embedding_size)`, in float32."""
        names = [*self.model.processor.model_input_names, "prefix_ids"]
        embeddings = self.model(**{name: features[name] for name in names if name in features}).embeddings.float()
        if self.normalize:
            embeddings = nn.functional.normalize(embeddings, dim=-1)
        features["sentence_embedding"] = embeddings
        return features

    @property
    def tokenizer(self):
        """The decoder's tokenizer; the encoder's is `processor.encoder_tokenizer`."""
        return self.model.processor.tokenizer

    @property
    def processor(self) -> Causal2VecProcessor:
        return self.model.processor

    @property
    def max_seq_length(self) -> int:
        """Longest decoder sequence in tokens; see [`Causal2VecConfig`]."""
        return self.model.processor.max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        limit = position_limit(self.model.decoder) or float("inf")
        if not isinstance(value, int) or not 3 <= value <= limit:
            raise ValueError(f"`max_seq_length` must be an integer from 3 to {limit}, got {value!r}.")
        self.model.config.max_seq_length = self.model.processor.max_seq_length = value

    def get_embedding_dimension(self) -> int:
        return self.model.config.embedding_size

    def save(self, output_path: str, *args, safe_serialization: bool = True, **kwargs) -> None:
        """Saves the whole model as `Causal2VecModel.save_pretrained` does, always as safetensors."""
        prompts = Path(output_path, "config_sentence_transformers.json")
        written = prompts.read_bytes() if prompts.exists() else None  # by SentenceTransformer, with its user's prompts
        self.model.save_pretrained(output_path)
        if written is not None:
            prompts.write_bytes(written)
        self.save_config(output_path)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        model_kwargs: dict | None = None,
        processor_kwargs: dict | None = None,
        config_kwargs: dict | None = None,
        backend: str = "torch",
        **kwargs,
    ) -> "Causal2VecSTModule":
        """
        Loads weights, both tokenizers and settings from a folder or Hub id.

        Args:
            model_kwargs (`dict`, *optional*): For `Causal2VecModel.from_pretrained`, such as `{"dtype": "bfloat16"}`.

        Raises:
            ValueError: `processor_kwargs`, `config_kwargs` or another backend than torch are given.
        """
        if backend != "torch":
            raise ValueError(f"`backend` must be 'torch', got {backend!r}: the two backbones are not exported.")
        for name, value in (("processor_kwargs", processor_kwargs), ("config_kwargs", config_kwargs)):
            if value:
                raise ValueError(f"`{name}` is not read, got {value!r}: the layout of a row belongs to the checkpoint.")
        where = {"subfolder": subfolder, "token": token, "revision": revision, "local_files_only": local_files_only}
        settings = cls.load_config(model_name_or_path, cache_folder=cache_folder, **where)
        model = Causal2VecModel.from_pretrained(
            model_name_or_path, cache_dir=cache_folder, **where, **(model_kwargs or {})
        )
        return cls(model, **settings)


__all__ = ["Causal2VecSTModule"]
