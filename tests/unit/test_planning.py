"""The plan against hand-worked numbers, against real tiny models, and against itself planned again."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from run_configs import change, problems
from tiny_models import tiny_llama
from transformers import LlamaConfig

from distill import cli
from distill.config import Config, ModelSettings, load
from distill.data.batches import Rollouts
from distill.errors import BadInput
from distill.models.heads import hidden_states
from distill.models.vocab_shard import WHOLE
from distill.objective_settings import OBJECTIVES, MiniLLMSettings
from distill.objectives import chunked
from distill.objectives.minillm import MiniLLM
from distill.planning.advice import SHIPPED, deepspeed_choices, knobs
from distill.planning.feed import Feed
from distill.planning.memory import CHUNK_ROWS, HEAD_ROWS, LOSS_NUMBERS, SCORE_ROWS, activation_bytes, gathers_once
from distill.planning.plan import Plan
from distill.planning.setup import GIB, Cluster, prepare
from distill.planning.shapes import read_saved, read_shape
from distill.planning.zero import Zero
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
    assert shape.whole_below(31) == (0, 0)
    assert shape.whole_below(512) == (2 * 512, 3 * 32)
    assert replace(shape, tp=2).whole_below(512) == (2 * 256 + 2 * 512, 3 * 32), "a tensor-parallel rank's part counts"


def test_heads_that_do_not_divide_go_to_the_fullest_rank(tmp_path: Path) -> None:
    tiny_llama(50, 1, 0).save_pretrained(tmp_path)
    shape = replace(read_shape(ModelSettings(path=str(tmp_path)), "student.path"), kv_heads=3, kv_width=3 * 16)
    assert [replace(shape, tp=tp).kv_on_rank for tp in (1, 2, 3)] == [48, 32, 16]


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
        objective.loss(
            lambda evaluate: evaluate(student, slice(0, tokens), WHOLE)[0], lambda part: teacher[part], batch
        )
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


def test_what_a_json_does_not_say_is_deepspeeds_default(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    theirs, ours = DeepSpeedZeroConfig(stage=3), Zero.of(path)
    assert ours.reduce_bucket == theirs.reduce_bucket_size
    assert (ours.prefetch_bucket, ours.persistence) == (theirs.prefetch_bucket_size, theirs.param_persistence_threshold)
    assert (ours.max_live, ours.max_reuse) == (theirs.max_live_parameters, theirs.max_reuse_distance)
    assert (ours.sub_group, ours.overlap) == (theirs.sub_group_size, theirs.overlap_comm)


@pytest.fixture
def sharded(bf16: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A run whose every tensor is sharded, however small, and let go of as soon as it has served."""
    path = tmp_path / "sharded.json"
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
    path.write_text(json.dumps({"zero_optimization": zero | {"reduce_bucket_size": 1000}}))
    return bf16 | {"parallel": {"deepspeed": str(path)}}


def test_a_gathered_copy_may_take_a_third_of_what_is_free(sharded: dict[str, Any]) -> None:
    made = plan(sharded, cluster(4))
    state, setup = sum(made.memory.state.values()), made.setup
    copy = 2 * sum(shape.parameters for shape in setup.models())
    found = [
        gathers_once(replace(setup, cluster=replace(setup.cluster, memory=state + times * copy)))
        for times in (2.9, 3.1)
    ]
    assert found == [False, True]


def test_a_tensor_parallel_rank_holds_what_is_not_split_whole(bf16: dict[str, Any]) -> None:
    made = plan(beside(bf16, 2, 2), cluster(2))
    shape = made.setup.student
    norms = 5 * 32
    assert (shape.split, shape.replicated) == (2 * LAYER + shape.head_size, shape.parameters - shape.split)
    assert shape.replicated >= norms
    assert made.memory.state["student weights"] == 2 * (shape.split / 2 + shape.replicated)


def test_rows_that_do_not_divide_are_the_fullest_ranks(bf16: dict[str, Any]) -> None:
    setup = plan(bf16, cluster()).setup
    assert replace(setup, cluster=cluster(3)).rows == 6, "of 16"


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


def test_weights_let_go_of_are_fetched_again(sharded: dict[str, Any]) -> None:
    """By each of 2 micro-batches on each of 2 ranks, forward and backward: half of them are missing."""
    made = plan(sharded, cluster(2))
    sent = {(flow.phase, flow.name): flow.sent for flow in made.traffic}
    student = made.setup.student.parameters
    assert sent["loss", "weights"] == 2 * 2 * (2 * student / 2)
    half = replace(made.setup, zero=replace(made.setup.zero, max_reuse=student))
    again = {(flow.phase, flow.name): flow.sent for flow in Plan.of(half).traffic}
    assert again["loss", "weights"] == 2 * 1.5 * (2 * student / 2), (
        "half of the forward is within reach of its backward"
    )


def test_recomputing_activations_takes_one_forward_more(bf16: dict[str, Any]) -> None:
    alone = {key: value for key, value in bf16.items() if key not in ("teacher", "rollout")}
    config = alone | {"objective": {"name": "sft"}}
    plain, again = (plan(change(config, "student.gradient_checkpointing", on), cluster()) for on in (False, True))
    assert again.duration.loss == pytest.approx(plain.duration.loss * 4 / 3)


def test_a_decode_step_waits_for_memory(bf16: dict[str, Any]) -> None:
    """On a processor no kernel is launched; without arithmetic a round takes as long as reading weights and caches."""
    where = replace(cluster(device="cpu"), flops=1e30, memory_bandwidth=1e10)
    made = plan(stage(bf16, "zero1"), where)
    teacher = made.setup.teacher
    assert teacher is not None
    # 16 rows whose 16 tokens come behind 64 others: on average 72 are cached. The teacher draws a fifth of the tokens,
    # and reads once more.
    read = 0.0
    for shape, forwards, kept in (
        (made.setup.student, 0.8 * 16, 2 * 2 * 2 * 8),
        (teacher, 0.2 * 16 + 1, 3 * 2 * 2 * 8),
    ):
        read += forwards * 2 * (shape.matrices + shape.head_size + 16 * 72 * kept)
    assert made.duration.round == pytest.approx(read / 1e10, abs=0)


def test_tensor_parallel_traffic_by_hand(bf16: dict[str, Any]) -> None:
    tp = {"student_tp": 2, "teacher_tp": 2, "deepspeed": str(SHIPPED / "zero1.json")}
    made = plan(bf16 | {"parallel": tp}, cluster(2))
    sent = {(flow.phase, flow.name): flow.sent for flow in made.traffic if flow.within == "replica"}
    # Two layers: 4 all-reduces forward, 2·5 backward, of 8 rows · 80 tokens · 32 · 2 bytes; and one at the head, of the
    # 16 tokens that are answered.
    assert sent["loss", "hidden states"] == (14 * 80 + 16) * 8 * 32 * 2 * 2 / 2
    # Of each of those 8 fp32 numbers, and no logits.
    assert sent["loss", "sums over the vocabulary"] == 8 * 8 * 16 * 4 * 2 / 2
    assert {name for phase, name in sent if phase == "loss"} == {"hidden states", "sums over the vocabulary"}
    # 2 + 3 layers, twice each, of 16 rows' tokens but the last.
    assert sent["rollouts", "hidden states"] == 2 * 5 * 16 * (64 + 16 - 1) * 32 * 2 * 2 / 2


def test_slower_links_and_processors_take_longer(bf16: dict[str, Any]) -> None:
    near, far = (plan(stage(bf16, "zero3"), cluster(2 // nodes, nodes)).duration for nodes in (1, 2))
    assert near.step < far.step
    assert near.step == pytest.approx(near.round / near_steps(bf16) + near.loss + near.update)


def near_steps(config: dict[str, Any]) -> int:
    return config["rollout"]["per_round"] // config["optim"]["batch_size"] * 4


# ── a whole student beside a sharded teacher ────────────────────────────────────────────────────────────────────────


def beside(config: dict[str, Any], student: int, teacher: int, name: str = "zero1") -> dict[str, Any]:
    return config | {
        "parallel": {"student_tp": student, "teacher_tp": teacher, "deepspeed": str(SHIPPED / f"{name}.json")}
    }


def test_each_model_has_its_own_degree(bf16: dict[str, Any]) -> None:
    alone, both, mixed = (plan(beside(bf16, *tp), cluster(4)) for tp in ((1, 1), (2, 2), (1, 2)))
    weights = "student weights", "teacher weights"
    assert mixed.memory.state[weights[0]] == alone.memory.state[weights[0]]
    assert mixed.memory.state[weights[1]] == both.memory.state[weights[1]] < alone.memory.state[weights[1]]
    assert mixed.memory.state["optimizer"] == alone.memory.state["optimizer"]
    setup = mixed.setup
    assert (setup.dp, setup.cohort, setup.rows, setup.decoded) == (4, 2, 4, 8)
    assert (both.setup.dp, both.setup.cohort, both.setup.rows, both.setup.decoded) == (2, 1, 8, 8)
    # 8 rows of 80 tokens: 2 layers of the student with both heads, 3 of the teacher with one; 2 · 8 numbers a head.
    assert mixed.memory.phases["rollouts"]["KV caches"] == 8 * 80 * 2 * (2 * 2 + 3 * 1) * 2 * 8
    # While they arrive, of the cohort's rows; then of this rank's.
    states = [mixed.memory.phases[phase]["teacher's hidden states"] for phase in ("rollouts", "loss")]
    assert states == [8 * 16 * 32 * 2, 4 * 16 * 32 * 2]


def test_the_traffic_of_a_whole_student_beside_a_sharded_teacher(bf16: dict[str, Any]) -> None:
    made = plan(beside(bf16, 1, 2), cluster(2))
    assert made.setup.teacher
    sent = {(flow.phase, flow.name): flow.sent for flow in made.traffic if flow.within == "replica"}
    # All 16 rows of the two ranks: the teacher's 3 layers alone are reduced and its logits gathered.
    assert sent["rollouts", "hidden states"] == 2 * 3 * 16 * (64 + 16 - 1) * 32 * 2 * 2 / 2
    assert sent["rollouts", "logits"] == made.setup.teacher.vocab * 16 * 16 * 2 / 2
    # Its head is made whole for each of 2 micro-batches; the student's loss reduces nothing.
    assert sent["loss", "teacher's head made whole"] == 2 * made.setup.teacher.head_size * 2 / 2
    assert len(sent) == 3


def test_a_teacher_over_more_ranks_is_proposed(lean: dict[str, Any], tmp_path: Path) -> None:
    # One whose weights outweigh all else.
    LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8, vocab_size=50
    ).save_pretrained(tmp_path)
    config = lean | {"teacher": {"path": str(tmp_path)}}
    proposed = {advice.overrides for advice in knobs(plan(config, cluster(2, gib=0.001, device="cpu")))}
    assert ("parallel.student_tp=1", "parallel.teacher_tp=2") in proposed


# ── what feeds the steps ────────────────────────────────────────────────────────────────────────────────────────────

# Of 16 rollouts a round, 8 sequences a step and 4 inner epochs.
FEEDS: dict[str, tuple[dict[str, Any], Feed]] = {
    "sft": ({}, Feed()),
    "seqkd": ({}, Feed()),
    "kd": ({}, Feed(read=1)),
    "gkd": ({"on_policy": 0.5}, Feed(16, 0.5 / 8, 16, read=0.5)),
    "taid": ({"on_policy": 0.25}, Feed(16, 0.25 / 8, 16, read=0.75)),
    "uld": ({"on_policy": 1.0, "ce_weight": 0.4}, Feed(16, 1 / 8, 16)),
    "opd": ({}, Feed(16, 1 / 8, 16)),
    "minillm": ({}, Feed(16, 1 / 8, 16)),
    # Four sequences of a step are rollouts: 4 steps an epoch. The teacher reads 16 recorded ones a round.
    "distillm2": ({}, Feed(16, 1 / 16, 16, paired=16)),
    # Four steps, replay with 0, ½, 1 and 1; fresh with 1, ¾, ½ and ¼ of that: (⅜ + ½ + ¼) / 4. A buffer of 2 batches.
    "distillm": (
        {"increase": 0.5, "adapt_every": 1, "replay": 16},
        Feed(8, (0.375 + 0.5 + 0.25) / 4, 16, read=1 - 2.5 / 4),
    ),
}


def of_objective(config: dict[str, Any], name: str, **settings: Any) -> dict[str, Any]:
    objective = {"name": name} | FEEDS[name][0] | settings
    return change(config, "optim.steps", 4) | {"objective": objective}


def test_every_objective_has_a_feed() -> None:
    assert FEEDS.keys() == OBJECTIVES.keys()


@pytest.mark.parametrize("name", FEEDS)
def test_what_each_objective_is_fed_with(bf16: dict[str, Any], name: str) -> None:
    if name == "uld":
        bf16 = bf16 | {"objective": {"name": name}}
    assert Feed.of(Config.model_validate(of_objective(bf16, name))) == FEEDS[name][1]


def test_plain_text_is_read_where_its_loss_is_soft(bf16: dict[str, Any]) -> None:
    config = change(bf16, "data.plain_text", bf16["data"]["train"])
    for soft in (0.0, 0.5):
        given = config | {"objective": {"name": "minillm", "lm_soft_weight": soft}}
        assert Feed.of(Config.model_validate(given)) == Feed(16, 1 / 8, 16, plain=True, plain_read=soft > 0)


def test_half_the_rollouts_take_half_the_sampling(bf16: dict[str, Any]) -> None:
    half, whole = (plan(of_objective(bf16, "gkd", on_policy=share), cluster(2)) for share in (0.5, 1.0))
    sampled = [made.duration.step - made.duration.loss - made.duration.update for made in (half, whole)]
    assert sampled[0] == pytest.approx(sampled[1] / 2 * half.duration.round / whole.duration.round)


def test_the_teacher_reads_recorded_responses_by_hand(bf16: dict[str, Any]) -> None:
    def states(name: str) -> dict[str, float]:
        made = plan(beside(of_objective(bf16, name), 2, 2), cluster(2))
        assert made.setup.length == length
        named = "hidden states of the teacher's reading"
        return {flow.phase: flow.sent for flow in made.traffic if flow.name == named}

    length = plan(of_objective(bf16, "kd"), cluster(2)).setup.length
    of_row = 2 * 3 * length * 32 * 2 * 2 / 2  # three layers, twice each
    assert states("kd") == {"loss": 8 * of_row}
    assert states("gkd") == {"loss": 4 * of_row}
    assert states("distillm") == {"loss": 3 * of_row}
    assert states("distillm2") == {"rollouts": 16 * of_row}


def test_a_replay_buffer_is_kept(bf16: dict[str, Any]) -> None:
    made = plan(of_objective(bf16, "distillm"), cluster(2))
    assert (made.setup.rows, made.setup.decoded) == (4, 4), "a round is one batch"
    assert made.memory.phases["loss"]["teacher's hidden states"] == 8 * 16 * 32 * 2


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
    assert "parallel.teacher_tp = 4: is more than the teacher's 2 key-value heads" in four
    assert "optim.batch_size = 8: does not divide over 16" in bad(bf16, cluster(16))
    nowhere = bf16 | {"student": {"path": "./nowhere"}}
    assert bad(nowhere, cluster(1)).startswith("student.path = './nowhere': no such folder")


def test_the_plan_refuses_what_the_doctor_refuses(bf16: dict[str, Any]) -> None:
    for config in (stage(bf16, "zero3_tp"), beside(bf16, 4, 4), beside(bf16, 3, 3)):
        said = set(problems(config, 12))
        assert said
        with pytest.raises(BadInput) as caught:
            plan(config, cluster(12))
        assert {str(problem) for problem in caught.value.problems} <= said


def test_no_advice_that_the_doctor_refuses(lean: dict[str, Any]) -> None:
    made = plan(lean, cluster(4, gib=0.001, device="cpu"))
    found = [*knobs(made), *deepspeed_choices(made)]
    assert found
    for advice in found:
        setup = advice.plan.setup
        assert problems(setup.config.model_dump(), setup.cluster.ranks) == [], advice.overrides


@pytest.mark.parametrize(
    ("zero", "said"),
    [
        (True, "zero_optimization = True"),
        ({"offload_optimizer": None}, "zero_optimization.offload_optimizer = None"),
        ({"offload_param": {"device": []}}, "zero_optimization.offload_param.device = []"),
        ({"stage": "3"}, "zero_optimization.stage = '3'"),
        ({"stage": 7}, "zero_optimization.stage = 7"),
        ({"stage": True}, "zero_optimization.stage = True"),
        ({"reduce_bucket_size": "large"}, "zero_optimization.reduce_bucket_size = 'large'"),
        ({"stage3_max_live_parameters": -1}, "zero_optimization.stage3_max_live_parameters = -1"),
        ({"overlap_comm": "no"}, "zero_optimization.overlap_comm = 'no'"),
    ],
)
def test_bad_deepspeed_values(
    bf16: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], zero: object, said: str
) -> None:
    config, path = tmp_path / "run.yaml", tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    config.write_text(yaml.safe_dump(bf16 | {"parallel": {"deepspeed": str(path)}}))
    assert cli.main(["plan", "--config", str(config), "--gpus-per-node", "2"]) == 2
    error = capsys.readouterr().err
    assert f"{said}: in {path}; give" in error
    assert error.count("zero_optimization") == 1


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
