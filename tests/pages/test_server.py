"""The requests of the page, and those that nobody should make."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

import hy_prfl.pages.server as server_module
from hy_prfl.pages.items import Clip, Item
from hy_prfl.pages.journal import Journal
from hy_prfl.pages.server import PageSettings, build_app, listen, serve
from hy_prfl.pages.study import Study
from tests.pages.test_journal import full_disk


ME = {"annotator": "ann", "window": "w1"}


def label(client: TestClient, state: dict[str, Any], choice: str = "good", **values: Any) -> Any:
    item = state["items"][0]["item"]
    request = {**ME, "item": item, "answers": {"physics_quality": choice}, "seconds": 2.5, "key": f"k{item}", **values}
    # Not `json=`, which does not send halves of surrogate pairs.
    return client.post("/api/label", content=json.dumps(request), headers={"Content-Type": "application/json"})


def start(client: TestClient, **values: Any) -> dict[str, Any]:
    response = client.post("/api/next", json={**ME, **values})
    assert response.status_code == 200, response.text
    return response.json()


def test_from_the_first_clip_to_the_last(open_client: Callable[..., TestClient], manifest: Path) -> None:
    client = open_client(4)
    state = start(client)
    rows = json.loads(manifest.read_text())
    for number in range(4):
        assert state["progress"]["labelled"] == number
        assert state["items"][0]["caption"] == rows[number]["caption"]
        clip = state["items"][0]["clips"][0]
        assert clip["fps"] == 16
        media = client.get(clip["url"])
        assert media.content == (manifest.parent / rows[number]["video"]).read_bytes()
        assert media.headers["content-type"] == "video/mp4"
        part = client.get(clip["url"], headers={"Range": "bytes=10-19"})
        assert (part.status_code, part.content) == (206, media.content[10:20])
        before = len(client.study.journal.path.read_text().splitlines())
        state = label(client, state).json()
        # On the disk before the next clip is known.
        assert len(client.study.journal.path.read_text().splitlines()) == before + 1
    assert state["items"] == []
    assert state["progress"] == {
        "labelled": 4, "skipped": 0, "left": 0, "done": 4, "total": 4,
        "per_hour": state["progress"]["per_hour"], "seconds_left": state["progress"]["seconds_left"],
    }  # fmt: skip


def test_no_name_tells_the_model(open_client: Callable[..., TestClient]) -> None:
    client = open_client(12, kind="pairs")
    state = start(client)
    assert [len(item["clips"]) for item in state["items"]] == [2, 2, 2]
    texts = [client.get("/").text, json.dumps(state)]
    texts += [str(dict(client.get(clip["url"]).headers)) for item in state["items"] for clip in item["clips"]]
    for text in texts:
        assert "model_" not in text
        assert ".mp4" not in text


def test_page_and_its_files(open_client: Callable[..., TestClient]) -> None:
    client = open_client()
    page = client.get("/")
    assert "Label &lt;clips&gt;" in page.text
    assert "Look &amp; see." in page.text
    assert "<clips>" not in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for name in ("page.css", "annotate.css", "annotate.js"):
        assert client.get(f"/{name}").status_code == 200
    assert "http" not in page.text.replace("http-equiv", "")


def test_undo_and_skip(open_client: Callable[..., TestClient]) -> None:
    client = open_client(3)
    first = start(client)
    second = label(client, first).json()
    skipped = client.post("/api/skip", json={**ME, "item": second["items"][0]["item"], "key": "s"}).json()
    assert skipped["last"] == second["items"][0]["item"]
    undone = client.post("/api/undo", json={**ME, "item": skipped["last"], "key": "u"}).json()
    assert undone["items"][0] == second["items"][0]
    assert undone["last"] == first["items"][0]["item"]
    refused = client.post("/api/undo", json={**ME, "item": skipped["last"], "key": "v"})
    assert refused.status_code == 409
    assert refused.json()["items"] == undone["items"]


def test_the_same_clip_in_two_browsers(open_client: Callable[..., TestClient]) -> None:
    client = open_client(3)
    state = start(client)
    assert label(client, state).status_code == 200
    assert label(client, state).status_code == 200
    late = label(client, state, "poor", key="another", window="w2")
    assert late.status_code == 409
    assert "judged this one already" in late.json()["error"]
    # The other browser goes on with a clip that the first does not have.
    assert late.json()["items"][0]["item"] != state["items"][0]["item"]
    assert [entry["answers"] for entry in client.study.labels] == [{"physics_quality": "good"}]


def test_a_full_disk_loses_nothing(open_client: Callable[..., TestClient]) -> None:
    client = open_client(3)
    state = start(client)
    state = label(client, state).json()
    with full_disk(client.study.journal.path.stat().st_size + 5):
        refused = label(client, state)
    assert refused.status_code == 507
    assert refused.json()["error"].startswith("nothing was saved: File too large")
    assert start(client)["items"] == state["items"]
    assert label(client, state).status_code == 200
    assert [event["type"] for event in client.study.journal.events] == ["study", "label", "label"]


def test_a_result_that_cannot_be_written_is_told(
    open_client: Callable[..., TestClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(now: Study) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(server_module, "SAVE_SECONDS", 0.0)
    client = open_client(3, save=save)
    answered = label(client, start(client))
    assert answered.status_code == 200
    assert answered.json()["save_error"].startswith("the result was not written (No space left")


def test_people_go_on_while_the_result_is_written(
    open_client: Callable[..., TestClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is how things were when it began."""
    monkeypatch.setattr(server_module, "SAVE_SECONDS", 0.0)
    seen = []

    def save(now: Study) -> None:
        if seen or not now.given:
            return
        for event in now.given.values():
            seen.append(event["item"])
            other = next(item for item in client.study.items if item not in now.given and item != event["item"])
            client.study.skip("bob", client.study.public_id(other), key="s")
        assert len(now.labels) == 1

    client = open_client(4, save=save)
    assert label(client, start(client)).status_code == 200
    assert len(seen) == 1
    assert len(client.study.given) == 2


def test_the_result_is_written_at_the_end(open_client: Callable[..., TestClient]) -> None:
    saved = []
    with open_client(3, save=lambda now: saved.append(len(now.labels))) as client:
        label(client, start(client))
        assert not saved
    assert saved == [1]


@pytest.mark.parametrize(
    "path",
    [
        "/media/../manifest.json", "/media/..%2Fmanifest.json", "/media/%2e%2e/%2e%2e/etc/passwd", "/manifest.json",
        "/media/model_a_00.mp4", "/media/", "/templates/annotate.js", "/api/../x", "/media/" + "0" * 24, "/page.css/",
        "/media/%00",
    ],
)  # fmt: skip
def test_nothing_else_is_served(open_client: Callable[..., TestClient], path: str) -> None:
    assert open_client().get(path).status_code == 404


def test_a_clip_that_is_gone(tmp_path: Path) -> None:
    items = [Item(id="x", clips=(Clip(id="x", video=tmp_path / "gone.mp4", caption=""),))]
    with Journal(tmp_path / "journal.jsonl") as journal:
        study = Study(journal, items, kind="clips", questions=["physics_quality"], labels_per_item=1)
        page = PageSettings(title="", instructions="", questions={"physics_quality": ""})
        client = TestClient(build_app(study, page, lambda now: None), base_url="http://localhost")
        clip = start(client)["items"][0]["clips"][0]
        assert clip["fps"] is None
        assert client.get(clip["url"]).status_code == 410


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8765", "127.0.0.1.evil.example", "10.0.0.1:8765", "", "["]
)
def test_other_hosts_are_refused(open_client: Callable[..., TestClient], host: str) -> None:
    client = open_client()
    assert client.get("/", headers={"Host": host}).status_code == 421
    assert client.post("/api/next", json=ME, headers={"Host": host}).status_code == 421


@pytest.mark.parametrize("host", ["localhost:8765", "127.0.0.1", "[::1]:8765", "LOCALHOST"])
def test_names_of_this_machine_are_served(open_client: Callable[..., TestClient], host: str) -> None:
    assert open_client().get("/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:9999"},
        {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"},
    ],
)  # fmt: skip
def test_other_origins_are_refused(open_client: Callable[..., TestClient], headers: dict[str, str]) -> None:
    client = open_client()
    assert client.post("/api/next", json=ME, headers=headers).status_code == 403
    assert client.get("/", headers=headers).status_code == 403
    own = {"Origin": "http://127.0.0.1:8765", "Sec-Fetch-Site": "same-origin"}
    assert client.post("/api/next", json=ME, headers=own).status_code == 200


def test_a_form_of_another_site_cannot_post(open_client: Callable[..., TestClient]) -> None:
    response = open_client().post("/api/next", content=json.dumps(ME), headers={"Content-Type": "text/plain"})
    assert response.status_code == 415


def test_token(open_client: Callable[..., TestClient]) -> None:
    client = open_client(settings={"token": "a-long-secret", "hosts": ("station",)})
    client.base_url = "http://station:8765"
    for path in ("/", "/page.css", "/?token=", "/?token=wrong", "/page.css?token=a-long-secret"):
        assert client.get(path).status_code == 401
    assert client.post("/api/next", json=ME).status_code == 401
    assert client.post("/api/next", json=ME, headers={"Authorization": "Bearer a-long-secret"}).status_code == 200
    entered = client.get("/?token=a-long-secret", follow_redirects=False)
    assert (entered.status_code, entered.headers["location"]) == (303, "/")
    assert "httponly" in entered.headers["set-cookie"].lower()
    assert "samesite=strict" in entered.headers["set-cookie"].lower()
    # The cookie is enough from now on.
    assert client.get("/").status_code == 200
    url = start(client)["items"][0]["clips"][0]["url"]
    assert client.get(url).status_code == 200
    client.cookies.clear()
    assert client.get(url).status_code == 401


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"annotator": ""}, "`annotator` must be a text of 1 to 64"), ({"annotator": "  "}, "must be a name"),
        ({"annotator": "a\nb"}, "must be a name"), ({"annotator": 3}, "`annotator`"), ({"annotator": "x" * 65}, "64"),
        ({"item": "no"}, "no such clip"), ({"answers": []}, "`answers` must be an object"),
        ({"answers": {"physics_quality": ["good"]}}, "with a text for each"), ({"key": None}, "`key`"),
        ({"key": "\ud800"}, "`key`"), ({"window": "\udfff"}, "`window`"), ({"annotator": "\ud800"}, "`annotator`"),
        ({"answers": {"physics_quality": "\ud800"}}, "must be one of good"), ({"item": "\ud800"}, "`item`"),
        ({"answers": {"\ud800": "good"}}, "expected an answer"), ({"key": ["\ud800"]}, "`key`"),
        ({"seconds": "1"}, "`seconds`"), ({"seconds": -1}, "`seconds`"), ({"seconds": True}, "`seconds`"),
    ],
)  # fmt: skip
def test_bad_requests(open_client: Callable[..., TestClient], values: dict[str, Any], words: str) -> None:
    client = open_client()
    response = label(client, start(client), **values)
    assert response.status_code == 400
    assert words in response.json()["error"]
    assert not client.study.labels


@pytest.mark.parametrize(("body", "status"), [(b"{", 400), (b"[]", 400), (b"\xff", 400), (b" " * 70000, 413)])
def test_bad_bodies(open_client: Callable[..., TestClient], body: bytes, status: int) -> None:
    response = open_client().post("/api/label", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == status


@pytest.mark.parametrize("body", [b"[" * 60000, b"9" * 5000, b'{"a": ' * 9000 + b"1" + b"}" * 9000])
def test_json_that_python_does_not_read(open_client: Callable[..., TestClient], body: bytes) -> None:
    client = open_client()
    response = client.post("/api/label", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert not client.study.labels


def test_each_study_has_its_own_cookie(open_client: Callable[..., TestClient], tmp_path: Path) -> None:
    """Two on one machine: browsers send the cookies of all ports, so one must not take the other's place."""
    names = []
    for _ in range(2):
        client = open_client(settings={"token": "a-long-secret"})
        entered = client.get("/?token=a-long-secret", follow_redirects=False)
        names.append(entered.headers["set-cookie"].split("=")[0])
        (tmp_path / "journal.jsonl").unlink()
    assert names[0] != names[1]


def test_only_those_who_are_named_take_part(open_client: Callable[..., TestClient]) -> None:
    client = open_client(settings={"annotators": ["ann"]})
    start(client)
    refused = client.post("/api/next", json={**ME, "annotator": "bob"})
    assert refused.status_code == 400
    assert "none of the annotators" in refused.json()["error"]


def test_ctrl_c_while_the_server_starts_is_not_lost() -> None:
    """It comes right after the address: the server ends by itself, and the handler from before is back."""
    told, before = [], signal.getsignal(signal.SIGINT)

    def announce() -> None:
        told.append("the address")
        signal.raise_signal(signal.SIGINT)

    serve(Starlette(), listen("127.0.0.1", 0), announce)
    assert told == ["the address"]
    assert signal.getsignal(signal.SIGINT) is before
