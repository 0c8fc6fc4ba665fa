"""Figures of generated texts, against numbers worked out by hand and a Rouge-L of plain loops."""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from reference import texts
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from distill.data.batches import Rollouts, TokenBatch
from distill.data.loading import token_batch
from distill.evaluation.answers import Answer, AnswerFile, answer
from distill.evaluation.figures import diversity
from distill.evaluation.generation import text_figures
from distill.evaluation.prompt_sets import PromptSet
from distill.evaluation.text import distinct, exact_match, repetition, rouge_l
from distill.topology import Topology

Result = TypeVar("Result")


@pytest.mark.parametrize(
    ("text", "references", "expected"),
    [
        ("the cat sat", ["the cat sat"], 100),
        ("The cat, sat!", ["the CAT sat."], 100),
        ("a b c d", ["a b"], 200 / 3),  # P 2/4, R 2/2
        ("a b", ["a b c d"], 200 / 3),  # P 2/2, R 2/4
        ("a b c d e", ["e x b y d"], 40),  # b d: P 2/5, R 2/5
        ("b a", ["a b"], 50),
        ("running dogs bark", ["dog barks"], 80),  # stems: run dog bark, dog bark; P 2/3, R 1
        ("was", ["wa"], 0),  # words of three letters are not stemmed
        ("a b c", ["x", "c y", "a b c d e"], 75),  # the best of 0, 40 and P 1, R 3/5
        ("", ["a"], 0),
        ("...", ["..."], 0),
        ("x 12 é 3", ["12 3 y"], 200 / 3),  # é is no word: P 2/3, R 2/3
    ],
)
def test_rouge_l_by_hand(text: str, references: list[str], expected: float) -> None:
    assert rouge_l(text, references) == pytest.approx(expected)
    assert texts.rouge_l(text, references) == pytest.approx(expected)


def test_rouge_l_equals_a_plain_longest_common_subsequence() -> None:
    generator = np.random.default_rng(0)
    words = [
        "run",
        "running",
        "Runs",
        "nation",
        "national",
        "the",
        "a",
        "2024",
        "don't",
        "naïve",
        "—",
        "hopping,",
        "X",
        "",
    ]

    def text() -> str:
        return " ".join(generator.choice(words, generator.integers(0, 15)))

    found, expected = [], []
    for _ in range(300):
        said, references = text(), [text() for _ in range(generator.integers(1, 4))]
        found.append(rouge_l(said, references))
        expected.append(texts.rouge_l(said, references))
    assert found == pytest.approx(expected)
    assert len(set(found)) > 50


@pytest.mark.parametrize(
    ("text", "reference", "hit"),
    [
        ("Yes", "yes", 100),
        (" yes. ", "yes", 100),
        ("“YES!”", "yes", 100),
        ("no  way", "No\nway", 100),
        ("yes sir", "yes", 0),
        ("", "...", 0),
        ("-5", "5", 0),
        ("C++", "C#", 0),
        ("x > 3", "x < 3", 0),
    ],
)
def test_exact_match_forgives_case_and_what_stands_around(text: str, reference: str, hit: float) -> None:
    assert exact_match(text, ["another", reference]) == hit


def test_repetition_is_the_share_of_4_grams_that_stood_before() -> None:
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repetition([7] * 9) == pytest.approx(5 / 6)
    assert repetition([1, 2, 3]) == repetition([]) == repetition([5, 5, 5, 5]) == 0
    assert repetition([1, 2, 1, 2], n=2) == pytest.approx(1 / 3)


def test_distinct_against_counting_by_hand() -> None:
    responses = [[1, 2, 1, 2], [1, 2, 3], [9]]
    found = distinct(responses, 2)
    # 12 21 12 · 12 23 · none
    assert found.value == 3 / 5
    brute = [
        len(grams := [tuple(r[i : i + 2]) for k, r in enumerate(responses) if k != out for i in range(len(r) - 1)])
        and len(set(grams)) / len(grams)
        for out in range(3)
    ]
    error = math.sqrt(2 / 3 * sum((one - sum(brute) / 3) ** 2 for one in brute))
    assert [found.low, found.high] == pytest.approx([3 / 5 - 1.96 * error, 3 / 5 + 1.96 * error])
    assert distinct([[1], [2]], 2).value == 0


def test_diversity_is_that_of_each_seed_by_itself() -> None:
    """Tokens 1 2 2 and 3, then 1 1 1 and 1: as one set they would have 3 of 8, not the mean of 3 of 4 and 1 of 4."""
    found = diversity([[[1, 2, 2], [3]], [[1, 1, 1], [1]]])
    assert found["dist_1"].value == pytest.approx((3 / 4 + 1 / 4) / 2)
    assert found["dist_2"].value == pytest.approx((2 / 2 + 1 / 2) / 2)
    assert (found["dist_3"].value, found["dist_4"].value) == (1, 0)


class Rank(Topology):
    """One of two ranks in this process, each on a thread."""

    values: list[Any]
    meeting: Barrier

    def gather_objects(self, value: Result) -> list[Result]:
        self.values[self.rank] = value
        self.meeting.wait()
        found = list(self.values)
        self.meeting.wait()
        return found

    def sum_over_replicas(self, value: Tensor) -> Tensor:
        return torch.stack(self.gather_objects(value)).sum(0)

    def barrier(self) -> None:
        self.meeting.wait()


def on_two_ranks(work: Callable[[Topology], Result]) -> list[Result]:
    Rank.values, Rank.meeting = [None, None], Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda rank: work(Rank(rank, 2, 1, torch.device("cpu"), None, None)), range(2)))


def rollouts_of(responses: list[list[int]]) -> Rollouts:
    batch = token_batch([{"prompt_ids": [5, 6], "response_ids": ids} for ids in responses])
    nothing = torch.zeros(batch.response_ids.shape)
    ended = torch.tensor([ids[-1] == 0 for ids in responses])
    return Rollouts(
        **batch.tensors(),
        behavior_logprobs=nothing,
        teacher_logprobs=nothing,
        importance_weights=nothing,
        from_teacher=nothing.bool(),
        ended=ended,
    )


def test_validations_figures_are_means_over_all_ranks_counted_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    """Three responses over two ranks; the second reads one of them again, which is not counted."""
    say = tokenizer.encode
    first, second = [*say("An apple."), 0], [*say("a b c d"), 0]
    third = say("the the the the")  # cut; t, he and three times the
    lengths = [len(first), len(second), len(third)]
    assert lengths[2] == 5
    given = [[first, third], [second, first]]
    references = [[["no", "an apple"], ["the"]], [["a b"], ["an apple"]]]

    def work(topology: Topology) -> tuple[dict[str, float], list[str]]:
        rank = topology.rank
        return text_figures(rollouts_of(given[rank]), references[rank], tokenizer, 2 - rank, topology)

    found = on_two_ranks(work)
    assert [texts for _, texts in found] == [["An apple.", "the the the the"], ["a b c d"]]
    for figures, _ in found:
        assert figures == pytest.approx(
            {
                "rouge_l": (100 + 200 / 3 + 40) / 3,  # the last: P 1/4, R 1
                "mean_length": sum(lengths) / 3,
                "repetition": 0,
                "ended": 2 / 3,
            }
        )


class Echo:
    """A worker whose response is the prompt's last id and the number that seeds the row's draws; odd ones end."""

    settings = SimpleNamespace(batch=2)

    @contextmanager
    def opened(self) -> Iterator[Callable[..., Rollouts]]:
        def sample(prompts: TokenBatch, row_ids: Tensor, round_index: int) -> Rollouts:
            asked = zip(prompts.prompt_ids[:, -1].tolist(), row_ids.tolist(), strict=True)
            return rollouts_of([[last, 300 + row, *([0] if row % 2 else [])] for last, row in asked])

        yield sample


def test_each_prompt_gets_its_own_answer_whoever_decodes_it(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Seven prompts of unequal length in batches of two: two turns of two ranks."""
    prompts = [[7] * length + [400 + row] for row, length in enumerate((3, 1, 4, 1, 5, 9, 2))]
    questions = PromptSet(prompts, ["p"] * 7, [[]] * 7)
    file = AnswerFile(tmp_path / "m/s.seed-1.jsonl", {"seed": 1}, 7)
    on_two_ranks(lambda topology: answer(Echo(), questions, file, tokenizer, topology, "s"))  # type: ignore[arg-type]
    expected = []
    for row in range(7):
        ids = [400 + row, 300 + row]
        ended = row % 2 == 1
        expected.append(Answer(row, tokenizer.decode(ids), [*ids, 0] if ended else ids, ended))
    assert file.complete() == expected
