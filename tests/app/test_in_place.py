"""Which deployments a changed argument replaces; nothing is started."""

import json

import pytest

from app import in_place
from app.args import SLoRAArgs
from app.in_place import ENGINE, INGRESS, REGISTRY

ALL = {REGISTRY, ENGINE, INGRESS}


@pytest.mark.parametrize(
    ("changed", "replaced"),
    [
        ({"num_replicas": 2}, set()),
        ({"num_ingress_replicas": 2}, set()),
        ({"min_replicas": 0, "max_replicas": 4, "target_requests": 3.0}, set()),
        ({"max_queued_requests": 7, "max_queued_tokens": 8, "max_ongoing_requests": 9}, set()),
        ({"max_body_bytes": 2**20, "body_timeout_s": 5.0}, set()),
        ({"flush_interval_s": 0.1, "max_pieces_per_s": 10.0}, set()),
        ({"adapters_dir": "/b", "allowed_adapter_roots": ["/b"]}, set()),
        ({"graceful_shutdown_timeout_s": 5.0, "max_surge_percent": 50}, set()),
        ({"chat_template": "{{ messages }}"}, {INGRESS}),
        ({"spill_queue_len": 3}, {INGRESS}),
        ({"failover_timeout_s": 5.0}, {INGRESS}),
        ({"unknown_adapter_fields": "warn"}, {REGISTRY}),
        ({"max_running_requests": 8}, {ENGINE}),
        ({"store_capacity_bytes": 2**31}, {ENGINE}),
        ({"max_model_len": 512}, {ENGINE, INGRESS}),
        ({"num_pool_tokens": 4096}, {ENGINE, REGISTRY}),
        ({"model": "/m"}, ALL),
        ({"dtype": "float16"}, ALL),
        ({"page_tokens": 32}, ALL),
    ],
)
def test_who_is_replaced(changed, replaced):
    before = SLoRAArgs(served_model_name="base")
    after = before.model_copy(update=changed)
    found = {
        name
        for name in ALL
        if in_place.code_version(name, before) != in_place.code_version(name, after)
    }
    assert found == replaced


def test_what_no_table_names_replaces_all(monkeypatch):
    class Later(SLoRAArgs):
        new_argument: int = 1

    monkeypatch.setattr(in_place, "SLoRAArgs", Later)
    assert all("new_argument" in in_place.started_with(name) for name in ALL)


def test_every_name_in_the_tables_is_an_argument():
    named = in_place._OPTIONS.union(*in_place._SETTINGS.values(), in_place._ONLY_FOR)
    assert named <= set(SLoRAArgs.model_fields)
    assert not in_place._OPTIONS & set(in_place._ONLY_FOR)


@pytest.mark.parametrize("name", sorted(ALL))
def test_settings_arrive(name):
    later = SLoRAArgs(
        adapters_dir="/b",
        allowed_adapter_roots=["/b", "/c"],
        flush_interval_s=0.5,
        max_pieces_per_s=3.0,
        max_queued_requests=7,
        max_queued_tokens=8,
        max_body_bytes=4096,
        body_timeout_s=2.0,
        max_inflight_body_bytes=2**21,
    )
    # Serve sends them as JSON.
    sent = json.loads(json.dumps(in_place.settings(name, later)))
    taken = in_place.with_settings(SLoRAArgs(), sent)
    assert in_place.settings(name, taken) == sent
    assert in_place.code_version(name, taken) == in_place.code_version(name, later)


def test_settings_that_somebody_wrote_into_a_config_file():
    for wrong in ({"adapters_dir": "a"}, {"allowed_adapter_roots": ["/a", "b"]}):
        with pytest.raises(ValueError, match="user_config has the relative path [ab];"):
            in_place.with_settings(SLoRAArgs(), wrong)
    with pytest.raises(ValueError, match="max_body_bytes"):
        in_place.with_settings(SLoRAArgs(), {"max_body_bytes": 1})


def test_other_sources_are_another_version(monkeypatch):
    before = in_place.code_version(ENGINE, SLoRAArgs())
    monkeypatch.setattr(in_place, "_sources", lambda: "later")
    assert in_place.code_version(ENGINE, SLoRAArgs()) != before
