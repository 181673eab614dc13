"""Where relative paths of the arguments start: the place of whoever wrote them.

Serve sends a config file's arguments to a process of the cluster, and never where the file lies.
Owns how that place is found all the same, and what is said where it cannot be. `build` asks it.
"""

from dataclasses import dataclass
from pathlib import Path

import ray

from app import ray_private

# Above the packages: of a checkout it is where the config files' relative paths start.
_ROOT = Path(__file__).resolve().parents[1]
_CONFIGS = "serve_configs"


@dataclass(frozen=True)
class ConfigPlace:
    """Where relative paths start; None: nobody said, which is an error of each of them.

    With `is_guessed` it is a checkout's directory, in which only what is there already is meant.
    """

    directory: Path | None
    is_guessed: bool = False

    def absolute(self, name: str, path: str) -> str:
        """The argument `name` as an absolute path.

        Raises:
            ValueError: it is relative and nobody said to what.
        """
        expanded = Path(path).expanduser()
        if expanded.is_absolute():
            return str(expanded.resolve())
        found = None if self.directory is None else self.directory / expanded
        if found is None or (self.is_guessed and not found.exists()):
            raise ValueError(
                f"{name}: {path} is relative{self._elsewhere(found)}, and `serve deploy` tells the "
                "cluster no directory that it starts at; make it absolute, or name the directory "
                'for all of them: runtime_env: {working_dir: "local:///..."} of the application'
            )
        return str(found.resolve())

    def holds(self, path: str) -> bool:
        """Whether a path is a directory as seen from here."""
        expanded = Path(path).expanduser()
        if expanded.is_absolute() or self.directory is not None:
            return ((self.directory or Path("/")) / expanded).is_dir()
        return False

    def _elsewhere(self, found: Path | None) -> str:
        return "" if found is None else f", {found} does not exist"


def is_built_by_serve() -> bool:
    """Whether Serve builds here what a config file names, and not the user's own process."""
    return ray.is_initialized() and ray.get_runtime_context().get_task_id() is not None


def find_config_place() -> ConfigPlace:
    """The place of whoever has the application built in this process; blocks on Ray."""
    if not is_built_by_serve():
        return ConfigPlace(Path.cwd())
    if ray.get_runtime_context().runtime_env.get("working_dir"):
        # Ray has started this process in it, as it will the replicas.
        return ConfigPlace(Path.cwd())
    serve_run = ray_private.find_serve_run()
    if serve_run is not None:
        return ConfigPlace(Path(f"/proc/{serve_run.pid}/cwd").resolve())
    if (_ROOT / _CONFIGS).is_dir():
        return ConfigPlace(_ROOT, is_guessed=True)
    return ConfigPlace(None)
