"""The store in a reader of another language: zarrita, for JavaScript.

Needs node and the npm package zarrita (``tests.node_packages`` says where); tried with zarrita 0.7.5 on node 20.
"""

from __future__ import annotations

import subprocess

import numpy as np
import pytest

from cache_schema import FeatureStore
from tests.cache_schema.makers import SPECS, extract
from tests.cache_schema.test_format import as_bits, expected_rows
from tests.node_packages import node_package

SCRIPT = """
import * as zarr from "zarrita";
import { FileSystemStore } from "@zarrita/storage";
import { writeFileSync } from "node:fs";
// Before node 24 there are no half floats: their bits are what is compared, and a hole is the NaN of numpy.
globalThis.Float16Array ??= class extends Uint16Array {
  fill(value, ...where) { return super.fill(Number.isNaN(value) ? 0x7e00 : value, ...where); }
};
const [store, name, out] = process.argv.slice(1);
const group = await zarr.open.v3(new FileSystemStore(store), { kind: "group" });
const array = await zarr.open.v3(group.resolve(name), { kind: "array" });
const { data, shape } = await zarr.get(array, null);
writeFileSync(out, new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
console.log(JSON.stringify({ shape, dtype: array.dtype }));
"""


@pytest.fixture(scope="module")
def node_modules():
    return node_package("zarrita")


@pytest.mark.parametrize("modality", ["pooled/layer8", "tokens"])
def test_zarrita_gives_the_same_bits(tmp_path, node_modules, modality):
    extract(tmp_path / "store", list(SPECS), bad={"dog": 1})
    command = ["node", "--input-type=module", "-e", SCRIPT, str(tmp_path / "store"), modality, str(tmp_path / "out")]
    done = subprocess.run(command, cwd=node_modules, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = expected_rows(tmp_path / "store", modality)
    got = np.frombuffer((tmp_path / "out").read_bytes(), np.uint8)
    dtype = np.dtype(FeatureStore.open(tmp_path / "store", modality).spec.dtype)
    assert got.size == expected.size * dtype.itemsize
    np.testing.assert_array_equal(got, as_bits(expected).reshape(-1))
