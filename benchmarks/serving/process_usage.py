"""What the processes of a server hold and take: memory, file descriptors, CPU time, by process.

Reads /proc of this process's descendants, which a server that was started here is. It knows
nothing of Ray but how its workers call themselves.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

_KIB = 1 << 10
_MIB = 1 << 20


@dataclass(frozen=True)
class Usage:
    """Of one process at one moment."""

    role: str
    # Resident memory but for what it shares: the heap, stacks, mapped files.
    own_bytes: int
    # Resident pages of shared memory: the store's slab, Ray's objects. Each process that looks at
    # one counts it, and whoever made it says how large it is.
    shared_bytes: int
    num_fds: int
    # CPU time since its start, of all threads, seconds.
    cpu_s: float


def usage_of_descendants(root_pid: int) -> dict[int, Usage]:
    """Usage of every process under `root_pid`, itself left out, by process id."""
    found = {}
    for pid in _descendants(root_pid):
        try:
            kib = _resident_kib(Path(f"/proc/{pid}/status").read_text())
            num_fds = len(os.listdir(f"/proc/{pid}/fd"))
            role = role_of(Path(f"/proc/{pid}/cmdline").read_bytes())
            # User and system time are the 14th and 15th field, the name the second.
            fields = _fields_after_name(Path(f"/proc/{pid}/stat"))
        except OSError:
            # It has ended meanwhile.
            continue
        own_kib = kib.get("RssAnon", 0) + kib.get("RssFile", 0)
        shared_kib = kib.get("RssShmem", 0)
        cpu_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        found[pid] = Usage(role, own_kib * _KIB, shared_kib * _KIB, num_fds, cpu_s)
    return found


def machine_cpu_s() -> float:
    """CPU time of the machine since its start: all processes, and what its host kept from it."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _, _, interrupt, soft_interrupt, stolen = map(int, fields[:8])
    busy = user + nice + system + interrupt + soft_interrupt + stolen
    return busy / os.sysconf("SC_CLK_TCK")


def is_running(pid: int) -> bool:
    """Whether a process has not ended; one that waits to be asked for its status has."""
    try:
        return _fields_after_name(Path(f"/proc/{pid}/stat"))[0] != "Z"
    except OSError:
        return False


def cpu_shares(
    first: dict[int, Usage], last: dict[int, Usage], seconds: float
) -> list[tuple[str, float]]:
    """Cores that each process took between two samples, by its role, the busiest first."""
    shares = [
        (usage.role, (usage.cpu_s - (first[pid].cpu_s if pid in first else 0.0)) / seconds)
        for pid, usage in last.items()
    ]
    return sorted(shares, key=lambda share: -share[1])


def _resident_kib(status: str) -> dict[str, int]:
    """The fields of resident memory of /proc/PID/status; none of a process that has ended."""
    fields = (line.split() for line in status.splitlines() if line.startswith("Rss"))
    return {name.rstrip(":"): int(kib) for name, kib, _ in fields}


def role_of(cmdline: bytes) -> str:
    """A short name of what a process is: its module, script or program, or Ray's own title."""
    arguments = [argument.decode(errors="replace") for argument in cmdline.split(b"\0") if argument]
    if not arguments:
        return "?"
    # Ray's workers write their title over it.
    if arguments[0].startswith("ray::"):
        return arguments[0].removeprefix("ray::").split("(")[0].strip()
    if "-m" in arguments[:-1]:
        return arguments[arguments.index("-m") + 1]
    scripts = [argument for argument in arguments if argument.endswith(".py")]
    return Path((scripts or arguments)[0]).name


def _descendants(root_pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The parent is the second of them.
            fields = _fields_after_name(stat)
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found: list[int] = []
    waiting = [root_pid]
    while waiting:
        offspring = children.get(waiting.pop(), [])
        found += offspring
        waiting += offspring
    return found


def _fields_after_name(stat: Path) -> list[str]:
    """Of a process's line in /proc; its name, in parentheses, may hold anything."""
    return stat.read_text(errors="replace").rpartition(")")[2].split()


@dataclass(frozen=True)
class Growth:
    """One process, or one count, at the beginning of a time and at its end."""

    name: str
    first: float
    last: float

    @property
    def share(self) -> float:
        """What came to it, as a share of the first; negative where it shrank."""
        if not self.first:
            return float(self.last > 0)
        return self.last / self.first - 1.0


def growth_of_processes(
    first: Iterable[dict[int, Usage]], last: Iterable[dict[int, Usage]]
) -> tuple[list[Growth], list[Growth]]:
    """Memory in MiB and descriptors of every process that lives in all samples, by medians."""
    first, last = list(first), list(last)
    lasting = set.intersection(*(set(sample) for sample in [*first, *last]))
    memory, descriptors = [], []
    for pid in sorted(lasting):
        name = f"{first[0][pid].role} {pid}"
        rss = [
            median(sample[pid].own_bytes / _MIB for sample in samples) for samples in (first, last)
        ]
        fds = [median(sample[pid].num_fds for sample in samples) for samples in (first, last)]
        memory.append(Growth(name, round(rss[0], 2), round(rss[1], 2)))
        descriptors.append(Growth(name, *fds))
    return memory, descriptors
