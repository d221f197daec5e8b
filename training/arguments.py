"""The arguments of a training run: three dataclasses, read from flags, or from a recipe and the flags after it."""

import logging
from argparse import ArgumentError
from dataclasses import dataclass, field
from typing import get_args, get_origin, get_type_hints

import torch
from transformers import HfArgumentParser, TrainingArguments

from configuration_causal2vec import BASELINES
from saving_utils import is_hub_id, read_json


logger = logging.getLogger(__name__)

TRAINED = ("lora", "full", "frozen")  # the ways to train a tower


@dataclass
class ModelArguments:
    """The model, and which of its parameters are trained."""

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
    template_prefix: str | None = field(
        default=None, metadata={"help": "Template before the instruction. Default: the decoder's."}
    )
    template_suffix: str | None = field(
        default=None, metadata={"help": "Template after the text. Default: the decoder's."}
    )
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
    contextual_token_norm: float | None = field(
        default=None,
        metadata={
            "help": "Scale a new projector so that Contextual tokens start at this many times the norm of the decoder's "
            "word embeddings. Default: not scaled. Without --model. Not read where there is no projector."
        },
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
    share_prefix: bool = field(
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


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, Causal2VecTrainingArguments]:
    """
    Reads arguments from flags, or from a recipe and the flags after it.

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
    The arguments in a recipe, checked and converted like flags of the same names.

    Raises:
        ValueError: the recipe is not a JSON object, or has an unknown key or an invalid value.
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
    Checks whatever can be checked without reading files.

    Raises:
        ValueError: arguments contradict each other, or the launcher could not save the result.
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
