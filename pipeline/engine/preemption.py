"""Reasons to stop a run early: the cloud's preemption notice, and the allowed run time.

AWS announces the end of a spot machine two minutes ahead, Google Cloud thirty seconds, both at an address that only the
machine itself can reach.
"""

from __future__ import annotations

import http.client
import logging
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Literal

from pipeline.errors import Preempted

log = logging.getLogger(__name__)

Cloud = Literal["aws", "gcp"]
_ADDRESSES: dict[Cloud, str] = {"aws": "http://169.254.169.254", "gcp": "http://metadata.google.internal"}
_EVERY_S = 5.0
_TIMEOUT_S = 2.0


class RunTimer:
    """Requests a stop when the allowed run time is over."""

    def __init__(self, allowed: str, allowed_s: float, stop: Callable[[Preempted], None]) -> None:
        """Start the clock.

        Args:
            allowed: The allowed run time as the user wrote it, for the message.
            allowed_s: The same in seconds.
            stop: Called with the reason when the time is over.
        """
        reason = Preempted(
            f"the allowed run time of {allowed} is over; run the same command again to resume "
            "(the run keeps this limit until another --max-runtime is given; none: no limit)"
        )
        self._timer = threading.Timer(allowed_s, stop, [reason])
        self._timer.daemon = True
        self._timer.start()

    def close(self) -> None:
        """Cancel the timer."""
        self._timer.cancel()


class PreemptionWatcher:
    """Requests a stop when the cloud announces that it will take the machine away.

    A metadata service that does not answer is reported once and never stops a run. `address` replaces the address of
    the cloud's own metadata service.
    """

    def __init__(
        self, cloud: Cloud, stop: Callable[[Preempted], None], address: str | None = None, every_s: float = _EVERY_S
    ) -> None:
        self._cloud, self._stop, self._every_s = cloud, stop, every_s
        self._address = (address or _ADDRESSES[cloud]).rstrip("/")
        self._token: tuple[str, float] | None = None
        self._ended = threading.Event()
        self._has_complained = False
        self._thread = threading.Thread(target=self._watch, name="preemption", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop asking."""
        self._ended.set()
        self._thread.join(_TIMEOUT_S + 1)

    def _watch(self) -> None:
        while True:
            try:
                notice = self._aws() if self._cloud == "aws" else self._gcp()
                if notice is not None:
                    self._stop(
                        Preempted(
                            f"{notice}; what is committed is safe; `lampctl resume`, or the same command again, "
                            "resumes the run"
                        )
                    )
                    return
            except (OSError, http.client.HTTPException, ValueError) as error:
                if not self._has_complained:
                    log.warning("the %s metadata service at %s does not answer: %s", self._cloud, self._address, error)
                    self._has_complained = True
            if self._ended.wait(self._every_s):
                return

    def _aws(self) -> str | None:
        """What AWS says, by the second version of its instance metadata service."""
        headers = {"X-aws-ec2-metadata-token": self._aws_token()}
        answer = self._ask("/latest/meta-data/spot/instance-action", headers)
        return None if answer is None else f"AWS is about to take this machine away ({answer.strip()[:200]})"

    def _aws_token(self) -> str:
        if self._token is None or time.monotonic() > self._token[1]:
            lifetime_s = 21600
            headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(lifetime_s)}
            token = self._ask("/latest/api/token", headers, "PUT")
            if token is None:
                raise ValueError("it gives no token")
            self._token = token, time.monotonic() + lifetime_s / 2
        return self._token[0]

    def _gcp(self) -> str | None:
        answer = self._ask("/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
        return "Google Cloud is about to take this machine away" if (answer or "").strip().upper() == "TRUE" else None

    def _ask(self, path: str, headers: dict[str, str], method: str = "GET") -> str | None:
        """The answer's text; None for 404, by which AWS says that there is nothing to say."""
        request = urllib.request.Request(self._address + path, headers=headers, method=method)
        try:
            with _DIRECT.open(request, timeout=_TIMEOUT_S) as answer:
                return str(answer.read(4096).decode(errors="replace"))
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            if error.code == 401:
                self._token = None
            raise


# The machine's own service is never behind a proxy.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
