"""Stores behind a URL: equal to the same store on the disk, concurrent, bounded, and plain about what goes wrong."""

import builtins
import json
import shutil
from dataclasses import fields
from itertools import product

import numpy as np
import pytest
import torch

from tests.serving import serving
from tests.unit.stores import assert_holds, card, episode, filled
from worldmodels.data import remote
from worldmodels.data.datamodule import StoreDataModule
from worldmodels.data.inspection import inspect
from worldmodels.data.mixing import Mixture
from worldmodels.data.remote import RemoteStore
from worldmodels.data.scan import episode_returns, event_steps
from worldmodels.data.store import Store
from worldmodels.data.transforms import Transform
from worldmodels.data.verify import verify
from worldmodels.types import Segment, UserError


@pytest.fixture
def server(tmp_path):
    (tmp_path / "www").mkdir()
    with serving(tmp_path / "www") as it:
        yield it


@pytest.fixture(params=["http", "file"])
def address(request, server):
    """The URL of what lies in the folder `server.root`."""
    return server.url if request.param == "http" else f"file://{server.root}"


def sealed(path, count=13, seal_at=(4, 8, 12), **kw):
    return filled(path, count, seal_at, **kw)


def every_window(store):
    return [(i, start) for i, n in enumerate(store.lengths) for start in range(-3, n + 2, 5)]


def equal(a: Segment, b: Segment):
    for f in fields(Segment):
        x, y = getattr(a, f.name), getattr(b, f.name)
        pairs = zip(x.values(), y.values(), strict=True) if f.name == "side" else [(x, y)]
        assert all(torch.equal(v, w) and v.dtype == w.dtype for v, w in pairs), f.name


@pytest.mark.parametrize("channels", [1, 3])
def test_it_is_the_store_on_the_disk(server, address, channels):
    local, episodes = sealed(
        server.root / "a b" if address.startswith("file") else server.root / "s", channels=channels
    )
    store = Store.open(f"{address}/{local.path.name}/")
    assert isinstance(store, RemoteStore)
    assert (store.uuid, store.card) == (local.uuid, local.card)
    assert_holds(store, episodes)
    for length in (1, 7, 40):
        equal(store.read(every_window(local), length), local.read(every_window(local), length))
    for name in ("action", "reward", "flags"):
        np.testing.assert_array_equal(store.column(name), local.column(name))
    assert [store.episode_info(i) for i in range(13)] == [local.episode_info(i) for i in range(13)]
    np.testing.assert_array_equal(episode_returns(store), episode_returns(local))
    for a, b in zip(event_steps(store, np.arange(13)), event_steps(local, np.arange(13)), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(IndexError):
        store.read([(13, 0)], 3)


def test_splits_are_the_published_ones_or_drawn_alike(server, address):
    local, _ = sealed(server.root / "s")
    drawn = Store.open(f"{address}/s").splits
    assert not (server.root / "s" / "splits").exists()
    assert {k: v.tolist() for k, v in local.splits.items()} == {k: v.tolist() for k, v in drawn.items()}
    kept = {"train": [], "validation": [3], "test": [5, 6]}
    (server.root / "s" / "splits" / "default.json").write_text(json.dumps(kept))
    found = Store.open(f"{address}/s").splits
    assert {k: v.tolist() for k, v in found.items() if k != "train"} == {"validation": [3], "test": [5, 6]}


def test_only_what_is_sealed_is_seen_and_it_grows(server, address):
    filled(server.root / "s", 7, (2,))
    store = Store.open(f"{address}/s")
    assert len(store.lengths) == 3
    with Store.open(server.root / "s", write=True) as writer:
        writer.seal()
        for i in range(7, 20):
            writer.append(episode(i, 3))
            writer.seal()
    assert len(store.lengths) == 3
    store.refresh()
    local = Store.open(server.root / "s")
    np.testing.assert_array_equal(store.lengths, local.lengths)
    assert [p.name for p in store.sealed] == [p.name for p in local.sealed]
    windows = [(i, 0) for i in range(20)]
    equal(store.read(windows, 5), local.read(windows, 5))


def test_stores_that_do_not_name_their_source(server):
    local, _ = sealed(server.root / "s")
    header = json.loads((local.path / "store.json").read_text())
    assert header.pop("source") == "toy"
    (local.path / "store.json").write_text(json.dumps(header))
    np.testing.assert_array_equal(Store.open(f"file://{local.path}").lengths, local.lengths)  # here folders are listed
    with pytest.raises(UserError, match='does not name its source, and the server lists no folders; add "source"'):
        Store.open(f"{server.url}/s")


def test_side_columns(server, address):
    local, _ = sealed(server.root / "s")
    rows = np.arange(0, local.offsets[-1], 3)
    local.write_side("value", "v1", rows, np.arange(len(rows) * 2, dtype=np.float32).reshape(-1, 2))
    store = Store.open(f"{address}/s")
    a, b = store.side("value"), local.side("value")
    np.testing.assert_array_equal(a.filled(-1), b.filled(-1))
    with pytest.raises(UserError, match="there is no side column"):
        store.side("other")
    with pytest.raises(UserError, match="is a URL"):
        store.write_side("value", "v2", [0], np.zeros(1))


def test_a_batch_is_read_at_once(server):
    local, _ = sealed(server.root / "s", 24, range(24), length=40)
    store, windows = Store.open(f"{server.url}/s"), [(i, 4) for i in range(24)]
    server.delay, server.busiest = 0.05, 0
    server.asked.clear()
    batch = store.read(windows, 20)
    requests = sum(server.asked.values())
    assert server.busiest >= 12 and requests > 100, (server.busiest, requests)
    equal(batch, local.read(windows, 20))
    server.asked.clear()
    equal(store.read(windows, 20), batch)
    assert not server.asked  # all of it was kept


def test_memory_is_bounded(server, monkeypatch):
    """A pool smaller than the data: chunks are fetched again, and are right."""
    monkeypatch.setattr(remote, "CACHE_BYTES", 20_000)
    remote._context.cache_clear()
    try:
        local, _ = sealed(server.root / "s", 12, range(12), length=200)
        store, windows = Store.open(f"{server.url}/s"), [(i, 30) for i in range(12)]
        for _ in range(2):
            server.asked.clear()
            equal(store.read(windows, 150), local.read(windows, 150))
            assert any("/obs/c/" in path for path in server.asked)
    finally:
        remote._context.cache_clear()


def test_training_batches_and_mixtures(server, tmp_path):
    a, _ = sealed(server.root / "a")
    b, _ = sealed(tmp_path / "b", count=6, seal_at=(5,), side=12)
    urls = [f"{server.url}/a", str(b.path)]
    mix, local = Mixture(urls, Transform(8)), Mixture([a.path, b.path], Transform(8))
    windows = [(0, 0), (14, 1), (5, -2), (18, 0)]
    equal(mix.read(windows, 6), local.read(windows, 6))
    settings = dict(batch_size=4, length=6, event_share=0.5, validation={"windows": 5})
    there, here = StoreDataModule(urls[0], **settings), StoreDataModule(str(a.path), **settings)
    for x, y, _ in zip(there.train_dataloader(), here.train_dataloader(), range(4), strict=False):
        equal(x, y)
    for x, y in zip(there.val_dataloader(), here.val_dataloader(), strict=True):
        equal(x, y)
    with pytest.raises(UserError, match="data.workers=1 cannot be had with http.*data.workers=0"):
        StoreDataModule(urls[0], workers=1, **settings)
    with pytest.raises(UserError, match="data.workers=1 cannot be had"):
        StoreDataModule(urls, workers=1, transform={"size": 8}, **settings)


def test_inspection(server, address):
    local, _ = sealed(server.root / "s")
    a, b = inspect(Store.open(f"{address}/s")), inspect(local)
    assert a["store"] == f"{address}/s" and 0 < a["bytes"] < b["bytes"]
    differ = ("store", "bytes", "bytes_per_frame")
    assert {k: v for k, v in a.items() if k not in differ} == {k: v for k, v in b.items() if k not in differ}


def test_nothing_is_written(server, address):
    sealed(server.root / "s")
    for refused in (
        lambda url: Store.create(url, card()),
        lambda url: Store.open(url, write=True),
        verify,
    ):
        with pytest.raises(UserError, match="is a URL, and .*; give ") as error:
            refused(f"{address}/s")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("url", ["ftp://host/s", "memory://s", "https://host/s?token=1"])
def test_addresses_that_are_not_read(url):
    with pytest.raises(UserError, match="must be a folder on the disk, or a URL that begins with http://"):
        Store.open(url)


def sentence(work):
    with pytest.raises(UserError) as error:
        work()
    text = str(error.value)
    assert "\n" not in text and len(text) < 500, text
    return text


def test_what_is_not_there(server, address):
    assert "there is no store at" in sentence(lambda: Store.open(f"{address}/none"))
    (server.root / "text").write_text("hello")
    assert "there is no store at" in sentence(lambda: Store.open(f"{address}/text"))
    filled(server.root / "staged", 3, ())
    assert "holds no sealed episodes" in sentence(lambda: Store.open(f"{address}/staged"))
    local, _ = sealed(server.root / "s")
    (local.path / "sources" / "toy.json").unlink()
    assert "toy.json is damaged (it is missing)" in sentence(lambda: Store.open(f"{address}/s"))


def test_a_bucket_that_may_be_read_but_not_listed(server):
    """It refuses what is missing, so that the end of the segments and splits that were never drawn look forbidden."""
    local, _ = sealed(server.root / "s")
    filled(server.root / "staged", 3, ())
    server.missing = 403
    store, windows = Store.open(f"{server.url}/s"), every_window(local)
    assert len(store.sealed) == len(local.sealed) == 3
    equal(store.read(windows, 7), local.read(windows, 7))
    assert {k: v.tolist() for k, v in store.splits.items()} == {k: v.tolist() for k, v in local.splits.items()}
    with pytest.raises(UserError, match="there is no side column"):
        store.side("value")
    assert "see that they may be read" in sentence(lambda: Store.open(f"{server.url}/staged"))
    for right in ("s3:GetObject", "s3:ListBucket"):
        assert right in sentence(lambda: Store.open(f"{server.url}/none"))


def test_a_server_that_is_gone_or_refuses(server, monkeypatch):
    monkeypatch.setitem(remote._RETRIES, "max_retries", 1)
    remote._context.cache_clear()
    sealed(server.root / "s")
    url = f"{server.url}/s"
    for part in ("store.json", "sources/", "000001.zarr/zarr.json"):
        server.deny = part
        text = sentence(lambda: Store.open(url))
        assert "403" in text and part in text and "damaged" not in text
    server.deny = "splits"
    store = Store.open(url)
    assert "403" in sentence(lambda: store.splits)
    for part in ("obs/zarr.json", "obs/c/", "reward/c/"):
        remote._context.cache_clear()
        server.deny = "\0"
        store, server.deny = Store.open(url), part
        assert part.split("/")[0] in sentence(lambda s=store: s.read([(0, 0)], 3))
    server.deny = "\0"
    store = Store.open(url)
    server.gone = True
    assert "cannot be read" in sentence(lambda: store.read([(12, 0)], 3))
    assert "cannot be read" in sentence(lambda: Store.open(url))
    remote._context.cache_clear()


def harmed(path, harm):
    data = path.read_bytes()
    if harm == "gone":
        path.unlink()
    elif harm == "half":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.write_bytes(data[:40] + bytes([data[40] ^ 1]) + data[41:])


@pytest.mark.parametrize(
    "name, harm",
    [
        *product(["obs/c/0/0/0/0", "obs/zarr.json", "final_obs/c/0/0/0/0"], ["gone", "half", "flipped"]),
        *product(["action/c/0", "reward/c/0"], ["gone", "half"]),  # they have no checksum that a reader sees
    ],
)
def test_damage_behind_the_url(server, address, tmp_path, name, harm):
    local, _ = sealed(tmp_path / "whole")
    shutil.copytree(local.path, server.root / "s")
    harmed(server.root / "s" / "segments" / "toy" / "000001.zarr" / name, harm)
    store = Store.open(f"{address}/s")
    equal(store.read([(0, 0), (10, 0)], 60), local.read([(0, 0), (10, 0)], 60))
    text = sentence(lambda: store.read([(i, 0) for i in range(5, 9)], 60))
    assert name.partition("/")[0] in text and "damaged" in text
    if name == "reward/c/0":
        assert "damaged" in sentence(lambda: store.column("reward"))


@pytest.mark.parametrize("name", ["store.json", "sources/toy.json", "segments/toy/000001.zarr/zarr.json"])
def test_damaged_json(server, address, name):
    sealed(server.root / "s")
    harmed(server.root / "s" / name, "half")
    assert "damaged" in sentence(lambda: Store.open(f"{address}/s"))


@pytest.mark.parametrize("scheme, package", [("http", "tensorstore"), ("gs", "gcsfs"), ("s3", "s3fs")])
def test_what_is_not_installed(server, monkeypatch, scheme, package):
    sealed(server.root / "s")
    real = builtins.__import__

    def without(name, *rest):
        if name.partition(".")[0] == package:
            raise ImportError(f"No module named {package!r}")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    text = sentence(lambda: Store.open(f"{server.url}/s" if scheme == "http" else f"{scheme}://bucket/s"))
    assert "damaged" not in text
    assert package in text and 'pip install "worldmodels[cloud]"' in text
