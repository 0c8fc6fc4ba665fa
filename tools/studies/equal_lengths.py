"""Rouge-L of two models' responses, the longer of each two cut to the words of the shorter: Rouge-L pays for length.

python -m tools.studies.equal_lengths runs/studies/dolly/evaluation-1 minillm kd seqkd sft
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from distill.evaluation.questions import questions_file, read_questions
from distill.evaluation.statistics import Bootstrap, Difference, mean
from distill.evaluation.table import EVALUATION, markdown
from distill.evaluation.text import rouge_l

_RESAMPLES = 2000


def at_equal_lengths(
    one: Sequence[str], other: Sequence[str], references: Sequence[Sequence[str]]
) -> Float[ndarray, "2 rows"]:
    """Rouge-L of both, 0–100, each two responses with as many words."""
    scores = []
    for texts, wanted in zip(zip(one, other, strict=True), references, strict=True):
        words = [text.split() for text in texts]
        count = min(map(len, words))
        scores.append([rouge_l(" ".join(of[:count]), wanted) for of in words])
    return np.array(scores).T


def difference(folder: Path, name: str, one: str, other: str) -> tuple[float, float, Difference]:
    """Of an evaluation's set: the mean of one model, of the other, and what lies between, paired over prompts."""
    references = [question.references for question in read_questions(questions_file(folder, name))]
    seeds = json.loads((folder / EVALUATION).read_text(encoding="utf-8"))["suite"]["seeds"]
    texts = [[_texts(folder / model / f"{name}.seed-{seed}.jsonl") for seed in seeds] for model in (one, other)]
    drawn = [at_equal_lengths(ours, theirs, references) for ours, theirs in zip(texts[0], texts[1], strict=True)]
    scores = np.mean(drawn, axis=0)
    between = Bootstrap(len(references), _RESAMPLES).difference(mean(scores[0]), mean(scores[1]))
    return scores[0].mean(), scores[1].mean(), between


def _texts(path: Path) -> list[str]:
    """By row; the first line says what was asked."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[1:-1]]
    return [row["text"] for row in sorted(rows, key=lambda row: row["row"])]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluation", type=Path, help="folder of `python -m distill evaluate`")
    parser.add_argument("model", help="the one to compare")
    parser.add_argument("others", nargs="+", help="with these")
    args = parser.parse_args()
    sets = json.loads((args.evaluation / EVALUATION).read_text(encoding="utf-8"))["suite"]["sets"]
    rows = [["set", "against", args.model, "the other", "difference"]]
    for name in sets:
        for other in args.others:
            ours, theirs, found = difference(args.evaluation, name, args.model, other)
            between = f"{found.value:+.1f} [{found.low:+.1f}, {found.high:+.1f}] (p {found.p:.2g})"
            rows.append([name, other, f"{ours:.1f}", f"{theirs:.1f}", between])
    print(markdown(rows))


if __name__ == "__main__":
    main()
