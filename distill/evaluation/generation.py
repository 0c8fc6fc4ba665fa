"""Sampling a response to every prompt of a record set, shared out over the ranks."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from distill.data.batches import Rollouts, TokenBatch
from distill.evaluation.text import repetition, rouge_l
from distill.rollout.worker import RolloutWorker
from distill.telemetry import progress
from distill.topology import Topology


@dataclass(frozen=True)
class Share:
    """This rank's records. All ranks hold equally many, as collective forwards need: the last ones may repeat the
    first, and `counted` leaves those out of every figure about text."""

    indices: list[int]
    counted: int


def share(count: int, topology: Topology) -> Share:
    """Deal `count` records out to the replicas."""
    rounds = -(-count // topology.dp_size)
    dealt = [topology.dp_rank + turn * topology.dp_size for turn in range(rounds)]
    return Share([index % count for index in dealt], sum(index < count for index in dealt))


def respond(
    worker: RolloutWorker, prompts: TokenBatch, indices: list[int], round_index: int, what: str, show: bool
) -> Rollouts:
    """One sampled response a prompt, in order; `indices` seed the rows, `round_index` the repetition. Collective."""
    with progress(len(indices), what, show) as bar:
        return worker.collect(prompts, torch.tensor(indices), round_index, bar.update)


def response_tokens(rollouts: Rollouts) -> list[list[int]]:
    """Each response's token ids, EOS included where it ended."""
    pairs = zip(rollouts.response_ids.tolist(), rollouts.response_lengths.tolist(), strict=True)
    return [ids[:length] for ids, length in pairs]


def text_figures(
    rollouts: Rollouts,
    references: list[list[str]],
    tokenizer: PreTrainedTokenizerBase,
    counted: int,
    topology: Topology,
) -> tuple[dict[str, float], list[str]]:
    """Means over all ranks' counted rows (`rouge_l`, `mean_length` in tokens, `repetition`, `ended`), and this rank's
    texts."""
    tokens = response_tokens(rollouts)[:counted]
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    rows = [
        (rouge_l(text, reference), len(ids), repetition(ids), float(ended))
        for text, reference, ids, ended in zip(
            texts, references[:counted], tokens, rollouts.ended[:counted].tolist(), strict=True
        )
    ]
    sums = torch.tensor(rows, dtype=torch.float64, device=topology.device).view(-1, 4).sum(0)
    sums = topology.sum_over_replicas(torch.cat([sums, sums.new_tensor([float(counted)])]))
    rouge, length, repeated, ended, count = sums.tolist()
    figures = {
        "rouge_l": rouge / count,
        "mean_length": length / count,
        "repetition": repeated / count,
        "ended": ended / count,
    }
    return figures, texts
