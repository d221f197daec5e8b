"""handler.py, called as the Hub's Inference Endpoints call it. Some 15 seconds, most of them a fresh process."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import TEXTS
from huggingface_hub import InferenceClient

from handler import EndpointHandler


INSTRUCTION = "Given a question, retrieve passages that answer it"
# What huggingface_inference_toolkit does with a repository that has a handler.py.
TOOLKIT = """
import importlib.util, json, sys
folder = sys.argv[1]
spec = importlib.util.spec_from_file_location("handler", f"{folder}/handler.py")
sys.path.insert(0, folder)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert sys.modules["modeling_causal2vec"].__file__.startswith(folder)
print("ANSWER" + json.dumps(module.EndpointHandler(folder)({"inputs": sys.argv[2:]})))
"""


@pytest.fixture(scope="module")
def handler(saved_dir):
    return EndpointHandler(str(saved_dir))


def close(found: list, expected: np.ndarray) -> bool:
    return np.shape(found) == expected.shape and np.abs(np.array(found) - expected).max() < 1e-5


def test_texts(handler, tiny_model):
    assert close(handler({"inputs": TEXTS}), tiny_model.encode(TEXTS))
    assert close(handler({"inputs": TEXTS[0]}), tiny_model.encode(TEXTS[0]))
    assert handler({"inputs": []}) == []
    assert json.loads(json.dumps(handler({"inputs": TEXTS[:1]}))) == handler({"inputs": TEXTS[:1]})


EXAMPLES = [{"query": "a", "response": "b"}]


@pytest.mark.parametrize(
    "parameters, arguments",
    [
        ({"instruction": INSTRUCTION}, {"instruction": INSTRUCTION}),
        ({"instruction": [INSTRUCTION, *[None] * 5]}, {"instruction": [INSTRUCTION, *[None] * 5]}),
        ({"instruction": INSTRUCTION, "prompt_name": "document"}, {"instruction": INSTRUCTION}),
        ({"truncate_dim": 10}, {"truncate_dim": 10}),
        ({"dimensions": 10, "normalize": False}, {"truncate_dim": 10, "normalize_embeddings": False}),
        ({"normalize_embeddings": False}, {"normalize_embeddings": False}),
        ({"examples": EXAMPLES, "max_length": 70}, {"examples": EXAMPLES, "max_length": 70}),
        ({"instruction": None, "truncate": True}, {}),
    ],
)
def test_parameters(handler, tiny_model, parameters, arguments):
    expected = tiny_model.encode(TEXTS, **arguments)
    assert close(handler({"inputs": TEXTS, "parameters": parameters}), expected)
    assert close(handler({"inputs": TEXTS, **parameters}), expected)
    assert not arguments or not close(handler({"inputs": TEXTS}), expected)


def test_queries(handler, tiny_model):
    found = handler({"inputs": TEXTS, "parameters": {"prompt_name": "query"}})
    assert close(found, tiny_model.encode_query(TEXTS)) and not close(found, tiny_model.encode(TEXTS))
    other = handler({"inputs": TEXTS, "parameters": {"prompt_name": "query", "instruction": INSTRUCTION}})
    assert close(other, tiny_model.encode(TEXTS, instruction=INSTRUCTION))


@pytest.mark.parametrize(
    "request_, error",
    [
        (None, 'A request is {"inputs"'),
        ("text", 'A request is {"inputs"'),
        ({"texts": ["a"]}, 'A request is {"inputs"'),
        ({"inputs": None}, "`texts` must be a string or a list"),
        ({"inputs": ["a", 1]}, "got int at position 1"),
        ({"inputs": [["a"]]}, "got list at position 0"),
        ({"inputs": {"a": "b"}}, "got dict"),
        ({"inputs": "a", "parameters": ["instruction"]}, "`parameters` must be an object"),
        ({"inputs": "a", "parameters": {"instructions": "b"}}, r"no parameters \['instructions'\]"),
        ({"inputs": "a", "truncate_dims": 3}, r"no parameters \['truncate_dims'\]"),
        ({"inputs": "a", "parameters": {"device": "cuda"}}, "no parameters"),
        ({"inputs": "a", "parameters": {"prompt_name": "passage"}}, "`prompt_name` must be"),
        ({"inputs": "a", "parameters": {"normalize": "no"}}, "`normalize` must be true or false"),
        ({"inputs": "a", "parameters": {"truncate": 0}}, "`truncate` must be true or false"),
        ({"inputs": "a", "parameters": {"dimensions": 65}}, "`truncate_dim` must be an integer between 1 and 64"),
        ({"inputs": "a", "parameters": {"max_length": "9"}}, "`max_length` must be an integer"),
        ({"inputs": ["a", "word " * 600], "parameters": {"truncate": False}}, "position 1 is too long"),
    ],
)
def test_bad_requests(handler, tiny_model, request_, error):
    with pytest.raises((TypeError, ValueError), match=error):
        handler(request_)
    assert close(handler({"inputs": TEXTS[:1]}), tiny_model.encode(TEXTS[:1]))


def test_the_hubs_client(handler, tiny_model, monkeypatch):
    """Its payload, without a network."""
    client = InferenceClient("http://127.0.0.1:9", token="none")
    monkeypatch.setattr(client, "_inner_post", lambda request, **kwargs: handler(request.json))
    found = client.feature_extraction(TEXTS, normalize=False, prompt_name="query", dimensions=6)
    assert close(found, tiny_model.encode_query(TEXTS, normalize_embeddings=False, truncate_dim=6))


def test_a_saved_folder_carries_it(saved_dir, tiny_model):
    """In a fresh process, which knows of the folder alone."""
    command = [sys.executable, "-P", "-c", TOOLKIT, str(saved_dir), *TEXTS]
    result = subprocess.run(command, cwd=saved_dir.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    (answer,) = [line for line in result.stdout.splitlines() if line.startswith("ANSWER")]
    assert close(json.loads(answer.removeprefix("ANSWER")), tiny_model.encode(TEXTS))
