"""The credentials of URLs stay in memory: whatever setting holds them, no output, file, folder or hint shows them."""

from __future__ import annotations

import base64
import functools
import http.server
import json
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline import presets
from pipeline.cli import app
from pipeline.overrides import apply, flatten
from stages.config import PipelineConfig
from stages.urls import without_credentials
from tests.pipeline.conftest import options_of

PASSWORD, SIGNATURE, TOKEN = "hunter2canary", "sigcanary%2Fx", "fragmentcanary"
CANARIES = (PASSWORD, "sigcanary", TOKEN)


class Guarded(http.server.SimpleHTTPRequestHandler):
    """Serves files to those who know user, password and signature."""

    def do_GET(self) -> None:
        basic = base64.b64encode(f"me:{PASSWORD}".encode()).decode()
        if self.headers.get("Authorization") != f"Basic {basic}" or SIGNATURE not in self.path:
            self.send_error(403)
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def url(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A tar of the world's videos behind credentials of both kinds."""
    folder = tmp_path_factory.mktemp("served")
    with tarfile.open(folder / "clips.tar", "w") as tar:
        for video in sorted((world / "videos").iterdir()):
            tar.add(video, video.name)
    handler = functools.partial(Guarded, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://me:{PASSWORD}@127.0.0.1:{running.server_port}/clips.tar?X-Amz-Signature={SIGNATURE}#{TOKEN}"
        running.shutdown()


def text_settings() -> list[str]:
    """Every setting that takes free text, so a URL as well; found from the types."""
    return [
        f"{section}.{name}"
        for section, model in PipelineConfig.model_fields.items()
        for name, field in getattr(model.annotation, "model_fields", {}).items()
        if field.annotation is str
    ]


class Session:
    """Runs commands in one folder and remembers what they said."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.outputs = folder, list[tuple[str, str]]()

    def run(self, *words: str, code: int | None = 0) -> str:
        done = CliRunner().invoke(app, list(words), env={"COLUMNS": "100", "NO_COLOR": "1"}, prog_name="pipeline")
        self.outputs.append((" ".join(words[:2]), done.output))
        assert done.exception is None or isinstance(done.exception, SystemExit)
        assert code is None or done.exit_code == code, done.output
        return done.stdout

    def leaks(self) -> list[str]:
        """Where a credential is: outputs, names of files and folders, and their bytes."""
        found = [f"output of {words}" for words, text in self.outputs for c in CANARIES if c in text]
        for path in self.folder.rglob("*"):
            content = str(path).encode() + (path.read_bytes() if path.is_file() else b"")
            found += [str(path) for canary in CANARIES if canary.encode() in content]
        return found


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Session]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    made = Session(tmp_path)
    yield made
    made.outputs.append(("log", caplog.text))
    assert made.leaks() == []


def test_the_settings_that_may_hold_a_url_are_found() -> None:
    assert {"data.videos", "data.annotations", "clip.weights", "teacher.model", "student.init", "decode.llm"} <= set(
        text_settings()
    )


@pytest.mark.parametrize("key", text_settings())
def test_no_dump_of_the_configuration_holds_a_credential(key: str, url: str) -> None:
    config = apply(presets.miniature(), [f"{key}={url}", "train.seed=3"])
    section, name = key.split(".")
    assert getattr(getattr(config, section), name) == url, "the process itself needs it"
    texts = [json.dumps(flatten(config)), config.model_dump_json(), repr(config.model_dump())]
    assert not [text for text in texts for canary in CANARIES if canary in text]
    assert without_credentials(url) in texts[0]
    assert not [canary for canary in CANARIES if canary in str(presets.default_cache(config))]


@pytest.mark.slow
@pytest.mark.parametrize("key", text_settings())
def test_no_setting_that_is_refused_or_used_shows_a_credential(
    key: str, url: str, session: Session, seeded: list[str], seeded_cache: Path
) -> None:
    sets, cache = options_of([*seeded, f"{key}={url}"]), ["--cache", str(seeded_cache), "--device", "cpu"]
    vary = ["--vary", f"{key}={url},{url}2", *options_of([*seeded, "train.max_steps=1"])]
    session.run("train-student", *sets, "--set", "train.max_steps=1", *cache, "--out", "run", "--debug", code=None)
    session.run("ablate", *vary, *cache, "--out", "ablation", "--json", code=None)
    session.run("extract", *sets, "--cache", "new", "--device", "cpu", "--debug", code=None)
    session.run("cache", "verify", *sets, "--cache", str(seeded_cache), "--semantic", "1", code=None)
    session.run("extract", "--set", url, code=2)
    session.run("extract", "--set", f"{key}x={url}", code=2)
    session.run("extract", "--cache", url, code=2)


@pytest.mark.slow
def test_videos_behind_credentials_go_through_every_command(url: str, session: Session, seeded: list[str]) -> None:
    sets = options_of([*seeded, "data.source=webdataset", f"data.videos={url}", "train.max_steps=2"])
    device = ["--device", "cpu"]
    assert json.loads(session.run("extract", *sets, *device, "--json"))["failed"] == 0
    session.run("extract", *sets, *device, "--workers", "2", "--cache", "second", "--debug")
    session.run("train-student", *sets, *device, "--out", "runs/one")
    assert "nothing to do" in session.run("train-student", *sets, *device, "--out", "runs/one")
    assert json.loads((session.folder / "runs/one/config.json").read_text())["data"]["videos"].endswith("/clips.tar")
    session.run("evaluate", "--run", "runs/one", *device, "--json")
    session.run("diagnose", "--run", "runs/one", *device, "--samples", "4")
    session.run("ablate", "--vary", "train.lambda_kd=0,1", *sets, *device, "--out", "runs/study")
    session.run("baselines", *sets, "--out", "runs/base", "--probe", "majority")
    session.run("report", "runs/one", "runs/study", "--out", "page.html")
    session.run("cache", "verify", *sets, "--full", "--sources", "--semantic", "2")
    session.run("cache", "ls", ".", "--json")
    session.run("train-student", *sets, *device, "--set", "clip.dtype=float32", "--out", "runs/two", "--debug", code=4)
    session.run("extract", *sets, *device, "--dry-run")
    wrong = [*sets, "--set", f"data.videos={url.replace('clips', 'none')}"]
    session.run("extract", *wrong, *device, "--cache", "third", "--debug", "--json", code=5)
    odd = url.replace(PASSWORD, f"{PASSWORD}/odd")
    session.run("extract", *sets, "--set", f"data.videos={odd}", *device, "--cache", "third", "--debug", code=5)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pw@host:8/a/b.tar?sig=x#y", "https://host:8/a/b.tar"),
        ("https://me:p/w@host/a.tar", "https://host/a.tar"),
        ("cannot read 'https:/me:pw@host/a.tar?sig=x', sorry", "cannot read 'https:/host/a.tar', sorry"),
        ("s3://key:secret@bucket/x and http://h/{000..009}.tar", "s3://bucket/x and http://h/{000..009}.tar"),
        ("/data/a@b?.mp4 at 3:4", "/data/a@b?.mp4 at 3:4"),
    ],
)
def test_of_a_url_scheme_host_and_path_are_shown(text: str, shown: str) -> None:
    assert without_credentials(text) == shown
