"""vLLM as the sampling engine: started once, handed the student's weights every round, asleep in between.

Every rank has an engine of its own in its own process and on its own device. All of vLLM that is used is in this file;
it was written against vLLM 0.32. For dense models only: transformers fuses the experts of a mixture under names that no
checkpoint has, and weights are handed over by name.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from pydantic import ValidationError
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from distill.config import ModelSettings, RolloutSettings
from distill.data.batches import TokenBatch
from distill.errors import BadInput, Problem
from distill.models.downloads import opened_at
from distill.rollout.external import Sampled

INSTALL = "install it as the README's `Sampling with vLLM` says, or give builtin"


class VllmEngine:
    """A vLLM engine for one student. Collective over the ranks to make; `ends` are all ids that end a response.

    Raises:
        BadInput: vLLM cannot be imported, or does not start.
    """

    def __init__(
        self,
        student: ModelSettings,
        dtype: torch.dtype,
        vocab: int,
        settings: RolloutSettings,
        ends: Sequence[int],
        longest_prompt: int,
        device: torch.device,
    ):
        self.vocab, self.settings, self.ends = vocab, settings, sorted(set(ends))
        self._vllm, platform = _import()
        self._sleeps = platform.is_sleep_mode_available()
        with _unnoticed(device), _problems_reported():
            self._llm = self._vllm.LLM(
                opened_at(student.path),
                # Only to look for texts that end a response.
                skip_tokenizer_init=not settings.stop,
                trust_remote_code=student.trust_remote_code,
                dtype=str(dtype).removeprefix("torch."),
                # Its weights come with the first round.
                load_format="dummy",
                hf_overrides=_with_vocabulary(vocab),
                generation_config="vllm",
                # The ranks are there already, and none of them shares its engine.
                distributed_executor_backend="external_launcher",
                max_model_len=longest_prompt + settings.max_new_tokens,
                gpu_memory_utilization=settings.vllm_memory,
                enable_sleep_mode=self._sleeps,
                # What was computed with the last round's weights must not serve the next.
                enable_prefix_caching=False,
                # Graphs pay on accelerators.
                enforce_eager=device.type == "cpu",
            )
        _leave_ranks_alone(self._llm)
        self._sleep()

    def push(self, student: PreTrainedModel) -> None:
        """Take over the weights of the whole student."""
        self._wake("weights")
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self._weights(student)})

    def generate(self, prompts: TokenBatch, seeds: Sequence[int]) -> list[Sampled]:
        """One response a prompt, in order; a row's draws depend on its seed."""
        self._wake("kv_cache")
        pairs = zip(prompts.prompt_ids.tolist(), prompts.prompt_lengths.tolist(), strict=True)
        try:
            outputs = self._llm.generate(
                [{"prompt_token_ids": ids[-length:]} for ids, length in pairs],
                [self._parameters(seed) for seed in seeds],
                use_tqdm=False,
            )
        finally:
            self._sleep()
        return [as_sampled(output.outputs[0]) for output in outputs]

    def _parameters(self, seed: int) -> Any:
        settings = self.settings
        return self._vllm.SamplingParams(
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            max_tokens=settings.max_new_tokens,
            seed=seed,
            # Of the sampled token alone, and before temperature, top-k and top-p.
            logprobs=0,
            # `ends` names them all.
            ignore_eos=True,
            stop_token_ids=self.ends,
            stop=list(settings.stop),
            detokenize=bool(settings.stop),
            skip_special_tokens=False,
        )

    def _weights(self, student: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
        """The student's weights by their names in a checkpoint, embedding and head cut to the shared vocabulary."""
        modules = student.get_input_embeddings(), student.get_output_embeddings()
        by_token = {id(parameter) for module in modules for parameter in module.parameters()}
        for name, parameter in student.named_parameters():
            yield name, parameter.data[: self.vocab] if id(parameter) in by_token else parameter.data

    def _wake(self, what: str) -> None:
        if self._sleeps:
            # vLLM's allocator gets nothing of what torch's holds in reserve.
            get_accelerator().empty_cache()
            self._llm.wake_up(tags=[what])

    def _sleep(self) -> None:
        """Leave the device's memory to training; the weights come anew, so nothing is kept of them."""
        if self._sleeps:
            self._llm.sleep(level=2)


def as_sampled(completion: Any) -> Sampled:
    """What is used of a vLLM `CompletionOutput`."""
    ids = list(completion.token_ids)
    logprobs = [at[token].logprob for at, token in zip(completion.logprobs, ids, strict=True)]
    return Sampled(ids, logprobs, completion.finish_reason == "stop")


def _with_vocabulary(vocab: int) -> Callable[[PreTrainedConfig], PreTrainedConfig]:
    """Leaves a config the ids 0 … V−1 alone: those are drawn, and log-probabilities are normalised over them."""

    def shared(config: PreTrainedConfig) -> PreTrainedConfig:
        config.get_text_config().vocab_size = vocab
        return config

    return shared


def _import() -> tuple[Any, Any]:
    """vLLM and the platform that it finds.

    Raises:
        BadInput: it cannot be imported.
    """
    # Weights are handed over within the process.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # It warns in every round of layers that have no weights, and would report its use.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        import vllm
        from vllm import LLM, SamplingParams  # noqa: F401  (vllm itself imports them when they are first named)
        from vllm.platforms import current_platform
    except ImportError as error:
        raise BadInput(Problem("rollout.engine", "vllm", f"cannot be imported ({error})", INSTALL)) from None
    return vllm, current_platform


@contextmanager
def _unnoticed(device: torch.device) -> Iterator[None]:
    """Starting vLLM seeds torch and takes threads from it: put both back, for dropout's masks and for offload."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    torch.set_num_threads(threads)


@contextmanager
def _problems_reported() -> Iterator[None]:
    """What vLLM raises when it does not start, most often for want of memory, as `BadInput`."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        line = said.strip().partition("\n")[0].rstrip(".") or type(error).__name__
        wrong, mend = f"vLLM does not start: {line}", "lower rollout.vllm_memory, or give builtin"
        raise BadInput(Problem("rollout.engine", "vllm", wrong, mend)) from error


def _leave_ranks_alone(llm: Any) -> None:
    """Keep vLLM from taking the process groups along when it is let go: they are the trainer's, who sees to them."""
    finalizer = getattr(llm.llm_engine.engine_core, "_finalizer", None)
    if finalizer is not None:
        finalizer.detach()
