"""The output of a run: its plan, a sample batch, model, adapter, facts and curve."""

import math
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers.dynamic_module_utils import custom_object_save

from evaluation.plots import new_figure, save_figure
from modeling_causal2vec import Causal2VecModel
from saving_utils import SHIPPED_CODE, write_json, write_sentence_transformers_files
from training.card import without_machine_paths, write_card
from training.data import SingleDatasetBatchSampler, StreamedBatches
from training.trainer import Causal2VecTrainer


ROOT = Path(__file__).resolve().parent.parent


def describe(model, batches: SingleDatasetBatchSampler | StreamedBatches, batch: dict, training) -> dict:
    """The plan of a run: data, batches, steps, parameters, and an estimate of tokens and memory from one batch."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parts = {name: part for name in ("encoder", "projector", "decoder") if (part := getattr(model, name)) is not None}
    counted = isinstance(batches, SingleDatasetBatchSampler)
    plan = {"datasets": []}
    for index, spec in enumerate(batches.data.specs):
        fields = ("name", "path", "sample_ratio", "instructions", "license")
        dataset = {field: getattr(spec, field) for field in fields}
        if counted:
            dataset["rows"] = len(batches.data.rows[index])
            dataset["rows_per_epoch"] = batches.rows_per_epoch[index]
            dataset["dropped_per_epoch"] = batches.dropped[spec.name]
        plan["datasets"].append(dataset)
    return plan | {
        "streaming": not counted,
        "global_batch_size": batches.global_batch_size,
        "rows_per_forward": training.per_device_train_batch_size,
        "steps": batches.num_global_batches,
        "steps_per_epoch": batches.global_batches_per_epoch if counted else None,
        "trainable_parameters": {
            name: sum(p.numel() for p in part.parameters() if p.requires_grad) for name, part in parts.items()
        },
        "parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()},
        "estimated_decoder_tokens": batch["decoder_tokens"] * batches.num_global_batches * batches.micro_batches,
        # weights, and for what is trained also a gradient and AdamW's two moments
        "estimated_gigabytes_without_activations": round(
            (sum(p.numel() * p.element_size() for p in model.parameters()) + 12 * trainable) / 1e9, 3
        ),
    }


def show_batch(processor, batch: dict, rows: int = 2) -> str:
    """The first rows of a collated batch, decoded back to text."""
    lines = [f"dataset {batch['dataset']}, rows {batch['rows'][:rows]} ..."]
    for side in ("queries", "documents"):
        for row in zip(*(batch[side][name][:rows] for name in processor.model_input_names)):
            for reader, tokenizer, ids, mask in zip(
                ("decoder", "encoder"), (processor.tokenizer, processor.encoder_tokenizer), row[::2], row[1::2]
            ):
                ids = ids[mask.bool()]
                if reader == "decoder" and "prefix_ids" in batch[side]:
                    ids = torch.cat([batch[side]["prefix_ids"][0], ids])
                lines.append(f"{side} {reader}: {tokenizer.decode(ids)}")
    return "\n".join(lines)


def plot(log: list[dict], path: Path) -> None:
    """Plots loss, learning rate and dev score over steps."""
    panels = [("loss", "training loss"), ("learning_rate", "learning rate"), ("eval_score", "dev score")]
    panels = [(key, label) for key, label in panels if any(key in entry for entry in log)] or panels[:1]
    figure, axes = new_figure(7, 2.2 * len(panels), nrows=len(panels), sharex=True, squeeze=False)
    for axis, (key, label) in zip(axes[:, 0], panels):
        points = [(entry["step"], float(entry[key])) for entry in log if key in entry]
        axis.plot(*zip(*points or [(0, math.nan)]), marker="." if key == "eval_score" else None, linewidth=1.2)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[-1, 0].set_xlabel("step")
    save_figure(figure, path)


def save_results(trainer: Causal2VecTrainer, model, plan: dict, arguments: dict, base: str | None) -> None:
    """Writes the model folder, the adapter (with base `base`) if there is one, and the run's facts and curve."""
    output, log = Path(trainer.args.output_dir), trainer.state.log_history
    facts = {
        "arguments": without_machine_paths(arguments),
        "plan": without_machine_paths(plan),
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
        "final_loss": next((entry["loss"] for entry in reversed(log) if "loss" in entry), math.nan),
        "decoder_tokens_per_second": tokens_per_second(trainer),
        "peak_gigabytes": peak_gigabytes(),
        "log": log,
    }
    write_json(output / "training.json", facts)
    plot(log, output / "training.png")

    if hasattr(model, "merge_and_unload"):
        model.peft_config["default"].base_model_name_or_path = base
        save_folder(
            partial(model.save_pretrained, save_embedding_layers=False),
            model.get_base_model(),
            output / "adapter",
            facts,
        )
        model = model.merge_and_unload()
    save_folder(model.save_pretrained, model, output / "model", facts)


def tokens_per_second(trainer: Causal2VecTrainer) -> float | None:
    """Decoder tokens per second over all processes, since the run was started or resumed."""
    seconds = next(
        (entry["train_runtime"] for entry in reversed(trainer.state.log_history) if "train_runtime" in entry), 0
    )
    return round(trainer.decoder_tokens * trainer.args.world_size / seconds, 1) if seconds else None


def peak_gigabytes() -> float | None:
    """Peak memory of this process on the accelerator, or without one in RAM (not on Windows)."""
    if torch.accelerator.is_available():
        return round(torch.accelerator.max_memory_allocated() / 1e9, 2)
    try:
        import resource
    except ImportError:
        return None
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6), 2)


def save_folder(save: Callable[[Path], None], model: Causal2VecModel, folder: Path, facts: dict) -> None:
    """
    Saves a model, or with `save` its adapter, with everything needed to load it elsewhere: code, configuration,
    tokenizers, sentence-transformers' files, instructions, card and the run's facts. The folder appears only once it is
    complete.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    save(temporary)
    custom_object_save(model, temporary, model.config)  # an adapter's folder names the model's class, too
    model.config.save_pretrained(temporary)
    model.processor.save_pretrained(temporary)
    write_sentence_transformers_files(temporary, model.config)
    for name in (*SHIPPED_CODE, "instructions.json"):
        shutil.copyfile(ROOT / name, temporary / name)
    for name in ("training.json", "training.png"):
        shutil.copyfile(folder.parent / name, temporary / name)
    write_card(temporary, facts, model, name=f"{folder.parent.name} ({folder.name})")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
