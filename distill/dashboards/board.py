"""What any dashboard can be told."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from distill.dashboards.glimpse import Glimpse


class Dashboard(ABC):
    """One place to watch a run. Any method may raise what its library raises: the caller goes on without it."""

    name: str

    @abstractmethod
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """A record of finite figures after optimizer step `step`."""

    @abstractmethod
    def show(self, step: int, glimpse: Glimpse) -> None:
        """Text and distributions of a round sampled for `step`."""

    def summarise(self, facts: Mapping[str, float | str]) -> None:  # noqa: B027 - not every dashboard can
        """What is to be known of the run as a whole, so far."""

    def alert(self, title: str, text: str) -> None:  # noqa: B027 - not every dashboard can
        """Something that people should look at now."""

    def flush(self) -> None:  # noqa: B027 - not every dashboard can
        """Bring what was logged onto the disk."""

    @abstractmethod
    def close(self) -> None:
        """The run is over, or leaves."""
