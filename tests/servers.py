"""Is a server there yet?"""

import time
import urllib.request
from collections.abc import Callable


def wait_for(url: str, running: Callable[[], bool], patience_s: float = 60.0) -> None:
    deadline = time.monotonic() + patience_s
    while running() and time.monotonic() < deadline:
        try:
            return urllib.request.urlopen(url, timeout=patience_s).close()
        except OSError:
            time.sleep(0.02)
    raise AssertionError(f"{url} does not answer")
