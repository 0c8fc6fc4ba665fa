"""How close the student's next-token distributions are to the teacher's, on given text."""

from contextlib import ExitStack
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from distill.data.batches import TokenBatch
from distill.engine import Engine
from distill.objectives.chunked import HiddenLogits, chunks
from distill.objectives.divergences import log_probabilities, reverse_kl
from distill.objectives.supervised import plain_text_loss
from distill.topology import Topology
from distill.whereabouts import here


@torch.no_grad()
def mean_reverse_kl(
    student: Engine,
    teacher: Engine,
    student_hidden: Float[Tensor, "n hidden"],
    teacher_hidden: Float[Tensor, "n teacher_hidden"],
    topology: Topology,
) -> float:
    """KL(q‖p) in nats per token of all ranks, from both models' final hidden states at the same tokens. Collective.

    A rank may bring any number of tokens.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=topology.device)
    with ExitStack() as stack:
        for engine in dict.fromkeys((student, teacher)):  # once, where a model is compared with itself
            stack.enter_context(engine.head_gathered())
        logits = HiddenLogits(student_hidden, student.head_logits), HiddenLogits(teacher_hidden, teacher.head_logits)
        for tokens in chunks(len(student_hidden), topology.device):
            here.tick()
            log_q, log_p = (log_probabilities(of(tokens)) for of in logits)
            total = reverse_kl(log_q, log_p).sum()
            sums += torch.stack([total, total.new_tensor(len(log_q))])
    total, tokens = topology.sum_over_replicas(sums).tolist()
    return total / tokens


@torch.no_grad()
def mean_cross_entropy(student: Engine, batch: TokenBatch, counted: int, micro_batch: int, topology: Topology) -> float:
    """−log q per response token of each rank's first `counted` rows. Collective: the same on every rank.

    Every rank must bring the same number of rows.
    """
    counts = torch.arange(len(batch)) < counted
    batch = replace(batch, response_lengths=batch.response_lengths * counts)
    sums = torch.zeros(2, dtype=torch.float64, device=topology.device)
    for rows in _progress(batch, micro_batch, topology):
        here.tick()
        rows = rows.to(topology.device)
        targets = rows.response_ids[rows.response_mask]
        total = student.loss(rows, lambda sum_over: plain_text_loss(sum_over, None, targets, 0.0)).total  # noqa: B023
        sums += torch.stack([total, total.new_tensor(len(targets))])
    total, tokens = topology.sum_over_replicas(sums).tolist()
    return topology.max_over_ranks(total / tokens)


def _progress(batch: TokenBatch, micro_batch: int, topology: Topology) -> "tqdm[TokenBatch]":
    return tqdm(batch.split(micro_batch), "scoring", unit="batch", disable=not topology.is_writer, leave=False)
