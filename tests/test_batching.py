"""The batcher by itself: its vectors are `encode`'s, and who waits for whom."""

import threading
from concurrent.futures import CancelledError

import numpy as np
import pytest
import torch
from conftest import TEXTS

from serving.batching import Batcher, Job, QueueFull


class GatedModel:
    """A model whose forward passes wait until `open` is set; they tell the sizes of their batches, or fail as asked."""

    def __init__(self, model, is_open: bool = True):
        self.model, self.open, self.entered = model, threading.Event(), threading.Event()
        self.batches, self.fails = [], []
        if is_open:
            self.open.set()

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, input_ids, **kwargs):
        self.entered.set()
        assert self.open.wait(60)
        self.batches.append(tuple(input_ids.shape))
        if self.fails and (failure := self.fails.pop()):
            raise failure
        return self.model(input_ids=input_ids, **kwargs)


def make_job(model, texts, instruction=None, dim=None) -> Job:
    return Job(model.processor.rows(texts, instruction), dim or model.config.embedding_size)


def start_one(batcher: Batcher, model: GatedModel) -> Job:
    """A job that the model is busy with, so that what is submitted now waits."""
    first = make_job(model, ["first"])
    batcher.submit(first)
    assert model.entered.wait(60)
    return first


def test_vectors_are_those_of_encode(tiny_model):
    asked = [
        (
            TEXTS[number % 6 : 6][: 1 + number % 4] or TEXTS[:1],
            [None, "", "Find similar text", "Classify"][number % 4],
            64 - number,
        )
        for number in range(40)
    ]
    model = GatedModel(tiny_model, is_open=False)
    with Batcher(model, batch_size=8, max_batch_tokens=300) as batcher:
        jobs = [make_job(model, *arguments) for arguments in asked]
        for job in jobs:
            batcher.submit(job)
        model.open.set()
        found = [job.future.result(60) for job in jobs]
    for vectors, (texts, instruction, dim) in zip(found, asked):
        expected = [tiny_model.encode(text, instruction=instruction, truncate_dim=dim) for text in texts]
        np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert batcher.waiting_tokens == 0
    assert len(model.batches) < sum(len(texts) for texts, _, _ in asked) / 3, "clients did not share forward passes"
    assert all(rows <= 8 and (rows == 1 or rows * tokens <= 300) for rows, tokens in model.batches)


def test_instructions_are_computed_once(make_model):
    tiny_model = make_model()
    model = GatedModel(tiny_model, is_open=False)
    instructions = ["Find text that is similar", "Say what a text is about"]
    with Batcher(model) as batcher:
        start_one(batcher, model)
        jobs = [make_job(model, [f"text {number}"], instructions[number % 2]) for number in range(20)]
        for job in jobs:
            batcher.submit(job)
        model.open.set()
        for job in jobs:
            job.future.result(60)
    assert [rows for rows, _ in model.batches] == [1, 10, 10]
    assert len(tiny_model.prefix_cache) == 2


def test_small_jobs_do_not_wait_for_a_large_one(tiny_model):
    model = GatedModel(tiny_model, is_open=False)
    done = []
    with Batcher(model, batch_size=4) as batcher:
        start_one(batcher, model)
        for name, texts, instruction in (("large", ["a text"] * 40, None), ("small", ["a text"], "Find similar text")):
            job = make_job(model, texts, instruction)
            job.future.add_done_callback(lambda _, name=name: done.append((name, len(model.batches))))
            batcher.submit(job)
        model.open.set()
    assert done == [("small", 3), ("large", 12)]


def test_cancelled_jobs_are_not_computed(tiny_model):
    model = GatedModel(tiny_model, is_open=False)
    with Batcher(model, batch_size=4) as batcher:
        first = start_one(batcher, model)
        jobs = [make_job(model, ["a text"] * 4) for _ in range(3)]
        for job in jobs:
            batcher.submit(job)
        assert jobs[1].future.cancel() and first.future.cancel()  # also one that is being computed
        model.open.set()
    assert [rows for rows, _ in model.batches] == [1, 4, 4]
    assert jobs[0].future.done() and jobs[2].future.done() and batcher.waiting_tokens == 0
    with pytest.raises(CancelledError):
        first.future.result()


def test_a_full_queue_refuses(tiny_model):
    model = GatedModel(tiny_model, is_open=False)
    with Batcher(model, max_waiting_tokens=20) as batcher:
        start_one(batcher, model)
        large = make_job(model, ["a text"] * 40)  # more than may wait, but nothing else does
        batcher.submit(large)
        with pytest.raises(QueueFull) as error:
            batcher.submit(make_job(model, ["a text"]))
        assert 1 <= error.value.seconds <= 60
        model.open.set()
        assert large.future.result(60).shape == (40, 64)
        last = make_job(model, ["a text"])
        batcher.submit(last)
        assert last.future.result(60).shape == (1, 64)
    with pytest.raises(QueueFull):  # whose thread has ended
        batcher.submit(make_job(model, ["a text"]))


def test_a_failure_is_told_to_whom_it_concerns(tiny_model):
    model = GatedModel(tiny_model, is_open=False)
    model.fails = [torch.OutOfMemoryError("no memory"), None]
    with Batcher(model, batch_size=4) as batcher:
        first = start_one(batcher, model)
        jobs = [make_job(model, ["a text"] * 6, instruction) for instruction in ("Find similar text", None)]
        for job in jobs:
            batcher.submit(job)
        model.open.set()
        with pytest.raises(torch.OutOfMemoryError):  # its other rows are dropped
            jobs[0].future.result(60)
        assert jobs[1].future.result(60).shape == (6, 64) and first.future.result(60).shape == (1, 64)
    assert len(model.batches) == 4 and batcher.waiting_tokens == 0


def test_numbers_that_are_not_finite_are_an_error(make_model):
    model = make_model()
    with torch.no_grad():
        model.decoder.norm.weight[0] = torch.inf
    with Batcher(model) as batcher:
        job = make_job(model, ["a text"])
        batcher.submit(job)
        with pytest.raises(ArithmeticError, match="finite"):
            job.future.result(60)
