"""What one or two models say of given responses, token by token."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from distill.data.batches import TokenBatch
from distill.data.loading import token_batch
from distill.engine import Engine
from distill.errors import BadInput, Problem
from distill.models.heads import hidden_states
from distill.objectives.chunked import HiddenLogits, chunks
from distill.objectives.divergences import LogProbs, forward_kl, log_probabilities, reverse_kl
from distill.rollout.gathering import choose
from distill.telemetry import progress
from distill.topology import Topology
from distill.whereabouts import here

Row = tuple[list[int], list[int]]
"""Ids of a prompt and of a response to it."""
Measure = Callable[[Sequence[LogProbs], Int[Tensor, " n"]], Float[Tensor, " n"]]
"""A figure of each token, from the models' log-probabilities and the token that stands there."""
Values = dict[str, list[Float[ndarray, " tokens"]]]
"""By measure, for each row its tokens' figures (fp64)."""


def nll(log_probs: LogProbs, targets: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """−log of the probability of the token that stands there, in nats."""
    return -log_probs.gather(-1, targets[:, None]).squeeze(-1)


def top1_agreement(student: LogProbs, teacher: LogProbs) -> Float[Tensor, " n"]:
    """1 where both models' likeliest tokens are the same, else 0."""
    return (student.argmax(-1) == teacher.argmax(-1)).float()


ALONE: Mapping[str, Measure] = {"nll": lambda models, targets: nll(models[0], targets)}
"""Of one model."""
TO_TEACHER: Mapping[str, Measure] = {
    "reverse_kl": lambda models, targets: reverse_kl(*models),
    "forward_kl": lambda models, targets: forward_kl(*models),
    "top1_agreement": lambda models, targets: top1_agreement(*models),
    "nll": lambda models, targets: nll(models[0], targets),
    "teacher_nll": lambda models, targets: nll(models[1], targets),
}
"""Of a student and its teacher: KL(q‖p), KL(p‖q) and −log in nats; agreement as a share."""


@torch.no_grad()
def read(
    models: Sequence[Engine],
    rows: Sequence[Row],
    measures: Mapping[str, Measure],
    micro_batch: int,
    topology: Topology,
    what: str,
) -> Values:
    """Figures of every row's response tokens, the same on every rank. Collective.

    Raises:
        BadInput: a model that gives no number.

    Rows are read together by length, not by rank, so that rounding does not depend on the number of ranks.
    """
    order = sorted(range(len(rows)), key=lambda row: -sum(map(len, rows[row])))
    batches = [order[start : start + micro_batch] for start in range(0, len(order), micro_batch)]
    mine: dict[int, dict[str, ndarray]] = {}
    with ExitStack() as stack, progress(len(rows), what, topology.is_writer) as bar:
        for model in dict.fromkeys(models):  # once, where a model is compared with itself
            model.train(False)
        once = choose("auto", sum(model.missing_bytes for model in dict.fromkeys(models)), topology).once
        for model in dict.fromkeys(models):
            stack.enter_context(model.whole() if once else model.by_layer())
        for turn in range(-(-len(batches) // topology.dp_size)):
            here.tick()
            place = turn * topology.dp_size + topology.dp_rank
            index = batches[place if place < len(batches) else 0]
            batch = token_batch([_record(rows[row]) for row in index]).to(topology.device)
            values = _values(models, batch, measures)
            if place < len(batches):
                lengths = batch.response_lengths.tolist()
                parts = {name: value.split(lengths) for name, value in values.items()}
                for position, row in enumerate(index):
                    mine[row] = {name: part[position].numpy() for name, part in parts.items()}
            bar.update(sum(map(len, batches[turn * topology.dp_size : (turn + 1) * topology.dp_size])))
    everyone = {row: values for part in topology.gather_objects(mine) for row, values in part.items()}
    found = {name: [everyone[row][name] for row in range(len(rows))] for name in measures}
    for name, of_rows in found.items():
        if any(np.isnan(value).any() for value in of_rows):
            raise BadInput(Problem("--model", what, f"its {name} is not a number", "look for NaN in the weights"))
    return found


def _record(row: Row) -> dict[str, list[int]]:
    return {"prompt_ids": row[0], "response_ids": row[1]}


def _values(models: Sequence[Engine], batch: TokenBatch, measures: Mapping[str, Measure]) -> dict[str, Tensor]:
    mask = batch.response_mask
    targets = batch.response_ids[mask]
    hidden = {}
    for model in dict.fromkeys(models):
        states = hidden_states(model.module, **batch.model_inputs())  # type: ignore[arg-type]
        hidden[model] = states[:, batch.prompt_ids.shape[1] - 1 : -1][mask]
    # Heads padded to different lengths: each is renormalised over the ids that all have.
    vocab = min(model.vocab for model in models)
    logits = [HiddenLogits(hidden[model], lambda h, of=model: of.head_logits(h)[:, :vocab]) for model in models]  # type: ignore[misc]
    found: dict[str, list[Tensor]] = {name: [] for name in measures}
    for tokens in chunks(len(targets), targets.device):
        here.tick()
        log_probs = [log_probabilities(of(tokens)) for of in logits]
        for name, measure in measures.items():
            found[name].append(measure(log_probs, targets[tokens]).double().cpu())
    empty = torch.zeros(0, dtype=torch.float64)
    return {name: torch.cat(parts) if parts else empty for name, parts in found.items()}
