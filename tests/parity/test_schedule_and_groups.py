"""The learning rate as numbers worked out by hand; an engine's AdamW, clip and decay against torch's own in fp64."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from distill.config import OptimSettings
from distill.optim import learning_rate_factor, parameter_groups

# Of a run of 8 steps after a warm-up of 3: a line up to the peak, which step 3 reaches, then 5 steps of the shape.
WARM = [1 / 4, 2 / 4, 3 / 4]
# (1 + cos(π k/8)) / 2 and, for the run that is warmed up, (1 + cos(π k/5)) / 2, by a table of cosines.
COSINE_8 = [1, 0.96194, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.03806]
COSINE_5 = [1, 0.904508, 0.654508, 0.345492, 0.095492]
TABLES = {
    ("constant", 0): [1] * 8,
    ("constant", 3): [*WARM, 1, 1, 1, 1, 1],
    ("linear", 0): [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8],
    ("linear", 3): [*WARM, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5],
    ("cosine", 0): COSINE_8,
    ("cosine", 3): [*WARM, *COSINE_5],
}


@pytest.mark.parametrize(("schedule", "warmup"), TABLES, ids=str)
def test_the_rate_of_every_step(schedule: Any, warmup: int) -> None:
    settings = OptimSettings(schedule=schedule, warmup_steps=warmup, steps=8)
    found = [learning_rate_factor(step, settings) for step in range(8)]
    assert found == pytest.approx(TABLES[schedule, warmup], abs=1e-5)
    after = 1 if schedule == "constant" else 0
    assert [learning_rate_factor(step, settings) for step in (8, 9, 100)] == pytest.approx([after] * 3)


def test_a_warm_up_that_outlasts_the_run_is_a_line() -> None:
    """Its first step is not 0, and its steps do not depend on the run's length."""
    settings = OptimSettings(schedule="cosine", warmup_steps=50, steps=4)
    assert [learning_rate_factor(step, settings) for step in range(4)] == pytest.approx(
        [1 / 51, 2 / 51, 3 / 51, 4 / 51]
    )


def test_matrices_decay_and_vectors_do_not() -> None:
    model = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 3), nn.LayerNorm(3))
    decayed, exempt = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.1, 0.0)
    assert [tuple(p.shape) for p in decayed["params"]] == [(7, 5), (3, 5)]
    assert [tuple(p.shape) for p in exempt["params"]] == [(3,), (3,), (3,)]
    # ZeRO-3 leaves an empty tensor in a sharded weight's place.
    sharded: Any = nn.Parameter(torch.empty(0))
    sharded.ds_shape = torch.Size([4, 4])
    model.register_parameter("sharded", sharded)
    assert any(p is sharded for p in parameter_groups(model, 0.1)[0]["params"])
    assert [group["weight_decay"] for group in parameter_groups(nn.LayerNorm(3), 0.1)] == [0.0]


# An engine's steps. Nothing at its default, and a clip far below the gradient's norm.
PEAK, BETAS, DECAY, CLIP, VOCAB = 0.01, (0.5, 0.6), 0.1, 0.05, 40
ROWS = [
    {"prompt_ids": [1, 2, 3], "response_ids": [4, 5, 6, 7, 0]},
    {"prompt_ids": [9], "response_ids": [0]},
    {"prompt_ids": [30, 39], "response_ids": [11, 12, 38]},
]
# Four steps of a run of four, then two more of the same run when it has become one of eight: rates as shares of PEAK,
# by hand. Steps 0 and 1 are the warm-up; step 2 is its peak; step 3 is half way to the old end, step 4 a third of the
# way to the new one, step 5 half way.
RATES = {"linear": [1 / 3, 2 / 3, 1, 1 / 2, 2 / 3, 1 / 2], "cosine": [1 / 3, 2 / 3, 1, 1 / 2, 3 / 4, 1 / 2]}
# Each schedule under another ZeRO stage.
STAGES = {"linear": "zero1", "cosine": "zero3"}


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory, root: Path, environment: dict[str, str]) -> Path:
    """The folder of what the engine's steps have left, by schedule."""
    folder = tmp_path_factory.mktemp("steps")
    tiny_llama(VOCAB, 2, 5).save_pretrained(folder / "model")
    jobs = [
        {
            "name": schedule,
            "deepspeed": str(root / f"ds_configs/{STAGES[schedule]}.json"),
            "rows": ROWS,
            "legs": [{"optim": _optim(schedule, 4), "count": 4}, {"optim": _optim(schedule, 8), "count": 2}],
        }
        for schedule in RATES
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "tests/ranks/optimizer_steps.py", str(folder)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def _optim(schedule: str, steps: int) -> dict[str, Any]:
    given = {"lr": PEAK, "schedule": schedule, "warmup_steps": 2, "steps": steps}
    return given | {"betas": BETAS, "weight_decay": DECAY, "clip_norm": CLIP, "batch_size": 3, "micro_batch": 3}


def by_torch(folder: Path, rates: list[float]) -> tuple[list[float], list[dict[str, Tensor]]]:
    """Norms before the clip, and weights after each step: transformers row by row, and torch's AdamW, in fp64."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) is matrix] for matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    adam, norms, weights = torch.optim.AdamW(groups, betas=BETAS), [], []
    for rate in rates:
        for group in adam.param_groups:
            group["lr"] = rate * PEAK
        total, tokens = torch.zeros((), dtype=torch.float64), 0
        for row in ROWS:
            prompt, response = row["prompt_ids"], row["response_ids"]
            logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
            total = total + nn.functional.cross_entropy(logits, torch.tensor(response), reduction="sum")
            tokens += len(response)
        adam.zero_grad()
        (total / tokens).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        adam.step()
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return norms, weights


@pytest.mark.slow
@pytest.mark.parametrize("schedule", RATES)
def test_an_engine_steps_as_torchs_adamw_and_goes_on_at_the_new_schedules_rate(schedule: str, steps: Path) -> None:
    norms, weights = by_torch(steps, RATES[schedule])
    assert min(norms) > 10 * CLIP, "the clip must bite"
    found = json.loads((steps / f"{schedule}.json").read_text())
    assert [step["rate"] / PEAK for step in found] == pytest.approx(RATES[schedule])
    # AdamW makes a whole step of the smallest gradient's rounding: 1e-4 of the norm after six, by the threads' number.
    assert [step["norm"] for step in found] == pytest.approx(norms, rel=1e-3)
    start = dict(AutoModelForCausalLM.from_pretrained(steps / "model").named_parameters())
    for number in (1, 3, 4, 5, 6):
        ours = load_file(steps / f"{schedule}-{number}.safetensors")
        for name, expected in weights[number - 1].items():
            moved = float((expected - start[name]).norm())
            assert moved > 0
            # Decay moves a matrix by 3 % of that, and no vector.
            assert float((ours[name].double() - expected).norm()) < 1e-3 * moved, (number, name)
