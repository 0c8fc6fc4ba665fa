"""The teacher behind the student: proposes where a coin asks, reads and scores every token once.

The hidden state in column j predicts token j. A catch-up reads all tokens since the last one in a single forward, so
its cost is that of scoring; rows that have ended and are scored do not take part in the next.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from distill.config import RolloutSettings
from distill.data.batches import TokenBatch
from distill.models.heads import project
from distill.rollout.gathering import Together, on_this_rank
from distill.rollout.reader import Reader
from distill.rollout.sampling import draw, logprob_of, proposal, proposes_as_is

# Rows of logits made at once while scoring: bounds memory at [256, V] fp32.
_SCORE_ROWS = 256


class Scores(NamedTuple):
    """What the teacher says of each response token; arbitrary at padding."""

    logprobs: Float[Tensor, "batch response"]
    """log p of the untempered teacher."""
    proposed: Float[Tensor, "batch response"]
    """Log-probability of its tempered, truncated proposal."""
    hidden: Float[Tensor, "batch response hidden"]
    """Final hidden states."""
    reads: Int[Tensor, "batch response"]
    """How often each of these states was computed."""


class Follower:
    """Follows one decode of `len(prompts)` rows."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: TokenBatch,
        settings: RolloutSettings,
        vocab: int,
        together: Together = on_this_rank,
    ):
        self.model, self.settings, self.vocab, self.together = model, settings, vocab, together
        self.reader = Reader(model, prompts, settings.max_new_tokens)
        shape, device = (len(prompts), settings.max_new_tokens), prompts.prompt_ids.device
        self._scores = Scores(
            torch.zeros(shape, device=device),
            torch.zeros(shape, device=device),
            torch.zeros((*shape, model.config.get_text_config().hidden_size), dtype=model.dtype, device=device),
            torch.zeros(shape, dtype=torch.int32, device=device),
        )
        self._rows = torch.arange(len(prompts), device=device)
        self._read = self._scored = 0
        self._logits: Tensor | None = None

    def draw(
        self,
        tokens: Int[Tensor, "batch so_far"],
        lengths: Int[Tensor, " batch"],
        uniforms: Float[Tensor, " batch"],
    ) -> Int[Tensor, " batch"]:
        """Catch up with the tokens so far and draw the next one; arbitrary for rows that have ended."""
        going = self._going(lengths)
        if not self.together(lengths.new_tensor(len(going)) > 0):
            return torch.zeros_like(lengths)
        self._keep(going)
        block = self._catch_up(tokens)
        self._score(block[:, :-1], tokens)
        self._logits = project(self.model, block[:, -1], self.vocab)
        drawn, _ = draw(proposal(self._logits, self.settings), uniforms[self._rows])
        return torch.zeros_like(lengths).index_copy(0, self._rows, drawn)

    def score_drawn(self, drawn: Int[Tensor, " batch"]) -> None:
        """Score the tokens of the step just drawn for, from the logits already made."""
        if self._logits is None:
            return  # every row had ended
        self._note(slice(self._scored, self._scored + 1), *self._both(self._logits, drawn[self._rows]))
        self._scored += 1
        self._logits = None

    def finish(self, tokens: Int[Tensor, "batch response"], lengths: Int[Tensor, " batch"]) -> Scores:
        """Read and score what is left; a row's last token is scored without being read."""
        width = tokens.shape[1]
        going = self._going(lengths)
        unread = self._scored < width and len(going) > 0
        if self.together(lengths.new_tensor(unread) > 0):
            if unread:
                self._keep(going)
                self._score(self._catch_up(tokens[:, :-1]), tokens)
            else:
                self.reader.idle()
        return Scores(*(values[:, :width] for values in self._scores))

    def _going(self, lengths: Int[Tensor, " batch"]) -> Int[Tensor, " going"]:
        """Which of the rows have tokens that are not scored."""
        return (lengths[self._rows] > self._scored).nonzero().squeeze(1)

    def _keep(self, going: Int[Tensor, " going"]) -> None:
        """Let the other rows go; one always stays, for the ranks that are not done."""
        if len(going) == 0:
            going = going.new_zeros(1)
        if self._read and len(going) < len(self._rows):
            self._rows = self._rows[going]
            self.reader.keep(going)

    def _catch_up(self, tokens: Int[Tensor, "batch so_far"]) -> Float[Tensor, "rows new hidden"]:
        """Hidden states of the columns from the first not yet scored on."""
        block = self.reader.read(tokens[self._rows, self._read :])
        self._read = tokens.shape[1]
        columns = slice(self._scored, self._scored + block.shape[1])
        self._scores.hidden[self._rows, columns] = block
        self._scores.reads[self._rows, columns] += 1
        return block

    def _score(self, hidden: Float[Tensor, "rows new hidden"], tokens: Int[Tensor, "batch so_far"]) -> None:
        columns = slice(self._scored, self._scored + hidden.shape[1])
        targets = tokens[self._rows, columns]
        pairs = zip(hidden.flatten(0, 1).split(_SCORE_ROWS), targets.flatten().split(_SCORE_ROWS), strict=True)
        parts = [self._both(project(self.model, h, self.vocab), ids) for h, ids in pairs]
        if parts:
            plain, proposed = (torch.cat(values).view(targets.shape) for values in zip(*parts, strict=True))
            self._note(columns, plain, proposed)
        self._scored = columns.stop

    def _note(self, columns: slice, plain: Tensor, proposed: Tensor) -> None:
        shape = (len(self._rows), columns.stop - columns.start)
        self._scores.logprobs[self._rows, columns] = plain.view(shape)
        self._scores.proposed[self._rows, columns] = proposed.view(shape)

    def _both(
        self, logits: Float[Tensor, "n vocab"], tokens: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """log p of the tokens under the model itself and under its proposal."""
        plain = logprob_of(logits, tokens)
        if proposes_as_is(self.settings):
            return plain, plain
        return plain, logprob_of(proposal(logits, self.settings), tokens)
