"""Tiny tasks of all seven types, written as folders in mteb's dataset layout; and an encoder for them that counts."""

import argparse
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from conftest import write_rows

import eval_mteb
from evaluation.encoder import MTEBEncoder, ranks
from evaluation.report import read_run
from saving_utils import write_json


SUBJECTS = ("The cat", "A doctor", "My neighbour", "The old bridge", "This recipe", "Her brother", "A small boat")
VERBS = ("likes", "ignores", "needs", "remembers", "follows")
OBJECTS = ("warm milk", "the morning news", "a red umbrella", "cold rain", "loud music", "the quick brown fox")


def sentences(count: int, seed: int) -> list[str]:
    """Different sentences; the same ones for the same seed."""
    every = [f"{subject} {verb} {thing}." for subject in SUBJECTS for verb in VERBS for thing in OBJECTS]
    return random.Random(seed).sample(every, count)


def write_pack(folder: Path, configs: dict[str, dict[str, list[dict]]], task: dict | None = None) -> Path:
    """`configs`: configuration -> split -> rows."""
    front = ["---", "configs:"]
    for config, splits in configs.items():
        front += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            write_rows(folder / config / f"{split}.jsonl", rows)
            front += [f"  - split: {split}", f"    path: {config}/{split}.jsonl"]
    (folder / "README.md").write_text("\n".join([*front, "---", ""]), encoding="utf-8")
    if task is not None:
        (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
    return folder


def sts_rows(seed: int, count: int = 12) -> list[dict]:
    texts, scores = sentences(2 * count, seed), random.Random(seed)
    return [
        {"sentence1": texts[2 * i], "sentence2": texts[2 * i + 1], "score": round(5 * scores.random(), 2)}
        for i in range(count)
    ]


def retrieval_configs(seed: int, reranking: bool = False) -> dict:
    documents, queries = sentences(20, seed), sentences(6, seed + 1)
    configs = {
        "corpus": {"test": [{"_id": f"d{i}", "title": f"Title {i}", "text": text} for i, text in enumerate(documents)]},
        "queries": {"test": [{"_id": f"q{i}", "text": text} for i, text in enumerate(queries)]},
        "default": {"test": [{"query-id": f"q{i}", "corpus-id": f"d{3 * i}", "score": 1} for i in range(len(queries))]},
    }
    if reranking:
        candidates = [f"d{i}" for i in range(20)]
        configs["top_ranked"] = {
            "test": [{"query-id": f"q{i}", "corpus-ids": candidates[: 3 * i + 4]} for i in range(len(queries))]
        }
    return configs


def labelled_rows(count: int, seed: int) -> list[dict]:
    return [{"text": text, "label": i % 3} for i, text in enumerate(sentences(count, seed))]


def write_sts(folder: Path, seed: int = 0, task: dict | None = None) -> Path:
    return write_pack(folder, {"default": {"test": sts_rows(seed)}}, task)


def write_all_types(data_dir: Path) -> dict[str, str]:
    """A pack of one's own for each type; returns name -> main score."""

    def spec(name: str, type_: str, main_score: str) -> dict:
        return {"name": name, "type": type_, "main_score": main_score, "instruction": f"Instruction of {name}"}

    pairs = [{"sentence1": row["sentence1"], "sentence2": row["sentence2"]} for row in sts_rows(3)]
    sets = [{"sentences": sentences(24, seed), "labels": [f"label {i % 4}" for i in range(24)]} for seed in (6, 7)]
    summaries = [
        {
            "text": sentences(1, seed)[0],
            "human_summaries": sentences(3, seed + 10),
            "machine_summaries": sentences(5, seed + 20),
            "relevance": [1.0, 4.5, 2.0, 3.0, 5.0],
        }
        for seed in range(4)
    ]
    packs = [
        (spec("X-Retrieval", "Retrieval", "ndcg_at_10"), retrieval_configs(1)),
        (spec("X-Reranking", "Reranking", "map_at_1000"), retrieval_configs(2, reranking=True)),
        (spec("X-Clustering", "Clustering", "v_measure"), {"default": {"test": sets}}),
        (
            spec("X-Pairs", "PairClassification", "max_ap"),
            {"default": {"test": [{**pair, "labels": i % 2} for i, pair in enumerate(pairs)]}},
        ),
        (
            spec("X-Classification", "Classification", "accuracy"),
            {"default": {"train": labelled_rows(60, 4), "test": labelled_rows(15, 5)}},
        ),
        (spec("X-STS", "STS", "cosine_pearson"), {"default": {"test": sts_rows(8)}}),
        (spec("X-Summaries", "Summarization", "cosine_spearman"), {"default": {"test": summaries}}),
    ]
    for task, configs in packs:
        write_pack(data_dir / task["name"], configs, task)
    return {task["name"]: task["main_score"] for task, _ in packs}


class Stub:
    """A model whose vectors say which process made them."""

    dim, truncated = 2, Counter()

    def count_truncated(self, texts, instruction, examples):
        return Counter()

    def fit(self, instruction, examples):
        return None

    def encode(self, texts, instruction, examples, batch_size, side):
        self.truncated = self.truncated + Counter(texts=len(texts))
        return np.array([[len(text), ranks()[0]] for text in texts], dtype=np.float32)


def embed_in_a_process(rank: int, rendezvous: str, results: str) -> None:
    """Embeds nine texts as one of two processes."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    encoder = MTEBEncoder(Stub(), None, {"dtype": "fp32"}, lambda metadata, side: None)
    np.save(f"{results}.{rank}.npy", encoder.embed(["a" * i for i in range(9)], None, None))
    assert encoder.truncated["texts"] == 9  # as the stub has it, in either process
    torch.distributed.destroy_process_group()


def cli(saved_dir, data_dir, output) -> list[str]:
    return ["--model", str(saved_dir), "--data_dir", str(data_dir)] + (["--output", str(output)] if output else [])


def options(saved_dir, data_dir, output, *more) -> argparse.Namespace:
    return eval_mteb.parse_args(
        ["--model", str(saved_dir), "--data_dir", str(data_dir), "--output", str(output), "--tasks", "all", *more]
    )


def load(saved_dir, data_dir, output, *more):
    """Tasks and encoder, as `main` makes them."""
    from evaluation.tasks import select_tasks

    args = options(saved_dir, data_dir, output, *more)
    tasks = select_tasks(args.tasks, args.data_dir)
    return tasks, eval_mteb.load_encoder(args, tasks)


class CountingBackend:
    """Counts the texts that reach the model; may fail before the n-th call."""

    def __init__(self, backend, fail_at=None, error=KeyboardInterrupt):
        self.backend, self.fail_at, self.error, self.calls, self.texts = backend, fail_at, error, 0, 0

    def __getattr__(self, name):
        return getattr(self.backend, name)

    def encode(self, texts, *args):
        self.calls += 1
        if self.calls - 1 == self.fail_at:
            raise self.error("as if killed")
        self.texts += len(texts)
        return self.backend.encode(texts, *args)


def counting(encoder, **kwargs):
    return replace(encoder, backend=CountingBackend(encoder.backend, **kwargs), lengths=[])


def scores(output) -> dict[str, float]:
    scored = read_run(output)
    return {**scored.scores, **scored.other}


def write_result(folder, task, type_, score, in_benchmark=True, noise=None, finished=True, splits=("test",)):
    result = f"results/m/r/{'noisy/' if noise else ''}{task}.json"
    scores = {split: [{"main_score": score, "hf_subset": "default"}] for split in splits}
    write_json(folder / result, {"scores": scores})
    record = {
        "task": task,
        "type": type_,
        "in_benchmark": in_benchmark,
        "main_score": "spearman",
        "splits": list(splits),
        "data": "local-0123456789abcdef",
        "noise": noise,
        "result": result,
        "finished": finished,
    }
    write_json(folder / "records" / f"{task}{'.noise' if noise else ''}.json", record)
    write_json(folder / "settings.json", {"label": folder.name, "model": f"local/{folder.name}", "dtype": "fp32"})
