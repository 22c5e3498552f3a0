from pathlib import Path

import pytest
import torch

from hy_prfl.flow_matching import make_generator
from hy_prfl.models.conditioning import Conditioning
from hy_prfl.rollout.buffer import Rollout, RolloutBuffer, relative_change


def make_rollout(number: int, *, with_images: bool = False) -> Rollout:
    torch.manual_seed(number)
    states = [(index, torch.randn(2, 16, 2, 4, 4), torch.randn(2, 16, 2, 4, 4)) for index in (0, 3, 4)]
    images = torch.randn(2, 5, 32, dtype=torch.bfloat16) if with_images else None
    condition = torch.randn(2, 20, 2, 4, 4) if with_images else None
    conditioning = Conditioning(torch.randn(2, 16, 32, dtype=torch.bfloat16), images, condition)
    return Rollout.of(iter(states), ids=[f"{number}a", f"{number}b"], conditioning=conditioning)


def test_states_are_kept_in_half_precision() -> None:
    rollout = make_rollout(1)
    torch.manual_seed(1)
    first = torch.randn(2, 16, 2, 4, 4)
    assert rollout.indices == (0, 3, 4)
    assert rollout.latents.shape == (3, 2, 16, 2, 4, 4)
    assert rollout.latents.dtype == torch.float16
    torch.testing.assert_close(rollout.latents[0].float(), first, rtol=1e-3, atol=1e-4)


def test_the_oldest_rollout_goes() -> None:
    buffer = RolloutBuffer(2)
    for number in (1, 2, 3):
        buffer.add(make_rollout(number))
    assert [rollout.ids[0] for rollout in buffer.rollouts] == ["2a", "3a"]
    buffer.clear()
    assert len(buffer) == 0


def test_every_state_of_every_rollout_is_drawn_equally_often() -> None:
    buffer = RolloutBuffer(3)
    for number in (1, 2):
        buffer.add(make_rollout(number))
    counts: dict[tuple[str, int], int] = {}
    for draw in range(600):
        state = buffer.draw(make_generator(7, draw))
        place = state.rollout.indices.index(state.step_index)
        assert torch.equal(state.latents, state.rollout.latents[place])
        assert torch.equal(state.velocity, state.rollout.velocities[place])
        key = (state.rollout.ids[0], state.step_index)
        counts[key] = counts.get(key, 0) + 1
    assert set(counts) == {(name, index) for name in ("1a", "2a") for index in (0, 3, 4)}
    # 600 draws of 6 states: 100 each, with a standard deviation of 9.
    assert all(60 < count < 140 for count in counts.values())


@pytest.mark.parametrize("with_images", [False, True])
def test_a_buffer_survives_its_file(tmp_path: Path, with_images: bool) -> None:
    buffer, other = RolloutBuffer(2), RolloutBuffer(2)
    for number in (1, 2):
        buffer.add(make_rollout(number, with_images=with_images))
    buffer.save(tmp_path / "rollouts.safetensors")
    other.add(make_rollout(9))
    other.load(tmp_path / "rollouts.safetensors")
    assert len(other) == 2
    for one, two in zip(buffer.rollouts, other.rollouts, strict=True):
        assert (one.ids, one.indices) == (two.ids, two.indices)
        for name in ("latents", "velocities"):
            assert torch.equal(getattr(one, name), getattr(two, name))
        for name, tensor in vars(one.conditioning).items():
            found = getattr(two.conditioning, name)
            assert found is None if tensor is None else torch.equal(tensor, found)
            assert found is None or found.dtype == tensor.dtype


def test_an_empty_buffer_survives_its_file(tmp_path: Path) -> None:
    buffer = RolloutBuffer(2)
    buffer.save(tmp_path / "rollouts.safetensors")
    buffer.load(tmp_path / "rollouts.safetensors")
    assert len(buffer) == 0


def test_relative_change() -> None:
    stored = torch.tensor([3.0, 4.0], dtype=torch.float16)
    assert relative_change(torch.tensor([3.0, 4.5]), stored).item() == pytest.approx(0.1)
