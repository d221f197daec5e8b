"""An OpenAI-compatible server of embeddings: `POST /v1/embeddings`, `GET /v1/models`, `/health` and `/metrics`.

    python -m serving.server --model . --port 8000

Beyond OpenAI's fields a request may have `instruction` or `prompt_name` ("query", "document") and `truncate`; for clients
that can name a model only, NAME:query is NAME with the instruction for queries. Invariants: whatever comes in, the answer
is vectors as `encode` gives them or an error as OpenAI words it, and other requests do not notice; the event loop neither
tokenizes nor computes.
"""

import argparse
import asyncio
import base64
import hmac
import importlib.util
import json
import os
import signal
import socket
import sys
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

from scripts.cli import exit_code, positive
from serving.loading import DTYPES, load_model


ROOT = Path(__file__).resolve().parent.parent
KEY_VARIABLE = "CAUSAL2VEC_API_KEY"
FIELDS = {  # of a request
    "model": str,
    "input": (str, list),
    "encoding_format": str,
    "dimensions": int,
    "user": str,
    "instruction": str,
    "prompt_name": str,
    "truncate": bool,
}
CHOICES = {"encoding_format": ("float", "base64"), "prompt_name": ("query", "document")}
NAMES = {
    **{str: "a string", (str, list): "a string or an array of strings", list: "an array", dict: "an object"},
    **{int: "an integer", float: "a number", bool: "true or false", type(None): "null"},
}
TOKENS_REFUSED = (
    "`input` must be text, got token ids: another tokenizer made them, and they would give wrong vectors. With LangChain, "
    "use OpenAIEmbeddings(..., check_embedding_ctx_length=False)."
)


def most(default: int, of_what: str) -> int:
    return field(default=default, metadata={"of_what": of_what})


@dataclass(frozen=True)
class Limits:
    """What one request, all that are under way, and one forward pass may have."""

    max_inputs: int = most(2048, "texts per request")
    max_tokens: int = most(300_000, "tokens per request")
    max_body_bytes: int = most(4 * 2**20, "bytes per request")
    max_body_seconds: int = most(30, "seconds for a request to come in")
    max_requests: int = most(256, "requests at a time; others are told to come back")
    max_waiting_tokens: int = most(1_000_000, "tokens that wait for the model; likewise")
    batch_size: int = most(128, "texts per forward pass")
    max_batch_tokens: int = most(16384, "tokens per forward pass")


class ApiError(Exception):
    """An error as OpenAI's clients read it."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.body = json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}})


def parse(body: bytes) -> dict:
    """
    A request's fields, `input` as a list.

    Raises:
        ApiError: it is not JSON, or a field is unknown, missing or not what it should be.
    """
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The body must be JSON in UTF-8: {error}.") from error
    if not isinstance(values, dict):
        raise ApiError(400, f"The body must be a JSON object, got {NAMES[type(values)]}.")
    values = {name: value for name, value in values.items() if value is not None}
    for name, value in values.items():
        if name not in FIELDS:
            raise ApiError(400, f"There is no field {name!r:.80}; there are {', '.join(FIELDS)}.", name[:80])
        if isinstance(value, bool) is not (FIELDS[name] is bool) or not isinstance(value, FIELDS[name]):
            raise ApiError(400, f"`{name}` must be {NAMES[FIELDS[name]]}, got {NAMES[type(value)]}.", name)
        if name in CHOICES and value not in CHOICES[name]:
            raise ApiError(400, f"`{name}` must be one of {', '.join(CHOICES[name])}, got {value!r:.80}.", name)
    for name in ("model", "input"):
        if name not in values:
            raise ApiError(400, f"`{name}` is missing.", name)
    if "instruction" in values and "prompt_name" in values:
        raise ApiError(400, "`instruction` and `prompt_name` exclude each other: leave one out.", "prompt_name")
    texts = [values["input"]] if isinstance(values["input"], str) else values["input"]
    for position, text in enumerate(texts):
        if type(text) is int or (isinstance(text, list) and text and type(text[0]) is int):
            raise ApiError(400, TOKENS_REFUSED, "input")
        if not isinstance(text, str):
            raise ApiError(400, f"`input` must be strings, got {NAMES[type(text)]} at position {position}.", "input")
        if not text:
            raise ApiError(400, f"`input` must not hold empty strings, as at position {position}.", "input")
    if not texts:
        raise ApiError(400, "`input` must hold a string, got an empty array.", "input")
    return {"encoding_format": "float", "truncate": True, **values, "input": texts}


async def read_body(request, limits: Limits) -> bytes:
    """The body of a Starlette request. Raises ApiError when it is too large, or not there in time."""
    body = bytearray()
    try:
        async with asyncio.timeout(limits.max_body_seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.max_body_bytes:
                    raise ApiError(
                        413, f"The body must have at most {limits.max_body_bytes} bytes. Send several requests."
                    )
    except TimeoutError as error:
        told = f"The body must come in within {limits.max_body_seconds} s."
        raise ApiError(408, told, Connection="close") from error
    return bytes(body)


async def until_gone(request) -> None:
    """Returns when the client of a request whose body was read has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def render(vectors, encoding_format: str, told: dict) -> bytes:
    """The JSON of an answer with vectors `(rows, dim)`, made row by row so that other threads get their turn."""
    if encoding_format == "base64":
        rows = (f'"{base64.b64encode(vector.astype("<f4").tobytes()).decode()}"' for vector in vectors)
    else:
        rows = (json.dumps(vector.tolist()) for vector in vectors)
    data = ",".join(f'{{"object":"embedding","index":{i},"embedding":{row}}}' for i, row in enumerate(rows))
    return f'{{"object":"list","data":[{data}],{json.dumps(told)[1:]}'.encode()


class Service:
    """What stands between HTTP and the batcher: a request's texts become a job, and its vectors an answer."""

    def __init__(self, model, name: str, limits: Limits):
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        from serving.batching import Batcher

        self.model, self.limits = model, limits
        query = model.config.query_instruction
        self.prompts = {"query": query, "document": None}
        self.instructions = {name: None, f"{name}:query": query}  # of a model's id
        self.model_fingerprint = model.fingerprint()
        self.created, self.running = int(time.time()), 0

        self.registry = of = CollectorRegistry()
        self.requests = Counter("causal2vec_requests", "Requests for embeddings", ["status"], registry=of)
        self.seconds = Histogram("causal2vec_request_seconds", "From request to answer", registry=of)
        self.texts = Counter("causal2vec_texts", "Texts embedded", registry=of)
        self.tokens = Counter("causal2vec_tokens", "Decoder tokens of them", registry=of)
        self.truncated = Counter("causal2vec_truncated_texts", "Texts read in part only", registry=of)
        powers = [2**power for power in range(11)]
        batches = Histogram("causal2vec_batch_texts", "Texts per forward pass", buckets=powers, registry=of)
        busy = Counter("causal2vec_model_seconds", "Time in forward passes", registry=of)
        waiting = Gauge("causal2vec_waiting_tokens", "Tokens that wait for the model", registry=of)

        def on_batch(rows: int, seconds: float) -> None:
            batches.observe(rows)
            busy.inc(seconds)

        sizes = limits.batch_size, limits.max_batch_tokens, limits.max_waiting_tokens
        self.batcher = Batcher(model, *sizes, on_batch)
        waiting.set_function(lambda: self.batcher.waiting_tokens)

    async def embed(self, request) -> bytes:
        """The answer to a Starlette request. Raises ApiError with what is to be told instead."""
        if self.running >= self.limits.max_requests:
            raise ApiError(503, "Too many requests at a time; try again later.", Retry_After="1")
        self.running += 1
        try:
            job, encoding_format, told = await asyncio.to_thread(self.prepare, await read_body(request, self.limits))
            vectors = await self.compute(job, request)
            self.texts.inc(len(vectors))
            self.tokens.inc(told["usage"]["prompt_tokens"])
            self.truncated.inc(told["usage"]["truncated"])
            return await asyncio.to_thread(render, vectors, encoding_format, told)
        finally:
            self.running -= 1

    def prepare(self, body: bytes):
        """A request's job, its `encoding_format`, and what its answer tells beside the vectors."""
        from serving.batching import Job

        asked, limits, processor = parse(body), self.limits, self.model.processor
        instruction = self.instruction_of(asked["model"])
        if "prompt_name" in asked or "instruction" in asked:  # goes before what the model's id says
            instruction = self.prompts.get(asked.get("prompt_name"), asked.get("instruction"))
        size = self.model.config.embedding_size
        if not 0 < (dim := asked.get("dimensions", size)) <= size:
            raise ApiError(400, f"`dimensions` must be between 1 and {size}, got {dim!r:.20}.", "dimensions")
        texts = asked["input"]
        if len(texts) > limits.max_inputs:
            raise ApiError(400, f"`input` must have at most {limits.max_inputs} strings, got {len(texts)}.", "input")
        rows = []
        for start in range(0, len(texts), 64):  # other requests' are tokenized in between
            try:
                rows += processor.rows(texts[start : start + 64], instruction)
            except ValueError as error:  # the one thing that is left to be wrong
                raise ApiError(400, f"`instruction` is too long: {error}", "instruction") from error
        if not asked["truncate"]:
            try:
                processor.refuse_cut((row.cut for row in rows), processor.limits())
            except ValueError as error:
                raise ApiError(400, str(error), "input", "context_length_exceeded") from error
        tokens = sum(len(row.prefix_ids) + len(row.ids) for row in rows)
        if tokens > limits.max_tokens:
            raise ApiError(400, f"`input` must have at most {limits.max_tokens} tokens, got {tokens}.", "input")
        truncated = sum(bool(row.cut) for row in rows)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens, "truncated": truncated}
        told = {"model": asked["model"], "usage": usage, "fingerprint": self.fingerprint(instruction, dim)}
        return Job(rows, dim), asked["encoding_format"], told

    async def compute(self, job, request):
        """A job's vectors. Should the client go away, the job is cancelled."""
        from serving.batching import QueueFull

        try:
            self.batcher.submit(job)
        except QueueFull as error:
            raise ApiError(503, f"{error} Try again later.", Retry_After=str(error.seconds)) from error
        done, gone = asyncio.wrap_future(job.future), asyncio.ensure_future(until_gone(request))
        try:
            await asyncio.wait((done, gone), return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                raise ApiError(499, "The client has gone.")
            return done.result()
        finally:
            done.cancel()
            gone.cancel()

    def instruction_of(self, name: str) -> str | None:
        """That of a model's id. Raises ApiError where there is no such model."""
        if name not in self.instructions:
            told = f"There is no model {name!r:.80}; there are {' and '.join(self.instructions)}."
            raise ApiError(404, told, "model", "model_not_found")
        return self.instructions[name]

    def fingerprint(self, instruction: str | None, dim: int) -> dict:
        """`model.fingerprint` of vectors that this server gives."""
        return {**self.model_fingerprint, "instruction": instruction or None, "dimensions": dim}

    def describe(self, name: str) -> dict:
        """A model as OpenAI's clients list it, and what makes its vectors."""
        fingerprint = self.fingerprint(self.instruction_of(name), self.model.config.embedding_size)
        owner = {"created": self.created, "owned_by": "causal2vec"}
        return {"id": name, "object": "model", **owner, "fingerprint": fingerprint}


def create_app(model, name: str, api_key: str | None = None, limits: Limits = Limits()):
    """
    Args:
        model ([`Causal2VecModel`]): In eval mode, and left alone meanwhile.
        name (`str`): The id by which clients ask for it.
        api_key (`str`, *optional*): What clients of `/v1` must send.
        limits ([`Limits`], *optional*): Requests beyond them are refused.

    Returns:
        The ASGI application; its `state.service` is the [`Service`].
    """
    from fastapi import FastAPI, Request, Response
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    service = Service(model, name, limits)

    @asynccontextmanager
    async def lifespan(app):
        with service.batcher:
            yield

    app = FastAPI(lifespan=lifespan, openapi_url=None)
    app.state.service = service

    def check_key(request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1")
        if api_key is not None and not hmac.compare_digest(given, b"Bearer " + os.fsencode(api_key)):
            raise ApiError(401, "The API key is missing or wrong.", code="invalid_api_key", WWW_Authenticate="Bearer")

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        start, status = time.perf_counter(), 500
        try:
            check_key(request)
            answer, status = await service.embed(request), 200
            return Response(answer, media_type="application/json")
        except ClientDisconnect:
            status = 499
            return Response(status_code=status)  # nobody reads it
        except ApiError as error:
            status = error.status
            raise
        finally:
            service.requests.labels(status).inc()
            service.seconds.observe(time.perf_counter() - start)

    @app.get("/v1/models")
    async def models(request: Request) -> dict:
        check_key(request)
        return {"object": "list", "data": [service.describe(name) for name in service.instructions]}

    @app.get("/v1/models/{name:path}")
    async def one_model(request: Request, name: str) -> dict:
        check_key(request)
        return service.describe(name)

    @app.get("/health")
    async def health() -> dict:
        if not service.batcher.alive:
            raise ApiError(503, "The model's thread has ended.")
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.registry), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(ApiError)
    async def tell(request: Request, error: ApiError) -> Response:
        return Response(error.body, error.status, error.headers, "application/json")

    @app.exception_handler(HTTPException)
    async def tell_http(request: Request, error: HTTPException) -> Response:
        told = f"{error.detail}: {request.method} {request.url.path}"
        return await tell(request, ApiError(error.status_code, told, **(error.headers or {})))

    @app.exception_handler(Exception)
    async def tell_failure(request: Request, error: Exception) -> Response:
        return await tell(request, ApiError(500, "The server failed; its log says why."))

    return app


def build_parser() -> argparse.ArgumentParser:
    about = f"{__doc__.split(chr(10))[0]} With {KEY_VARIABLE} set, clients must send that key."
    parser = argparse.ArgumentParser(prog="python -m serving.server", description=about)
    add = parser.add_argument
    add("--model", default=str(ROOT), help="folder or Hub id (default: this repository)")
    add("--revision", help="commit of a Hub id")
    add("--name", help="id by which clients ask for the model (default: the folder's name, or the Hub id)")
    add("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, for this machine alone)")
    add("--port", type=int, default=8000, help="port to listen at; 0 for one that is free (default: 8000)")
    add("--dtype", choices=DTYPES, default="float32", help="of the computation; auto: as saved (default: float32)")
    for limit in fields(Limits):
        told = f"most {limit.metadata['of_what']} (default: {limit.default})"
        add(f"--{limit.name}", type=positive, default=limit.default, help=told)
    return parser


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, which refuses connections until a server listens to it."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port, *address[2:]))  # getaddrinfo takes a port modulo 65536
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"Cannot listen at {host}, port {port}: {str(error).rstrip('.')}. Choose others with --host, --port."
        ) from error
    return listener


def serve(args: argparse.Namespace) -> None:
    """Serves until SIGINT or SIGTERM, and then finishes what was accepted."""
    packages = ("fastapi", "uvicorn", "prometheus_client")
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise ValueError(f"{', '.join(missing)} missing: pip install fastapi uvicorn prometheus-client")
    api_key = os.environ.get(KEY_VARIABLE)
    if api_key == "":
        raise ValueError(f"{KEY_VARIABLE} must be a key, got an empty one. Unset it to serve everybody.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # while the model loads, and when uvicorn has ended
    with bind(args.host, args.port) as listener:  # before memory is taken for a model
        import uvicorn

        model = load_model(args.model, args.dtype, args.revision)
        name = args.name or (Path(args.model).resolve().name if Path(args.model).is_dir() else args.model)
        limits = Limits(**{limit.name: getattr(args, limit.name) for limit in fields(Limits)})
        app = create_app(model, name, api_key, limits)
        host, port = listener.getsockname()[:2]
        print(f"Serving {name} at http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)
        if api_key is None and args.host not in ("127.0.0.1", "localhost", "::1"):
            print(f"server: whoever reaches {args.host} can use it; {KEY_VARIABLE} asks for a key", file=sys.stderr)
        # Kept longer than clients keep connections, or one would be closed just when it is used again.
        config = uvicorn.Config(app, ws="none", access_log=False, log_level="warning", timeout_keep_alive=65)
        uvicorn.Server(config).run([listener])


def main(argv: list[str] | None = None) -> int:
    """Runs the server; see [`exit_code`] for what it returns."""
    args = build_parser().parse_args(argv)
    return exit_code("server", lambda: serve(args))


if __name__ == "__main__":
    sys.exit(main())
