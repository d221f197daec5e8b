"""Trains a Causal2Vec model: InfoNCE with LoRA or in full, as in the paper's recipes (section 4.1, appendix A).

    python train.py recipes/smollm2-135m.json
    python train.py recipes/smollm2-135m.json --output_dir runs/mine --resume

A recipe is a JSON file of the arguments below; flags behind it win over it. Everything around the loss is transformers'
Trainer: logging, checkpoints, resuming, accelerate, FSDP. Left in `output_dir`: `model/` (a complete folder that loads
with AutoModel), with LoRA also `adapter/` (for PeftModel), `training.json` and `training.png`.
"""

import json
import logging
import math
import os
import shutil
import sys
import tempfile
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import torch
from transformers import (
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
    set_seed,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, seed_worker

from card import without_machine_paths, write_card
from configuration_causal2vec import BASELINES, WITHOUT_ENCODER
from data import (
    Collator,
    SingleDatasetBatchSampler,
    StreamedBatches,
    TrainingData,
    load_rows,
    read_data_file,
    read_json,
    stream_rows,
)
from eval_report import write_json
from losses import InfoNCE, gradcache_backward, split_by_length
from modeling_causal2vec import Causal2VecModel
from runtime_utils import has_fast_bfloat16
from saving_utils import SHIPPED_CODE, is_hub_id, write_sentence_transformers_files


logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent
TRAINED = ("lora", "full", "frozen")  # the ways to train a tower
COMPLETE = "complete"  # written into a checkpoint's folder when all of it is on disk


@dataclass
class ModelArguments:
    """Which model is trained, and which of its parameters."""

    model: str | None = field(default=None, metadata={"help": "Causal2Vec folder or Hub id to go on from."})
    encoder: str | None = field(default=None, metadata={"help": "Without --model: encoder to join, folder or Hub id."})
    decoder: str | None = field(default=None, metadata={"help": "Without --model: decoder to join, folder or Hub id."})
    decoder_gguf_file: str | None = field(
        default=None, metadata={"help": "Name of a GGUF file in --decoder to read it from. Needs the package gguf."}
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Of frozen weights; what is trained is kept in float32.",
            "choices": ["float32", "bfloat16", "float16"],
        },
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, flash_attention_2, eager, ..."})
    train_decoder: str = field(default="lora", metadata={"help": "lora, full or frozen.", "choices": TRAINED})
    train_encoder: str = field(default="frozen", metadata={"help": "lora, full or frozen.", "choices": TRAINED})
    lora_r: int = field(default=64, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=128, metadata={"help": "LoRA alpha."})
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout."})
    base_id: str | None = field(
        default=None,
        metadata={
            "help": "Hub id under which the model that LoRA adapts will be published, for adapter/ to name. Default: where "
            "it is, seen from adapter/."
        },
    )
    prompt_head: str | None = field(
        default=None, metadata={"help": "Template before the instruction. Default: the decoder's."}
    )
    prompt_tail: str | None = field(default=None, metadata={"help": "Template after the text. Default: the decoder's."})
    text_prefix: str = field(default="", metadata={"help": "What the encoder expects before every text."})
    query_instruction: str | None = field(default=None, metadata={"help": "encode_query's default instruction."})
    max_seq_length: int | None = field(
        default=None, metadata={"help": "The model's limit of the decoder's sequence. Default: 512 or what it has."}
    )
    icl_max_seq_length: int | None = field(
        default=None, metadata={"help": "The same with in-context examples. Default: 2048 or what it has."}
    )
    encoder_max_seq_length: int | None = field(
        default=None,
        metadata={"help": "The model's limit of the encoder's sequence. Default: 512 or what the encoder has."},
    )

    pooling: str | None = field(
        default=None,
        metadata={
            "help": "What an embedding is made of: concat (default), average, eos, eos_encoder. Without --model."
        },
    )
    contextual_position: str | None = field(
        default=None, metadata={"help": "after_instruction (default) or before_instruction. Without --model."}
    )
    num_contextual_tokens: int | None = field(
        default=None, metadata={"help": "Contextual tokens; several by cross-attention. Default: 1. Without --model."}
    )
    bidirectional: bool = field(
        default=False, metadata={"help": "Let the decoder's attention look both ways. Without --model."}
    )
    baseline: str | None = field(
        default=None,
        metadata={
            "help": "Train one of the paper's baselines instead: last_token, embedding_concat, token_prepending. Without "
            "--model. Where it has no encoder, --encoder is not read.",
            "choices": BASELINES,
        },
    )


@dataclass
class DataArguments:
    """What it is trained on."""

    data_file: str | None = field(default=None, metadata={"help": "JSON list of datasets, see recipes/data/."})
    data_dir: str = field(
        default=".", metadata={"help": "Folder that the data file's paths are relative to, where they are not here."}
    )
    datasets: list[str] | None = field(default=None, metadata={"help": "Names in the data file to use. Default: all."})
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "Count and leave out rows that cannot be used instead of stopping."}
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read rows as they are needed and keep no copy on disk; sample_ratio then weighs datasets."},
    )
    shuffle_buffer: int = field(default=10_000, metadata={"help": "Rows per dataset to draw from in streaming."})
    num_negatives: int = field(default=1, metadata={"help": "Hard negatives per row, as far as it has them."})
    max_examples: int = field(default=0, metadata={"help": "In-context examples per query: 0 to this many, at random."})
    train_max_length: int | None = field(
        default=None,
        metadata={
            "help": "Decoder tokens per row in training, but for queries with examples, whose limit is the model's "
            "icl_max_seq_length. Default: the model's limit."
        },
    )
    dev_rows: int = field(default=0, metadata={"help": "Rows per dataset to hold out for the dev score (nDCG@10)."})
    dev_pack: str | None = field(
        default=None, metadata={"help": "Folder of an STS or retrieval pack in mteb's layout as dev set."}
    )
    dev_instruction: str | None = field(default=None, metadata={"help": "Instruction for dev_pack."})


@dataclass
class Causal2VecTrainingArguments(TrainingArguments):
    """How it is trained: transformers' own arguments, the loss's, and this script's."""

    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of AdamW."})
    warmup_steps: float = field(default=300, metadata={"help": "Steps to the peak."})
    max_steps: int = field(
        default=1000, metadata={"help": "Optimizer steps; training stops here. -1: as --num_train_epochs says."}
    )
    scheduler_steps: int | None = field(
        default=None,
        metadata={"help": "Step at which the linear decay reaches zero. Default: max_steps; the paper: twice that."},
    )
    temperature: float = field(default=0.05, metadata={"help": "Of InfoNCE."})
    gradcache: bool = field(
        default=False,
        metadata={
            "help": "All rows of a global batch are negatives of each other: the accumulation steps become mini-batches of one batch."
        },
    )
    share_heads: bool = field(
        default=True,
        metadata={
            "help": "Rows of a batch with the same instruction read it once; gradients are the same. Without effect under gradient checkpointing or dropout."
        },
    )
    matryoshka_dims: list[int] | None = field(
        default=None, metadata={"help": "Embedding sizes at which the loss is taken too."}
    )
    resume: bool = field(
        default=False, metadata={"help": "Go on from the last complete checkpoint in output_dir, if any."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Print the plan and one batch, train nothing."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Kept for Trainer; batches are nested."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between log entries."})
    save_steps: float = field(default=100, metadata={"help": "Steps between checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    report_to: None | str | list[str] = field(
        default="tensorboard", metadata={"help": "Where logs go besides training.json."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Kept off: a loss that is not finite stops the run."}
    )


ARGUMENTS = (ModelArguments, DataArguments, Causal2VecTrainingArguments)


class NonFiniteLoss(FloatingPointError):
    """The loss of a batch is NaN or infinite; the message names the batch."""


class Causal2VecTrainer(Trainer):
    """
    Trainer whose batches come from [`SingleDatasetBatchSampler`] or [`StreamedBatches`] and whose loss is [`InfoNCE`].

    Args:
        loss ([`InfoNCE`]): The loss.
        sampler ([`SingleDatasetBatchSampler`], *optional*): Makes all batches of the run, so that a run is one epoch to
            Trainer. `None` when `train_dataset` is [`StreamedBatches`].
        dev_sets (list): Objects with a `name` and `score(model)`; see dev.py.
        mini_batch_size (`int`, *optional*): With GradCache, the rows embedded at a time.
    """

    def __init__(self, *args, loss: InfoNCE, sampler, dev_sets=(), mini_batch_size: int | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss, self.sampler, self.dev_sets, self.mini_batch_size = loss, sampler, dev_sets, mini_batch_size
        self.decoder_tokens = 0  # read by this process
        self.model_accepts_loss_kwargs = False  # so that Trainer divides the loss by the accumulation steps
        if self.is_fsdp_enabled:
            if not self.accelerator.is_fsdp2:
                raise ValueError("FSDP must be of version 2 (fsdp_version), as in recipes/accelerate/fsdp.yaml.")
            self.model.prefix_cache.max_bytes = 0  # it would not notice that weights change which are sharded

    def get_train_dataloader(self):
        streamed, args = self.sampler is None, self.args
        # All that TrainingArguments has for a loader but `drop_last`: there are no incomplete batches.
        names = "num_workers pin_memory persistent_workers prefetch_factor multiprocessing_context in_order".split()
        options = {name: getattr(args, f"dataloader_{name}") for name in names if hasattr(args, f"dataloader_{name}")}
        loader = torch.utils.data.DataLoader(
            self.train_dataset,
            batch_sampler=self.sampler,
            **({"batch_size": None} if streamed else {}),
            collate_fn=self.data_collator,
            worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
            **options,
        )
        # A stream already gives each rank its own batches.
        return loader if streamed else self.accelerator.prepare(loader)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is None:
            self.lr_scheduler = get_scheduler(
                self.args.lr_scheduler_type,
                optimizer=optimizer or self.optimizer,
                num_warmup_steps=self.args.get_warmup_steps(num_training_steps),
                num_training_steps=self.args.scheduler_steps or num_training_steps,
                scheduler_specific_kwargs=self.args.lr_scheduler_kwargs,
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        eval_frozen_towers(self.model)
        self._read_encoder(inputs)
        share = self.args.share_heads
        queries = model(**inputs["queries"], share_heads=share).embeddings  # (batch, dim)
        documents = model(**inputs["documents"], share_heads=share).embeddings  # (batch + negatives, dim)
        loss = self._loss(queries, documents, inputs)
        return (loss, {"queries": queries, "documents": documents}) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.decoder_tokens += inputs["decoder_tokens"]
        if self.mini_batch_size is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        eval_frozen_towers(self.model)
        inputs = self._prepare_inputs(inputs)
        self._read_encoder(inputs)

        def embed(batch: dict) -> torch.Tensor:
            with self.compute_loss_context_manager():
                return model(**batch, share_heads=self.args.share_heads).embeddings.float()

        def loss_from(embeddings):
            queries, documents = (rows[order] for rows, order in zip(embeddings, orders))
            return self._loss(queries, documents, inputs)

        sides = (inputs["queries"], inputs["documents"])
        groups, orders = zip(*(split_by_length(side, self.mini_batch_size) for side in sides))
        return gradcache_backward(
            embed, loss_from, groups, self.accelerator.backward, lambda: self.accelerator.no_sync(model)
        )

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        model = self.accelerator.unwrap_model(self.model)  # a PeftModel passes `encode` on
        if self.is_fsdp_enabled and "encode" not in vars(model):  # which then gathers what `forward` gathers
            torch.distributed.fsdp.register_fsdp_forward_method(model, "encode")
        batch_size = self.args.per_device_eval_batch_size
        # What is trained is float32; beside frozen weights of another dtype it is so only under autocast, as in training.
        mixed = len({weight.dtype for weight in model.parameters()}) > 1
        with self.accelerator.autocast() if mixed else nullcontext():
            scores = {dev.name: dev.score(model, batch_size=batch_size) for dev in self.dev_sets}
        metrics = {f"{metric_key_prefix}_{name}": score for name, score in scores.items()}
        metrics[f"{metric_key_prefix}_score"] = sum(scores.values()) / len(scores)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _read_encoder(self, inputs: dict) -> None:
        """Puts a frozen encoder's vectors in the place of its ids: it is read once, in rows of like length."""
        model = self.accelerator.unwrap_model(self.model)  # a PeftModel passes what is asked of it on
        if not reads_encoder_once(model) or self.is_fsdp_enabled:
            return
        for side in ("queries", "documents"):
            names = ("encoder_ids", "encoder_attention_mask")
            texts = dict(zip(("input_ids", "attention_mask"), (inputs[side].pop(name) for name in names)))
            parts, order = split_by_length(texts, self.mini_batch_size or self.args.per_device_train_batch_size)
            with self.accelerator.autocast():
                vectors = torch.cat([model.get_encoder_embedding(*part.values()) for part in parts])
            inputs[side]["encoder_embedding"] = vectors[order]  # (rows, encoder_hidden_size)

    def _loss(self, queries: torch.Tensor, documents: torch.Tensor, inputs: dict) -> torch.Tensor:
        """
        Raises:
            NonFiniteLoss: it is NaN or infinite.
        """
        loss = self.loss(queries, documents, inputs["query_ids"], inputs["document_ids"])
        if not torch.isfinite(loss):
            raise NonFiniteLoss(
                f"Loss is {loss.item()} at step {self.state.global_step} on dataset {inputs['dataset']!r}, rows "
                f"{inputs['rows']}. The last checkpoint stands; look at these rows, or lower the learning rate."
            )
        return loss


class MarkComplete(TrainerCallback):
    """Marks a checkpoint when Trainer has written all of it, so that a half-written one is never resumed from."""

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", COMPLETE).touch()


def last_complete_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint that was written to its end."""
    found = [path.parent for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE}")]
    return str(max(found, key=lambda path: int(path.name.rsplit("-", 1)[1]))) if found else None


def find_checkpoint(args: Causal2VecTrainingArguments) -> str | None:
    """
    The checkpoint that `--resume` goes on from, if there is one.

    Raises:
        ValueError: without `--resume`, the output folder holds what another run left.
    """
    if args.resume:
        return last_complete_checkpoint(args.output_dir)
    left = [
        path.name
        for name in ("model", "adapter", f"{PREFIX_CHECKPOINT_DIR}-*")
        for path in Path(args.output_dir).glob(name)
    ]
    if left:
        raise ValueError(
            f"{args.output_dir} holds {', '.join(left)} of another run. Add --resume, or choose another --output_dir."
        )
    return None


def eval_frozen_towers(model) -> None:
    """Switches dropout off where nothing is trained: a frozen encoder gives the vectors it will give later."""
    for tower in filter(None, (model.encoder, model.decoder)):  # a PeftModel passes these on
        if not any(parameter.requires_grad for parameter in tower.parameters()):
            tower.eval()


def reads_encoder_once(model) -> bool:
    """Whether the encoder gives each text one vector that no step of training changes."""
    if model.encoder is None or model.projector is None or model.projector.queries is not None:
        return False
    return not any(parameter.requires_grad for parameter in model.encoder.parameters())


def load_model(args: ModelArguments) -> Causal2VecModel:
    """
    The model to train, all weights in `args.dtype`.

    Raises:
        ValueError: neither a model nor both backbones are named, or both are; or a model is to change what it is.
    """
    has_encoder = args.baseline not in WITHOUT_ENCODER
    encoder = args.encoder if has_encoder else None
    backbones = [encoder, args.decoder] if has_encoder else [args.decoder]
    if any(backbones) if args.model is not None else None in backbones:
        raise ValueError("Give either --model, or both --encoder and --decoder.")
    names = ("baseline", "pooling", "contextual_position", "num_contextual_tokens", "bidirectional")
    names += ("prompt_head", "prompt_tail", "query_instruction", "text_prefix")
    names += ("max_seq_length", "icl_max_seq_length", "encoder_max_seq_length")
    changed = [name for name in (*names, "decoder_gguf_file") if getattr(args, name) not in (None, False, "")]
    if args.model is not None and changed:
        raise ValueError(f"With --model, what the model is stays as it is; leave out --{' --'.join(changed)}.")
    attention = {} if args.attn_implementation is None else {"attn_implementation": args.attn_implementation}
    if args.model is not None:
        model = Causal2VecModel.from_pretrained(args.model, dtype=args.dtype, **attention)
    else:
        settings = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
        gguf = {} if args.decoder_gguf_file is None else {"gguf_file": args.decoder_gguf_file}
        model = Causal2VecModel.from_encoder_decoder_pretrained(
            encoder,
            args.decoder,
            dtype=args.dtype,
            encoder_kwargs=attention,
            decoder_kwargs=attention | gguf,
            **settings,
        )
    return model


def choose_parameters(model: Causal2VecModel, args: ModelArguments):
    """
    Freezes what is not trained, adds LoRA where asked, and keeps what is trained in float32.

    Returns:
        The model, or a PeftModel around it.

    Raises:
        ValueError: one tower is to be trained with LoRA and the other in full, an encoder that is not there, or in a way
            that there is none of.
    """
    towers = {"encoder": args.train_encoder, "decoder": args.train_decoder}
    if model.encoder is None and towers.pop("encoder") != "frozen":
        raise ValueError(f"--train_encoder must be frozen: the baseline {model.config.baseline!r} has no encoder.")
    for tower, how in towers.items():
        if how not in TRAINED:
            raise ValueError(f"--train_{tower} must be one of {TRAINED}, got {how!r}.")
    if set(towers.values()) >= {"lora", "full"}:
        raise ValueError("LoRA on one tower and full training of the other cannot be combined; choose one for both.")
    if "lora" in towers.values():
        from peft import LoraConfig, get_peft_model

        targets = [lora_targets(model, tower) for tower, how in towers.items() if how == "lora"]
        config = LoraConfig(
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules="|".join(targets),
            modules_to_save=None if model.projector is None else ["projector"],
        )
        model = get_peft_model(model, config)
    else:
        for tower, how in towers.items():
            getattr(model, tower).requires_grad_(how == "full")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def lora_targets(model: Causal2VecModel, tower: str) -> str:
    """A pattern for all linear layers of one tower and nothing else."""
    names = {
        name.rsplit(".", 1)[-1]
        for name, module in getattr(model, tower).named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    return rf"{tower}\.(.*\.)?({'|'.join(sorted(names))})"


def load_data(
    args: DataArguments, training: Causal2VecTrainingArguments, cache_dir: str | Path
) -> tuple[TrainingData, list]:
    """
    The training data, of which an Arrow copy is kept in `cache_dir`, and the dev sets.

    Raises:
        ValueError: see `read_data_file` and `load_rows`; or rows are to be held out of a stream.
    """
    from dev import held_out, load_pack

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


def keep_base(model: Causal2VecModel, folder: Path, args: Causal2VecTrainingArguments, resuming: bool) -> None:
    """Saves newly joined backbones, by one process, so that an adapter has a base model to name."""
    with args.main_process_first(local=False, desc="saving the base model"):
        if args.process_index == 0 and not (resuming and (folder / "config.json").exists()):
            model.save_pretrained(folder)
    model.name_or_path = model.config.name_or_path = str(folder.resolve())  # which checkpoints name


def name_of_base(args: ModelArguments, adapter: Path) -> str | None:
    """How an adapter names the model that it was made for: by its Hub id, or by the way there from the adapter's folder."""
    base = adapter.with_name("base") if args.model is None else Path(args.model)
    if args.base_id is not None or not base.exists():
        return args.base_id or args.model
    return Path(os.path.relpath(base.resolve(), adapter.resolve())).as_posix()


def describe(model, batches: SingleDatasetBatchSampler | StreamedBatches, batch: dict, training) -> dict:
    """The plan of a run: data, batches, steps, parameters, and tokens and memory as estimated from one batch."""
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
                lines.append(f"{side} {reader}: {tokenizer.decode(ids[mask.bool()])}")
    return "\n".join(lines)


def plot(log: list[dict], path: Path) -> None:
    """Draws loss, learning rate and dev score over steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [("loss", "training loss"), ("learning_rate", "learning rate"), ("eval_score", "dev score")]
    panels = [(key, label) for key, label in panels if any(key in entry for entry in log)] or panels[:1]
    figure, axes = plt.subplots(len(panels), 1, figsize=(7, 2.2 * len(panels)), sharex=True, squeeze=False)
    for axis, (key, label) in zip(axes[:, 0], panels):
        points = [(entry["step"], float(entry[key])) for entry in log if key in entry]
        axis.plot(*zip(*points or [(0, math.nan)]), marker="." if key == "eval_score" else None, linewidth=1.2)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[-1, 0].set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, Causal2VecTrainingArguments]:
    """
    Arguments from flags, or from a recipe and the flags behind it.

    Raises:
        ValueError: see `read_recipe`.
    """
    parser = HfArgumentParser(ARGUMENTS)
    parser.set_defaults(use_cpu=not torch.accelerator.is_available())  # bf16 on a CPU has to be asked for
    if argv and argv[0].endswith(".json"):
        parser.set_defaults(**read_recipe(argv[0]))
        argv = argv[1:]
    return parser.parse_args_into_dataclasses(argv)


def read_recipe(path: str) -> dict:
    """
    The arguments in a recipe, checked and converted as the flags of their names are.

    Raises:
        ValueError: the recipe is no JSON object, has an unknown key, or a value that its argument cannot have.
    """
    recipe = read_json(path)
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} must hold an object of arguments, got {type(recipe).__name__}.")
    hints = {name: hint for arguments in ARGUMENTS for name, hint in get_type_hints(arguments).items()}
    if unknown := sorted(set(recipe) - set(hints)):
        raise ValueError(f"{path}: unknown arguments {unknown}; see python train.py --help.")
    parser = HfArgumentParser(ARGUMENTS, exit_on_error=False)

    def as_flag(name: str, value):
        try:
            return getattr(parser.parse_args([f"--{name}={value}"]), name)
        except ArgumentError as error:
            raise ValueError(f"{path}: {error}") from None

    values = {}
    for name, value in recipe.items():
        kinds = {get_origin(kind) or kind for kind in (hints[name], *get_args(hints[name]))}
        if isinstance(value, list) and list in kinds and str not in kinds:
            values[name] = [item for part in value for item in as_flag(name, part)]
        elif value is not None and not isinstance(value, list | dict):
            values[name] = as_flag(name, value)
        elif type(value) in kinds:  # what no flag can say
            values[name] = value
        else:
            raise ValueError(f"{path}: `{name}` cannot be {value!r}; see python train.py --help.")
    return values


def check_arguments(model_args: ModelArguments, args: Causal2VecTrainingArguments) -> None:
    """
    Looks at what needs no file.

    Raises:
        ValueError: arguments that do not go together, or a way to run that cannot be saved.
    """
    if model_args.dtype != "float32" and not (args.bf16 or args.fp16):
        raise ValueError(
            f"--dtype {model_args.dtype} needs --bf16 true (or --fp16 true): what is trained stays in float32, and only "
            "autocast lets it read the other weights."
        )
    if model_args.base_id is not None and not is_hub_id(model_args.base_id):
        raise ValueError(f"--base_id must be a Hub id such as user/name, got {model_args.base_id!r}.")
    if args.deepspeed_plugin is not None:
        raise ValueError("DeepSpeed is not supported. To shard a model, use FSDP: recipes/accelerate/fsdp.yaml.")
    if args.device.type == "cpu" and "flash" in (model_args.attn_implementation or ""):
        raise ValueError(f"{model_args.attn_implementation} needs a GPU. Without one, add --attn_implementation sdpa.")
    if args.device.type == "cpu" and (args.bf16 or model_args.dtype == "bfloat16") and not has_fast_bfloat16():
        logger.warning(
            "This CPU has no instructions for bfloat16: float32, without --bf16 and --dtype, is about 100 times as fast."
        )


def main(argv: list[str] | None = None, callbacks: Sequence[TrainerCallback] = ()) -> Path:
    """Runs a training, with further callbacks if wanted; returns the folder of the trained model."""
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
    """Reads the data into `cache_dir`, trains from a checkpoint or from the start, and saves; or only prints the plan."""
    arguments = {**asdict(model_args), **asdict(data_args), **args.to_dict()}  # as given; some are changed below
    output = Path(args.output_dir)
    set_seed(args.seed)
    data, dev_sets = load_data(data_args, args, cache_dir)
    base = load_model(model_args)
    if model_args.model is None and "lora" in (model_args.train_decoder, model_args.train_encoder) and not args.dry_run:
        keep_base(base, output / "base", args, resuming=checkpoint is not None)
    model = choose_parameters(base, model_args)
    mini_batch_size = args.per_device_train_batch_size if args.gradcache else None
    rows_per_batch = args.per_device_train_batch_size
    if args.gradcache:
        rows_per_batch, args.gradient_accumulation_steps = rows_per_batch * args.gradient_accumulation_steps, 1
    micro_batches = args.gradient_accumulation_steps * args.world_size
    collator = Collator(base.processor, data_args.train_max_length)
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
        loss=InfoNCE(args.temperature, args.matryoshka_dims, base.config.embedding_size),
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


def whole_model(trainer: Causal2VecTrainer, args: ModelArguments):
    """
    The trained model or PeftModel. Under FSDP each process holds a part of it: all of them must call this, and the first
    gets a new one with the weights of all.
    """
    if not trainer.is_fsdp_enabled:
        return trainer.accelerator.unwrap_model(trainer.model)
    weights = trainer.accelerator.get_state_dict(trainer.model)
    if not trainer.is_world_process_zero():
        return None
    model = choose_parameters(load_model(args), args)
    model.load_state_dict(weights)
    return model


def save_results(trainer: Causal2VecTrainer, model, plan: dict, arguments: dict, base: str | None) -> None:
    """Writes the model folder, the adapter (which names `base`) if there is one, and the run's facts and curve."""
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
    """Decoder tokens that all processes have read per second, since the run was started or resumed."""
    seconds = next(
        (entry["train_runtime"] for entry in reversed(trainer.state.log_history) if "train_runtime" in entry), 0
    )
    return round(trainer.decoder_tokens * trainer.args.world_size / seconds, 1) if seconds else None


def peak_gigabytes() -> float | None:
    """The most memory that this process has had: the accelerator's, or without one the processor's (not on Windows)."""
    if torch.accelerator.is_available():
        return round(torch.accelerator.max_memory_allocated() / 1e9, 2)
    try:
        import resource
    except ImportError:
        return None
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6), 2)


def save_folder(save: Callable[[Path], None], model: Causal2VecModel, folder: Path, facts: dict) -> None:
    """
    Saves a model, or by `save` its adapter, with all that a stranger needs: code, configuration, tokenizers, what
    sentence-transformers reads, instructions, card and the run's facts. The folder appears under its name only when it is
    complete.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    save(temporary)
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


if __name__ == "__main__":
    main()
