"""vLLM itself as the sampling engine, on whatever platform it was built for; skipped where it is not installed.

Statistics at a level of 1e-4, fixed seeds.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import yaml
from goodness_of_fit import p_value
from tiny_models import tiny_llama
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from distill.config import ModelSettings, RolloutSettings
from distill.data.batches import Rollouts
from distill.data.loading import token_batch
from distill.errors import BadInput
from distill.rollout.ends import response_ends
from distill.rollout.external import ExternalWorker
from distill.rollout.sampling import proposal
from distill.rollout.vllm_engine import VllmEngine
from distill.topology import Topology, start, stop

pytest.importorskip("vllm", reason="vLLM is optional and not installed here")
pytestmark = pytest.mark.slow

PADDED, LIMIT, LONGEST, LEVEL = 620, 12, 8, 1e-4


class Plain:
    """An unsharded model as a worker takes it."""

    def __init__(self, model: LlamaForCausalLM, vocab: int):
        self.model, self.vocab, self.missing_bytes = model, vocab, 0

    def train(self, mode: bool = True) -> None:
        self.model.train(mode)

    @contextmanager
    def whole(self) -> Iterator[LlamaForCausalLM]:
        yield self.model

    by_layer = whole


def student(seed: int, tied: bool) -> LlamaForCausalLM:
    """Its vocabulary is padded; heads are wide enough for vLLM's kernels."""
    settings = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    return tiny_llama(PADDED, 2, seed, tie_word_embeddings=tied, initializer_range=0.1, **settings)


# Of a build for processors.
SMALL = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@pytest.fixture(scope="module")
def topology(environment: dict[str, str]) -> Iterator[Topology]:
    """One rank; `environment` is named so that it is read before."""
    # Both the ranks and vLLM write into the environment: all of it is put back.
    with patch.dict(os.environ, SMALL):
        yield start()
        stop()


Make = Callable[..., ExternalWorker]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def make(
    request: pytest.FixtureRequest,
    topology: Topology,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Make]:
    """Workers with any settings over one engine: starting one takes seconds."""
    tied, vocab, device = request.param, len(tokenizer), topology.device
    folder = tmp_path_factory.mktemp("vllm")
    student(1, tied).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    widest = RolloutSettings(alpha=0, max_new_tokens=LIMIT, stop=("with a tokenizer",), batch=64)
    patched = pytest.MonkeyPatch()
    if tied and device.type == "cpu":
        # On processors vLLM packs the head when it starts, and a tied one is not packed anew when weights come.
        patched.setattr("vllm._custom_ops._supports_onednn", False)
    engine = VllmEngine(ModelSettings(path=str(folder)), torch.float32, vocab, widest, [0], LONGEST, device)

    def worker(seed: int = 1, **changes: object) -> ExternalWorker:
        settings = widest.model_copy(update={"stop": (), "engine": "vllm"} | changes)
        mine = copy(engine)
        mine.settings, mine.ends = settings, [0, *settings.stop_ids]
        ends = response_ends(settings, [0], tokenizer, device)
        plain = [Plain(model.to(device), vocab) for model in (student(seed, tied), tiny_llama(PADDED + 4, 1, 9))]
        return ExternalWorker(*plain, settings, ends, 0, topology, mine)

    yield worker
    patched.undo()


def sample(worker: ExternalWorker, rows: int, round_index: int = 0) -> Rollouts:
    """Prompts of unequal length."""
    texts = [[5 + row % 7, 9, 11, 8, 30][: 3 + row % 3] for row in range(rows)]
    prompts = token_batch([{"prompt_ids": text, "response_ids": []} for text in texts])
    return worker.collect(prompts, torch.arange(rows), round_index)


@torch.no_grad()
def fresh_logprobs(model: LlamaForCausalLM, rollouts: Rollouts, vocab: int) -> torch.Tensor:
    """log q of the response tokens over the first `vocab` ids, by one plain forward."""
    logits = model(**rollouts.model_inputs()).logits[:, rollouts.prompt_ids.shape[1] - 1 : -1, :vocab]
    return logits.float().log_softmax(-1).gather(-1, rollouts.response_ids[..., None]).squeeze(-1)


def texts(rollouts: Rollouts) -> list[list[int]]:
    pairs = zip(rollouts.response_ids.tolist(), rollouts.response_lengths.tolist(), strict=True)
    return [ids[:length] for ids, length in pairs]


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.7, "top_k": 50, "top_p": 0.9}], ids=str)
def test_rollouts_hold_what_a_fresh_forward_says(make: Make, changes: dict, tokenizer: PreTrainedTokenizerFast) -> None:
    """Also after other weights were pushed, with a vocabulary that both models pad differently."""
    vocab = len(tokenizer)
    for seed in (1, 2):
        worker = make(seed, stop_ids=tuple(range(1, 60)), **changes)
        rollouts = sample(worker, 40)
        mask = rollouts.response_mask
        for model, found in (
            (worker.student.model, rollouts.behavior_logprobs),
            (worker.teacher.model, rollouts.teacher_logprobs),
        ):
            wanted = fresh_logprobs(model, rollouts, vocab)
            torch.testing.assert_close(found[mask], wanted[mask], rtol=1e-3, atol=1e-3)
            assert found[~mask].abs().sum() == 0
        assert int(rollouts.response_ids.max()) < vocab
        assert torch.equal(rollouts.importance_weights, mask.float())
        assert not rollouts.from_teacher.any()
        assert torch.equal(rollouts.teacher_forwards, rollouts.response_lengths)
        with torch.no_grad():
            theirs = worker.teacher.model.lm_head(rollouts.teacher_hidden)[..., :vocab].log_softmax(-1)
        theirs = theirs.gather(-1, rollouts.response_ids[..., None]).squeeze(-1)
        torch.testing.assert_close(theirs[mask], rollouts.teacher_logprobs[mask], rtol=1e-4, atol=1e-4)
        last = rollouts.response_ids.gather(1, rollouts.response_lengths[:, None] - 1).squeeze(1)
        assert torch.equal(rollouts.ended, last < 60)
        assert len(rollouts.response_lengths.unique()) > 2
        assert bool((rollouts.ended | (rollouts.response_lengths == LIMIT)).all())


def test_rows_are_repeatable_and_rounds_differ(make: Make) -> None:
    first, again, next_round = (texts(sample(make(), 24, index)) for index in (0, 0, 1))
    assert first == again
    assert sum(a == b for a, b in zip(first, next_round, strict=True)) < 4
    assert texts(sample(make(batch=5), 24)) == first, "teacher batches do not matter"
    assert texts(sample(make(), 10)) == first[:10]


def test_it_sleeps_between_rounds(make: Make) -> None:
    """Memory is given back on accelerators only; who may be awake when is the same everywhere."""
    awake, worker = make(), make()
    wanted = texts(sample(awake, 8))
    engine = worker.engine
    engine._sleeps = True
    engine._sleep()
    for _ in range(2):
        assert engine._llm.llm_engine.is_sleeping()
        assert texts(sample(worker, 8)) == wanted
    engine._llm.wake_up()


@pytest.mark.parametrize("changes", [{}, {"temperature": 1.5, "top_k": 5}, {"top_p": 0.4}], ids=str)
def test_first_tokens_have_the_proposals_distribution(make: Make, changes: dict) -> None:
    rows = 3000
    worker = make(max_new_tokens=1, **changes)
    prompts = token_batch([{"prompt_ids": [7, 8, 9], "response_ids": []}] * rows)
    drawn = worker.collect(prompts, torch.arange(rows), 0).response_ids[:, 0]
    with torch.no_grad():
        logits = worker.student.model(prompts.prompt_ids[:1].to(drawn.device)).logits[0, -1:, : worker.student.vocab]
    expected = proposal(logits, worker.settings).softmax(-1)[0].cpu()
    counts = Counter(drawn.tolist())
    assert all(expected[token] > 0 for token in counts)
    seen = [(token,) for token in drawn.tolist()]
    assert p_value(seen, {(token,): float(p) for token, p in enumerate(expected) if p > 0}) > LEVEL
    wrong = proposal(logits, RolloutSettings(temperature=3)).softmax(-1)[0]
    assert p_value(seen, {(token,): float(p) for token, p in enumerate(wrong)}) < 1e-6, "the check can fail"


def test_responses_end_at_texts_and_ids(make: Make, tokenizer: PreTrainedTokenizerFast) -> None:
    """Each is that of an endless decode, cut behind its first stop."""
    endless = make()
    endless.engine.ends = []
    endless.ends = response_ends(endless.settings, [], tokenizer, endless.device)
    plain = texts(sample(endless, 24))
    # A whole word: what vLLM makes of bytes that are no text is its own affair.
    words = [tokenizer.decode([token]) for row in plain for token in row[3:]]
    stops = {"stop": (next(word for word in words if word.isascii() and len(word) > 2),), "stop_ids": (plain[1][4],)}
    rollouts = sample(make(**stops), 24)
    ends = response_ends(RolloutSettings(**stops), [0], tokenizer, "cpu")
    for ids, found, ended in zip(plain, texts(rollouts), rollouts.ended.tolist(), strict=True):
        row = torch.tensor([ids])
        ending = [t for t in range(1, LIMIT + 1) if bool(ends(row[:, :t], torch.tensor([0])))]
        assert found == ids[: ending[0] if ending else LIMIT]
        assert ended == bool(ending)
    assert int(rollouts.ended.sum()) >= 2
    assert any(stops["stop"][0] in tokenizer.decode(ids) for ids in texts(rollouts))


def test_an_engine_that_is_not_the_student_is_refused(make: Make) -> None:
    worker, push = make(), make().engine.push
    other = student(1, tied=worker.student.model.config.tie_word_embeddings)
    other.model.layers[0].mlp.down_proj.weight.data *= -30
    worker.engine.push = lambda model: push(other.to(model.device))
    with pytest.raises(BadInput, match="away from the student's own; give builtin"):
        sample(worker, 8)


def test_an_engine_that_does_not_start_says_why_in_one_line(make: Make, topology: Topology, tmp_path: Path) -> None:
    student(1, tied=False).save_pretrained(tmp_path)
    given = ModelSettings(path=str(tmp_path)), torch.float32, PADDED, RolloutSettings(alpha=0, max_new_tokens=9)
    with pytest.raises(BadInput, match=r"vLLM does not start: [^\n]*max_model_len[^\n]*; lower rollout.vllm_memory"):
        VllmEngine(*given, [0], 400, topology.device)


def test_sharded_ranks_train_on_what_vllm_samples(
    launch: Callable,
    models_dir: Path,
    records_dir: Path,
    tokenizer: PreTrainedTokenizerFast,
    root: Path,
    tmp_path: Path,
) -> None:
    """Under ZeRO-3 each round is sampled by the student as the step before left it, and repeatable.

    The teacher may be gathered or read layer by layer.
    """
    student(1, tied=False).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    zero3 = json.loads((root / "ds_configs/zero3.json").read_text())
    zero3["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # else so small a model stays whole
    (tmp_path / "zero3.json").write_text(json.dumps(zero3))
    config = {
        "run": {"folder": str(tmp_path / "run"), "seed": 3},
        "student": {"path": str(tmp_path / "student")},
        "teacher": {"path": str(models_dir / "teacher")},
        "data": {"train": str(records_dir / "train")},
        "objective": {"name": "minillm"},
        "precision": "fp32",
        "rollout": {"engine": "vllm", "alpha": 0, "max_new_tokens": 12, "per_round": 8, "inner_epochs": 1, "batch": 3},
        "optim": {"lr": 1e-2, "batch_size": 8, "micro_batch": 4, "steps": 2},
        "parallel": {"deepspeed": str(tmp_path / "zero3.json")},
        "log": {"wandb": "disabled"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    found = []
    for name, overrides in (("first", []), ("again", []), ("by_layer", ["rollout.gather=layer"])):
        (tmp_path / "jobs.json").write_text(json.dumps([{"out": str(tmp_path / name), "overrides": overrides}]))
        launch("tests/ranks/two_steps.py", str(tmp_path / "run.yaml"), str(tmp_path / "jobs.json"), **SMALL)
        found.append(json.loads((tmp_path / f"{name}.json").read_text()))
    first, again, by_layer = found
    assert first["sampled"] == again["sampled"]
    assert first["sampled"] == by_layer["sampled"]
    assert len(first["sampled"]) == 8
    for ours, theirs in zip(first["figures"], by_layer["figures"], strict=True):
        for name in ("reward/mean", "loss/total"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), "however the teacher is gathered"
    for figures in [*first["figures"], *by_layer["figures"]]:
        assert abs(figures["policy/approx_kl_to_behavior"]) < 1e-4
        assert figures["rollout/teacher_share"] == 0
        assert figures["teacher/forwards_per_token"] == 1
