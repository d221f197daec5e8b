"""Trains a Causal2Vec model: InfoNCE with LoRA or in full, as in the paper's recipes (section 4.1, appendix A).

    python train.py recipes/smollm2-135m.json
    python train.py recipes/smollm2-135m.json --output_dir runs/mine --resume

A recipe is a JSON file of the arguments in training/arguments.py; flags after it override it. Everything around the
loss is transformers' Trainer: logging, checkpoints, resuming, accelerate, FSDP. `output_dir` receives `model/` (a
complete folder for AutoModel), with LoRA also `adapter/` (for PeftModel), `training.json` and `training.png`.
"""

import json
import logging
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from transformers import TrainerCallback, set_seed

from scripts.cli import exit_code
from training.arguments import Causal2VecTrainingArguments, DataArguments, ModelArguments, check_arguments, parse
from training.data import (
    Collator,
    SingleDatasetBatchSampler,
    StreamedBatches,
    TrainingData,
    load_rows,
    read_data_file,
    stream_rows,
)
from training.dev import held_out, load_pack
from training.losses import InfoNCE
from training.model import choose_parameters, keep_base, load_model, name_of_base, scale_projector, whole_model
from training.outputs import describe, save_results, show_batch
from training.trainer import Causal2VecTrainer, MarkComplete, find_checkpoint


logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None, callbacks: Sequence[TrainerCallback] = ()) -> Path:
    """Runs a training, with optional further callbacks; returns the folder of the trained model."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    model_args, data_args, args = parse(sys.argv[1:] if argv is None else argv)
    if args.dry_run:
        model_args.attn_implementation = None  # nothing is computed, and a plan needs no kernels of a GPU's
    check_arguments(model_args, args)
    output = Path(args.output_dir)
    if not args.dry_run:
        return run(model_args, data_args, args, output / "data", find_checkpoint(args), callbacks)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache_dir:  # nothing is left in output_dir
        return run(model_args, data_args, args, cache_dir)


def run(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: Causal2VecTrainingArguments,
    cache_dir: str | Path,
    checkpoint: str | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """
    Caches the data in `cache_dir`, trains from a checkpoint or from the start, and saves; with `--dry_run` only prints
    the plan.
    """
    arguments = {**asdict(model_args), **asdict(data_args), **args.to_dict()}  # as given; some are changed below
    output = Path(args.output_dir)
    set_seed(args.seed)
    data, dev_sets = load_data(data_args, args, cache_dir)
    base = load_model(model_args)
    mini_batch_size = args.per_device_train_batch_size if args.gradcache else None
    rows_per_batch = args.per_device_train_batch_size
    if args.gradcache:
        rows_per_batch, args.gradient_accumulation_steps = rows_per_batch * args.gradient_accumulation_steps, 1
    micro_batches = args.gradient_accumulation_steps * args.world_size
    collator = Collator(base.processor, data_args.train_max_length, args.share_prefix)
    if data_args.streaming:
        batches = StreamedBatches(
            data,
            rows_per_batch,
            micro_batches,
            args.max_steps,
            data_args.shuffle_buffer,
            args.process_index,
            args.world_size,
        )
        first = collator(next(iter(batches)))
    else:
        steps = args.max_steps if args.max_steps > 0 else None
        batches = SingleDatasetBatchSampler(data, rows_per_batch, micro_batches, steps, args.seed)
        if steps is None:  # the sampler makes the batches of all epochs
            batches.num_global_batches = math.ceil(args.num_train_epochs * batches.global_batches_per_epoch)
            args.max_steps = batches.num_global_batches
        first = collator([data[key] for key in next(iter(batches))])
    if model_args.contextual_token_norm is not None and base.projector is not None:
        scale_projector(base, first["documents"], model_args.contextual_token_norm)
    if model_args.model is None and "lora" in (model_args.train_decoder, model_args.train_encoder) and not args.dry_run:
        keep_base(base, output / "base", args, resuming=checkpoint is not None)
    loss = InfoNCE(args.temperature, args.matryoshka_dims, base.config.embedding_size)
    model = choose_parameters(base, model_args)
    plan = describe(model, batches, first, args)
    if args.dry_run:
        print(json.dumps(plan, indent=1))
        print(show_batch(base.processor, first))
        return output
    if not data_args.streaming:
        for dataset in plan["datasets"]:
            logger.info("%(name)s: %(rows_per_epoch)d rows per epoch, %(dropped_per_epoch)d of them dropped", dataset)

    if not dev_sets:
        args.eval_strategy = "no"
    trainer = Causal2VecTrainer(
        model=model,
        args=args,
        train_dataset=batches if data_args.streaming else data,
        eval_dataset=data if dev_sets else None,  # Trainer wants one; evaluate() reads dev_sets
        data_collator=collator,
        loss=loss,
        sampler=None if data_args.streaming else batches,
        dev_sets=dev_sets,
        mini_batch_size=mini_batch_size,
        callbacks=[MarkComplete(), *callbacks],
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    model = whole_model(trainer, model_args)
    if trainer.is_world_process_zero():
        save_results(trainer, model, plan, arguments, name_of_base(model_args, output / "adapter"))
    return output / "model"


def load_data(
    args: DataArguments, training: Causal2VecTrainingArguments, cache_dir: str | Path
) -> tuple[TrainingData, list]:
    """
    The training data, with an Arrow copy in `cache_dir`, and the dev sets.

    Raises:
        ValueError: see `read_data_file` and `load_rows`; or rows cannot be held out of a stream.
    """
    if args.data_file is None:
        raise ValueError("--data_file is missing: a JSON list of datasets, such as recipes/data/bundled.json.")
    if args.streaming and training.max_steps < 1:
        raise ValueError("The length of a stream is not known: --streaming needs --max_steps.")
    if args.streaming and args.dev_rows:
        raise ValueError("--dev_rows cannot be held out of a stream. Use --dev_pack, or leave --streaming out.")
    specs = read_data_file(args.data_file, args.datasets)
    rows, dev_sets = [], []
    for spec in specs:
        if args.streaming:
            rows.append(stream_rows(spec, args.data_dir, args.skip_bad_rows))
            continue
        all_rows = load_rows(spec, args.data_dir, str(cache_dir), args.skip_bad_rows)
        if args.dev_rows:
            all_rows, dev = held_out(all_rows, spec, args.dev_rows, training.seed)
            dev_sets.append(dev)
        rows.append(all_rows)
    if args.dev_pack:
        dev_sets.append(load_pack(args.dev_pack, args.dev_instruction))
    return TrainingData(specs, rows, args.num_negatives, args.max_examples, training.seed), dev_sets


if __name__ == "__main__":
    sys.exit(exit_code("train.py", main, told=()))
