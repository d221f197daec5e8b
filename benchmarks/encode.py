"""What one text costs: Causal2Vec and the methods it is compared with, side by side (Causal2Vec, section 4.4).

    python -m benchmarks.encode --data_dir EVAL_PACKS --examples_dir ICL_EXAMPLES
    python -m benchmarks.encode --redraw benchmarks/results/cuda-7b.json

All methods read the same texts and instructions with the same decoder, in the same batches, sorted by length and padded
on the right, each with the fastest attention that is exact for it. Tokenization is done before the clock starts, except
in the scenarios that time `encode` itself. Methods take turns within one run, so that what else the machine does hits
all alike; ratios within a run are what counts. Invariant: every Causal2Vec variant that is timed gives the plain
variant's vectors, which is checked before.

Left in --output: NAME.json (also the last line of stdout), NAME.md and NAME-*.png.
"""

import argparse
import json
import platform
import re
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from encoding_utils import cut, sorted_batches
from evaluation.plots import new_figure, save_figure
from modeling_causal2vec import Causal2VecModel
from runtime_utils import default_device, has_fast_bfloat16
from saving_utils import read_json, write_json, write_text


ROOT = Path(__file__).resolve().parent.parent

TASKS = ("EmotionClassification", "TweetSentimentExtractionClassification", "STS12")
CORPORA = (
    ("X-MedQuADRetrieval", "corpus"),
    ("X-MedQuADRetrieval", "queries"),
    ("SciFact", "corpus"),
    ("STS12", "data"),
)
COLUMNS = ("text", "sentence1", "sentences")
BASELINE = "bge-en-icl"
PRECISIONS = {"float32": "float32", "bfloat16": "bfloat16", "float32 compiled": "float32"}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.encode", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(ROOT), help="Causal2Vec folder or Hub id. Default: this repository's.")
    parser.add_argument("--decoder_config", help="JSON of a decoder to use instead, any size, with random weights.")
    parser.add_argument("--long_decoder_config", default=str(ROOT / "benchmarks" / "decoder_235m.json"),
                        help="JSON of a decoder at least 20 times the encoder's size, for the 512-token scenario.")  # fmt: skip
    parser.add_argument("--data_dir", help="Folder of evaluation packs. Default: texts of this repository.")
    parser.add_argument(
        "--examples_dir", help="Folder of <task>.json with in-context examples. Default: made of texts."
    )
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="Short-text tasks.")
    parser.add_argument("--texts", type=int, default=128, help="Texts per task.")
    parser.add_argument("--long_texts", type=int, default=8, help="512-token texts; 0 leaves the scenario out.")
    parser.add_argument("--corpus_texts", type=int, default=256, help="Texts of mixed lengths; 0 leaves it out.")
    parser.add_argument("--queries", type=int, default=30, help="Single queries timed; 0 leaves the scenario out.")
    parser.add_argument("--precision_texts", type=int, default=128,
                        help="Texts encoded in float32, in bfloat16 and compiled; 0 leaves the scenario out.")  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default=str(default_device()))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, help="CPU threads. Default: torch's.")
    parser.add_argument("--output", default=str(ROOT / "benchmarks" / "results"), help="Folder for results.")
    parser.add_argument("--name", help="Of the result files. Default: the device's.")
    parser.add_argument("--redraw", help="Draw table and pictures of this JSON again, measure nothing.")
    return parser.parse_args(arguments)


# Texts, instructions and examples


def read_texts(data_dir: str | None, task: str, part: str = "data") -> list[str]:
    """All texts of one pack, in its order; without packs, sentences of this repository."""
    if data_dir is None:
        return sentences_of_the_repository()
    import pyarrow.parquet

    files = sorted(Path(data_dir, task, part).glob("test*.parquet")) or sorted(
        Path(data_dir, task, part).glob("*.parquet")
    )
    if not files:
        raise FileNotFoundError(f"Expected parquet files in {Path(data_dir, task, part)}; see --data_dir and --tasks.")
    table = pyarrow.parquet.read_table(files[0])
    column = next(name for name in COLUMNS if name in table.column_names)
    values = table[column].to_pylist()
    return [text for value in values for text in (value if isinstance(value, list) else [value])]


def sentences_of_the_repository() -> list[str]:
    text = " ".join(path.read_text() for path in [ROOT / "README.md", *sorted(ROOT.glob("*.py"))])
    return [sentence.strip() for sentence in re.split(r"(?<=[.:])\s+", text) if 20 <= len(sentence.strip()) <= 200]


def read_instruction(task: str) -> str:
    instructions = read_json(ROOT / "instructions.json")
    instruction = instructions.get(task, "Retrieve semantically similar text")
    return next(iter(instruction.values())) if isinstance(instruction, dict) else instruction


def read_examples(examples_dir: str | None, task: str, texts: list[str]) -> list[dict]:
    path = Path(examples_dir, f"{task}.json") if examples_dir else None
    if path and path.exists():
        return [{"query": e["query"], "response": e["response"]} for e in read_json(path)]
    return [{"query": texts[-i], "response": texts[-i - 1]} for i in range(1, 11, 2)]


def fit_examples(model: Causal2VecModel, instruction: str, examples: list[dict]) -> list[dict]:
    """The first examples, as many as fill at most half of what the decoder reads with examples."""
    limit = model.processor.icl_max_seq_length // 2
    while examples and len(model.processor.encode_prefix(instruction, examples)) > limit:
        examples = examples[:-1]
    return examples


# Methods. Each is prepared for a list of texts, and gives back a function that embeds all of them once.


class Methods:
    """All methods over one decoder, for one list of texts."""

    def __init__(self, model: Causal2VecModel, texts, instruction: str, examples: list[dict], batch_size: int):
        self.model, self.texts, self.batch_size = model, texts, batch_size
        self.instruction, self.examples = instruction, examples
        self.processor, self.device = model.processor, model.decoder.device
        self.eos, self.max_length = self.processor.tokenizer.eos_token_id, self.processor.max_seq_length

    def all(self) -> dict[str, Callable[[], torch.Tensor]]:
        prefix = self.processor.encode_prefix(self.instruction)
        text_ids = self.processor._encode_plain(self.processor.tokenizer, self.texts)
        room = self.max_length - len(prefix) - 2
        text_ids = [ids[:room] for ids in text_ids]
        half = [ids[: room // 2] for ids in text_ids]
        shots = self.processor.encode_prefix(self.instruction, self.examples)
        query, response = self.plain(f"<instruct>{self.instruction}\n<query>"), self.plain("\n<response>")
        shots = shots[: len(shots) - len(self.plain(self.instruction))]  # examples alone; the prompt repeats the task
        return {
            "last-token": self.decoder_only([[*prefix, *ids, self.eos] for ids in text_ids], "last"),
            "bidirectional mean": self.decoder_only(
                [[*prefix, *ids, self.eos] for ids in text_ids], "mean", skip=len(prefix)
            ),
            "echo": self.decoder_only([[*prefix, *ids, *ids, self.eos] for ids in half], "second", skip=len(prefix)),
            BASELINE: self.decoder_only([[*shots, *query, *ids, *response, self.eos] for ids in text_ids], "last"),
            "causal2vec": self.causal2vec(None, shared=False),
            "causal2vec shared": self.causal2vec(None, shared=True),
            "causal2vec examples": self.causal2vec(self.examples, shared=False),
            "causal2vec examples shared": self.causal2vec(self.examples, shared=True),
        }

    def plain(self, text: str) -> list[int]:
        return self.processor._encode_plain(self.processor.tokenizer, [text])[0]

    def decoder_only(self, rows: list[list[int]], pooling: str, skip: int = 0) -> Callable[[], torch.Tensor]:
        lengths = [len(row) for row in rows]
        order = sorted(range(len(rows)), key=lambda i: -lengths[i])
        batches = []
        for places in cut(order, lengths, self.batch_size, None):
            longest = max(lengths[i] for i in places)
            ids = torch.tensor([rows[i] + [self.eos] * (longest - lengths[i]) for i in places], device=self.device)
            batches.append((ids, torch.tensor([lengths[i] for i in places], device=self.device)))

        def run() -> torch.Tensor:
            return torch.cat([self.pool(ids, ends, pooling, skip) for ids, ends in batches])

        return run

    def pool(self, ids: torch.Tensor, lengths: torch.Tensor, pooling: str, skip: int) -> torch.Tensor:
        decoder, places = self.model.decoder, torch.arange(ids.shape[1], device=ids.device)
        embeddings = decoder.get_input_embeddings()(ids)
        if pooling != "mean":  # causal, padded on the right: no mask is needed
            hidden = decoder(
                inputs_embeds=embeddings, use_cache=False
            ).last_hidden_state  # (batch, seq_len, hidden_size)
            if pooling == "last":
                return hidden[torch.arange(len(ids), device=ids.device), lengths - 1]
            start = skip + (lengths - skip - 1) // 2  # where the second copy of the text begins
        else:
            mask = places < lengths[:, None]
            mask = None if mask.all() else mask.long()
            hidden = decoder(
                inputs_embeds=embeddings, attention_mask=mask, is_causal=False, use_cache=False
            ).last_hidden_state
            start = torch.full_like(lengths, skip)
        chosen = ((places >= start[:, None]) & (places < lengths[:, None])).to(hidden).unsqueeze(-1)
        return (hidden * chosen).sum(1) / chosen.sum(1)

    def causal2vec(self, examples: list[dict] | None, shared: bool) -> Callable[[], torch.Tensor]:
        instructions = [self.instruction] * len(self.texts)
        batches = [
            {name: tensor.to(self.device) for name, tensor in batch.items()}
            for _, batch, _ in sorted_batches(self.processor, self.texts, instructions, examples, None, self.batch_size)
        ]

        def run() -> torch.Tensor:
            with sharing(self.model, shared):
                return torch.cat([self.model(**batch).embeddings for batch in batches])

        return run


class sharing:
    """Switches the prefix cache on or off for a while."""

    def __init__(self, model: Causal2VecModel, on: bool):
        self.cache, self.on = model.prefix_cache, on

    def __enter__(self):
        self.kept, self.cache.max_entries = self.cache.max_entries, self.cache.max_entries if self.on else 0

    def __exit__(self, *exception):
        self.cache.max_entries = self.kept


# Measuring


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


@torch.inference_mode()
def interleaved(runs: dict[str, Callable], repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of every repeat, all functions taking turns, each round in another order, after a warm-up."""
    names = list(runs)
    for name in names:
        runs[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        shift = repeat % len(names)
        for name in names[shift:] + names[:shift]:
            synchronize(device)
            start = time.perf_counter()
            runs[name]()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


@torch.inference_mode()
def count(model: Causal2VecModel, run: Callable) -> tuple[int, int]:
    """Decoder tokens and floating-point operations (both towers) of one run, padding included."""
    tokens = []
    handle = model.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    with (
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):  # the CPU's fused kernel is not counted
        run()
    handle.remove()
    return sum(tokens), counter.get_total_flops()


class PeakMemory:
    """Most memory in use above that at the start: the allocator's on a GPU, the process's resident pages on Linux."""

    def __init__(self, device: str):
        self.device, self.peak = device, None

    def resident(self) -> int | None:
        try:
            return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
        except OSError:
            return None

    def watch(self) -> None:
        while not self.done.wait(0.002):
            self.peak = max(self.peak, self.resident())

    def __enter__(self):
        if self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        elif (before := self.resident()) is not None:
            self.before = self.peak = before
            self.done, self.thread = threading.Event(), threading.Thread(target=self.watch)
            self.thread.start()
        return self

    def __exit__(self, *exception):
        if self.device.startswith("cuda"):
            self.peak = torch.cuda.max_memory_allocated() - self.before
        elif self.peak is not None:
            self.done.set()
            self.thread.join()
            self.peak -= self.before


def check_equal(first: torch.Tensor, second: torch.Tensor, dtype: str) -> float:
    """
    The largest difference of two ways to the same unit vectors.

    Raises:
        AssertionError: they are not the same vectors, so their times say nothing.
    """
    first, second = (torch.nn.functional.normalize(vectors.float(), dim=-1) for vectors in (first, second))
    difference = float((first - second).abs().max())
    assert difference <= (1e-5 if dtype == "float32" else 0.05), f"vectors differ by {difference}"
    return difference


@torch.inference_mode()
def bench_task(model, task: str, args) -> dict:
    texts = read_texts(args.data_dir, task)
    instruction = read_instruction(task)
    examples = fit_examples(model, instruction, read_examples(args.examples_dir, task, texts))
    methods = Methods(model, texts[: args.texts], instruction, examples, args.batch_size)
    runs = methods.all()
    difference = max(
        check_equal(runs["causal2vec"](), runs["causal2vec shared"](), args.dtype),
        check_equal(runs["causal2vec examples"](), runs["causal2vec examples shared"](), args.dtype),
    )
    seconds = interleaved(runs, args.repeats, args.device)
    measured = {}
    for name, run in runs.items():
        with PeakMemory(args.device) as memory:
            run()
        tokens, flops = count(model, run)
        measured[name] = {
            "tokens_per_text": tokens / len(methods.texts),
            "gflops_per_text": flops / len(methods.texts) / 1e9,
            "ms_per_text": 1000 * statistics.median(seconds[name]) / len(methods.texts),
            "ms_per_text_all": [1000 * value / len(methods.texts) for value in seconds[name]],
            "peak_mib": None if memory.peak is None else memory.peak / 2**20,
        }
        log(f"{task}: {name}: {measured[name]['ms_per_text']:.2f} ms, {measured[name]['tokens_per_text']:.1f} tokens")
    return {"texts": len(methods.texts), "examples": len(examples), "difference": difference, "methods": measured}


@torch.inference_mode()
def bench_long(model, args) -> dict:
    """512-token texts with an instruction: a decoder alone against Causal2Vec with a shared prefix."""
    words = " ".join(read_texts(args.data_dir, *CORPORA[0])).split()
    size = 4 * model.processor.max_seq_length
    texts = [" ".join(words[i * size : (i + 1) * size]) for i in range(args.long_texts)]
    texts = [text for text in texts if text] or [" ".join(words)]
    methods = Methods(model, texts, read_instruction("ArguAna"), [], min(args.batch_size, 4))
    runs = {
        name: run for name, run in methods.all().items() if name in ("last-token", "causal2vec", "causal2vec shared")
    }
    difference = check_equal(runs["causal2vec"](), runs["causal2vec shared"](), args.dtype)
    seconds = interleaved(runs, max(3, args.repeats - 2), args.device)
    return {
        "texts": len(texts),
        "difference": difference,
        "encoder_parameters": size_without_embeddings(model.encoder),
        "decoder_parameters": size_without_embeddings(model.decoder),
        "seconds_per_text": {name: statistics.median(values) / len(texts) for name, values in seconds.items()},
    }


def bench_latency(model, args) -> dict:
    """One short query at a time through `encode`: with examples on a warm prefix, and without any instruction."""
    texts = read_texts(args.data_dir, args.tasks[0])
    instruction = read_instruction(args.tasks[0])
    examples = fit_examples(model, instruction, read_examples(args.examples_dir, args.tasks[0], texts))
    variants = {
        "no instruction": {},
        "instruction": {"instruction": instruction},
        "examples": {"instruction": instruction, "examples": examples},
    }
    seconds = {name: [] for name in variants}
    for query in [texts[0]] * 3 + texts[1 : args.queries + 1]:
        for name, kwargs in variants.items():
            synchronize(args.device)
            start = time.perf_counter()
            model.encode(query, **kwargs)
            seconds[name].append(time.perf_counter() - start)
    with sharing(model, False):
        cold = []
        for query in texts[1 : args.queries + 1]:
            start = time.perf_counter()
            model.encode(query, **variants["examples"])
            cold.append(time.perf_counter() - start)
    result = {name: 1000 * statistics.median(values[3:]) for name, values in seconds.items()}
    return {**result, "examples, nothing shared": 1000 * statistics.median(cold)}


def bench_corpus(model, args) -> dict:
    """A corpus of mixed lengths through `encode`, against padded batches in input order that share nothing."""
    parts = [read_texts(args.data_dir, *corpus) for corpus in CORPORA]
    generator = torch.Generator().manual_seed(0)
    texts = [
        part[int(i)] for part in parts for i in torch.randperm(len(part), generator=generator)[: args.corpus_texts // 4]
    ]
    texts = [texts[int(i)] for i in torch.randperm(len(texts), generator=generator)]
    words, instruction = (read_instruction("ArguAna") + ". " + read_instruction("SciFact")).split() * 5, ""
    for n in range(len(words)):
        instruction = " ".join(words[:n])
        if len(model.processor.encode_prefix(instruction)) >= 50:
            break

    def input_order(instruction):
        vectors = []
        for start in range(0, len(texts), args.batch_size):
            batch = model.processor(texts[start : start + args.batch_size], instruction)
            with torch.inference_mode():
                embeddings = model(**batch.to(model.device)).embeddings.float()
                vectors.append(torch.nn.functional.normalize(embeddings, dim=-1).cpu())
        return torch.cat(vectors)

    def tokens_read(prefix_text):
        """Tokens per text of each tower in padded batches of input order, and without padding and prefixes."""
        padded, needed = {"decoder": 0, "encoder": 0}, {"decoder": 0, "encoder": 0}
        prefix_tokens = len(model.processor.encode_prefix(prefix_text))
        for start in range(0, len(texts), args.batch_size):
            batch = model.processor(texts[start : start + args.batch_size], prefix_text)
            for tower, mask in (("decoder", "attention_mask"), ("encoder", "encoder_attention_mask")):
                padded[tower] += batch[mask].numel()
                needed[tower] += int(batch[mask].sum())
            needed["decoder"] -= prefix_tokens * len(batch["input_ids"])
        return [{tower: count / len(texts) for tower, count in counts.items()} for counts in (padded, needed)]

    def everything_on(instruction):
        return model.encode(texts, instruction=instruction, batch_size=args.batch_size, convert_to_tensor=True)

    result = {"texts": len(texts)}
    for name, prefix_text in (("50-token prefix", instruction), ("no prefix", None)):
        difference = check_equal(input_order(prefix_text), everything_on(prefix_text), args.dtype)
        runs = {
            "input order": lambda prefix_text=prefix_text: input_order(prefix_text),
            "everything on": lambda prefix_text=prefix_text: everything_on(prefix_text),
        }
        seconds = interleaved(runs, max(2, args.repeats - 3), args.device)
        result[name] = {
            "prefix_tokens": len(model.processor.encode_prefix(prefix_text)),
            "difference": difference,
            "tokens_per_text": dict(zip(runs, tokens_read(prefix_text))),
            "texts_per_second": {run: len(texts) / statistics.median(values) for run, values in seconds.items()},
        }
        log(f"corpus, {name}: {result[name]['texts_per_second']}")
    return result


def bench_precision(args) -> dict:
    """
    `encode` in float32, in bfloat16 (but not on a CPU that is slow in it), and compiled: throughput on short and on long
    texts, the least cosine to float32's vectors, and with evaluation packs Spearman's correlation on STSBenchmark.
    """
    count = args.precision_texts
    texts = {
        "short texts": read_texts(args.data_dir, args.tasks[0])[:count],
        "long texts": read_texts(args.data_dir, *CORPORA[0])[: count // 4],
    }
    slow = {"bfloat16"} if args.device == "cpu" and not has_fast_bfloat16() else set()
    models = {name: load(args, args.decoder_config, dtype) for name, dtype in PRECISIONS.items() if dtype not in slow}
    for name, model in models.items():
        if name.endswith("compiled"):
            model.compile(dynamic=True)
    expected = {kind: models["float32"].encode(some, convert_to_tensor=True) for kind, some in texts.items()}
    result = {name: {"cosine": 1.0} for name in models}
    for kind, some in texts.items():
        runs = {
            name: lambda model=model, some=some: model.encode(some, batch_size=args.batch_size, convert_to_tensor=True)
            for name, model in models.items()
        }
        seconds = interleaved(runs, args.repeats, args.device)
        for name, run in runs.items():
            result[name][f"{kind} per second"] = len(some) / statistics.median(seconds[name])
            cosine = float((run() * expected[kind]).sum(-1).min())
            result[name]["cosine"] = min(result[name]["cosine"], cosine)
        log(f"{kind}: {result}")
    if args.data_dir is not None:
        from training.dev import load_pack

        dev = load_pack(str(Path(args.data_dir, "STSBenchmark")), read_instruction("STSBenchmark"))
        for name, model in models.items():
            result[name]["STSBenchmark"] = 100 * dev.score(model, batch_size=args.batch_size)
    return result


def size_without_embeddings(tower) -> int:
    tables = {id(m.weight) for m in tower.modules() if isinstance(m, torch.nn.Embedding)}
    return sum(p.numel() for p in tower.parameters() if id(p) not in tables)


# What the figures have to show


def find_ratios(results: dict) -> list[dict]:
    """Every target with what was measured: at most `target`, or at least where `at_least` is set."""
    rows = []

    def add(what, value, target, at_least=False):
        met = value >= target if at_least else value <= target
        rows.append({"what": what, "value": value, "target": target, "at_least": at_least, "met": met})

    for task, result in results["tasks"].items():
        m = result["methods"]
        shared, icl = m["causal2vec shared"], m[BASELINE]
        add(f"{task}: decoder tokens, shared / {BASELINE}", shared["tokens_per_text"] / icl["tokens_per_text"], 0.07)
        add(f"{task}: time, shared / {BASELINE}", shared["ms_per_text"] / icl["ms_per_text"], 0.12)
        examples = m["causal2vec examples shared"]["ms_per_text"]
        add(f"{task}: time, shared with examples / without", examples / shared["ms_per_text"], 1.15)
        add(f"{task}: time, shared / last-token", shared["ms_per_text"] / m["last-token"]["ms_per_text"], 1.0)
    if results.get("long"):
        times = results["long"]["seconds_per_text"]
        add("512-token texts: time, shared / last-token", times["causal2vec shared"] / times["last-token"], 1.05)
    if results.get("latency"):
        latency = results["latency"]
        add("one query: time, with examples / no instruction", latency["examples"] / latency["no instruction"], 1.3)
    for name, target in (("50-token prefix", 4.0), ("no prefix", 1.5)):
        if results.get("corpus"):
            speed = results["corpus"][name]["texts_per_second"]
            add(
                f"mixed corpus, {name}: throughput",
                speed["everything on"] / speed["input order"],
                target,
                at_least=True,
            )
    return rows


# Reporting


def write_report(results: dict, output: Path, name: str) -> None:
    write_json(output / f"{name}.json", results)
    write_text(output / f"{name}.md", make_tables(results))
    draw(results, output, name)


def make_tables(results: dict) -> str:
    about = results["about"]
    lines = [f"# {about['device']}, {about['dtype']}, torch {about['torch']}, transformers {about['transformers']}", ""]
    lines += [
        f"Decoder: {about['decoder']}. Batches of {about['batch_size']}, median of {about['repeats']} rounds.",
        "",
    ]
    lines += ["| ratio | measured | target | met |", "|---|---|---|---|"]
    for row in results["ratios"]:
        sign = "at least" if row["at_least"] else "at most"
        lines.append(
            f"| {row['what']} | {row['value']:.3f} | {sign} {row['target']} | {'yes' if row['met'] else 'no'} |"
        )
    for task, result in results["tasks"].items():
        lines += ["", f"## {task}: {result['texts']} texts, {result['examples']} examples", ""]
        lines += [
            "| method | decoder tokens per text | GFLOP per text | ms per text | peak MiB |",
            "|---|---|---|---|---|",
        ]
        for name, m in result["methods"].items():
            memory = "" if m["peak_mib"] is None else f"{m['peak_mib']:.0f}"
            figures = f"{m['tokens_per_text']:.1f} | {m['gflops_per_text']:.3f} | {m['ms_per_text']:.2f} | {memory}"
            lines.append(f"| {name} | {figures} |")
    if results.get("long"):
        long = results["long"]
        sizes = f"decoder {long['decoder_parameters'] / 1e6:.0f}M, encoder {long['encoder_parameters'] / 1e6:.1f}M"
        lines += ["", f"## 512-token texts ({sizes} parameters outside embedding tables)", ""]
        lines += ["| method | seconds per text |", "|---|---|"]
        lines += [f"| {name} | {value:.3f} |" for name, value in long["seconds_per_text"].items()]
    if results.get("latency"):
        lines += ["", "## One query at a time", "", "| prefix | ms |", "|---|---|"]
        lines += [f"| {name} | {value:.2f} |" for name, value in results["latency"].items()]
    if results.get("corpus"):
        corpus = results["corpus"]
        lines += [
            "",
            f"## {corpus['texts']} texts of mixed lengths",
            "",
            "| prefix | input order, texts/s | everything on | tokens per text, decoder + encoder | everything on |",
        ]
        lines += ["|---|---|---|---|---|"]
        for name in ("50-token prefix", "no prefix"):
            speed, tokens = (corpus[name].get(key) for key in ("texts_per_second", "tokens_per_text"))
            cells = [f"{speed[run]:.2f}" for run in speed]
            cells += [f"{t['decoder']:.0f} + {t['encoder']:.0f}" for t in tokens.values()] if tokens else ["", ""]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    if results.get("precision"):
        columns = list(next(iter(results["precision"].values())))
        lines += [
            "",
            "## Precision and compilation",
            "",
            f"| | {' | '.join(columns)} |",
            "|---" * (len(columns) + 1) + "|",
        ]
        for name, values in results["precision"].items():
            lines.append(f"| {name} | {' | '.join(f'{values[column]:.4g}' for column in columns)} |")
    return "\n".join(lines) + "\n"


def draw(results: dict, output: Path, name: str) -> None:
    figures = (
        ("tokens_per_text", "decoder tokens per text"),
        ("gflops_per_text", "GFLOP per text"),
        ("ms_per_text", "ms per text"),
    )
    figure, axes = new_figure(13, 3 * len(results["tasks"]), nrows=len(results["tasks"]), ncols=3, squeeze=False)
    for row, (task, result) in zip(axes, results["tasks"].items()):
        names = list(result["methods"])
        colours = ["tab:blue" if n.startswith("causal2vec") else "tab:gray" for n in names]
        for axis, (key, label) in zip(row, figures):
            bars = axis.barh(names, [m[key] for m in result["methods"].values()], color=colours)
            axis.bar_label(bars, fmt="%.3g", fontsize=7, padding=2)
            axis.margins(x=0.15)
            axis.invert_yaxis()
            axis.set_xlabel(label)
            axis.tick_params(labelsize=7)
            if axis is not row[0]:
                axis.set_yticklabels([])
        row[0].set_title(task, fontsize=9)
    save_figure(figure, output / f"{name}-methods.png")

    # How far from each target, as a share of it: 1 is the target, smaller is better.
    ratios = results["ratios"]
    shares = [row["target"] / row["value"] if row["at_least"] else row["value"] / row["target"] for row in ratios]
    figure, axis = new_figure(9, 0.32 * len(ratios) + 1)
    bars = axis.barh(
        [row["what"] for row in ratios], shares, color=["tab:green" if row["met"] else "tab:red" for row in ratios]
    )
    axis.bar_label(bars, labels=[f"{row['value']:.3f}" for row in ratios], fontsize=7, padding=2)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.invert_yaxis()
    axis.tick_params(labelsize=7)
    axis.set_xlabel("share of the target used up (left of the line is met)")
    save_figure(figure, output / f"{name}-ratios.png")


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def load(args, decoder_config: str | None, dtype: str | None = None) -> Causal2VecModel:
    """The model, or its encoder and tokenizers with a random decoder of another shape."""
    dtype = dtype or args.dtype
    model = Causal2VecModel.from_pretrained(args.model, dtype=dtype)
    if decoder_config is not None:
        from transformers import AutoConfig

        values = read_json(decoder_config)
        values["vocab_size"] = model.decoder.config.vocab_size
        processor, encoder = model.processor, model.encoder
        kept = (
            "contextual_token_id",
            "template_prefix",
            "template_suffix",
            "max_seq_length",
            "icl_max_seq_length",
            "encoder_max_seq_length",
        )
        config = type(model.config)(
            encoder_config=encoder.config,
            decoder_config=AutoConfig.for_model(**values),
            **{name: getattr(model.config, name) for name in kept},
        )
        torch.manual_seed(0)
        with torch.device(args.device):
            default = torch.get_default_dtype()
            torch.set_default_dtype(getattr(torch, dtype))
            try:
                model = type(model)(config, encoder=encoder)
            finally:
                torch.set_default_dtype(default)
        model.processor = processor
    return model.to(args.device).eval()


def main(arguments: list[str] | None = None) -> dict:
    args = parse_arguments(arguments)
    if args.redraw:
        results = read_json(args.redraw)
        results["ratios"] = find_ratios(results)
        write_report(results, Path(args.redraw).parent, Path(args.redraw).stem)
        return results
    if args.threads:
        torch.set_num_threads(args.threads)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = load(args, args.decoder_config)
    kind = args.device.partition(":")[0]
    devices = {"cpu": f"{torch.get_num_threads()} CPU threads ({platform.machine()})"}
    if kind == "cuda":
        devices["cuda"] = torch.cuda.get_device_name()
    results = {
        "about": {
            "device": devices.get(kind, kind),
            "dtype": args.dtype,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "decoder": f"{model.decoder.config.model_type}, {size_without_embeddings(model.decoder) / 1e6:.1f}M parameters "
            f"outside embedding tables ({'random' if args.decoder_config else 'trained'}); "
            f"encoder {size_without_embeddings(model.encoder) / 1e6:.1f}M",
            "batch_size": args.batch_size,
            "repeats": args.repeats,
            "real_texts": args.data_dir is not None,
        },
        "tasks": {},
    }
    output, name = Path(args.output), args.name or kind

    def keep() -> None:  # after every scenario, so that a run that is stopped leaves what it had
        results["ratios"] = find_ratios(results)
        write_report(results, output, name)

    for task in args.tasks:
        results["tasks"][task] = bench_task(model, task, args)
        keep()
    if args.queries:
        results["latency"] = bench_latency(model, args)
        keep()
    if args.corpus_texts:
        results["corpus"] = bench_corpus(model, args)
        keep()
    if args.precision_texts:
        results["precision"] = bench_precision(args)
        keep()
    if args.long_texts:
        results["long"] = bench_long(model if args.decoder_config else load(args, args.long_decoder_config), args)
        keep()
    print(make_tables(results))
    print(json.dumps(results))
    return results


if __name__ == "__main__":
    main()
