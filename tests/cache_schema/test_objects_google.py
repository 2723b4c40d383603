"""How a cache asks Google Cloud Storage, on a stand-in of our own: no real one was tried, nor a server of Google's.

Google exchanges an object by its generation, not by its entity tag.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from cache_schema import FeatureStore, objects, verify
from cache_schema.connections import StoreUnavailable
from cache_schema.objects import locate
from cache_schema.probe import probe
from tests.cache_schema.makers import SPECS, create, extract, features
from tests.cache_schema.test_objects import FAILING, bytes_of, files_of
from tests.object_servers import TOKEN, GoogleStandIn, use_google

GENERATION = "x-goog-if-generation-match"


@pytest.fixture
def google(monkeypatch):
    with GoogleStandIn("features") as server:
        use_google(monkeypatch, server.port)
        yield server


@pytest.mark.parametrize("single_put", [objects.SINGLE_PUT, 1000])
def test_a_store_is_byte_for_byte_the_local_one_and_every_commit_is_on_a_condition(
    google, tmp_path, monkeypatch, single_put
):
    monkeypatch.setattr(objects, "SINGLE_PUT", single_put)
    extract(tmp_path, list(SPECS), **FAILING)
    stores = extract(locate("gs://features/x"), list(SPECS), **FAILING)
    assert bytes_of("gs://features/x") == files_of(tmp_path)
    for modality, store in stores.items():
        assert verify.full(store) == []
        assert (store.read("cat", [19, 0], verify=True) == features(modality, "cat", [19, 0])).all()
    commits = [
        headers for method, path, headers in google.seen if method == "PUT" and "/c." in path and path.endswith(".0")
    ]
    assert commits
    assert {headers.get(GENERATION) for headers in commits} == {"0"}


def test_an_exchange_names_the_generation_of_the_version_that_was_looked_at(google):
    file = locate("gs://features/one")
    file.write(b"old")
    old = file.head()[1]
    google.seen.clear()
    assert file.exchange(b"new", old) == file.head()[1] != old
    (put,) = [headers for method, _, headers in google.seen if method == "PUT"]
    assert int(put[GENERATION]) > 0
    assert file.exchange(b"newer", old) is None
    assert file.read_bytes(10) == b"new"


def test_growths_of_the_plan_and_retries_at_once_lose_nothing(google):
    url = "gs://features/x"
    extract(locate(url), bad={"bee": 1})
    assert google.seen
    stores = [FeatureStore.open(url, "tokens") for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda at: stores[at].extend_plan({f"video{at}": range(at + 3)}), range(4)))
    assert {f"video{number}" for number in range(4)} <= set(FeatureStore.open(url, "tokens").plan.videos)
    extract(locate(url), retry_failed=True)
    assert FeatureStore.open(url, "tokens").status()["bee"].ok


def test_everything_is_there_and_nothing_is_left(google):
    assert [one for one in probe(locate("gs://features/x")) if not one.ok] == []
    assert bytes_of("gs://features/x") == {}
    assert google.seen


def test_a_refusal_and_a_bucket_that_is_not_there_are_said_without_the_token(google, monkeypatch):
    with pytest.raises(StoreUnavailable, match="there is no bucket 'none', or it is not yours") as caught:
        create(locate("gs://none/x"))
    assert TOKEN not in str(caught.value)
    use_google(monkeypatch, google.port)
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", f"{TOKEN}-wrong")
    with pytest.raises(StoreUnavailable, match=r"the store refused it \(401") as caught:
        create(locate("gs://features/x"))
    assert TOKEN not in str(caught.value)
