"""Whether DeepSpeed's tensor parallelism can split the models as asked."""

import torch
from transformers import AutoModelForCausalLM
from transformers import PreTrainedConfig as ModelConfig

from distill.checks.report import Report
from distill.config import Config


def check_sharding(config: Config, name: str, model_config: ModelConfig, report: Report) -> None:
    """One model (`name` is student or teacher) against its tensor-parallel degree."""
    tp = int(getattr(config.parallel, f"{name}_tp"))
    if tp == 1:
        return
    field = f"parallel.{name}_tp"
    try:
        _check_heads(name, field, tp, model_config, report)
        refusal = _refusal(model_config, getattr(config, name).trust_remote_code)
    except ImportError as error:
        mend = f"install what requirements.txt says, and what the {name}'s own code needs, or give {field}=1"
        report.check(False, field, tp, f"cannot be checked for this {name} ({error})", mend)
        return
    wrong = f"DeepSpeed's AutoTP does not shard this {name} ({model_config.get_text_config().model_type}: {refusal})"
    report.check(refusal is None, field, tp, wrong, f"give {field}=1")


def _check_heads(name: str, field: str, tp: int, model_config: ModelConfig, report: Report) -> None:
    from deepspeed.module_inject.tp_shard import AutoTPMeta

    # As DeepSpeed counts them, by whichever names the model has for them.
    counted = AutoTPMeta.from_model_config(model_config)
    heads, key_value_heads = counted.num_attention_heads, counted.num_kv_heads
    if heads:
        report.check(
            heads % tp == 0, field, tp, f"does not divide the {name}'s {heads} attention heads", f"divide {heads}"
        )
    if key_value_heads:
        wrong = f"is more than the {name}'s {key_value_heads} key-value heads: ranks would have none"
        report.check(tp <= key_value_heads, field, tp, wrong, f"give at most {key_value_heads}")


def _refusal(model_config: ModelConfig, trust_remote_code: bool) -> str | None:
    """What DeepSpeed would say instead of sharding such a model, asked of one without weights; None if it shards it."""
    # Its own parts, which another version may have elsewhere: whoever does not shard does not need them.
    from deepspeed.module_inject.auto_tp import AutoTP
    from deepspeed.module_inject.tp_plan_converter import TPPlanConverter
    from deepspeed.runtime.tensor_parallel.config import _get_hf_tp_plan

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=trust_remote_code)
    try:
        plan = _get_hf_tp_plan(model)
        if not plan or TPPlanConverter.convert(plan) is None:
            AutoTP.tp_parser(model)
    except (ValueError, AssertionError, RuntimeError) as error:  # NotImplementedError is of the last kind
        return str(error).split(". ")[0].rstrip(".") or type(error).__name__
    return None
