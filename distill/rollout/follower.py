"""A model behind the sequence that is being drawn: it reads late, and every token once.

The hidden state in column j predicts token j. A follower is asked for a token where a coin names it; it then takes all
tokens since its last turn in a single forward over its cache, and scores them on the way. A forward of several tokens a
row costs little more than one of a single token, so each turn of the other model is a forward saved.
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

# Rows of logits made at once while scoring: bounds memory at [128, V] fp32.
_SCORE_ROWS = 128
# Rows leave together, once they are this share of those left: each leave moves the caches of those that stay.
_LEAVE_AT = 1 / 8


class Scores(NamedTuple):
    """What the model says of each response token; arbitrary at padding."""

    logprobs: Float[Tensor, "batch response"]
    """Its own log-probability, untempered."""
    proposed: Float[Tensor, "batch response"]
    """Log-probability of its tempered, truncated proposal."""
    reads: Int[Tensor, "batch response"]
    """How often the hidden state that predicts the token was computed."""
    hidden: Float[Tensor, "batch response hidden"] | None
    """Final hidden states, where they are kept."""


class _Turn(NamedTuple):
    """What one turn leaves for the scores of the token drawn at it."""

    logits: Float[Tensor, "rows vocab"]
    proposed: Float[Tensor, "rows vocab"]
    normaliser: Float[Tensor, " rows"]


class Follower:
    """Follows one decode of `len(prompts)` rows."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: TokenBatch,
        settings: RolloutSettings,
        vocab: int,
        keep_hidden: bool,
        together: Together = on_this_rank,
    ):
        self.model, self.settings, self.vocab, self.together = model, settings, vocab, together
        self.keep_hidden = keep_hidden
        self.reader = Reader(model, prompts, settings.max_new_tokens)
        shape, device = (len(prompts), settings.max_new_tokens), prompts.prompt_ids.device
        self._scores = Scores(
            torch.zeros(shape, device=device),
            torch.zeros(shape, device=device),
            torch.zeros(shape, dtype=torch.int32, device=device),
            None,
        )
        self._rows = torch.arange(len(prompts), device=device)
        self._read = self._scored = 0
        self._turn: _Turn | None = None

    def draw(self, tokens: Int[Tensor, "batch so_far"], uniforms: Float[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """Catch up with the tokens so far and draw the next; 0 for rows that have left."""
        block = self._catch_up(tokens)
        self._score(block[:, :-1], tokens)
        logits = project(self.model, block[:, -1], self.vocab)
        proposed = proposal(logits, self.settings)
        drawn, normaliser = draw(proposed, uniforms[self._rows])
        self._turn = _Turn(logits, proposed, normaliser)
        return drawn.new_zeros(len(tokens)).index_copy(0, self._rows, drawn)

    def score_drawn(self, drawn: Int[Tensor, " batch"]) -> None:
        """After a turn of this model: score the token that was drawn at it, by either model."""
        assert self._turn is not None
        (logits, proposed, normaliser), self._turn = self._turn, None
        chosen = drawn[self._rows]
        score = proposed.gather(1, chosen[:, None]).squeeze(1) - normaliser
        self._note(self._scored, score if proposes_as_is(self.settings) else logprob_of(logits, chosen), score)

    def release(self, lengths: Int[Tensor, " batch"]) -> None:
        """Let rows go that have ended and are scored; one always stays, for the ranks that are not done."""
        going = self._unscored(lengths)
        if len(going) == 0:
            going = going.new_zeros(1)
        if len(going) <= len(self._rows) * (1 - _LEAVE_AT):
            self._rows = self._rows[going]
            self.reader.keep(going)

    def finish(self, tokens: Int[Tensor, "batch response"], lengths: Int[Tensor, " batch"]) -> Scores:
        """Read and score what is left; a row's last token is scored without being read."""
        width = tokens.shape[1]
        unread = self._scored < width and len(self._unscored(lengths)) > 0
        if self.together(lengths.new_tensor(unread) > 0):
            if unread:
                self.release(lengths)
                self._score(self._catch_up(tokens[:, :-1]), tokens)
            else:
                self.reader.idle()
        logprobs, proposed, reads, hidden = self._scores
        kept = None if hidden is None else hidden[:, :width]
        return Scores(logprobs[:, :width], proposed[:, :width], reads[:, :width], kept)

    def _unscored(self, lengths: Int[Tensor, " batch"]) -> Int[Tensor, " unscored"]:
        """Which of the rows have tokens that are not scored, or will have."""
        return (lengths[self._rows] > self._scored).nonzero().squeeze(1)

    def _catch_up(self, tokens: Int[Tensor, "batch so_far"]) -> Float[Tensor, "rows new hidden"]:
        """Hidden states of the columns from the first not yet scored on."""
        block = self.reader.read(tokens[self._rows, self._read :])
        self._read = tokens.shape[1]
        columns = slice(self._scored, self._scored + block.shape[1])
        self._scores.reads[self._rows, columns] += 1
        if self.keep_hidden:
            hidden = self._scores.hidden
            if hidden is None:
                # As wide as they come: OPT-350m's are narrower than its `hidden_size`.
                hidden = block.new_zeros((*self._scores.reads.shape, block.shape[-1]))
                self._scores = self._scores._replace(hidden=hidden)
            hidden[self._rows, columns] = block
        return block

    def _score(self, hidden: Float[Tensor, "rows new hidden"], tokens: Int[Tensor, "batch so_far"]) -> None:
        if hidden.shape[1] == 0:
            return
        targets = tokens[self._rows, self._scored : self._scored + hidden.shape[1]]
        pairs = zip(hidden.flatten(0, 1).split(_SCORE_ROWS), targets.flatten().split(_SCORE_ROWS), strict=True)
        parts = [self._both(project(self.model, h, self.vocab), ids) for h, ids in pairs]
        logprobs, proposed = (torch.cat(values).view(targets.shape) for values in zip(*parts, strict=True))
        self._note(self._scored, logprobs, proposed)

    def _note(self, first: int, logprobs: Tensor, proposed: Tensor) -> None:
        logprobs, proposed = (values.view(len(self._rows), -1) for values in (logprobs, proposed))
        self._scored = first + logprobs.shape[1]
        self._scores.logprobs[self._rows, first : self._scored] = logprobs
        self._scores.proposed[self._rows, first : self._scored] = proposed

    def _both(
        self, logits: Float[Tensor, "n vocab"], tokens: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Log-probabilities of the tokens under the model itself and under its proposal."""
        plain = logprob_of(logits, tokens)
        if proposes_as_is(self.settings):
            return plain, plain
        return plain, logprob_of(proposal(logits, self.settings), tokens)
