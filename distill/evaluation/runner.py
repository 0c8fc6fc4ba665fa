"""`distill evaluate`: answer, read, score, and sum up, for each model of a command in turn.

The folder --out holds `questions/SET.jsonl` (prompts and references), `NAME/SET.seed-S.jsonl` (a model's responses),
`NAME/SET.scores.safetensors` (of each row) and `evaluation.json` (all figures). What is there and still belongs to the
model and the suite is not made again.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.checkpoint.disk import replace_file
from distill.config import ModelSettings
from distill.deepspeed_settings import resolve_dtype
from distill.evaluation.measurement import Measurement
from distill.evaluation.questions import questions_file, write_questions
from distill.evaluation.subjects import subjects
from distill.evaluation.suite import Suite
from distill.evaluation.summary import sum_up
from distill.evaluation.table import EVALUATION
from distill.topology import start


def evaluate(suite: Suite, models: Mapping[str, ModelSettings], out: Path) -> dict[str, Any] | None:
    """Measure the suite's teacher and all models, and write `out`/evaluation.json; its content, on rank 0. Collective.

    Raises:
        BadInput: models or sets that do not fit each other, before any model is loaded; responses in `out` that were
            made otherwise.
    """
    found = subjects(suite, models)
    topology, dtype = start(), resolve_dtype(suite.precision)
    measured: list[Measurement] = []
    for subject in found:
        teacher = measured[0] if suite.teacher and measured else None
        measured.append(Measurement(suite, subject, teacher, out, dtype, topology))
    for one in measured:
        one.run()
    content = sum_up(suite, measured) if topology.is_writer else None
    if content:
        for name, prompts in found[0].sets.prompts.items():
            write_questions(questions_file(out, name), prompts.questions)
        replace_file(out / EVALUATION, json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")
    topology.barrier()
    return content
