"""Run by the DeepSpeed launcher from test_evaluate.py: models are measured in turn, and each is let go.

deepspeed --num_accelerators N tests/ranks/models_in_turn.py --local_rank=K SUITE MODEL OUT

Prints how many models this rank still holds when all are measured.
"""

import gc
import sys
from pathlib import Path

from transformers import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from distill.config import ModelSettings
from distill.console import quiet_libraries
from distill.evaluation.runner import evaluate
from distill.evaluation.suite import load_suite
from distill.topology import stop


def main() -> None:
    suite, model, out = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    quiet_libraries()
    evaluate(load_suite(Path(suite), []), {name: ModelSettings(path=model) for name in "abc"}, Path(out))
    gc.collect()
    print("held:", sum(isinstance(one, LlamaForCausalLM) for one in gc.get_objects()))
    stop()


if __name__ == "__main__":
    main()
