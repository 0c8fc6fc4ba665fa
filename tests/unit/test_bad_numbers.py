"""What is not finite stops an update of any objective, is sampled from without harm, and is kept within bounds."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from over_logits import sum_over_logits
from pydantic import TypeAdapter
from safetensors.torch import load_file
from tiny_models import tiny_llama
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from distill.bad_numbers import GRADIENT, LOSS, REWARD, TEACHER, BadSteps, Sound, Suspects
from distill.config import RolloutSettings
from distill.data.batches import Rollouts, TokenBatch
from distill.data.loading import token_batch
from distill.objective_settings import ObjectiveSettings
from distill.objectives import build
from distill.objectives.supervised import plain_text_loss
from distill.objectives.terms import LossTerms
from distill.rollout.decode import Randomness, decode
from distill.rollout.ends import EndIds
from distill.rollout.sampling import coins, draw, proposal, token_uniforms
from distill.topology import Topology

OBJECTIVES: list[dict[str, Any]] = [
    *({"name": "kd", "divergence": name} for name in ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_rkl")),
    *({"name": "kd", "divergence": name, "ce_weight": 0.5} for name in ("akl", "tvd")),
    *({"name": name} for name in ("gkd", "distillm", "distillm2", "taid", "uld", "opd")),
    *({"name": "minillm", "preset": preset} for preset in ("paper", "lmops", "default")),
    {"name": "minillm", "single_step": False},
]
# These take the log-probabilities that came with the rollout, and no more of the teacher.
WITHOUT_LOGITS = [{"name": "opd"}, {"name": "minillm", "single_step": False}]
WIDTH, VOCAB = 5, 11


def rollouts() -> Rollouts:
    g = torch.Generator().manual_seed(0)
    lengths = torch.tensor([5, 3, 1])
    mask = torch.arange(WIDTH) < lengths[:, None]

    def each() -> Tensor:
        return -torch.rand(3, WIDTH, generator=g) * mask

    return Rollouts(
        prompt_ids=torch.ones(3, 2, dtype=torch.long),
        prompt_lengths=torch.full((3,), 2),
        response_ids=torch.randint(0, VOCAB, (3, WIDTH), generator=g) * mask,
        response_lengths=lengths,
        teacher_lengths=lengths,
        behavior_logprobs=each(),
        teacher_logprobs=each(),
        importance_weights=-each(),
        from_teacher=mask & False,
        ended=lengths < WIDTH,
    )


def terms_of(settings: dict[str, Any], batch: TokenBatch, student: Tensor, teacher: Tensor) -> LossTerms:
    objective = build(TypeAdapter(ObjectiveSettings).validate_python(settings))
    (batch,) = objective.prepare([batch], lambda value: value)
    return objective.loss(lambda evaluate: sum_over_logits(student, evaluate), teacher.__getitem__, batch)


def both_logits() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    student, teacher = (2 * torch.randn(9, VOCAB, generator=g) for _ in range(2))
    return student.requires_grad_(), teacher


@pytest.mark.parametrize(
    ("settings", "whose"),
    [
        (settings, whose)
        for settings in OBJECTIVES
        for whose in ("student", "teacher")[: 2 - (settings in WITHOUT_LOGITS)]
    ],
    ids=str,
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_logit_makes_all_the_gradient_nan(settings: dict[str, Any], whose: str, value: float) -> None:
    student, teacher = both_logits()
    with torch.no_grad():
        (student if whose == "student" else teacher)[4, 3] = value
    batch = rollouts()
    terms = terms_of(settings, batch, student, teacher)
    sound = Sound.of(terms, batch)
    assert not sound.loss
    (gradient,) = torch.autograd.grad(sound.held(terms.total), student)
    assert bool(gradient.isnan().all())


@pytest.mark.parametrize("settings", OBJECTIVES, ids=str)
def test_what_a_model_rules_out_is_sound_and_changes_no_bit(settings: dict[str, Any]) -> None:
    student, teacher = both_logits()
    teacher[:, 2] = -torch.inf
    batch = replace(rollouts(), response_ids=rollouts().response_ids.clamp_max(1))
    terms = terms_of(settings, batch, student, teacher)
    sound = Sound.of(terms, batch)
    assert sound.loss
    assert sound.reward
    held = sound.held(terms.total)
    assert torch.equal(held, terms.total)
    ours, plain = (torch.autograd.grad(total, student, retain_graph=True)[0] for total in (held, terms.total))
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("soft", [0.0, 0.5])
def test_plain_text_and_cross_entropy_are_held_too(soft: float) -> None:
    student, teacher = both_logits()
    batch = rollouts()
    with torch.no_grad():
        student[0, 0] = torch.nan
    targets = batch.response_ids[batch.response_mask]
    terms = plain_text_loss(lambda evaluate: sum_over_logits(student, evaluate), teacher.__getitem__, targets, soft)
    assert not Sound.of(terms, batch).loss


@pytest.mark.parametrize("settings", OBJECTIVES, ids=str)
@pytest.mark.parametrize("field", ["teacher_logprobs", "behavior_logprobs", "importance_weights"])
def test_a_rollout_of_nan_is_a_bad_reward_whatever_the_loss_takes_of_it(settings: dict[str, Any], field: str) -> None:
    student, teacher = both_logits()
    batch = rollouts()
    getattr(batch, field)[1, 0] = torch.nan
    terms = terms_of(settings, batch, student, teacher)
    sound = Sound.of(terms, batch)
    assert not sound.reward
    assert bool(torch.autograd.grad(sound.held(terms.total), student)[0].isnan().all())


@pytest.mark.parametrize("whitening", ["none", "tokens", "padded_micro_batch"])
def test_a_reward_that_its_clip_bounds_is_sound(whitening: str) -> None:
    student, teacher = both_logits()
    batch = rollouts()
    batch.teacher_logprobs[0, 1] = -torch.inf
    for clip, sound in ((5.0, True), (None, False)):
        settings = {"name": "minillm", "reward_clip": clip, "whitening": whitening}
        terms = terms_of(settings, batch, student, teacher)
        assert bool(Sound.of(terms, batch).reward) == sound


@pytest.mark.parametrize("vocab", [6, 256, 300, 1000])
@pytest.mark.parametrize(
    "knobs", [{}, {"top_k": 3}, {"top_p": 0.7}, {"temperature": 0.5, "top_k": 4, "top_p": 0.9}], ids=str
)
def test_a_draw_from_nan_is_some_token(vocab: int, knobs: dict[str, float]) -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(6, vocab, generator=g)
    uniforms = torch.tensor([0.0, 0.2, 0.5, 0.9, 1 - 2**-24, 0.3])
    settings = RolloutSettings.model_validate(knobs)
    expected = draw(proposal(logits, settings), uniforms)
    logits[0], logits[1, 3], logits[2, -1], logits[3, 0], logits[4] = (
        torch.nan,
        torch.nan,
        torch.nan,
        torch.inf,
        -torch.inf,
    )
    tokens, normaliser = draw(proposal(logits, settings), uniforms)
    assert bool(((tokens >= 0) & (tokens < vocab)).all())
    assert bool((proposal(logits, settings).gather(1, tokens[:, None]).squeeze(1) - normaliser)[:5].isnan().all())
    assert int(tokens[5]) == int(expected[0][5])


@pytest.mark.parametrize("whose", ["student", "teacher", "both"])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("together", [False, True])
def test_rows_that_a_model_cannot_read_leave_the_others_alone(whose: str, alpha: float, together: bool) -> None:
    """Token 7 stands in prompts only: no row that lacks it meets it."""
    real, blind = 6, 7
    pair = [tiny_llama(8, layers, seed=5, tie_word_embeddings=False) for layers in (1, 2)]
    settings = RolloutSettings(alpha=alpha, max_new_tokens=9)
    texts = [[1, 2, 3], [1, blind, 3], [4, 5], [blind]]
    batch = token_batch([{"prompt_ids": text, "response_ids": []} for text in texts])
    rows = torch.arange(len(texts))
    chance = Randomness(coins(settings, 0, 0, rows), token_uniforms(settings, 0, 0, rows))
    keep_step = {"together": (lambda flags: flags.clone())} if together else {}

    @torch.no_grad()
    def sample() -> Rollouts:
        return decode(*pair, batch, chance, settings, EndIds([0]), real, **keep_step)[0]

    whole = sample()
    for model, name in zip(pair, ("student", "teacher"), strict=True):
        if whose in (name, "both"):
            with torch.no_grad():
                model.model.embed_tokens.weight[blind] = torch.nan
    broken = sample()
    assert bool(((broken.response_ids >= 0) & (broken.response_ids < real)).all())
    for row in (0, 2):
        ours, theirs = broken.rows([row]).tensors(), whole.rows([row]).tensors()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for row in (1, 3):
        one = broken.rows([row])
        said = {"student": one.behavior_logprobs, "teacher": one.teacher_logprobs}
        assert all(bool(values.isnan().all()) == (whose in (name, "both")) for name, values in said.items())


@pytest.fixture
def bad_steps(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> BadSteps:
    return BadSteps(tmp_path, tokenizer, Topology(0, 1, 1, torch.device("cpu"), None, None), None)


def suspects(**found: Rollouts) -> Suspects:
    names = {"teacher": TEACHER, "reward": REWARD, "loss": LOSS}
    return {GRADIENT: [rollouts(), rollouts()]} | {names[name]: [batch] for name, batch in found.items()}


def test_the_cause_is_named_before_its_effects(bad_steps: BadSteps) -> None:
    batch = rollouts()
    told = [
        str(bad_steps.note(step, found))
        for step, found in enumerate(
            [
                suspects(loss=batch),
                suspects(loss=batch, reward=batch),
                suspects(loss=batch, teacher=batch, reward=batch),
                suspects(),
            ],
            1,
        )
    ]
    kept = f"its batch is kept in {bad_steps.folder}"
    assert told == [
        f"step 1 skipped: the loss is not finite on rank 0; {kept}",
        f"step 2 skipped: the reward is not finite on rank 0; {kept}",
        f"step 3 skipped: the teacher's logits are not finite on rank 0; {kept}",
        f"step 4 skipped: the gradient is not finite; {kept}",
    ]
    assert bad_steps.figures() == {"fault/skipped_steps": 4, "fault/skipped_in_a_row": 4}
    assert bad_steps.note(5, None) is None
    assert bad_steps.figures() == {"fault/skipped_steps": 4, "fault/skipped_in_a_row": 0}


def test_a_batch_is_kept_as_it_is(bad_steps: BadSteps) -> None:
    batch = replace(rollouts(), teacher_hidden=torch.ones(3, WIDTH, 7))
    assert batch.teacher_hidden is not None
    batch.teacher_hidden[1, 2, 3] = torch.nan
    batch.behavior_logprobs[0, 0] = torch.nan
    bad_steps.note(12, suspects(reward=batch))
    tensors = load_file(bad_steps.folder / "step-0000012-rank-0.safetensors")
    for name, value in batch.tensors().items():
        if name != "teacher_hidden":
            torch.testing.assert_close(tensors[f"0.{name}"], value, rtol=0, atol=0, equal_nan=True)
    assert (~tensors["0.teacher_hidden_is_finite"]).nonzero().tolist() == [[1, 2]]
    about = json.loads((bad_steps.folder / "step-0000012-rank-0.json").read_text())
    assert (about["step"], about["rank"], about["not_finite"]) == (12, 0, REWARD)
    text = bad_steps.tokenizer.decode(batch.rows([2]).response_ids[0])
    assert about["rows"][2]["response"] == text


def test_no_more_than_a_few_are_kept(bad_steps: BadSteps) -> None:
    told = [str(bad_steps.note(step, suspects(loss=rollouts()))) for step in range(1, 11)]
    assert len(list(bad_steps.folder.glob("*.safetensors"))) == len(list(bad_steps.folder.glob("*.json"))) == 8
    assert told[8].endswith(f"; 8 batches of earlier ones are kept in {bad_steps.folder}")
    again = str(bad_steps.note(8, suspects(loss=rollouts())))  # a resumed run comes by once more
    assert again.endswith(f"; its batch is kept in {bad_steps.folder}")
    assert bad_steps.memory["skipped_steps"] == 11


def test_a_folder_that_cannot_be_written_ends_nothing(bad_steps: BadSteps) -> None:
    bad_steps.folder.write_text("in the way")
    told = str(bad_steps.note(1, suspects(loss=rollouts())))
    assert "step 1 skipped: the loss is not finite on rank 0; its batch could not be kept (" in told
    assert bad_steps.in_a_row == 1
