"""Engines that sample elsewhere: which tokens of a prompt they read, and which of their responses are kept."""

import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace

import pytest
import torch

from distill.config import ModelSettings, RolloutSettings
from distill.data.batches import TokenBatch
from distill.data.loading import token_batch
from distill.rollout.ends import EndIds
from distill.rollout.external import ExternalWorker, Sampled, _first_end
from distill.rollout.vllm_engine import VllmEngine
from distill.topology import Topology

VOCAB = 12


def test_a_response_ends_at_its_first_end_and_never_in_its_padding() -> None:
    ids = torch.tensor([[5, 7, 3, 7], [5, 0, 0, 0], [1, 2, 3, 4], [7, 7, 7, 7]])
    lengths = torch.tensor([4, 1, 4, 3])
    assert _first_end(ids, lengths, EndIds([7])).tolist() == [2, 0, 0, 1]
    assert _first_end(ids, lengths, EndIds([0, 4])).tolist() == [0, 0, 4, 0], "padding is of id 0"


class Given:
    """Engine that gives these responses."""

    def __init__(self, sampled: Sequence[Sampled]):
        self.sampled = list(sampled)

    def push(self, student: object) -> None:
        """Take no weights: none are needed."""

    def generate(self, prompts: TokenBatch, seeds: Sequence[int]) -> list[Sampled]:
        return self.sampled


def test_nothing_stays_of_what_stands_behind_an_end() -> None:
    sampled = [
        Sampled([5, 7, 3], [-1.0, -2.0, -3.0], False),
        Sampled([5], [-0.5], True),
        Sampled([1, 2, 3], [-1.0, -1.5, -2.0], False),
    ]
    topology = Topology(0, 1, 1, torch.device("cpu"), None, None)
    student = SimpleNamespace(vocab=VOCAB)
    worker = ExternalWorker(student, None, RolloutSettings(alpha=0), EndIds([7, 0]), 0, topology, Given(sampled))
    prompts = token_batch([{"prompt_ids": [4], "response_ids": []}] * 3)
    rollouts = worker._rollouts(prompts, sampled)
    assert rollouts.response_lengths.tolist() == [2, 1, 3]
    assert rollouts.response_ids.tolist() == [[5, 7, 0], [5, 0, 0], [1, 2, 3]]
    assert rollouts.behavior_logprobs.tolist() == [[-1, -2, 0], [-0.5, 0, 0], [-1, -1.5, -2]]
    assert rollouts.importance_weights.tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]
    assert rollouts.ended.tolist() == [True, True, False]


def test_vllm_reads_prompts_without_their_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []

    class Llm:
        """Stand-in for `vllm.LLM` that notes the prompts."""

        llm_engine = SimpleNamespace(engine_core=None)

        def __init__(self, path: str, **settings: object):
            pass

        def generate(self, prompts: list[dict], parameters: list[object], use_tqdm: bool) -> list[object]:
            asked.extend(prompt["prompt_token_ids"] for prompt in prompts)
            outputs = SimpleNamespace(
                token_ids=(4,), logprobs=[{4: SimpleNamespace(logprob=-1.0)}], finish_reason="stop"
            )
            return [SimpleNamespace(outputs=[outputs]) for _ in prompts]

    vllm, platforms = ModuleType("vllm"), ModuleType("vllm.platforms")
    vllm.LLM, vllm.SamplingParams = Llm, SimpleNamespace
    platforms.current_platform = SimpleNamespace(is_sleep_mode_available=lambda: False)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    settings = RolloutSettings(alpha=0, engine="vllm")
    engine = VllmEngine(ModelSettings(path="any"), torch.float32, VOCAB, settings, [0], 8, torch.device("cpu"))
    prompts = token_batch([{"prompt_ids": ids, "response_ids": []} for ids in ([5], [6, 0, 7], [8, 9])])
    engine.generate(prompts, [1, 2, 3])
    assert asked == [[5], [6, 0, 7], [8, 9]]
