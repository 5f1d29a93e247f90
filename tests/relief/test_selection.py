"""Selection against exact rational arithmetic, on ties above all."""

from fractions import Fraction

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from relief_export.errors import InputError
from relief_export.relief.activity import measure_activity
from relief_export.relief.scores import LayerScore, Scores, score
from relief_export.relief.selection import Alpha, keep_fewest, select

ALPHAS = ["0.1", "0.25", "0.5", "0.7", "0.9", "0.95", "0.99", "1"]


def exact(row, alpha):
    """The rule for one neuron, in rationals: from the largest down, ties by index."""
    total, reached, kept = Fraction(sum(row)), Fraction(0), [False] * len(row)
    for j in sorted(range(len(row)), key=lambda j: (-row[j], j)):
        if total == 0 or reached >= Fraction(alpha) * total:
            break
        reached += Fraction(row[j])
        kept[j] = True
    return kept


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure
@given(
    rows=st.integers(1, 8).flatmap(
        lambda width: st.lists(st.lists(st.integers(0, 4), min_size=width, max_size=width), min_size=1, max_size=5)
    ),
    alpha=st.sampled_from(ALPHAS),
    unit=st.sampled_from([1.0, 0.1, 1e-30, 1e30]),
)
def test_ties_and_exact_shares_follow_the_rule(rows, alpha, unit):
    # 0.1 has no exact float: sums that are equal but for rounding must count as equal.
    found = keep_fewest(torch.tensor(rows, dtype=torch.float64) * unit, float(alpha))
    assert found.tolist() == [exact(row, alpha) for row in rows]


def test_scores_that_differ_by_rounding_are_a_tie():
    nearly, more = (torch.tensor([[1, 1 + difference, 1]], dtype=torch.float64) for difference in (2**-50, 2**-20))
    assert keep_fewest(nearly, 0.3).tolist() == [[True, False, False]]
    assert keep_fewest(more, 0.3).tolist() == [[False, True, False]]


@pytest.mark.parametrize("alpha", [0.01, 0.95])
def test_two_equal_connections_are_not_both_masked(alpha):
    kept = keep_fewest(torch.ones(3, 2), alpha)
    assert kept.tolist() == [[True, alpha > 0.5]] * 3


def test_a_neuron_without_score_keeps_nothing_and_every_other_keeps_something():
    scores = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1e-300, 0.0], [1e-9, 1.0, 1e9]], dtype=torch.float64)
    assert keep_fewest(scores, 1e-9).tolist() == [[False] * 3, [False, True, False], [False, False, True]]


def test_the_bias_is_the_last_connection():
    layer = LayerScore(torch.tensor([[1.0, 1.0]]), torch.tensor([1.0]), "l.weight", "l.bias", (1, 2))
    masks = select(Scores({"l": layer}, {}), Alpha(fc=0.6))
    assert (masks["l.weight"].tolist(), masks["l.bias"].tolist()) == ([[True, True]], [False])
    heavy = LayerScore(torch.tensor([[1.0, 1.0]]), torch.tensor([9.0]), "l.weight", "l.bias", (1, 2))
    masks = select(Scores({"l": heavy}, {}), Alpha(fc=0.6))
    assert (masks["l.weight"].tolist(), masks["l.bias"].tolist()) == ([[False, False]], [True])


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 3))


def scores_of(model):
    return score(model, measure_activity(model, [torch.randn(6, 3, 4, 4)]))


def test_alpha_by_kind_and_by_glob():
    scores = scores_of(net())
    whole = select(scores, Alpha(conv=1, fc=1))
    assert all(mask.all() for mask in whole.values())
    masks = select(scores, Alpha(conv=0.5, fc=1, layers={"2": 0.2}))
    assert masks["3.weight"].all()
    assert not masks["0.weight"].all()
    assert masks["2.weight"].float().mean() < 0.3
    assert select(scores, Alpha(layers={"[23]": 1.0}))["3.weight"].all()


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (lambda: Alpha(conv=0.0), "alpha_conv: α must be above 0 and at most 1, not 0.0"),
        (lambda: Alpha(fc=1.01), "alpha_fc: α must be above 0 and at most 1, not 1.01"),
        (lambda: Alpha(layers={"conv*": float("nan")}), r"conv\*: α must be above 0 and at most 1, not nan"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(alpha, message):
    scores = scores_of(net())
    with pytest.raises(InputError, match=message):
        select(scores, alpha())


def test_a_join_drops_the_branch_or_the_shortcut_whose_share_is_small():
    pairs = torch.tensor([[1.0, 1.0], [0.04, 1.0], [1.0, 0.04], [0.06, 1.0], [0.0, 1.0], [0.0, 0.0]]).double()
    masks = select(Scores({}, {"block.join": pairs}), Alpha(conv=0.95))
    assert masks["block.join.residual_mask"].tolist() == [True, False, True, True, False, False]
    assert masks["block.join.shortcut_mask"].tolist() == [True, True, False, True, True, False]


def test_selection_is_the_same_every_time():
    scores = scores_of(net())
    assert all(select(scores, Alpha()).same(select(scores, Alpha())) for _ in range(3))
