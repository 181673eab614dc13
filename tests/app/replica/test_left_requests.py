"""What was left and what ended by its text are matched in either order, once, and not for ever."""

from app.replica.left_requests import LeftRequests


def test_both_orders_count_once():
    left = LeftRequests()
    left.left("a")
    left.ended_by_text(["a", "b", "of another replica"])
    left.left("b")
    left.left("a client's own")
    assert left.num_ended_by_text == 2
    left.ended_by_text(["a", "b"])
    assert left.num_ended_by_text == 2


def test_the_oldest_are_forgotten():
    left = LeftRequests(max_remembered=2)
    for request_id in "abc":
        left.left(request_id)
    left.ended_by_text("abc")
    assert left.num_ended_by_text == 2
    left.ended_by_text("xyz")
    for request_id in "xyz":
        left.left(request_id)
    assert left.num_ended_by_text == 4
