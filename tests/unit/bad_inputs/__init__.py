"""The corpus: inputs that nobody should give, each with the command that reads it and what that must say."""

from bad_inputs.case import Case, Place
from bad_inputs.commands import COMMANDS
from bad_inputs.configs import CONFIGS
from bad_inputs.deepspeed import DEEPSPEED
from bad_inputs.judging import JUDGING
from bad_inputs.launches import LAUNCHES
from bad_inputs.models import MODELS
from bad_inputs.records import RECORDS
from bad_inputs.suites import SUITES
from bad_inputs.texts import TEXTS

CASES = [*CONFIGS, *TEXTS, *RECORDS, *MODELS, *DEEPSPEED, *LAUNCHES, *COMMANDS, *SUITES, *JUDGING]

__all__ = ["CASES", "Case", "Place"]
