"""What any dashboard can be told."""

from collections.abc import Mapping

from distill.dashboards.glimpse import Glimpse


class Dashboard:
    """One place to watch a run. Any method may raise what its library raises: the caller goes on without it."""

    name: str

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """A record of finite figures after optimizer step `step`."""
        raise NotImplementedError

    def show(self, step: int, glimpse: Glimpse) -> None:
        """Text and distributions of a round sampled for `step`."""
        raise NotImplementedError

    def summarise(self, facts: Mapping[str, float | str]) -> None:
        """What is to be known of the run as a whole, so far."""

    def alert(self, title: str, text: str) -> None:
        """Something that people should look at now."""

    def flush(self) -> None:
        """Bring what was logged onto the disk."""

    def close(self) -> None:
        """The run is over, or leaves."""
        raise NotImplementedError
