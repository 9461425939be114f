"""Times that are allowed, and the cloud's notice of a preemption from a server on loopback."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipeline.config.quantities import parse_duration
from pipeline.engine.preemption import PreemptionWatcher, RunTimer
from pipeline.errors import ConfigError, Preempted


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("3h30m", 12600), ("45m", 2700), ("90s", 90), ("90", 90), ("1d", 86400), ("1.5h", 5400), ("1h 5m 2s", 3902)],
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "3x", "-5m", "0", "h", "3h30"])
def test_what_is_no_duration(text):
    with pytest.raises(ConfigError, match="--max-runtime"):
        parse_duration(text)


def test_the_timer_asks_once_and_can_be_forgotten():
    reasons = []
    timer = RunTimer("0.05s", 0.05, reasons.append)
    time.sleep(0.3)
    timer.close()
    assert [type(reason) for reason in reasons] == [Preempted]
    assert "allowed run time of 0.05s" in str(reasons[0])
    RunTimer("0.05s", 0.05, reasons.append).close()
    time.sleep(0.2)
    assert len(reasons) == 1


class Metadata:
    """Both clouds' metadata services."""

    def __init__(self):
        self.preempted = threading.Event()
        self.tokens, self.paths = 0, []
        self.fail_with = None
        service = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                """Silence."""

            def reply(self, status, text):
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def do_PUT(self):
                assert self.path == "/latest/api/token"
                assert int(self.headers["X-aws-ec2-metadata-token-ttl-seconds"]) > 0
                service.tokens += 1
                self.reply(200, f"token-{service.tokens}")

            def do_GET(self):
                service.paths.append(self.path)
                if service.fail_with:
                    self.reply(service.fail_with, "")
                elif self.path == "/latest/meta-data/spot/instance-action":
                    if self.headers["X-aws-ec2-metadata-token"] != f"token-{service.tokens}":
                        self.reply(401, "")
                    elif service.preempted.is_set():
                        self.reply(200, '{"action": "terminate", "time": "2026-11-25T12:00:00Z"}')
                    else:
                        self.reply(404, "")
                elif self.path == "/computeMetadata/v1/instance/preempted":
                    if self.headers["Metadata-Flavor"] != "Google":
                        self.reply(403, "")
                    else:
                        self.reply(200, "TRUE" if service.preempted.is_set() else "FALSE")
                else:
                    self.reply(500, "")

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def metadata():
    service = Metadata()
    yield service
    service.server.shutdown()


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(("cloud", "name"), [("aws", "AWS"), ("gcp", "Google Cloud")])
def test_the_notice_stops_the_run(metadata, cloud, name, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # the machine's own service is never behind a proxy
    reasons = []
    watcher = PreemptionWatcher(cloud, reasons.append, metadata.url, every_s=0.02)
    wait_until(lambda: len(metadata.paths) > 3)
    assert reasons == []
    metadata.preempted.set()
    wait_until(lambda: reasons)
    watcher.close()
    assert [type(reason) for reason in reasons] == [Preempted]
    assert f"{name} is about to take this machine away" in str(reasons[0])
    assert metadata.tokens == (cloud == "aws")


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_a_service_that_fails_is_complained_of_once_and_asked_again(metadata, cloud, caplog, monkeypatch):
    monkeypatch.setattr("pipeline.engine.preemption.log.propagate", True)
    metadata.fail_with = 500
    reasons = []
    watcher = PreemptionWatcher(cloud, reasons.append, metadata.url, every_s=0.02)
    wait_until(lambda: len(metadata.paths) > 3)
    metadata.fail_with = None
    metadata.preempted.set()
    wait_until(lambda: reasons)
    watcher.close()
    assert len([r for r in caplog.records if "does not answer" in r.message]) == 1


def test_no_service_at_all_is_no_reason_to_stop(caplog, monkeypatch):
    monkeypatch.setattr("pipeline.engine.preemption.log.propagate", True)
    reasons = []
    watcher = PreemptionWatcher("aws", reasons.append, "http://127.0.0.1:1", every_s=0.02)
    wait_until(lambda: caplog.records)
    watcher.close()
    assert reasons == []
