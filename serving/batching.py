"""Texts of many clients in the same forward passes, on one thread that has the model to itself.

A job is one request: rows of one instruction. A batch is made of rows with the same prefix, so that instructions are
computed once (`prefix_cache`), up to a number of tokens. Nothing waits for a batch to fill: what comes in while the model
works makes up the next one. Jobs take turns, so that a large one does not hold up small ones. Invariants: vectors equal
those of `encode`, whatever is computed with them; an accepted job is finished or fails, unless its client cancels it.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

import torch
from torch import nn

from prefix_cache import weights_read_once
from runtime_utils import device_of
from tokenization_utils import Row


logger = logging.getLogger(__name__)


class QueueFull(Exception):
    """A job was not taken; `seconds` is how long what waits already will take."""

    def __init__(self, seconds: int):
        super().__init__(f"The queue is full for about {seconds} s.")
        self.seconds = seconds


class Job:
    """
    Rows with a common prefix, one at least, and the future of their unit vectors: an fp32 array `(rows, dim)`.

    Args:
        rows (list of [`Row`]): As `processor.rows` gives them for one instruction.
        dim (`int`): Numbers to keep of each embedding.
    """

    def __init__(self, rows: list[Row], dim: int):
        self.rows, self.dim = rows, dim
        self.prefix_ids = rows[0].prefix_ids
        self.vectors = torch.empty(len(rows), dim)
        self.unfinished = len(rows)
        self.future: Future = Future()
        # Longest first, as they are taken from the end, so that rows of a batch hardly differ.
        self.todo = sorted(range(len(rows)), key=lambda place: len(rows[place].ids))


class Batcher:
    """
    `with Batcher(model) as batcher:` starts the thread, and finishes what was accepted at the end.

    Args:
        model ([`Causal2VecModel`]): In eval mode, and left alone meanwhile.
        batch_size (`int`): Most rows per forward pass.
        max_batch_tokens (`int`): Most decoder tokens per forward pass, padding included, counted as `encode` does.
        max_waiting_tokens (`int`): Most tokens that may wait. A job that is larger is taken when nothing waits.
        on_batch (callable, *optional*): Told the rows and seconds of each forward pass.
    """

    def __init__(
        self,
        model,
        batch_size: int = 128,
        max_batch_tokens: int = 16384,
        max_waiting_tokens: int = 1_000_000,
        on_batch: Callable[[int, float], object] = lambda rows, seconds: None,
    ):
        self.model, self.device = model, device_of(model.get_input_embeddings())
        self.batch_size, self.max_batch_tokens = batch_size, max_batch_tokens
        self.max_waiting_tokens, self.waiting_tokens = max_waiting_tokens, 0
        self.on_batch = on_batch
        cache = model.prefix_cache
        self._count_prefix = not cache.enabled or cache.scan(model).is_offloaded()
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._tokens_per_second = 1000.0  # until it is known
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def __enter__(self) -> "Batcher":
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, job: Job) -> None:
        """
        Takes a job, whose future its client may cancel.

        Raises:
            QueueFull: too much waits already, or the thread is about to end.
        """
        tokens = sum(self._length(job, place) for place in job.todo)
        with self._changed:
            too_many = self.waiting_tokens and self.waiting_tokens + tokens > self.max_waiting_tokens
            if too_many or self._closing:
                raise QueueFull(min(60, math.ceil(self.waiting_tokens / self._tokens_per_second)))
            self.waiting_tokens += tokens
            self._jobs.append(job)
            self._changed.notify()

    def _length(self, job: Job, place: int) -> int:
        return len(job.rows[place].ids) + self._count_prefix * len(job.prefix_ids)

    def _run(self) -> None:
        with weights_read_once():
            while self._step():
                pass

    def _step(self) -> bool:
        """Waits for rows and computes them; `False` when there will be no more."""
        with self._changed:
            while not (batch := self._take()):
                if self._closing:
                    return False
                self._changed.wait()
        try:
            self._compute(batch)
        except Exception as error:  # told to those whose rows they were; others are not concerned
            logger.exception("A batch failed.")
            for job, _ in batch:
                if not job.future.done() and job.future.set_running_or_notify_cancel():
                    job.future.set_exception(error)
        return True

    def _take(self) -> list[tuple[Job, list[int]]]:
        """Which rows of which jobs come next: of the first job, and of others with its prefix as far as there is room."""
        for job in [job for job in self._jobs if job.future.done()]:  # cancelled, or a part of it failed
            self._jobs.remove(job)
            self.waiting_tokens -= sum(self._length(job, place) for place in job.todo)
        batch, rows, longest = [], 0, 0
        for job in [job for job in self._jobs if job.prefix_ids == self._jobs[0].prefix_ids]:
            places = []
            while job.todo and rows < self.batch_size:
                length = self._length(job, job.todo[-1])
                if rows and (rows + 1) * max(longest, length) > self.max_batch_tokens:
                    break
                places.append(job.todo.pop())
                rows, longest = rows + 1, max(longest, length)
                self.waiting_tokens -= length
            if places:
                batch.append((job, places))
                self._jobs.remove(job)
                if job.todo:
                    self._jobs.append(job)  # its next turn comes behind the others'
        return batch

    def _compute(self, batch: list[tuple[Job, list[int]]]) -> None:
        start = time.perf_counter()
        rows = [job.rows[place] for job, places in batch for place in places]
        inputs = self.model.processor.pad(rows, return_prefix_ids=True)
        with torch.inference_mode():
            # A prefix is looked up on the CPU.
            inputs = {name: ids if name == "prefix_ids" else ids.to(self.device) for name, ids in inputs.items()}
            vectors = self.model(**inputs).embeddings.float().cpu()  # (rows, embedding_size)
        seconds, tokens = time.perf_counter() - start, sum(len(row.ids) for row in rows)
        self._tokens_per_second = 0.8 * self._tokens_per_second + 0.2 * tokens / seconds
        self.on_batch(len(rows), seconds)
        for job, places in batch:
            job.vectors[places], vectors = vectors[: len(places), : job.dim], vectors[len(places) :]
            job.unfinished -= len(places)
            if not job.unfinished and job.future.set_running_or_notify_cancel():
                if job.vectors.isfinite().all():
                    job.future.set_result(nn.functional.normalize(job.vectors, dim=-1).numpy())
                else:
                    job.future.set_exception(ArithmeticError("A vector has numbers that are not finite."))
