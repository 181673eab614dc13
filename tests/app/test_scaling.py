from app.args import SLoRAArgs
from app.scaling import autoscaling_reports, engine_scaling, ingress_scaling


def test_without_a_maximum_there_are_as_many_as_asked_for():
    args = SLoRAArgs(num_replicas=3, num_ingress_replicas=2)
    assert engine_scaling(args) == {"num_replicas": 3}
    assert ingress_scaling(args) == {"num_replicas": 2}
    assert autoscaling_reports(args) == {}


def test_bounds_targets_and_delays_of_the_engine():
    args = SLoRAArgs(
        min_replicas=0,
        num_replicas=1,
        max_replicas=4,
        target_queued_tokens=700,
        max_running_requests=24,
        scale_up_delay_s=1,
        scale_down_delay_s=50,
        scale_to_zero_delay_s=600,
    )
    config = engine_scaling(args)["autoscaling_config"]
    assert (config.min_replicas, config.initial_replicas, config.max_replicas) == (0, 1, 4)
    assert (config.upscale_delay_s, config.downscale_delay_s) == (1, 50)
    assert config.downscale_to_zero_delay_s == 600
    assert config.policy.policy_kwargs == {
        "target_requests": 24,
        "target_queued_tokens": 700,
        "target_running_tokens": None,
        "target_page_share": 0.8,
    }
    assert ingress_scaling(args) == {"num_replicas": 1}


def test_the_ingress_grows_with_its_requests():
    config = ingress_scaling(SLoRAArgs(max_ingress_replicas=3))["autoscaling_config"]
    assert (config.min_replicas, config.max_replicas) == (1, 3)
    assert config.target_ongoing_requests == 100


def test_what_scales_reports_often():
    options = autoscaling_reports(SLoRAArgs(max_replicas=2, autoscaling_report_s=0.5))
    variables = options["runtime_env"]["env_vars"]
    assert set(variables.values()) == {"0.5"} and len(variables) == 2
    from ray.serve._private import constants

    for name in variables:
        assert hasattr(constants, name)


def test_a_replica_on_the_cpu_leaves_cores_to_those_that_may_come():
    assert SLoRAArgs(max_replicas=4).most_replicas == 4
    assert SLoRAArgs(num_replicas=2).most_replicas == 2
