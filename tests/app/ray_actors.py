"""Ends actors of the test's own cluster; other clusters of the machine are left alone."""

import ray


def kill_named_actor(prefix: str) -> None:
    """Kill the process of the one actor whose name starts with `prefix`; Ray may restart it."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    [actor] = [actor for actor in actors if actor["name"].startswith(prefix)]
    ray.kill(ray.get_actor(**actor), no_restart=False)
