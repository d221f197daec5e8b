"""Embeds a corpus of any size on any number of machines with Ray Data, and goes on where it was interrupted.

    python -m serving.corpus --input 'texts/*.parquet' --output vectors
    python -m serving.corpus --input 's3://bucket/texts/*.jsonl.gz' --output s3://bucket/vectors --address auto

--output becomes a folder: `data/*.parquet` with `id`, `embedding`, `n_tokens`, `truncated` and `error`; `checkpoint/`, by
which Ray knows the ids that are done; `run.json`, what the vectors are of. The same command again embeds only the ids
that are not there. Invariants: every id is in `data/` exactly once; all vectors have one fingerprint.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts.cli import exit_code, positive
from serving.loading import DTYPES
from serving.precision import PRECISIONS, arrow_type, check_precision, store
from serving.vectors import check_fingerprint, with_fingerprint


ROOT = Path(__file__).resolve().parent.parent
OTHER_TASKS = 3  # CPUs counted for reading, filtering and writing, which wait more than they compute
TOLD_IDS = 5


class Encoder:
    """One copy of the model in a process of its own, from blocks of rows to what is written."""

    def __init__(self, options: dict, fingerprint: dict, cpus: int):
        import torch
        from transformers.utils.logging import disable_progress_bar

        from serving.loading import load_model

        disable_progress_bar()
        torch.set_num_threads(cpus)
        self.options, self.schema = options, schema_of(options, fingerprint)
        self.model = load_model(options["model"], dtype=options["dtype"], revision=options["revision"])
        check_fingerprint(fingerprint, fingerprint_of(self.model, options), "the vectors in --output")

    def __call__(self, rows):
        """A table of `id`, `text` and `error` to one of `schema_of`."""
        import numpy as np
        import pyarrow as pa

        from prefix_cache import weights_read_once

        texts, errors = rows["text"].to_pylist(), rows["error"].to_pylist()
        good = [place for place, error in enumerate(errors) if error is None]
        vectors = np.zeros((len(texts), self.options["dim"]), np.float32)
        n_tokens, truncated = np.zeros(len(texts), np.int32), np.zeros(len(texts), bool)
        batches = self.encode([texts[place] for place in good], self.options["batch_size"])
        with weights_read_once():  # nothing changes them here
            for places, found, lengths, cut in batches:
                places = [good[place] for place in places]
                n_tokens[places], truncated[places] = lengths, cut
                if found is None:
                    errors[places[0]] = f"out of memory: a text of {lengths[0]} tokens"
                else:
                    vectors[places] = found
        stored = store(vectors, self.options["precision"])
        columns = {
            "id": rows["id"],
            "text": rows["text"],
            "embedding": pa.FixedSizeListArray.from_arrays(
                pa.array(stored.reshape(-1)), stored.shape[1], mask=pa.array([error is not None for error in errors])
            ),
            "n_tokens": n_tokens,
            "truncated": truncated,
            "error": pa.array(errors, pa.string()),
        }
        return pa.table([columns[name] for name in self.schema.names], schema=self.schema)

    def encode(self, texts: list[str], batch_size: int) -> Iterator[tuple]:
        """
        Of each batch the texts' places, vectors and numbers of tokens, and whether they were cut. A batch that does not
        fit into memory is halved; a single text that does not has None for vectors.
        """
        import torch

        from encoding_utils import sorted_batches

        instructions = [self.options["instruction"]] * len(texts)
        limits = {"batch_size": batch_size, "max_tokens": self.options["batch_tokens"]}
        for places, batch, cut in sorted_batches(self.model.processor, texts, instructions, **limits):
            lengths = (batch["attention_mask"].sum(-1) + batch["prefix_ids"].shape[-1]).tolist()
            try:
                vectors = self.forward(batch)
            except torch.OutOfMemoryError:
                vectors = None
            if vectors is not None or len(places) == 1:
                yield places, vectors, lengths, [bool(towers) for towers in cut]
                continue
            for inner, *found in self.encode([texts[place] for place in places], (len(places) + 1) // 2):
                yield [places[place] for place in inner], *found

    def forward(self, batch: dict):
        """The embeddings of a batch as `encode` gives them, `(rows, dim)`."""
        import torch

        with torch.inference_mode():
            device = self.model.device
            batch = {name: ids if name == "prefix_ids" else ids.to(device) for name, ids in batch.items()}
            vectors = self.model(**batch).embeddings[:, : self.options["dim"]].float()  # (rows, dim)
            return torch.nn.functional.normalize(vectors, dim=-1).cpu().numpy()


def fingerprint_of(model, options: dict) -> dict:
    """What the vectors are of."""
    return model.fingerprint(options["instruction"], truncate_dim=options["dim"])


def schema_of(options: dict, fingerprint: dict):
    """The schema of the Parquet files."""
    import pyarrow as pa

    from serving.rows import ID_TYPES

    fields = {
        "id": ID_TYPES[options["id_type"]],
        "text": pa.large_string(),
        "embedding": arrow_type(options["dim"], options["precision"]),
        "n_tokens": pa.int32(),
        "truncated": pa.bool_(),
        "error": pa.string(),
    }
    if not options["keep_text"]:
        del fields["text"]
    return with_fingerprint(pa.schema(fields), fingerprint)


class Output:
    """The folder that is written, local or on S3."""

    def __init__(self, folder: str):
        from serving.rows import filesystem

        self.files, self.path = filesystem(folder)
        self.uri = folder if "://" in folder else self.path

    def read(self) -> dict:
        """`run.json`; empty where there is none."""
        if not self.files.get_file_info(f"{self.path}/run.json").is_file:
            return {}
        with self.files.open_input_stream(f"{self.path}/run.json") as file:
            return json.loads(file.read())

    def write(self, run: dict) -> None:
        """Replaces `run.json` in one step."""
        for name in ("data", "checkpoint"):
            self.files.create_dir(f"{self.path}/{name}")
        with self.files.open_output_stream(f"{self.path}/run.json.tmp") as file:
            file.write(json.dumps(run, indent=2, ensure_ascii=False).encode())
        self.files.move(f"{self.path}/run.json.tmp", f"{self.path}/run.json")

    def dataset(self, name: str = "data"):
        """The Parquet files of `data`, or the finished ones of `checkpoint`, as a pyarrow dataset; None if there are none."""
        from pyarrow.dataset import dataset
        from pyarrow.fs import FileSelector

        infos = self.files.get_file_info(FileSelector(f"{self.path}/{name}", allow_not_found=True))
        paths = [info.path for info in infos if info.is_file and not info.path.endswith(".pending.parquet")]
        return dataset(sorted(paths), filesystem=self.files, format="parquet") if paths else None

    def count_done(self) -> int:
        """Rows that the checkpoint knows."""
        checkpoint = self.dataset("checkpoint")
        return checkpoint.count_rows() if checkpoint else 0

    def summarize(self) -> dict:
        """
        Counts over all that is written.

        Raises:
            ValueError: there is a row that the checkpoint does not know, or the reverse.
        """
        rows, counts, errors = 0, Counter(), Counter()
        data = self.dataset()
        for batch in data.to_batches(columns=["n_tokens", "truncated", "error"]) if data else ():
            rows += len(batch)
            counts["tokens"] += batch["n_tokens"].sum().as_py() or 0
            counts["truncated"] += batch["truncated"].true_count
            errors.update(error.split(":")[0] for error in batch["error"].drop_null().to_pylist())
        if (done := self.count_done()) != rows:
            raise ValueError(f"{self.uri} holds {rows} rows and its checkpoint {done}: something else wrote there.")
        return {"rows": rows, "texts": rows - errors.total(), **counts, "errors": dict(errors.most_common())}


def count_ids(rows) -> int:
    """
    Reads the ids of a dataset, and returns how many rows it has.

    Raises:
        ValueError: an id is there more than once.
    """
    import numpy as np

    whole = {"batch_format": "pyarrow", "batch_size": None, "zero_copy_batch": True}
    hashed = rows.map_batches(hash_ids, **whole).iter_batches(batch_format="numpy", batch_size=None)
    hashes = np.sort(np.concatenate([np.empty(0, np.uint64), *(batch["hash"] for batch in hashed)]))
    repeated = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    if len(repeated):  # or two ids have one hash
        suspects = rows.map_batches(keep_hashes, fn_kwargs={"hashes": repeated}, **whole)
        counts = Counter(row["id"] for row in suspects.iter_rows())
        if found := [(row_id, count) for row_id, count in counts.most_common() if count > 1]:
            told = ", ".join(f"{row_id!r} {count} times" for row_id, count in found[:TOLD_IDS])
            raise ValueError(
                f"{len(found)} ids of --input are there more than once: {told}. Nothing was embedded; every row needs an "
                "id of its own."
            )
    return len(hashes)


def hash_ids(rows):
    """The 64-bit hash of each id."""
    import pandas as pd
    import pyarrow as pa

    return pa.table({"hash": pd.util.hash_array(rows["id"].to_numpy(), categorize=False)})


def keep_hashes(rows, hashes):
    """The ids whose hash is one of these."""
    import numpy as np

    return rows.select(["id"]).filter(np.isin(hash_ids(rows)["hash"].to_numpy(), hashes))


@contextmanager
def ray_cluster(args: argparse.Namespace) -> Iterator[int]:
    """Ray, started here, on a cluster or in this process already, and the number of encoders for it."""
    import ray

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if args.address == "local":
        cpus = max(cores, (args.actors or 1) * args.cpus_per_actor) + OTHER_TASKS
        where = {"num_cpus": cpus, "object_store_memory": args.object_store_memory, "include_dashboard": False}
    else:
        names = ("PYTHONPATH", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY")
        where = {"runtime_env": {"env_vars": {name: os.environ[name] for name in names if name in os.environ}}}
    starts = not ray.is_initialized()
    if starts:
        ray.init(address=args.address, logging_level="ERROR", **where)
    try:
        total = ray.cluster_resources()
        if args.gpus_per_actor:
            room = total.get("GPU", 0) / args.gpus_per_actor
        else:
            room = (total["CPU"] - OTHER_TASKS) / args.cpus_per_actor
        yield args.actors or max(1, int(room))
    except ray.exceptions.RayError as error:
        lines = re.findall(r"^(?!.*UserCodeException)[\w.]*(?:Error|Exception)\w*: .+", str(error), re.MULTILINE)
        told = lines[-1] if lines else str(error).strip().splitlines()[-1]
        raise ValueError(f"{told} What is written stays: the same command goes on from there.") from error
    finally:
        if starts:
            ray.shutdown()


def write_vectors(
    rows, output: Output, options: dict, fingerprint: dict, args: argparse.Namespace, actors: int
) -> None:
    """Embeds the rows that the checkpoint does not know, and writes them."""
    import ray
    from ray.data.checkpoint import CheckpointConfig

    context = rows.context
    context.checkpoint_config = CheckpointConfig("id", f"{output.uri}/checkpoint", delete_checkpoint_on_success=False)
    context.actor_task_retry_on_errors = [OSError]
    encoded = rows.repartition(target_num_rows_per_block=args.rows_per_file).map_batches(
        Encoder,
        fn_constructor_kwargs={"options": options, "fingerprint": fingerprint, "cpus": args.cpus_per_actor},
        batch_format="pyarrow",
        batch_size=None,
        zero_copy_batch=True,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=args.cpus_per_actor,
        num_gpus=args.gpus_per_actor or None,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*[Cc]heckpointing will be disabled")
        encoded.write_parquet(f"{output.uri}/data", schema=schema_of(options, fingerprint))


def embed_corpus(args: argparse.Namespace) -> None:
    """From files of texts to files of vectors, and a summary."""
    if missing := [name for name in ("ray", "pyarrow", "pandas") if importlib.util.find_spec(name) is None]:
        raise ValueError(f'This needs {", ".join(missing)}: pip install "ray[data]" pyarrow.')
    import ray

    from serving.loading import load_model
    from serving.rows import Rows, find_inputs, id_type_of

    files, inputs = find_inputs(args.input)
    content = [(path, info.size, info.mtime_ns) for path, info in inputs.items()]
    content = hashlib.sha256(json.dumps([args.id_column, content]).encode()).hexdigest()
    output = Output(args.output)
    run = output.read()

    names = ("model", "revision", "dtype", "instruction", "batch_size", "batch_tokens", "precision", "keep_text")
    options = {name: getattr(args, name) for name in names}
    if os.path.isdir(args.model):
        options["model"] = os.path.abspath(args.model)  # actors have another working directory
    model = load_model(args.model, dtype=args.dtype, revision=args.revision, device="cpu")
    options["dim"] = model.config.embedding_size if args.truncate_dim is None else args.truncate_dim
    check_precision(args.precision, options["dim"])
    options["id_type"] = run.get("id_type") or id_type_of(files, next(iter(inputs)), args.id_column, args.text_column)
    fingerprint = fingerprint_of(model, options)
    del model
    made_of = {name: options[name] for name in ("precision", "keep_text", "id_type")}
    if run:
        there = run["fingerprint"] | {name: run[name] for name in made_of}
        check_fingerprint(there, fingerprint | made_of, f"the vectors in {args.output}")
    if run.get("embedded") == content:
        print(f"All texts of --input are in {args.output} already.")
        return tell(run["summary"], args)

    with ray_cluster(args) as actors:

        def rows(text_column):
            how = {"id_column": args.id_column, "text_column": text_column, "id_type": options["id_type"]}
            source = Rows(list(inputs), how | {"block_rows": args.rows_per_file}, filesystem=files)
            return ray.data.read_datasource(source, override_num_blocks=len(inputs))

        if run.get("checked") != content:
            count = count_ids(rows(None))
            print(f"{count:,} rows in {len(inputs):,} files, no id twice.", flush=True)
            run = {"fingerprint": fingerprint, **made_of, "checked": content, "input_rows": count}
            output.write(run)
        before, started = output.count_done(), time.perf_counter()
        write_vectors(rows(args.text_column), output, options, fingerprint, args, actors)
        seconds = time.perf_counter() - started
    summary = output.summarize()
    if summary["rows"] < run["input_rows"]:
        raise ValueError(f"{run['input_rows'] - summary['rows']} rows are missing in {args.output}: run this again.")
    summary |= {"new_rows": summary["rows"] - before, "seconds": round(seconds, 1), "actors": actors}
    output.write(run | {"embedded": content, "summary": summary})
    tell(summary, args)


def tell(summary: dict, args: argparse.Namespace) -> None:
    """Prints the summary."""
    errors = ", ".join(f"{count:,} {error}" for error, count in summary["errors"].items())
    print(f"{summary['texts']:,} texts, {summary['tokens']:,} tokens, {summary['truncated']:,} texts truncated.")
    print(f"{sum(summary['errors'].values()):,} rows with an error{': ' + errors if errors else ''}.")
    if summary["new_rows"]:
        speed = summary["new_rows"] / summary["seconds"]
        told = f"{summary['new_rows']:,} rows in {summary['seconds']:,.1f} s with {summary['actors']} actors, {speed:,.1f} per s"
        cost = f", {args.price_per_hour / 3.6e3 / speed * 1e6:,.2f} per million" if args.price_per_hour else ""
        print(f"{told}{cost}.")


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(prog="python -m serving.corpus", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="files, folders or globs: .parquet, .jsonl or .csv, local or s3://")
    add("--output", required=True, help="folder to write, local or s3://")
    add("--id_column", default="id", help="a number or string that no other row has (default: id)")
    add("--text_column", default="text", help="what to embed (default: text)")
    add("--keep_text", action="store_true", help="write the texts too")
    add("--model", default=str(ROOT), help="folder, the same on every machine, or Hub id (default: this repository)")
    add("--revision", help="commit of a Hub id")
    add("--dtype", choices=DTYPES, default="float32", help="of the computation; auto: as saved (default: float32)")
    add("--instruction", help="task of all texts (default: none)")
    add("--truncate_dim", type=positive, help="numbers to keep of each vector (default: all)")
    add("--precision", choices=PRECISIONS, default="float32", help="of what is written (default: float32)")
    add("--batch_size", type=positive, default=256, help="most texts per forward pass (default: 256)")
    add("--batch_tokens", type=positive, default=16384, help="most tokens per forward pass (default: 16384)")
    add(
        "--rows_per_file",
        type=positive,
        default=8192,
        help="what an actor embeds, and can lose, at once; fewer where texts are very long (default: 8192)",
    )
    add("--actors", type=positive, help="copies of the model (default: as many as there is room for)")
    add("--cpus_per_actor", type=positive, default=1, help="torch's threads in each (default: 1)")
    add("--gpus_per_actor", type=float, default=0, help="0 embeds on CPUs, 0.5 puts two on one GPU (default: 0)")
    add("--address", default="local", help="of a Ray cluster; local starts one here (default: local)")
    add("--object_store_memory", type=positive, help="bytes of shared memory for a local Ray (default: Ray's)")
    add("--price_per_hour", type=float, help="of all machines together, for the cost of a million texts")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs it; see [`exit_code`] for what it returns."""
    # Ray reads these when it is imported or started: nothing is told to its makers, and progress is drawn by rich.
    for name, value in {"USAGE_STATS_ENABLED": "0", "TQDM": "0", "DATA_ENABLE_RICH_PROGRESS_BARS": "1"}.items():
        os.environ.setdefault(f"RAY_{name}", value)
    args = build_parser().parse_args(argv)
    return exit_code("corpus", lambda: embed_corpus(args))


if __name__ == "__main__":
    sys.exit(main())
