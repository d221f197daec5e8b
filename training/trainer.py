"""
transformers' Trainer with single-dataset batches, InfoNCE, GradCache and checkpoints that are marked when complete.
"""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from transformers import Trainer, TrainerCallback, get_scheduler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, seed_worker

from training.arguments import Causal2VecTrainingArguments
from training.losses import InfoNCE, gradcache_backward, split_by_length


COMPLETE = "complete"  # written into a checkpoint's folder when all of it is on disk


class NonFiniteLoss(FloatingPointError):
    """The loss of a batch is NaN or infinite; the message names the batch."""


class Causal2VecTrainer(Trainer):
    """
    Trainer whose batches come from [`SingleDatasetBatchSampler`] or [`StreamedBatches`] and whose loss is [`InfoNCE`].

    Args:
        loss ([`InfoNCE`]): The loss.
        sampler ([`SingleDatasetBatchSampler`], *optional*): Yields all batches of the run, which Trainer sees as one
            epoch. `None` when `train_dataset` is [`StreamedBatches`].
        dev_sets (list): Scored by `evaluate`, whole embeddings and each of their two states; see training/dev.py.
        mini_batch_size (`int`, *optional*): With GradCache, the number of rows embedded at a time.
    """

    def __init__(self, *args, loss: InfoNCE, sampler, dev_sets=(), mini_batch_size: int | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss, self.sampler, self.dev_sets, self.mini_batch_size = loss, sampler, dev_sets, mini_batch_size
        self.decoder_tokens = 0  # read by this process
        self.model_accepts_loss_kwargs = False  # so that Trainer divides the loss by the accumulation steps
        if self.args.n_gpu > 1:  # DataParallel would cut what all rows share
            raise ValueError(
                "Several GPUs need one process each: accelerate launch train.py ..., see docs/training.md."
            )
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
        queries = model(**inputs["queries"]).embeddings  # (batch, dim)
        documents = model(**inputs["documents"]).embeddings  # (batch + negatives, dim)
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
                return model(**batch).embeddings.float()

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
            sides = [dev.embed(model, batch_size=batch_size) for dev in self.dev_sets]
        scores = [dev.compare(*pair) for dev, pair in zip(self.dev_sets, sides)]
        metrics = {f"{metric_key_prefix}_{dev.name}": score for dev, score in zip(self.dev_sets, scores)}
        metrics[f"{metric_key_prefix}_score"] = mean(scores)
        if model.config.baseline is None and model.config.pooling == "concat":
            for number, name in enumerate(("contextual", "eos")):
                states = [[F.normalize(model.split_states(side)[number], dim=-1) for side in pair] for pair in sides]
                metrics[f"{metric_key_prefix}_{name}"] = mean(
                    dev.compare(*pair) for dev, pair in zip(self.dev_sets, states)
                )
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _read_encoder(self, inputs: dict) -> None:
        """Replaces a frozen encoder's ids by its vectors, computed once in groups of similar length."""
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
    """Marks a checkpoint once Trainer has written all of it, so that a partial one is never resumed from."""

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", COMPLETE).touch()


def last_complete_checkpoint(output_dir: str) -> str | None:
    """The newest complete checkpoint."""
    found = [path.parent for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE}")]
    return str(max(found, key=lambda path: int(path.name.rsplit("-", 1)[1]))) if found else None


def find_checkpoint(args: Causal2VecTrainingArguments) -> str | None:
    """
    The checkpoint that `--resume` continues from, if any.

    Raises:
        ValueError: without `--resume`, the output folder holds another run; with it, a finished model but no complete
            checkpoint.
    """
    checkpoint = last_complete_checkpoint(args.output_dir)
    if args.resume and checkpoint is not None:
        return checkpoint
    left = [
        path.name
        for name in ("model", "adapter", f"{PREFIX_CHECKPOINT_DIR}-*")
        for path in Path(args.output_dir).glob(name)
    ]
    if args.resume and not {"model", "adapter"} & set(left):
        return None
    if left:
        way = "Add --resume, or choose" if checkpoint else "It has no complete checkpoint to --resume from; choose"
        raise ValueError(f"{args.output_dir} holds {', '.join(left)} of another run. {way} another --output_dir.")
    return None


def eval_frozen_towers(model) -> None:
    """Disables dropout in frozen towers, so that a frozen encoder gives the same vectors as at inference."""
    for tower in filter(None, (model.encoder, model.decoder)):  # a PeftModel passes these on
        if not any(parameter.requires_grad for parameter in tower.parameters()):
            tower.eval()


def reads_encoder_once(model) -> bool:
    """Whether each text has one encoder vector that training does not change."""
    if model.encoder is None or model.projector is None or model.projector.queries is not None:
        return False
    return not any(parameter.requires_grad for parameter in model.encoder.parameters())
