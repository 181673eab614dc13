"""Which processes are alive, by pidfd, so that what they hold ends with them, not by a timer.

`HostStore` watches those that hold leases, `NodeStore` those that use the store. A pidfd stands for
one process for good, so a pid that the system gives to another one later is not mistaken for it.
"""

import os
import select


class ProcessWatch:
    """The processes watched, and one descriptor that becomes readable when any of them ends."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._pidfds: dict[int, int] = {}

    def fileno(self) -> int:
        """Poll this (or hand it to `loop.add_reader`) and then ask `dead`."""
        return self._epoll.fileno()

    def add(self, pid: int) -> None:
        """Watch a process; nothing happens where it is watched already.

        Raises:
            ProcessLookupError: no process has this pid.
        """
        if pid in self._pidfds:
            return
        pidfd = os.pidfd_open(pid)
        self._pidfds[pid] = pidfd
        self._epoll.register(pidfd, select.EPOLLIN)

    def remove(self, pid: int) -> None:
        pidfd = self._pidfds.pop(pid, None)
        if pidfd is not None:
            self._epoll.unregister(pidfd)
            os.close(pidfd)

    def dead(self) -> list[int]:
        """Watched pids whose process has ended, reaped or not."""
        ready = {fd for fd, _ in self._epoll.poll(0, max(1, len(self._pidfds)))}
        return [pid for pid, pidfd in self._pidfds.items() if pidfd in ready]

    def close(self) -> None:
        for pid in list(self._pidfds):
            self.remove(pid)
        self._epoll.close()
