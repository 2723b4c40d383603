"""Forked DataLoader workers over a store that zarr has read in the parent (case 47): zarr itself deadlocks there."""

from __future__ import annotations

import multiprocessing

import numpy as np
import zarr

from tests.cache_schema.makers import WANTED, extract, features


class Videos:
    """A map-style dataset of the good videos."""

    def __init__(self, store):
        self.store, self.videos = store, sorted(set(WANTED) - {"dog"})

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, at):
        return self.videos[at], self.store.read(self.videos[at], list(WANTED[self.videos[at]]), verify=True)


def test_47_workers_read_after_the_parent_used_zarr_and_do_not_hang(tmp_path):
    from torch.utils.data import DataLoader

    store = extract(tmp_path, bad={"dog": 1})["tokens"]
    assert zarr.open_group(tmp_path, mode="r")["tokens"][0].shape == (5, 7)  # starts zarr's threads in this process
    context = multiprocessing.get_context("fork")
    loader = DataLoader(Videos(store), batch_size=None, num_workers=2, multiprocessing_context=context, timeout=120)
    for video, got in loader:
        np.testing.assert_array_equal(got, features("tokens", video, list(WANTED[video])))
