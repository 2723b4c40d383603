"""The store on Azure's blob storage: same bytes, same commits, same refusals. The server is Microsoft's Azurite.

What does not depend on the kind of store (spans of reads, local copies, messages) is tested in test_objects.py: on S3,
or on both where the fixture is ``bucket``.
"""

from __future__ import annotations

import os

import pytest

from cache_schema import FeatureStore, connections, objects
from cache_schema.connections import StoreUnavailable
from cache_schema.objects import locate
from cache_schema.probe import probe
from tests.cache_schema.makers import WANTED, create, extract, single, write_single
from tests.object_servers import (
    ACCOUNT,
    ACCOUNT_KEY,
    FaultProxy,
    azure_sas,
    use_azure,
    use_no_store,
)


def test_an_object_that_is_replaced_between_its_size_and_its_bytes_is_looked_at_again(az, monkeypatch):
    file, real, left = locate(az) / "growing", objects.ObjectPath.head, 3
    file.write(b"0" * 50)

    def replaced_after(self):
        nonlocal left
        found = real(self)
        if left:
            self.write(str(left).encode() * (10 * left))
            left -= 1
        return found

    monkeypatch.setattr(objects.ObjectPath, "head", replaced_after)
    tail = file.tail(4)
    assert (bytes(tail.data), tail.size, left) == (b"1111", 10, 0)
    left, old = 1, file.pinned(real(file)[1])
    with pytest.raises(connections.ObjectChanged):  # this one asked for a version
        old.tail(4)


# ---------------------------------------------------------------- commits


def test_a_shard_of_any_size_goes_up_in_one_request_and_is_not_copied(az, azurite, monkeypatch):
    monkeypatch.setattr(objects, "SINGLE_PUT", 1000)
    store = create(locate(az))
    store.extend_plan(WANTED)
    with FaultProxy(azurite.port) as proxy:
        use_azure(monkeypatch, proxy.port)
        write_single(store, store.pending()[0], single())
    written = [path for method, path, _ in proxy.seen if method in ("PUT", "POST")]
    assert [path.partition("/tokens/c.")[2] for path in written] == ["0.0.0"]


@pytest.mark.parametrize("large", [False, True])
def test_an_exchange_of_one_version_is_one_request_at_any_size(az, monkeypatch, tmp_path, large):
    monkeypatch.setattr(objects, "SINGLE_PUT", 100)
    (tmp_path / "new").write_bytes(b"new" * (100 if large else 1))
    file = locate(az) / "one"
    file.write(b"old")
    old = file.head()[1]
    assert file.exchange(tmp_path / "new", old) == file.head()[1] != old
    assert file.exchange(b"newer", old) is None
    assert file.exchange(tmp_path / "new", old) is None
    assert file.read_bytes(1000) == (tmp_path / "new").read_bytes()


# ---------------------------------------------------------------- requests and refusals


def test_a_wrong_key_and_a_wrong_signature_are_refused_at_once_and_not_shown(az, azurite, monkeypatch):
    use_azure(monkeypatch, azurite.port, sas=azure_sas())
    assert create(locate(az) / "by-signature").modality == "tokens"
    wrong = {"AZURE_STORAGE_ACCOUNT_KEY": "d3Jvbmc=", "AZURE_STORAGE_SAS_KEY": "sv=2021-12-02&sig=canary"}
    for name, value in wrong.items():
        use_azure(monkeypatch, azurite.port)
        monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_KEY")
        monkeypatch.setenv(name, value)
        with FaultProxy(azurite.port) as proxy:
            monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", f"http://127.0.0.1:{proxy.port}/{ACCOUNT}")
            with pytest.raises(StoreUnavailable, match=r"the store refused it \(403") as caught:
                create(locate(az))
        assert caught.value.refused
        assert len(proxy.seen) == 1
        assert not [secret for secret in ("d3Jvbmc", "canary", ACCOUNT_KEY) if secret in str(caught.value)]
        assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("scheme", "environment"),
    [
        ("az", {}),
        ("az", {"AZURE_STORAGE_ACCOUNT_NAME": "a", "AZURE_STORAGE_ACCOUNT_KEY": "canary!"}),
        ("az", {"AZURE_STORAGE_ACCOUNT_NAME": "a", "AZURE_STORAGE_SAS_KEY": "canary"}),
        ("gs", {"GOOGLE_SERVICE_ACCOUNT": "/canary/none.json"}),
        ("gs", {"GOOGLE_SERVICE_ACCOUNT_KEY": "{'canary': 1}"}),
    ],
)
def test_an_environment_that_cannot_be_used_is_said_without_repeating_it(monkeypatch, scheme, environment):
    use_no_store(monkeypatch)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    url = f"{scheme}://features/x"
    for use_it in (FeatureStore.open, create):
        with pytest.raises(StoreUnavailable, match=f"{scheme}:// cannot be used with what the environment") as caught:
            use_it(locate(url), "tokens")
        assert caught.value.refused
        assert "canary" not in str(caught.value)
        assert caught.value.__suppress_context__


def test_an_environment_without_credentials_is_said_at_once(monkeypatch):
    use_no_store(monkeypatch, max_retries=0)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
    monkeypatch.setenv("AZURE_MSI_ENDPOINT", "http://127.0.0.1:1")  # a machine of Azure's would have credentials there
    with pytest.raises(StoreUnavailable, match="no credentials for az:// were found in the environment") as caught:
        FeatureStore.open(locate("az://features/x"), "tokens")
    assert caught.value.refused
    assert ACCOUNT not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "endpoint", "said"),
    [
        ("AZURE_STORAGE_ENDPOINT", "http://192.0.2.7:9000/a", "plain http to 192.0.2.7"),
        ("AZURE_ENDPOINT", "http://192.0.2.7/a", "plain http to 192.0.2.7"),
        ("AZURE_STORAGE_ENDPOINT", "https://user:canary@a.example", "user name"),
        ("AZURE_STORAGE_ENDPOINT", "https://a.example/?sv=2021&sig=canary", "option"),
        ("AZURITE_BLOB_STORAGE_URL", "http://192.0.2.7:10000", "plain http to 192.0.2.7"),
        ("AWS_ENDPOINT_URL_S3", "http://192.0.2.7:9000", "plain http to 192.0.2.7"),
        ("GOOGLE_BASE_URL", "http://192.0.2.7:9000", "plain http to 192.0.2.7"),
    ],
)
def test_credentials_do_not_travel_unprotected_or_in_the_endpoint(monkeypatch, name, endpoint, said):
    use_azure(monkeypatch, 1)
    monkeypatch.setenv(name, endpoint)
    scheme = {"AZ": "az", "AW": "s3", "GO": "gs"}[name[:2]]
    with pytest.raises(StoreUnavailable, match=said) as caught:
        FeatureStore.open(locate(f"{scheme}://features/x"), "tokens")
    assert "canary" not in str(caught.value)


def test_the_emulator_is_reached_by_its_own_variables(az, azurite, monkeypatch):
    use_no_store(monkeypatch)
    monkeypatch.setenv("AZURE_STORAGE_USE_EMULATOR", "true")
    monkeypatch.setenv("AZURITE_BLOB_STORAGE_URL", f"http://127.0.0.1:{azurite.port}")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", ACCOUNT_KEY)
    assert extract(locate(az))["tokens"].pending() == []


def test_what_is_uploaded_takes_no_memory_of_its_own(az, tmp_path):
    with (tmp_path / "large").open("wb") as file:
        os.truncate(file.fileno(), 64 << 20)
    before = anonymous_memory()
    assert (locate(az) / "large").create(tmp_path / "large") is not None
    assert anonymous_memory() - before < 32 << 20
    assert (locate(az) / "large").head()[0] == 64 << 20


def anonymous_memory():
    with open("/proc/self/status") as status:
        (line,) = [line for line in status if line.startswith("RssAnon")]
    return int(line.split()[1]) << 10


def test_everything_that_a_cache_relies_on_is_there(az):
    assert [one.name for one in probe(locate(az)) if not one.ok] == []
