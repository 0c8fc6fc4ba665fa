"""The decode loop: the student walks token by token, the teacher follows in chunks.

A mixture is drawn exactly by a coin: with probability α the token comes from the teacher, else from the student
(Eq. 4). The coins are flipped in advance, so the teacher is needed only where one says so; there it takes all tokens
since its last turn in a single forward over its cache. Every token passes through it once, and that forward
proposes, scores, and leaves the final hidden states that the losses need later.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from distill.config import RolloutSettings
from distill.data.batches import Rollouts, TokenBatch
from distill.models.heads import project
from distill.rollout.ends import Ends
from distill.rollout.follower import Follower
from distill.rollout.gathering import Together, on_this_rank
from distill.rollout.reader import Reader
from distill.rollout.sampling import draw, importance_weights, logprob_of, proposal, proposes_as_is

# Tokens between looks at which rows have ended; each look waits for the accelerator.
_CHECK_EVERY = 4
# Rows leave the batch together, once they are this share of it: each leave copies the caches of those that stay.
_LEAVE_AT = 1 / 8


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
    ends: Ends,
    vocab: int,
    agree: Callable[[Tensor], Tensor] = lambda tokens: tokens,
    keep_hidden: bool = False,
    together: Together = on_this_rank,
) -> tuple[Rollouts, int]:
    """Sample one response a prompt. Whole (gathered) models, in evaluation mode; call under `no_grad`.

    Without a teacher the coins are ignored and its fields are 0 or None. `agree` makes ranks that share one replica
    go on with the same tokens. `together` makes ranks that fetch layers together do the same forwards: one that is done
    goes on with a single row until all are.

    Returns:
        The rollouts, and how many forwards the teacher made.
    """
    rows, limit = len(prompts), settings.max_new_tokens
    tokens = prompts.prompt_ids.new_zeros((rows, limit))
    logprobs, proposed = (torch.zeros((rows, limit), device=tokens.device) for _ in range(2))
    lengths = torch.full_like(prompts.prompt_lengths, limit)
    ended = torch.zeros_like(lengths, dtype=torch.bool)
    hidden = _hidden_buffer(student, tokens) if keep_hidden else None
    reader = Reader(student, prompts, limit)
    follower = None if teacher is None else Follower(teacher, prompts, settings, vocab, together)
    # One look at all coins here, instead of one a token in the loop.
    teacher_turns = [False] * limit if follower is None else together(randomness.coins.any(0)).tolist()
    as_is = proposes_as_is(settings)
    alive = torch.arange(rows, device=tokens.device)

    for t in range(limit):
        state = reader.read(tokens[alive, max(t - 1, 0) : t])[:, -1]
        if hidden is not None:
            hidden[alive, t] = state
        logits = project(student, state, vocab)
        own = proposal(logits, settings)
        uniforms = randomness.uniforms[:, t]
        drawn, normaliser = draw(own, uniforms[alive])
        if follower is not None and teacher_turns[t]:
            theirs = follower.draw(tokens[:, :t], lengths, uniforms)
            drawn = torch.where(randomness.coins[alive, t], theirs[alive], drawn)
        drawn = agree(drawn)
        tokens[alive, t] = drawn
        if follower is not None and teacher_turns[t]:
            follower.score_drawn(tokens[:, t])
        proposed[alive, t] = own.gather(1, drawn[:, None]).squeeze(1) - normaliser
        logprobs[alive, t] = proposed[alive, t] if as_is else logprob_of(logits, drawn)
        over = ended[alive]
        now = ends(tokens[:, : t + 1], alive) & ~over
        lengths[alive] = torch.where(now, t + 1, lengths[alive])
        ended[alive] = over | now
        if (t + 1) % _CHECK_EVERY == 0:
            going = _going(ended[alive], together)
            if going is None:
                break
            if len(going) <= len(alive) * (1 - _LEAVE_AT):
                alive = alive[going]
                reader.keep(going)

    width = int(lengths.max())
    responses = TokenBatch(prompts.prompt_ids, prompts.prompt_lengths, tokens[:, :width], lengths)
    rollouts = _assemble(responses, logprobs, proposed, ended, follower, randomness.coins, settings.alpha)
    if hidden is not None:
        rollouts = replace(rollouts, student_hidden=hidden[:, :width])
    return rollouts, 0 if follower is None else follower.reader.calls


def _going(ended: Bool[Tensor, " alive"], together: Together) -> Int[Tensor, " going"] | None:
    """The rows that have not ended; one at least while other ranks need this one, None when nobody goes on."""
    going = (~ended).nonzero().squeeze(1)
    if not together(going.new_tensor(len(going)) > 0):
        return None
    return going if len(going) else going.new_zeros(1)


def _hidden_buffer(model: PreTrainedModel, tokens: Int[Tensor, "batch limit"]) -> Float[Tensor, "batch limit hidden"]:
    width = model.config.get_text_config().hidden_size
    return torch.zeros((*tokens.shape, width), dtype=model.dtype, device=tokens.device)


def _assemble(
    responses: TokenBatch,
    logprobs: Float[Tensor, "batch limit"],
    proposed: Float[Tensor, "batch limit"],
    ended: Bool[Tensor, " batch"],
    follower: Follower | None,
    coins: Bool[Tensor, "batch limit"],
    alpha: float,
) -> Rollouts:
    """Let the teacher finish reading, and put 0 wherever a response has already ended."""
    mask = responses.response_mask
    width = mask.shape[1]
    behavior = logprobs[:, :width]
    weights, teacher_logprobs = torch.ones_like(behavior), torch.zeros_like(behavior)
    teacher_hidden = teacher_forwards = None
    if follower is not None:
        scores = follower.finish(responses.response_ids, responses.response_lengths)
        teacher_logprobs, teacher_hidden = scores.logprobs, scores.hidden
        teacher_forwards = (scores.reads * mask).sum(1)
        # Where nothing was drawn the two are 0 and their weight is masked below.
        weights = importance_weights(proposed[:, :width], scores.proposed, alpha)
    return Rollouts(
        prompt_ids=responses.prompt_ids,
        prompt_lengths=responses.prompt_lengths,
        response_ids=responses.response_ids * mask,
        response_lengths=responses.response_lengths,
        behavior_logprobs=behavior * mask,
        teacher_logprobs=torch.where(mask, teacher_logprobs, 0.0),
        importance_weights=torch.where(mask, weights, 0.0),
        from_teacher=coins[:, :width] & mask & (follower is not None),
        ended=ended,
        teacher_hidden=teacher_hidden,
        teacher_forwards=teacher_forwards,
    )
