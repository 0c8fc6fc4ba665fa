"""The plan against hand-worked numbers, against real tiny models, and against itself planned again."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import tiny_llama
from run_configs import change

from distill import cli
from distill.config import Config, ModelSettings, load
from distill.data.batches import Rollouts
from distill.errors import BadInput
from distill.models.heads import hidden_states
from distill.objective_settings import MiniLLMSettings
from distill.objectives import chunked
from distill.objectives.minillm import MiniLLM
from distill.planning.advice import SHIPPED, deepspeed_choices, knobs
from distill.planning.memory import CHUNK_ROWS, HEAD_ROWS, LOSS_NUMBERS, SCORE_ROWS, activation_bytes
from distill.planning.plan import Plan
from distill.planning.setup import GIB, Cluster, prepare
from distill.planning.shapes import read_saved, read_shape
from distill.rollout import follower
from tools.benchmarks.meter import Meter

# One layer of `tiny_llama`: q and o 32·32, k and v 32·16, gate, up and down 32·64; two norms of 32.
LAYER = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64


def cluster(ranks: int = 1, nodes: int = 1, gib: float = 80, device: Any = "cuda") -> Cluster:
    return Cluster(nodes, ranks, gib * GIB, 4e14, 4.5e11, 5e10, 3.35e12, device)


def plan(config: dict[str, Any], where: Cluster) -> Plan:
    return Plan.of(prepare(Config.model_validate(config), where))


def stage(config: dict[str, Any], name: str) -> dict[str, Any]:
    return config | {"parallel": config.get("parallel", {}) | {"deepspeed": str(SHIPPED / f"{name}.json")}}


@pytest.fixture
def bf16(good: dict[str, Any]) -> dict[str, Any]:
    return good | {"precision": "bf16"}


# ── shapes ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_real_model(tmp_path: Path, tied: bool) -> None:
    model = tiny_llama(50, 3, 0, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    shape = read_shape(ModelSettings(path=str(tmp_path)), "student.path")
    assert shape.parameters == model.num_parameters() == sum(size for size, _ in shape.sizes)
    assert (shape.matrices, shape.embedding, shape.head) == (3 * LAYER, 50 * 32, 0 if tied else 50 * 32)
    assert shape.replicated == 7 * 32 + (0 if tied else 50 * 32)
    assert (shape.linears, shape.vocab, shape.kv_width) == (3 * 7, 50, 3 * 2 * 2 * 8)


def test_small_tensors_stay_whole(tmp_path: Path) -> None:
    tiny_llama(50, 1, 0).save_pretrained(tmp_path)
    shape = read_shape(ModelSettings(path=str(tmp_path)), "student.path")
    assert shape.whole_below(31, 1) == (0, 0)
    assert shape.whole_below(512, 1) == (2 * 512, 3 * 32)
    assert shape.whole_below(512, 2) == (2 * 256 + 2 * 512, 3 * 32), "a tensor-parallel rank's part counts"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_saved_activations_are_what_a_real_forward_keeps(tmp_path: Path, checkpointing: bool) -> None:
    model = tiny_llama(50, 4, 0)
    model.save_pretrained(tmp_path)
    saved = read_saved(ModelSettings(path=str(tmp_path)), "student.path", torch.float32, 1)
    rows, tokens = 4, 256
    ids = torch.randint(50, (rows, tokens))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    with Meter() as meter:
        states = hidden_states(model, ids, mask, torch.arange(tokens).expand(rows, -1))
    # Beside the layers the masks: an additive one in each, or, for all, one of yes and no.
    kept = 5 * saved.checkpointed_layer + tokens if checkpointing else 4 * (saved.layer + tokens * 4)
    assert meter.live == pytest.approx(rows * tokens * (kept + saved.rest), rel=0.12)
    del states


def test_tensor_parallelism_splits_what_lies_within_a_layer(tmp_path: Path) -> None:
    tiny_llama(50, 1, 0).save_pretrained(tmp_path)
    whole, half = (read_saved(ModelSettings(path=str(tmp_path)), "x", torch.bfloat16, tp) for tp in (1, 2))
    assert whole.layer / 2 < half.layer < whole.layer
    assert half.checkpointed_layer == whole.checkpointed_layer == 32 * 2


def test_rows_are_those_of_the_code() -> None:
    assert follower._SCORE_ROWS == SCORE_ROWS
    for name in ("cpu", "cuda"):
        device = torch.device(name)
        assert (chunked._head_rows(device), chunked._rows(device)) == (HEAD_ROWS[name], CHUNK_ROWS[name])


def test_a_loss_makes_as_many_fp32_numbers_as_planned() -> None:
    tokens, vocab = CHUNK_ROWS["cpu"], 4000
    ones = torch.ones(1, tokens)
    batch = Rollouts(
        torch.zeros(1, 1, dtype=torch.long),
        torch.ones(1, dtype=torch.long),
        torch.zeros(1, tokens, dtype=torch.long),
        torch.tensor([tokens]),
        behavior_logprobs=ones,
        teacher_logprobs=ones,
        importance_weights=ones,
        from_teacher=ones.bool(),
        ended=ones[0, :1].bool(),
        advantages=ones,
    )
    objective = MiniLLM(MiniLLMSettings.model_validate({"name": "minillm"}))
    student, teacher = torch.randn(tokens, vocab).bfloat16(), torch.randn(tokens, vocab).bfloat16()
    with Meter() as meter:
        objective.loss(lambda evaluate: evaluate(student, slice(0, tokens))[0], lambda part: teacher[part], batch)
    assert meter.peak / (tokens * vocab * 4) == pytest.approx(LOSS_NUMBERS, abs=1)


@pytest.fixture
def lean(bf16: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A run whose buffers do not outweigh these tiny models."""
    path = tmp_path / "lean.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1, "reduce_bucket_size": 1000}}))
    return bf16 | {"parallel": {"deepspeed": str(path)}}


# ── memory ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_state_by_hand(bf16: dict[str, Any]) -> None:
    setup = plan(bf16, cluster()).setup
    assert setup.teacher
    student, teacher = setup.student.parameters, setup.teacher.parameters
    one = plan(stage(bf16, "zero1"), cluster()).memory.state
    assert (one["student weights"], one["teacher weights"]) == (2 * student, 2 * teacher)
    assert one["optimizer"] == 12 * student
    four = plan(stage(bf16, "zero1"), cluster(4)).memory.state
    assert (four["student weights"], four["optimizer"]) == (2 * student, 3 * student), "stage 1 shards the optimizer"
    sharded = plan(stage(bf16, "zero3"), cluster(4)).memory.state
    assert (sharded["optimizer"], sharded["student gradients"]) == (3 * student, student / 2)
    # Every tensor of these models is small enough to stay whole beside its shard.
    assert sharded["teacher weights"] == 2 * teacher / 4 + 2 * teacher


def test_offloading_moves_state_to_the_host(bf16: dict[str, Any]) -> None:
    memory = plan(stage(bf16, "zero3_offload"), cluster(2)).memory
    assert {"optimizer", "student weights", "teacher weights"} <= set(memory.host)
    assert "optimizer" not in memory.state


def test_rollouts_by_hand(bf16: dict[str, Any]) -> None:
    made = plan(stage(bf16, "zero1"), cluster())
    items, setup = made.memory.phases["rollouts"], made.setup
    # 16 rows, prompts of up to 64 tokens, 16 new ones; 2 and 3 layers of keys and values of 2 heads of 8.
    assert items["KV caches"] == 16 * (64 + 16) * 2 * (2 + 3) * 2 * 2 * 8
    assert items["teacher's hidden states"] == 16 * 16 * 32 * 2
    assert items["logits"] == 128 * setup.student.vocab * (2 + 4 + 4)
    host = plan(change(stage(bf16, "zero1"), "rollout.teacher_cache", "host"), cluster()).memory
    assert "teacher's hidden states" not in host.phases["loss"]


def test_more_ranks_take_less_of_each(bf16: dict[str, Any]) -> None:
    config = change(bf16, "optim.micro_batch", 1)
    for name in ("zero1", "zero2", "zero3"):
        peaks = [plan(stage(config, name), cluster(ranks)).memory.peak for ranks in (1, 2, 4, 8)]
        assert peaks == sorted(peaks, reverse=True)
    peaks = [plan(stage(config, name), cluster(4)).memory.state["optimizer"] for name in ("zero1", "zero3")]
    assert peaks[0] == peaks[1]


def test_smaller_micro_batches_and_checkpointing_take_less(bf16: dict[str, Any]) -> None:
    config = change(bf16, "optim.micro_batch", 8)
    whole, small = plan(config, cluster()), plan(bf16, cluster())
    assert activation_bytes(small.setup, False) == activation_bytes(whole.setup, False) / 4
    assert activation_bytes(whole.setup, True) < activation_bytes(whole.setup, False)
    again = plan(change(config, "student.gradient_checkpointing", True), cluster(device="cpu")).memory
    assert again.of("loss") < plan(config, cluster(device="cpu")).memory.of("loss")


# ── traffic and time ────────────────────────────────────────────────────────────────────────────────────────────────


def test_traffic_by_hand(bf16: dict[str, Any]) -> None:
    def sent(name: str, ranks: int) -> dict[tuple[str, str], float]:
        made = plan(stage(bf16, name), cluster(ranks))
        return {(flow.phase, flow.name): flow.sent for flow in made.traffic}

    student = plan(bf16, cluster()).setup.student.parameters
    assert sent("zero1", 1) == {}
    # 4 ranks: an all-reduce of gradients sends 2·3/4 of them, an all-gather of weights 3/4.
    assert sent("zero1", 4) == {("update", "gradients"): 2 * 2 * student * 3 / 4, ("update", "weights"): 1.5 * student}
    # 2 micro-batches on each of 2 ranks.
    assert sent("zero2", 2)["loss", "gradients"] == 2 * 2 * 2 * student / 2
    # Small tensors are not gathered, their gradients are scattered; after the update they are made whole.
    assert sent("zero3", 2) == {("loss", "gradients"): 2 * 2 * student / 2, ("update", "small weights"): student}


def test_tensor_parallel_traffic_by_hand(bf16: dict[str, Any]) -> None:
    tp = {"student_tp": 2, "teacher_tp": 2, "deepspeed": str(SHIPPED / "zero1.json")}
    made = plan(bf16 | {"parallel": tp}, cluster(2))
    sent = {(flow.phase, flow.name): flow.sent for flow in made.traffic if flow.within == "replica"}
    # Two layers: 4 all-reduces forward, 2·5 backward, of 8 rows · 96 tokens (the longest recorded) · 32 · 2 bytes.
    length = made.setup.length
    assert sent["loss", "hidden states"] == (4 + 10) * 8 * length * 32 * 2 * 2 / 2
    # 2 + 3 layers, twice each, of 16 rows' tokens but the last.
    assert sent["rollouts", "hidden states"] == 2 * 5 * 16 * (64 + 16 - 1) * 32 * 2 * 2 / 2


def test_slower_links_and_processors_take_longer(bf16: dict[str, Any]) -> None:
    near, far = (plan(stage(bf16, "zero3"), cluster(2 // nodes, nodes)).duration for nodes in (1, 2))
    assert near.step < far.step
    assert near.step == pytest.approx(near.round / near_steps(bf16) + near.loss + near.update)


def near_steps(config: dict[str, Any]) -> int:
    return config["rollout"]["per_round"] // config["optim"]["batch_size"] * 4


# ── advice ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_advice_is_the_run_planned_again(lean: dict[str, Any], tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(change(lean, "optim.micro_batch", 4)))
    full = plan(yaml.safe_load(config.read_text()), cluster(2, device="cpu")).memory.peak
    where = cluster(2, gib=full / GIB - 1e-6, device="cpu")
    made = Plan.of(prepare(load(config), where))
    found = knobs(made)[:-1]
    assert not made.fits
    assert {"optim.micro_batch=2", "optim.micro_batch=1"} <= {advice.overrides[0] for advice in found}
    peaks = [advice.plan.memory.peak for advice in found]
    assert peaks == sorted(peaks)
    for advice in found:
        again = Plan.of(prepare(load(config, advice.overrides), where))
        assert again.memory == advice.plan.memory
        assert again.memory.peak < full


def test_changes_are_combined_where_none_is_enough(lean: dict[str, Any]) -> None:
    singles = knobs(plan(lean, cluster(2, gib=0.001, device="cpu")))
    least = min(advice.plan.memory.peak for advice in singles)
    *_, together, nodes = knobs(plan(lean, cluster(2, gib=(least - 1000) / GIB, device="cpu")))
    assert together.plan.fits
    assert len(together.overrides) > 1
    assert nodes.overrides == ("--nodes 2",)
    assert nodes.plan.setup.cluster.ranks == 4


def test_of_nearly_equally_fast_deepspeed_configs_the_lowest_stage_comes_first(bf16: dict[str, Any]) -> None:
    def order(gib: float, flops: float) -> list[str]:
        where = replace(cluster(2, gib=gib, device="cpu"), flops=flops)
        found = deepspeed_choices(plan(bf16, where))
        return [f"{Path(advice.overrides[0]).stem} {advice.plan.fits}" for advice in found]

    # Arithmetic so slow that traffic makes no difference.
    assert order(80, 1e6) == ["zero1 True", "zero2 True", "zero3 True", "zero3_offload True"]
    # So fast that it makes all: these models' tensors are too small for stage 3 to gather.
    assert order(80, 1e15)[0] == "zero3 True"
    # Below stage 3 buffers take 0.19 GiB.
    assert {*order(0.1, 1e6)[2:]} == {"zero1 False", "zero2 False"}


# ── bad input and the command line ──────────────────────────────────────────────────────────────────────────────────


def bad(config: dict[str, Any], where: Cluster) -> str:
    with pytest.raises(BadInput) as caught:
        plan(config, where)
    return str(caught.value)


def test_layouts_that_cannot_be(bf16: dict[str, Any]) -> None:
    def tp(degree: int) -> dict[str, Any]:
        return bf16 | {"parallel": {"student_tp": degree, "teacher_tp": degree}}

    assert bad(bf16, cluster(0)) == "--gpus-per-node = 0: is not 1 or more; give the number there will be"
    assert bad(bf16, cluster(1, gib=-1)).startswith("--gpu-memory = -1")
    assert "parallel.student_tp = 2: does not divide the 3 ranks" in bad(tp(2), cluster(3))
    assert "parallel.student_tp = 3: does not divide the student's 4 attention heads" in bad(tp(3), cluster(3))
    four = bad(tp(4), cluster(4))
    assert "parallel.teacher_tp = 4: does not divide the teacher's 2 key and value heads; give one of [1, 2]" in four
    assert "optim.batch_size = 8: does not divide over 16" in bad(bf16, cluster(16))
    nowhere = bf16 | {"student": {"path": "./nowhere"}}
    assert bad(nowhere, cluster(1)).startswith("student.path = './nowhere': no such folder")


def test_without_records_lengths_are_assumed(bf16: dict[str, Any]) -> None:
    made = plan(change(bf16, "data.train", "nowhere"), cluster())
    assert (made.setup.prompt, made.setup.assumed_lengths) == (256, True)
    assert not plan(bf16, cluster()).setup.assumed_lengths


@pytest.mark.parametrize(("memory", "code"), [("80", 0), ("0.05", 3)])
def test_exit_codes_and_json(
    bf16: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], memory: str, code: int
) -> None:
    config, out = tmp_path / "run.yaml", tmp_path / "plan.json"
    config.write_text(yaml.safe_dump(bf16))
    sizes = ["--gpus-per-node", "2", "--device", "cpu", "--gpu-memory", memory, "--json", str(out)]
    assert cli.main(["plan", "--config", str(config), *sizes]) == code
    text, found = capsys.readouterr().out, json.loads(out.read_text())
    assert ("\nfits: " in text, found["fits"]) == (code == 0, code == 0)
    assert ("what to turn" in text, bool(found["knobs"])) == (code == 3, code == 3)
    assert found["margin_bytes"] == float(memory) * GIB - found["peak_bytes"]


def test_bad_input_ends_with_2(bf16: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(bf16))
    assert cli.main(["plan", "--config", str(config), "--gpus-per-node", "-1"]) == 2
    assert "distill: --gpus-per-node = -1: is not 1 or more" in capsys.readouterr().err
    assert cli.main(["plan", "--config", str(config), "--json", str(tmp_path / "no" / "plan.json")]) == 2
    assert "its folder does not exist" in capsys.readouterr().err
