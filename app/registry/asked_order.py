"""Which of several changes of one name holds: the one that was asked last, whatever is done first.

It knows no registrations; `registry` asks it, under its own lock.
"""

import itertools


class AskedOrder:
    """Numbers changes as they are asked; every `ask` must be followed by `ended`."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        # By name: what was asked and has not ended, and the latest of what took effect. Of names
        # that nothing is asked for, nothing is kept.
        self._going: dict[str, set[int]] = {}
        self._latest: dict[str, int] = {}

    def ask(self, name: str) -> int:
        number = next(self._numbers)
        self._going.setdefault(name, set()).add(number)
        return number

    def ended(self, name: str, number: int) -> None:
        """A change took effect, failed, or came too late."""
        going = self._going[name]
        going.discard(number)
        if not going:
            del self._going[name]
            self._latest.pop(name, None)

    def is_too_late(self, name: str, number: int) -> bool:
        """Whether a change that was asked later has taken effect."""
        return self._latest.get(name, 0) > number

    def has_older(self, name: str, number: int) -> bool:
        """Whether a change that was asked before is still going on."""
        return any(other < number for other in self._going.get(name, ()))

    def took_effect(self, name: str, number: int) -> None:
        self._latest[name] = number
