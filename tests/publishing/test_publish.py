"""Publishing: to a folder, to a stand-in of the Hub, and into a real `vllm serve` that runs."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from engine_world import CANARIES, write_policy
from http_stand_in import answering, hub_stand_in
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from rich.console import Console
from typer.testing import CliRunner
from vllm_world import vllm_server

from selfplay import cli
from selfplay.checks import publishing
from selfplay.config import Config
from selfplay.errors import InputError, PublishError
from selfplay.processes import places
from selfplay.publishing import folder, publish, vllm
from selfplay.publishing.hub import upload
from selfplay.publishing.publish import STATE
from selfplay.publishing.server import EXTENSION, Server
from selfplay.reporting.terminal import Display
from selfplay.storage import agreement, policies
from selfplay.storage.ledger import Store
from selfplay.storage.policies import Policies
from selfplay.types import Policy

TOKEN = "hf_secretsecret"


def config(**targets):
    return Config.model_validate(
        {
            "run": {"name": "mine"},
            "policy": {"model": "unused", "dtype": "float32"},
            "prompts": {"source": "unused"},
            "generate": {"max_tokens": 48},
            "reward": {"url": ["http://unused"]},
            "publish": targets,
        }
    )


class Published:
    """A run of two rounds, whose current policy is published, and what was said of it."""

    def __init__(self, run_dir: Path, policies: list[Policy]) -> None:
        self.run_dir, self.said, self.alerts = run_dir, io.StringIO(), []
        self.policies = [
            dataclasses.replace(each, path=str(shutil.copytree(each.path, run_dir / "policies" / Path(each.path).name)))
            for each in policies
        ]
        self.store = Store(run_dir)
        self.store.open_run("mine", {})
        for index in (1, 2):
            self.store.open_round(index, index - 1, (0, 0), "f", config().model_dump(mode="json"))
            self.store.close_round(index, "promoted", index, [])

    def publish(self, version: int, retry: bool = False, **targets) -> str:
        """What the ledger says of it then: the state of the only target."""
        agreement.set_current(self.store, Policies(self.run_dir), version)
        display = Display(Console(file=self.said, width=300))
        publish.publish(config(**targets), self.run_dir, self.store, display, self.alerts.append, retry)
        return " ".join(f"{row['version']} {row['state']}" for row in self.store.state(STATE, {}).values())

    def events(self, kind: str) -> list[str]:
        return [row["text"] for row in self.store.query("SELECT * FROM events ORDER BY id") if row["kind"] == kind]


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    root = tmp_path_factory.mktemp("policies")
    return [write_policy(root, version, version) for version in range(3)]


@pytest.fixture
def run(tmp_path, three):
    made = Published(tmp_path / "run", three)
    yield made
    made.store.close()


def manifest(run: Published, version: int) -> policies.Manifest:
    return policies.read(Policies(run.run_dir).folder(version))


def test_nothing_is_published_by_default_nor_is_the_initial_policy(run, tmp_path):
    assert run.publish(2) == "" and run.publish(0, folder=tmp_path / "served") == ""
    assert not (tmp_path / "served").exists() and run.events("published") == []


def test_a_folder_gets_each_policy_and_goes_back_with_a_rollback(run, tmp_path):
    root = tmp_path / "served"
    assert run.publish(1, folder=root) == "1 done" and os.readlink(root / "current") == "0001"
    assert {path.name for path in (root / "0001").iterdir()} >= {"model.safetensors", "tokenizer.json", "README.md"}
    assert run.publish(2, folder=root) == "2 done" and os.readlink(root / "current") == "0002"
    assert run.publish(0, folder=root) == "0 done", "a rollback to the initial policy is published too"
    assert {path.name for path in root.iterdir()} == {"0000", "0002", "current", "published.json"}
    (root / "0002" / "model.safetensors").write_bytes(b"damaged")
    run.publish(2, folder=root)
    assert folder._is(root / "0002", manifest(run, 2)) and os.readlink(root / "current") == "0002"
    assert len(run.events("published")) == 4
    assert run.publish(2, folder=root) == "2 done" and len(run.events("published")) == 4, "once is enough"


@pytest.mark.parametrize("name", ["../mine", "/mine", "mine", "", ".", "1", "0001/..", "0001\n", 7])
def test_what_the_list_of_a_folder_names_is_deleted_only_where_it_is_a_policy(run, tmp_path, name):
    root = tmp_path / "served"
    (tmp_path / "mine").mkdir()
    run.publish(1, folder=root)
    run.publish(2, folder=root)
    listed = root / folder.LIST
    listed.write_text(json.dumps({"run": "mine", "versions": ["0001", "0002", name]}))
    with pytest.raises(InputError, match="names .*, which is no policy"):
        folder.put(run.run_dir, "mine", manifest(run, 0), root)
    assert (tmp_path / "mine").is_dir() and (root / "0001").is_dir()


def test_a_link_that_leads_elsewhere_is_not_taken_for_a_policy(run, tmp_path):
    root = tmp_path / "served"
    run.publish(1, folder=root)
    (root / "mine").mkdir()
    (root / "current").unlink()
    (root / "current").symlink_to("mine")
    assert run.publish(2, folder=root) == "2 done" and run.publish(0, folder=root) == "0 done"
    assert (root / "mine").is_dir() and folder.listed(root, "mine") == {"0000", "0002"}


def test_a_policy_in_a_folder_can_be_read_by_whoever_can_read_the_folder(run, tmp_path):
    """Who runs rounds has the umask 077, and the servers that read a published policy may be of another account."""
    root = tmp_path / "served"
    before = os.umask(0o077)
    try:
        run.publish(1, folder=root)
        assert root.stat().st_mode & 0o777 == (root / "0001").stat().st_mode & 0o777 == 0o700
        root.chmod(0o755)
        run.publish(2, folder=root)
    finally:
        os.umask(before)
    assert (root / "0002").stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in (root / "0002").iterdir()} == {0o644}


def test_a_folder_that_is_made_for_others_has_the_umask_of_whoever_started_the_run(run, tmp_path, monkeypatch):
    monkeypatch.setattr(places, "_given", None)
    before = os.umask(0o027)
    try:
        places.take_own_umask()
        places.take_own_umask()  # a second run in one process
        run.publish(1, folder=tmp_path / "for" / "others")
        modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "for", tmp_path / "for" / "others" / "0001")]
        assert modes == [0o750, 0o750]
        assert (tmp_path / "for" / "others" / "0001" / "config.json").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def dying(after: int):
    """A rename that ends the process once so many were done."""
    rename, left = Path.rename, iter(range(after))

    def instead(path: Path, target: Path) -> Path:
        if next(left, None) is None:
            os._exit(9)
        return rename(path, target)

    return instead


def test_a_kill_at_any_rename_changes_nothing(run, tmp_path, monkeypatch):
    root = tmp_path / "served"
    folder.put(run.run_dir, "mine", manifest(run, 0), root)
    folder.put(run.run_dir, "mine", manifest(run, 1), root)
    deaths = 0
    while True:
        if (child := os.fork()) == 0:
            monkeypatch.setattr(Path, "rename", dying(deaths))
            folder.put(run.run_dir, "mine", manifest(run, 2), root)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        now = os.readlink(root / "current")
        assert folder._is(root / now, manifest(run, int(now)))
        if code == 0:
            break
        deaths += 1
    assert deaths >= 3 and now == "0002"
    assert {path.name for path in root.iterdir()} == {"0001", "0002", "current", "published.json"}


def test_a_folder_of_others_is_left_alone_and_no_round_fails(run, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("mine")
    assert run.publish(1, folder=tmp_path / "home") == "1 failed"
    (said,) = run.events("alert")
    assert "holds other files" in said and "name a new folder" in said and run.alerts == [said]
    run.publish(1, folder=tmp_path / "home")
    assert len(run.alerts) == 1, "with the same policy it is tried again at the next start alone"
    (tmp_path / "home" / "letter.txt").unlink()
    assert run.publish(1, retry=True, folder=tmp_path / "home") == "1 done"
    with pytest.raises(InputError, match="that of the run mine"):
        folder.put(run.run_dir, "another", manifest(run, 1), tmp_path / "home")


def test_a_service_alerts_people_and_tries_again_when_it_starts(run, tmp_path, world):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("mine")
    agreement.set_current(run.store, Policies(run.run_dir), 1)
    service = world(f"publish.folder={tmp_path / 'home'}")
    service.daemon._write_down()
    (alert,) = run.store.state("alerts")
    assert "policy 1 was not published" in alert["text"] and run.store.state(STATE).popitem()[1]["state"] == "failed"
    (tmp_path / "home" / "letter.txt").unlink()
    service.made()
    service.opened()
    assert os.readlink(tmp_path / "home" / "current") == "0001" and len(run.events("published")) == 1


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hub_stand_in() as server:
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.mark.slow
def test_the_hub_gets_a_policy_once_and_the_token_is_nowhere(run, hub):
    hub.files["model-00001-of-00002.safetensors"] = b"of an earlier policy"
    hub.refuses = True
    assert run.publish(1, hub="me/mine") == "1 failed"
    assert "me/mine did not take the policy" in run.alerts[0] and "403" in run.alerts[0]
    hub.refuses = False
    assert run.publish(1, retry=True, hub="me/mine") == "1 done"
    assert hub.private and hub.repo == "me/mine" and hub.tokens == {f"Bearer {TOKEN}"}
    assert hub.files["model.safetensors"] == (run.run_dir / "policies" / "0001" / "model.safetensors").read_bytes()
    assert "model-00001-of-00002.safetensors" not in hub.files and b"Policy 1 of the run" in hub.files["README.md"]
    assert "masters" not in " ".join(hub.files) and hub.commits == ["Policy 1 of the run mine"]
    run.store.set_state(STATE, {})  # as a kill before it was written down leaves it
    assert run.publish(1, retry=True, hub="me/mine") == "1 done" and len(hub.commits) == 1
    assert not (run.run_dir / ".publish").exists()
    run.store.close()
    for path in run.run_dir.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    assert TOKEN not in run.said.getvalue() + " ".join(run.alerts)


@pytest.mark.slow
def test_a_push_needs_a_token_and_says_where_the_policy_is(run, hub, monkeypatch):
    words = ["export", "policy", "--push", "me/mine", "--run-dir", str(run.run_dir)]
    agreement.set_current(run.store, Policies(run.run_dir), 1)
    done = subprocess.run([sys.executable, "-m", "selfplay.cli", *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"policy 1 is at {hub.url}/me/mine/commit/" in done.stdout and TOKEN not in done.stdout + done.stderr
    assert hub.private and "model.safetensors" in hub.files and not list(run.run_dir.glob(".export-*"))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match="HF_TOKEN is not set"):
        CliRunner().invoke(cli.app, words, catch_exceptions=False)
    with pytest.raises(InputError, match="--push is for a policy"):
        CliRunner().invoke(cli.app, ["export", "pairs", *words[2:]], catch_exceptions=False)


def test_an_upload_draws_no_bars_because_the_terminal_does_not_get_their_characters(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    enable_progress_bars()
    with pytest.raises(PublishError, match="HFValidationError"):  # before anything is sent
        upload(tmp_path, "no/such/name", "a policy")
    assert are_progress_bars_disabled()


def test_check_looks_at_every_target(tmp_path, monkeypatch):
    (tmp_path / "letter.txt").write_text("mine")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    looked = [
        (f.level, f.about, f.text)
        for f in publishing.targets(config(hub="me/mine", folder=tmp_path, vllm=["http://127.0.0.1:9"]), tmp_path)
    ]
    assert [row[:2] for row in looked] == [
        ("error", "publish.hub"),
        ("error", "publish.folder"),
        ("warning", "publish.vllm"),
    ]
    assert (
        "HF_TOKEN is not set" in looked[0][2]
        and "holds other files" in looked[1][2]
        and "does not answer" in looked[2][2]
    )
    monkeypatch.setenv("VLLM_KEY", f"{TOKEN}\n1")
    (bad,) = publishing.targets(config(vllm=["http://127.0.0.1:9"], api_key_env="VLLM_KEY"), tmp_path)
    assert bad.level == "warning" and "no header of HTTP" in bad.text and TOKEN not in bad.text
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with answering({"/v1/models": '{"data": [{"id": "mine", "root": "/m"}]}'}) as url:
        found = publishing.targets(config(hub="me/mine", folder=tmp_path / "new", vllm=[url]), tmp_path)
        looked = [(f.level, f.text) for f in found]
    assert [level for level, _ in looked] == ["ok", "ok", "warning"] and "VLLM_SERVER_DEV_MODE=1" in looked[2][1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_running_server_gets_the_weights_and_shows_them(run, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parents[2]}:{os.environ.get('PYTHONPATH', '')}")
    stranger = write_policy(tmp_path / "stranger", 7, 77)
    served = tmp_path / "start"
    os.symlink(run.policies[0].path, served)
    with vllm_server(served, *EXTENSION.split(), "--max-model-len", "128", "--served-model-name", "mine") as url:
        server = Server(url, None, None)
        server.open()

        def serves() -> list[int]:
            found = server.logps(CANARIES)
            known = {v: manifest(run, v).canaries["logps"] for v in range(3)}
            return [v for v, logps in known.items() if found == pytest.approx(logps, abs=1e-3)]

        assert serves() == [0]
        assert run.publish(1, vllm=[url]) == "1 done" and serves() == [1]
        assert "shown by canaries" in run.events("published")[-1]
        assert run.publish(0, vllm=[url]) == "0 done" and serves() == [0], "a rollback"

        (Path(run.policies[2].path) / "model.safetensors").rename(tmp_path / "away")
        known = {v: (run.policies[v].path, vllm.Canaries.of(manifest(run, v).canaries)) for v in range(3)}
        how = {"dtype": "float32", "largest": None, "seconds": 60.0, "touched": False, "begin": lambda: None}
        with pytest.raises(PublishError, match="could not read"):
            vllm.put(server, 2, run.policies[2].path, known, **how)
        assert serves() == [0], "what it served comes back, and it answers"
        (tmp_path / "away").rename(Path(run.policies[2].path) / "model.safetensors")
        with pytest.raises(PublishError, match="does not answer with the weights of policy 2"):
            vllm.put(server, 2, stranger.path, known, **how)
        assert serves() == [0]
        assert run.publish(2, vllm=[url]) == "2 done" and serves() == [2]

        server.pause()  # as a kill amid the reload leaves it
        ((name, row),) = run.store.state(STATE).items()
        run.store.set_state(STATE, {name: row | {"version": 1, "state": "begun", "touched": True}})
        assert run.publish(1, retry=True, vllm=[url]) == "1 done" and serves() == [1] and not server.paused
        server.pause()
        assert run.publish(2, vllm=[url]) == "2 failed" and "is paused, by somebody else" in run.alerts[-1]
        server.resume()
        assert run.publish(2, retry=True, vllm=[url]) == "2 done"

        vllm.put(
            server,
            7,
            stranger.path,
            known | {7: (stranger.path, vllm.Canaries.of(policies.read(Path(stranger.path)).canaries))},
            **how,
        )
        assert run.publish(1, vllm=[url]) == "1 failed"
        assert run.publish(1, retry=True, vllm=[url]) == "1 failed", "it is never touched"
        assert "serves none of this run's policies" in run.alerts[-1]
