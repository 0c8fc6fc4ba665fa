"""The sampler draws from the mixture it names: chi-square against enumeration, at a level of 1e-4, fixed seeds.

That each token is the one which its coin and its uniform number name, `test_decode_against_fresh_forward.py` shows.
One sequence of coins serves all rows when shared, so rows are independent only given the coins: there the test
conditions on them.
"""

from dataclasses import replace

import pytest
import torch
from goodness_of_fit import p_value
from reference.sampling import proposal
from tiny_models import tiny_llama
from torch import Tensor

from distill.config import RolloutSettings
from distill.data.batches import Rollouts, TokenBatch
from distill.data.loading import token_batch
from distill.models.attention import grouped_attention
from distill.models.packing import packed
from distill.rollout.decode import Randomness, decode
from distill.rollout.ends import EndIds
from distill.rollout.sampling import coins, token_uniforms

VOCAB, STEPS, ROWS, LEVEL = 6, 2, 6000, 1e-4
EOS = EndIds([0])


@pytest.fixture(scope="module")
def pair() -> tuple[torch.nn.Module, torch.nn.Module]:
    return tiny_llama(VOCAB, 1, seed=5), tiny_llama(VOCAB, 2, seed=6)


def prompts(rows: int, lengths: tuple[int, ...] = (3,)) -> TokenBatch:
    texts = [[1 + (i % (VOCAB - 1)) for i in range(length)] for length in lengths]
    return token_batch([{"prompt_ids": texts[row % len(texts)], "response_ids": []} for row in range(rows)])


@torch.no_grad()
def sample(
    pair: tuple, settings: RolloutSettings, batch: TokenBatch, seed: int = 0, chance: Randomness | None = None
) -> Rollouts:
    rows = torch.arange(len(batch))
    chance = chance or Randomness(coins(settings, seed, 0, rows), token_uniforms(settings, seed, 0, rows))
    return decode(*pair, batch, chance, settings, EOS, VOCAB)[0]


@torch.no_grad()
def step_distribution(model: torch.nn.Module, prefix: list[int], settings: RolloutSettings) -> Tensor:
    """One component's next-token distribution by a plain forward."""
    logits = model(torch.tensor([prefix])).logits[0, -1].double()
    return torch.tensor(proposal(logits, settings.temperature, settings.top_k, settings.top_p))


def enumerate_sequences(
    pair: tuple, prompt: list[int], settings: RolloutSettings, component
) -> dict[tuple[int, ...], float]:
    """Probability of every response up to the limit (shorter where EOS ends it); `component(t, q, p)` mixes."""
    steps = settings.max_new_tokens
    out: dict[tuple[int, ...], float] = {}
    open_ends: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    for t in range(steps):
        following = []
        for prefix, probability in open_ends:
            q, p = (step_distribution(model, prompt + list(prefix), settings) for model in pair)
            for token, chance in enumerate(component(t, q, p).tolist()):
                target = (*prefix, token)
                if token == 0 or t == steps - 1:
                    out[target] = out.get(target, 0.0) + probability * chance
                else:
                    following.append((target, probability * chance))
        open_ends = following
    return out


def responses(rollouts: Rollouts) -> list[tuple[int, ...]]:
    pairs = zip(rollouts.response_ids.tolist(), rollouts.response_lengths.tolist(), strict=True)
    return [tuple(ids[:length]) for ids, length in pairs]


CASES = [{"alpha": 0.7}, {"top_k": 4, "top_p": 0.8, "temperature": 1.3}]


@pytest.mark.parametrize("change", CASES, ids=str)
def test_per_row_coins_draw_from_the_mixture(pair: tuple, change: dict[str, float]) -> None:
    settings = RolloutSettings(max_new_tokens=STEPS, coins="per_row", **change)
    batch = prompts(ROWS)
    expected = enumerate_sequences(
        pair, batch.prompt_ids[0].tolist(), settings, lambda t, q, p: settings.alpha * p + (1 - settings.alpha) * q
    )
    assert p_value(responses(sample(pair, settings, batch)), expected) > LEVEL


@pytest.mark.parametrize("flips", [(False, True), (True, False)], ids=str)
def test_shared_coins_draw_each_step_from_the_model_the_coin_names(pair: tuple, flips: tuple) -> None:
    settings = RolloutSettings(max_new_tokens=STEPS, top_k=3, temperature=0.8)
    batch = prompts(ROWS)
    chance = Randomness(torch.tensor(flips).expand(ROWS, STEPS), token_uniforms(settings, 1, 0, torch.arange(ROWS)))
    expected = enumerate_sequences(pair, batch.prompt_ids[0].tolist(), settings, lambda t, q, p: p if flips[t] else q)
    assert p_value(responses(sample(pair, settings, batch, chance=chance)), expected) > LEVEL


@pytest.mark.parametrize(
    ("change", "dtype"),
    [({"top_k": 2, "temperature": 1.4}, torch.float32), ({"top_p": 0.9}, torch.bfloat16)],
    ids=str,
)
def test_long_responses_keep_the_distribution_while_rows_leave(change: dict, dtype: torch.dtype) -> None:
    """Three ids and 6 steps: rows of unequal prompts end at all lengths, and leave student and teacher meanwhile."""
    models = tuple(tiny_llama(3, layers, seed, initializer_range=0.2).to(dtype) for layers, seed in ((1, 5), (2, 6)))
    settings = RolloutSettings(max_new_tokens=6, coins="per_row", alpha=0.4, **change)
    texts = [[1, 2], [2, 1, 1, 2]]
    batch = token_batch([{"prompt_ids": texts[row % 2], "response_ids": []} for row in range(ROWS)])
    rows = torch.arange(ROWS)
    chance = Randomness(coins(settings, 0, 0, rows), token_uniforms(settings, 0, 0, rows))
    with torch.no_grad(), packed(models[0]), packed(models[1]), grouped_attention(models[0]):
        rollouts, _ = decode(*models, batch, chance, settings, EOS, 3)
    assert rollouts.response_lengths.unique().tolist() == [1, 2, 3, 4, 5, 6]
    for which, text in enumerate(texts):
        expected = enumerate_sequences(models, text, settings, lambda t, q, p: 0.4 * p + 0.6 * q)
        assert p_value(responses(rollouts)[which::2], expected) > LEVEL


def test_a_wrong_mixture_is_noticed(pair: tuple) -> None:
    """The check can fail: samples of α = 0.2 are not taken for samples of α = 0.4."""
    settings = RolloutSettings(max_new_tokens=STEPS, coins="per_row", alpha=0.2)
    batch = prompts(ROWS)
    wrong = enumerate_sequences(pair, batch.prompt_ids[0].tolist(), settings, lambda t, q, p: 0.4 * p + 0.6 * q)
    assert p_value(responses(sample(pair, settings, batch)), wrong) < 1e-6


def test_each_model_is_called_only_where_a_coin_asks_and_once_at_the_end(pair: tuple) -> None:
    settings = RolloutSettings(max_new_tokens=8, alpha=0.5)
    flips = torch.tensor([False, True, False, False, True, False, False, True])
    chance = Randomness(flips.expand(3, 8), token_uniforms(settings, 0, 0, torch.arange(3)))
    for coin, calls in ((chance.coins, (5 + 1, 3)), (~chance.coins, (3, 5 + 1))):
        with torch.no_grad():
            found = decode(*pair, prompts(3), replace(chance, coins=coin), settings, EndIds([]), VOCAB)
        assert found[1] == calls


@pytest.mark.parametrize("flips", [[4, 5, 6], [1, 5], [5, 7], list(range(12)), [0, 2, 3]], ids=str)
def test_both_models_rest_once_all_rows_have_ended(pair: tuple, flips: list[int]) -> None:
    """Rows may all end before a model's first turn; it still scores them."""
    settings = RolloutSettings(max_new_tokens=12, alpha=0.5)
    rows = torch.arange(8)
    coin = torch.isin(torch.arange(12), torch.tensor(flips)).expand(8, 12)
    every_token_ends = EndIds(range(VOCAB))
    chance = Randomness(coin, token_uniforms(settings, 0, 0, rows))
    for ends in (every_token_ends, EndIds([0, 1, 2, 3])):
        with torch.no_grad():
            rollouts, calls = decode(*pair, prompts(8), chance, settings, ends, VOCAB)
        if ends is every_token_ends:
            asked = sum(flip < 4 for flip in flips)  # the first look at who has ended comes after 4 tokens
            assert calls == (max(4 - asked, 1), max(asked, 1))
        with torch.no_grad():
            pairs = zip(pair, (rollouts.behavior_logprobs, rollouts.teacher_logprobs), strict=True)
            for model, scores in pairs:
                logits = model(**rollouts.model_inputs()).logits[:, rollouts.prompt_ids.shape[1] - 1 : -1]
                fresh = logits.log_softmax(-1).gather(-1, rollouts.response_ids[..., None]).squeeze(-1)
                mask = rollouts.response_mask
                torch.testing.assert_close(scores[mask], fresh[mask], rtol=1e-4, atol=1e-4)


def test_the_same_rows_come_out_of_any_batching(pair: tuple) -> None:
    settings = RolloutSettings(max_new_tokens=6, coins="per_row")
    batch = prompts(12, lengths=(2, 5))
    rows = torch.arange(12)
    whole = responses(sample(pair, settings, batch))
    parts: list[tuple[int, ...]] = []
    for index in rows.split(5):
        chance = Randomness(coins(settings, 0, 0, index), token_uniforms(settings, 0, 0, index))
        parts += responses(sample(pair, settings, batch.rows(index), chance=chance))
    assert parts == whole
