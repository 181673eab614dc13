"""Which replicas a request may go to; no Serve is started."""

from types import SimpleNamespace

from app.routing.serve_router import MODEL_KEY, _of_same_model


def replica(model=None):
    return SimpleNamespace(routing_stats={} if model is None else {MODEL_KEY: model})


def pending(*args):
    return SimpleNamespace(args=args, kwargs={})


def test_requests_go_to_replicas_of_their_own_base_model():
    old, new, unasked = replica("old"), replica("new"), replica()
    request = SimpleNamespace(model_key="new")
    assert _of_same_model([old, new, unasked], pending(request)) == [new, unasked]
    # It is refused there, with a reason.
    assert _of_same_model([old], pending(request)) == [old]
    # Calls of other methods, and requests for whichever model.
    for anyones in (pending(), pending(SimpleNamespace(model_key=""))):
        assert _of_same_model([old, new], anyones) == [old, new]
