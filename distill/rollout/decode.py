"""The decode loop: the student walks token by token, the teacher follows in chunks.

A mixture is drawn exactly by a coin: with probability α the token comes from the teacher, else from the student
(Eq. 4). The coins are flipped in advance, so the teacher is needed only where one says so; there it takes all tokens
since its last turn in a single forward over its cache. Every token passes through it once, and that forward
proposes, scores, and leaves the final hidden states that the losses need later.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from distill.config import RolloutSettings
from distill.data.batches import Rollouts, TokenBatch
from distill.models.heads import hidden_states, project
from distill.rollout.sampling import draw, importance_weights, proposal, proposes_as_is

# Rows of logits made at once while scoring: bounds memory at [256, V] fp32.
_SCORE_ROWS = 256
# Tokens between looks at whether every row has ended; each look waits for the accelerator.
_CHECK_EVERY = 4


@dataclass(frozen=True)
class Randomness:
    """All chance of one decode, drawn in advance: the same rows get the same numbers in any batching."""

    coins: Bool[Tensor, "batch limit"]
    uniforms: Float[Tensor, "batch limit"]


def decode(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    prompts: TokenBatch,
    randomness: Randomness,
    settings: RolloutSettings,
    eos_ids: Int[Tensor, " eos"],
    vocab: int,
    agree: Callable[[Tensor], Tensor] = lambda tokens: tokens,
) -> tuple[Rollouts, int]:
    """Sample one response a prompt. Whole (gathered) models, in evaluation mode; call under `no_grad`.

    Without a teacher the coins are ignored and its fields are 0 or None. `agree` makes ranks that share one replica
    go on with the same tokens.

    Returns:
        The rollouts, and how many forwards the teacher made.
    """
    limit = settings.max_new_tokens
    follower = None if teacher is None else _Teacher(teacher, prompts, settings, vocab)
    # One look at all coins here, instead of one a token in the loop.
    teacher_turns = [False] * limit if follower is None else randomness.coins.any(0).tolist()
    reader = _Reader(student, prompts)
    rows = len(prompts)
    tokens = prompts.prompt_ids.new_zeros((rows, 0))
    ended = torch.zeros(rows, dtype=torch.bool, device=tokens.device)
    lengths = torch.full_like(prompts.prompt_lengths, limit)
    logprobs: list[Tensor] = []
    proposed: list[Tensor] = []
    as_is = proposes_as_is(settings)

    for t in range(limit):
        hidden = reader.read(tokens[:, -1:])
        logits = project(student, hidden[:, -1], vocab)
        own = proposal(logits, settings)
        drawn = draw(own, randomness.uniforms[:, t])
        if follower is not None and teacher_turns[t]:
            theirs = draw(follower.propose(tokens), randomness.uniforms[:, t])
            drawn = torch.where(randomness.coins[:, t], theirs, drawn)
        drawn = agree(drawn)
        if follower is not None and teacher_turns[t]:
            follower.score_drawn(drawn)
        proposed.append(_at(own, drawn))
        logprobs.append(proposed[-1] if as_is else _at(logits.float().log_softmax(-1), drawn))
        tokens = torch.cat([tokens, drawn[:, None]], 1)
        newly_ended = torch.isin(drawn, eos_ids) & ~ended
        lengths = torch.where(newly_ended, t + 1, lengths)
        ended = ended | newly_ended
        if (t + 1) % _CHECK_EVERY == 0 and bool(ended.all()):
            break

    responses = TokenBatch(prompts.prompt_ids, prompts.prompt_lengths, tokens[:, : int(lengths.max())], lengths)
    rollouts = _assemble(responses, logprobs, proposed, ended, follower, randomness.coins, settings.alpha)
    return rollouts, 0 if follower is None else follower.reader.calls


def _assemble(
    responses: TokenBatch,
    logprobs: list[Float[Tensor, " batch"]],
    proposed: list[Float[Tensor, " batch"]],
    ended: Bool[Tensor, " batch"],
    teacher: "_Teacher | None",
    coins: Bool[Tensor, "batch limit"],
    alpha: float,
) -> Rollouts:
    """Let the teacher finish reading, and put 0 wherever a response has already ended."""
    mask = responses.response_mask
    width = mask.shape[1]
    behavior = torch.stack(logprobs[:width], 1)
    weights, teacher_logprobs, teacher_hidden = torch.ones_like(behavior), torch.zeros_like(behavior), None
    if teacher is not None:
        teacher_logprobs, teacher_proposed, teacher_hidden = teacher.finish(responses.response_ids)
        weights = importance_weights(torch.stack(proposed[:width], 1), teacher_proposed, alpha)
    return Rollouts(
        prompt_ids=responses.prompt_ids,
        prompt_lengths=responses.prompt_lengths,
        response_ids=responses.response_ids * mask,
        response_lengths=responses.response_lengths,
        behavior_logprobs=behavior * mask,
        teacher_logprobs=teacher_logprobs * mask,
        importance_weights=weights * mask,
        from_teacher=coins[:, :width] & mask & (teacher is not None),
        ended=ended,
        teacher_hidden=teacher_hidden,
    )


class _Reader:
    """One model's cache, and everything it has read."""

    def __init__(self, model: PreTrainedModel, prompts: TokenBatch):
        self.model = model
        self.cache = DynamicCache(config=model.config)
        width = prompts.prompt_ids.shape[1]
        self.unread_prompt = prompts.prompt_ids
        self.mask = prompts.model_inputs()["attention_mask"][:, :width]
        self.calls = 0

    def read(self, tokens: Int[Tensor, "batch new"]) -> Float[Tensor, "batch read hidden"]:
        """Forward new response tokens; the first call reads the prompt before them.

        Returns a final hidden state for each new token, before them on the first call the prompt's last one.
        """
        columns = tokens.shape[1] + min(self.unread_prompt.shape[1], 1)
        self.mask = torch.cat([self.mask, torch.ones_like(tokens)], 1)
        ids = torch.cat([self.unread_prompt, tokens], 1)
        positions = (self.mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        self.unread_prompt = self.unread_prompt[:, :0]
        self.calls += 1
        return hidden_states(self.model, ids, self.mask, positions, self.cache)[:, -columns:]


class _Teacher:
    """The teacher behind the student: proposes at coin steps, reads and scores every token once.

    The hidden state in column j predicts token j. Each catch-up starts at the first column not yet scored.
    """

    def __init__(self, model: PreTrainedModel, prompts: TokenBatch, settings: RolloutSettings, vocab: int):
        self.model, self.settings, self.vocab = model, settings, vocab
        self.reader = _Reader(model, prompts)
        self.read = 0
        self.hidden: list[Tensor] = []
        self.logprobs: list[Tensor] = []
        self.proposed: list[Tensor] = []
        self.pending: Tensor | None = None

    def propose(self, tokens: Int[Tensor, "batch so_far"]) -> Float[Tensor, "batch vocab"]:
        """Catch up with the tokens so far and propose the next one."""
        block, first = self._catch_up(tokens)
        self._score(block[:, :-1], tokens[:, first:])
        self.pending = project(self.model, block[:, -1], self.vocab)
        return proposal(self.pending, self.settings)

    def score_drawn(self, drawn: Int[Tensor, " batch"]) -> None:
        """Score the token drawn at the step just proposed, from the logits already made."""
        assert self.pending is not None
        plain, proposed = _scores(self.pending, drawn, self.settings)
        self.logprobs.append(plain[:, None])
        self.proposed.append(proposed[:, None])
        self.pending = None

    def finish(self, tokens: Int[Tensor, "batch response"]) -> tuple[Tensor, Tensor, Tensor]:
        """Read and score what is left; the last token is scored without being read.

        Returns log p [B, R], the proposal's log-probabilities [B, R] and the hidden states [B, R, H].
        """
        if self._scored < tokens.shape[1]:
            block, first = self._catch_up(tokens[:, :-1])
            self._score(block, tokens[:, first:])
        width = tokens.shape[1]
        columns = (torch.cat(parts, 1)[:, :width] for parts in (self.logprobs, self.proposed, self.hidden))
        logprobs, proposed, hidden = columns
        return logprobs, proposed, hidden

    @property
    def _scored(self) -> int:
        return sum(part.shape[1] for part in self.logprobs)

    def _catch_up(self, tokens: Int[Tensor, "batch so_far"]) -> tuple[Float[Tensor, "batch new hidden"], int]:
        block = self.reader.read(tokens[:, self.read :])
        self.read = tokens.shape[1]
        self.hidden.append(block)
        return block, self._scored

    def _score(self, hidden: Float[Tensor, "batch new hidden"], tokens: Int[Tensor, "batch new"]) -> None:
        flat, targets = hidden.flatten(0, 1), tokens.flatten()
        pairs = zip(flat.split(_SCORE_ROWS), targets.split(_SCORE_ROWS), strict=True)
        parts = [_scores(project(self.model, h, self.vocab), ids, self.settings) for h, ids in pairs]
        self.logprobs.append(torch.cat([plain for plain, _ in parts]).view(tokens.shape))
        self.proposed.append(torch.cat([proposed for _, proposed in parts]).view(tokens.shape))


def _scores(
    logits: Float[Tensor, "n vocab"], tokens: Int[Tensor, " n"], settings: RolloutSettings
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """log p(y) of the model itself and of its tempered, truncated proposal."""
    logprobs = logits.float().log_softmax(-1)
    return _at(logprobs, tokens), _at(logprobs if proposes_as_is(settings) else proposal(logits, settings), tokens)


def _at(logprobs: Float[Tensor, "n vocab"], tokens: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    return logprobs.gather(-1, tokens[:, None]).squeeze(-1)
