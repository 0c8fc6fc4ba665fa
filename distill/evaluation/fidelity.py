"""How close the student's next-token distributions are to the teacher's, on given text."""

import torch
from tqdm import tqdm

from distill.data.batches import TokenBatch
from distill.engine import Engine
from distill.objectives.chunked import CHUNK
from distill.objectives.divergences import forward_kl, log_probabilities, reverse_kl
from distill.objectives.supervised import soft_and_hard_cross_entropy
from distill.topology import Topology


@torch.no_grad()
def compare(
    student: Engine, teacher: Engine, batch: TokenBatch, micro_batch: int, topology: Topology
) -> dict[str, float]:
    """Per-token means over all ranks' tokens: `reverse_kl` KL(q‖p), `forward_kl` KL(p‖q) in nats, `top1_agreement`.

    Every rank must bring the same number of rows; the forwards are collective.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=topology.device)
    # Both models whole, as in a rollout: gathering them layer by layer for each micro-batch takes longer than scoring.
    with student.whole(), teacher.whole():
        for rows in tqdm(
            batch.split(micro_batch), "scoring", unit="batch", disable=not topology.is_writer, leave=False
        ):
            rows = rows.to(topology.device)
            student_logits, teacher_logits = student.token_logits(rows), teacher.token_logits(rows)
            for z_q, z_p in zip(student_logits.split(CHUNK), teacher_logits.split(CHUNK), strict=True):
                log_q, log_p = log_probabilities(z_q), log_probabilities(z_p)
                agree = (log_q.argmax(-1) == log_p.argmax(-1)).sum()
                figures = [reverse_kl(log_q, log_p).sum(), forward_kl(log_q, log_p).sum(), agree]
                sums += torch.stack([*figures, agree.new_tensor(len(z_q))])
    reverse, forward, agreed, tokens = topology.sum_over_replicas(sums).tolist()
    return {"reverse_kl": reverse / tokens, "forward_kl": forward / tokens, "top1_agreement": agreed / tokens}


@torch.no_grad()
def mean_cross_entropy(student: Engine, batch: TokenBatch, micro_batch: int, topology: Topology) -> float:
    """−log q per response token over all ranks' rows. Every rank must bring the same number of rows."""
    sums = torch.zeros(2, dtype=torch.float64, device=topology.device)
    for rows in tqdm(batch.split(micro_batch), "scoring", unit="batch", disable=not topology.is_writer, leave=False):
        rows = rows.to(topology.device)
        targets = rows.response_ids[rows.response_mask]
        total, _ = soft_and_hard_cross_entropy(student.token_logits(rows), None, targets, 0.0)
        sums += torch.stack([total, total.new_tensor(len(targets))])
    total, tokens = topology.sum_over_replicas(sums).tolist()
    return total / tokens
