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


FAULTS_IN_A_ROW = 3
"""So many machines that fail one after the other, without a unit finished in between, are everybody's fault."""


@dataclass
class LeftOut:
    """Machines that a launch does without.

    It goes on without a machine as long as others do their work. It ends where `FAULTS_IN_A_ROW` machines fail and no
    unit was finished in between, where no machine would be left for some group, or where most were left out.

    Attributes:
        nodes: ids of those left out.
        faults: since the last finished unit, each of another machine.
        stops: of Ray itself since the last finished unit.
    """

    nodes: set[str] = field(default_factory=set)
    faults: list[WorkerFault] = field(default_factory=list)
    stops: int = 0

    def usable(self, nodes: Sequence[Node]) -> list[Node]:
        return [node for node in nodes if node.id not in self.nodes]

    def progress(self) -> None:
        """A unit was finished."""
        self.faults, self.stops = [], 0

    def leave_out(self, fault: WorkerFault, nodes: Sequence[Node], groups: Sequence[Group], error: Exception) -> None:
        """Go on without the machine of a fault.

        Args:
            nodes: all machines that there are.
            groups: of workers, each of which needs a place.
            error: to raise where the fault is unexpected, since it has the traceback.

        Raises:
            UserError: it is not one machine's fault, or too many have failed.
            Exception: `error`, for the same reasons.
        """
        places = {node.id for node in nodes if any(group.fits(node) for group in groups)}
        others = [node for node in self.usable(nodes) if node.id != fault.node]
        out = self.nodes | {fault.node}
        in_a_row = len(self.faults) + 1 >= FAULTS_IN_A_ROW
        if in_a_row or lacking(groups, others) or 2 * len(out) > len(out | places):
            if not fault.expected:
                raise error
            before = "".join(f", after {earlier.where}" for earlier in reversed(self.faults))
            where = f" (on {fault.where}{before})" if len(nodes) > 1 else ""
            raise UserError(f"{fault.message}{where}", fault.hint)
        self.nodes.add(fault.node)
        self.faults.append(fault)
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
        self.stops += 1
        first = str(error).strip().splitlines() or [""]
        said = f"{type(error).__name__}: {first[0][:300]}"
        if self.stops > 1:
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
