"""Routers and replicas in virtual time: all of `app.routing` and the replicas' meters, no Ray.

Each router has a board and a view of its own, which hears of the replicas late: of their stats as
Serve's poll would tell it, of their load with the first and the last delta of its own requests.
"""

import bisect
import heapq
import itertools
import random
from collections import Counter, deque
from contextlib import ExitStack
from dataclasses import dataclass, field

from app.replica.load_meter import LoadMeter
from app.routing.load_board import LoadBoard
from app.routing.order import LoadBound
from app.routing.spread import AdapterSpread
from app.routing.view import HEALTHY_KEY, QUEUE_LEN_KEY, RANK_KEY, RouterView, SeenReplica
from slora_core.requests import Delta, FinishReason, Request
from tests.app.fakes import make_record

PAGE_TOKENS = 16
PROMPT_TOKENS = 200
SPILL_QUEUE_LEN = 8
SPILL_FACTOR = 1.25
# Seconds for a message from a router to a replica or back, between two polls, and up to which a
# router hears late of one.
HOP_S = 0.002
POLL_S = 0.5
POLL_DELAY_S = 0.2


@dataclass(eq=False)
class SimRequest:
    router: "SimRouter"
    # Its name; empty for the base model.
    adapter: str
    conversation: str
    # Seconds that it runs, once it runs.
    duration_s: float
    arrived_at: float
    # Whatever the test wants to know it by.
    label: object = None
    replica: "SimReplica | None" = None
    first_token_at: float | None = None
    told: object = None
    stack: ExitStack = field(default_factory=ExitStack)

    @property
    def adapter_id(self):
        return make_record(self.adapter).adapter_id if self.adapter else ""


class SimReplica:
    """Runs so many requests at once; more wait their turn."""

    def __init__(self, world, rank, num_slots, max_ongoing_requests):
        self.replica_id = f"replica-{next(world.ids)}"
        self.rank = str(rank)
        self.num_slots = num_slots
        self.max_ongoing_requests = max_ongoing_requests
        self.meter = LoadMeter(self.replica_id, PAGE_TOKENS, world.clock)
        self.is_alive = True
        self.running = set()
        self.waiting = deque()

    @property
    def num_requests(self):
        return len(self.running) + len(self.waiting)

    def stats(self):
        num_requests = self.meter.coarse_num_requests
        return {RANK_KEY: self.rank, HEALTHY_KEY: self.is_alive, QUEUE_LEN_KEY: num_requests}


class SimRouter:
    def __init__(self, world):
        self.board = LoadBoard(world.clock)
        self.spread = AdapterSpread(SPILL_QUEUE_LEN, world.clock)
        self.view = RouterView(self.board, LoadBound(SPILL_QUEUE_LEN, SPILL_FACTOR), self.spread)
        self.seen = []
        self.line = []
        # Requests by adapter and replica, as it sent them.
        self.num_sent = Counter()

    def see(self, seen):
        self.seen = seen


class World:
    """Args: replicas, routers, and of each replica what it runs at once and takes at all."""

    def __init__(self, num_replicas, num_routers, num_slots=64, max_ongoing_requests=256, seed=0):
        self.now = 0.0
        self.random = random.Random(seed)
        self.ids = itertools.count()
        self.replicas = {}
        self.routers = []
        self.done = []
        self._events = []
        self._limits = (num_slots, max_ongoing_requests)
        for rank in range(num_replicas):
            self.add_replica(rank)
        self.routers = [SimRouter(self) for _ in range(num_routers)]
        self._poll()
        # Until all know of the replicas.
        self.run(POLL_S)

    def clock(self):
        return self.now

    def add_replica(self, rank):
        replica = SimReplica(self, rank, *self._limits)
        self.replicas[replica.replica_id] = replica
        return replica

    def kill(self, replica):
        """Its engine dies: what it had is sent again; Serve and the routers hear of it later."""
        replica.is_alive = False
        lost = [*replica.running, *replica.waiting]
        replica.running.clear()
        replica.waiting.clear()
        for request in lost:
            request.stack.close()
            self._count_end(request, replica.replica_id)
            request.router.board.died(replica.replica_id)
            self.at(HOP_S, self._route, request, replica.replica_id)

    def remove(self, replica):
        del self.replicas[replica.replica_id]

    def at(self, delay_s, action, *args):
        heapq.heappush(self._events, (self.now + delay_s, next(self.ids), action, args))

    def send(self, adapter, conversation, duration_s, label=None):
        router = self.random.choice(self.routers)
        self._route(SimRequest(router, adapter, conversation, duration_s, self.now, label))

    def widths(self, adapter="hot"):
        """Over how many replicas each router spreads an adapter, were it asked now."""
        return [
            router.spread._held.get(make_record(adapter).adapter_id, (1, 0))[0]
            for router in self.routers
        ]

    def run(self, seconds):
        end = self.now + seconds
        while self._events and self._events[0][0] <= end:
            self.now, _, action, args = heapq.heappop(self._events)
            action(*args)
        self.now = end

    def _poll(self):
        seen = [
            SeenReplica(replica.replica_id, replica.stats(), replica.max_ongoing_requests)
            for replica in self.replicas.values()
        ]
        for router in self.routers:
            self.at(self.random.random() * POLL_DELAY_S, router.see, seen)
        self.at(POLL_S, self._poll)

    def _route(self, request, avoid=None):
        router = request.router
        order = router.view.order(router.seen, request.adapter_id, request.conversation, avoid)
        if not order:
            bisect.insort(router.line, (request, avoid), key=lambda waiter: waiter[0].arrived_at)
            self.at(POLL_S, self._next_in_line, router)
            return
        replica_id = router.seen[order[0]].replica_id
        router.board.sent(replica_id)
        router.num_sent[request.adapter, replica_id] += 1
        self.at(HOP_S, self._arrive, request, replica_id)

    def _next_in_line(self, router):
        if router.line:
            self._route(*router.line.pop(0))

    def _arrive(self, request, replica_id):
        replica = self.replicas.get(replica_id)
        board = request.router.board
        if replica is None or not replica.is_alive:
            board.ended(replica_id)
            board.died(replica_id)
            self._route(request, replica_id)
            return
        if replica.num_requests >= replica.max_ongoing_requests:
            board.ended(replica_id)
            board.counted(replica_id, replica.num_requests)
            self._route(request)
            return
        record = make_record(request.adapter) if request.adapter else None
        told = Request([0] * PROMPT_TOKENS, None, request.adapter_id or None)
        request.replica, request.stack = replica, ExitStack()
        request.told = request.stack.enter_context(replica.meter.counted(told, record))
        replica.waiting.append(request)
        board.sent_prompt(replica_id, PROMPT_TOKENS)
        request.router.spread.started(str(id(request)), request.adapter_id)
        self.at(HOP_S, board.counted, replica_id, replica.num_requests)
        self._start(replica)

    def _start(self, replica):
        while replica.waiting and len(replica.running) < replica.num_slots:
            request = replica.waiting.popleft()
            replica.running.add(request)
            first_s = min(0.05, request.duration_s / 2)
            self.at(first_s, self._token, request, replica)
            self.at(request.duration_s, self._end, request, replica)

    def _token(self, request, replica):
        if request in replica.running:
            request.first_token_at = self.now
            delta = request.told(Delta("r", [1]))
            self.at(HOP_S, request.router.board.heard, delta.load)

    def _end(self, request, replica):
        if request not in replica.running:
            return
        delta = request.told(Delta("r", [1], FinishReason.LENGTH))
        replica.running.discard(request)
        request.stack.close()
        self.done.append(request)
        self.at(HOP_S, self._ended, request, delta.load)
        self._start(replica)

    def _ended(self, request, load):
        request.router.board.heard(load)
        self._count_end(request, load.replica_id)
        self._next_in_line(request.router)

    def _count_end(self, request, replica_id):
        request.router.board.ended(replica_id)
        request.router.spread.ended(str(id(request)))
