"""Run by the DeepSpeed launcher from test_known_answers.py: validate a student as it is loaded; write what came out.

deepspeed --num_accelerators N tests/ranks/validation_figures.py --local_rank=K CONFIG OUT

OUT holds the loss, the figures of two validations, and of each of their rounds every rank's responses.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from distill.assembly import load_models
from distill.config import load
from distill.console import leave, quiet_libraries
from distill.evaluation.validation import Validation
from distill.topology import start, stop


def main() -> None:
    config_path, out = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    quiet_libraries()
    config = load(config_path)
    topology = start(config.tensor_parallel)
    models = load_models(config, topology, topology)
    validation = Validation(config, models.student, models.alike, models.tokenizer, models.ends, topology)
    rounds: list[list[tuple[int, list[int]]]] = []
    collect = validation.worker.collect

    def collect_and_note(*given: Any) -> Any:
        rollouts = collect(*given)
        ids = zip(rollouts.response_ids.tolist(), rollouts.response_lengths.tolist(), strict=True)
        rounds.append(list(zip(validation.share.indices, [row[:length] for row, length in ids], strict=True)))
        return rollouts

    validation.worker.collect = collect_and_note  # type: ignore[method-assign]
    # First of all: the student is still in training mode.
    loss = validation.loss()
    figures = [validation.run() for _ in range(2)]
    everyone = topology.gather_objects(rounds)
    if topology.is_writer:
        Path(out).write_text(json.dumps({"loss": loss, "figures": figures, "rounds": everyone}))
    stop()


main()
leave(0)
