"""What the loss and the samplers do beyond the plain case: guesses, labels, variance, offsets."""

import math

import pytest
import torch
from torch import Tensor

from diffusion_core import Diffusion, make_schedule, sample_ddim, sample_ddpm, sample_dpmpp_2m
from diffusion_core.noise import draw_noise
from diffusion_core.posterior import posterior, variance_bounds
from diffusion_core.process import VARIATIONAL_SHARE

SCHEDULE = make_schedule("cosine", 20)
NULL = 3


class Recorder:
    """A network that remembers what it was called with; its word depends on all of it."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor | None, Tensor | None]] = []

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        x_self_cond: Tensor | None = None,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        self.calls.append((x, x_self_cond, class_labels))
        output = 0.5 * x
        if x_self_cond is not None:
            output = output + 0.1 * x_self_cond
        if class_labels is not None:
            output = output + 0.2 * class_labels.view(-1, 1, 1, 1)
        return output


def draw(batch: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x_start = torch.rand(batch, 2, 4, 4, generator=g, dtype=torch.float64) * 2 - 1
    noise = torch.randn(x_start.shape, generator=g, dtype=torch.float64)
    return x_start.to(dtype), torch.randint(20, (batch,), generator=g), noise.to(dtype)


def test_a_guess_from_noise_alone_stays_within_float16() -> None:
    """At the last step of 1000 of a cosine schedule it is the noise left over, 20,000 times."""
    diffusion = Diffusion(make_schedule("cosine", 1000), "pred_noise", self_condition=True)
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(4, 2, 3, padding=1)

    def model(x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        return layer(torch.cat([x, torch.zeros_like(x) if x_self_cond is None else x_self_cond], 1))

    x_start, _, noise = draw(dtype=torch.float32)
    t = torch.full((len(x_start),), 999)
    with torch.autocast("cpu", torch.float16):
        loss = diffusion.loss(model, x_start, t=t, noise=4 * noise, self_condition=True)
    assert bool(loss.isfinite().all())
    loss.mean().backward()
    assert bool(layer.weight.grad is not None and layer.weight.grad.isfinite().all())


def test_a_plain_network_is_called_with_two_arguments() -> None:
    x_start, t, noise = draw()
    diffusion = Diffusion(SCHEDULE, "pred_noise")
    loss = diffusion.loss(lambda x, t: 0 * x, x_start, t=t, noise=noise)  # a third would raise
    assert float(loss) == pytest.approx(float(noise.square().mean()), rel=1e-5)


@pytest.mark.parametrize("self_condition", [True, False])
def test_self_conditioning_shows_the_networks_own_guess(self_condition: bool) -> None:
    diffusion, model = Diffusion(SCHEDULE, "pred_v", self_condition=True), Recorder()
    x_start, t, noise = draw()
    loss = diffusion.loss(model, x_start, t=t, noise=noise, self_condition=self_condition)
    x_t = diffusion.q_sample(x_start, t, noise)
    guess = diffusion.convert(0.5 * x_t, x_t, t).pred_x_start
    assert len(model.calls) == 1 + self_condition
    seen = model.calls[-1][1]
    if self_condition:
        assert seen is not None
        assert torch.allclose(seen, guess)
        assert not seen.requires_grad
    output = 0.5 * x_t + (0.1 * guess if self_condition else 0)
    expected = ((output - diffusion.target(x_start, t, noise)) ** 2).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_the_coin_is_fair_and_the_generators() -> None:
    diffusion = Diffusion(SCHEDULE, self_condition=True)
    x_start, t, noise = draw()
    tosses = []
    for seed in range(200):
        model = Recorder()
        generator = torch.Generator().manual_seed(seed)
        diffusion.loss(model, x_start, t=t, noise=noise, generator=generator)
        tosses.append(len(model.calls) == 2)
    assert 70 < sum(tosses) < 130


@pytest.mark.parametrize("sampler", [sample_ddim, sample_ddpm, sample_dpmpp_2m])
def test_samplers_show_the_guess_of_the_step_before(sampler) -> None:
    diffusion, model = Diffusion(SCHEDULE, self_condition=True), Recorder()
    more = {"generator": torch.Generator()} if sampler is sample_ddpm else {}
    sampler(diffusion, model, draw()[2], num_steps=4, **more)
    assert model.calls[0][1] is None
    for (x, guess_before, _), (_, guess, _), t in zip(
        model.calls, model.calls[1:], (19, 14, 9), strict=False
    ):
        output = 0.5 * x + (0 if guess_before is None else 0.1 * guess_before)
        t_batch = torch.full((6,), t)
        expected = diffusion.convert(output, x, t_batch).pred_x_start.clamp(-1, 1)
        assert guess is not None
        assert torch.allclose(guess, expected)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guidance_is_null_plus_scale_times_the_difference(scale: float) -> None:
    diffusion = Diffusion(SCHEDULE, "pred_noise", null_label=NULL)
    _, t, x_t = draw()
    labels = torch.arange(6) % 3
    got = diffusion.predict(
        Recorder(), x_t, t, class_labels=labels, guidance_scale=scale
    ).pred_noise  # fmt: skip
    of_class = 0.5 * x_t + 0.2 * labels.view(-1, 1, 1, 1)
    of_null = 0.5 * x_t + 0.2 * NULL
    assert torch.allclose(got, of_null + scale * (of_class - of_null), atol=1e-6)


def test_guidance_of_1_costs_one_run_and_others_a_doubled_one() -> None:
    diffusion = Diffusion(SCHEDULE, null_label=NULL)
    labels = torch.zeros(6, dtype=torch.int64)
    for scale, batch in ((1.0, 6), (2.0, 12)):
        model = Recorder()
        sample_ddim(
            diffusion, model, draw()[2], num_steps=2, class_labels=labels, guidance_scale=scale
        )
        assert [len(x) for x, _, _ in model.calls] == [batch, batch]
        seen = [labels_of_it for _, _, labels_of_it in model.calls]
        assert all(told is not None and torch.equal(told[:6], labels) for told in seen)


def test_guidance_refuses_what_it_cannot_do() -> None:
    x_t = draw()[2]
    with pytest.raises(ValueError, match=r"guidance_scale = 2\.0 needs class_labels"):
        sample_ddim(Diffusion(SCHEDULE), Recorder(), x_t, num_steps=2, guidance_scale=2.0)
    labels = torch.zeros(6, dtype=torch.int64)
    with pytest.raises(ValueError, match="need a null label"):
        sample_ddim(
            Diffusion(SCHEDULE), Recorder(), x_t, num_steps=2,
            class_labels=labels, guidance_scale=2.0,
        )  # fmt: skip


@pytest.mark.parametrize("dropout", [0.0, 0.25, 1.0])
def test_labels_are_dropped_at_the_rate_asked_for(dropout: float) -> None:
    diffusion = Diffusion(SCHEDULE, null_label=NULL, label_dropout=dropout)
    model = Recorder()
    x_start = torch.zeros(2000, 1, 1, 1)
    labels = torch.arange(2000) % 3
    generator = torch.Generator().manual_seed(0)
    diffusion.loss(model, x_start, class_labels=labels, generator=generator)
    seen = model.calls[0][2]
    assert seen is not None
    dropped = seen == NULL
    assert float(dropped.float().mean()) == pytest.approx(dropout, abs=0.03)
    assert torch.equal(seen[~dropped], labels[~dropped])


@pytest.mark.parametrize(
    "changes", [{"label_dropout": 0.1}, {"label_dropout": 1.5, "null_label": 3}]
)
def test_refuses_label_dropout_that_means_nothing(changes: dict) -> None:
    with pytest.raises(ValueError, match="label_dropout must be in"):
        Diffusion(SCHEDULE, **changes)


def test_offset_noise_moves_whole_channels() -> None:
    like = torch.zeros(4000, 2, 4, 4)
    noise = draw_noise(like, 0.5, torch.Generator().manual_seed(0))
    means = noise.mean((2, 3))
    # The mean of a channel: 1/16 of its pixels' variance and 0.25 from the offset.
    assert float(means.var()) == pytest.approx(1 / 16 + 0.25, rel=0.05)
    assert float((noise - means[..., None, None]).var()) == pytest.approx(15 / 16, rel=0.02)
    across = (means[:, 0] * means[:, 1]).mean()
    assert abs(float(across)) < 0.02
    assert draw_noise(torch.zeros(3, 2), 0.5).shape == (3, 2)
    assert draw_noise(torch.zeros(3, 2, 7), 0.5).shape == (3, 2, 7)


def test_offset_noise_is_in_drawn_noise_only() -> None:
    diffusion = Diffusion(SCHEDULE, "pred_noise", offset_noise=10.0)
    x_start, t, noise = draw()
    plain = Diffusion(SCHEDULE, "pred_noise")
    given = [float(d.loss(Recorder(), x_start, t=t, noise=noise)) for d in (diffusion, plain)]
    assert given[0] == given[1]
    drawn = [
        float(d.loss(Recorder(), x_start, t=t, generator=torch.Generator().manual_seed(0)))
        for d in (diffusion, plain)
    ]
    assert drawn[0] > 3 * drawn[1]
    with pytest.raises(ValueError, match="offset_noise must be 0 or above"):
        Diffusion(SCHEDULE, offset_noise=-0.1)


def with_variance(x: Tensor, t: Tensor) -> Tensor:
    """Channels for the objective, then for the variance."""
    return torch.cat([0.5 * x, 0.3 * x], dim=1)


@pytest.mark.parametrize("t", [0, 1, 19])
def test_hybrid_loss_is_the_papers_sum(t: int) -> None:
    diffusion = Diffusion(SCHEDULE, "pred_noise", learned_variance=True)
    x_start, _, noise = draw()
    x_start = ((x_start + 1) * 127.5).round() / 127.5 - 1  # 8-bit data
    t_batch = torch.full((6,), t)
    x_t = diffusion.q_sample(x_start, t_batch, noise)
    simple = ((0.5 * x_t - noise) ** 2).flatten(1).mean(1)
    guess = diffusion.convert(0.5 * x_t, x_t, t_batch).pred_x_start
    small, large = variance_bounds(SCHEDULE, t, t - 1)
    fraction = (0.3 * x_t + 1) / 2
    variance = (fraction * math.log(large) + (1 - fraction) * math.log(small)).exp()
    if t > 0:
        q = posterior(SCHEDULE, t, t - 1)
        p = torch.distributions.Normal(q.on_x_t * x_t + q.on_x_start * guess, variance.sqrt())
        truth = torch.distributions.Normal(
            q.on_x_t * x_t + q.on_x_start * x_start, math.sqrt(q.variance)
        )
        nats = torch.distributions.kl_divergence(truth, p)
    else:
        p = torch.distributions.Normal(guess, variance.sqrt())
        above = torch.where(x_start > 0.999, 1.0, p.cdf(x_start + 1 / 255))
        below = torch.where(x_start < -0.999, 0.0, p.cdf(x_start - 1 / 255))
        nats = -(above - below).clamp(min=1e-12).log()
    bits = nats.flatten(1).mean(1) / math.log(2)
    expected = simple + VARIATIONAL_SHARE * 20 * bits
    got = diffusion.loss_per_sample(with_variance, x_start, t=t_batch, noise=noise)
    assert torch.allclose(got.double(), expected, rtol=1e-4)


def test_the_bound_does_not_move_the_mean() -> None:
    x_start, t, noise = draw(dtype=torch.float32)
    gradients = []
    for learned in (True, False):
        k = torch.tensor(0.5, requires_grad=True)

        def model(x: Tensor, t: Tensor, k: Tensor = k, learned: bool = learned) -> Tensor:
            return torch.cat([k * x, 0.3 * x], dim=1) if learned else k * x

        diffusion = Diffusion(SCHEDULE, "pred_noise", learned_variance=learned)
        diffusion.loss(model, x_start, t=t, noise=noise).backward()
        assert k.grad is not None
        gradients.append(float(k.grad))
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-5)


@pytest.mark.parametrize(("error", "direction"), [(0.0, 1), (3.0, -1)])
def test_the_variance_follows_the_errors_of_the_mean(error: float, direction: int) -> None:
    # A mean that errs wants a variance above the posterior's; one that is exact does not.
    diffusion = Diffusion(SCHEDULE, "pred_x0", learned_variance=True)
    x_start, _, noise = draw(dtype=torch.float32)
    share = torch.tensor(0.0, requires_grad=True)
    t = torch.full((6,), 10)

    def errs(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([x_start + error, share.expand_as(x)], dim=1)

    diffusion.loss(errs, x_start, t=t, noise=noise).backward()
    assert share.grad is not None
    assert float(share.grad) * direction > 0


@pytest.mark.parametrize("learned", [True, False])
def test_a_network_of_another_kind_is_refused(learned: bool) -> None:
    x_start, t, noise = draw()
    diffusion = Diffusion(SCHEDULE, learned_variance=learned)
    with pytest.raises(ValueError, match=r"must put out \[6, .* same learned_variance"):
        diffusion.loss(
            (lambda x, t: x) if learned else with_variance, x_start, t=t, noise=noise
        )  # fmt: skip


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("t", [[-1] * 6, [20] * 6, [3]])
def test_timesteps_out_of_range_are_refused(t: list[int]) -> None:
    x_start, _, noise = draw()
    with pytest.raises(ValueError, match=r"t must hold 6 timesteps within 0\.\.19"):
        Diffusion(SCHEDULE).loss(Recorder(), x_start, t=torch.tensor(t), noise=noise)


def test_learned_variance_is_refused_where_there_is_none() -> None:
    with pytest.raises(ValueError, match="'learned' needs a network that puts it out"):
        sample_ddpm(
            Diffusion(SCHEDULE), Recorder(), draw()[2], num_steps=2, variance="learned",
            generator=torch.Generator(),
        )  # fmt: skip


def test_the_guess_is_made_with_the_labels_too() -> None:
    diffusion = Diffusion(SCHEDULE, self_condition=True, null_label=NULL)
    model, labels = Recorder(), torch.arange(6) % 3
    x_start, t, noise = draw()
    diffusion.loss(model, x_start, t=t, noise=noise, self_condition=True, class_labels=labels)
    assert [seen is not None and torch.equal(seen, labels) for _, _, seen in model.calls] == [
        True,
        True,
    ]


def test_guidance_shows_both_halves_the_guess_and_takes_the_variance_with_the_class() -> None:
    diffusion = Diffusion(SCHEDULE, self_condition=True, learned_variance=True, null_label=NULL)
    recorder, labels = Recorder(), torch.arange(6) % 3
    _, t, x_t = draw()

    def model(*arguments: Tensor, class_labels: Tensor) -> Tensor:
        output = recorder(*arguments, class_labels=class_labels)
        return torch.cat([output, 0 * output + 0.2 * class_labels.view(-1, 1, 1, 1)], dim=1)

    _, fraction = diffusion.predict_with_variance(
        model, x_t, t, x_self_cond=x_t, class_labels=labels, guidance_scale=2.0
    )
    assert fraction is not None
    assert torch.allclose(fraction[:, 0, 0, 0], (0.2 * labels.double() + 1) / 2)
    ((_, guess, _),) = recorder.calls
    assert guess is not None
    assert torch.equal(guess, torch.cat([x_t, x_t]))
