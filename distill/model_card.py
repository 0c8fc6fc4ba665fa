"""The README.md of an exported student: what it is, what made it, how it did."""

from collections.abc import Mapping

import yaml

from distill import __version__
from distill.config import Config


def model_card(config: Config, step: int, figures: Mapping[str, float]) -> str:
    """Markdown with the front matter that model hubs read.

    Args:
        config: the run's resolved settings.
        step: optimizer steps behind these weights.
        figures: validation figures at that step.
    """
    teacher = config.teacher.path if config.teacher else "none"
    front = yaml.safe_dump(
        {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["distillation"]}
    )
    measured = "\n".join(f"| {name} | {value:.4g} |" for name, value in figures.items())
    sections = [
        f"---\n{front}---\n# Distilled student",
        f"Made by distill {__version__} from `{config.student.path}`.",
        "| | |\n|---|---|\n"
        f"| teacher | `{teacher}` |\n"
        f"| data | `{config.data.train}` |\n"
        f"| objective | {config.objective.name} |\n"
        f"| optimizer steps | {step} |\n"
        f"| seed | {config.run.seed} |",
    ]
    if measured:
        sections.append(f"## Validation\n\n| figure | value |\n|---|---|\n{measured}")
    settings = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    sections.append(f"## Settings\n\n```yaml\n{settings}```")
    return "\n\n".join(sections) + "\n"
