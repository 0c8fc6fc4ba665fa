"""A plan: memory, traffic and time of one run on one cluster."""

from dataclasses import dataclass

from distill.planning.duration import Duration, duration_of
from distill.planning.memory import Memory, memory_of
from distill.planning.setup import Setup
from distill.planning.traffic import Flow, per_step, traffic_of


@dataclass(frozen=True)
class Plan:
    """What a run will take."""

    setup: Setup
    memory: Memory
    traffic: list[Flow]
    duration: Duration

    @classmethod
    def of(cls, setup: Setup) -> "Plan":
        """Count everything."""
        flows = traffic_of(setup)
        return cls(setup, memory_of(setup), flows, duration_of(setup, flows))

    @property
    def margin(self) -> float:
        """Bytes that each device has left in the fullest phase; below 0 it does not fit."""
        return self.setup.cluster.memory - self.memory.peak

    @property
    def fits(self) -> bool:
        """Whether every device has room."""
        return self.margin >= 0

    @property
    def sent_per_step(self) -> float:
        """Bytes that a rank sends in an optimizer step, its share of a round included."""
        return per_step(self.setup, self.traffic)

    @property
    def host_per_node(self) -> float:
        """Bytes of host memory that offloading takes on each node."""
        return sum(self.memory.host.values()) * self.setup.cluster.per_node
