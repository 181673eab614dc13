"""What an engine replica takes up while it runs; no engine is started."""

from app.args import SLoRAArgs
from app.replica.server import EngineServer


def test_intervals_between_deltas_change_in_place():
    server = EngineServer.__new__(EngineServer)
    server._args = SLoRAArgs()
    assert (server._interval(1), server._interval(100)) == (0.03, 0.05)
    server.reconfigure({"flush_interval_s": 0.5, "max_pieces_per_s": 10.0})
    assert (server._interval(1), server._interval(100)) == (0.5, 10.0)
