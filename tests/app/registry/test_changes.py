"""Changes instead of everything: what a history knows, and copies that answers reach anyhow."""

from hypothesis import given
from hypothesis import strategies as st

from app.registry.changes import ChangeHistory, Position
from app.registry.inspector import Inspection
from app.registry.registrations import Registrations, Taken
from app.registry.table import RegistrationTable
from tests.app.fakes import make_record
from tests.factories import uniform_geometry

GEOMETRY = uniform_geometry(1, 64, {"q_proj": (64, 64)})
NOTHING = Taken(frozenset(), ())


def register(table, name, adapter_id=None):
    return table.register(Inspection(make_record(name, adapter_id=adapter_id or name), None, 0.0))


def test_a_history_tells_names_once_and_the_latest_first() -> None:
    history = ChangeHistory()
    start = history.position
    for name in ("a", "b", "a"):
        history.note(name)
    assert history.since(start) == ["a", "b"]
    assert history.since(Position(start.epoch, 2)) == ["a"]
    assert history.since(history.position) == []
    # Of the pool, for instance.
    here = history.position
    history.note()
    assert history.position != here and history.since(here) == []


def test_a_history_is_bounded_and_knows_how_far_it_reaches() -> None:
    history = ChangeHistory(max_names=3)
    start = history.position
    for name in "abcabcabc":
        history.note(name)
    assert history.since(start) == ["c", "b", "a"], "the same names take no more room"
    history.note("d")
    # The last change of `a`, which is forgotten, was number 7.
    assert history.since(Position(start.epoch, 7)) == ["d", "c", "b"]
    assert history.since(Position(start.epoch, 6)) is None


def test_a_position_that_is_not_of_this_history_is_not_known() -> None:
    history, other = ChangeHistory(), ChangeHistory()
    history.note("a")
    assert history.since(None) is None
    assert history.since(other.position) is None
    assert history.since(Position(history.position.epoch, 2)) is None


def test_a_copy_of_adapters_that_several_names_mean() -> None:
    table, copy = RegistrationTable(GEOMETRY, None), Registrations()

    def take():
        return copy.take(table.changes_since(copy.position))

    first = register(table, "a", "X")
    assert take() == Taken(frozenset(), (first,)) and copy.has_id("X")
    second = register(table, "b", "X")
    # The same adapter by another record: its path may be another one.
    assert take() == Taken(frozenset(), (second,))
    table.unload("b")
    assert take() == Taken(frozenset(), (first,))
    third = register(table, "a", "Y")
    assert take() == Taken(frozenset({"X"}), (third,))
    assert copy.adapters() == {"Y": third} and not copy.has_id("X")
    assert take() == NOTHING


def test_a_change_costs_a_follower_that_change() -> None:
    table, copy = RegistrationTable(GEOMETRY, None), Registrations()
    for number in range(5000):
        register(table, f"a{number}")
    whole = table.changes_since(None)
    assert whole.is_whole and len(whole.records) == 5000
    copy.take(whole)
    record = register(table, "new")
    table.unload("a7")
    changes = table.changes_since(copy.position)
    assert (changes.records, changes.removed) == ({"new": record}, {"a7"})
    assert copy.take(changes) == Taken(frozenset({"a7"}), (record,))
    assert copy.records == table.records()


def test_what_does_not_follow_on_a_copy_changes_nothing() -> None:
    table, other = RegistrationTable(GEOMETRY, None), RegistrationTable(GEOMETRY, None)
    here = table.position
    register(table, "a")
    copy = Registrations()
    assert copy.take(table.changes_since(here)) is None, "it knows nothing yet"
    copy.take(other.changes_since(None))
    assert copy.take(table.changes_since(here)) is None, "of another registry"
    assert copy.records == {} and copy.position == other.position
    copy.take(table.changes_since(None))
    ahead = table.position
    register(table, "b")
    register(table, "c")
    later = table.changes_since(Position(ahead.epoch, ahead.revision + 1))
    assert copy.take(later) is None, "a change between is missing"
    assert set(copy.records) == {"a"}


NAMES = st.sampled_from("abcd")
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("register"), NAMES, st.sampled_from("XYZ")),
        st.tuples(st.just("unload"), NAMES),
        st.tuples(st.just("pool"), st.integers(1, 3)),
        st.tuples(st.just("restart")),
        st.tuples(st.just("ask"), st.integers(0, 2)),
        # Which of the answers on their way arrives.
        st.tuples(st.just("arrive"), st.integers(0, 2), st.integers(0, 5)),
    ),
    max_size=60,
)


@given(OPERATIONS, st.integers(1, 5))
def test_followers_know_what_there_is(operations, max_names) -> None:
    """Whatever overtakes whatever: once the last answer has come, a copy is as the whole is."""
    store: dict[str, bytes] = {}

    class Store:
        read, write = staticmethod(lambda: dict(store)), staticmethod(store.update)

    def open_table():
        table = RegistrationTable(GEOMETRY, Store())
        table._history = ChangeHistory(max_names)
        return table

    table = open_table()
    copies = [Registrations() for _ in range(3)]
    known = [{} for _ in copies]
    answers = [[] for _ in copies]

    def arrive(follower, answer):
        before = copies[follower].position
        taken = copies[follower].take(answer)
        if taken is None:
            return
        now = copies[follower].position
        assert before is None or before.epoch != now.epoch or before <= now, "back in time"
        for adapter_id in taken.gone:
            del known[follower][adapter_id]
        known[follower].update({record.adapter_id: record for record in taken.news})
        # What is told adds up to the copy, each time.
        assert known[follower] == copies[follower].adapters()

    for operation, *values in operations:
        if operation == "register":
            register(table, *values)
        elif operation == "unload":
            table.unload(*values)
        elif operation == "pool":
            table.set_num_pool_pages(*values)
        elif operation == "restart":
            table.write()
            table = open_table()
        elif operation == "ask":
            [follower] = values
            answers[follower].append(table.changes_since(copies[follower].position))
        elif answers[values[0]]:
            follower, number = values
            arrive(follower, answers[follower].pop(number % len(answers[follower])))
    for follower, copy in enumerate(copies):
        # As a follower does, until an answer follows on.
        for _ in range(3):
            arrive(follower, table.changes_since(copy.position))
        whole = table.changes_since(None)
        assert copy.records == whole.records == table.records()
        assert (copy.position, copy.num_pool_pages) == (whole.position, whole.num_pool_pages)
        assert set(known[follower]) == {record.adapter_id for record in whole.records.values()}
