from __future__ import annotations

import pytest
import torch

from sealign.edits.random_rotation import random_rotation
from tests.edits.edit_data import draw


@pytest.mark.parametrize(("width", "columns"), [(12, 1), (12, 5), (6, 5), (6, 6), (5, 7), (5, 20), (4, 0)])
def test_lengths_and_angles_stay(width: int, columns: int) -> None:
    span = draw(width, columns)
    rotated = random_rotation(span, seed=3)(span)
    torch.testing.assert_close(rotated.T @ rotated, span.T @ span, rtol=1e-10, atol=1e-10)
    assert columns == 0 or not torch.allclose(rotated, span)


def test_a_span_of_lower_rank_than_its_number_of_columns() -> None:
    """As with SEA, where the left and the right factor have the same span."""
    half = draw(9, 3)
    span = torch.cat([half, -half, half], dim=1)
    rotated = random_rotation(span, seed=0)(span)
    torch.testing.assert_close(rotated.T @ rotated, span.T @ span, rtol=1e-10, atol=1e-10)


def test_it_is_orthogonal_where_the_span_is_everything() -> None:
    rotation = random_rotation(draw(6, 9), seed=1)(torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(6, dtype=torch.float64), rtol=1e-10, atol=1e-10)


def test_it_is_linear_and_the_same_for_all_columns_of_the_span() -> None:
    span = draw(10, 3)
    rotate = random_rotation(span, seed=2)
    mixed = span @ draw(3, 4, seed=9)
    torch.testing.assert_close(rotate(mixed), rotate(span) @ draw(3, 4, seed=9))


def test_seeds() -> None:
    span = draw(10, 3)
    assert torch.equal(random_rotation(span, 7)(span), random_rotation(span, 7)(span))
    others = [random_rotation(span, seed)(span) for seed in (0, 1, -1, 2, -2, 5, 2**40, 2**63, 2**70 + 5)]
    assert sum(torch.equal(one, other) for one in others for other in others) == len(others)


def test_type_and_layout_of_the_result() -> None:
    span = draw(8, 3, dtype=torch.bfloat16)
    rotated = random_rotation(span, seed=0)(span.T.contiguous().T)
    assert rotated.dtype == torch.bfloat16
    assert rotated.is_contiguous()
    assert not rotated.requires_grad


def test_directions_are_uniform() -> None:
    """Each coordinate of a rotated unit vector in d dimensions has mean 0 and variance 1 / d, whatever its sign was."""
    d, n = 5, 2000
    vector = torch.zeros(d, 1, dtype=torch.float64)
    vector[0] = 1
    found = torch.cat([random_rotation(vector, seed)(vector) for seed in range(n)], dim=1)
    # Five standard errors.
    assert float(found.mean(1).abs().max()) < 5 / (d * n) ** 0.5
    covariance = found @ found.T / n
    assert float((covariance - torch.eye(d, dtype=torch.float64) / d).abs().max()) < 5 / d / n**0.5


def test_a_rotated_plane_has_no_preferred_orientation() -> None:
    """In the full space, both orientations are as likely."""
    eye = torch.eye(3, dtype=torch.float64)
    signs = [float(torch.linalg.det(random_rotation(eye, seed)(eye)).round()) for seed in range(400)]
    assert set(signs) == {-1.0, 1.0}
    assert abs(sum(signs)) < 5 * 400**0.5
