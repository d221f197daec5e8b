"""One evaluation run: each task is scored once, recorded with its settings, and resumed after an interruption."""

import json
import platform
import shutil
import subprocess
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from evaluation.encoder import MTEBEncoder, log, ranks, sha256
from evaluation.report import read_run, write_summary
from saving_utils import new_files, read_json, write_json


ROOT = Path(__file__).resolve().parent.parent


def run(tasks: Sequence, encoders: Sequence[MTEBEncoder], output: str | Path, overwrite: bool = False) -> list[str]:
    """
    Scores tasks and saves each result as soon as it is finished.

    Args:
        tasks: From `select_tasks`.
        encoders: One, or one with and one without noise.
        output: A folder for this model in this setting.
        overwrite: Score again what is finished.

    Returns:
        The names of the tasks that failed. All others have been scored.
    """
    output = Path(output)
    check_settings(output, encoders[0].settings)
    cache = result_cache(output, writes=ranks()[0] == 0)
    failed = []
    for position, task in enumerate(tasks, 1):
        for encoder in encoders:
            what = f"[{position}/{len(tasks)}] {task.name}" + (" with noise" if encoder.noise else "")
            wait_for_all()
            try:
                record = run_task(task, encoder, output, cache, overwrite)
            except Exception:
                traceback.print_exc()
                log(f"{what}: failed, see above")
                failed.append(task.name)
                continue
            if ranks()[0] == 0:
                results = read_run(output)
                score = (results.noisy if encoder.noise else {**results.scores, **results.other})[task.name]
                log(f"{what}: {record['main_score']} {score:.2f} in {record['seconds'] or 0:.0f} s")
                write_summary(output)
    return list(dict.fromkeys(failed))


def run_task(task, encoder: MTEBEncoder, output: Path, cache, overwrite: bool = False) -> dict:
    """
    Scores one task unless it is finished; returns its record.

    Raises:
        ValueError: the existing result was made with other instructions, examples, noise or data.
    """
    import mteb

    # an aggregate has a result of its own and one per part
    names = list(dict.fromkeys([task.name, *(part.metadata.name for part in task.leaves())]))
    results = [cache.get_task_result_path(name, encoder.mteb_model_meta) for name in names]
    file = output / "records" / f"{task.name}{'.noise' if encoder.noise else ''}.json"
    record = {**describe_task(task, encoder), "result": results[0].relative_to(output).as_posix()}
    previous = read_json(file) if file.exists() else {}
    started = any(result.exists() for result in results) and not overwrite
    if started:
        differing = [key for key in record if previous.get(key) != record[key]]
        if differing:
            found, wanted = ({key: values.get(key) for key in differing} for values in (previous, record))
            raise ValueError(
                f"{file} records another {' and '.join(differing)}: {found} instead of {wanted}. Use another --output, or "
                "--overwrite."
            )
        if previous["finished"]:
            return previous

    rank, _ = ranks()
    if rank == 0:
        if overwrite:
            for result in results:
                result.unlink(missing_ok=True)
        write_json(file, {**record, "finished": False})  # before any result, so that none lacks it
    for side, examples in (record["examples"] or {}).items():
        if examples["count"] < examples["of"]:
            log(f"{task.name}, {side}: only {examples['count']} of {examples['of']} examples leave room for the text")
    encoder.lengths.clear()
    encoder.truncated.clear()
    task.reseed()
    evaluated = mteb.evaluate(
        encoder,
        task.task,
        cache=cache,
        co2_tracker=False,
        encode_kwargs={"batch_size": encoder.batch_size},
        overwrite_strategy="always" if overwrite else "only-missing",
        show_progress_bar=False,
    )
    lengths, counts = encoder.lengths, encoder.truncated
    truncated = {key: counts[key] for key in ("texts", "decoder", "encoder", "of") if counts}
    record |= {
        "finished": True,
        "seconds": evaluated[0].evaluation_time,
        "resumed": started,  # then the next four are of the rest
        "texts": len(lengths),
        "mean_characters": sum(lengths) / max(1, len(lengths)),
        "max_characters": max(lengths, default=0),
        "truncated": truncated or None,  # of different texts; not known of other models
        **encoder.settings,
        **environment(encoder),
    }
    if rank == 0:
        write_json(file, record)
    return record


def describe_task(task, encoder: MTEBEncoder) -> dict:
    """Everything besides the model that a result depends on."""
    leaf = task.leaves()[0].metadata
    sides = ("query", "document") if task.type in ("Retrieval", "Reranking") else (None,)
    instructions, examples = {}, {}
    for side in sides:
        instructions[side or "text"], fitting = encoder.prompt(leaf, side)
        available = encoder.examples_for(leaf, instructions[side or "text"])
        if available:
            digest = sha256(json.dumps(fitting, sort_keys=True))[:12]
            examples[side or "text"] = {"count": len(fitting or ()), "of": len(available), "digest": digest}
    revisions = [part.metadata.dataset["revision"] for part in task.leaves()]
    return {
        "task": task.name,
        "type": task.type,
        "in_benchmark": task.in_benchmark,
        "main_score": task.task.metadata.main_score,
        "splits": list(task.task.eval_splits),
        "subsets": list(task.task.hf_subsets),
        "data": revisions[0] if len(revisions) == 1 else f"{revisions[0][:6]}{sha256(json.dumps(revisions))[:16]}",
        "instruction": instructions,
        "examples": examples or None,
        "noise": encoder.noise.digest if encoder.noise else None,
    }


def environment(encoder: MTEBEncoder) -> dict:
    """The environment that a result was produced in."""
    import torch

    device = next(encoder.backend.model.parameters()).device
    return {
        "batch_size": encoder.batch_size,
        "processes": ranks()[1],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "commit": git_commit(),
        "python": platform.python_version(),
        **{package: package_version(package) for package in ("mteb", "torch", "transformers", "sentence-transformers")},
    }


def git_commit() -> str | None:
    """The git commit of this code, with `+` if files were changed; None outside a clone."""
    try:
        git = ["git", "-C", str(ROOT)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", "*.py", "instructions.json"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed.strip() else "")


def package_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_settings(output: Path, settings: dict) -> None:
    """Ties a folder to one model in one setting. Raises ValueError if it belongs to another."""
    file = output / "settings.json"
    if file.exists():
        previous = read_json(file)
        differing = [key for key in settings if key != "label" and previous.get(key) != settings[key]]
        if differing:
            raise ValueError(
                f"{output} holds results of another "
                + ", ".join(f"{key} ({previous.get(key)}, now {settings[key]})" for key in differing)
                + ". Use another --output."
            )
    elif any(output.glob("results/*")) or any(output.glob("tasks/*")):
        raise ValueError(f"{output} holds results but no settings.json. Use another --output.")
    if ranks()[0] == 0:
        write_json(file, settings)


def result_cache(output: Path, writes: bool = True):
    """mteb's store of results, with files that are written atomically."""
    from mteb.cache import ResultCache

    class AtomicResultCache(ResultCache):
        def save_to_cache(self, task_result, model_name, model_revision=None, *, encode_kwargs=None) -> None:
            if not writes:
                return
            folder = self.get_task_result_path(task_result.task_name, model_name, model_revision).parent
            with new_files(self.cache_path) as scratch:
                if (folder / "run_settings.jsonl").exists():  # mteb adds to it
                    place = scratch / folder.relative_to(self.cache_path)
                    place.mkdir(parents=True)
                    shutil.copy(folder / "run_settings.jsonl", place)
                ResultCache(scratch).save_to_cache(task_result, model_name, model_revision, encode_kwargs=encode_kwargs)

    output.mkdir(parents=True, exist_ok=True)
    return AtomicResultCache(output)


def wait_for_all() -> None:
    if ranks()[1] > 1:
        import torch.distributed as dist

        dist.barrier()
