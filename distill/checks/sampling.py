"""Whether the engine that is to sample can do it."""

from importlib.util import find_spec

from deepspeed.accelerator import get_accelerator

from distill.checks.report import Report
from distill.config import Config, ModelSettings
from distill.errors import BadInput
from distill.models.loading import load_config
from distill.rollout.vllm_engine import INSTALL

# What the configs of mixtures call their number of experts.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def check_sampling_engine(config: Config, report: Report) -> None:
    """What `rollout.engine: vllm` needs of the run and of the machine."""
    rollout, objective = config.rollout, config.objective
    if not objective.samples:
        return  # its settings are reported as unread
    if rollout.engine == "builtin":
        default = type(rollout).model_fields["vllm_memory"].default
        unread = rollout.vllm_memory != default
        report.check(not unread, "rollout.vllm_memory", rollout.vllm_memory, "only engine vllm reads it", "remove it")
        return

    def needs(holds: bool, wrong: str, mend: str) -> None:
        report.check(holds, "rollout.engine", "vllm", wrong, mend)

    needs(
        rollout.alpha == 0,
        f"it samples the student alone, rollout.alpha = {rollout.alpha} mixes the teacher in",
        "give rollout.engine=builtin, or rollout.alpha=0",
    )
    needs(find_spec("vllm") is not None, "vllm is not installed", INSTALL)
    device = get_accelerator().device_name()
    needs(device == "cuda", f"it serves CUDA devices, this machine computes on {device}", "give rollout.engine=builtin")
    needs(
        rollout.gather != "layer",
        "it takes the student's whole weights, rollout.gather = layer keeps them apart",
        "give rollout.gather=auto, or rollout.engine=builtin",
    )
    needs(
        config.tensor_parallel == 1,
        f"each rank samples with a whole student, of rows of its own; TP {config.tensor_parallel} shares them",
        "give parallel.student_tp=1 and parallel.teacher_tp=1, or rollout.engine=builtin",
    )
    experts = _experts(config.student)
    needs(
        experts <= 1,
        f"it takes over the weights of dense models, the student has {experts} experts",
        "give rollout.engine=builtin",
    )


def _experts(student: ModelSettings) -> int:
    try:
        model = load_config(student, "student.path").get_text_config()
    except BadInput:
        return 0  # reported with the models
    return max(getattr(model, name, None) or 0 for name in _EXPERTS)
