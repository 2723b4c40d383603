"""Eq. 4–7."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.config import AlignConfig
from stages.train.alignment import Alignment, kd_loss, projection_head, whitening_of


def hidden_states(levels: tuple[int, ...], *, seed: int = 0) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {u: torch.randn(2, 3, 5, 8, generator=generator, requires_grad=True) for u in levels}  # [B, T, Q, E]


def test_equations_4_to_7_on_numbers_worked_by_hand() -> None:
    """Two levels, one frame, E = D = 2, identity heads: z_1 = (3, 4), z_2 = (1, 0), y* = (4, 3)."""
    alignment = Alignment(AlignConfig(levels=(1, 2), head="linear"), hidden_size=2, target_size=2)
    for head in alignment.heads.values():
        head.weight.data.copy_(torch.eye(2))
        head.bias.data.zero_()
    assert alignment.weight_net is not None
    first, _, last = alignment.weight_net
    first.weight.data.fill_(0.0)
    first.bias.data.fill_(0.0)  # g_psi is 0 before the last bias, so w = sigmoid(last bias) = 3/4 at both levels
    last.weight.data.fill_(1.0)
    last.bias.data.fill_(math.log(3.0))
    hidden = {1: torch.tensor([[[[2.0, 4.0], [4.0, 4.0]]]]), 2: torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])}
    out = alignment(hidden, torch.tensor([[[4.0, 3.0]]]))
    # cos_1 = (3·4 + 4·3) / (5 · 5) = 24/25; cos_2 = 4 / 5; L = 3/4 · (−24/25 − 4/5) = −33/25
    assert out.per_level[1].item() == pytest.approx(-24 / 25)
    assert out.per_level[2].item() == pytest.approx(-4 / 5)
    assert out.weights[1].item() == pytest.approx(3 / 4)
    assert out.total.item() == pytest.approx(-33 / 25)


def test_the_weight_net_reads_projected_state_plus_target() -> None:
    """Eq. 6 with g_psi = the first coordinate: w = sigmoid(z_0 + y*_0)."""
    alignment = Alignment(AlignConfig(levels=(1,), head="linear"), hidden_size=2, target_size=2)
    alignment.heads["1"].weight.data.copy_(2 * torch.eye(2))
    alignment.heads["1"].bias.data.zero_()
    alignment.weight_net = torch.nn.Linear(2, 1, bias=False)
    alignment.weight_net.weight.data.copy_(torch.tensor([[1.0, 0.0]]))
    out = alignment({1: torch.tensor([[[[0.25, 1.0]]]])}, torch.tensor([[[0.5, -1.0]]]))
    assert out.weights[1].item() == pytest.approx(1 / (1 + math.exp(-1.0)))


@given(seed=st.integers(0, 200), scale=st.floats(1e-3, 1e3))
def test_kd_loss_is_bounded_and_scale_free(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    z, y_star = torch.randn(4, 3, 6, generator=generator).double(), torch.randn(4, 3, 6, generator=generator).double()
    loss = kd_loss(z, y_star)
    assert loss.shape == (4, 3)
    assert ((loss >= -1 - 1e-12) & (loss <= 1 + 1e-12)).all()
    torch.testing.assert_close(kd_loss(z * scale, y_star), loss, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(kd_loss(z, y_star * scale), loss, rtol=1e-9, atol=1e-9)


def test_a_zero_target_gives_no_nan() -> None:
    z = torch.randn(1, 2, 6, requires_grad=True)
    loss = kd_loss(z, torch.zeros(1, 2, 6))
    loss.sum().backward()
    assert torch.equal(loss, torch.zeros(1, 2))
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()


def test_uniform_weights_are_the_plain_sum_over_levels_and_mean_over_frames() -> None:
    levels = (2, 3, 5)
    alignment = Alignment(
        AlignConfig(levels=levels, weights="uniform", uniform_weight=0.5), hidden_size=8, target_size=6
    )
    hidden, y_star = hidden_states(levels), torch.randn(2, 3, 6)
    out = alignment(hidden, y_star)
    expected = sum(0.5 * kd_loss(alignment.project(u, hidden[u]), y_star).mean() for u in levels)
    torch.testing.assert_close(out.total, expected)


@pytest.mark.parametrize("detach", [False, True])
def test_gradients_reach_heads_weight_net_and_states_and_nothing_else(detach: bool) -> None:
    levels = (2, 4)
    alignment = Alignment(AlignConfig(levels=levels, detach_weight_inputs=detach), hidden_size=8, target_size=6)
    hidden, y_star = hidden_states(levels), torch.randn(2, 3, 6)
    alignment(hidden, y_star).total.backward()
    with_gradient = {name for name, p in alignment.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert with_gradient == {name for name, _ in alignment.named_parameters()}
    assert all(state.grad is not None and state.grad.abs().sum() > 0 for state in hidden.values())


def test_detaching_the_weight_inputs_cuts_the_path_through_w() -> None:
    """With w detached the gradient of the states is w · dL_kd/dh exactly; the literal Eq. 6 adds a second path."""
    grads = {}
    for detach in (False, True):
        torch.manual_seed(0)
        alignment = Alignment(AlignConfig(levels=(2,), detach_weight_inputs=detach), hidden_size=8, target_size=6)
        hidden, y_star = hidden_states((2,)), torch.linspace(-1, 1, 36).view(2, 3, 6)
        alignment(hidden, y_star).total.backward()
        grads[detach] = hidden[2].grad
        if detach:
            state = hidden[2].detach().requires_grad_()
            z = alignment.project(2, state)
            (alignment.weigh(z, y_star).detach() * kd_loss(z, y_star)).mean().backward()
            torch.testing.assert_close(grads[True], state.grad)
    assert not torch.allclose(grads[False], grads[True])


def test_a_centred_target_ignores_the_common_mode() -> None:
    mean = torch.randn(6)
    alignment = Alignment(
        AlignConfig(levels=(2,), target_norm="center", weights="uniform"),
        hidden_size=8,
        target_size=6,
        target_mean=mean,
    )
    raw = Alignment(AlignConfig(levels=(2,), weights="uniform"), hidden_size=8, target_size=6)
    raw.heads.load_state_dict(alignment.heads.state_dict())
    hidden, y_star = hidden_states((2,)), torch.randn(2, 3, 6)
    torch.testing.assert_close(alignment(hidden, y_star + mean).total, raw(hidden, y_star).total)
    with pytest.raises(ValueError, match="target_norm=center"):
        Alignment(AlignConfig(target_norm="center"), hidden_size=8, target_size=6)


def test_whitened_targets_have_unit_variance_in_every_direction_that_varies() -> None:
    mixed = torch.randn(4000, 3, dtype=torch.float64) @ torch.tensor([[5.0, 1, 0], [0, 0.5, 0.2], [0, 0, 0.1]]).double()
    white = (mixed - mixed.mean(0)) @ whitening_of(mixed.T.cov(correction=0), floor=0.0)
    torch.testing.assert_close(white.T.cov(correction=0), torch.eye(3).double(), atol=1e-6, rtol=0)
    flat = whitening_of(torch.diag(torch.tensor([1.0, 1e-12])))  # noise is not blown up to a unit
    assert float(flat[1, 1]) * 1e-6 < 0.1


def test_the_alignment_whitens_and_asks_for_what_it_needs() -> None:
    mean, covariance = torch.randn(6), torch.diag(torch.tensor([9.0, 4, 1, 1, 1, 1]))
    cfg = AlignConfig(levels=(2,), target_norm="whiten", weights="uniform")
    alignment = Alignment(cfg, hidden_size=8, target_size=6, target_mean=mean, target_covariance=covariance)
    raw = Alignment(AlignConfig(levels=(2,), weights="uniform"), hidden_size=8, target_size=6)
    raw.heads.load_state_dict(alignment.heads.state_dict())
    hidden, y_star = hidden_states((2,)), torch.randn(2, 3, 6)
    expected = raw(hidden, y_star / covariance.diag().add(1e-3 * covariance.diag().mean()).sqrt()).total
    torch.testing.assert_close(alignment(hidden, y_star + mean).total, expected)
    with pytest.raises(ValueError, match="whiten needs the covariance"):
        Alignment(cfg, hidden_size=8, target_size=6, target_mean=mean)


def test_a_grid_target_is_flattened() -> None:
    alignment = Alignment(AlignConfig(levels=(2,), weights="uniform"), hidden_size=8, target_size=24)
    hidden, grid = hidden_states((2,)), torch.randn(2, 3, 2, 2, 6)
    torch.testing.assert_close(alignment(hidden, grid).total, alignment(hidden, grid.flatten(2)).total)


@pytest.mark.parametrize(("kind", "count"), [("linear", 8 * 6 + 6), ("mlp", 8 * 6 + 6 + 6 * 6 + 6)])
def test_heads_have_the_size_their_name_says(kind: str, count: int) -> None:
    assert sum(p.numel() for p in projection_head(kind, 8, 6, 16).parameters()) == count
