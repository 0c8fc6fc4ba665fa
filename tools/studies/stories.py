"""stories15M into half its layers by every objective, three seeds: minutes a run on a CPU.

Each objective starts from the same fine-tuned student and takes as many steps of as many responses; a seed is one of
phase 2. Its learning rate is the best of four on a seed of its own, by the sum of both KLs on prompts that are not the
test's, a criterion that prefers neither direction. MiniLLM's variants take MiniLLM's rate.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from distill.evaluation.table import EVALUATION
from tools.stages import Stage
from tools.studies.chain import Chain
from tools.studies.variants import OBJECTIVES, VARIANT_OF

FOLDER = Path("runs/studies/stories")
SUITE = Path("launch/suites/stories.yaml")
SETS = ("openings",)
METRICS = ("reverse_kl", "forward_kl", "teacher_nll", "top1_agreement", "dist_4", "repetition", "length")
SWEPT = [name for name in OBJECTIVES if name not in VARIANT_OF]
RATES = (3e-5, 1e-4, 3e-4, 1e-3)
_LAYERS, _PROMPT, _STORY = 3, 32, 64
_SWEEP_SEED = 0


def stages(seeds: Sequence[int], ranks: int, model: str) -> Iterator[list[Stage]]:
    """The chain, from the folder of stories15M, in lists of stages that do not need each other; the rates are chosen
    when the sweep is done."""
    chain = Chain(FOLDER, ranks)
    teacher, cut, prompts, data = (FOLDER / name for name in ("teacher", "cut", "prompts", "data"))
    copy = f"import shutil; shutil.copytree({model!r}, {str(teacher)!r}, dirs_exist_ok=True)"
    yield [chain.python("teacher", teacher, "-c", copy)]
    yield [chain.cut(teacher, cut, _LAYERS)]
    yield [chain.python("prompts", prompts, "-m", "tools.studies.openings", str(prompts))]
    files = [prompts / "train.jsonl", prompts / "dev.jsonl"]
    yield [chain.answers(teacher, "plain", _STORY, files, data)]
    yield [chain.records(teacher, "plain", _PROMPT, _PROMPT + _STORY, *(data / path.name for path in files))]

    start = FOLDER / "start"
    yield [chain.training("stories-sft.yaml", start)]
    swept = {f"{name}-{rate}": FOLDER / f"sweep/{name}-{rate}" for name in SWEPT for rate in RATES}
    yield [_variant(chain, name, _SWEEP_SEED, rate, swept[f"{name}-{rate}"]) for name in SWEPT for rate in RATES]
    on_dev = (f"sets={{{SETS[0]}: {prompts / 'dev.jsonl'}}}", "seeds=[10]", "compared_seeds=1")
    yield [chain.evaluation(SUITE, swept, FOLDER / "sweep/evaluation", *on_dev)]
    rates = chosen_rates()
    yield [
        _variant(chain, name, seed, rates[VARIANT_OF.get(name, name)], FOLDER / f"{name}-{seed}")
        for seed in seeds
        for name in OBJECTIVES
    ]
    for seed in seeds:
        runs = {"start": start} | {name: FOLDER / f"{name}-{seed}" for name in OBJECTIVES}
        yield [chain.evaluation(SUITE, runs, FOLDER / f"evaluation-{seed}")]


def chosen_rates() -> dict[str, float]:
    """By objective, from the sweep."""
    found = json.loads((FOLDER / "sweep/evaluation" / EVALUATION).read_text(encoding="utf-8"))["figures"]

    def distance(name: str, rate: float) -> float:
        figures = found[f"{name}-{rate}"][SETS[0]]
        return float(figures["reverse_kl"]["value"] + figures["forward_kl"]["value"])

    return {name: min(RATES, key=lambda rate: distance(name, rate)) for name in SWEPT}


def _variant(chain: Chain, name: str, seed: int, rate: float, run: Path) -> Stage:
    return chain.training("stories.yaml", run, f"run.seed={seed}", f"optim.lr={rate}", *OBJECTIVES[name])
