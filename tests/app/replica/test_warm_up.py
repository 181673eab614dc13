import asyncio

from app.replica.warm_up import (
    ASK_TIMEOUT_S,
    SHARE_OF_POOL,
    PeerHeat,
    adapters_to_warm,
    hear_hot_adapters,
    warm_up,
)
from app.routing.order import homes
from tests.app.fakes import make_record
from tests.virtual_time import run_in_virtual_time

RECORDS = [make_record(f"adapter-{number}", num_pages=4) for number in range(60)]


def peer(rank, records=RECORDS):
    hottest = [(float(len(records) - place), record) for place, record in enumerate(records)]
    return PeerHeat(rank, hottest)


def warmed(rank, peers, num_pages=10_000):
    return adapters_to_warm(rank, peers, num_pages)


def test_a_new_replica_loads_what_will_be_its_own():
    chosen = warmed("2", [peer("0"), peer("1")])
    own = [r for r in RECORDS if homes(r.adapter_id, 1, ["0", "1", "2"]) == [2]]
    assert chosen == own and 10 < len(own) < 30


def test_a_spread_adapter_is_loaded_by_each_of_its_homes():
    hot, *cold = RECORDS[:20]
    # 180 of 299 requests: of four replicas it needs all.
    peers = [
        PeerHeat(str(rank), [(60.0, hot), *((2.0, other) for other in cold)]) for rank in range(3)
    ]
    for rank in range(3):
        others = [peer for peer in peers if peer.rank_in_deployment != str(rank)]
        assert hot in warmed(str(rank), others)
    assert warmed("3", peers)[0] == hot


def test_the_hottest_come_first_and_fill_half_of_the_pool():
    backwards = peer("1", RECORDS[:0:-1])
    chosen = warmed("0", [backwards], num_pages=40)
    assert [record.adapter_id for record in chosen] == [
        record.adapter_id
        for _, record in backwards.hottest
        if homes(record.adapter_id, 1, ["0", "1"]) == [0]
    ][: int(SHARE_OF_POOL * 40 / 4)]


def test_one_that_is_too_large_leaves_its_room_to_the_next():
    large, *others = RECORDS[:20]
    large = make_record("large", num_pages=30)
    alone = [peer("0", [large, *others])]
    assert large not in warmed("0", alone, num_pages=40)
    assert len(warmed("0", alone, num_pages=40)) == 5


def test_without_peers_there_is_nothing_to_load():
    assert warmed("0", []) == [] == warmed("1", [peer("0", [])])


def test_loading_goes_on_past_errors_and_stops_in_time():
    async def main():
        loaded = []

        async def load(record):
            await asyncio.sleep(1)
            if record is RECORDS[3]:
                raise RuntimeError("its files are gone")
            loaded.append(record)

        # Eight at a time: 7 + 8 in two seconds.
        assert await warm_up(RECORDS, load, timeout_s=2.5) == 15 == len(loaded)
        await asyncio.sleep(10)
        assert len(loaded) == 15
        assert await warm_up([], load) == 0

    run_in_virtual_time(main())


def test_who_does_not_answer_is_not_waited_for():
    async def main():
        async def answers():
            return [peer("0"), RuntimeError("it has just died"), peer("1")]

        assert await hear_hot_adapters(answers) == [peer("0"), peer("1")]
        assert await hear_hot_adapters(lambda: asyncio.sleep(100)) == []
        assert asyncio.get_running_loop().time() == ASK_TIMEOUT_S

        def nobody():
            raise RuntimeError("there is no replica")

        assert await hear_hot_adapters(nobody) == []

    run_in_virtual_time(main())
