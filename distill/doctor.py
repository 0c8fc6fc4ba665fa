"""Every check that can be made before a model loads. `python -m distill doctor`, and the first act of every launch."""

from distill.checks.deepspeed import check_deepspeed
from distill.checks.inputs import check_models_and_data
from distill.checks.layout import check_batches, check_machine, check_parallel
from distill.checks.objective import check_objective, note_on_sampling
from distill.checks.outputs import check_dashboards, check_run_folder
from distill.checks.report import Report
from distill.checks.resumption import check_resumption
from distill.checks.sampling import check_sampling_engine
from distill.checks.schedule import note_on_schedule
from distill.checks.selection import check_selection
from distill.config import Config


def examine(config: Config, world_size: int | None) -> Report:
    """All checks; `world_size` None leaves out those that need the number of ranks."""
    report = Report()
    check_parallel(config, world_size, report)
    check_batches(config, world_size, report)
    check_deepspeed(config, report)
    check_machine(config, report)
    check_objective(config, report)
    note_on_sampling(config, report)
    check_sampling_engine(config, report)
    check_selection(config, report)
    note_on_schedule(config, report)
    check_models_and_data(config, report)
    check_run_folder(config, report)
    check_dashboards(config, report)
    check_resumption(config, world_size, report)
    return report
