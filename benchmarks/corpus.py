"""Embeds real sentences with `serving.corpus` on this machine while parts of it are killed, and checks what is left.

    python -m benchmarks.corpus --data_dir TEXTS --output benchmarks/results/corpus.json

One job over all sentences is cut off four times: an actor, the driver, the raylet and the GCS get SIGKILL, in this order,
each after another fifth of the rows; the same command then goes on. At the end every id must be there exactly once, and a
sample of vectors must equal `encode`. Memory is what all processes of a job use together (PSS, which counts shared pages
once), against a job over a tenth of the rows. Two actors and one take turns on that tenth, one thread each. Rows per second
leave out the start: they count from the first file written. Where other programs take part of the processor, rows per
second of the encoders' own processor time say more: two actors are twice as fast as one on two free cores if these are equal.
"""

import argparse
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from saving_utils import write_json


ROOT = Path(__file__).resolve().parent.parent
VICTIMS = {"actor": "MapBatches(Encoder)", "driver": "serving.corpus", "raylet": "raylet", "gcs": "gcs_server"}


def read_sentences(folder: Path, count: int) -> list[str]:
    """The first different sentences of 40 to 200 characters, as many of each file as of any other."""
    import zstandard

    found: dict[str, None] = {}
    files = sorted(folder.glob("*.txt.zst"))
    for number, file in enumerate(files, 1):
        with file.open("rb") as stream:
            for line in io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(stream), encoding="utf-8"):
                pieces = re.split(r"(?<=[.!?])\s+", line.strip())
                found |= dict.fromkeys(piece for piece in pieces if 40 <= len(piece) <= 200)
                if len(found) >= count * number / len(files):
                    break
    if len(found) < count:
        raise ValueError(f"{folder} holds {len(found)} sentences, {count} are needed.")
    return list(found)[:count]


def write_corpus(folder: Path, sentences: list[str], files: int) -> None:
    """Parquet files with whole numbers for ids."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    for number in range(files):
        ids = range(number, len(sentences), files)
        pq.write_table(pa.table({"id": ids, "text": [sentences[i] for i in ids]}), folder / f"{number}.parquet")


class Job:
    """A running command, and how much memory all of its processes have used at once."""

    def __init__(self, corpus: Path, output: Path, actors: int, rows_per_file: int):
        command = [sys.executable, "-m", "serving.corpus", "--input", str(corpus), "--output", str(output)]
        command += [
            "--actors",
            str(actors),
            "--rows_per_file",
            str(rows_per_file),
            "--object_store_memory",
            "200000000",
        ]
        self.log, self.output, self.peak = tempfile.TemporaryFile("w+"), output, 0
        environment = {**os.environ, "RAY_worker_niceness": "0"}  # Ray's 15 would leave them what others do not want
        where = {"stdout": self.log, "stderr": self.log, "start_new_session": True}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, **where)
        self.members: dict = {}
        self.samples: list[tuple[float, int, float]] = []  # time, rows written, processor time of the encoders
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self) -> None:
        """Looks at all processes every few seconds."""
        import psutil

        while self.process.poll() is None:
            total, busy = 0, 0.0
            try:
                processes = [driver := psutil.Process(self.process.pid), *driver.children(recursive=True)]
            except psutil.Error:
                return
            for process in processes:
                try:
                    total += process.memory_full_info().pss
                    self.members[process.pid] = process
                    if VICTIMS["actor"] in process.name() + " ".join(process.cmdline()):
                        busy += sum(process.cpu_times()[:2])
                except psutil.Error:  # it has just ended
                    continue
            self.peak = max(self.peak, total)
            if busy and (rows := self.rows()):
                self.samples.append((time.perf_counter(), rows, busy))
            time.sleep(3)

    def rows(self) -> int:
        """How many rows are written and known to the checkpoint."""
        from serving.corpus import Output

        return Output(str(self.output)).count_done()

    def wait_for(self, rows: int) -> None:
        while self.rows() < rows:
            if self.process.poll() is not None:
                raise RuntimeError(f"The job ended after {self.rows()} of {rows} rows: {self.told()}")
            time.sleep(1)

    def kill(self, victim: str) -> None:
        """Ends one process of the job at once."""
        import psutil

        driver = psutil.Process(self.process.pid)
        for process in [driver, *driver.children(recursive=True)]:
            line = " ".join(process.cmdline())
            found = (
                Path(line.split()[0]).name == VICTIMS[victim]
                if victim in ("raylet", "gcs")
                else VICTIMS[victim] in line
            )
            if found and (victim != "driver" or process == driver):
                process.send_signal(signal.SIGKILL)
                return
        raise RuntimeError(f"There is no {victim}.")

    def end(self) -> int:
        """Waits for the command, and sees to it that nothing of it lives on."""
        import psutil

        code = self.process.wait()
        _, alive = psutil.wait_procs(list(self.members.values()), timeout=60)
        self.left = len(alive)
        for process in alive:
            process.kill()
        return code

    def speeds(self) -> tuple[float, float]:
        """Rows per second, and per second of the encoders' processor time."""
        (start, first, busy), (end, last, spent) = self.samples[0], self.samples[-1]
        return (last - first) / (end - start), (last - first) / (spent - busy)

    def told(self) -> str:
        self.log.seek(0)
        return self.log.read()[-2000:]


def read_vectors(output: Path) -> tuple[np.ndarray, np.ndarray]:
    """Ids `(rows,)` and vectors `(rows, dim)`."""
    from serving.corpus import Output

    table = Output(str(output)).dataset().to_table(columns=["id", "embedding"])
    vectors = table["embedding"].combine_chunks().flatten().to_numpy()
    return table["id"].to_numpy(), vectors.reshape(len(table), -1)


def interrupt(corpus: Path, output: Path, count: int, rows_per_file: int) -> dict:
    """Kills each victim once, goes on each time, and returns what happened."""
    events, peak = [], 0
    job = Job(corpus, output, 2, rows_per_file)
    for number, victim in enumerate(VICTIMS, 1):
        job.wait_for(count * number // (len(VICTIMS) + 1))
        at, started = job.rows(), time.perf_counter()
        job.kill(victim)
        event = {"killed": victim, "rows_done": at}
        if victim != "actor":  # Ray starts another actor, and the job goes on
            event |= {"exit_code": job.end(), "seconds_to_end": round(time.perf_counter() - started, 1)}
            event |= {"processes_left": job.left, "rows_kept": job.rows()}
            peak = max(peak, job.peak)
            job = Job(corpus, output, 2, rows_per_file)
        events.append(event)
        print(json.dumps(event), flush=True)
    if code := job.end():
        raise RuntimeError(f"The last run ended with {code}: {job.told()}")
    return {"events": events, "peak_bytes": max(peak, job.peak)}


def compare_speeds(corpus: Path, folder: Path, args: argparse.Namespace) -> dict:
    """Two actors and one in turns."""
    pairs: dict[int, list[tuple[float, float]]] = {2: [], 1: []}
    peak, load = 0, []  # of the whole machine, on average over the last minute of each job
    for turn in range(args.repeats):
        for actors in pairs:
            job = Job(corpus, folder / f"{actors}-{turn}", actors, args.rows_per_file)
            if code := job.end():
                raise RuntimeError(f"A run ended with {code}: {job.told()}")
            load.append(round(os.getloadavg()[0], 1))
            pairs[actors].append(job.speeds())
            peak = max(peak, job.peak if actors == 2 else 0)
            print(json.dumps({"actors": actors, "rows_per_second": pairs[actors][-1], "load": load[-1]}), flush=True)
    results = {"load_average": load, "tenth_peak_bytes": peak}
    for number, name in enumerate(("rows_per_second", "rows_per_encoder_second")):
        found = {actors: [pair[number] for pair in measured] for actors, measured in pairs.items()}
        results[name] = {str(actors): [round(value, 2) for value in values] for actors, values in found.items()}
        results[f"{name}_two_over_one"] = float(np.median(found[2]) / np.median(found[1]))
    return results


def check(output: Path, sentences: list[str], compared: int) -> dict:
    """What is left after all interruptions."""
    from serving.corpus import Output
    from serving.loading import load_model

    ids, vectors = read_vectors(output)
    results = {"ids": len(ids), "different_ids": len(np.unique(ids)), "summary": Output(str(output)).read()["summary"]}
    results["every_id_once"] = sorted(ids.tolist()) == list(range(len(sentences)))
    sample = np.random.default_rng(0).choice(len(ids), min(compared, len(ids)), replace=False)
    expected = load_model(str(ROOT), device="cpu").encode([sentences[i] for i in ids[sample]])
    return results | {"compared": len(sample), "largest_difference": float(np.abs(vectors[sample] - expected).max())}


def measure(args: argparse.Namespace, folder: Path) -> dict:
    """All of it."""
    sentences = read_sentences(args.data_dir, args.texts)
    write_corpus(folder / "all", sentences, files=8)
    write_corpus(folder / "tenth", sentences[: args.texts // 10], files=8)
    results = {"texts": args.texts, "characters": sum(map(len, sentences)), "cores": os.cpu_count()}
    results |= interrupt(folder / "all", folder / "out", args.texts, args.rows_per_file)
    results |= check(folder / "out", sentences, args.compared)
    write_json(args.output, results)
    return results | compare_speeds(folder / "tenth", folder, args)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.corpus", description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", type=Path, required=True, help="folder of .txt.zst files")
    parser.add_argument("--texts", type=int, default=20000, help="sentences (default: 20000)")
    parser.add_argument("--rows_per_file", type=int, default=128, help="of all jobs (default: 128)")
    parser.add_argument("--repeats", type=int, default=2, help="turns of two actors and one (default: 2)")
    parser.add_argument("--compared", type=int, default=2000, help="vectors to compare with encode (default: 2000)")
    parser.add_argument("--folder", type=Path, help="new folder for texts and vectors (default: one that is removed)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "corpus.json")
    args = parser.parse_args(argv)
    folder = args.folder or Path(tempfile.mkdtemp(prefix="corpus-"))
    try:
        results = measure(args, folder)
    finally:
        if not args.folder:
            shutil.rmtree(folder, ignore_errors=True)
    write_json(args.output, results)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
