"""Posting JSON to a webhook, more than once if need be. Of the URL at most the host is said.

urllib bounds each wait for a byte, and the resolver not at all. So each attempt is made in a
thread, which is left alone when its time is over.
"""

import http.client
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from pipeline.settings.notify import FROM_ENVIRONMENT, is_webhook

RETRY_DELAYS_S = (1.0, 4.0)  # of a webhook that is away or overloaded
RETRIED = (408, 425, 429)  # and all from 500


def post(
    receiver: str, content: bytes, timeout_s: float, sleep: Callable[[float], None] = time.sleep
) -> str | None:
    """Posts JSON; why it could not be, or None.

    Args:
        receiver: a URL, or `env:NAME` with the name of a variable that holds one.
        content: the JSON.
        timeout_s: seconds for each attempt, from its first to its last byte.
        sleep: waits between attempts.
    """
    url, name = receiver, receiver.removeprefix(FROM_ENVIRONMENT)
    if name != receiver:
        url = os.environ.get(name, "")
        if not is_webhook(url):
            return f"the variable {name} holds no URL that begins with https:// or http://"
    what = f"the webhook at {urlsplit(url).hostname}"
    fault = ""
    for delay_s in (*RETRY_DELAYS_S, None):
        request = urllib.request.Request(
            url,
            data=content,
            headers={"Content-Type": "application/json", "User-Agent": "raydiffusion"},
            method="POST",
        )
        try:
            _open(request, timeout_s)
            return None
        except urllib.error.HTTPError as error:
            error.close()
            fault = f"{what} answered {error.code}"
            if error.code < 500 and error.code not in RETRIED:
                return fault
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if not isinstance(reason, OSError):  # whose text has no URL; that of others may
                reason = OSError(None, type(error).__name__)
            if isinstance(reason, TimeoutError):
                reason = OSError(None, f"no answer within {timeout_s:g} s")
            fault = f"{what} cannot be reached ({reason.strerror or type(reason).__name__})"
        except ValueError:  # an address that urllib cannot read
            return f"{what} has a URL that cannot be used"
        if delay_s is not None:
            sleep(delay_s)
    return f"{fault}, {1 + len(RETRY_DELAYS_S)} times"


def _open(request: urllib.request.Request, timeout_s: float) -> None:
    """Sends a request and reads the head of the answer.

    Raises:
        TimeoutError: its time is over.
        Exception: whatever urllib raises.
    """
    found: list[Exception | None] = []

    def attempt() -> None:
        try:
            with _OPENER.open(request, timeout=timeout_s):
                found.append(None)
        except Exception as error:  # raised by who waits
            found.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not found:
        raise TimeoutError
    if found[0] is not None:
        raise found[0]


class _Refuse(urllib.request.HTTPRedirectHandler):
    """A redirected POST would become a GET that tells nobody."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_Refuse)
