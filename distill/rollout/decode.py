"""The decode loop: coins name who draws, student or teacher; the other follows when its turn comes.

A mixture is drawn exactly by a coin: with probability α the token comes from the teacher, else from the student
(Eq. 4). The coins are flipped in advance, so a model is needed only where one names it. Every token passes through
each model once, and that forward proposes, scores, and leaves the final hidden states that the losses need later.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from distill.config import RolloutSettings
from distill.data.batches import Rollouts, TokenBatch
from distill.rollout.ends import Ends
from distill.rollout.follower import Follower
from distill.rollout.gathering import Together, on_this_rank
from distill.rollout.sampling import importance_weights
from distill.whereabouts import here

# Tokens between looks at which rows have ended; each look waits for the accelerator.
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
    ends: Ends,
    vocab: int,
    agree: Callable[[Tensor], Tensor] = lambda tokens: tokens,
    keep_hidden: bool = False,
    together: Together = on_this_rank,
) -> tuple[Rollouts, tuple[int, int]]:
    """Sample one response a prompt. Whole (gathered) models, in evaluation mode; call under `no_grad`.

    Without a teacher the coins are ignored and its fields are 0 or None. `agree` makes ranks that share one replica
    go on with the same tokens. `together` makes ranks that fetch layers together do the same forwards: one that is done
    goes on with a single row until all are.

    Returns:
        The rollouts, and how many forwards student and teacher made.
    """
    rows, limit = len(prompts), settings.max_new_tokens
    tokens = prompts.prompt_ids.new_zeros((rows, limit))
    lengths = torch.full_like(prompts.prompt_lengths, limit)
    ended = torch.zeros_like(lengths, dtype=torch.bool)
    own = Follower(student, prompts, settings, vocab, keep_hidden, together)
    theirs = None if teacher is None else Follower(teacher, prompts, settings, vocab, True, together)
    coins = randomness.coins & (theirs is not None)
    # One look at all coins here, instead of one a token in the loop.
    turns = [(own, together((~coins).any(0)).tolist())]
    if theirs:
        turns.append((theirs, together(coins.any(0)).tolist()))
    alive = torch.arange(rows, device=tokens.device)

    for t in range(limit):
        here.tick()
        asked = [model for model, when in turns if when[t]]
        drawn = [model.draw(tokens[:, :t], randomness.uniforms[:, t]) for model in asked]
        tokens[:, t] = agree(drawn[0] if len(drawn) == 1 else torch.where(coins[:, t], drawn[1], drawn[0]))
        for model in asked:
            model.score_drawn(tokens[:, t])
        over = ended[alive]
        now = ends(tokens[:, : t + 1], alive) & ~over
        lengths[alive] = torch.where(now, t + 1, lengths[alive])
        ended[alive] = over | now
        if (t + 1) % _CHECK_EVERY == 0 and t + 1 < limit:
            going = (~ended).nonzero().squeeze(1)
            if not together(going.new_tensor(len(going)) > 0):
                break
            # One row at least, which then ended before: other ranks need this one's forwards.
            alive = going if len(going) else alive[:1]
            for model, _ in turns:
                model.release(lengths)

    width = int(lengths.max())
    responses = TokenBatch(prompts.prompt_ids, prompts.prompt_lengths, tokens[:, :width], lengths)
    rollouts = _assemble(responses, own, theirs, coins[:, :width], ended, settings.alpha)
    return rollouts, (own.reader.calls, theirs.reader.calls if theirs else 0)


def _assemble(
    responses: TokenBatch,
    own: Follower,
    theirs: Follower | None,
    coins: Bool[Tensor, "batch response"],
    ended: Bool[Tensor, " batch"],
    alpha: float,
) -> Rollouts:
    """Let both models finish reading, and put 0 wherever a response has already ended."""
    mask = responses.response_mask
    behavior = own.finish(responses.response_ids, responses.response_lengths)
    weights, teacher_logprobs = torch.ones_like(behavior.logprobs), torch.zeros_like(behavior.logprobs)
    teacher_hidden = teacher_forwards = None
    if theirs is not None:
        scores = theirs.finish(responses.response_ids, responses.response_lengths)
        teacher_logprobs, teacher_hidden = scores.logprobs, scores.hidden
        teacher_forwards = (scores.reads * mask).sum(1)
        # Where nothing was drawn the two are 0 and their weight is masked below.
        weights = importance_weights(behavior.proposed, scores.proposed, alpha)
    return Rollouts(
        prompt_ids=responses.prompt_ids,
        prompt_lengths=responses.prompt_lengths,
        response_ids=responses.response_ids * mask,
        response_lengths=responses.response_lengths,
        behavior_logprobs=torch.where(mask, behavior.logprobs, 0.0),
        teacher_logprobs=torch.where(mask, teacher_logprobs, 0.0),
        importance_weights=torch.where(mask, weights, 0.0),
        from_teacher=coins & mask,
        ended=ended,
        teacher_hidden=teacher_hidden,
        teacher_forwards=teacher_forwards,
        student_forwards=(behavior.reads * mask).sum(1),
        student_hidden=behavior.hidden,
    )
