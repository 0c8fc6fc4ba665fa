"""Whether the models can be opened and fit each other, and the records fit them."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.checks.contents import largest_id, wrong_contents
from distill.checks.ids import OpenedModel, check_ends
from distill.checks.report import Report
from distill.checks.sharding import check_sharding
from distill.config import Config, ModelSettings
from distill.data.records import WRITTEN_BY_A_MODEL, Kind, fingerprint, open_records, read_manifest
from distill.errors import BadInput
from distill.models.downloads import opened_at
from distill.models.loading import build_on_meta, load_config, load_generation_config, load_tokenizer
from distill.models.vocabulary import RESIZE, KnownIds, rows_of
from distill.models.weights import check_weights
from distill.objective_settings import DistillmSettings, SeqKdSettings


def check_models_and_data(config: Config, report: Report) -> None:
    """All that reading the models' configurations, their tokenizers and the records' manifests can tell."""
    needs_teacher = config.objective.needs_teacher
    student = _open_model(config.student, "student", report)
    teacher = _open_model(config.teacher, "teacher", report) if needs_teacher and config.teacher else None
    known = None
    if student:
        _check_model(config, student, "student", report)
        known = check_ends(config, student, teacher, report)
    if student and teacher:
        _check_model(config, teacher, "teacher", report)
        (_check_strangers if config.objective.own_tokenizer else _check_pair)(config, student, teacher, report)
    _check_data(config, student.tokenizer if student else None, known, report)


def _open_model(settings: ModelSettings, name: str, report: Report) -> OpenedModel | None:
    try:
        field_name = f"{name}.path"
        model_config = load_config(settings, field_name)
        tokenizer = load_tokenizer(settings.path, field_name, settings.trust_remote_code)
        generation = load_generation_config(settings, field_name)
        # Code that came with a model may know no meta device.
        own_code = settings.trust_remote_code
        model = None if own_code else build_on_meta(model_config, settings.path, field_name)
        _check_weights(model, settings, field_name, report)
        return OpenedModel(model_config, tokenizer, generation)
    except BadInput as error:
        report.problems += error.problems
        return None


def _check_weights(model: PreTrainedModel | None, settings: ModelSettings, field_name: str, report: Report) -> None:
    folder = Path(opened_at(settings.path))
    if not folder.is_dir():
        return  # of the hub: looked at where they are fetched
    try:
        shapes = check_weights(folder, settings, field_name)
    except BadInput as error:
        report.problems += error.problems
        return
    if model is None:
        return
    embedding: Any = model.get_input_embeddings().weight
    name = next((name for name, parameter in model.named_parameters() if parameter is embedding), "")
    found, expected = shapes.get(name), list(embedding.shape)
    wrong = f"its embedding has the shape {found}, its config.json says {expected}"
    report.check(found in (None, expected), field_name, settings.path, wrong, "give weights and a config of one model")


def _check_model(config: Config, model: OpenedModel, name: str, report: Report) -> None:
    model_config, tokenizer = model.config.get_text_config(), model.tokenizer
    path = getattr(config, name).path
    report.check(tokenizer.eos_token_id is not None, f"{name}.path", path, "its tokenizer has no EOS", "set eos_token")
    if tokenizer.pad_token_id is None:
        report.notices.append(f"{name}: the tokenizer has no pad token; none is needed, lengths tell padding")
    check_sharding(config, name, model.config, report)
    context = getattr(model_config, "max_position_embeddings", None)
    for field_name, longest, mend in _longest_sequences(config):
        if context is None:
            break  # no fixed limit
        wrong = f"sequences may reach {longest} tokens, the {name}'s context has {context}"
        report.check(longest <= context, field_name, longest, wrong, f"lower {mend} by {longest - context}")


def _longest_sequences(config: Config) -> list[tuple[str, int, str]]:
    """For each folder of records: its setting, the longest sequence it leads to, and what to lower."""
    samples_valid = config.validation_samples
    sampled = {"data.train": config.objective.samples, "data.valid": samples_valid, "data.plain_text": False}
    recorded = _reads_responses(config)
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


def _reads_responses(config: Config) -> dict[str, bool]:
    """For each folder of records whether its responses are read, and not its prompts alone."""
    reads_valid = config.validation_metric == "loss" or isinstance(config.objective, DistillmSettings)
    return {"data.train": config.objective.reads_responses, "data.valid": reads_valid, "data.plain_text": True}


def _folders(config: Config) -> dict[str, Path]:
    """The record folders that the run names, by setting."""
    data = config.data
    folders = {"data.train": data.train, "data.valid": data.valid, "data.plain_text": data.plain_text}
    return {name: folder for name, folder in folders.items() if folder is not None}


def _check_pair(config: Config, student: OpenedModel, teacher: OpenedModel, report: Report) -> None:
    assert config.teacher is not None
    ours, theirs = student.tokenizer, teacher.tokenizer
    other = "choose a student and a teacher of one family, or objective uld, which takes any teacher"
    report.check(
        ours.eos_token_id == theirs.eos_token_id,
        "teacher.path",
        config.teacher.path,
        f"its EOS is {theirs.eos_token!r}, the student's is {ours.eos_token!r}",
        "set the same eos_token in both tokenizer configs, or take objective uld if the models are of two families",
    )
    report.check(
        ours.get_vocab() == theirs.get_vocab() and fingerprint(ours) == fingerprint(theirs),
        "teacher.path",
        config.teacher.path,
        f"its tokenizer ({len(theirs)} tokens) is not the student's ({len(ours)} tokens)",
        other,
    )
    sizes = [rows_of(model.config) for model in (student, teacher)]
    if len({*sizes, len(ours)}) > 1:
        shared = min(*sizes, len(ours))
        report.notices.append(
            f"vocabularies: student {sizes[0]}, teacher {sizes[1]}, tokenizer {len(ours)}; "
            f"the shared ids 0 to {shared - 1} are used, the rest is masked"
        )


def _check_strangers(config: Config, student: OpenedModel, teacher: OpenedModel, report: Report) -> None:
    """Any two tokenizers will do; two of one kind deserve better."""
    if fingerprint(student.tokenizer) == fingerprint(teacher.tokenizer):
        report.notices.append(
            f"{config.objective.name}: teacher and student have the same tokenizer; kd compares them token by token"
        )


def _check_data(
    config: Config, tokenizer: PreTrainedTokenizerBase | None, known: KnownIds | None, report: Report
) -> None:
    for name, folder in _folders(config).items():
        try:
            manifest = read_manifest(folder, name)
            # L_PT takes either kind.
            kind: Kind = manifest.kind if name == "data.plain_text" else "instructions"
            rows = open_records(folder, kind, name)
        except BadInput as error:
            report.problems += error.problems
            continue
        wrong = wrong_contents(rows, manifest, len(tokenizer) if tokenizer is not None else None)
        report.check(wrong is None, name, str(folder), wrong or "", "run `make preprocess` again")
        if tokenizer is not None and known is not None and wrong is None and known.size < len(tokenizer):
            _check_ids(rows, known, name, folder, _reads_responses(config)[name], report)
        if tokenizer is not None:
            report.check(
                manifest.tokenizer == fingerprint(tokenizer),
                name,
                str(folder),
                "was tokenised by another tokenizer than the student's",
                "run `make preprocess` with TOKENIZER=<student.path>",
            )
        empty = manifest.counts.get("kept: without a response", 0)
        needs_responses = config.objective.reads_responses or name != "data.train"
        report.check(
            not (needs_responses and empty),
            name,
            str(folder),
            f"{empty} records have no response",
            "write them first, e.g. with data_prep.teacher_responses",
        )
        by_people = manifest.counts.get("kept", 0) - manifest.counts.get(WRITTEN_BY_A_MODEL, 0)
        report.check(
            not (isinstance(config.objective, SeqKdSettings) and name == "data.train" and by_people),
            name,
            str(folder),
            f"{by_people} responses are not marked as a teacher's; seqkd never learns from the ground truth",
            "write them with data_prep.teacher_responses, or take objective sft",
        )


def _check_ids(rows: Dataset, known: KnownIds, name: str, folder: Path, reads_responses: bool, report: Report) -> None:
    """Compare the largest id in all records, not in the first ones alone, with the ids that have a row."""
    read = ("prompt_ids", "input_ids", *(["response_ids"] if reads_responses else []))
    largest = {column: largest_id(rows, column) for column in rows.column_names if column in read}
    column = max(largest, key=lambda column: largest[column])
    wrong = f"{column} holds the id {largest[column]}, {known.told}"
    report.check(largest[column] < known.size, name, str(folder), wrong, RESIZE)
