"""Readers on small generated data roots: every layout, damage, absence, read-only roots and the cache."""

from __future__ import annotations

import gzip
import struct
import types
import zipfile
from pathlib import Path
from typing import Literal, get_args, get_origin

import numpy as np
import pytest
import torch
from PIL import Image

from relief_export.errors import InputError, IntegrityError
from relief_export.recipe import DataConfig
from relief_export.schema import fields_of
from relief_export.training import data as sources
from relief_export.training import pixels
from relief_export.training.data import SOURCES, load_data, read_idx

PARTS = {"train": 12, "t10k": 6}


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    folder = tmp_path / "root"
    folder.mkdir()
    monkeypatch.setenv("RELIEF_DATA", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_mnist(folder, *, zipped):
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for part, count in PARTS.items():
        files = {
            f"{part}-images-idx3-ubyte": generator.integers(0, 256, (count, 28, 28), dtype=np.uint8),
            f"{part}-labels-idx1-ubyte": (np.arange(count) % 3).astype(np.uint8),
        }
        for name, array in files.items():
            if zipped:
                (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
            else:
                (folder / name).write_bytes(idx(array))


def picture(number, side=8):
    """A picture that tells its number: one colour, lossless."""
    return Image.new("RGB", (side, side), (number, 255 - number, 7))


def write_tree(folder, *, counts=(6, 3), suffix="png", sides=(8, 8)):
    for part, count, side in zip(("train", "test"), counts, sides, strict=True):
        for label, name in enumerate(("ape", "bee")):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                picture(10 * number + label, side).save(folder / part / name / f"{number}.{suffix}")


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    ("source", "folder"),
    [
        ("mnist", "MNIST/raw"),
        ("mnist", "mnist"),
        ("fashion-mnist", "FashionMNIST/raw"),
        ("fashion-mnist", "fashion-mnist"),
    ],
)
def test_idx_files_are_found_gzipped_or_not(root, source, folder, zipped):
    write_mnist(root / folder, zipped=zipped)
    train, test = SOURCES[source].load(DataConfig(source))
    assert (len(train), len(test), train.classes[9]) == (12, 6, "9")
    assert train.pixels.tensor.shape == (12, 1, 28, 28)
    expected = np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8)
    assert np.array_equal(train.pixels.tensor[:, 0].numpy(), expected)
    assert train.labels.tolist() == [0, 1, 2] * 4
    resized, _ = SOURCES[source].load(DataConfig(source, size=14))
    assert resized.pixels.tensor.shape == (12, 1, 14, 14)


@pytest.mark.parametrize("zipped", [False, True])
def test_damaged_idx_files_are_refused_by_name(root, zipped):
    write_mnist(root / "mnist", zipped=zipped)
    suffix = ".gz" if zipped else ""
    path = root / "mnist" / f"train-images-idx3-ubyte{suffix}"
    whole = path.read_bytes()
    for content in (whole[:-9], whole[:3], b"", b"\x00\x00\x0d\x01" + whole[4:]):
        path.write_bytes(content)
        with pytest.raises(IntegrityError, match=r"train-images-idx3-ubyte.* is not a whole IDX file"):
            load_data(DataConfig("mnist"), 0)
    path.write_bytes(whole)
    (root / "mnist" / f"t10k-labels-idx1-ubyte{suffix}").unlink()
    with pytest.raises(InputError, match=r"t10k-labels-idx1-ubyte does not exist"):
        load_data(DataConfig("mnist"), 0)


def test_images_and_labels_must_agree(root):
    write_mnist(root / "mnist", zipped=False)
    (root / "mnist" / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(5, np.uint8)))
    with pytest.raises(IntegrityError, match=r"has 12 train images but 5 labels"):
        load_data(DataConfig("mnist"), 0)


def test_trees_and_archives_of_pictures_hold_the_same(root):
    write_tree(root / "cifar10")
    tree = SOURCES["cifar10"].load(DataConfig("cifar10"))
    write_tree(root / "loose")
    (root / "cifar100").mkdir()
    for archive, pattern in (("train-1", "train/*/[0-2].png"), ("train-2", "train/*/[3-9].png"), ("test", "test/*/*")):
        with zipfile.ZipFile(root / "cifar100" / f"{archive}.zip", "w") as opened:
            for path in sorted((root / "loose").glob(pattern)):
                opened.write(path, path.relative_to(root / "loose"))
    zips = SOURCES["cifar100"].load(DataConfig("cifar100"))
    for from_tree, from_zips in zip(tree, zips, strict=True):
        assert from_tree.classes == from_zips.classes == ("ape", "bee")
        both = [sorted(zip(part.labels.tolist(), _codes(part), strict=True)) for part in (from_tree, from_zips)]
        assert both[0] == both[1]
        assert all(code % 10 == label for label, code in both[0])


def _codes(raw):
    return raw.pixels.decode(torch.arange(len(raw)))[:, 0, 0, 0].tolist()


def test_streamed_and_stored_pictures_are_the_same(root):
    write_tree(root / "mine", counts=(12, 3), suffix="PNG")

    def batches(placement):
        data = load_data(DataConfig("folder", folder="mine", placement=placement, validation=4), 0)
        return list(data.train.batches(4, shuffle=torch.Generator().manual_seed(0), augment=True))

    streamed, stored = batches("stream"), batches("memory")
    assert len(streamed) == len(stored) == 5
    for (x, y), (x_stored, y_stored) in zip(streamed, stored, strict=True):
        assert torch.equal(x, x_stored)
        assert torch.equal(y, y_stored)


def test_auto_placement_goes_by_size(root, monkeypatch):
    write_tree(root / "mine")
    config = DataConfig("folder", folder="mine")
    assert isinstance(load_data(config, 0).train.pixels, pixels.MemoryPixels)
    monkeypatch.setattr("relief_export.training.data.MEMORY_LIMIT", 12 * 8 * 8 * 3 - 1)
    data = load_data(config, 0)
    assert isinstance(data.train.pixels, pixels.FilePixels)
    assert isinstance(data.test.pixels, pixels.MemoryPixels)


def test_pictures_of_different_sizes_need_a_size(root):
    write_tree(root / "mine", sides=(8, 12))
    picture(3, 10).save(root / "mine" / "train" / "ape" / "odd.png")
    with pytest.raises(InputError, match=r"odd\.png has size \(10, 10\), others \(8, 8\): set data\.size"):
        load_data(DataConfig("folder", folder="mine"), 0)
    assert load_data(DataConfig("folder", folder="mine", size=9), 0).input_shape == (3, 9, 9)


def test_tiny_imagenet_takes_its_labelled_validation_part_as_the_test_set(root):
    folder = root / "tiny-imagenet-200"
    for label, name in enumerate(("n01", "n02")):
        (folder / "train" / name / "images").mkdir(parents=True)
        for number in range(5):
            picture(10 * number + label, 64).save(
                folder / "train" / name / "images" / f"{name}_{number}.JPEG", quality=100
            )
    (folder / "val" / "images").mkdir(parents=True)
    (folder / "test" / "images").mkdir(parents=True)
    picture(0, 64).save(folder / "test" / "images" / "test_0.JPEG")
    lines = []
    for number in range(4):
        picture(10 * number + number % 2, 64).save(folder / "val" / "images" / f"val_{number}.JPEG", quality=100)
        lines.append(f"val_{number}.JPEG\tn0{number % 2 + 1}\t0\t0\t62\t62")
    (folder / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    train, test = SOURCES["tiny-imagenet"].load(DataConfig("tiny-imagenet"))
    assert (len(train), train.classes) == (10, ("n01", "n02"))
    assert [test.labels[number].item() for number in range(4)] == [0, 1, 0, 1]
    assert [abs(code - 10 * number - number % 2) <= 2 for number, code in enumerate(_codes(test))] == [True] * 4
    assert load_data(DataConfig("tiny-imagenet", validation=2), 0).input_shape == (3, 64, 64)


def test_decoded_pictures_are_kept_in_the_cache_and_a_changed_file_is_read_again(root, tmp_path, monkeypatch):
    write_tree(root / "cifar10")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    config = DataConfig("cifar10")
    first = load_data(config, 0).train.tensors()[0]
    assert len(list((tmp_path / "cache" / "relief-export" / "decoded").iterdir())) == 2
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before  # the root is only read
    with monkeypatch.context() as patched:
        patched.setattr(pixels.FilePixels, "decode", lambda *_: pytest.fail("decoded again"))
        assert torch.equal(load_data(config, 0).train.tensors()[0], first)
    picture(200).save(root / "cifar10" / "train" / "ape" / "0.png")
    assert not torch.equal(load_data(config, 0).train.tensors()[0], first)


def test_unreadable_pictures_and_archives_are_refused_by_name(root):
    write_tree(root / "mine")
    bad = root / "mine" / "train" / "bee" / "1.png"
    bad.write_bytes(bad.read_bytes()[:40])
    with pytest.raises(IntegrityError, match=r"train/bee/1\.png is not a readable picture"):
        load_data(DataConfig("folder", folder="mine"), 0)
    (root / "cifar10").mkdir()
    (root / "cifar10" / "train-1.zip").write_bytes(b"PK\x03\x04 no")
    with pytest.raises(IntegrityError, match=r"train-1\.zip is not a whole zip archive"):
        load_data(DataConfig("cifar10"), 0)


def test_incomplete_trees_are_refused(root):
    with pytest.raises(InputError, match=r'"folder" needs data\.folder'):
        load_data(DataConfig("folder"), 0)
    with pytest.raises(InputError, match=r"there is no .*absent"):
        load_data(DataConfig("folder", folder="absent"), 0)
    write_tree(root / "mine")
    (root / "mine" / "test" / "cow").mkdir()
    picture(0).save(root / "mine" / "test" / "cow" / "0.png")
    with pytest.raises(InputError, match=r'test pictures of class "cow", which has no training pictures'):
        load_data(DataConfig("folder", folder="mine"), 0)
    (root / "only").mkdir()
    with pytest.raises(InputError, match=r"only has no train/CLASS/ pictures"):
        load_data(DataConfig("folder", folder="only"), 0)


def test_a_missing_data_root_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("RELIEF_DATA", str(tmp_path / "absent"))
    with pytest.raises(InputError, match=r"the data root .*absent does not exist: set RELIEF_DATA"):
        load_data(DataConfig("mnist"), 0)
    monkeypatch.delenv("RELIEF_DATA")
    with pytest.raises(InputError, match=r"the data root .*gone does not exist: set data\.root"):
        load_data(DataConfig("mnist", root=str(tmp_path / "gone")), 0)
    assert sources.data_root(DataConfig("mnist")) == tmp_path / "cache" / "relief-export"


@pytest.mark.parametrize("writable", [True, False])
def test_what_is_absent_is_downloaded_into_the_root_or_the_cache(root, tmp_path, monkeypatch, writable):
    def fetch(target, *, train, download):
        assert download
        if train:
            write_mnist(Path(target) / "MNIST" / "raw", zipped=False)

    fake = types.SimpleNamespace(datasets=types.SimpleNamespace(MNIST=fetch))
    monkeypatch.setattr(sources, "import_torchvision", lambda: fake)
    monkeypatch.setattr(sources.os, "access", lambda *_: writable)
    assert len(load_data(DataConfig("mnist", validation=2), 0).test) == 6
    assert any(root.iterdir()) == writable
    assert (tmp_path / "cache").exists() != writable


def test_a_failed_download_and_a_damaged_copy_are_one_sentence(root, monkeypatch):
    def fail(*_, **__):
        raise OSError("no route")

    fake = types.SimpleNamespace(datasets=types.SimpleNamespace(MNIST=fail))
    with monkeypatch.context() as patched:
        patched.setattr(sources, "import_torchvision", lambda: fake)
        with pytest.raises(InputError, match=r"MNIST is not under .*root and could not be downloaded \(no route\)"):
            load_data(DataConfig("mnist"), 0)
    (root / "cifar-10-batches-py").mkdir()
    (root / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(IntegrityError, match=r"cifar-10-batches-py is damaged or incomplete"):
        load_data(DataConfig("cifar10"), 0)


def test_read_idx_keeps_order_and_shape(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "a").write_bytes(idx(array))
    assert np.array_equal(read_idx(tmp_path / "a"), array)


def test_every_source_that_a_recipe_may_name_has_a_row():
    named = [kind for kind in get_args(fields_of(DataConfig)["source"]) if get_origin(kind) is Literal]
    assert {source for kind in named for source in get_args(kind)} == set(SOURCES)
