"""Targets and loss, against loops over single tubelets."""

import numpy as np
import pytest
import torch

from stm.objectives.reconstruction import reconstruction_loss, reconstruction_targets


def draw_video(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (2, 4, 3, 24, 24), dtype=torch.uint8, generator=generator)


def normalise_by_loops(video: np.ndarray, token: int) -> np.ndarray:
    """One token's target: each colour by its own mean and unbiased deviation; frame, row, column, colour."""
    slot, place = divmod(token, 9)
    row, column = divmod(place, 3)
    cube = (
        video[2 * slot : 2 * slot + 2, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].astype(np.float64) / 255
    )
    result = np.empty((2, 8, 8, 3))
    for colour in range(3):
        values = cube[:, colour]
        result[..., colour] = (values - values.mean()) / (values.std(ddof=1) + 1e-6)
    return result.flatten()


def test_targets_are_normalised_per_token_and_colour() -> None:
    video = draw_video()
    index = torch.tensor([[0, 4, 17], [3, 9, 12]])
    targets = reconstruction_targets(video, index, 2, 8)
    assert targets.shape == (2, 3, 2 * 8 * 8 * 3) and targets.dtype == torch.float32
    for sample in range(2):
        for place in range(3):
            expected = normalise_by_loops(video[sample].numpy(), int(index[sample, place]))
            np.testing.assert_allclose(targets[sample, place].numpy(), expected, atol=1e-4)


def test_pixels_as_they_are_are_a_target_in_0_to_1() -> None:
    video = draw_video()
    index = torch.tensor([[0, 4, 17], [3, 9, 12]])
    targets = reconstruction_targets(video, index, 2, 8, normalised=False)
    assert targets.shape == (2, 3, 2 * 8 * 8 * 3) and targets.dtype == torch.float32
    for sample in range(2):
        for place in range(3):
            slot, rest = divmod(int(index[sample, place]), 9)
            row, column = divmod(rest, 3)
            frames = video[sample, 2 * slot : 2 * slot + 2]
            cube = frames[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].numpy().astype(np.float64) / 255
            expected = cube.transpose(0, 2, 3, 1).flatten()  # frame, row, column, colour
            np.testing.assert_allclose(targets[sample, place].numpy(), expected, atol=1e-7)


def test_targets_do_not_see_brightness_or_contrast_of_a_colour() -> None:
    video = draw_video().float() / 255
    index = torch.arange(18).expand(2, -1)
    gain, shift = torch.tensor([0.5, 0.25, 0.9]), torch.tensor([0.1, 0.4, 0.0])
    changed = video * gain[:, None, None] + shift[:, None, None]
    torch.testing.assert_close(
        reconstruction_targets(changed, index, 2, 8), reconstruction_targets(video, index, 2, 8), atol=1e-3, rtol=1e-3
    )


def test_a_flat_tubelet_has_the_target_zero() -> None:
    targets = reconstruction_targets(torch.full((1, 2, 3, 8, 8), 77, dtype=torch.uint8), torch.tensor([[0]]), 2, 8)
    assert targets.abs().max() < 0.1 and targets.isfinite().all()


def test_targets_stay_float32_under_autocast() -> None:
    index = torch.tensor([[1], [2]])
    plain = reconstruction_targets(draw_video(), index, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reconstruction_targets(draw_video(), index, 2, 8), plain)


def test_the_loss_is_the_mean_of_all_squares_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    predictions, targets = (torch.randn(2, 5, 12, generator=generator) for _ in range(2))
    expected = ((predictions.double() - targets.double()) ** 2).mean()
    assert reconstruction_loss(predictions, targets).item() == pytest.approx(expected.item(), rel=1e-6)
    assert reconstruction_loss(predictions.bfloat16(), targets).dtype == torch.float32


def test_shapes_that_would_broadcast_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"\(2, 1, 12\) and targets \(2, 5, 12\)"):
        reconstruction_loss(torch.zeros(2, 1, 12), torch.zeros(2, 5, 12))
