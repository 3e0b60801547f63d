import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.loader import draw_coin, draw_noise, draw_timesteps, keyed_seed
from pipeline.settings import NOISE_GROUP


@given(key=st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 2)))
def test_noise_belongs_to_its_group(key: tuple[int, ...]) -> None:
    whole = draw_noise(key, range(4), (1, 2, 2))
    parts = torch.cat(
        [draw_noise(key, range(2), (1, 2, 2)), draw_noise(key, range(2, 4), (1, 2, 2))]
    )
    assert whole.shape[0] == 4 * NOISE_GROUP
    assert torch.equal(whole, parts)
    assert len(whole.unique()) == whole.numel()  # each group has noise of its own


def test_noise_is_gaussian_and_timesteps_are_uniform() -> None:
    noise = draw_noise((0, 0, 0), range(64), (1, 8, 8))
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02
    # 31.73% of a Gaussian lies beyond one deviation; of uniform noise of that deviation 42%.
    assert abs(float((noise.abs() > 1).float().mean()) - 0.3173) < 0.01
    timesteps = draw_timesteps((0, 0, 0), 16_000, 10, "uniform")
    assert torch.bincount(timesteps, minlength=10).float().std() < 120


def test_a_rewind_draws_anew() -> None:
    assert not torch.equal(
        draw_noise((0, 5, 0), range(1), (1,)), draw_noise((0, 5, 1), range(1), (1,))
    )


def test_keys_do_not_run_into_each_other() -> None:
    assert keyed_seed("a", 1, 23) != keyed_seed("a", 12, 3)
    assert 0 <= keyed_seed("x") < 2**63


def test_the_coin_is_fair_and_the_steps() -> None:
    tosses = [draw_coin((0, step, 0)) for step in range(400)]
    assert tosses == [draw_coin((0, step, 0)) for step in range(400)]
    assert 160 < sum(tosses) < 240


def test_offset_noise_keeps_the_noise_of_a_group() -> None:
    plain, offset = (draw_noise((0, 0, 0), range(2), (3, 4, 4), s) for s in (0.0, 0.5))
    shared = offset - plain
    assert torch.allclose(shared, shared[..., :1, :1].expand_as(shared), atol=1e-6)
    assert float(shared.std()) > 0.3
