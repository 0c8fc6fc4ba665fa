"""What surrounds an engine that samples elsewhere: seeds, ends, order, the teacher's reading, a first comparison."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny_models import tiny_llama
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from distill.config import RolloutSettings
from distill.data.batches import Rollouts, TokenBatch
from distill.data.loading import token_batch
from distill.errors import BadInput
from distill.rollout.ends import response_ends
from distill.rollout.external import ExternalWorker, Sampled
from distill.rollout.gathering import Choice
from distill.rollout.reader import Reader
from distill.rollout.sampling import request_seeds
from distill.rollout.worker import RolloutWorker
from distill.topology import Topology

VOCAB, LIMIT, ROWS = 600, 9, 14


class Plain:
    """An unsharded model as a worker takes it."""

    def __init__(self, model: LlamaForCausalLM):
        self.model, self.vocab, self.missing_bytes = model, VOCAB, 0

    def train(self, mode: bool = True) -> None:
        self.model.train(mode)

    @contextmanager
    def whole(self) -> Iterator[LlamaForCausalLM]:
        yield self.model

    by_layer = whole


class Naive:
    """Samples row by row from the weights it was last handed, past any text that ends a response."""

    def __init__(self, ends: Sequence[int]):
        self.ends, self.pushed, self.model = ends, 0, tiny_llama(VOCAB, 2, 3)

    def push(self, student: LlamaForCausalLM) -> None:
        self.model.load_state_dict(student.state_dict())
        self.pushed += 1

    def generate(self, prompts: TokenBatch, seeds: Sequence[int]) -> list[Sampled]:
        pairs = zip(prompts.prompt_ids.tolist(), prompts.prompt_lengths.tolist(), strict=True)
        return [self._row(ids[-length:], seed) for (ids, length), seed in zip(pairs, seeds, strict=True)]

    def _row(self, prompt: list[int], seed: int) -> Sampled:
        generator, ids, logprobs = torch.Generator().manual_seed(seed), [], []
        while len(ids) < LIMIT and not (ids and ids[-1] in self.ends):
            logs = self.model(torch.tensor([prompt + ids])).logits[0, -1, :VOCAB].log_softmax(-1)
            ids.append(int(logs.exp().multinomial(1, generator=generator)))
            logprobs.append(float(logs[ids[-1]]))
        return Sampled(ids, logprobs, ids[-1] in self.ends)


@pytest.fixture
def topology(monkeypatch: pytest.MonkeyPatch) -> Topology:
    monkeypatch.setattr(Topology, "max_over_ranks", lambda self, value: value)
    return Topology(0, 1, 1, torch.device("cpu"), None, None)


@pytest.fixture
def prompts() -> TokenBatch:
    texts = [[5 + row, 9, 11, 30][: 2 + row % 3] for row in range(ROWS)]
    return token_batch([{"prompt_ids": text, "response_ids": []} for text in texts])


def worker(topology: Topology, tokenizer: PreTrainedTokenizerFast, **changes: object) -> ExternalWorker:
    settings = RolloutSettings(**{"alpha": 0, "max_new_tokens": LIMIT, "batch": 4} | changes)
    stops = [0, *settings.stop_ids]
    ends = response_ends(settings, stops, tokenizer, "cpu")
    models = Plain(tiny_llama(VOCAB, 2, 1, initializer_range=0.1)), Plain(tiny_llama(VOCAB + 8, 1, 2))
    return ExternalWorker(*models, settings, ends, 0, topology, Naive(stops))


def texts(rollouts: Rollouts) -> list[list[int]]:
    pairs = zip(rollouts.response_ids.tolist(), rollouts.response_lengths.tolist(), strict=True)
    return [ids[:length] for ids, length in pairs]


def test_rollouts_have_all_that_the_builtin_gives(
    topology: Topology, tokenizer: PreTrainedTokenizerFast, prompts: TokenBatch
) -> None:
    outside = worker(topology, tokenizer, stop_ids=tuple(range(1, 80)))
    rollouts = outside.collect(prompts, torch.arange(ROWS), 0)
    builtin = RolloutWorker(outside.student, outside.teacher, outside.settings, outside.ends, 0, topology)
    theirs = builtin.collect(prompts, torch.arange(ROWS), 0)
    # How often the engine's model reads is its own affair.
    ours, wanted = rollouts.tensors(), replace(theirs, student_forwards=None).tensors()
    assert {name: value.dtype for name, value in ours.items()} == {name: value.dtype for name, value in wanted.items()}
    assert torch.equal(rollouts.prompt_ids, theirs.prompt_ids)
    assert len(rollouts.response_lengths.unique()) > 1
    mask = rollouts.response_mask
    for model, found in (
        (outside.student.model, rollouts.behavior_logprobs),
        (outside.teacher.model, rollouts.teacher_logprobs),
    ):
        with torch.no_grad():
            logits = model(**rollouts.model_inputs()).logits[:, prompts.prompt_ids.shape[1] - 1 : -1, :VOCAB]
        fresh = logits.log_softmax(-1).gather(-1, rollouts.response_ids[..., None]).squeeze(-1)
        torch.testing.assert_close(found[mask], fresh[mask], rtol=1e-4, atol=1e-4)
        assert found[~mask].abs().sum() == 0
    assert torch.equal(rollouts.importance_weights, mask.float())
    assert not rollouts.from_teacher.any()
    assert torch.equal(rollouts.teacher_forwards, rollouts.response_lengths)
    assert torch.equal(rollouts.ended, torch.tensor([ids[-1] < 80 for ids in texts(rollouts)]))


def test_every_round_is_sampled_by_the_student_as_it_is(
    topology: Topology, tokenizer: PreTrainedTokenizerFast, prompts: TokenBatch
) -> None:
    outside, rows = worker(topology, tokenizer), torch.arange(ROWS)
    first = texts(outside.collect(prompts, rows, 0))
    assert texts(outside.collect(prompts, rows, 0)) == first
    assert texts(outside.collect(prompts.rows(rows[5:]), rows[5:], 0)) == first[5:], "a row's draws are its own"
    assert texts(outside.collect(prompts, rows, 1)) != first
    outside.student.model.load_state_dict(tiny_llama(VOCAB, 2, 8, initializer_range=0.1).state_dict())
    changed = outside.collect(prompts, rows, 0)
    assert texts(changed) != first
    assert outside.engine.pushed == 5
    with torch.no_grad():
        logits = outside.student.model(**changed.model_inputs()).logits[:, prompts.prompt_ids.shape[1] - 1 : -1]
    fresh = logits.log_softmax(-1).gather(-1, changed.response_ids[..., None]).squeeze(-1)
    mask = changed.response_mask
    torch.testing.assert_close(changed.behavior_logprobs[mask], fresh[mask], rtol=1e-4, atol=1e-4)


def test_responses_are_cut_behind_the_token_that_completes_a_text(
    topology: Topology, tokenizer: PreTrainedTokenizerFast, prompts: TokenBatch
) -> None:
    rows = torch.arange(ROWS)
    plain = worker(topology, tokenizer).collect(prompts, rows, 0)
    words = [tokenizer.decode([token]) for ids in texts(plain) for token in ids[2:-1]]
    stop = next(word for word in words if word.isascii() and len(word) > 2)
    cut = worker(topology, tokenizer, stop=(stop,)).collect(prompts, rows, 0)
    ends = response_ends(RolloutSettings(stop=(stop,)), [0], tokenizer, "cpu")
    for whole, part, ended in zip(texts(plain), texts(cut), cut.ended.tolist(), strict=True):
        ids = torch.tensor([whole])
        ending = [t for t in range(1, len(whole) + 1) if bool(ends(ids[:, :t], torch.tensor([0])))]
        assert part == whole[: ending[0] if ending else LIMIT]
        assert ended == bool(ending)
    assert texts(cut) != texts(plain)


def test_hidden_states_wait_where_they_should(
    topology: Topology, tokenizer: PreTrainedTokenizerFast, prompts: TokenBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the host each batch's at once, so that the device never holds a round's; then all are pinned."""
    moved, move = [], torch.Tensor.cpu

    def cpu(tensor: torch.Tensor) -> torch.Tensor:
        moved.extend([len(tensor)] if tensor.ndim == 3 else [])
        return move(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    found = {}
    for place, wanted in (("host", [4, 4, 4, 2, ROWS]), ("device", [])):
        moved.clear()
        found[place] = worker(topology, tokenizer, teacher_cache=place).collect(prompts, torch.arange(ROWS), 0)
        assert moved == wanted
    assert torch.equal(found["host"].teacher_hidden, found["device"].teacher_hidden)


@pytest.mark.parametrize("once", [True, False])
def test_the_teacher_is_read_as_gathering_was_chosen(
    once: bool,
    topology: Topology,
    tokenizer: PreTrainedTokenizerFast,
    prompts: TokenBatch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Layer by layer the ranks agree before each of a batch's forwards; the student is gathered either way."""
    wanted = worker(topology, tokenizer).collect(prompts, torch.arange(ROWS), 0)
    agreed: list[torch.Tensor] = []
    monkeypatch.setattr(
        "distill.rollout.external.over_ranks", lambda topology: lambda flag: agreed.append(flag) or flag
    )
    outside, opened = worker(topology, tokenizer), []
    monkeypatch.setattr(outside, "choose_gathering", lambda: Choice(once, "as set"))
    for model in (outside.student, outside.teacher):
        for way in ("whole", "by_layer"):
            opening = getattr(model, way)
            note = partial(opened.append, (model is outside.teacher, way))
            monkeypatch.setattr(model, way, lambda note=note, opening=opening: note() or opening())
    rollouts = outside.collect(prompts, torch.arange(ROWS), 0)
    assert opened == [(False, "whole"), (False, "whole"), (True, "whole" if once else "by_layer")]
    assert len(agreed) == (0 if once else 4)
    torch.testing.assert_close(rollouts.teacher_logprobs, wanted.teacher_logprobs)


def test_buffers_are_as_wide_as_the_longest_response(
    topology: Topology, tokenizer: PreTrainedTokenizerFast, prompts: TokenBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits, read = [], Reader.__init__
    monkeypatch.setattr(Reader, "__init__", lambda self, *given: limits.append(given[-1]) or read(self, *given))
    outside = worker(topology, tokenizer, max_new_tokens=1000)
    rollouts = outside.collect(prompts, torch.arange(ROWS), 0)
    longest = [int(part.max()) for part in rollouts.response_lengths.sort().values.split(4)]
    assert limits == [int(rollouts.response_lengths[:8].max()), *longest]


def test_without_a_teacher_that_reads_these_tokens(
    topology: Topology, tokenizer: PreTrainedTokenizerFast, prompts: TokenBatch
) -> None:
    alone = worker(topology, tokenizer)
    alone.teacher = None
    done: list[int] = []
    rollouts = alone.collect(prompts, torch.arange(ROWS), 0, done.append)
    assert sum(done) == ROWS
    assert rollouts.teacher_hidden is None
    assert rollouts.teacher_forwards is None
    assert not rollouts.teacher_logprobs.any()


def test_an_engine_that_is_not_the_student_is_refused_at_the_start(
    topology: Topology, tokenizer: PreTrainedTokenizerFast, prompts: TokenBatch
) -> None:
    outside = worker(topology, tokenizer, engine="vllm")
    outside.engine.push = lambda student: None
    with pytest.raises(BadInput, match=r"rollout\.engine = 'vllm': .* away from the student's own; give builtin"):
        outside.collect(prompts, torch.arange(ROWS), 0)


def test_request_seeds_are_of_seed_round_and_row() -> None:
    rows = torch.arange(50)
    seeds = [request_seeds(seed, index, rows) for seed in (0, 1) for index in (0, 1)]
    assert len({seed for some in seeds for seed in some}) == 200
    assert request_seeds(0, 1, rows[7:9]) == seeds[1][7:9]
    assert all(0 <= seed < 2**63 for some in seeds for seed in some)
