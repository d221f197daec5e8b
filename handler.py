"""The Hub's Inference Endpoints run a model by this file of its repository: `EndpointHandler(path)`, and a call per request.

    {"inputs": ["a text", "another"], "parameters": {"instruction": "Given a question, retrieve passages that answer it"}}

gives a list of vectors; one text instead of a list gives one vector.
"""

from pathlib import Path


try:
    from .modeling_causal2vec import Causal2VecModel
    from .runtime_utils import default_device
except ImportError:
    if __package__:  # a real one: a file is missing, or a package too old
        raise
    # An endpoint imports this file by itself, with its folder on the path.
    from modeling_causal2vec import Causal2VecModel
    from runtime_utils import default_device


# Those of `encode`, and the names that `InferenceClient.feature_extraction` has for some of them.
PARAMETERS = ("instruction", "examples", "max_length", "truncate_dim", "normalize_embeddings")
ALIASES = {"dimensions": "truncate_dim", "normalize": "normalize_embeddings"}


class EndpointHandler:
    """
    Args:
        path (`str`, *optional*): The model's folder. Defaults to this file's.
    """

    def __init__(self, path: str = ""):
        model = Causal2VecModel.from_pretrained(path or Path(__file__).parent, dtype="auto")
        self.model = model.to(default_device()).eval()

    def __call__(self, data: dict) -> list:
        """
        Args:
            data (`dict`): `inputs`, a text or a list of texts, and in `parameters` or beside them arguments of `encode`;
                also `prompt_name`, where `"query"` stands for the configuration's `query_instruction` and `"document"` for
                none, and `truncate`, which refuses texts that are too long when it is `False`.

        Raises:
            TypeError, ValueError: the request cannot be answered; says what was expected.
        """
        if not isinstance(data, dict) or "inputs" not in data:
            raise ValueError(
                f'A request is {{"inputs": text or list of texts, "parameters": {{...}}}}, got {data!r:.80}.'
            )
        inputs, parameters = data["inputs"], data.get("parameters") or {}
        if not isinstance(parameters, dict):
            raise ValueError(f"`parameters` must be an object, got {parameters!r:.80}.")
        given = {**{name: data[name] for name in data.keys() - {"inputs", "parameters"}}, **parameters}
        given = {ALIASES.get(name, name): value for name, value in given.items() if value is not None}
        prompt_name, truncate = given.pop("prompt_name", "document"), given.pop("truncate", True)
        if unknown := sorted(given.keys() - set(PARAMETERS)):
            names = ", ".join((*PARAMETERS, *ALIASES, "prompt_name", "truncate"))
            raise ValueError(f"There are no parameters {unknown}; there are {names}.")
        if prompt_name not in ("query", "document"):
            raise ValueError(f"`prompt_name` must be 'query' or 'document', got {prompt_name!r}.")
        for name, value in (("truncate", truncate), ("normalize", given.get("normalize_embeddings", True))):
            if not isinstance(value, bool):
                raise ValueError(f"`{name}` must be true or false, got {value!r}.")
        encode = self.model.encode_query if prompt_name == "query" else self.model.encode_document
        return encode(inputs, truncation="silent" if truncate else "error", **given).tolist()
