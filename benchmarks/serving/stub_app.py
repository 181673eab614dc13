"""The Serve application with engines that compute nothing: `benchmarks.serving.stub_app:build`.

All but the engine process is the product's. Arguments are those of `app.args`, and a few of the
stub's.
"""

from typing import Any

from pydantic import Field
from ray.serve import Application

from app.args import SLoRAArgs
from app.build import application
from app.replica.server import EngineServer, engine_spec
from app.serve_run import ended_by_failure
from benchmarks.serving.stub_engine import StubSpec
from slora_core.engine.process import AsyncEngine


class StubArgs(SLoRAArgs):
    """See `StubSpec`."""

    stub_step_s: float = Field(default=0.01, ge=0.0)
    stub_crash_token_id: int | None = None
    stub_crash_at: int = Field(default=0, ge=0)


class StubEngineServer(EngineServer):
    """A replica whose engine is a `StubEngine`."""

    def _new_engine(self, args: SLoRAArgs) -> AsyncEngine:
        assert isinstance(args, StubArgs)
        return AsyncEngine(
            stub_spec(args),
            self._interval,
            self._left.left,
            program="benchmarks.serving.stub_engine",
        )


def build(args: dict[str, Any]) -> Application:
    """What a Serve config file imports; raises as `app.build.build`."""
    with ended_by_failure():
        return application(StubArgs.model_validate(args), engine_server=StubEngineServer)


def stub_spec(args: StubArgs) -> StubSpec:
    return StubSpec(
        **vars(engine_spec(args)),
        step_s=args.stub_step_s,
        crash_token_id=args.stub_crash_token_id,
        crash_at=args.stub_crash_at,
    )
