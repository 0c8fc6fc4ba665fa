"""The random numbers of a run, each kind on an axis of the seed of its own, and the order of records they make."""

import numpy as np

COINS, UNIFORMS = 0, 1
MIX, RECORDED_IN_MIX, REPLAY = 2**31, 2**31 + 1, 2**31 + 2


def coins(seed: int, round_index: int, row: int, length: int, alpha: float, shared: bool) -> list[bool]:
    """Which tokens of a row the teacher draws."""
    axes = [seed, COINS, round_index] if shared else [seed, COINS, round_index, row]
    return (np.random.default_rng(axes).random(length) < alpha).tolist()


def uniforms(seed: int, round_index: int, row: int, length: int) -> list[float]:
    """One number in [0, 1) for each token of a row."""
    return np.random.default_rng([seed, UNIFORMS, round_index, row]).random(length, dtype=np.float32).tolist()


def record_at(position: int, size: int, seed: int, axis: int = 0) -> int:
    """The record at a place of an endless stream in which every epoch is a new permutation."""
    epoch, offset = divmod(position, size)
    return int(np.random.default_rng([seed, epoch, axis]).permutation(size)[offset])


def block_order(seed: int, round_index: int, epoch: int, blocks: int) -> list[int]:
    """The order in which an inner epoch takes the blocks of a round."""
    return np.random.default_rng([seed, round_index, epoch]).permutation(blocks).tolist()


def mix_coins(seed: int, steps: int, share: float) -> list[bool]:
    """Which of the first steps take rollouts, in a mix with recorded responses."""
    return (np.random.default_rng([seed, MIX]).random(steps) < share).tolist()


def replay_draws(seed: int, step: int) -> tuple[float, float, float]:
    """DistiLLM's three numbers of a step: take the replay buffer? sample into it? which of its batches?"""
    first, second, third = np.random.default_rng([seed, REPLAY, step]).random(3).tolist()
    return first, second, third
