"""Every check that can be made before a model loads. `python -m distill doctor`, and the first act of every launch."""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator
from transformers import PreTrainedConfig as ModelConfig
from transformers import PreTrainedTokenizerBase

from distill.checkpoint import latest
from distill.config import RESOLVED, Config, ModelSettings, load
from distill.data.records import Kind, fingerprint, open_records, read_manifest
from distill.engine import read_deepspeed_json
from distill.errors import BadInput, Problem
from distill.models.loading import load_config, load_tokenizer
from distill.objective_settings import MiniLLMSettings


@dataclass
class Report:
    """What was found: mistakes that stop the run, and notices that only inform."""

    problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def check(self, holds: bool, field_name: str, value: object, wrong: str, mend: str) -> None:
        """Record a problem unless `holds`."""
        if not holds:
            self.problems.append(Problem(field_name, value, wrong, mend))


def examine(config: Config, world_size: int | None) -> Report:
    """All checks; `world_size` None leaves out those that need the number of ranks."""
    report = Report()
    _check_parallel(config, world_size, report)
    _check_batches(config, world_size, report)
    _check_machine(config, report)
    _note_on_sampling(config, report)
    _check_models_and_data(config, report)
    _check_checkpoint(config, world_size, report)
    return report


def _check_parallel(config: Config, world_size: int | None, report: Report) -> None:
    tp = config.parallel
    report.check(
        tp.student_tp == tp.teacher_tp,
        "parallel.teacher_tp",
        tp.teacher_tp,
        f"differs from parallel.student_tp = {tp.student_tp}; DeepSpeed has one tensor-parallel group a process",
        "make them equal",
    )
    if world_size is not None:
        report.check(
            world_size % tp.student_tp == 0,
            "parallel.student_tp",
            tp.student_tp,
            f"does not divide the {world_size} ranks",
            f"start a multiple of {tp.student_tp} ranks or lower it",
        )


def _check_batches(config: Config, world_size: int | None, report: Report) -> None:
    optim, rollout = config.optim, config.rollout
    replicas = 1 if world_size is None else max(world_size // config.parallel.student_tp, 1)
    share = optim.batch_size // replicas
    report.check(
        optim.batch_size % replicas == 0,
        "optim.batch_size",
        optim.batch_size,
        f"does not divide over {replicas} data-parallel ranks",
        f"give a multiple of {replicas}",
    )
    report.check(
        share % optim.micro_batch == 0 and share > 0,
        "optim.micro_batch",
        optim.micro_batch,
        f"does not divide a rank's share of {share} sequences",
        f"give a divisor of {share}",
    )
    if config.objective.on_policy:
        report.check(
            rollout.per_round % optim.batch_size == 0,
            "rollout.per_round",
            rollout.per_round,
            f"is not a multiple of optim.batch_size = {optim.batch_size}",
            f"give {max(rollout.per_round // optim.batch_size, 1) * optim.batch_size}",
        )
        report.check(
            rollout.per_round % rollout.samples_per_prompt == 0,
            "rollout.samples_per_prompt",
            rollout.samples_per_prompt,
            f"does not divide rollout.per_round = {rollout.per_round}",
            f"give a divisor of {rollout.per_round}",
        )


def _note_on_sampling(config: Config, report: Report) -> None:
    """What a GKD run means to sample is the student alone, used once."""
    objective, rollout = config.objective, config.rollout
    if objective.name in ("kd", "gkd") and objective.on_policy and (rollout.alpha or rollout.inner_epochs > 1):
        report.notices.append(
            f"{objective.name}: rollouts hold {rollout.alpha:.0%} of the teacher's own tokens and serve "
            f"{rollout.inner_epochs} times; for the student's own, fresh ones: rollout.alpha=0 rollout.inner_epochs=1"
        )


def _check_machine(config: Config, report: Report) -> None:
    cpu = get_accelerator().device_name() == "cpu"
    try:
        zero = read_deepspeed_json(config.parallel.deepspeed).get("zero_optimization", {})
    except BadInput as error:
        report.problems += error.problems
        return
    stage = zero.get("stage", 0) if isinstance(zero, dict) else zero
    report.check(
        stage in (0, 1, 2, 3), "zero_optimization.stage", stage, f"in {config.parallel.deepspeed}", "give 0, 1, 2 or 3"
    )
    if stage in (0, 1) and isinstance(zero, dict):
        report.check(
            not zero.get("overlap_comm"),
            "zero_optimization.overlap_comm",
            True,
            f"works with stages 2 and 3 only, the stage is {stage}",
            "set it to false",
        )
    compiler = os.environ.get("CXX", "g++")
    report.check(
        not cpu or shutil.which(compiler) is not None,
        "CXX",
        compiler,
        "no such compiler; DeepSpeed builds its CPU communication with it",
        "install g++ (Debian: apt-get install g++)",
    )
    report.check(
        not (cpu and config.precision == "fp16"),
        "precision",
        "fp16",
        "processors compute in bf16 or fp32",
        "give auto, bf16 or fp32",
    )


def _check_models_and_data(config: Config, report: Report) -> None:
    needs_teacher = config.objective.needs_teacher
    report.check(
        not needs_teacher or config.teacher is not None,
        "teacher",
        None,
        f"objective {config.objective.name} needs a teacher",
        "add a `teacher:` section with its path",
    )
    student = _open_model(config.student, "student", report)
    teacher = _open_model(config.teacher, "teacher", report) if needs_teacher and config.teacher else None
    if student:
        _check_model(config, student, "student", report)
        _check_stops(config, student[1], report)
    if student and teacher:
        _check_model(config, teacher, "teacher", report)
        _check_pair(config, student, teacher, report)
    _check_data(config, student[1] if student else None, report)


OpenedModel = tuple[ModelConfig, PreTrainedTokenizerBase]


def _open_model(settings: ModelSettings, name: str, report: Report) -> OpenedModel | None:
    try:
        field_name = f"{name}.path"
        model_config = load_config(settings, field_name)
        return model_config, load_tokenizer(settings.path, field_name, settings.trust_remote_code)
    except BadInput as error:
        report.problems += error.problems
        return None


def _check_model(config: Config, model: OpenedModel, name: str, report: Report) -> None:
    model_config, tokenizer = model[0].get_text_config(), model[1]
    path = getattr(config, name).path
    report.check(tokenizer.eos_token_id is not None, f"{name}.path", path, "its tokenizer has no EOS", "set eos_token")
    if tokenizer.pad_token_id is None:
        report.notices.append(f"{name}: the tokenizer has no pad token; none is needed, lengths tell padding")
    heads, tp = getattr(model_config, "num_attention_heads", None), config.parallel.student_tp
    if heads:
        report.check(
            heads % tp == 0,
            f"parallel.{name}_tp",
            tp,
            f"does not divide the {name}'s {heads} attention heads",
            "lower it",
        )
    context = getattr(model_config, "max_position_embeddings", None)
    for field_name, longest, mend in _longest_sequences(config):
        if context is None:
            break  # no fixed limit
        wrong = f"sequences may reach {longest} tokens, the {name}'s context has {context}"
        report.check(longest <= context, field_name, longest, wrong, f"lower {mend} by {longest - context}")


def _check_stops(config: Config, tokenizer: PreTrainedTokenizerBase, report: Report) -> None:
    unknown = [index for index in config.rollout.stop_ids if index >= len(tokenizer)]
    wrong = f"the tokenizer has the ids 0 to {len(tokenizer) - 1}"
    report.check(not unknown, "rollout.stop_ids", unknown, wrong, "give ids of that range")


def _longest_sequences(config: Config) -> list[tuple[str, int, str]]:
    """For each folder of records: its setting, the longest sequence it leads to, and what to lower."""
    share = config.objective.on_policy
    sampled = {"data.train": share > 0, "data.valid": config.objective.needs_teacher, "data.plain_text": False}
    recorded = {"data.train": share < 1, "data.valid": not config.objective.needs_teacher, "data.plain_text": True}
    found = []
    for field_name, folder in _folders(config).items():
        try:
            settings = read_manifest(folder, field_name).settings
        except BadInput:
            continue  # reported with the data
        if sampled[field_name]:
            longest = settings.max_prompt + config.rollout.max_new_tokens
            found.append((field_name, longest, "rollout.max_new_tokens, or MAX_PROMPT of `make preprocess`,"))
        if recorded[field_name]:
            found.append((field_name, settings.max_length, "MAX_LENGTH of `make preprocess`"))
    return found


def _folders(config: Config) -> dict[str, Path]:
    """The record folders that the run names, by setting."""
    data = config.data
    folders = {"data.train": data.train, "data.valid": data.valid, "data.plain_text": data.plain_text}
    return {name: folder for name, folder in folders.items() if folder is not None}


def _check_pair(config: Config, student: OpenedModel, teacher: OpenedModel, report: Report) -> None:
    assert config.teacher is not None
    ours, theirs = student[1], teacher[1]
    report.check(
        ours.eos_token_id == theirs.eos_token_id,
        "teacher.path",
        config.teacher.path,
        f"its EOS is {theirs.eos_token!r}, the student's is {ours.eos_token!r}",
        "set the same eos_token in both tokenizer configs",
    )
    report.check(
        ours.get_vocab() == theirs.get_vocab() and fingerprint(ours) == fingerprint(theirs),
        "teacher.path",
        config.teacher.path,
        f"its tokenizer ({len(theirs)} tokens) is not the student's ({len(ours)} tokens)",
        "choose a student and a teacher of one family",
    )
    sizes = [model[0].get_text_config().vocab_size for model in (student, teacher)]
    if len({*sizes, len(ours)}) > 1:
        shared = min(*sizes, len(ours))
        report.notices.append(
            f"vocabularies: student {sizes[0]}, teacher {sizes[1]}, tokenizer {len(ours)}; "
            f"the shared ids 0 to {shared - 1} are used, the rest is masked"
        )


def _check_data(config: Config, tokenizer: PreTrainedTokenizerBase | None, report: Report) -> None:
    for name, folder in _folders(config).items():
        try:
            manifest = read_manifest(folder, name)
            # L_PT takes either kind.
            kind: Kind = manifest.kind if name == "data.plain_text" else "instructions"
            open_records(folder, kind, name)
        except BadInput as error:
            report.problems += error.problems
            continue
        if tokenizer is not None:
            report.check(
                manifest.tokenizer == fingerprint(tokenizer),
                name,
                str(folder),
                "was tokenised by another tokenizer than the student's",
                "run `make preprocess` with TOKENIZER=<student.path>",
            )
        empty = manifest.counts.get("kept: without a response", 0)
        needs_responses = config.objective.on_policy < 1 or name != "data.train"
        report.check(
            not (needs_responses and empty),
            name,
            str(folder),
            f"{empty} records have no response",
            "write them first, e.g. with data_prep.teacher_responses",
        )
    if config.data.plain_text and not isinstance(config.objective, MiniLLMSettings):
        report.check(
            False, "data.plain_text", str(config.data.plain_text), "only minillm reads plain text", "remove it"
        )


def _check_checkpoint(config: Config, world_size: int | None, report: Report) -> None:
    try:
        found = latest(config.run.folder)
    except BadInput as error:
        report.problems += error.problems
        return
    if found is None:
        return
    for field_name, now, before in _changed_settings(config):
        wrong = f"the run in {config.run.folder} was started with {before!r}"
        report.check(False, field_name, now, wrong, "give the old value, or another run.folder")
    if world_size is None:
        return
    layout, saved = (world_size, config.parallel.student_tp), (found.world_size, found.tp_size)
    report.check(
        layout == saved,
        "run.folder",
        str(config.run.folder),
        f"its checkpoint was written by {saved[0]} ranks at TP {saved[1]}, these are {layout[0]} at TP {layout[1]}",
        f"start {saved[0]} ranks, or another run.folder",
    )


# May differ between a run and its continuation: how long it goes on, and what is watched or kept of it.
_FREE_SECTIONS = ("evaluation", "checkpoint", "log")
_FREE_SETTINGS = ("optim.steps", "optim.max_minutes")


def _changed_settings(config: Config) -> list[tuple[str, object, object]]:
    """Settings that differ from those the run folder was started with: name, value now, value then."""
    copy = config.run.folder / RESOLVED
    if not copy.is_file():
        return []
    before = load(copy).model_dump(mode="json", exclude=set(_FREE_SECTIONS))
    now = config.model_dump(mode="json", exclude=set(_FREE_SECTIONS))
    ours, theirs = _flat(now), _flat(before)
    names = [name for name in [*ours, *theirs] if ours.get(name) != theirs.get(name)]
    return [(name, ours.get(name), theirs.get(name)) for name in dict.fromkeys(names) if name not in _FREE_SETTINGS]


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
