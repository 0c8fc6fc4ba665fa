"""Every mistake that can be seen before a model loads gets its own line."""

import json
from pathlib import Path

import pytest
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from run_configs import change, checkpoint, problems, started
from tiny_models import tiny_llama, train_tokenizer
from transformers import AutoTokenizer, GPT2Config, Phi3Config, PreTrainedTokenizerFast

from data_prep.preprocess import preprocess
from data_prep.tokenize import Recipe
from distill.checks import layout
from distill.config import Config
from distill.doctor import examine


def test_a_good_config_has_no_problem(good: dict) -> None:
    assert problems(good) == []


def test_quantised_weights_are_imported_first(good: dict, tmp_path: Path) -> None:
    file = tmp_path / "teacher.gguf"
    file.write_bytes(b"GGUF")
    found = problems(change(good, "teacher.path", str(file)))
    wrong = f"teacher.path = {str(file)!r}: quantised weights, of which every rank would need all"
    assert f"{wrong}; make a folder of it, once: python -m tools.import_gguf" in found


SIMPLE = [
    ("student.path", "no/such/dir", "student.path = 'no/such/dir': no such folder"),
    ("teacher.path", "/nowhere", "teacher.path = '/nowhere': no such folder"),
    ("data.train", "nowhere", "data.train = 'nowhere': no such folder; write it with `make preprocess`"),
    ("optim.batch_size", 9, "optim.batch_size = 9: does not divide over 2 data-parallel ranks; give a multiple of 2"),
    ("optim.micro_batch", 3, "optim.micro_batch = 3: does not divide a rank's share of 4 sequences"),
    ("rollout.per_round", 12, "rollout.per_round = 12: is not a multiple of optim.batch_size = 8; give 8"),
    ("rollout.samples_per_prompt", 3, "rollout.samples_per_prompt = 3: does not divide the 16 responses that are"),
    ("rollout.stop_ids", [5, 600], "rollout.stop_ids = [600]: the tokenizer has the ids 0 to 599; give ids of that"),
    (
        "rollout.max_new_tokens",
        250,
        "data.train = 314: sequences may reach 314 tokens, the student's context has 256; lower rollout.max_new_tokens",
    ),
]


@pytest.mark.parametrize(("field", "value", "expected"), SIMPLE)
def test_each_mistake_has_its_line(good: dict, field: str, value: object, expected: str) -> None:
    found = problems(change(good, field, value))
    assert any(expected in line for line in found), found


@pytest.mark.parametrize(
    ("on_policy", "fields"),
    [(0.0, {"data.valid"}), (0.5, {"data.train", "data.valid"}), (1.0, {"data.train", "data.valid"})],
)
def test_context_is_checked_for_what_is_sampled(good: dict, on_policy: float, fields: set[str]) -> None:
    """Validation samples wherever there is a teacher; training only where some steps are on-policy."""
    objective = {"name": "kd", "on_policy": on_policy}
    found = problems(change(good, "rollout.max_new_tokens", 250) | {"objective": objective})
    too_long = {line.split(" = ")[0] for line in found if "sequences may reach 314 tokens" in line}
    assert too_long == fields


def test_gkd_with_the_teachers_tokens_is_noted_not_refused(good: dict) -> None:
    config = Config.model_validate(good | {"objective": {"name": "gkd"}})
    report = examine(config, 2)
    assert not report.problems
    assert any("rollout.alpha=0" in notice for notice in report.notices)
    assert any("rollout.inner_epochs=1" in notice for notice in report.notices)


def parallel(good: dict, student: int, teacher: int, **settings: object) -> list[str]:
    return problems(good | {"parallel": {"student_tp": student, "teacher_tp": teacher, **settings}})


def test_too_few_ranks_for_tensor_parallelism(good: dict) -> None:
    found = parallel(good, 4, 4)
    assert any("parallel.student_tp = 4: does not divide the 2 ranks" in line for line in found)
    assert any("parallel.teacher_tp = 4: does not divide the 2 ranks" in line for line in parallel(good, 1, 4))


@pytest.mark.parametrize("pair", [(1, 1), (2, 2), (1, 2)])
def test_tensor_parallel_degrees_that_go_together(pair: tuple[int, int], good: dict) -> None:
    assert parallel(good, *pair) == []


def test_tensor_parallel_degrees_that_do_not(good: dict) -> None:
    (line,) = parallel(good, 2, 1)
    assert line.startswith("parallel.teacher_tp = 1: does not go with parallel.student_tp = 2; DeepSpeed has one ")
    assert line.endswith("; give 2, or parallel.student_tp=1")


@pytest.mark.parametrize("settings", [{"name": "kd", "divergence": "akl"}, {"name": "uld"}], ids=str)
def test_losses_that_order_the_vocabulary_need_it_whole(settings: dict, good: dict) -> None:
    plain = good | {"objective": settings, "rollout": {"max_new_tokens": 16} if settings["name"] == "kd" else {}}
    assert parallel(plain, 1, 2) == []
    (line,) = parallel(plain, 2, 2)
    assert line.startswith("parallel.student_tp = 2: deals the vocabulary out over ranks, which")
    assert line.endswith("give 1; the teacher may stay sharded")


def test_more_shards_than_heads(good: dict) -> None:
    """The models have 4 attention heads and 2 key-value heads."""
    wide = change(change(good, "optim.batch_size", 24), "rollout.per_round", 24)
    found = problems(wide | {"parallel": {"student_tp": 1, "teacher_tp": 3}}, world_size=3)
    assert "parallel.teacher_tp = 3: does not divide the teacher's 4 attention heads; divide 4" in found
    assert not any(line.startswith("parallel.student_tp") for line in found)
    found = problems(wide | {"parallel": {"student_tp": 4, "teacher_tp": 4}}, world_size=4)
    wanted = "is more than the {0}'s 2 key-value heads: ranks would have none; give at most 2"
    assert found == [f"parallel.{name}_tp = 4: {wanted.format(name)}" for name in ("student", "teacher")]


@pytest.mark.parametrize("error", [NotImplementedError("no such layer. Sorry"), RuntimeError("no such layer")])
def test_whatever_deepspeed_says_against_sharding_is_one_line(
    error: Exception, good: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: object) -> None:
        raise error

    monkeypatch.setattr("deepspeed.runtime.tensor_parallel.config._get_hf_tp_plan", refuse)
    said = "DeepSpeed's AutoTP does not shard this {} (llama: no such layer); give parallel.{}_tp=1"
    found = parallel(good, 2, 2)
    assert found == [f"parallel.{name}_tp = 2: " + said.format(name, name) for name in ("student", "teacher")]


def test_a_deepspeed_without_the_parts_that_are_asked(good: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("deepspeed.runtime.tensor_parallel.config._get_hf_tp_plan")
    assert parallel(good, 1, 1) == []
    found = parallel(good, 2, 2)
    assert len(found) == 2
    assert found[0].startswith("parallel.student_tp = 2: cannot be checked for this student (cannot import name ")


def test_an_architecture_that_cannot_be_sharded(good: dict, models_dir: Path, tmp_path: Path) -> None:
    """DeepSpeed says so itself: a name it refuses, and a plan of transformers that it cannot follow."""
    AutoTokenizer.from_pretrained(models_dir / "student").save_pretrained(tmp_path)
    GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=600, eos_token_id=0).save_pretrained(tmp_path)
    weightless, *found = parallel(change(good, "student.path", str(tmp_path)), 2, 2)
    assert "holds no weights" in weightless
    assert found == [
        "parallel.student_tp = 2: DeepSpeed's AutoTP does not shard this student (gpt2: AutoTP not supported for "
        "model); give parallel.student_tp=1"
    ]
    small = {"num_hidden_layers": 1, "hidden_size": 32, "vocab_size": 600, "eos_token_id": 0, "bos_token_id": None}
    Phi3Config(**small, num_attention_heads=4, pad_token_id=0).save_pretrained(tmp_path)
    line = parallel(change(good, "teacher.path", str(tmp_path)), 1, 2)[-1]
    assert "does not shard this teacher (phi3: HuggingFace tp_plan contains unsupported" in line


def test_deepspeed_settings_for_tensor_parallelism(good: dict, root: Path, tmp_path: Path) -> None:
    path = str(root / "ds_configs/zero3_tp.json")
    assert parallel(good, 2, 2, deepspeed=path) == []
    (line,) = parallel(good, 1, 1, deepspeed=path)
    assert line.startswith(f"parallel.student_tp = 1: {path} is for tensor parallelism; raise parallel.student_tp")
    (tmp_path / "ds.json").write_text('{"tensor_parallel": {"autotp_size": 4}}')
    (line,) = parallel(good, 2, 2, deepspeed=str(tmp_path / "ds.json"))
    assert line.startswith("tensor_parallel = {'autotp_size': 4}: in ")


def test_a_device_that_is_not_there(good: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "get_accelerator", CUDA_Accelerator)
    monkeypatch.setattr(CUDA_Accelerator, "is_available", lambda self: False)
    assert problems(good) == [
        "DS_ACCELERATOR = 'cuda': this host has no such device, or torch was not built for it; give cpu, or start on a "
        "host that has one"
    ]


def test_missing_teacher(good: dict) -> None:
    del good["teacher"]
    assert any("objective minillm needs a teacher" in line for line in problems(good))


def test_missing_compiler(good: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-g++")
    assert any("CXX = 'no-such-g++': no such compiler" in line for line in problems(good))


def test_other_tokenizer_and_other_eos(good: dict, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|user|>")
    tiny_llama(len(tokenizer), 1, 0).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    found = problems(change(good, "teacher.path", str(tmp_path / "other")))
    assert any("its EOS is '<|user|>', the student's is '<eos>'" in line for line in found)
    assert any("is not the student's" in line and "objective uld, which takes any teacher" in line for line in found)


@pytest.fixture
def foreign(good: dict, corpus: list[str], tmp_path: Path) -> dict:
    """A run whose teacher has another tokenizer, on recorded responses."""
    tokenizer = train_tokenizer(corpus, size=380, special=["<end>"])
    tokenizer.save_pretrained(tmp_path / "foreign")
    tiny_llama(len(tokenizer), 1, 0).save_pretrained(tmp_path / "foreign")
    del good["rollout"]
    return change(good, "teacher.path", str(tmp_path / "foreign"))


def test_uld_takes_a_teacher_with_another_tokenizer(foreign: dict, models_dir: Path) -> None:
    assert problems(foreign | {"objective": {"name": "uld"}}) == []
    same = change(foreign, "teacher.path", str(models_dir / "teacher")) | {"objective": {"name": "uld"}}
    assert any("kd compares them token by token" in line for line in examine(Config.model_validate(same), 2).notices)


def test_uld_cannot_mix_the_teacher_in(foreign: dict) -> None:
    sampling = foreign | {"objective": {"name": "uld", "on_policy": 0.5}}
    wanted = "rollout.alpha = 0.2: objective uld: the teacher's tokens are not the student's"
    assert any(wanted in line for line in problems(sampling))
    assert not any("rollout.alpha" in line for line in problems(sampling | {"rollout": {"alpha": 0, "per_round": 8}}))


def test_settings_that_the_objective_does_not_read(good: dict) -> None:
    """Sampling knobs are void on recorded responses, rounds in a replay buffer; length and batch serve validation."""
    recorded = good | {"objective": {"name": "kd"}, "rollout": {"alpha": 0, "batch": 8, "max_new_tokens": 9}}
    report = examine(Config.model_validate(recorded), 2)
    assert not report.problems, "a sweep of on_policy may reach 0"
    assert [line for line in report.notices if line.startswith("rollout.")] == [
        "rollout.alpha: kd at on_policy = 0.0 reads it not"
    ]
    alone = problems(recorded | {"objective": {"name": "sft"}})
    wrong = {f"rollout.{name} = {value}" for name, value in (("alpha", 0.0), ("batch", 8), ("max_new_tokens", 9))}
    assert {line.split(":")[0] for line in alone} == wrong
    replayed = problems(good | {"objective": {"name": "distillm"}, "rollout": {"max_new_tokens": 9, "inner_epochs": 1}})
    assert replayed == ["rollout.inner_epochs = 1: objective distillm does not read it; remove it"]


def test_the_doctor_does_not_advise_what_it_refuses(good: dict) -> None:
    """Replay has no inner epochs; a mix has."""
    for name, advice in (("distillm", 1), ("gkd", 2)):
        rollout = {"max_new_tokens": 16, "alpha": 0.5} | ({} if name == "distillm" else {"per_round": 8})
        config = good | {"objective": {"name": name}, "rollout": rollout}
        report = examine(Config.model_validate(config), 2)
        assert not report.problems
        assert len([line for line in report.notices if line.startswith(name)]) == advice


def test_what_distillm_adapts_to_stays_the_same(good: dict) -> None:
    distillm = {"objective": {"name": "distillm"}, "rollout": {"max_new_tokens": 16}}
    started(good, **distillm)
    found = problems(good | distillm | {"evaluation": {"prompts": 8, "every": 5}})
    assert len(found) == 1
    assert "evaluation.prompts = 8: the run in" in found[0]


def test_distillm_needs_validation_records(good: dict) -> None:
    del good["data"]["valid"]
    found = problems(good | {"objective": {"name": "distillm"}, "rollout": {"max_new_tokens": 16}})
    assert found == ["data.valid = None: distillm adapts to validation loss; give validation records"]


def test_distillm2_splits_its_batch_in_two(good: dict) -> None:
    pairs = good | {"objective": {"name": "distillm2"}}
    assert problems(pairs) == []
    found = problems(change(pairs, "optim.micro_batch", 4))
    assert any("does not divide a rank's share of 2 sequences of either kind; give a divisor of 2" in x for x in found)
    assert problems(change(pairs, "rollout.per_round", 4)) == [], "one fresh round a step"
    found = problems(change(pairs, "optim.batch_size", 6))
    assert any("over 2 data-parallel ranks and two responses a prompt; give a multiple of 4" in x for x in found)


def test_seqkd_refuses_the_ground_truth(good: dict, models_dir: Path, tmp_path: Path) -> None:
    rows = [
        {"instruction": "Why?", "output": "So.", "written_by": "a/teacher"},
        {"instruction": "How?", "output": "So."},
    ]
    recipe = Recipe(str(models_dir / "student"), "chat", 64, 96)
    del good["rollout"]
    for name, kept in (("mixed", rows), ("written", rows[:1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
        preprocess([str(tmp_path / f"{name}.jsonl")], tmp_path / name, recipe, workers=1)
    seqkd = good | {"objective": {"name": "seqkd"}}
    assert problems(change(seqkd, "data.train", str(tmp_path / "written"))) == []
    found = problems(change(seqkd, "data.train", str(tmp_path / "mixed")))
    assert any(
        "1 responses are not marked as a teacher's; seqkd never learns from the ground truth" in x for x in found
    )


def test_records_of_another_tokenizer(
    good: dict, tokenizer: PreTrainedTokenizerFast, records_dir: Path, tmp_path: Path
) -> None:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|user|>").save_pretrained(
        tmp_path / "tok"
    )
    recipe = Recipe(str(tmp_path / "tok"), "plain", 64, 96)
    preprocess([str(records_dir / "train.jsonl")], tmp_path / "records", recipe, workers=1)
    found = problems(change(good, "data.train", str(tmp_path / "records")))
    assert any("was tokenised by another tokenizer than the student's" in line for line in found)


def test_text_records_where_instructions_are_needed(good: dict, records_dir: Path) -> None:
    found = problems(change(good, "data.train", str(records_dir / "text")))
    assert any("holds text records; give a folder of instructions records" in line for line in found)


def test_sft_needs_responses(good: dict, models_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"instruction": "Why?"}\n')
    recipe = Recipe(str(models_dir / "student"), "chat", 64, 96)
    preprocess([str(tmp_path / "p.jsonl")], tmp_path / "prompts", recipe, workers=1)
    prompts_only = change(good, "data.train", str(tmp_path / "prompts"))
    assert problems(prompts_only) == []
    found = problems(prompts_only | {"objective": {"name": "sft"}})
    assert any("1 records have no response" in line for line in found)


def test_damaged_records(good: dict, models_dir: Path, records_dir: Path, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(records_dir / "train", broken)
    next(broken.glob("*.arrow")).write_bytes(b"not arrow")
    found = problems(change(good, "data.train", str(broken)))
    assert any("damaged records" in line for line in found), found


def test_a_run_continues_with_its_own_settings_only(good: dict) -> None:
    started(good)
    assert problems(change(good, "optim.steps", 99) | {"log": {"every": 7}}) == []
    found = problems(change(change(good, "optim.lr", 1e-3), "rollout.per_round", 8))
    folder = good["run"]["folder"]
    assert f"optim.lr = 0.001: the run in {folder} was started with 5e-06; give the old value" in found[0]
    assert f"rollout.per_round = 8: the run in {folder} was started with 16" in found[1]


def test_a_run_does_not_turn_into_another_objective(good: dict) -> None:
    started(good)
    assert any("objective.name = 'sft': the run in" in line for line in problems(good | {"objective": {"name": "sft"}}))


def test_damaged_checkpoints(good: dict) -> None:
    """The one before is used; without one the run is refused: it would begin anew, and remove what may be saved."""
    started(good)
    folder = Path(good["run"]["folder"])
    newest = checkpoint(folder, 2, world_size=2)
    (newest / "weights").unlink()
    report = examine(Config.model_validate(good), 2)
    assert not report.problems
    assert "checkpoint step-0000002 cannot be used: weights is missing" in report.notices
    (folder / "checkpoints/step-0000001/manifest.json").unlink()
    assert problems(good) == [
        f"run.folder = {str(folder)!r}: none of its checkpoints can be used (step-0000002, step-0000001); "
        "put one back, or start in another folder"
    ]


def test_another_layout_of_ranks_is_no_problem(good: dict) -> None:
    started(good)
    tp = {"parallel": {"student_tp": 2, "teacher_tp": 2, "deepspeed": "ds_configs/zero1.json"}}
    report = examine(Config.model_validate(good | tp), 4)
    assert not report.problems
    told = "was written by 2 ranks at TP 1; it will be dealt out anew to 4 at TP 2"
    assert f"checkpoint step-0000001 {told}" in report.notices


def test_padded_vocabulary_is_a_notice(good: dict, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tiny_llama(len(tokenizer) + 24, 1, 0).save_pretrained(tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")
    report = examine(Config.model_validate(change(good, "teacher.path", str(tmp_path / "padded"))), 2)
    assert not report.problems
    size = len(tokenizer)
    assert any(f"the shared ids 0 to {size - 1} are used, the rest is masked" in notice for notice in report.notices)
    assert any("no pad token" in notice for notice in report.notices)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ('{"zero_optimization": {"stage": 7}}', "zero_optimization.stage = 7"),
        ('{"zero_optimization": {"stage": 1, "overlap_comm": true}}', "works with stages 2 and 3 only"),
        ("{", "not valid JSON"),
    ],
)
def test_deepspeed_json(good: dict, tmp_path: Path, text: str, wrong: str) -> None:
    (tmp_path / "ds.json").write_text(text)
    found = problems(good | {"parallel": {"deepspeed": str(tmp_path / "ds.json")}})
    assert any(wrong in line for line in found), found
