"""What fails on one machine: it is named, left out, and its units go elsewhere, within a budget. No Ray here."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ttmray.console import console
from ttmray.corpus.placement import Group, Node, lacking
from ttmray.errors import UserError


class WorkerFault(Exception):
    """A worker cannot be built, or failed at something that is no clip's fault.

    Args:
        node: id of its machine.
        where: the machine, for people.
        message: what is wrong.
        hint: the way out; may be empty.
        expected: it was a `UserError`, which needs no traceback.
    """

    def __init__(self, node: str, where: str, message: str, hint: str, expected: bool) -> None:
        super().__init__(message)
        self.node, self.where, self.message, self.hint, self.expected = node, where, message, hint, expected

    def __str__(self) -> str:
        return f"on {self.where}: {self.message}"

    def __reduce__(self) -> tuple[Any, ...]:
        # not from `args`, to which Ray Data adds its hints on the way
        return type(self), (self.node, self.where, self.message, self.hint, self.expected)


@dataclass
class LeftOut:
    """Machines that a launch does without.

    It goes on without a machine as long as others do their work. It ends where two machines in a row say the same and
    no unit was finished in between, where no machine would be left for some group, or where most were left out.

    Attributes:
        nodes: ids of those left out.
        last: the fault since which no unit was finished.
        failures: of Ray itself in a row, without a unit finished in between.
    """

    nodes: set[str] = field(default_factory=set)
    last: WorkerFault | None = None
    failures: int = 0

    def usable(self, nodes: Sequence[Node]) -> list[Node]:
        return [node for node in nodes if node.id not in self.nodes]

    def progress(self) -> None:
        """A unit was finished."""
        self.last, self.failures = None, 0

    def leave_out(self, fault: WorkerFault, nodes: Sequence[Node], groups: Sequence[Group], error: Exception) -> None:
        """Go on without the machine of a fault.

        Args:
            nodes: all machines that there are.
            groups: of workers, each of which needs a place.
            error: to raise where the fault is unexpected, since it has the traceback.

        Raises:
            UserError: it is not one machine's fault, or too many have failed.
        """
        others = [node for node in self.usable(nodes) if node.id != fault.node]
        same = self.last is not None and self.last.message == fault.message and self.last.node != fault.node
        alone = bool(lacking(groups, others))
        if same or alone or 2 * len(self.nodes | {fault.node}) > len(self.nodes | {node.id for node in nodes}):
            if not fault.expected:
                raise error
            also = f", as before on {self.last.where}" if same and self.last is not None else ""
            several = len(nodes) > 1
            raise UserError(f"{fault.message} (on {fault.where}{also})" if several else fault.message, fault.hint)
        self.nodes.add(fault.node)
        self.last = fault
        console.print(
            f"{fault.where} is left out from here on, and its units go elsewhere: {fault.message}",
            style="yellow",
            markup=False,
        )

    def start_again(self, error: Exception) -> None:
        """Ray gave up, as where it cannot make again what was lost with a machine: go on with what there is.

        Raises:
            UserError: for the second time in a row without a finished unit.
        """
        self.failures += 1
        first = str(error).strip().splitlines() or [""]
        said = f"{type(error).__name__}: {first[0][:300]}"
        if self.failures > 1:
            raise UserError(
                f"Ray stopped twice in a row, and no unit was finished in between. {said}",
                "What was committed stays. See the logs of Ray on the machines, mend the cause and start the same "
                "command again.",
            ) from error
        console.print(
            f"Ray stopped; the stages are started again on what the cluster has now. {said}",
            style="yellow",
            markup=False,
        )
