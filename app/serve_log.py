"""Has this project's log lines of a Serve replica written where Serve writes its own.

That is the replica's file in Ray's session, which it rotates, and mostly the terminal; the encoding
and the level are those of Serve's `logging_config`. Ray's workers by themselves write nothing below
a warning, and that as bare text. It knows no requests.
"""

import logging

# Of Serve, which its guide to logging names for users' lines.
SERVE_LOGGER = "ray.serve"
OUR_LOGGERS = ("app", "slora_core")


class _ServeHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        # Its level may be changed while it serves.
        serve = logging.getLogger(SERVE_LOGGER)
        if serve.isEnabledFor(record.levelno):
            serve.handle(record)


def log_with_serve() -> None:
    """To be called in a replica, where Serve has set its logger up; may be called again."""
    for name in OUR_LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
        if not any(isinstance(handler, _ServeHandler) for handler in logger.handlers):
            logger.addHandler(_ServeHandler())
