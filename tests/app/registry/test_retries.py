"""When unavailable adapters are looked at again, on a clock of the test's."""

from app.registry.retries import FIRST_PAUSE_S, MAX_PAUSE_S, Retries


def test_unchanged_files_are_looked_at_after_pauses_that_double_up_to_a_bound() -> None:
    now = 0.0
    retries = Retries(lambda: now)
    looks = []
    retries.failed("a", (1,))
    while now < 5000:
        now += 10
        if retries.is_due("a", (1,)):
            looks.append(now)
            retries.failed("a", (1,))
    gaps = [later - before for before, later in zip([0.0, *looks], looks, strict=False)]
    assert gaps == [10, 20, 40, 80, 160, 320, *[MAX_PAUSE_S] * 7]


def test_files_that_changed_are_looked_at_at_once_and_from_the_first_pause_on() -> None:
    now = 0.0
    retries = Retries(lambda: now)
    for _ in range(5):
        retries.failed("a", None)
    assert not retries.is_due("a", None)
    assert retries.is_due("a", (1,))
    retries.failed("a", (1,))
    assert not retries.is_due("a", (1,))
    now += FIRST_PAUSE_S
    assert retries.is_due("a", (1,))


def test_what_is_there_again_is_forgotten() -> None:
    retries = Retries(lambda: 0.0)
    retries.failed("a", (1,))
    retries.failed("b", (1,))
    retries.keep_only({"b"})
    assert retries.is_due("a", (1,)) and not retries.is_due("b", (1,))
    assert retries._attempts.keys() == {"b"}
