from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from hy_prfl.configs.prfl import PRFLTrainingConfig
from hy_prfl.data.encoding import vae_fingerprint
from hy_prfl.data.synthetic import synthetic_dataset
from hy_prfl.inference.tiny_pipelines import build_pipeline
from hy_prfl.models.conditioning import Conditioning, add_condition, num_clean_frames, put_condition
from hy_prfl.models.reward_model import WanRewardModel, score_noised
from hy_prfl.trainers.prfl_trainer import FLOW_NOISE, PRFLTrainer


def test_channels_beside_the_latents() -> None:
    latents, timestep, condition = torch.randn(2, 16, 3, 4, 6), torch.tensor([900.0, 3.0]), torch.randn(2, 20, 3, 4, 6)
    hidden_states, timesteps = add_condition(latents, timestep, condition)
    assert torch.equal(hidden_states[:, :16], latents)
    assert torch.equal(hidden_states[:, 16:], condition)
    assert torch.equal(timesteps, timestep)
    assert torch.equal(put_condition(latents, condition), latents)
    assert add_condition(latents, timestep, None) == (latents, timestep)


def test_first_frame_of_the_latents() -> None:
    """The condition agrees with that of `WanImageToVideoPipeline`, which computes it with a mask."""
    latents, timestep, condition = torch.randn(2, 48, 3, 4, 6), torch.tensor([900.0, 3.0]), torch.randn(2, 48, 1, 4, 6)
    mask = torch.ones(1, 1, 3, 4, 6)
    mask[:, :, 0] = 0
    hidden_states, timesteps = add_condition(latents, timestep, condition)
    assert torch.equal(hidden_states, (1 - mask) * condition + mask * latents)
    for index in range(2):
        assert torch.equal(timesteps[index], (mask[0][0][:, ::2, ::2] * timestep[index]).flatten())
    assert num_clean_frames(latents, condition) == 1
    assert torch.equal(put_condition(latents, condition), hidden_states)


def test_embeddings_are_cast_and_the_condition_stays_in_float32() -> None:
    """The first frame stays in float32: half precision would change the image that was encoded."""
    given = Conditioning(torch.randn(1, 7, 32), torch.randn(1, 5, 32), torch.randn(1, 20, 3, 4, 6))
    moved = given.to("cpu", torch.bfloat16)
    assert (moved.prompt_embeds.dtype, moved.image_embeds.dtype) == (torch.bfloat16, torch.bfloat16)  # type: ignore[union-attr]
    assert torch.equal(moved.condition, given.condition)  # type: ignore[arg-type]
    inputs = moved.model_inputs(torch.randn(1, 16, 3, 4, 6), torch.tensor([900.0]))
    assert inputs["hidden_states"].shape == (1, 36, 3, 4, 6)
    assert {inputs[name].dtype for name in inputs if name != "timestep"} == {torch.bfloat16}
    assert Conditioning(given.prompt_embeds).to("cpu", torch.float32).condition is None


@pytest.mark.parametrize(
    ("model", "channels", "takes_condition", "takes_images"),
    [
        ({"in_channels": 16, "out_channels": 16, "image_dim": None}, 20, False, False),
        ({"in_channels": 36, "out_channels": 16, "image_dim": 32}, 20, True, True),
        ({"in_channels": 36, "out_channels": 16, "image_dim": None}, 20, True, False),
        ({"in_channels": 48, "out_channels": 48, "image_dim": None}, 48, True, False),
    ],
    ids=["text-to-video", "image-to-video", "of two experts", "first frame"],
)
def test_what_a_model_has_no_input_for_is_left_out(
    model: dict[str, int | None], channels: int, takes_condition: bool, takes_images: bool
) -> None:
    given = Conditioning(torch.ones(1, 3, 8), torch.ones(1, 5, 32), torch.ones(1, channels, 1, 4, 4))
    taken = given.taken_by(model)
    assert taken.prompt_embeds is given.prompt_embeds
    assert taken.image_embeds is (given.image_embeds if takes_images else None)
    assert taken.condition is (given.condition if takes_condition else None)
    nothing = Conditioning(given.prompt_embeds).taken_by(model)
    assert (nothing.image_embeds, nothing.condition) == (None, None)


@pytest.mark.parametrize("num_images", [0, 1, 2])
@pytest.mark.parametrize("channels", [None, 20, 16])
def test_one_clip_for_a_batch(num_images: int, channels: int | None) -> None:
    """The same rows as by hand, copied; the two images of a clip (FLF2V) stay together."""
    prompt, condition = torch.randn(1, 7, 32), None if channels is None else torch.randn(1, channels, 3, 4, 6)
    images = torch.randn(num_images, 5, 32) if num_images else None
    given = Conditioning(prompt, images, condition).expand(3)
    assert torch.equal(given.prompt_embeds, prompt.repeat_interleave(3, dim=0))
    # A view of one row would be multiplied with another rounding.
    assert given.prompt_embeds.is_contiguous()
    if images is None:
        assert given.image_embeds is None
    else:
        assert given.image_embeds is not None
        assert torch.equal(given.image_embeds, torch.cat([images, images, images]))
    if condition is None:
        assert given.condition is None
    else:
        assert given.condition is not None
        assert torch.equal(given.condition, condition.repeat_interleave(3, dim=0))
        inputs = given.model_inputs(torch.randn(3, 16, 3, 4, 6), torch.tensor([900.0, 3.0, 5.0]))
        assert inputs["hidden_states"].shape[0] == 3


def test_a_batch_is_not_expanded_to_another_size() -> None:
    given = Conditioning(torch.randn(2, 7, 32), condition=torch.randn(2, 20, 3, 4, 6))
    assert given.expand(2) is given
    for batch_size in (1, 4):
        with pytest.raises(
            ValueError, match=f"`batch_size` must be 2, the clips of this conditioning, got {batch_size}"
        ):
            given.expand(batch_size)
    with pytest.raises(ValueError, match="got 0"):
        Conditioning(torch.randn(1, 7, 32)).expand(0)


@pytest.fixture(scope="module")
def transformer() -> WanTransformer3DModel:
    return build_pipeline(expand_timesteps=True, num_layers=3).transformer


def test_reward_model_sees_the_tokens_of_the_generator(transformer: WanTransformer3DModel) -> None:
    """With one timestep per token, its features equal the output of the generator's second block."""
    model = WanRewardModel.from_transformer(transformer, num_layers=2).eval()
    seen: list[torch.Tensor] = []
    hook = transformer.blocks[1].register_forward_hook(lambda module, args, output: seen.append(output))
    latents, prompt, condition = torch.randn(2, 48, 3, 4, 6), torch.randn(2, 7, 32), torch.randn(2, 48, 1, 4, 6)
    inputs = add_condition(latents, torch.tensor([900.0, 300.0]), condition)
    with torch.no_grad():
        transformer(*inputs, prompt)
        features = model(*inputs, prompt, output_features=True).features
        hook.remove()
        torch.testing.assert_close(features, seen[0])
        shared = model(latents, torch.tensor([900.0, 300.0]), prompt, output_features=True).features
        repeated = model(
            latents, torch.tensor([900.0, 300.0])[:, None].expand(2, 18), prompt, output_features=True
        ).features
    torch.testing.assert_close(shared, repeated)
    assert not torch.allclose(features, shared, atol=1e-2)


def test_reward_has_no_gradient_in_the_first_frame(transformer: WanTransformer3DModel) -> None:
    model = WanRewardModel.from_transformer(transformer, num_layers=2).eval()
    latents = torch.randn(1, 48, 3, 4, 6, requires_grad=True)
    logits = score_noised(
        model, latents=latents, noise=torch.randn(1, 48, 3, 4, 6), sigmas=torch.tensor([0.5]),
        conditioning=Conditioning(torch.randn(1, 7, 32), condition=torch.randn(1, 48, 1, 4, 6)),
    )  # fmt: skip
    (grad,) = torch.autograd.grad(logits.sum(), latents)
    assert (grad[:, :, 0] == 0).all()
    assert (grad[:, :, 1:] != 0).any()


def test_flow_matching_loss_leaves_out_the_first_frame(tmp_path: Path) -> None:
    pipeline = build_pipeline(expand_timesteps=True, num_layers=3)
    pipeline.save_pretrained(tmp_path / "pipeline")
    WanRewardModel.from_transformer(pipeline.transformer, num_layers=1).save_pretrained(tmp_path / "reward")
    fingerprint = vae_fingerprint(AutoencoderKLWan.from_pretrained(tmp_path / "pipeline", subfolder="vae"))
    dataset = synthetic_dataset(
        latents_shape=(48, 3, 4, 6), text_dim=32, vae_fingerprint=fingerprint, text_tokens=5, dtype="float32"
    )
    rows = [{**row, "condition": row["latents"][: 48 * 24], "condition_shape": [48, 1, 4, 6]} for row in dataset]
    type(dataset).from_list(rows, features=dataset.features).save_to_disk(tmp_path / "data")
    trainer = PRFLTrainer.from_config(
        PRFLTrainingConfig(
            output_dir=str(tmp_path / "out"), pretrained_model_name_or_path=str(tmp_path / "pipeline"),
            reward_model=str(tmp_path / "reward"), train_dataset=str(tmp_path / "data"), train_batch_size=2,
            max_train_steps=1, num_inference_steps=4, report_to=["none"], prompt_dropout=0.0,
        )
    )  # fmt: skip
    trainer.start_streams()
    batch = next(trainer.flow_batches)
    assert batch.latents is not None
    noise, sigmas = trainer.draw_noise(FLOW_NOISE, 0, batch)
    weight = sigmas.view(-1, 1, 1, 1, 1)
    noisy = (1 - weight) * batch.latents + weight * noise
    noisy[:, :, :1] = batch.condition
    timesteps = (1000 * sigmas)[:, None].repeat(1, 18)
    timesteps[:, :6] = 0
    with torch.no_grad():
        velocity = trainer.unwrapped(noisy, timesteps, batch.prompt_embeds).sample
        expected = ((velocity - (noise - batch.latents))[:, :, 1:] ** 2).mean()
        torch.testing.assert_close(trainer.compute_flow_matching_loss(batch, 0), expected)
