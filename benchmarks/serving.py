"""Requests per second and latency of serving/server.py, beside a server that computes one request at a time.

    python -m benchmarks.serving
    python -m benchmarks.serving --clients 1 8 64 --requests 256 --rounds 3

Two processes serve the same model, one as it is and one with `--batch_size 1`, and take turns. Clients ask for one text at
a time, a sentence of this repository, half of them as a query and half as a document, and ask again when they have the
answer. Clients run in this process, on the same cores. Latency is from request to answer; medians and 99th percentiles over
all rounds. At the end requests of many kinds go to the first server, and its resident memory is told after a tenth of them
and after all. Invariant: both servers give the same vectors, which is checked before.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

from saving_utils import write_json


ROOT = Path(__file__).resolve().parent.parent
SERVERS = {"batched": [], "one at a time": ["--batch_size", "1"]}


class Server:
    """A process that serves a model."""

    def __init__(self, model: str, arguments: list[str], threads: int | None):
        command = [
            sys.executable,
            "-m",
            "serving.server",
            "--model",
            model,
            "--name",
            "model",
            "--port",
            "0",
            *arguments,
        ]
        environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> "Server":
        if not (found := re.search(r"://(.+):(\d+)/v1", self.process.stdout.readline())):
            raise ValueError("The server did not start.")
        self.host, self.port = found[1], int(found[2])
        return self

    def __exit__(self, *error) -> None:
        self.process.terminate()
        self.process.wait()

    def batches(self) -> tuple[float, float]:
        """Forward passes so far, and texts in them."""
        told = asyncio.run(self.get("/metrics"))
        return tuple(float(re.search(rf"batch_texts_{name} (\S+)", told)[1]) for name in ("count", "sum"))

    def memory(self) -> int | None:
        """Resident MiB, where the system tells."""
        with contextlib.suppress(FileNotFoundError):
            told = Path(f"/proc/{self.process.pid}/status").read_text()
            return int(re.search(r"VmRSS:\s+(\d+)", told)[1]) // 1024

    async def get(self, path: str) -> str:
        async with Connection(self) as connection:
            return (await connection.send(f"GET {path}"))[1].decode()


class Connection:
    """A keep-alive connection, as cheap as can be: clients take time from the server."""

    def __init__(self, server: Server):
        self.server = server

    async def __aenter__(self) -> "Connection":
        while True:
            try:
                self.reader, self.writer = await asyncio.open_connection(self.server.host, self.server.port)
                return self
            except ConnectionRefusedError:  # a moment before the server listens
                await asyncio.sleep(0.05)

    async def __aexit__(self, *error) -> None:
        self.writer.close()

    async def send(self, line: str, body: bytes = b"") -> tuple[int, bytes]:
        """The status and body of an answer."""
        self.writer.write(f"{line} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        size = int(re.search(r"content-length: (\d+)", head)[1])
        return int(head.split(" ", 2)[1]), await self.reader.readexactly(size)

    async def embed(self, **fields) -> dict:
        status, answer = await self.send("POST /v1/embeddings", json.dumps({"model": "model", **fields}).encode())
        if status != 200:
            raise ValueError(f"The server answered {status}: {answer[:500].decode()}")
        return json.loads(answer)


async def load(server: Server, clients: int, requests: list[dict]) -> tuple[float, list[float]]:
    """Sends all requests from so many clients; the seconds it took in all and each of them."""
    waiting, latencies = iter(requests), []

    async def client() -> None:
        async with Connection(server) as connection:
            for fields in waiting:
                start = time.perf_counter()
                await connection.embed(**fields)
                latencies.append(time.perf_counter() - start)

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - start, latencies


def largest_difference(servers: dict[str, Server], requests: list[dict]) -> float:
    """Between the numbers of the servers' vectors."""

    async def vectors(server: Server) -> list[list[float]]:
        async with Connection(server) as connection:
            return [(await connection.embed(**fields))["data"][0]["embedding"] for fields in requests]

    first, second = (asyncio.run(vectors(server)) for server in servers.values())
    return max(abs(a - b) for pair in zip(first, second) for a, b in zip(*pair))


def measure(servers: dict[str, Server], clients: list[int], requests: list[dict], rounds: int) -> list[dict]:
    seconds = {(count, name): [] for count in clients for name in servers}
    latencies = {key: [] for key in seconds}
    sizes = {key: [0.0, 0.0] for key in seconds}
    for server in servers.values():
        asyncio.run(load(server, 8, requests[:32]))  # warm-up
    for round in range(rounds):
        for count, name in seconds:
            before = servers[name].batches()
            taken, each = asyncio.run(load(servers[name], count, requests))
            seconds[count, name].append(taken)
            latencies[count, name] += each
            sizes[count, name] = [a + b - c for a, b, c in zip(sizes[count, name], servers[name].batches(), before)]
            print(f"round {round + 1}: {count} clients, {name}: {len(requests) / taken:.1f}/s", file=sys.stderr)
    return [
        {
            "clients": count,
            "server": name,
            "requests_per_second": len(requests) / statistics.median(seconds[count, name]),
            "median_ms": 1e3 * statistics.median(latencies[count, name]),
            "p99_ms": 1e3 * statistics.quantiles(latencies[count, name], n=100)[98],
            "texts_per_batch": sizes[count, name][1] / sizes[count, name][0],
        }
        for count, name in seconds
    ]


def memory_over_time(server: Server, texts: list[str], count: int) -> dict[str, int | None]:
    """Resident MiB after a tenth of some requests of many kinds, and after all."""
    requests = [
        {"input": texts[i % len(texts)], "instruction": f"Task {i % 200}", "dimensions": 1 + i % 100}
        for i in range(count)
    ]
    told = {}
    for part in (requests[: count // 10], requests[count // 10 :]):
        asyncio.run(load(server, 8, part))
        told[f"after {len(part) + (count // 10 if told else 0)} requests"] = server.memory()
    return told


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(ROOT), help="folder or Hub id (default: this repository)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--requests", type=int, default=256, help="per round (default: 256)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of each server's model (default: torch's)")
    parser.add_argument("--memory_requests", type=int, default=5000, help="0 leaves memory out (default: 5000)")
    parser.add_argument("--output", type=Path, help="a JSON file")
    args = parser.parse_args(argv)

    from benchmarks.encode import sentences_of_the_repository

    texts = sentences_of_the_repository()
    requests = [
        {"model": ("model", "model:query")[i % 2], "input": texts[i % len(texts)], "encoding_format": "base64"}
        for i in range(args.requests)
    ]
    with contextlib.ExitStack() as stack:
        servers = {
            name: stack.enter_context(Server(args.model, options, args.threads)) for name, options in SERVERS.items()
        }
        difference = largest_difference(servers, [{**fields, "encoding_format": "float"} for fields in requests[:32]])
        if difference > 1e-5:
            raise ValueError(f"The servers' vectors differ by {difference:.1g}, which is more than 1e-5.")
        results = {
            "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
            "arguments": {name: getattr(args, name) for name in ("requests", "rounds", "threads", "memory_requests")},
            "largest_difference": difference,
            "rows": measure(servers, args.clients, requests, args.rounds),
        }
        if args.memory_requests:
            results["memory_mib"] = memory_over_time(servers["batched"], texts, args.memory_requests)
    print(f"{'clients':>8} {'server':>14} {'requests/s':>11} {'median ms':>10} {'p99 ms':>8} {'texts/batch':>12}")
    for row in results["rows"]:
        print("{:8} {:>14} {:11.1f} {:10.1f} {:8.1f} {:12.1f}".format(*row.values()))
    if args.output:
        write_json(args.output, results)
    print(json.dumps(results))
    return results


if __name__ == "__main__":
    main()
