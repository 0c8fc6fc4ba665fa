"""Read rollouts token by token: who drew each one, what both models thought of it, its reward and weight.

python -m tools.inspect_rollouts runs/demo/minillm --rows 2

Reads the rollouts of the round in progress from the run's last checkpoint. Blue tokens were drawn by the student,
yellow ones by the teacher; a reward is red where the teacher likes the token less than the student did, green where
more. The reward is log p − log q, divided by `objective.reward_scale` and cut at `objective.reward_clip` where the
objective has them.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from distill.checkpoint.catalog import CHECKPOINTS, newest
from distill.checkpoint.restoring import rollouts_of
from distill.config import RESOLVED, Config, load
from distill.console import positive, quiet_libraries
from distill.data.batches import Rollouts
from distill.errors import EXIT_BAD_INPUT, BadInput, Problem
from distill.models.loading import load_tokenizer

_ANSI = {"student": 36, "teacher": 33, "bad": 31, "good": 32, "dim": 2, "bold": 1}

Paint = Callable[[str, str], str]
"""Text and what it is, to the text as it is shown."""


def paint(text: str, what: str) -> str:
    """In the terminal's colour for it."""
    return f"\x1b[{_ANSI[what]}m{text}\x1b[0m"


def no_paint(text: str, what: str) -> str:
    """As it is."""
    return text


def read_rollouts(run: Path) -> list[Rollouts]:
    """Each rank's rollouts in the last checkpoint.

    Raises:
        BadInput: no checkpoint, or one of an objective that samples nothing.
    """
    found, _ = newest(run)
    if found is None:
        raise BadInput(Problem("RUN", str(run), "no checkpoint there", "name the folder of a run that has saved one"))
    try:
        parts = rollouts_of(run / CHECKPOINTS, found)
    except (SafetensorError, OSError, TypeError) as error:
        wrong = f"the rollouts of its checkpoint {found.tag} cannot be read ({error})"
        raise BadInput(Problem("RUN", str(run), wrong, "name a run whose checkpoint is whole")) from None
    if not parts:
        wrong = f"its checkpoint {found.tag} holds no rollouts"
        raise BadInput(Problem("RUN", str(run), wrong, "name a run whose objective samples"))
    return parts


def describe(rollouts: Rollouts, row: int, tokenizer: PreTrainedTokenizerBase, config: Config, show: Paint) -> str:
    """One rollout: its prompt, its text by source, and a line for each token."""
    one = rollouts.rows([row])
    ids = one.prompt_ids[0, one.prompt_ids.shape[1] - int(one.prompt_lengths) :]
    prompt = tokenizer.batch_decode([ids.tolist()])[0]
    end = "ended" if bool(one.ended) else "cut at the limit"
    share = float(one.from_teacher.float().mean())
    head = f"{int(one.response_lengths)} tokens, {end}, {share:.0%} from the teacher"
    tokens = tokenizer.batch_decode([[index] for index in one.response_ids[0].tolist()])
    sources = ["teacher" if coin else "student" for coin in one.from_teacher[0].tolist()]
    text = "".join(show(token, source) for token, source in zip(tokens, sources, strict=True))
    lines = [show(head, "bold"), show(prompt, "dim"), text, ""]
    lines.append(show(f"{'t':>4} {'source':7} {'token':16} {'log q':>8} {'log p':>8} {'reward':>8} {'w':>6}", "dim"))
    return "\n".join([*lines, *_token_lines(one, tokens, sources, config, show)])


def _token_lines(one: Rollouts, tokens: list[str], sources: list[str], config: Config, show: Paint) -> Iterator[str]:
    scale, clip = getattr(config.objective, "reward_scale", 1.0), getattr(config.objective, "reward_clip", None)
    columns = (one.behavior_logprobs, one.teacher_logprobs, one.importance_weights)
    numbers = zip(*(column[0].tolist() for column in columns), strict=True)
    for t, (token, source, (student, teacher, weight)) in enumerate(zip(tokens, sources, numbers, strict=True), 1):
        reward = (teacher - student) / scale
        if clip is not None:
            reward = max(-clip, min(clip, reward))
        name = show(f"{source:7} {token[:14]!r:16}", source)
        worth = show(f"{reward:8.3f}", "good" if reward > 0 else "bad")
        yield f"{t:4} {name} {student:8.3f} {teacher:8.3f} {worth} {weight:6.3f}"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--rows", type=positive, default=2, help="rollouts shown of each rank")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto")
    args = parser.parse_args()
    quiet_libraries()
    coloured = args.color == "always" or (
        args.color == "auto" and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    )
    try:
        ranks = read_rollouts(args.run)
        config = load(args.run / RESOLVED)
        tokenizer = load_tokenizer(config.student.path, "student.path", config.student.trust_remote_code)
    except BadInput as error:
        print(f"inspect_rollouts: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    for rank, rollouts in enumerate(ranks):
        for row in range(min(args.rows, len(rollouts))):
            show = paint if coloured else no_paint
            print(show(f"── rank {rank}, rollout {row + 1} of {len(rollouts)}: ", "bold"), end="")
            print(describe(rollouts, row, tokenizer, config, show), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
