"""InfoNCE over cosine similarities (section 3.4), gathered over ranks, with Matryoshka dims and GradCache.

    loss_i = -log exp(cos(q_i, d_i) / tau) / sum_j exp(cos(q_i, d_j) / tau)

where j runs over the positives and hard negatives of all rows on all ranks, less those known to be positives of i.
GradCache (arXiv 2101.06983) computes the same loss over a batch that does not fit in memory: embed all mini-batches
without a graph, take the loss's gradient with respect to the embeddings, then embed each mini-batch again with a graph
and the same random state, and backpropagate its part of that gradient. Invariant: its gradients equal the full batch's.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F

from decoder_utils import trim
from encoding_utils import check_truncate_dim


class InfoNCE(torch.nn.Module):
    """
    Args:
        temperature (`float`, defaults to 0.05): tau.
        matryoshka_dims (list of `int`, *optional*): Embedding sizes, truncated as by `encode`'s `truncate_dim`; the
            loss is the mean over all sizes.
        embedding_size (`int`, *optional*): The configuration's, to refuse larger sizes at once.

    Raises:
        ValueError: the temperature is not positive, or a size is not possible.
    """

    def __init__(
        self,
        temperature: float = 0.05,
        matryoshka_dims: Sequence[int] | None = None,
        embedding_size: int | None = None,
    ):
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"`temperature` must be positive, got {temperature}.")
        self.temperature = temperature
        self.matryoshka_dims = sorted(set(matryoshka_dims or ()), reverse=True)
        for dim in self.matryoshka_dims:
            check_truncate_dim(dim, embedding_size or dim)

    def forward(
        self,
        queries: torch.Tensor,
        documents: torch.Tensor,
        query_ids: torch.Tensor,
        document_ids: torch.Tensor,
    ) -> torch.Tensor:
        """
        Args:
            queries (`(batch, dim)`): Embeddings of this rank's queries.
            documents (`(batch + negatives, dim)`): Of this rank's documents, the positive of query i at place i.
            query_ids, document_ids: One number per distinct text, of the shapes above less `dim`.

        Returns:
            The mean loss of this rank's queries. Averaged over ranks, as DistributedDataParallel averages gradients,
            it is the loss of the whole batch.
        """
        all_query_ids, all_documents, all_document_ids, offset = query_ids, documents, document_ids, 0
        if dist.is_initialized() and dist.get_world_size() > 1:
            all_query_ids = torch.cat(_gather(query_ids))  # (queries on all ranks,)
            positives = _gather(documents[: len(queries)])
            negatives = _gather(documents[len(queries) :])
            all_documents = torch.cat(positives + negatives)  # (all documents, dim), all positives first
            all_document_ids = torch.cat(_gather(document_ids[: len(queries)]) + _gather(document_ids[len(queries) :]))
            offset = sum(len(part) for part in positives[: dist.get_rank()])
        known = known_positives(query_ids, document_ids[: len(queries)], all_query_ids, all_document_ids, offset)

        sizes = self.matryoshka_dims or [queries.shape[-1]]
        if queries.shape[-1] not in sizes:
            sizes = [queries.shape[-1], *sizes]
        losses = [self._at_size(queries.float(), all_documents.float(), known, offset, size) for size in sizes]
        return torch.stack(losses).mean()

    def _at_size(self, queries, documents, known, offset: int, size: int) -> torch.Tensor:
        queries = F.normalize(queries[:, :size], dim=-1)  # (batch, size)
        documents = F.normalize(documents[:, :size], dim=-1)  # (all documents, size)
        scores = (queries @ documents.T / self.temperature).masked_fill(known, float("-inf"))
        return F.cross_entropy(scores, torch.arange(len(queries), device=scores.device) + offset)


def known_positives(
    query_ids: torch.Tensor,
    positive_ids: torch.Tensor,
    all_query_ids: torch.Tensor,
    all_document_ids: torch.Tensor,
    offset: int = 0,
) -> torch.Tensor:
    """
    Which documents must not count as negatives of which query, `(batch, all documents)`; never the query's own
    positive.

    A document is known to be a positive when it has the text of the query's own positive, or is the positive of a row
    with the same query. A row's own mined negatives stay, as they have another text.
    """
    known = positive_ids[:, None] == all_document_ids[None]  # (batch, all documents)
    known[:, : len(all_query_ids)] |= query_ids[:, None] == all_query_ids[None]
    own = torch.arange(len(query_ids), device=known.device)
    known[own, own + offset] = False
    return known


def _gather(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Gathers a tensor of any length from every rank, with gradients (summed over ranks)."""
    length = torch.tensor([len(tensor)], device=tensor.device)
    lengths = [int(n) for n in _AllGather.apply(length)]
    padding = tensor.new_zeros(max(lengths) - len(tensor), *tensor.shape[1:])
    parts = _AllGather.apply(torch.cat([tensor, padding]))  # (longest, ...) each
    return [part[:n] for part, n in zip(parts, lengths)]


class _AllGather(torch.autograd.Function):
    """
    Gathers tensors of one shape; torch's own function is deprecated in 2.13, and its successor is missing in 2.11.
    """

    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor)
        return tuple(parts)

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor) -> torch.Tensor:
        total = torch.stack(gradients)  # (ranks, longest, ...)
        dist.all_reduce(total)
        return total[dist.get_rank()]


class RandomState:
    """A snapshot of torch's random generators, to repeat the same dropout."""

    def __init__(self):
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        self.device_type = None if accelerator is None else accelerator.type  # cuda, xpu, mps, ...
        module = None if accelerator is None else torch.get_device_module(self.device_type)
        self.cpu = torch.get_rng_state()
        self.devices = [] if module is None else [module.get_rng_state(i) for i in range(module.device_count())]

    @contextlib.contextmanager
    def replay(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=range(len(self.devices)), device_type=self.device_type):
            torch.set_rng_state(self.cpu)
            for index, state in enumerate(self.devices):
                torch.get_device_module(self.device_type).set_rng_state(state, index)
            yield


def gradcache_backward(
    embed: Callable[[dict], torch.Tensor],
    loss_from: Callable[[Sequence[torch.Tensor]], torch.Tensor],
    groups: Sequence[Sequence[dict]],
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
    no_sync: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> torch.Tensor:
    """
    Accumulates the gradients of `loss_from([embed(all of group) for group in groups])` in the parameters.

    Args:
        embed: From one mini-batch to embeddings `(rows, dim)`.
        loss_from: From one `(all rows, dim)` tensor per group to the loss.
        groups: The mini-batches of each group (queries, documents).
        backward: How a scalar is sent backward, such as `accelerator.backward`.
        no_sync: Context in which gradients are not reduced over ranks; entered for all mini-batches but the last.

    Returns:
        The loss, without a graph.
    """
    states: list[list[RandomState]] = []
    cached: list[torch.Tensor] = []
    with torch.no_grad():
        for batches in groups:
            states.append([])
            parts = []
            for batch in batches:
                states[-1].append(RandomState())
                parts.append(embed(batch))
            cached.append(torch.cat(parts))
    cached = [embeddings.detach().requires_grad_() for embeddings in cached]
    loss = loss_from(cached)
    gradients = torch.autograd.grad(loss, cached)

    total = sum(map(len, groups))
    done = 0
    for batches, batch_states, gradient in zip(groups, states, gradients):
        start = 0
        for batch, state in zip(batches, batch_states):
            done += 1
            with no_sync() if done < total else contextlib.nullcontext(), state.replay():
                embeddings = embed(batch)  # (rows, dim)
                part = gradient[start : start + len(embeddings)]
                backward((embeddings * part).sum())
            start += len(embeddings)
    return loss.detach()


def split_by_length(batch: dict[str, torch.Tensor], size: int) -> tuple[list[dict], torch.Tensor]:
    """
    Cuts a batch into mini-batches of at most `size` rows of similar length, trimmed to their longest row, so that a few
    long rows do not pad all mini-batches.

    Returns:
        The mini-batches, and `order` such that `torch.cat(results)[order]` is in the batch's order.
    """
    longest_first = batch["attention_mask"].sum(-1).argsort(descending=True, stable=True)  # (batch,)
    batches = []
    for rows in longest_first.split(size):
        part = {name: ids if name == "prefix_ids" else ids[rows] for name, ids in batch.items()}
        for ids, mask in (("input_ids", "attention_mask"), ("encoder_ids", "encoder_attention_mask")):
            if ids in part:
                part[ids], part[mask] = trim(part[ids], part[mask])
        batches.append(part)
    return batches, longest_first.argsort()
