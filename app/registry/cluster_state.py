"""The registry's state in Ray's own key-value store: a key for each name of an application.

It is found from every node and ends with the cluster, so that a registry that dies takes up where
it was, a new cluster starts afresh and nothing has to be cleaned up.
"""

from collections.abc import Mapping
from urllib.parse import quote

from ray.exceptions import RayError

from app import ray_private
from app.registry.client import NAMESPACE


class ClusterState:
    """An application's entries as `StateStore`."""

    def __init__(self, app_name: str) -> None:
        # Quoted, so that no application's prefix is the beginning of another one's.
        self._prefix = f"registry-entry:{quote(app_name, safe='')}:"

    def read(self) -> dict[str, bytes]:
        try:
            found = ray_private.read_from_cluster(NAMESPACE, self._prefix)
        except RayError as error:
            raise OSError(f"Ray's key-value store: {error}") from error
        return {key.removeprefix(self._prefix): data for key, data in found.items()}

    def write(self, entries: Mapping[str, bytes]) -> None:
        try:
            for name, data in entries.items():
                ray_private.write_to_cluster(NAMESPACE, self._prefix + name, data)
        except RayError as error:
            raise OSError(f"Ray's key-value store: {error}") from error
