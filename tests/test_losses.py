"""training/losses.py: InfoNCE in closed forms; GradCache against the full batch; two gloo ranks against one."""

import json
import math
import os
import socket
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp

from training.losses import (
    InfoNCE,
    RandomState,
    gradcache_backward,
    split_by_length,
)


def ids(*values):
    return torch.tensor(values)


def test_equals_a_hand_computed_matrix():
    queries = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    documents = torch.tensor([[3.0, 0.0], [1.0, 1.0], [0.0, -5.0]])  # two positives, one hard negative
    loss = InfoNCE(temperature=0.5)(queries, documents, ids(1, 2), ids(11, 12, 13))
    half = math.sqrt(0.5)
    cosines = [[1.0, half, 0.0], [0.0, half, -1.0]]
    expected = 0.0
    for row, scores in enumerate(cosines):
        weights = [math.exp(score / 0.5) for score in scores]
        expected -= math.log(weights[row] / sum(weights)) / 2
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_identical_embeddings_give_log_of_the_number_of_documents():
    queries, documents = torch.ones(4, 8), torch.ones(12, 8)
    loss = InfoNCE()(queries, documents, torch.arange(4), torch.arange(12))
    assert loss.item() == pytest.approx(math.log(12), abs=1e-6)


def test_orthogonal_pairs_have_a_closed_form():
    loss = InfoNCE(temperature=0.25)(torch.eye(4), torch.eye(4), torch.arange(4), torch.arange(4))
    assert loss.item() == pytest.approx(math.log(1 + 3 * math.exp(-4)), abs=1e-6)


@pytest.mark.parametrize(
    "arguments", [{"temperature": 0}, {"matryoshka_dims": [9], "embedding_size": 8}, {"matryoshka_dims": [0]}]
)
def test_settings_that_cannot_work_are_refused(arguments):
    with pytest.raises(ValueError, match="must be"):
        InfoNCE(**arguments)


def test_matryoshka_is_the_mean_over_sizes():
    queries, documents = torch.randn(4, 6), torch.randn(4, 6)
    ids = (torch.arange(4), torch.arange(4))
    plain = InfoNCE()
    expected = (plain(queries, documents, *ids) + plain(queries[:, :3], documents[:, :3], *ids)) / 2
    loss = InfoNCE(matryoshka_dims=[3])(queries, documents, *ids)
    assert torch.allclose(loss, expected)
    with pytest.raises(ValueError, match="between 1 and 6"):
        InfoNCE(matryoshka_dims=[8], embedding_size=6)


def split_batch(batch, size):
    rows = len(next(iter(batch.values())))
    return [{name: value[start : start + size] for name, value in batch.items()} for start in range(0, rows, size)]


def test_mini_batches_of_like_length_give_the_same_rows(tiny_model):
    batch = batch_of(tiny_model, ["short", "a much longer text than the others here", "", "middling length"], "find")
    batches, order = split_by_length(batch, 2)
    assert [len(part["input_ids"]) for part in batches] == [2, 2]
    assert batches[0]["input_ids"].shape[1] > batches[1]["input_ids"].shape[1]
    assert batches[0]["encoder_ids"].shape[1] > batches[1]["encoder_ids"].shape[1]
    with torch.no_grad():
        expected = tiny_model(**batch).embeddings
        actual = torch.cat([tiny_model(**part).embeddings for part in batches])[order]
    assert torch.allclose(actual, expected, atol=1e-5)


def batch_of(model, texts, instruction=None):
    return dict(model.processor(texts, instruction))


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


QUERIES = [f"question number {i} about {topic}" for i, topic in enumerate(("cats", "dogs", "rain", "snow", "tea"))]
DOCUMENTS = [
    f"an answer on {topic}, written at some length" for topic in ("cats", "dogs", "rain", "snow", "tea", "salt", "milk")
]


@pytest.mark.parametrize("lora", [False, True])
def test_gradcache_gradients_equal_the_full_batch(make_model, lora):
    model = make_model()
    if lora:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=4, target_modules=r"decoder\..*(q_proj|v_proj)", modules_to_save=["projector"])
        model = get_peft_model(model, config)
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at the start, which would hide lora_A's gradient
                torch.nn.init.normal_(parameter, std=0.1)
    model.gradient_checkpointing_enable()
    if lora:
        model.enable_input_require_grads()
    for module in model.modules():  # dropout off; its replay has a test of its own
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()
    queries, documents = batch_of(model, QUERIES, "retrieve"), batch_of(model, DOCUMENTS)
    loss_fn = InfoNCE()

    def loss_from(embeddings):
        return loss_fn(*embeddings, torch.arange(5), torch.arange(7))

    full = loss_from([model(**queries).embeddings, model(**documents).embeddings])
    full.backward()
    expected = gradients(model)
    model.zero_grad()
    cached = gradcache_backward(
        lambda batch: model(**batch).embeddings, loss_from, [split_batch(queries, 2), split_batch(documents, 3)]
    )
    assert cached.item() == pytest.approx(full.item(), abs=1e-5)
    actual = gradients(model)
    assert actual.keys() == expected.keys() and len(actual) > 4
    for name, gradient in expected.items():
        assert torch.allclose(actual[name], gradient, atol=1e-5, rtol=1e-4), name
    assert sum(gradient.abs().sum() for gradient in expected.values()) > 0


def test_gradcache_replays_dropout_bit_by_bit():
    dropout = torch.nn.Dropout(0.5)
    linear = torch.nn.Linear(4, 4)
    seen = []

    def embed(batch):
        embeddings = dropout(linear(batch["x"]))
        seen.append(embeddings.detach().clone())
        return embeddings

    torch.manual_seed(0)
    batches = split_batch({"x": torch.randn(6, 4)}, 2)
    loss = gradcache_backward(embed, lambda embeddings: embeddings[0].square().sum(), [batches])
    assert len(seen) == 6 and (seen[0] == 0).any() and not torch.equal(seen[0], seen[1])
    for first, second in zip(seen[:3], seen[3:]):
        assert torch.equal(first, second)
    assert loss.item() == pytest.approx(sum(part.square().sum().item() for part in seen[:3]), rel=1e-6)


def test_random_state_leaves_the_generator_alone():
    state = RandomState()
    first = torch.rand(3)
    after = torch.get_rng_state()
    with state.replay():
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.get_rng_state(), after)


def test_random_state_replays_the_accelerators_generators(monkeypatch):
    """Of whatever accelerator is in use: a stub of one with two devices, which keeps a number for a generator's state."""
    generators = [10, 20]
    stub = SimpleNamespace(
        device_count=lambda: len(generators),
        get_rng_state=lambda device: generators[device],
        set_rng_state=lambda state, device: generators.__setitem__(device, state),
    )
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **kwargs: SimpleNamespace(type="stub"))
    monkeypatch.setattr(torch, "get_device_module", {"stub": stub}.__getitem__)
    state = RandomState()
    generators[:] = 11, 21
    with state.replay():
        assert generators == [10, 20]
        generators[:] = 12, 22
    assert generators == [11, 21]


def two_ranks(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error", FutureWarning)  # a deprecated call
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    queries, documents, query_ids, document_ids = toy_batch()
    # Rank 0 has 2 rows and 3 hard negatives, rank 1 has 2 rows and 1: ragged on purpose.
    own = slice(0, 2) if rank == 0 else slice(2, 4)
    places = [0, 1, 4, 5, 6] if rank == 0 else [2, 3, 7]
    arguments = (query_ids[own], document_ids[places])
    loss_fn = InfoNCE()

    model = toy_model()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    rows = parallel(torch.cat([queries[own], documents[places]]))
    plain = loss_fn(rows[:2], rows[2:], *arguments)
    plain.backward()

    cached_model = toy_model()
    parallel = torch.nn.parallel.DistributedDataParallel(cached_model)
    cached = gradcache_backward(
        lambda batch: parallel(batch["x"]),
        lambda embeddings: loss_fn(*embeddings, *arguments),
        [split_batch({"x": queries[own]}, 1), split_batch({"x": documents[places]}, 2)],
        no_sync=parallel.no_sync,
    )
    results = {
        "plain": [plain.item(), model[0].weight.grad.tolist()],
        "gradcache": [cached.item(), cached_model[0].weight.grad.tolist()],
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads and DDP's destructors can wait for each other for ever at an orderly end


def toy_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh(), torch.nn.Linear(6, 4))


def toy_batch():
    generator = torch.Generator().manual_seed(1)
    queries, documents = torch.randn(4, 6, generator=generator), torch.randn(8, 6, generator=generator)
    return queries, documents, torch.tensor([1, 2, 1, 4]), torch.arange(10, 18)


def test_two_ranks_have_the_gradients_of_one(tmp_path):
    model = toy_model()
    queries, documents, query_ids, document_ids = toy_batch()
    rows = model(torch.cat([queries, documents]))
    loss = InfoNCE()(rows[:4], rows[4:], query_ids, document_ids)
    loss.backward()
    assert model[0].weight.grad.abs().sum() > 0

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(two_ranks, args=(port, str(tmp_path)), nprocs=2)
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for way in ("plain", "gradcache"):
        assert sum(result[way][0] for result in results) / 2 == pytest.approx(loss.item(), abs=1e-5)
        for result in results:
            assert torch.allclose(torch.tensor(result[way][1]), model[0].weight.grad, atol=1e-5), way
