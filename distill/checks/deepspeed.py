"""Whether DeepSpeed would take its JSON: asked of its own settings models, before any rank starts."""

import difflib
import os
import re
import shutil
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import BaseModel, ValidationError

from distill.checks.report import Report
from distill.config import Config
from distill.deepspeed_settings import read_deepspeed_json, without_auto
from distill.errors import BadInput

_SECTIONS: dict[str, type[BaseModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "bf16": DeepSpeedBF16Config,
    "fp16": DeepSpeedFP16Config,
}
# DeepSpeed reads what it knows and says nothing of the rest: of a name close to one of these it is told here.
_READ = (*_SECTIONS, "gradient_clipping", "activation_checkpointing", "communication_data_type")
_CLOSE = 0.8


def check_deepspeed(config: Config, report: Report) -> None:
    """The DeepSpeed JSON."""
    try:
        settings = read_deepspeed_json(config.parallel.deepspeed)
    except BadInput as error:
        report.problems += error.problems
        return
    _check_tensor_parallel(settings.get("tensor_parallel"), config, report)
    given = without_auto(settings)
    for name, model in _SECTIONS.items():
        _check_section(name, given.get(name, {}), model, config, report)
    for name in given:
        near = [] if name in _READ else difflib.get_close_matches(name, _READ, n=1, cutoff=_CLOSE)
        wrong = f"in {config.parallel.deepspeed}; DeepSpeed does not read it"
        report.check(not near, name, given[name], wrong, f"did you mean {near[0] if near else None!r}?")
    both = [isinstance(given.get(name), dict) and given[name].get("enabled") is True for name in ("bf16", "fp16")]
    wrong = f"in {config.parallel.deepspeed}, where bf16 is enabled too"
    report.check(not all(both), "fp16.enabled", True, wrong, "leave both to the recipe's `precision`")


def _check_section(name: str, given: Any, model: type[BaseModel], config: Config, report: Report) -> None:
    where = f"in {config.parallel.deepspeed}"
    if not isinstance(given, dict):
        report.check(False, name, given, where, 'give an object such as {"stage": 3}, or nothing')
        return
    stage = given.get("stage", 0)
    if name == "zero_optimization" and not (type(stage) is int and 0 <= stage <= 3):
        report.check(False, f"{name}.stage", stage, where, "give 0, 1, 2 or 3")
        return
    try:
        model.model_validate(given)
    except ValidationError as error:
        for item in error.errors():
            key, wrong = ".".join(map(str, (name, *item["loc"]))), item["msg"].removeprefix("Value error, ")
            report.check(False, key, item["input"], f"{where}: {wrong[:1].lower()}{wrong[1:]}", "correct or remove it")
    except (ValueError, TypeError, AssertionError) as error:
        report.check(False, name, given, f"{where}: {error}", "correct or remove it")
    if name == "zero_optimization":
        _check_savable(given, where, report)
        _check_compilers(given, where, report)
    if name == "zero_optimization" and stage in (0, 1):
        wrong = f"works with stages 2 and 3 only, the stage is {stage}"
        report.check(not given.get("overlap_comm"), f"{name}.overlap_comm", True, wrong, "set it to false")


# The form of an architecture that DeepSpeed can read; torch reads 9.0a, too.
_ARCHITECTURE = re.compile(r"\d+\.\d+(\+PTX)?")


def _check_compilers(given: dict[str, Any], where: str, report: Report) -> None:
    """An optimizer in host memory needs DeepSpeed's own Adam, which is compiled when the run starts."""
    asked = given.get("offload_optimizer")
    on_host = isinstance(asked, dict) and asked.get("device", "none") != "none"
    if not on_host or get_accelerator().device_name() != "cuda":
        return
    compiler, home = os.environ.get("CXX", "g++"), os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc") or (home and shutil.which("nvcc", path=str(Path(home) / "bin")))
    instead = "or give a DeepSpeed JSON without offload_optimizer, which needs no compiler"
    wrong = f"{where}; its Adam is compiled when the run starts, and there is no"
    name = "zero_optimization.offload_optimizer"
    report.check(shutil.which(compiler) is not None, name, asked, f"{wrong} {compiler}", f"install it, {instead}")
    report.check(bool(nvcc), name, asked, f"{wrong} nvcc", f"install the CUDA toolkit or set CUDA_HOME, {instead}")
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    odd = [item for item in re.split(r"[;\s]+", listed.strip()) if item and not _ARCHITECTURE.fullmatch(item)]
    plain = re.sub(r"(\d+\.\d+)[a-z]", r"\1", listed)
    wrong = f"DeepSpeed cannot read {', '.join(odd)}, and compiles its Adam for offload_optimizer"
    report.check(not odd, "TORCH_CUDA_ARCH_LIST", listed, wrong, f"give TORCH_CUDA_ARCH_LIST={plain!r}")


def _check_savable(given: dict[str, Any], where: str, report: Report) -> None:
    """What keeps state where a checkpoint does not find it, and the norm by which bad numbers are seen."""
    for place in ("offload_optimizer", "offload_param"):
        asked = given.get(place)
        its = asked if isinstance(asked, dict) else {}
        device, ratio = its.get("device"), its.get("ratio", 1)
        wrong = f"{where}; a run could not be resumed"
        report.check(device != "nvme", f"zero_optimization.{place}.device", device, wrong, "give cpu")
        report.check(ratio == 1, f"zero_optimization.{place}.ratio", ratio, wrong, "leave it out")
        for key in ("super_offload", "zenflow"):
            report.check(not its.get(key), f"zero_optimization.{place}.{key}", its.get(key), wrong, "leave it out")
    wrong = f"{where}; a run could not be resumed"
    report.check(not given.get("zenflow"), "zero_optimization.zenflow", given.get("zenflow"), wrong, "leave it out")
    norm = given.get("compute_grad_norm", True)
    wrong = f"{where}; steps that are not finite are seen by it"
    report.check(norm is not False, "zero_optimization.compute_grad_norm", norm, wrong, "leave it out")


def _check_tensor_parallel(asked: object, config: Config, report: Report) -> None:
    """The recipe says how far to split; a JSON made for tensor parallelism may only leave it to the recipe."""
    if asked is None:
        return
    path, tp = config.parallel.deepspeed, config.parallel
    auto = {"autotp_size": "auto"}
    report.check(
        asked == auto, "tensor_parallel", asked, f"in {path}; the recipe's parallel.student_tp decides", f"give {auto}"
    )
    report.check(
        config.tensor_parallel > 1,
        "parallel.student_tp",
        tp.student_tp,
        f"{path} is for tensor parallelism",
        "raise parallel.student_tp or parallel.teacher_tp above 1, or give another parallel.deepspeed",
    )
