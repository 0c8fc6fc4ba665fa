"""Whether every token id that a run meets has a row in the embeddings that it is looked up in.

Only the padding token may lie beyond them, whose id is never read: lengths tell padding.
"""

from typing import NamedTuple

from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers import PreTrainedConfig as ModelConfig

from distill.checks.report import Report
from distill.config import Config
from distill.errors import Problem
from distill.models.vocabulary import RESIZE, KnownIds, ends_beyond, rows_of


class OpenedModel(NamedTuple):
    """What a model's folder says of it, but for the weights."""

    config: ModelConfig
    tokenizer: PreTrainedTokenizerBase
    generation: GenerationConfig | None


def known_ids(config: Config, student: OpenedModel, teacher: OpenedModel | None) -> KnownIds:
    """The ids of the student's tokenizer that every model has a row for. A teacher with a tokenizer of its own is asked
    in other ids."""
    shares = teacher is not None and not config.objective.own_tokenizer
    models = {"the student": student} | ({"the teacher": teacher} if teacher is not None and shares else {})
    return KnownIds.of(student.tokenizer, {name: rows_of(model.config) for name, model in models.items()})


def check_ends(config: Config, student: OpenedModel, teacher: OpenedModel | None, report: Report) -> KnownIds:
    """Check every EOS and `rollout.stop_ids` against the rows; return the ids that are known."""
    known = known_ids(config, student, teacher)
    report.problems += _ends(config, "student", student, known)
    if teacher is not None and config.objective.own_tokenizer:
        _check_foreign(config, teacher, report)
    elif teacher is not None:
        report.problems += _ends(config, "teacher", teacher, known)
    unknown = [index for index in config.rollout.stop_ids if index >= known.size]
    report.check(not unknown, "rollout.stop_ids", unknown, known.told, "give ids of that range")
    return known


def _ends(config: Config, name: str, model: OpenedModel, known: KnownIds) -> list[Problem]:
    path = getattr(config, name).path
    return ends_beyond(f"{name}.path", path, model.tokenizer, model.config, model.generation, known)


def _check_foreign(config: Config, teacher: OpenedModel, report: Report) -> None:
    """Check that every token of a teacher's own tokenizer has a row: it reads the text in these, so any may come."""
    assert config.teacher is not None
    rows, tokenizer = rows_of(teacher.config), teacher.tokenizer
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    beyond = [index for index in sorted(tokens) if index >= rows and index != tokenizer.pad_token_id]
    if beyond:
        kind = "EOS" if beyond[-1] == tokenizer.eos_token_id else "the token"
        wrong = f"its embedding has {rows} rows, {kind} {tokens[beyond[-1]]!r} of its tokenizer is id {beyond[-1]}"
        report.check(False, "teacher.path", config.teacher.path, wrong, RESIZE)
