"""What ends a response: ids, and texts however the tokens split them."""

import pytest
import torch
from tiny_models import tiny_llama
from transformers import PreTrainedTokenizerFast

from distill.config import RolloutSettings
from distill.data.batches import TokenBatch
from distill.data.loading import token_batch
from distill.rollout.decode import Randomness, decode
from distill.rollout.ends import response_ends
from distill.rollout.sampling import coins, token_uniforms


def ends_after(tokenizer: PreTrainedTokenizerFast, text: str, **stops: object) -> list[str]:
    """The texts at which a response with these tokens would end."""
    ids = torch.tensor([tokenizer.encode(text)])
    ends = response_ends(RolloutSettings(**stops), [0], tokenizer, "cpu")
    row = torch.tensor([0])
    return [tokenizer.decode(ids[0, :t]) for t in range(1, ids.shape[1] + 1) if bool(ends(ids[:, :t], row))]


def test_a_text_ends_a_response_where_its_last_token_completes_it(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "The first line.\n\nThe second###and more"
    assert ends_after(tokenizer, text, stop=["zzz"]) == []
    assert ends_after(tokenizer, text, stop=["\n\n"])[0].rstrip("T") == "The first line.\n\n"
    found = ends_after(tokenizer, text, stop=["zzz", "second###"])
    assert found
    assert found[0].startswith("The first line.\n\nThe second###")


def test_ids_end_a_response_beside_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.encode("one two")
    assert ends_after(tokenizer, "one two", stop_ids=[ids[1]])[0] == tokenizer.decode(ids[:2])
    assert ends_after(tokenizer, "one<eos>two") == ["one<eos>"]


@pytest.mark.parametrize("batch", [1, 5, 24])
def test_stops_give_the_same_rollouts_in_any_batching(tokenizer: PreTrainedTokenizerFast, batch: int) -> None:
    """Each response is that of an endless decode, cut behind its first stop."""
    models = tiny_llama(len(tokenizer), 1, 5), tiny_llama(len(tokenizer), 2, 6)
    rows, prompts = torch.arange(24), token_batch([{"prompt_ids": [9 + i, 8], "response_ids": []} for i in range(24)])
    plain = RolloutSettings(max_new_tokens=12, coins="per_row", alpha=0.3)
    endless = sample(models, prompts, rows, plain, tokenizer)
    texts = [tokenizer.convert_ids_to_tokens(ids)[5] for ids in endless.response_ids[:3].tolist()]
    stops = plain.model_copy(update={"stop": (tokenizer.convert_tokens_to_string(texts[:1]),), "stop_ids": (11, 300)})
    ends = response_ends(stops, [], tokenizer, "cpu")
    for index in rows.split(batch):
        part = sample(models, prompts.rows(index), index, stops, tokenizer)
        for place, row in enumerate(index.tolist()):
            ids = endless.response_ids[row : row + 1]
            ending = [t for t in range(1, 13) if bool(ends(ids[:, :t], torch.tensor([0])))]
            length = int(part.response_lengths[place])
            assert length == (ending[0] if ending else 12)
            assert bool(part.ended[place]) == bool(ending)
            assert part.response_ids[place, :length].tolist() == ids[0, :length].tolist()
    assert int(sample(models, prompts, rows, stops, tokenizer).ended.sum()) > 0


@torch.no_grad()
def sample(
    models: tuple,
    prompts: TokenBatch,
    rows: torch.Tensor,
    settings: RolloutSettings,
    tokenizer: PreTrainedTokenizerFast,
):
    chance = Randomness(coins(settings, 0, 0, rows), token_uniforms(settings, 0, 0, rows))
    ends = response_ends(settings, [], tokenizer, "cpu")
    return decode(*models, prompts, chance, settings, ends, len(tokenizer))[0]
