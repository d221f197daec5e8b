"""What an ONNX export costs and loses beside torch in float32: speed, memory, size and quality, in one run.

    python -m benchmarks.onnx --data_dir EVAL_PACKS
    python -m benchmarks.onnx --data_dir EVAL_PACKS --documents 0 \\
        --encoder bases/all-MiniLM-L6-v2 --decoder bases/SmolLM2-135M-Instruct --name onnx-135m    # untrained: no quality

Each engine is a process of its own with one thread; they take turns, and of all rounds the fastest counts. Times are
processor time of `encode`, so that other work on the machine hardly counts, tokenization included, with what it shares
between texts of one instruction. Quality is
Spearman's correlation on STSBenchmark and nDCG@10 on a part of SciFact: the documents that its queries ask for, and others.

Left in --output: NAME.json, which is also the last line of stdout.
"""

import argparse
import json
import multiprocessing
import platform
import tempfile
import time
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

import numpy as np

from evaluation.local_data import folder_revision, own_cache
from saving_utils import read_json, write_json


ROOT = Path(__file__).resolve().parent.parent

INSTRUCTIONS = {
    "STSBenchmark": "Retrieve semantically similar text",
    "SciFact": "Given a scientific claim, retrieve documents that support or refute the claim",
}


def serve(engine: str, folder: str, connection) -> None:
    """A process with one engine: answers texts and an instruction with vectors, seconds, and the peak memory so far."""
    if engine == "torch":
        import torch

        from serving.loading import load_model

        torch.set_num_threads(1)
        model = load_model(folder, device="cpu")
    else:
        from serving.onnx_runtime import Causal2VecONNX

        model = Causal2VecONNX(folder, num_threads=1)
    connection.send(None)
    while (job := connection.recv()) is not None:
        texts, instruction = job
        start = time.process_time()
        vectors = model.encode(texts, instruction=instruction, truncation="silent")
        connection.send((vectors, time.process_time() - start, peak_memory()))


def peak_memory() -> float:
    """MiB that this process has had in memory at most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    vnni = [flag for flag in found.get("flags", "").split() if "vnni" in flag]
    return ", ".join([found.get("model name", platform.machine()), *vnni])


class Engine:
    """The parent's side of `serve`."""

    def __init__(self, name: str, folder: str):
        self.connection, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=serve, args=(name, folder, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.connection.recv()

    def encode(self, texts: list[str], instruction: str | None = None) -> tuple[np.ndarray, float, float]:
        self.connection.send((texts, instruction))
        return self.connection.recv()

    def close(self) -> None:
        self.connection.send(None)
        self.process.join()


def read_pack(pack: Path, name: str, split: str = "test") -> list[dict]:
    from datasets import load_dataset

    with own_cache(folder_revision(pack)):
        dataset = load_dataset(str(pack), name)
    return dataset[split if split in dataset else next(iter(dataset))].to_list()


def measure_quality(engines: dict[str, Engine], data_dir: Path, pairs: int, queries: int, documents: int) -> dict:
    """Scores in points, engine by engine, and their smallest cosine to torch's vectors."""
    from scipy.stats import spearmanr

    rows = read_pack(data_dir / "STSBenchmark", "default")[:pairs]
    pack = data_dir / "SciFact"
    asked = {row["_id"]: row["text"] for row in read_pack(pack, "queries")}
    relevant: dict[str, set[str]] = {}
    for row in read_pack(pack, "default"):
        if row["score"] > 0 and (row["query-id"] in relevant or len(relevant) < queries):
            relevant.setdefault(row["query-id"], set()).add(row["corpus-id"])
    wanted = set().union(*relevant.values())
    corpus = read_pack(pack, "corpus")
    corpus = sorted(corpus, key=lambda row: row["_id"] not in wanted)[: max(documents, len(wanted))]
    ids = [row["_id"] for row in corpus]
    sides = {
        "sentence1": ([row["sentence1"] for row in rows], INSTRUCTIONS["STSBenchmark"]),
        "sentence2": ([row["sentence2"] for row in rows], INSTRUCTIONS["STSBenchmark"]),
        "queries": ([asked[query] for query in relevant], INSTRUCTIONS["SciFact"]),
        "documents": ([f"{row['title']} {row['text']}".strip() for row in corpus], None),
    }
    vectors = {name: {side: engine.encode(*job)[0] for side, job in sides.items()} for name, engine in engines.items()}
    scores = {"pairs": len(rows), "queries": len(relevant), "documents": len(corpus)}
    for name, found in vectors.items():
        cosines = (found["sentence1"] * found["sentence2"]).sum(-1)
        ranking = (-found["queries"] @ found["documents"].T).argsort(-1)[:, :10]
        gains = [ndcg([ids[place] in relevant[query] for place in row], len(relevant[query]))
                 for query, row in zip(relevant, ranking)]  # fmt: skip
        scores[name] = {
            "STSBenchmark": 100 * float(spearmanr(cosines, [row["score"] for row in rows]).statistic),
            "SciFact": 100 * float(np.mean(gains)),
            "min_cosine": float(min((found[side] * vectors["torch"][side]).sum(-1).min() for side in sides)),
        }
    return scores


def ndcg(hits: list[bool], count: int) -> float:
    """Of the first ten places, with `count` relevant documents in all."""
    discounts = 1 / np.log2(np.arange(2, 12))
    return float(np.dot(hits, discounts[: len(hits)]) / discounts[:count].sum())


def measure_speed(engines: dict[str, Engine], texts: list[str], instruction: str | None, repeats: int) -> dict:
    """Texts per second of the fastest round, after one that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(repeats + 1):
        for name, engine in engines.items():
            seconds[name].append(engine.encode(texts, instruction)[1])
    speed = {name: len(texts) / min(rounds[1:]) for name, rounds in seconds.items()}
    return {
        "texts": len(texts),
        "texts_per_second": speed,
        "times_torch": {n: v / speed["torch"] for n, v in speed.items()},
    }


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.onnx", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(ROOT), help="Causal2Vec folder. Default: this repository's.")
    parser.add_argument("--encoder", help="with --decoder, backbones to join, untrained, instead of --model")
    parser.add_argument("--decoder")
    parser.add_argument(
        "--exports", type=Path, help="where float32/ and int8/ of an export are or are put. Default: nowhere"
    )
    parser.add_argument("--data_dir", type=Path, required=True, help="folder of evaluation packs")
    parser.add_argument("--pairs", type=int, default=1379, help="of STSBenchmark")
    parser.add_argument("--queries", type=int, default=300, help="of SciFact")
    parser.add_argument("--documents", type=int, default=1000, help="of SciFact; 0: no quality")
    parser.add_argument("--texts", type=int, default=256, help="short ones to time; a sixteenth as many documents")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--name", default="onnx")
    args = parser.parse_args(arguments)

    from serving.onnx import export

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        source = args.model
        if args.decoder:
            import torch

            from modeling_causal2vec import Causal2VecModel

            torch.manual_seed(0)
            joined = Causal2VecModel.from_encoder_decoder_pretrained(args.encoder, args.decoder, dtype="float32")
            joined.save_pretrained(source := str(folder / "torch"))
            del joined
        folders = {"torch": source}
        checks, sizes = {}, {"torch": sum(file.stat().st_size for file in Path(source).glob("model*.safetensors"))}
        for weights in ("float32", "int8"):
            where = (args.exports or folder) / weights
            if not (where / "onnx_config.json").is_file():
                export(source, where, int8=weights == "int8", min_cosine=0 if args.decoder else None)
            folders[f"onnx {weights}"] = str(where)
            checks[f"onnx {weights}"] = read_json(where / "onnx_config.json")["check"]
            sizes[f"onnx {weights}"] = sum(file.stat().st_size for file in where.glob("model.onnx*"))
        engines = {}
        for name, where in folders.items():
            engines[name] = Engine(name, where)
            stack.callback(engines[name].close)
        sentences = [row["sentence1"] for row in read_pack(args.data_dir / "STSBenchmark", "default")][: args.texts]
        documents = [row["text"] for row in read_pack(args.data_dir / "SciFact", "corpus")][: max(args.texts // 16, 1)]
        instruction = INSTRUCTIONS["STSBenchmark"]
        results = {
            "short": measure_speed(engines, sentences, None, args.repeats),
            "short, instruction": measure_speed(engines, sentences, instruction, args.repeats),
            "documents": measure_speed(engines, documents, None, args.repeats),
            "peak_mib": {name: round(engine.encode(sentences[:1])[2]) for name, engine in engines.items()},
            "weights_mib": {name: round(size / 2**20) for name, size in sizes.items()},
            "check": checks,
        }
        results["machine"] = cpu_name()
        results["versions"] = {name: version(name) for name in ("torch", "transformers", "onnxruntime", "tokenizers")}
        write_json(args.output / f"{args.name}.json", results)  # quality takes long
        if args.documents:
            compared = {name: engines[name] for name in ("torch", "onnx int8")}
            results["quality"] = measure_quality(compared, args.data_dir, args.pairs, args.queries, args.documents)
    write_json(args.output / f"{args.name}.json", results)
    print(json.dumps(results))
    return results


if __name__ == "__main__":
    main()
