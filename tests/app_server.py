"""Serves an ASGI application in a thread of the test process."""

import contextlib
import threading
import time
from collections.abc import Iterator


def wait_until(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@contextlib.contextmanager
def running(app) -> Iterator[str]:
    """Gives the URL of an application that is served until the end."""
    import uvicorn

    from serving.server import bind

    listener = bind("127.0.0.1", 0)
    runner = uvicorn.Server(uvicorn.Config(app, ws="none", access_log=False, log_level="critical"))
    thread = threading.Thread(target=runner.run, args=([listener],))
    thread.start()
    try:
        wait_until(lambda: runner.started or not thread.is_alive())
        yield "http://{}:{}".format(*listener.getsockname())
    finally:
        runner.should_exit = True
        thread.join(60)
    assert not thread.is_alive()
