"""How many of the requests that were left before their end had ended by their text.

The ingress says so of each, by its id, shortly before or after the request is left. Counts only.
"""

from collections import OrderedDict
from collections.abc import Iterable

# Ids that are remembered, of either kind: of more than a second of requests.
MAX_REMEMBERED = 4096


class LeftRequests:
    """Matches what was left with what the ingress says."""

    def __init__(self, max_remembered: int = MAX_REMEMBERED) -> None:
        self._max_remembered = max_remembered
        self._left: OrderedDict[str, None] = OrderedDict()
        self._told: OrderedDict[str, None] = OrderedDict()
        self.num_ended_by_text = 0

    def left(self, request_id: str) -> None:
        """The engine ended the request because it was left."""
        self._match(request_id, self._told, self._left)

    def ended_by_text(self, request_ids: Iterable[str]) -> None:
        """An ingress found the end of these texts; some are other replicas'."""
        for request_id in request_ids:
            self._match(request_id, self._left, self._told)

    def _match(
        self, request_id: str, others: OrderedDict[str, None], own: OrderedDict[str, None]
    ) -> None:
        if request_id in others:
            del others[request_id]
            self.num_ended_by_text += 1
            return
        own[request_id] = None
        if len(own) > self._max_remembered:
            own.popitem(last=False)
