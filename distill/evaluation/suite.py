"""What models are measured on: one YAML file of sets, seeds and sampling settings."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from distill.config import ModelSettings, RolloutSettings
from distill.settings import FilePath, Settings
from distill.settings_file import Kind, read_settings

# It becomes the name of a file.
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")

Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Suite(Settings):
    """Sets by name, and how models are asked. At least one of `sets`, `choices` and `texts` is given."""

    sets: dict[str, FilePath] = Field(
        {}, description="Prompts to answer: jsonl as for `make preprocess`; `output` holds the reference or several."
    )
    choices: dict[str, FilePath] = Field(
        {}, description="Multiple choice: jsonl of prompts with `choices`, a list of texts, and `answer`, its place."
    )
    texts: dict[str, FilePath] = Field({}, description="Plain text for perplexity: a text file, or jsonl with `text`.")
    teacher: ModelSettings | None = Field(
        None, description="Measured too, as `teacher`; the others' distributions are compared with its own."
    )
    template: Literal["alpaca", "chat", "plain"] = Field("alpaca", description="How prompts are put to the models.")
    max_prompt: int = Field(256, gt=0, description="Longest prompt in tokens; a longer one is an error.")
    max_new_tokens: int = Field(256, gt=0, description="Longest response, EOS included.")
    temperature: float = Field(1.0, gt=0, description="Of sampling.")
    top_k: int = Field(0, ge=0, description="Keep the k likeliest tokens; 0: all, 1: greedy.")
    top_p: float = Field(1.0, gt=0, le=1, description="Keep the smallest set of tokens of this probability; 1: all.")
    seeds: tuple[Seed, ...] = Field(
        (10, 20, 30, 40, 50), min_length=1, description="One sampled response a prompt for each."
    )
    compared_seeds: int = Field(
        1, ge=0, description="Seeds, the first ones, whose samples are read again to compare distributions; 0: none."
    )
    context: int = Field(512, gt=1, description="Tokens of each piece of plain text.")
    resamples: int = Field(2000, ge=100, description="Bootstrap resamples behind each interval.")
    batch: int = Field(32, gt=0, description="Rows decoded together on one rank.")
    micro_batch: int = Field(8, gt=0, description="Rows read together on one rank.")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field("auto", description="As in a recipe.")

    @field_validator("sets", "choices", "texts", mode="after")
    @classmethod
    def _names_can_be_files(cls, value: dict[str, Path]) -> dict[str, Path]:
        for name in value:
            if not _NAME.fullmatch(name):
                raise ValueError(f"the name {name!r} is to become a file's: letters, digits, '_', '-' and '.' only")
        return value

    @model_validator(mode="after")
    def _asks_something_once(self) -> Self:
        names = [*self.sets, *self.choices, *self.texts]
        if not names:
            raise ValueError("nothing to measure: give it `sets`, `choices` or `texts`")
        if len(set(names)) < len(names):
            raise ValueError("two sets have one name")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed stands twice in `seeds`")
        return self

    @property
    def sampling(self) -> RolloutSettings:
        """For the rollout worker: the model alone."""
        return RolloutSettings(
            alpha=0,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            max_new_tokens=self.max_new_tokens,
            batch=self.batch,
        )


def load_suite(path: Path, overrides: Sequence[str] = ()) -> Suite:
    """Read a suite's YAML, apply `key=value` overrides, check everything.

    Raises:
        BadInput: an unreadable file, or settings that do not fit; all at once.
    """
    return read_settings(_SUITE, path, overrides)


_SUITE = Kind(
    model=Suite,
    sections={"teacher": ModelSettings},
    field="--suite",
    what="a suite, as in launch/suites/",
    holds="`sets:`, `choices:` or `texts:`",
    reference="the suite reference",
)
