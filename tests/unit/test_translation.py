"""The same text in another tokenizer's ids."""

import pytest
from tiny_models import train_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from distill.data.batches import TokenBatch
from distill.data.loading import token_batch
from distill.data.translation import Translator

TEXTS = [("Name a fruit.", " An apple, or two.", True), ("Why is the sky blue?", " Because of naïve 日本 light", False)]


@pytest.fixture(scope="module")
def theirs(corpus: list[str]) -> PreTrainedTokenizerFast:
    return train_tokenizer(corpus, size=380, special=["<end>", "<begin>"])


def batch(tokenizer: PreTrainedTokenizerFast) -> TokenBatch:
    rows = [
        {
            "prompt_ids": tokenizer.encode(prompt),
            "response_ids": [*tokenizer.encode(response), *([tokenizer.eos_token_id] if ended else [])],
        }
        for prompt, response, ended in TEXTS
    ]
    return token_batch(rows)


def texts(found: TokenBatch, tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, str, bool]]:
    rows = []
    for row in range(len(found)):
        one = found.rows([row])
        response = one.response_ids[0].tolist()
        ended = response[-1] == tokenizer.eos_token_id
        rows.append(
            (tokenizer.decode(one.prompt_ids[0]), tokenizer.decode(response[:-1] if ended else response), ended)
        )
    return rows


def test_text_and_end_stay_the_same(tokenizer: PreTrainedTokenizerFast, theirs: PreTrainedTokenizerFast) -> None:
    # From the coarser to the finer cut, responses lose what reaches beyond; the other way they are whole.
    assert texts(Translator(theirs, tokenizer, [0], None)(batch(theirs)), tokenizer) == TEXTS


def test_a_longer_cut_ends_where_ours_does(tokenizer: PreTrainedTokenizerFast, theirs: PreTrainedTokenizerFast) -> None:
    ours = batch(tokenizer)
    found = Translator(tokenizer, theirs, [0], None)(ours)
    assert bool((found.response_lengths <= ours.response_lengths).all())
    assert bool((found.prompt_lengths > ours.prompt_lengths).all()), "only responses are cut"
    for (_, text, _), (_, wanted, _) in zip(texts(found, theirs), TEXTS, strict=True):
        # The last character may have lost some of its bytes.
        assert wanted.startswith(text.rstrip("\ufffd"))


def test_each_tokenizer_keeps_its_own_bos(corpus: list[str]) -> None:
    ours = train_tokenizer(corpus, size=500, special=["<eos>", "<s>"])
    theirs = train_tokenizer(corpus, size=380, special=["<end>", "<begin>"])
    for tokenizer, begin in ((ours, "<s>"), (theirs, "<begin>")):
        tokenizer.bos_token = begin
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, tokenizer.convert_tokens_to_ids(begin))]
        )
    found = Translator(ours, theirs, [0], None)(token_batch([{"prompt_ids": ours.encode("Why?"), "response_ids": [0]}]))
    assert found.prompt_ids[0].tolist() == theirs.encode("Why?")
    assert theirs.decode(found.prompt_ids[0]) == "<begin>Why?"
    assert found.response_ids[0].tolist() == [theirs.eos_token_id], "no BOS before a response"


def test_a_prompt_too_long_for_their_model_loses_its_beginning(
    tokenizer: PreTrainedTokenizerFast, theirs: PreTrainedTokenizerFast
) -> None:
    ours = batch(tokenizer)
    whole, cut = (Translator(tokenizer, theirs, [0], longest)(ours) for longest in (None, 18))
    assert bool((cut.prompt_lengths + cut.response_lengths <= 18).all())
    assert cut.response_lengths.tolist() == whole.response_lengths.clamp(max=17).tolist()
    for row in range(len(ours)):
        kept = cut.rows([row]).prompt_ids[0].tolist()
        assert kept == whole.rows([row]).prompt_ids[0].tolist()[-len(kept) :]


def test_any_of_our_ends_becomes_theirs(tokenizer: PreTrainedTokenizerFast, theirs: PreTrainedTokenizerFast) -> None:
    """A chat model may end its turn by another token than its tokenizer's EOS."""
    turn_end = tokenizer.convert_tokens_to_ids("<|user|>")
    ours = token_batch([{"prompt_ids": tokenizer.encode("Why?"), "response_ids": [*tokenizer.encode("So."), turn_end]}])
    found = Translator(tokenizer, theirs, [0, turn_end], None)(ours)
    response = found.response_ids[0].tolist()
    assert response[-1] == theirs.eos_token_id
    assert "So.".startswith(theirs.decode(response[:-1]))


def test_a_prompt_goes_on_even_where_their_tokenizer_ends_every_text(
    tokenizer: PreTrainedTokenizerFast, corpus: list[str]
) -> None:
    ending = train_tokenizer(corpus, size=380, special=["<end>"])
    ending.backend_tokenizer.post_processor = TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 0)])
    ours = token_batch([{"prompt_ids": tokenizer.encode("Why?"), "response_ids": [0]}])
    assert ending.decode(Translator(tokenizer, ending, [0], None)(ours).prompt_ids[0]) == "Why?"
