"""The rows of each optimizer step: recorded responses, rollouts, both, or DistiLLM's replay buffer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from reference import chance
from reference.sampling import Rollout

Draw = Callable[[int, int, int], Rollout]
"""From a record, its row within the round and the round: a response by the current student."""


@dataclass
class Row:
    """A prompt with a response; `rollout` where it was sampled."""

    prompt: list[int]
    response: list[int]
    rollout: Rollout | None = None


@dataclass
class Step:
    """The rows of one step over all ranks, and the rollouts that were sampled for it."""

    rows: list[Row]
    fresh: list[Rollout]


class Recorded:
    """The records in the order of a shuffled stream."""

    def __init__(self, records: Any, config: dict[str, Any], axis: int = 0):
        self.records, self.seed, self.axis = records, config["run"]["seed"], axis
        self.size = config["optim"]["batch_size"]

    def step(self, number: int) -> Step:
        """Batch `number`."""
        places = range(number * self.size, (number + 1) * self.size)
        return Step([self.row(chance.record_at(at, len(self.records), self.seed, self.axis)) for at in places], [])

    def row(self, index: int) -> Row:
        """One record; packed text has its first token for a prompt."""
        record = self.records[index]
        if "input_ids" in record:
            return Row(record["input_ids"][:1], record["input_ids"][1:])
        return Row(record["prompt_ids"], record["response_ids"])


class Rounds:
    """Rounds of rollouts, each passed over `inner_epochs` times in blocks of `size` rows."""

    def __init__(self, records: Any, config: dict[str, Any], draw: Draw, size: int):
        self.records, self.config, self.draw, self.size = records, config, draw, size
        self.rollouts: list[Rollout] = []
        self.of_round = -1

    def prompts(self, round_index: int) -> list[int]:
        """The record of each row of a round."""
        rollout, seed = self.config["rollout"], self.config["run"]["seed"]
        count, copies = rollout["per_round"], rollout["samples_per_prompt"]
        rows = range(round_index * count, (round_index + 1) * count)
        return [chance.record_at(row // copies, len(self.records), seed) for row in rows]

    def block(self, number: int) -> tuple[int, range]:
        """The round of a step and its rows within it."""
        rollout = self.config["rollout"]
        blocks = rollout["per_round"] // self.size
        round_index, within = divmod(number, blocks * rollout["inner_epochs"])
        epoch, place = divmod(within, blocks)
        first = chance.block_order(self.config["run"]["seed"], round_index, epoch, blocks)[place] * self.size
        return round_index, range(first, first + self.size)

    def step(self, number: int) -> Step:
        """The rollouts of one step; samples the round where it begins."""
        round_index, rows = self.block(number)
        fresh: list[Rollout] = []
        if round_index != self.of_round:
            prompts = self.prompts(round_index)
            fresh = [self.draw(record, row, round_index) for row, record in enumerate(prompts)]
            self.rollouts, self.of_round = fresh, round_index
        return Step([sampled(self.rollouts[row]) for row in rows], fresh)


class Mixed:
    """Recorded responses or rollouts, step by step by a coin."""

    def __init__(self, recorded: Recorded, rounds: Rounds, share: float, seed: int):
        self.recorded, self.rounds, self.share, self.seed = recorded, rounds, share, seed

    def step(self, number: int) -> Step:
        """A step of either kind; each kind counts its own steps."""
        coins = chance.mix_coins(self.seed, number + 1, self.share)
        own = sum(coin == coins[number] for coin in coins[:number])
        return self.rounds.step(own) if coins[number] else self.recorded.step(own)


class Paired:
    """Half a batch of rollouts, and the recorded responses to the same prompts."""

    def __init__(self, records: Any, config: dict[str, Any], draw: Draw):
        self.recorded = Recorded(records, config)
        self.rounds = Rounds(records, config, draw, config["optim"]["batch_size"] // 2)

    def step(self, number: int) -> Step:
        """Rollouts first."""
        step, (round_index, rows) = self.rounds.step(number), self.rounds.block(number)
        prompts = self.rounds.prompts(round_index)
        return Step([*step.rows, *(self.recorded.row(prompts[row]) for row in rows)], step.fresh)


class Replay:
    """DistiLLM: with a probability that rises with validation loss, a batch of the newest rollouts."""

    def __init__(self, records: Any, config: dict[str, Any], draw: Draw, validation_loss: Callable[[], float]):
        self.recorded = Recorded(records, config, chance.RECORDED_IN_MIX)
        self.config, self.draw, self.validation_loss = config, draw, validation_loss
        self.on_policy, self.sampled_steps, self.recorded_steps = config["objective"]["start"], 0, 0
        self.last_loss: float | None = None
        self.buffer: list[list[Rollout]] = []

    def step(self, number: int) -> Step:
        """A replay step or a recorded one."""
        config, knobs = self.config, self.config["objective"]
        if number % knobs["adapt_every"] == 0:
            loss = self.validation_loss()
            if self.last_loss is not None and loss > self.last_loss + knobs["tolerance"]:
                self.on_policy = min(1.0, self.on_policy + knobs["increase"])
            self.last_loss = loss
        replays, samples, which = chance.replay_draws(config["run"]["seed"], number)
        if replays >= self.on_policy:
            self.recorded_steps += 1
            return self.recorded.step(self.recorded_steps - 1)
        fresh: list[Rollout] = []
        if not self.buffer or samples < 1 - number / config["optim"]["steps"]:
            fresh = self._sample()
            self.buffer = [*self.buffer, fresh][-(knobs["replay"] // config["optim"]["batch_size"]) :]
        return Step([sampled(one) for one in self.buffer[int(which * len(self.buffer))]], fresh)

    def _sample(self) -> list[Rollout]:
        size, seed, records = self.recorded.size, self.config["run"]["seed"], self.recorded.records
        copies, turn = self.config["rollout"]["samples_per_prompt"], self.sampled_steps
        self.sampled_steps += 1
        rows = range(turn * size, (turn + 1) * size)
        return [self.draw(chance.record_at(row // copies, len(records), seed), row - turn * size, turn) for row in rows]

    def memory(self) -> dict[str, float]:
        """The figures of its own that a record shows."""
        counts = {"sampled": self.sampled_steps, "recorded": self.recorded_steps, "on_policy": self.on_policy}
        return counts | ({} if self.last_loss is None else {"validation_loss": self.last_loss})


def sampled(rollout: Rollout) -> Row:
    """A rollout as a row of a batch."""
    return Row(rollout.prompt, rollout.response, rollout)
