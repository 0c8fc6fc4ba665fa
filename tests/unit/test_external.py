"""What surrounds an engine that samples elsewhere: seeds, ends, order, the teacher's reading, a first comparison."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from conftest import tiny_llama
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from distill.config import ModelSettings, RolloutSettings
from distill.data.batches import Rollouts, TokenBatch
from distill.data.loading import token_batch
from distill.errors import BadInput
from distill.rollout.ends import response_ends
from distill.rollout.external import ExternalWorker, Sampled
from distill.rollout.sampling import request_seeds
from distill.rollout.vllm_engine import VllmEngine, as_sampled
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
    ours, wanted = rollouts.tensors(), theirs.tensors()
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
    topology: Topology, tokenizer: PreTrainedTokenizerFast, prompts: TokenBatch
) -> None:
    rows = torch.arange(ROWS)
    on_host = worker(topology, tokenizer, teacher_cache="host").collect(prompts, rows, 0)
    on_device = worker(topology, tokenizer).collect(prompts, rows, 0)
    assert torch.equal(on_host.teacher_hidden, on_device.teacher_hidden)


def test_without_a_teacher_that_reads_these_tokens(
    topology: Topology, tokenizer: PreTrainedTokenizerFast, prompts: TokenBatch
) -> None:
    alone = worker(topology, tokenizer)
    alone.teacher = None
    rollouts = alone.collect(prompts, torch.arange(ROWS), 0)
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


@dataclass
class Logprob:
    logprob: float


@dataclass
class Completion:
    """The fields of vLLM's that are read."""

    token_ids: tuple[int, ...]
    logprobs: list[dict[int, Logprob]]
    finish_reason: str


@pytest.mark.parametrize(("reason", "ended"), [("stop", True), ("length", False)])
def test_a_completion_is_read(reason: str, ended: bool) -> None:
    logprobs = [{4: Logprob(-1.5)}, {2: Logprob(-0.1), 7: Logprob(-2.5)}]
    assert as_sampled(Completion((4, 7), logprobs, reason)) == Sampled([4, 7], [-1.5, -2.5], ended)


def test_without_vllm_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL", "VLLM_NO_USAGE_STATS"):
        monkeypatch.setenv(name, "0")
    given = ModelSettings(path="any"), torch.float32, VOCAB, RolloutSettings(alpha=0), [0], 8, torch.device("cpu")
    with pytest.raises(BadInput, match=r"rollout\.engine = 'vllm': cannot be imported .*; install it as"):
        VllmEngine(*given)
