"""What metrics and figures are called, in which unit they come, and in which order a reader wants them."""

from typing import NamedTuple

_NATS, _SHARE, _TOKENS, _SECONDS = "nats per token", "share", "tokens", "seconds"


class Name(NamedTuple):
    """Of a metric: what it is, in which unit."""

    title: str
    unit: str


GROUPS = {
    "valid": "Validation",
    "loss": "Loss",
    "student": "Student",
    "reward": "Reward",
    "rollout": "Rollouts",
    "policy": "Policy gradient",
    "teacher": "Teacher",
    "adaptive": "Adaptive settings",
    "optim": "Optimizer",
    "tokens": "Tokens",
    "fault": "Faults",
    "time": "Time",
    "memory": "Memory",
}
"""Namespace → heading, the most telling first; others follow by their own name."""
OPEN = ("valid", "loss", "student", "reward", "rollout")
"""Namespaces whose curves are shown at once."""

_METRICS = {
    "valid/loss": Name("Validation loss", _NATS),
    "valid/rouge_l": Name("Rouge-L", "0–100, higher is better"),
    "valid/reverse_kl": Name("KL(q‖p) on own text", _NATS),
    "valid/mean_length": Name("Response length", _TOKENS),
    "valid/repetition": Name("Repeated 4-grams", _SHARE),
    "valid/ended": Name("Ended by themselves", _SHARE),
    "loss/total": Name("Loss", _NATS),
    "loss/sft": Name("Cross-entropy", _NATS),
    "loss/ce": Name("Cross-entropy", _NATS),
    "loss/lm": Name("Loss on plain text", _NATS),
    "loss/long": Name("Policy-gradient term", "per token"),
    "loss/single": Name("Single-step term", _NATS),
    "student/reverse_kl": Name("KL(q‖p) at training tokens", _NATS),
    "student/entropy": Name("Student’s entropy", _NATS),
    "teacher/entropy": Name("Teacher’s entropy", _NATS),
    "teacher/forwards_per_token": Name("Teacher’s forwards", "per token"),
    "reward/mean": Name("Reward, scaled and clipped", "log p − log q"),
    "policy/clip_fraction": Name("Tokens whose ratio is clipped", _SHARE),
    "policy/approx_kl_to_behavior": Name("KL to sampling, estimated", _NATS),
    "rollout/response_length": Name("Response length", _TOKENS),
    "rollout/eos_rate": Name("Ended by themselves", _SHARE),
    "rollout/distinct_4": Name("Distinct 4-grams", _SHARE),
    "rollout/teacher_share": Name("Tokens drawn by the teacher", _SHARE),
    "rollout/effective_sample_size": Name("Effective sample size", _SHARE),
    "rollout/student_forwards_per_token": Name("Student’s forwards", "per token"),
    "optim/lr": Name("Learning rate", ""),
    "optim/grad_norm": Name("Gradient norm", "before clipping"),
    "optim/loss_scale": Name("Loss scale of fp16", "factor"),
    "tokens/response": Name("Response tokens of a step", _TOKENS),
    "tokens/per_second": Name("Throughput", "response tokens per second"),
    "time/step": Name("Step", _SECONDS),
    "time/minibatch": Name("Data and rollouts", _SECONDS),
    "time/forward": Name("Forward", _SECONDS),
    "time/backward": Name("Backward", _SECONDS),
    "time/plain_text": Name("Plain text", _SECONDS),
    "time/optimizer": Name("Optimizer", _SECONDS),
    "memory/peak_gib": Name("Peak of the fullest rank", "GiB"),
    "fault/skipped_steps": Name("Skipped steps so far", "steps"),
    "fault/skipped_in_a_row": Name("Skipped steps in a row", "steps"),
    "fault/overflows": Name("Overflows of fp16 so far", "steps"),
}
_UNITS = {"loss": _NATS, "time": _SECONDS, "memory": "GiB"}

FIGURES = {
    "rouge_l": "Overlap with the reference: longest common subsequence, F-measure × 100, best of the references.",
    "exact_match": "Responses that are a reference but for case, punctuation and white space, in percent.",
    "reverse_kl": "Nats per token on the model’s own responses: how much it writes that the teacher would not.",
    "forward_kl": "Nats per token on the teacher’s responses: how much of the teacher’s it does not cover.",
    "top1_agreement": "Share of the teacher’s tokens at which both models’ likeliest next token is the same.",
    "length": "Tokens of a response, EOS included.",
    "repetition": "Share of 4-grams that stood before in the same response.",
    "dist_4": "Distinct 4-grams of the whole set over all of them; falls as a set grows.",
    "accuracy": "Share of questions whose likeliest choice is right.",
    "ece": "Expected calibration error: gap between confidence and accuracy, 15 bins.",
    "perplexity": "exp of the mean −log q per token of plain text.",
}
"""What each figure of an evaluation says, in a sentence."""


def name_of(metric: str) -> Name:
    """Of any metric; an unknown one is called by its key."""
    if metric in _METRICS:
        return _METRICS[metric]
    group, _, rest = metric.partition("/")
    words = (rest or group).replace("_", " ").replace("/", " · ")
    return Name(words[:1].upper() + words[1:], _UNITS.get(group, ""))


def group_of(metric: str) -> str:
    """Its namespace."""
    return metric.partition("/")[0]


def in_order(metrics: set[str]) -> list[str]:
    """By group, then the known ones as they stand here, then the others by name."""
    groups, known = list(GROUPS), list(_METRICS)

    def place(metric: str) -> tuple[int, str, int, str]:
        group = group_of(metric)
        rank = groups.index(group) if group in GROUPS else len(groups)
        return rank, group, known.index(metric) if metric in _METRICS else len(known), metric

    return sorted(metrics, key=place)
