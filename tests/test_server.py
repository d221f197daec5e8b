"""The server over real connections and with the real clients: its vectors are `encode`'s, whatever else comes in."""

import asyncio
import base64
import contextlib
import functools
import gc
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from app_server import running, wait_until
from conftest import ROOT, TEXTS

from serving import check, server
from serving.batching import Job
from serving.server import Limits, bind, create_app


for package in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(package)
httpx = pytest.importorskip("httpx")

QUERY = "Given a question, retrieve passages that answer it"  # of `tiny_model`
MANY = "one of many texts that take a while"
SIMILAR = "Retrieve semantically similar text"
TEXTS = [text for text in TEXTS if text]


@contextlib.contextmanager
def served(app):
    """A client of an app that runs in a thread."""
    with running(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def client(tiny_model):
    limits = Limits(max_inputs=300, max_tokens=20_000, max_body_bytes=2**20)
    with served(create_app(tiny_model, "tiny", limits=limits)) as client:
        yield client


def as_json(**fields) -> str:
    return json.dumps({"model": "tiny", "input": "a text", **fields})  # escapes what UTF-8 cannot hold


def ask(client, text="a text", status: int = 200, **fields) -> dict:
    """The answer to one request, which must have this status."""
    response = client.post("/v1/embeddings", content=as_json(input=text, **fields))
    assert response.status_code == status, response.text
    return response.json()


def vectors_of(answer: dict) -> np.ndarray:
    assert [row["index"] for row in answer["data"]] == list(range(len(answer["data"])))
    return np.array([row["embedding"] for row in answer["data"]])


def refused(response, status: int = 400) -> dict:
    """The error of a response, in OpenAI's form."""
    assert response.status_code == status, response.text[:1000]
    assert response.headers["content-type"] == "application/json"
    (error,) = response.json().values()
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    return error


class Gate:
    """Holds the model's thread of an app before each forward pass until `open` is set."""

    def __init__(self, app):
        self.batcher, self.model = app.state.service.batcher, app.state.service.model
        self.open, self.entered, self.rows = threading.Event(), threading.Event(), 0
        self.batcher.model = self

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, input_ids, **kwargs):
        self.entered.set()
        assert self.open.wait(60)
        self.rows += len(input_ids)
        return self.model(input_ids=input_ids, **kwargs)


# What is answered


def test_answers_have_openais_form(client, tiny_model):
    answer = ask(client, TEXTS, user="somebody")
    np.testing.assert_allclose(vectors_of(answer), tiny_model.encode(TEXTS), atol=1e-5)
    tokens = int(tiny_model.processor(TEXTS)["attention_mask"].sum())
    assert answer["object"] == "list" and answer["model"] == "tiny"
    truncated = sum(map(bool, tiny_model.processor.towers_cut(TEXTS)))
    assert truncated >= 1
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens, "truncated": truncated}
    assert answer["fingerprint"] == tiny_model.fingerprint()
    single = ask(client, TEXTS[0], encoding_format=None, dimensions=None, instruction=None)
    np.testing.assert_allclose(vectors_of(single)[0], vectors_of(answer)[0], atol=1e-5)
    assert single["data"][0]["object"] == "embedding"


def test_base64_is_little_endian_float32(client):
    (row,) = ask(client, encoding_format="base64")["data"]
    decoded = np.frombuffer(base64.b64decode(row["embedding"], validate=True), dtype="<f4")
    np.testing.assert_allclose(decoded, vectors_of(ask(client))[0], atol=1e-7)


def test_dimensions_are_half_of_each_state(client, tiny_model):
    answer = ask(client, TEXTS, dimensions=6)
    np.testing.assert_allclose(vectors_of(answer), tiny_model.encode(TEXTS, truncate_dim=6), atol=1e-5)
    assert answer["fingerprint"] == tiny_model.fingerprint(truncate_dim=6)
    for wrong in (0, -1, 65, 10**4000):
        body = json.dumps({"model": "tiny", "input": "a", "dimensions": wrong})
        error = refused(client.post("/v1/embeddings", content=body))
        assert error["param"] == "dimensions" and "64" in error["message"]


@pytest.mark.parametrize(
    "fields, instruction",
    [
        ({}, None),
        ({"instruction": SIMILAR}, SIMILAR),
        ({"instruction": ""}, None),
        ({"prompt_name": "query"}, QUERY),
        ({"prompt_name": "document"}, None),
        ({"model": "tiny:query"}, QUERY),
        ({"model": "tiny:query", "instruction": SIMILAR}, SIMILAR),  # what a request says goes first
        ({"model": "tiny:query", "instruction": ""}, None),
        ({"model": "tiny:query", "prompt_name": "document"}, None),
    ],
)
def test_instructions(client, tiny_model, fields, instruction):
    answer = ask(client, TEXTS, **fields)
    np.testing.assert_allclose(vectors_of(answer), tiny_model.encode(TEXTS, instruction=instruction), atol=1e-5)
    assert answer["usage"]["total_tokens"] == tiny_model.processor(TEXTS, instruction)["attention_mask"].sum()
    assert answer["model"] == fields.get("model", "tiny")
    assert answer["fingerprint"] == tiny_model.fingerprint(instruction)


def test_long_texts_are_cut_or_refused_as_asked(client, tiny_model):
    texts = ["short", "long " * 600, "long " * 30]  # the last is too long for the encoder alone
    answer = ask(client, texts)
    assert answer["usage"]["truncated"] == 2
    np.testing.assert_allclose(vectors_of(answer), tiny_model.encode(texts, truncation="silent"), atol=1e-5)
    for text, tower in ((texts[:2], "decoder"), (["a", "b", texts[2]], "encoder")):
        response = client.post("/v1/embeddings", json={"model": "tiny", "input": text, "truncate": False})
        error = refused(response)
        assert error["param"] == "input" and error["code"] == "context_length_exceeded"
        assert f"position {len(text) - 1} " in error["message"] and tower in error["message"]
    assert ask(client, "short", truncate=False)["usage"]["truncated"] == 0


def test_models(client, tiny_model):
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list" and [model["id"] for model in listed["data"]] == ["tiny", "tiny:query"]
    for model, instruction in zip(listed["data"], (None, QUERY)):
        assert model["object"] == "model" and model["fingerprint"] == tiny_model.fingerprint(instruction)
        assert client.get(f"/v1/models/{model['id']}").json() == model
    error = refused(client.get("/v1/models/other"), 404)
    assert error["code"] == "model_not_found" and "tiny:query" in error["message"]


def test_health_and_metrics(client):
    assert client.get("/health").json() == {"status": "ok"}

    def metrics() -> dict[str, float]:
        response = client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain")
        lines = [line.rsplit(" ", 1) for line in response.text.splitlines() if not line.startswith("#")]
        return {name.removeprefix("causal2vec_"): float(value) for name, value in lines}

    ask(client)
    refused(client.post("/v1/embeddings", content=b"?"))
    before = metrics()
    answer = ask(client, ["a text", "long " * 600])
    refused(client.post("/v1/embeddings", content=b"?"))
    after = metrics()
    grown = {name: after[name] - before[name] for name in after if after[name] != before.get(name)}
    assert grown["texts_total"] == 2 and grown["truncated_texts_total"] == 1
    assert grown["tokens_total"] == answer["usage"]["total_tokens"]
    assert grown['requests_total{status="200"}'] == grown['requests_total{status="400"}'] == 1
    assert grown["batch_texts_sum"] == 2 and grown["model_seconds_total"] > 0 and after["waiting_tokens"] == 0


# Real clients


def test_openai(client, tiny_model):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0) as asking:
        for encoding in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
            answer = asking.embeddings.create(
                model="tiny", input=TEXTS, extra_body={"prompt_name": "query"}, **encoding
            )
            found = [row.embedding for row in answer.data]
            if encoding.get("encoding_format") == "base64":
                found = [np.frombuffer(base64.b64decode(vector), dtype="<f4") for vector in found]
            np.testing.assert_allclose(found, tiny_model.encode_query(TEXTS), atol=1e-5)
        assert answer.usage.total_tokens > 0 and answer.usage.truncated >= 1
        assert answer.fingerprint == tiny_model.fingerprint(QUERY)
        small = asking.embeddings.create(model="tiny:query", input=TEXTS[0], dimensions=8).data[0].embedding
        np.testing.assert_allclose(small, tiny_model.encode_query(TEXTS[0], truncate_dim=8), atol=1e-5)
        assert [model.id for model in asking.models.list()] == ["tiny", "tiny:query"]
        assert asking.models.retrieve("tiny:query").id == "tiny:query"
        with pytest.raises(openai.NotFoundError, match="tiny:query") as error:
            asking.embeddings.create(model="text-embedding-3-small", input="a text")
        assert error.value.code == "model_not_found" and error.value.param == "model"
        with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
            asking.embeddings.create(model="tiny", input=[[1, 2], [3]])
        with pytest.raises(openai.APIStatusError, match="bytes") as error:
            asking.embeddings.create(model="tiny", input="a" * 10 * 2**20)
        assert error.value.status_code == 413


def test_langchain(client, tiny_model):
    embeddings = pytest.importorskip("langchain_openai").OpenAIEmbeddings
    documents, queries = (
        embeddings(model=name, base_url=f"{client.base_url}/v1", api_key="none", check_embedding_ctx_length=False)
        for name in ("tiny", "tiny:query")
    )
    np.testing.assert_allclose(documents.embed_documents(TEXTS), tiny_model.encode(TEXTS), atol=1e-5)
    np.testing.assert_allclose(queries.embed_query(TEXTS[0]), tiny_model.encode_query(TEXTS[0]), atol=1e-5)


def test_llama_index(client, tiny_model):
    embedding = pytest.importorskip("llama_index.embeddings.openai_like").OpenAILikeEmbedding
    found = embedding(model_name="tiny", api_base=f"{client.base_url}/v1", dimensions=8).get_text_embedding_batch(TEXTS)
    np.testing.assert_allclose(found, tiny_model.encode(TEXTS, truncate_dim=8), atol=1e-5)
    queries = embedding(model_name="tiny:query", api_base=f"{client.base_url}/v1")
    np.testing.assert_allclose(queries.get_query_embedding(TEXTS[0]), tiny_model.encode_query(TEXTS[0]), atol=1e-5)


def test_200_requests_at_a_time(client, tiny_model):
    choose = random.Random(0)
    instructions = [None, QUERY, SIMILAR, *(f"Task {number}" for number in range(10))]
    asked = [
        {"input": choose.choices(TEXTS, k=choose.randint(1, 5)), "instruction": choose.choice(instructions)}
        for _ in range(200)
    ]

    async def ask_all() -> list:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=client.base_url, timeout=60, limits=limits) as asking:
            return await asyncio.gather(*(asking.post("/v1/embeddings", content=as_json(**fields)) for fields in asked))

    @functools.cache
    def encode(text: str, instruction: str | None) -> np.ndarray:
        return tiny_model.encode(text, instruction=instruction, truncation="silent")

    responses = asyncio.run(ask_all())
    assert {response.status_code for response in responses} == {200}
    for response, fields in zip(responses, asked):
        expected = [encode(text, fields["instruction"]) for text in fields["input"]]
        np.testing.assert_allclose(vectors_of(response.json()), expected, atol=1e-5)


def test_bundled_checkpoint_gives_the_golden_vectors(bundled_model, monkeypatch, capsys):
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with running(create_app(bundled_model, "tiny", "secret")) as url:
        assert check.main(["server", "--model", f"{url}/v1"]) == 0, capsys.readouterr()


# What is refused


MALFORMED = {
    "nothing": b"",
    "no JSON": b"model=tiny&input=a",
    "half": b'{"model": "tiny", "input": "a',
    "two": b'{"model": "tiny", "input": "a"}{}',
    "zeros": bytes(1000),
    "noise": random.Random(0).randbytes(1000),
    "latin-1": '{"model": "tiny", "input": "é"}'.encode("latin-1"),
    "cut character": b'{"model": "tiny", "input": "\xe2\x82"}',
    "byte order mark alone": b"\xef\xbb\xbf",
    "deep array": b"[" * 100_000,
    "deep object": b'{"input":' * 100_000,
    "deep input": b'{"model": "tiny", "input": ' + b"[" * 900 + b"]" * 900 + b"}",
    "long number": b'{"model": "tiny", "input": "a", "dimensions": ' + b"9" * 5000 + b"}",
    "infinity": b'{"model": "tiny", "input": "a", "dimensions": 1e999}',
    "NaN": b'{"model": "tiny", "input": "a", "dimensions": NaN}',
    "many fields": json.dumps({f"field {i}": i for i in range(30_000)}).encode(),
    "array": b"[]",
    "number": b"7",
    "null": b"null",
    "string": b'"a"',
    "no model": b'{"input": "a"}',
    "no input": b'{"model": "tiny"}',
    "unknown field": as_json(instrution="typing error"),
    "surrogate field": as_json(**{"\ud800": 1}),
    "no strings": as_json(input=[]),
    "empty string": as_json(input=""),
    "an empty string": as_json(input=["a", ""]),
    "tokens": as_json(input=[1, 2, 3]),
    "token arrays": as_json(input=[[1], [2, 3]]),
    "huge tokens": as_json(input=[[10**300]]),
    "mixed": as_json(input=["a", 1]),
    "nested": as_json(input=[["a"]]),
    "nested nothing": as_json(input=[[]]),
    "null in input": as_json(input=["a", None]),
    "object in input": as_json(input=[{"text": "a"}]),
    "true in input": as_json(input=[True]),
    "number in input": as_json(input=[1.5]),
    "object input": as_json(input={"text": "a"}),
    "too many": as_json(input=["a"] * 301),
    "far too many": as_json(input=["a"] * 100_000),
    "too many tokens": as_json(input=["long " * 600] * 60),
    "no room": as_json(instruction="long " * 600),
    "both": as_json(instruction="a", prompt_name="query"),
    "other prompt": as_json(prompt_name="passage"),
    "other format": as_json(encoding_format="int8"),
    "surrogate format": as_json(encoding_format="\ud800"),
    "10 MB": as_json(input="a" * 10 * 2**20),
    "10 MB of texts": as_json(input=["a" * 1000] * 10_000),
    "other model": as_json(model="other"),
    "surrogate model": as_json(model="\udfff"),
    "long model": as_json(model="m" * 100_000),
    **{
        f"{field}: {value!r}": as_json(**{field: value})
        for field in (
            "model",
            "input",
            "encoding_format",
            "dimensions",
            "user",
            "instruction",
            "prompt_name",
            "truncate",
        )
        for value in (0, -1.5, "text", [], {}, True, [[1]], 2**70)
        if not (field in ("instruction", "user", "input") and value == "text")
        and not (field == "truncate" and value is True)
    },
}


def test_malformed_requests_change_nothing(client):
    assert len(MALFORMED) >= 100
    before = ask(client, TEXTS, instruction=SIMILAR)
    for name, body in MALFORMED.items():
        response = client.post("/v1/embeddings", content=body)
        status = (
            413 if "10 MB" in name else 404 if re.search("(other|surrogate|long) model|model: 'text'", name) else 400
        )
        error = refused(response, status)
        assert error["message"] and len(error["message"]) < 600, name
        if name in ("tokens", "token arrays", "huge tokens", "mixed"):
            assert "check_embedding_ctx_length=False" in error["message"]
        assert vectors_of(ask(client)).shape == (1, 64), name
    after = ask(client, TEXTS, instruction=SIMILAR)
    np.testing.assert_allclose(vectors_of(after), vectors_of(before), atol=1e-6)


def test_texts_of_any_kind_are_embedded(client, tiny_model):
    texts = ["\ud800", "a\udc00b", "\0", " ", "\n", "</s><pad>", "é" * 500, "𝔘", "a" * 2**17, "\ufffd", "[CLS]"]
    answer = ask(client, texts, instruction="half a character \ud800")
    expected = tiny_model.encode(texts, instruction="half a character \ud800", truncation="silent")
    np.testing.assert_allclose(vectors_of(answer), expected, atol=1e-5)
    assert ask(client, user="\ud800")["model"] == "tiny"


def raw(client, *parts: bytes, read: bool = True, close: int | None = None) -> bytes:
    """What comes back over a connection of its own."""
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=30) as connection:
        for part in parts:
            connection.sendall(part)
        if close is not None:
            connection.shutdown(close)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while read and (part := connection.recv(2**16)):
                answer += part
        return answer


def test_broken_connections_change_nothing(client):
    before = ask(client, TEXTS)
    body = as_json().encode()
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n"
    chunked = head.replace(b"Content-Length: %d", b"Transfer-Encoding: chunked")
    assert raw(client, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 9).startswith(b"HTTP/1.1 400")  # TLS
    assert raw(client, head % 10 + b"x" * 5, close=socket.SHUT_WR) == b""
    assert raw(client, head.replace(b"%d", b"-1")).startswith(b"HTTP/1.1 400")
    assert raw(client, head.replace(b"%d", b"9" * 18), close=socket.SHUT_WR) == b""
    assert raw(client, head.replace(b"%d", b"9" * 30)).startswith(b"HTTP/1.1 400")
    assert raw(client, chunked + b"zz\r\n").startswith(b"HTTP/1.1 400")
    assert raw(client, b"GET / HTTP/1.1\r\nX: " + b"a" * 2**17).startswith(b"HTTP/1.1 400")
    raw(client, head % len(body) + body, close=socket.SHUT_WR)  # gone before the answer, or not
    raw(client, head % len(body) + body, read=False)
    raw(client, b"", read=False)
    parts = raw(
        client, chunked, *(b"1\r\n%c\r\n" % byte for byte in body), b"0\r\n\r\n", close=socket.SHUT_RD, read=False
    )
    assert parts == b""
    np.testing.assert_allclose(vectors_of(ask(client, TEXTS)), vectors_of(before), atol=1e-6)


def test_slow_bodies_are_given_up(tiny_model):
    with served(create_app(tiny_model, "tiny", limits=Limits(max_body_seconds=1))) as client:
        slow = raw(client, b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Length: 20\r\n\r\n", b"{")
        assert slow.startswith(b"HTTP/1.1 408") and b'"message"' in slow
        assert len(ask(client)["data"]) == 1


def test_other_paths_and_methods(client):
    assert "POST" in refused(client.post("/v1/chat/completions", json={}), 404)["message"]
    response = client.get("/v1/embeddings")
    refused(response, 405)
    assert response.headers["allow"] == "POST"


def test_key(tiny_model):
    with served(create_app(tiny_model, "tiny", api_key="schlüssel")) as client:
        body = {"model": "tiny", "input": "a text"}
        for given in ({}, {"Authorization": "Bearer"}, {"Authorization": "Bearer schl"}, {"Authorization": b"\xff"}):
            response = client.post("/v1/embeddings", json=body, headers=given)
            assert refused(response, 401)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
            refused(client.get("/v1/models", headers=given), 401)
        right = {"Authorization": "Bearer schlüssel".encode()}
        assert client.post("/v1/embeddings", json=body, headers=right).status_code == 200
        assert client.get("/v1/models", headers=right).status_code == 200
        assert client.get("/health").status_code == 200


# Load


def test_a_full_server_says_when_to_come_back(tiny_model):
    app = create_app(tiny_model, "tiny", limits=Limits(max_requests=3, max_waiting_tokens=10))
    with served(app) as client, ThreadPoolExecutor() as pool:
        gate = Gate(app)
        accepted = [pool.submit(ask, client)]
        assert gate.entered.wait(60)
        accepted.append(pool.submit(ask, client, ["a text"] * 20))
        wait_until(lambda: app.state.service.batcher.waiting_tokens)
        body = {"model": "tiny", "input": "a text"}
        response = client.post("/v1/embeddings", json=body)
        assert "queue" in refused(response, 503)["message"] and int(response.headers["retry-after"]) >= 1
        with socket.create_connection((client.base_url.host, client.base_url.port)) as slow:
            slow.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n")
            wait_until(lambda: app.state.service.running == 3)
            response = client.post("/v1/embeddings", json=body)
            assert "requests" in refused(response, 503)["message"] and int(response.headers["retry-after"]) >= 1
            assert client.get("/health").json() == {"status": "ok"}
        gate.open.set()
        assert [len(job.result(60)["data"]) for job in accepted] == [1, 20]
        assert len(ask(client)["data"]) == 1


def test_a_client_that_goes_away_is_dropped(tiny_model):
    app = create_app(tiny_model, "tiny")
    with served(app) as client, ThreadPoolExecutor() as pool:
        gate = Gate(app)
        first = pool.submit(ask, client)
        assert gate.entered.wait(60)
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/embeddings", json={"model": "tiny", "input": ["a text"] * 50}, timeout=0.2)
        wait_until(lambda: app.state.service.running == 1)
        gate.open.set()
        assert len(first.result(60)["data"]) == 1 and len(ask(client)["data"]) == 1
        assert gate.rows == 2, "texts of a client that had gone were computed"
        assert 'requests_total{status="499"} 1.0' in client.get("/metrics").text


def test_nothing_is_kept_of_a_request(tiny_model):
    """benchmarks/serving.py looks at the memory of a process."""
    app = create_app(tiny_model, "tiny")
    with served(app) as client:
        for number in range(20):
            ask(client, TEXTS, instruction=f"Task {number}")
            refused(client.post("/v1/embeddings", content=b"?"))
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/embeddings", content=as_json(input=[MANY] * 500), timeout=0.01)
        wait_until(lambda: app.state.service.running == 0)
        ask(client)
        gc.collect()
        assert not any(type(thing) is Job for thing in gc.get_objects())


def test_a_failure_of_the_model_is_told(tiny_model):
    app = create_app(tiny_model, "tiny")
    with served(app) as client:
        gate = Gate(app)
        gate.open = None  # raises
        error = refused(client.post("/v1/embeddings", json={"model": "tiny", "input": "a text"}), 500)
        assert error["message"]
        app.state.service.batcher.model = tiny_model
        assert len(ask(client)["data"]) == 1 and client.get("/health").status_code == 200


# The process


@pytest.fixture
def main_thread(tiny_model, monkeypatch):
    """Runs the command here with the tiny model, while a function of a client runs in a thread, and ends it by a signal."""
    listeners = []
    monkeypatch.setattr(server, "load_model", lambda *arguments: tiny_model)
    monkeypatch.setattr(server, "bind", lambda *arguments: listeners.append(bind(*arguments)) or listeners[0])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(port: int, job):
        def when_ready():
            try:
                wait_until(lambda: listeners)
                with httpx.Client(base_url=f"http://127.0.0.1:{listeners[0].getsockname()[1]}", timeout=60) as client:
                    wait_until(lambda: accepts(client))
                    return job(client)
            except BaseException:
                os.kill(os.getpid(), signal.SIGTERM)
                raise

        with ThreadPoolExecutor() as pool:
            result = pool.submit(when_ready)
            try:
                code = server.main(["--name", "tiny", "--port", str(port)])
            except SystemExit as exit:
                code = exit.code
            return code, result.result(60)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def is_busy(client) -> bool:
    return "causal2vec_waiting_tokens 0.0" not in httpx.get(client.base_url.join("/metrics")).text


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signals_finish_what_was_accepted(main_thread, tiny_model, capsys, number, code):
    def ask_and_send(client) -> dict:
        with ThreadPoolExecutor() as pool:
            answer = pool.submit(ask, client, [MANY] * 1000)
            wait_until(lambda: answer.done() or is_busy(client))
            os.kill(os.getpid(), number)
            return answer.result(60)

    exit_code, answer = main_thread(0, ask_and_send)
    assert exit_code == code
    expected = tiny_model.encode(MANY, truncation="silent")
    np.testing.assert_allclose(vectors_of(answer)[::500], [expected] * 2, atol=1e-5)
    assert "Traceback" not in capsys.readouterr().err


@contextlib.contextmanager
def process_of(folder: Path):
    """A process that serves a folder, and a client of it."""
    command = [sys.executable, "-m", "serving.server", "--model", str(folder), "--name", "tiny", "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        url = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())[0]
        with httpx.Client(base_url=url, timeout=60) as client:
            wait_until(lambda: accepts(client))
            yield process, client
    finally:
        process.kill()
        process.communicate()


def accepts(client) -> bool:
    with contextlib.suppress(httpx.ConnectError):
        return client.get("/health").status_code == 200


def test_kill_and_restart(saved_dir, main_thread):
    with process_of(saved_dir) as (process, client), ThreadPoolExecutor() as pool:
        before = ask(client, TEXTS)
        lost = pool.submit(ask, client, [MANY] * 1000)
        wait_until(lambda: lost.done() or is_busy(client))
        process.kill()
        with pytest.raises(httpx.TransportError):
            lost.result(60)

    def ask_again(client) -> dict:
        answer = ask(client, TEXTS)
        os.kill(os.getpid(), signal.SIGTERM)
        return answer

    _, after = main_thread(client.base_url.port, ask_again)
    np.testing.assert_allclose(vectors_of(after), vectors_of(before), atol=1e-6)
    assert after["fingerprint"] == before["fingerprint"]


def error_of(capsys, *argv: str) -> str:
    """What a command that fails says."""
    assert server.main([*argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("server: error: ")
    return captured.err


def test_what_stops_the_command_is_told_before_a_model_is_loaded(capsys, monkeypatch, tmp_path):
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"port {port}" in error_of(capsys, "--port", port)
    assert "port 99999" in error_of(capsys, "--port", "99999")
    assert "no-such-host.invalid" in error_of(capsys, "--host", "no-such-host.invalid")
    assert str(tmp_path / "none") in error_of(capsys, "--port", "0", "--model", str(tmp_path / "none"))
    monkeypatch.setattr(server, "load_model", lambda *_: pytest.fail("was loaded"))
    monkeypatch.setenv(server.KEY_VARIABLE, "")
    assert server.KEY_VARIABLE in error_of(capsys, "--port", "0")
    monkeypatch.delenv(server.KEY_VARIABLE)
    find_spec = server.importlib.util.find_spec
    monkeypatch.setattr(server.importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find_spec(name))
    assert "pip install" in error_of(capsys, "--port", "0")
