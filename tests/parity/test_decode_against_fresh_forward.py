"""Rollouts against their definition: each row read alone, whole and unpadded, by fp64 copies of both models.

The copies give each component of the mixture at every token; from these follow log q, log p and w, and which token a
uniform number falls on.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from reference import chance
from reference.sampling import proposal
from tiny_models import tiny
from torch import Tensor
from transformers import PreTrainedModel

from distill.config import RolloutSettings
from distill.data.batches import Rollouts
from distill.data.loading import token_batch
from distill.rollout.ends import EndIds
from distill.rollout.worker import RolloutWorker
from distill.topology import Topology

VOCAB, ENDS, LIMIT, ROWS, SEED, ROUND = 23, (4, 11, 17), 13, 30, 4, 2
TOLERANCE = 1e-5
# Numbers of a round's rows over several ranks, in no order.
ROW_IDS = torch.arange(ROWS) * 7 % 61
PROMPTS = [[(3 * row + 5 * place) % VOCAB for place in range(1 + row * row % 6)] for row in range(ROWS)]
# Rows and layers of students and teachers; the heads have rows beyond the vocabulary.
STUDENT = {"vocab_size": 29, "num_hidden_layers": 2, "pad_token_id": None}
TEACHER = {"vocab_size": 26, "num_hidden_layers": 3, "pad_token_id": None}
CUTS = [{}, {"temperature": 1.7, "top_k": 4}, {"top_p": 0.8}, {"temperature": 1.7, "top_k": 4, "top_p": 0.8}]


class Whole:
    """An unsharded model as a worker takes it."""

    missing_bytes = 0

    def __init__(self, model: PreTrainedModel):
        self.model, self.vocab = model, VOCAB

    def train(self, mode: bool = True) -> None:
        self.model.train(mode)

    @contextmanager
    def whole(self) -> Iterator[PreTrainedModel]:
        yield self.model

    by_layer = whole


class Exact(NamedTuple):
    """One model's word on a response, by a whole forward in fp64."""

    logits: Tensor
    hidden: Tensor


@cache
def pair(family: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedModel]:
    student, teacher = tiny(family, 1, 0.25, **STUDENT), tiny(family, 2, 0.25, **TEACHER)
    return student.to(dtype), teacher.to(dtype).eval()


@cache
def exact_copy(family: str, which: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = copy.deepcopy(pair(family, dtype)[which]).double().eval()
    model.set_attn_implementation("eager")
    return model


@torch.no_grad()
def read(model: PreTrainedModel, prompt: list[int], response: list[int]) -> Exact:
    output = model.base_model(input_ids=torch.tensor([prompt + response]), use_cache=False)
    hidden = output.last_hidden_state[0, len(prompt) - 1 : -1]
    return Exact(model.get_output_embeddings()(hidden)[:, :VOCAB], hidden)


def collect(
    student: PreTrainedModel, teacher: PreTrainedModel | None, settings: RolloutSettings, kept: Tensor | None = None
) -> Rollouts:
    """All rows through a worker, as a run has them sampled: in batches, in the form for sampling. The student comes as
    training leaves it, with dropout on."""
    student.train()
    topology = Topology(0, 1, 1, torch.device("cpu"), None, None)
    models = Whole(student), Whole(teacher) if teacher else None
    worker = RolloutWorker(*models, settings, EndIds(ENDS), SEED, topology, keep_hidden=True)
    prompts = token_batch([{"prompt_ids": prompt, "response_ids": []} for prompt in PROMPTS])
    return worker.collect(prompts, ROW_IDS, ROUND, kept=kept)


def check(rollouts: Rollouts, place: int, row: int, family: str, settings: RolloutSettings) -> None:
    """Row `row`, which stands at `place` of the rollouts, against its definition."""
    length, prompt = int(rollouts.response_lengths[place]), PROMPTS[row]
    given = rollouts.prompt_ids[place, -int(rollouts.prompt_lengths[place]) :].tolist()
    response = rollouts.response_ids[place, :length].tolist()
    assert given == prompt
    assert not set(response[:-1]) & set(ENDS)
    assert bool(rollouts.ended[place]) == (response[-1] in ENDS)
    assert length == LIMIT or rollouts.ended[place]
    q, p = (read(exact_copy(family, which), prompt, response) for which in (0, 1))
    stream = (SEED, ROUND, int(ROW_IDS[row]), LIMIT)
    coins = chance.coins(*stream, settings.alpha, settings.coins == "shared")
    knobs = settings.temperature, settings.top_k, settings.top_p
    weights = []
    for t, (token, uniform) in enumerate(zip(response, chance.uniforms(*stream), strict=False)):
        components = [proposal(z[t], *knobs) for z in (q.logits, p.logits)]
        drawn_from = components[coins[t]]
        assert drawn_from[token] > 0
        assert sum(drawn_from[:token]) - TOLERANCE < uniform < sum(drawn_from[: token + 1]) + TOLERANCE
        ours, theirs = (component[token] for component in components)
        weights.append(ours / (settings.alpha * theirs + (1 - settings.alpha) * ours))
    assert rollouts.from_teacher[place].tolist() == coins[:length] + [False] * (rollouts.response_ids.shape[1] - length)
    picked = range(length), response
    for got, wanted in (
        (rollouts.behavior_logprobs, q.logits.log_softmax(-1)[picked]),
        (rollouts.teacher_logprobs, p.logits.log_softmax(-1)[picked]),
        (rollouts.importance_weights, torch.tensor(weights).double()),
        (rollouts.student_hidden, q.hidden),
        (rollouts.teacher_hidden, p.hidden),
    ):
        torch.testing.assert_close(got[place, :length].double(), wanted, rtol=0, atol=TOLERANCE)
    for scores in (rollouts.behavior_logprobs, rollouts.teacher_logprobs, rollouts.importance_weights):
        assert not scores[place, length:].any()
    assert rollouts.student_forwards[place] == rollouts.teacher_forwards[place] == length, "each token is read once"


SOME: list[tuple[str, dict[str, Any]]] = [
    (family, {"alpha": 0.3, "coins": coins, **cut})
    for coins in ("shared", "per_row")
    for family, cuts in (("gpt2", CUTS), ("llama", CUTS), ("qwen2", CUTS[-1:]))
    for cut in cuts
]
SOME += [
    ("opt", {"alpha": 0.3, **CUTS[-1]}),
    *(("llama", {"alpha": 0.0, "coins": "per_row", **cut}) for cut in CUTS[:2]),
]


@pytest.mark.parametrize(("family", "knobs"), SOME, ids=str)
def test_rollouts_equal_their_definition(family: str, knobs: dict[str, Any]) -> None:
    settings = RolloutSettings(max_new_tokens=LIMIT, batch=12, **knobs)
    kept = torch.arange(ROWS) % 5 != 1 if settings.coins == "per_row" else None
    rollouts = collect(*pair(family), settings, kept)
    rows = range(ROWS) if kept is None else kept.nonzero().squeeze(1).tolist()
    for place, row in enumerate(rows):
        check(rollouts, place, row, family, settings)
    lengths = rollouts.response_lengths
    assert lengths.min() == 1
    assert not rollouts.ended.all()
    assert (lengths <= 4).float().mean() > 1 / 8, "rows leave at the first look"


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_without_a_teacher_the_student_draws_every_token(cut: dict[str, Any]) -> None:
    settings = RolloutSettings(max_new_tokens=LIMIT, batch=12, alpha=0.3, **cut)
    rollouts = collect(pair("gpt2")[0], None, settings)
    knobs = settings.temperature, settings.top_k, settings.top_p
    for row, length in enumerate(rollouts.response_lengths.tolist()):
        response = rollouts.response_ids[row, :length].tolist()
        q = read(exact_copy("gpt2", 0), PROMPTS[row], response).logits
        for t, uniform in enumerate(chance.uniforms(SEED, ROUND, int(ROW_IDS[row]), length)):
            drawn_from = proposal(q[t], *knobs)
            reached = sum(drawn_from[: response[t]])
            assert reached - TOLERANCE < uniform < reached + drawn_from[response[t]] + TOLERANCE
        exact = q.log_softmax(-1)[range(length), response]
        torch.testing.assert_close(rollouts.behavior_logprobs[row, :length].double(), exact, rtol=0, atol=TOLERANCE)
    assert torch.equal(rollouts.importance_weights, rollouts.response_mask.float())
    assert not rollouts.teacher_logprobs.any()
    assert not rollouts.from_teacher.any()
    assert rollouts.teacher_hidden is rollouts.teacher_forwards is None


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_in_bf16_only_rounding_is_between_the_scores_and_their_definition(family: str) -> None:
    """0.015 nats a token in the mean, 0.09 at most; the packed weights of a processor take part."""
    settings = RolloutSettings(max_new_tokens=LIMIT, batch=12, alpha=0.3, temperature=1.7)
    rollouts = collect(*pair(family, torch.bfloat16), settings)
    off = []
    for row, length in enumerate(rollouts.response_lengths.tolist()):
        response = rollouts.response_ids[row, :length].tolist()
        for which, scores in enumerate((rollouts.behavior_logprobs, rollouts.teacher_logprobs)):
            exact = read(exact_copy(family, which, torch.bfloat16), PROMPTS[row], response).logits.log_softmax(-1)
            off.append((scores[row, :length] - exact[range(length), response]).abs())
    assert float(torch.cat(off).mean()) < 0.03
    assert float(torch.cat(off).max()) < 0.2


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "opt"])
def test_the_copies_read_as_transformers_does(family: str) -> None:
    """But for norms and rotations, which Llama and Qwen2 compute in fp32 always."""
    for which, model in enumerate(pair(family)):
        with torch.no_grad():
            whole = copy.deepcopy(model).double().eval()(input_ids=torch.tensor([[4, 8, 15, 16]]))
        got = read(exact_copy(family, which), [4], [8, 15, 16]).logits
        torch.testing.assert_close(got, whole.logits[0, :-1, :VOCAB], rtol=0, atol=5e-6)
