import pytest
import torch

from common import losses


@pytest.mark.parametrize(
    ("loss", "reference"), [(losses.masked_mse, torch.square), (losses.masked_l1, torch.abs)]
)
def test_a_loss_is_the_mean_over_real_elements(loss, reference):
    pred, target = torch.randn(2, 4, 6, 3)
    mask = torch.rand(4, 6) < 0.6
    expected = torch.stack([reference(pred[i, j] - target[i, j]) for i, j in mask.nonzero().tolist()]).mean()
    torch.testing.assert_close(loss(pred, target, mask), expected)


@pytest.mark.parametrize("loss", [losses.masked_mse, losses.masked_l1])
def test_padding_changes_neither_loss_nor_gradient(loss):
    target, mask = torch.randn(4, 6, 3), torch.arange(6).expand(4, 6) < torch.tensor([[6], [3], [1], [5]])
    clean = torch.randn(4, 6, 3)
    values, grads = [], []
    for filling in (0.0, 1e30, float("nan"), float("inf")):
        pred = torch.where(mask[..., None], clean, filling).requires_grad_()
        value = loss(pred, torch.where(mask[..., None], target, filling), mask)
        value.backward()
        values.append(value.detach())
        grads.append(pred.grad)
        assert (pred.grad[~mask] == 0).all()
    assert all(torch.equal(value, values[0]) for value in values)
    assert all(torch.equal(grad, grads[0]) for grad in grads)


def test_without_a_real_step_the_loss_is_zero():
    assert (
        losses.masked_mse(torch.ones(2, 3, 1), torch.zeros(2, 3, 1), torch.zeros(2, 3, dtype=torch.bool)) == 0
    )


def test_half_precision_is_summed_in_float32():
    pred = torch.full((64, 64, 8), 0.1, dtype=torch.bfloat16)
    value = losses.masked_mse(pred, torch.zeros_like(pred), torch.ones(64, 64, dtype=torch.bool))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(pred[0, 0, 0].float().item() ** 2, rel=1e-5)


def test_the_mean_over_processes_is_the_mean_over_all_their_elements():
    """Shares of padding differ between the halves; dividing by the mean count makes their average exact."""
    pred, target = torch.randn(2, 8, 6, 3)
    mask = torch.rand(8, 6) < torch.linspace(0.1, 0.9, 8)[:, None]
    count = torch.stack([mask[:4].sum(), mask[4:].sum()]).float().mean()
    halves = [losses.masked_mse(pred[h], target[h], mask[h], count) for h in (slice(0, 4), slice(4, 8))]
    torch.testing.assert_close(sum(halves) / 2, losses.masked_mse(pred, target, mask))
