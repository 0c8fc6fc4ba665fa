"""Evaluation's figures once more: loops over rows and tokens, and plain transformers, one sequence at a time."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from known_answers import log_probs
from reference.texts import repetition, rouge_l
from transformers import PreTrainedModel, PreTrainedTokenizerFast

_FEWEST_ROWS = 10
"""A curve ends where fewer responses go on."""


@dataclass
class PlainEvaluation:
    """What the models' given answers, some choices and a text come to; `teacher` is what a model is compared with."""

    tokenizer: PreTrainedTokenizerFast
    models: dict[str, PreTrainedModel]
    prompts: list[list[int]]
    references: list[list[str]]
    answers: dict[str, list[list[list[int]]]]
    """By model, for each seed the ids of each prompt's answer."""

    def of_answers(self, model: str) -> dict[str, float]:
        """Means over answers, over seeds (Dist-n), and over tokens; all but exact match."""
        answers = [ids for of_seed in self.answers[model] for ids in of_seed]
        special = self.tokenizer.all_special_ids
        texts = [self.tokenizer.decode([token for token in ids if token not in special]) for ids in answers]
        references = self.references * len(self.answers[model])
        own, taught = self._tokens(model, model), self._tokens(model, "teacher")
        return {
            "rouge_l": mean([rouge_l(text, known) for text, known in zip(texts, references, strict=True)]),
            "length": mean([len(ids) for ids in answers]),
            "repetition": mean([repetition(ids) for ids in answers]),
            "ended": mean([float(ids[-1] == self.tokenizer.eos_token_id) for ids in answers]),
            **{f"dist_{n}": mean([_distinct(of_seed, n) for of_seed in self.answers[model]]) for n in (1, 2, 3, 4)},
            "reverse_kl": mean([value for row in own for value in row["reverse_kl"]]),
            "top1_on_own": mean([value for row in own for value in row["top1"]]),
            "teacher_nll": mean([value for row in own for value in row["teacher_nll"]]),
            "forward_kl": mean([value for row in taught for value in row["forward_kl"]]),
            "top1_agreement": mean([value for row in taught for value in row["top1"]]),
        }

    def of_positions(self, model: str) -> dict[str, list[float]]:
        """Means at each position over the answers that reach it, and the excess accumulated error in percent."""
        own, taught = self._tokens(model, model), self._tokens(model, "teacher")
        found: dict[str, list[float]] = defaultdict(list)
        regret = error = 0.0
        for position in range(max(len(row["top1"]) for row in own + taught)):
            ours = [row for row in own if len(row["top1"]) > position]
            theirs = [row for row in taught if len(row["top1"]) > position]
            if min(len(ours), len(theirs)) < _FEWEST_ROWS:
                break
            after_own = mean([row["forward_kl"][position] for row in ours])
            after_teachers = mean([row["forward_kl"][position] for row in theirs])
            regret, error = regret + after_own, error + after_teachers
            found["forward_kl_after_own"].append(after_own)
            found["forward_kl_after_teachers"].append(after_teachers)
            found["reverse_kl_after_own"].append(mean([row["reverse_kl"][position] for row in ours]))
            found["excess_accumulated_error"].append(100 * (regret - error) / error)
            found["rows"].append(len(ours))
        return dict(found)

    def perplexity(self, model: str, documents: Sequence[list[int]], context: int) -> float:
        """The same weight for every token but the first of each piece of `context` tokens, which is not predicted."""
        nll: list[float] = []
        for ids in documents:
            for start in range(0, len(ids), context):
                first, *rest = ids[start : start + context]
                nll += [-value for value in self._said(model, [first], rest)]
        return math.exp(mean(nll))

    def of_choices(self, model: str, questions: Sequence[tuple[list[int], list[list[int]], int]]) -> dict[str, float]:
        """`accuracy` and `ece` in 15 bins, of questions of a prompt, choices and the place of the right one."""
        bins: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for prompt, choices, answer in questions:
            weights = [math.exp(sum(self._said(model, prompt, ids))) for ids in choices]
            confidence = max(weights) / sum(weights)
            right = float(weights.index(max(weights)) == answer)
            bins[min(int(confidence * 15), 14)].append((right, confidence))
        ece = 0.0
        for of_bin in bins.values():
            gap = mean([right for right, _ in of_bin]) - mean([confidence for _, confidence in of_bin])
            ece += len(of_bin) / len(questions) * abs(gap)
        return {"accuracy": mean([right for of_bin in bins.values() for right, _ in of_bin]), "ece": ece}

    def _said(self, model: str, prompt: list[int], ids: list[int]) -> list[float]:
        """log q of each token."""
        return log_probs(self.models[model], prompt, ids)[range(len(ids)), ids].tolist() if ids else []

    def _tokens(self, model: str, writer: str) -> list[dict[str, list[float]]]:
        """For each answer of `writer`, at each token: how `model` (q) and the teacher (p) go together."""
        found = []
        for of_seed in self.answers[writer]:
            for prompt, ids in zip(self.prompts, of_seed, strict=True):
                log_q, log_p = (log_probs(self.models[name], prompt, ids) for name in (model, "teacher"))
                values = {
                    "reverse_kl": (log_q.exp() * (log_q - log_p)).sum(-1),
                    "forward_kl": (log_p.exp() * (log_p - log_q)).sum(-1),
                    "top1": (log_q.argmax(-1) == log_p.argmax(-1)).double(),
                    "teacher_nll": -log_p[range(len(ids)), ids],
                }
                found.append({name: value.tolist() for name, value in values.items()})
        return found


def mean(values: Sequence[float]) -> float:
    """Their sum over their number."""
    return sum(values) / len(values)


def _distinct(responses: list[list[int]], n: int) -> float:
    grams = [tuple(ids[start : start + n]) for ids in responses for start in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams)
