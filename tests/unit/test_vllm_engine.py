"""How vLLM is driven, with a stand-in for it: what wakes when, what is read of it, what is said when it fails."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tiny_models import tiny_llama

from distill.config import ModelSettings, RolloutSettings, Settings
from distill.data.loading import token_batch
from distill.errors import BadInput
from distill.rollout.external import Sampled
from distill.rollout.vllm_engine import VllmEngine, as_sampled

VOCAB = 600


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., object]], VllmEngine]:
    """An engine over whatever stands in for `vllm.LLM`, on a platform that sleeps."""
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL", "VLLM_NO_USAGE_STATS"):
        monkeypatch.setenv(name, "0")

    def make(llm: Callable[..., object]) -> VllmEngine:
        vllm, platforms = ModuleType("vllm"), ModuleType("vllm.platforms")
        vllm.LLM, vllm.SamplingParams = llm, SimpleNamespace
        platforms.current_platform = SimpleNamespace(is_sleep_mode_available=lambda: True)
        monkeypatch.setitem(sys.modules, "vllm", vllm)
        monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
        return start()

    return make


def start() -> VllmEngine:
    settings = RolloutSettings(alpha=0, engine="vllm")
    return VllmEngine(ModelSettings(path="any"), torch.float32, VOCAB, settings, [0], 8, torch.device("cpu"))


@dataclass
class Logprob:
    logprob: float


@dataclass
class Completion:
    """The fields of vLLM's that are read."""

    token_ids: tuple[int, ...]
    logprobs: list[dict[int, Logprob]]
    finish_reason: str


class Diary:
    """In place of `vllm.LLM`: notes what it is asked to do."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.fails: Exception | None = None
        self.llm_engine = SimpleNamespace(engine_core=None)

    def __call__(self, path: str, **settings: object) -> "Diary":
        return self

    def sleep(self, level: int) -> None:
        self.notes.append("asleep")

    def wake_up(self, tags: list[str]) -> None:
        self.notes += tags

    def collective_rpc(self, method: str, kwargs: dict) -> None:
        self.notes.append(method)

    def generate(self, prompts: list[dict], parameters: list[object], use_tqdm: bool) -> list[object]:
        self.notes.append("generate")
        if self.fails:
            raise self.fails
        return [SimpleNamespace(outputs=[Completion((4,), [{4: Logprob(-1.5)}], "stop")]) for _ in prompts]


def test_it_wakes_for_its_work_alone(engine: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's reserve is given back before each part wakes; whatever happens, it sleeps after."""
    llm = Diary()
    accelerator = SimpleNamespace(empty_cache=lambda: llm.notes.append("room"))
    monkeypatch.setattr("distill.rollout.vllm_engine.get_accelerator", lambda: accelerator)
    sampler = engine(llm)
    sampler.push(tiny_llama(VOCAB, 1, 0))
    prompts = token_batch([{"prompt_ids": [5], "response_ids": []}])
    assert sampler.generate(prompts, [1]) == [Sampled([4], [-1.5], True)]
    assert llm.notes == ["asleep", "room", "weights", "reload_weights", "room", "kv_cache", "generate", "asleep"]
    llm.fails = ValueError("too long")
    with pytest.raises(ValueError, match="too long"):
        sampler.generate(prompts, [1])
    assert llm.notes[-2:] == ["generate", "asleep"]


def invalid() -> None:
    Settings.model_validate({"unknown": 1})


def no_room() -> None:
    raise torch.OutOfMemoryError("Free memory is too small.\nLook here.")


def nameless() -> None:
    raise RuntimeError


@pytest.mark.parametrize(
    ("fails", "said"),
    [(no_room, "Free memory is too small"), (nameless, "RuntimeError"), (invalid, "Extra inputs are not permitted")],
)
def test_a_failing_start_is_one_line(engine: Callable, fails: Callable[[], None], said: str) -> None:
    wanted = f"rollout.engine = 'vllm': vLLM does not start: {said}; lower rollout.vllm_memory, or give builtin"
    with pytest.raises(BadInput) as error:
        engine(lambda path, **settings: fails())
    assert [str(problem) for problem in error.value.problems] == [wanted]


@pytest.mark.parametrize(("reason", "ended"), [("stop", True), ("length", False)])
def test_a_completion_is_read(reason: str, ended: bool) -> None:
    logprobs = [{4: Logprob(-1.5)}, {2: Logprob(-0.1), 7: Logprob(-2.5)}]
    assert as_sampled(Completion((4, 7), logprobs, reason)) == Sampled([4, 7], [-1.5, -2.5], ended)


def test_without_vllm_one_line_says_so(engine: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(BadInput, match=r"rollout\.engine = 'vllm': cannot be imported .*; install it as"):
        start()
