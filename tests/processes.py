"""The processes below a job, for tests that kill some of them: those of other jobs on the machine are left alone."""

from pathlib import Path


def descendants(root: int) -> dict[int, bytes]:
    """Process id -> command line of all that a process has started, and they in turn."""
    parents, commands = {}, {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            commands[int(entry.name)] = (entry / "cmdline").read_bytes()
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):  # it ended
            continue

    def below(process: int) -> bool:
        parent = parents.get(process)
        return parent is not None and (parent == root or below(parent))

    return {process: command for process, command in commands.items() if below(process)}


def workers(driver: int) -> list[int]:
    """Child processes of the local runner."""
    return [process for process, command in descendants(driver).items() if b"spawn_main" in command]


def actors(driver: int, name: str) -> list[int]:
    """Processes that run Ray's actors of a class, in a Ray that the driver has started."""
    return [process for process, command in descendants(driver).items() if command.startswith(f"ray::{name}".encode())]
