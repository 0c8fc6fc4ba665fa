"""The models of an evaluation, each with its vocabulary and the sets as its tokenizer cuts them."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill.config import ModelSettings
from distill.data.records import fingerprint
from distill.errors import BadInput, Problem
from distill.evaluation.frozen import Vocabulary, common_vocabulary
from distill.evaluation.prompt_sets import ChoiceSet, PromptSet, TextSet, read_choices, read_prompts, read_text
from distill.evaluation.suite import Suite
from distill.models.downloads import opened_at
from distill.models.loading import load_config
from distill.models.vocabulary import KnownIds

TEACHER = "teacher"
"""What the suite's teacher is called."""
_READ_BYTES = 4 << 20


@dataclass(frozen=True)
class Sets:
    """All of a suite, in one tokenizer's ids."""

    prompts: dict[str, PromptSet]
    choices: dict[str, ChoiceSet]
    texts: dict[str, TextSet]

    def rows(self, name: str) -> int:
        """What of a set is resampled: prompts, questions, or pieces of text."""
        if name in self.prompts:
            return len(self.prompts[name].prompts)
        return len(self.choices[name].answers) if name in self.choices else len(self.texts[name].rows)

    def content(self, name: str) -> str:
        """A hash of the choices or of the text `name`, as the models read it."""
        of = self.choices[name] if name in self.choices else self.texts[name]
        return hashlib.sha256(json.dumps(asdict(of)).encode()).hexdigest()[:16]

    def longest(self, suite: Suite) -> dict[str, int]:
        """Tokens of the longest sequence, prompt and response, that each set leads to."""
        found = {name: max(map(len, of.prompt_ids)) + suite.max_new_tokens for name, of in self.prompts.items()}
        rows = {name: of.rows for name, of in self.choices.items()} | {name: of.rows for name, of in self.texts.items()}
        return found | {
            name: max(len(prompt) + len(response) for prompt, response in of_set) for name, of_set in rows.items()
        }

    def require(self, known: KnownIds, suite: Suite) -> None:
        """Refuse token ids that no row is there for.

        Raises:
            BadInput: names the set, and the largest of them.
        """
        for name, prompts in self.prompts.items():
            known.require(prompts.prompt_ids, f"sets.{name}", str(suite.sets[name]))
        for name, choices in self.choices.items():
            known.require([ids for row in choices.rows for ids in row], f"choices.{name}", str(suite.choices[name]))
        for name, text in self.texts.items():
            known.require([ids for row in text.rows for ids in row], f"texts.{name}", str(suite.texts[name]))

    @classmethod
    def read(cls, suite: Suite, vocabulary: Vocabulary) -> "Sets":
        """From the suite's files.

        Raises:
            BadInput: what cannot be read, or does not fit the tokenizer.
        """
        tokenizer = vocabulary.tokenizer
        return cls(
            {name: read_prompts(name, path, suite, tokenizer) for name, path in suite.sets.items()},
            {name: read_choices(name, path, suite, tokenizer) for name, path in suite.choices.items()},
            {name: read_text(name, path, suite, tokenizer) for name, path in suite.texts.items()},
        )


@dataclass(frozen=True)
class Subject:
    """A model that is measured."""

    name: str
    settings: ModelSettings
    vocabulary: Vocabulary
    sets: Sets
    is_teacher: bool
    """Of the suite."""
    origin: dict[str, Any]
    """What its responses depend on, besides the set and the seed; equal after a restart."""


def subjects(suite: Suite, models: Mapping[str, ModelSettings]) -> list[Subject]:
    """The teacher, if there is one, and the models.

    Beside a teacher all have its tokenizer, which then speaks for all. Without one each has its own.

    Raises:
        BadInput: an unreadable model or set, or tokenizers that differ.
    """
    teacher = [suite.teacher] if suite.teacher else []
    known: dict[str, Sets] = {}
    found = []
    for name, settings in {**({TEACHER: suite.teacher} if suite.teacher else {}), **models}.items():
        vocabulary = common_vocabulary([*teacher, settings])
        key = f"{fingerprint(vocabulary.tokenizer)} {vocabulary.tokenizer.chat_template}"
        if key not in known:
            known[key] = Sets.read(suite, vocabulary)
        _check_context(name, settings, known[key].longest(suite))
        known[key].require(vocabulary.known, suite)
        origin = {
            "model": _weights(Path(opened_at(settings.path))),
            "tokenizer": fingerprint(vocabulary.tokenizer),
            "vocabulary": vocabulary.size,
            "eos": vocabulary.eos_ids,
        }
        found.append(Subject(name, settings, vocabulary, known[key], suite.teacher is settings, origin))
    return found


def _check_context(name: str, settings: ModelSettings, longest: Mapping[str, int]) -> None:
    context = getattr(load_config(settings, "model").get_text_config(), "max_position_embeddings", None)
    too_long = [of for of, tokens in longest.items() if context is not None and tokens > context]
    if too_long:
        wrong = f"sequences may reach {longest[too_long[0]]} tokens, the context of {name} has {context}"
        raise BadInput(Problem("set", too_long[0], wrong, "lower max_new_tokens or context, or drop its longest rows"))


def _weights(folder: Path) -> str:
    """A hash of what is computed with: a student trained anew may have files of the same names and lengths."""
    digest = hashlib.sha256()
    kinds = ("config.json", "*.safetensors", "pytorch_model*.bin")
    for path in sorted({path for kind in kinds for path in folder.glob(kind)}):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while part := file.read(_READ_BYTES):
                digest.update(part)
    return digest.hexdigest()[:16]
