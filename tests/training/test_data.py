"""Splits and batches: stratified, seeded, sharded, and augmented like the plain loops below say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from relief_export.errors import InputError
from relief_export.recipe import DataConfig
from relief_export.training.data import IMAGENET_MEAN, IMAGENET_STD, Split, crop_and_flip, load_data, stratified

CPU = torch.device("cpu")
DIGITS = DataConfig("digits", validation=0.15)


@pytest.fixture(scope="module")
def digits():
    return load_data(DIGITS, seed=0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=80), st.integers(1, 80), st.integers(0, 9))
def test_spread_takes_each_class_by_its_share(labels, count, seed):
    labels, count = torch.tensor(labels), min(count, len(labels))
    chosen = stratified(labels, count, seed)
    assert len(set(chosen.tolist())) == len(chosen) == count
    assert chosen.tolist() == sorted(chosen.tolist())
    for label in labels.unique():
        share = float((labels == label).sum()) * count / len(labels)
        assert abs(int((labels[chosen] == label).sum()) - share) < 1 + 1e-9
    assert torch.equal(chosen, stratified(labels, count, seed))


def test_spread_depends_on_the_seed():
    labels = torch.zeros(100, dtype=torch.int64)
    assert not torch.equal(stratified(labels, 50, 0), stratified(labels, 50, 1))


def test_digits_are_split_once_and_for_all(digits):
    sizes = len(digits.train), len(digits.validation), len(digits.test)
    assert sizes == (1437 - 216, 216, 360)
    assert (digits.input_shape, digits.classes, len(digits.class_names)) == ((1, 28, 28), 10, 10)
    rows = [set(split.indices.tolist()) for split in (digits.train, digits.validation)]
    assert not rows[0] & rows[1]
    assert rows[0] | rows[1] == set(range(1437))
    everything = torch.cat([split.labels for split in (digits.train, digits.validation, digits.test)])
    assert (digits.test.labels.bincount() - everything.bincount() * 360 / 1797).abs().max() < 1
    other = load_data(DIGITS, seed=1)
    assert torch.equal(other.test.tensors()[0], digits.test.tensors()[0])
    assert not torch.equal(other.validation.indices, digits.validation.indices)


def test_digits_hold_the_scans_of_scikit_learn(digits):
    scans = torch.from_numpy(load_digits().images).float() / 16
    small = load_data(DataConfig("digits", size=8), seed=0)
    found = torch.cat([split.tensors()[0] for split in (small.train, small.validation, small.test)])[:, 0]
    # uint8 rounds to 1 / 510; sums of 64 pixels tell which scan is which.
    assert torch.allclose(found.sum((1, 2)).sort().values, scans.sum((1, 2)).sort().values, atol=64 / 510, rtol=0)
    assert abs(float(digits.test.tensors()[0].mean()) - float(scans.mean())) < 0.02


def test_batches_in_order_are_the_split(digits):
    x, y = digits.test.tensors()
    parts = list(digits.test.batches(100))
    assert [len(labels) for _, labels in parts] == [100, 100, 100, 60]
    assert torch.equal(torch.cat([inputs for inputs, _ in parts]), x)
    assert torch.equal(y, digits.test.labels)
    assert x.dtype == torch.float32
    assert 0 <= float(x.min()) < float(x.max()) <= 1


def test_normalisation_is_that_of_imagenet():
    pixels = torch.randint(0, 256, (3, 3, 4, 4), dtype=torch.uint8)
    split = Split(
        Split.of(pixels, torch.zeros(3)).pixels, torch.arange(3), torch.zeros(3).long(), IMAGENET_MEAN, IMAGENET_STD
    )
    x, _ = split.tensors()
    for channel in range(3):
        wanted = (pixels[:, channel].double() / 255 - IMAGENET_MEAN[channel]) / IMAGENET_STD[channel]
        torch.testing.assert_close(x[:, channel].double(), wanted, rtol=0, atol=1e-6)


def numbered(count, size=6):
    """Pictures in which every pixel tells which one it is."""
    pixels = torch.arange(count * size * size).view(count, 1, size, size).float()
    return Split.of(pixels, torch.arange(count))


def test_shuffled_batches_are_a_permutation_drawn_by_the_generator_alone():
    split = numbered(50)

    def order(seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.cat([y for _, y in split.batches(8, shuffle=generator)]).tolist()

    assert order(1) == order(1) != order(2)
    assert sorted(order(1)) == list(range(50)) != order(1)


@pytest.mark.parametrize("augment", [False, True])
def test_shards_are_the_parts_of_the_batches_of_one_process(augment):
    split = numbered(23)

    def batches(shard):
        return list(split.batches(8, shuffle=torch.Generator().manual_seed(3), augment=augment, shard=shard))

    whole, shards = batches((0, 1)), [batches((rank, 3)) for rank in range(3)]
    assert [len(y) for _, y in whole] == [8, 8, 7]
    for number, (x, y) in enumerate(whole):
        for rank in range(3):
            assert torch.equal(shards[rank][number][0], x[rank::3])
            assert torch.equal(shards[rank][number][1], y[rank::3])


def test_a_last_batch_that_batch_norm_cannot_take_is_left_out_of_training_only():
    split = numbered(9)
    shuffle = torch.Generator().manual_seed(0)
    assert [len(y) for _, y in split.batches(4, shuffle=shuffle)] == [4, 4]
    assert [len(y) for _, y in split.batches(4)] == [4, 4, 1]
    assert [len(y) for _, y in numbered(11).batches(4, shuffle=shuffle, shard=(1, 2))] == [2, 2]


def test_crop_and_flip_is_what_plain_loops_do():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (9, 2, 5, 7), dtype=torch.uint8, generator=generator)
    down, right = torch.randint(0, 9, (2, 9), generator=generator)
    flip = torch.randint(0, 2, (9,), generator=generator) == 1
    assert 0 < flip.sum() < 9
    found = crop_and_flip(pixels, down, right, flip)
    for sample in range(9):
        for row in range(5):
            for column in range(7):
                source = row + int(down[sample]) - 4, (6 - column if flip[sample] else column) + int(right[sample]) - 4
                inside = 0 <= source[0] < 5 and 0 <= source[1] < 7
                wanted = pixels[sample, :, source[0], source[1]] if inside else torch.zeros(2, dtype=torch.uint8)
                assert torch.equal(found[sample, :, row, column], wanted)


def test_take_is_a_seeded_stratified_sample(digits):
    sample = digits.train.take(100, seed=5)
    assert len(sample) == 100
    assert 9 <= int(sample.labels.bincount().min()) <= int(sample.labels.bincount().max()) <= 11
    assert torch.equal(sample.indices, digits.train.take(100, seed=5).indices)
    assert set(sample.indices.tolist()) <= set(digits.train.indices.tolist())
    assert len(digits.train.take(10**6, seed=0)) == len(digits.train)


def test_a_limit_holds_for_each_split():
    data = load_data(DataConfig("digits", limit=40), seed=0)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [40, 40, 40]
    assert data.train.labels.bincount().tolist() == [4] * 10


def test_what_cannot_be_prepared_is_refused():
    with pytest.raises(InputError, match=r"data\.validation = 1437 cannot be cut from 1437 training samples"):
        load_data(DataConfig("digits", validation=1437), seed=0)
    with pytest.raises(InputError, match=r'"imagenet" needs colour pictures, but digits has 1 channel'):
        load_data(DataConfig("digits", normalize="imagenet"), seed=0)
    with pytest.raises(InputError, match=r"there are 3 inputs but 2 labels"):
        Split.of(torch.zeros(3, 2), torch.zeros(2))


def test_shifts_move_whole_pictures_by_up_to_as_many_pixels_and_flip_none():
    pictures = torch.zeros(300, 1, 9, 9, dtype=torch.uint8)
    pictures[:, 0, 4, 4], pictures[:, 0, 4, 5] = 255, 51  # left of its neighbour, which a flip would show
    split = Split.of(pictures, torch.zeros(300, dtype=torch.int64))
    seen = set()
    for x, _ in split.batches(100, shuffle=torch.Generator().manual_seed(0), shift=2):
        for picture in x:
            row, column = divmod(int(picture.flatten().argmax()), 9)
            assert picture[0, row, column + 1] == 51 / 255
            assert picture.count_nonzero() == 2
            seen.add((row - 4, column - 4))
    assert seen == {(down, right) for down in range(-2, 3) for right in range(-2, 3)}
    with pytest.raises(InputError, match=r"samples of shape \(3,\) are no pictures: nothing to shift"):
        next(Split.of(torch.rand(8, 3), torch.zeros(8)).batches(4, shuffle=torch.Generator(), shift=1))
