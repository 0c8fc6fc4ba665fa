"""The same text in another model's tokens."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from distill.data.batches import TokenBatch
from distill.data.loading import token_batch


class Translator:
    """From `ours` to `theirs`. A prompt keeps our template's text, without our BOS and with theirs."""

    def __init__(
        self,
        ours: PreTrainedTokenizerBase,
        theirs: PreTrainedTokenizerBase,
        eos_ids: Sequence[int],
        longest: int | None,
    ):
        self.ours, self.theirs = ours, theirs
        self.eos_ids = frozenset(eos_ids)
        """Ours; a model may end a response by others than its tokenizer's."""
        self.longest = longest
        """Most tokens that their model takes; none: any number."""

    def __call__(self, batch: TokenBatch) -> TokenBatch:
        """The batch in their tokens, rows in order, on the CPU.

        A response has at most as many tokens as ours; what would reach beyond stands against nothing. Where the two
        are too long for their model, the prompt loses its beginning.
        """
        rows = zip(
            batch.prompt_ids.tolist(),
            batch.prompt_lengths.tolist(),
            batch.response_ids.tolist(),
            batch.response_lengths.tolist(),
            strict=True,
        )
        translated = []
        for prompt, prompt_length, response, response_length in rows:
            asked = self._prompt(prompt[len(prompt) - prompt_length :])
            answer = self._response(response[:response_length])[:response_length]
            if self.longest is not None:
                answer = answer[: self.longest - 1]
                asked = asked[len(answer) - self.longest :]
            translated.append({"prompt_ids": asked, "response_ids": answer})
        return token_batch(translated)

    def _prompt(self, ids: list[int]) -> list[int]:
        if ids and ids[0] == self.ours.bos_token_id:
            ids = ids[1:]
        translated = list(self.theirs.encode(self.ours.decode(ids)))
        # Some tokenizers end every text; the prompt goes on.
        if translated and translated[-1] == self._end:
            translated.pop()
        return translated or [self._end]

    def _response(self, ids: list[int]) -> list[int]:
        ended = bool(ids) and ids[-1] in self.eos_ids
        text = self.ours.decode(ids[:-1] if ended else ids)
        return [*self.theirs.encode(text, add_special_tokens=False), *([self._end] if ended else [])]

    @property
    def _end(self) -> int:
        end = self.theirs.eos_token_id
        assert isinstance(end, int)
        return end
