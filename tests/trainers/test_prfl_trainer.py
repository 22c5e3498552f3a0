import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from PIL import Image
from safetensors.torch import load_file

from hy_prfl.data.collators import LatentBatch, collate_latents
from hy_prfl.data.dataset import load_latent_dataset
from hy_prfl.data.schema import table_to_rows
from hy_prfl.data.video import read_video, resize_and_crop
from hy_prfl.flow_matching import row_noise
from hy_prfl.models.conditioning import Conditioning
from hy_prfl.models.loading import load_scheduler
from hy_prfl.models.reward_model import WanRewardModel
from hy_prfl.scripts import preprocess
from hy_prfl.trainers.base import Trainer
from hy_prfl.trainers.prfl_trainer import FLOW_NOISE, REWARD_NOISE, PRFLTrainer


@pytest.fixture
def build(prfl_builder: Callable[..., Callable[..., PRFLTrainer]], pipeline_dir: Path) -> Callable[..., PRFLTrainer]:
    """Function that builds a trainer of a text-to-video pipeline."""
    return prfl_builder(pipeline_dir)


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("schedule", ["alternate", "joint", "reward", "flow_matching"])
def test_full_tuning_moves_every_weight_and_leaves_the_reward_model(
    build: Callable[..., PRFLTrainer], schedule: str
) -> None:
    trainer = build(update_schedule=schedule)
    before, reward_before = snapshot(trainer.unwrapped), snapshot(trainer.reward.models[0])
    trainer.train()
    for name, value in trainer.unwrapped.named_parameters():
        assert not torch.equal(value, before[name]), name
    for name, value in trainer.reward.models[0].named_parameters():
        assert torch.equal(value, reward_before[name]), name
        assert value.grad is None, name


def test_lora_moves_the_adapter_only(build: Callable[..., PRFLTrainer]) -> None:
    trainer = build(lora_rank=2)
    before = snapshot(trainer.unwrapped)
    trainer.train()
    moved = {name for name, value in trainer.unwrapped.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    assert {name.split(".")[-3] for name in moved} == {"lora_A", "lora_B"}
    assert len(moved) == 2 * 3 * 2 * 4  # A and B, 3 blocks, 2 attentions, 4 layers


def reference_batches(trainer: PRFLTrainer, sampler: Any) -> Any:
    rows = table_to_rows(load_latent_dataset(trainer.config.train_dataset)[:])
    for indices in sampler():
        yield collate_latents([rows[index] for index in indices]).to(torch.device("cpu"))


def reference_flow_loss(
    trainer: PRFLTrainer, model: WanTransformer3DModel, batch: LatentBatch, micro_step: int
) -> Any:
    generators = trainer.generators(FLOW_NOISE, micro_step, len(batch))
    u = torch.tensor([1 - torch.randint(1000, (1,), generator=each).item() / 1000 for each in generators])
    sigmas = 5 * u / (1 + 4 * u)
    assert batch.latents is not None
    noise = torch.stack([torch.randn(batch.latents_shape, generator=each) for each in generators])
    weight = sigmas.view(-1, 1, 1, 1, 1)
    noisy = (1 - weight) * batch.latents + weight * noise
    velocity = model(noisy, 1000 * sigmas, batch.prompt_embeds, return_dict=False)[0]
    return ((velocity - (noise - batch.latents)) ** 2).mean()


def reference_reward_loss(
    trainer: PRFLTrainer, model: WanTransformer3DModel, batch: LatentBatch, micro_step: int, step_index: int
) -> Any:
    """A rollout to one step, and the reward loss as one graph through the reward model, with no detour over a leaf."""
    scheduler = load_scheduler(trainer.config.pretrained_model_name_or_path)
    scheduler.set_timesteps(trainer.config.num_inference_steps)
    generators = trainer.generators(REWARD_NOISE, micro_step, len(batch))
    latents = torch.stack([torch.randn(batch.latents_shape, generator=each) for each in generators])
    for index in range(step_index + 1):
        timestep = scheduler.timesteps[index]
        with torch.set_grad_enabled(index == step_index):
            velocity = model(latents, timestep.expand(len(batch)), batch.prompt_embeds, return_dict=False)[0]
            latents = scheduler.step(velocity, timestep, latents).prev_sample
    next_timestep = scheduler.timesteps[step_index + 1].expand(len(batch))
    logits = trainer.reward.models[0](latents, next_timestep, batch.prompt_embeds).logits
    return (1 + (-logits).exp()).log().mean()


def relative_width(trainer: PRFLTrainer, step_index: int) -> float:
    """Width of a step of the chain as a multiple of the mean one."""
    scheduler = load_scheduler(trainer.config.pretrained_model_name_or_path)
    scheduler.set_timesteps(trainer.config.num_inference_steps)
    sigmas = scheduler.sigmas.tolist()
    assert (sigmas[0], sigmas[-1]) == (pytest.approx(1, abs=1e-3), 0)
    return trainer.config.num_inference_steps * (sigmas[step_index] - sigmas[step_index + 1])


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        ("alternate", {}),
        ("joint", {}),
        ("alternate", {"num_gradient_steps": 2, "rerun_gradient_step": True}),
        ("joint", {"num_gradient_steps": 3}),
    ],
)
def test_one_step_equals_the_same_arithmetic_written_out(
    build: Callable[..., PRFLTrainer], schedule: str, options: dict[str, Any]
) -> None:
    """Both losses, accumulation, who updates when, clipping and AdamW against a loop in plain torch, a rollout each."""
    trainer = build(
        **options,
        update_schedule=schedule,
        gradient_accumulation_steps=2,
        max_train_steps=1,
        prompt_dropout=0.0,
        reward_scale=1.0,
    )
    model = WanTransformer3DModel.from_pretrained(
        trainer.config.pretrained_model_name_or_path, subfolder="transformer"
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    batches = reference_batches(trainer, trainer.datasets.clip_sampler)
    for micro_step in range(2):
        (reference_flow_loss(trainer, model, next(batches), micro_step) / 2).backward()
    if schedule == "alternate":
        update()
    batches = reference_batches(trainer, trainer.datasets.prompt_sampler)
    for micro_step in range(2):
        batch, step_indices = next(batches), trainer.draw_step_indices(micro_step)
        assert len(step_indices) == options.get("num_gradient_steps", 1)
        for step_index in step_indices:
            loss = reference_reward_loss(trainer, model, batch, micro_step, step_index)
            (loss / relative_width(trainer, step_index) / 2 / len(step_indices)).backward()
    update()

    trainer.train()
    for name, value in trainer.unwrapped.named_parameters():
        difference = (value - model.get_parameter(name)).norm() / model.get_parameter(name).norm()
        assert difference < 1e-4, name


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients by name; the model forgets them."""
    grads = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    return grads


@pytest.mark.parametrize("options", [{}, {"rerun_gradient_step": True}, {"divide_by_step_width": False}])
def test_surrogates_along_a_chain_have_the_gradients_of_separate_rollouts(
    build: Callable[..., PRFLTrainer], options: dict[str, Any]
) -> None:
    trainer = build(prompt_dropout=0.0, num_inference_steps=7, num_gradient_steps=3, **options)
    trainer.start_streams()
    batch = next(trainer.reward_batches).to(torch.device("cpu"))
    trainer.start_streams()
    surrogates = trainer.reward_surrogates(0)
    for step_index in trainer.draw_step_indices(0):
        surrogate, term = next(surrogates)
        surrogate.backward()
        grads = gradients(trainer.unwrapped)
        expected = reference_reward_loss(trainer, trainer.unwrapped, batch, 0, step_index)
        (
            expected / relative_width(trainer, step_index) if options.get("divide_by_step_width", True) else expected
        ).backward()
        assert term.feedback.loss.item() == pytest.approx(expected.item(), rel=1e-5)
        for name, grad in gradients(trainer.unwrapped).items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-8, msg=name)
    assert next(surrogates, None) is None


def test_reward_training_raises_the_reward(build: Callable[..., PRFLTrainer]) -> None:
    trainer = build(
        update_schedule="reward", max_train_steps=12, train_batch_size=4, reward_loss="logit", learning_rate=3e-3
    )
    trainer.start_streams()
    batch = next(trainer.reward_batches).to(torch.device("cpu"))

    def reward() -> float:
        step = next(trainer.roll_out(batch.latents_shape, Conditioning.of(batch), 0))
        return trainer.reward.differentiate(step, Conditioning.of(batch))[2].mean().item()

    before = reward()
    trainer.train()
    trainer.global_step = 0
    assert reward() > before + 0.05


@pytest.mark.parametrize(
    "options",
    [
        {"rerun_gradient_step": True},
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_blocks": 2,
            "reward_gradient_checkpointing_blocks": 1,
        },
        {"gradient_checkpointing": True, "offload_activations": True, "rerun_gradient_step": True},
        {"offload_reward_model": True},
        {"offload_reward_model": True, "gradient_checkpointing": True},
        {"rollout_attention_backend": "_native_math"},
        {"attention_backend": "_native_math", "rollout_attention_backend": "native"},
    ],
)
@pytest.mark.parametrize("tuning", [{}, {"lora_rank": 2, "learning_rate": 1e-2}])
def test_what_saves_memory_or_time_changes_no_weight(
    build: Callable[..., PRFLTrainer], tmp_path: Path, options: dict[str, Any], tuning: dict[str, Any]
) -> None:
    more = {"num_gradient_steps": 2, "update_schedule": "reward", **tuning}
    plain, other = build(**more), build(output_dir=str(tmp_path / "other"), **more, **options)
    before = snapshot(plain.unwrapped)
    plain.train()
    other.train()
    moved = [(value - before[name]).norm() for name, value in plain.unwrapped.named_parameters()]
    differences = [
        (value - other.unwrapped.get_parameter(name)).norm() for name, value in plain.unwrapped.named_parameters()
    ]
    assert torch.stack(differences).norm() < 1e-3 * torch.stack(moved).norm()


def test_compiled_blocks_train_and_save_as_others(
    build: Callable[..., PRFLTrainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler itself would take minutes here: it is told to run what it was given as it is."""
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", False)
    options: dict[str, Any] = {"gradient_checkpointing": True, "update_schedule": "reward", "num_gradient_steps": 2}
    plain, other = build(**options), build(output_dir=str(tmp_path / "compiled"), compile=True, **options)
    for model in (other.unwrapped, other.reward.models[0]):
        assert all(block._compiled_call_impl is not None for block in model.blocks)
    # Too many variants of a block are an error: torch would run the rest without compiling, and say nothing.
    assert torch._dynamo.config.fail_on_recompile_limit_hit
    plain.train()
    with torch.compiler.set_stance("force_eager"):
        other.train()
    file = "transformer/diffusion_pytorch_model.safetensors"
    expected, weights = load_file(tmp_path / "out" / file), load_file(tmp_path / "compiled" / file)
    assert set(weights) == set(expected)
    assert all(torch.equal(value, weights[name]) for name, value in expected.items())


def test_memory_options_that_exclude_each_other_are_refused(build: Callable[..., PRFLTrainer]) -> None:
    with pytest.raises(ValueError, match=r"`num_gradient_steps` must be in \[1, 2\]"):
        build(num_inference_steps=10, step_range=[3, 4], num_gradient_steps=3)
    with pytest.raises(ValueError, match="`rerun_gradient_step` must be false with `lora_dropout` 0.1"):
        build(lora_rank=2, lora_dropout=0.1, rerun_gradient_step=True)
    with pytest.raises(ValueError, match="`offload_activations` must be left out without `gradient_checkpointing`"):
        build(offload_activations=True)
    with pytest.raises(ValueError, match="`offload_reward_model` must be false with `shard_reward_model`"):
        build(offload_reward_model=True, shard_reward_model=True)
    with pytest.raises(ValueError, match="`compile` must be false with `offload_reward_model`"):
        build(offload_reward_model=True, compile=True)
    with pytest.raises(ValueError, match="`compile` must be false with `context_parallel_degree` above 1"):
        build(compile=True, context_parallel_degree=2)
    with pytest.raises(ValueError, match="`num_gradient_steps` must be left out with the schedule 'flow_matching'"):
        build(update_schedule="flow_matching", num_gradient_steps=2)
    with pytest.raises(ValueError, match=r"must be in \[0, 3\] for this WanTransformer3DModel, got 4"):
        build(gradient_checkpointing=True, gradient_checkpointing_blocks=4)


def test_attention_kernels_are_refused_before_anything_loads(build: Callable[..., PRFLTrainer]) -> None:
    nowhere = {"pretrained_model_name_or_path": "nowhere", "reward_model": "nowhere", "train_dataset": "nowhere"}
    with pytest.raises(ValueError, match=r"`attention_backend` must have a backward pass, and '_flash_3' has none"):
        build(attention_backend="_flash_3", **nowhere)
    with pytest.raises(ValueError, match=r"`rollout_attention_backend` '_flash_3' does not work here.*build FA3"):
        build(rollout_attention_backend="_flash_3", **nowhere)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_rank": 2, "lora_dropout": 0.2, "use_ema": True},
        {"rollout_interval": 2, "rollout_buffer_size": 3, "reward_at": "foreseen", "max_rollout_staleness": 1.0},
        {"rollout_interval": 4, "num_chained_steps": 2, "lora_rank": 2, "anchor_scale": 0.5},
        {"rollout_cache_interval": 2, "num_inference_steps": 6, "lora_rank": 2},
    ],
)
def test_resuming_equals_never_having_stopped(
    build: Callable[..., PRFLTrainer],
    interrupt_after: Callable[[Trainer, int], None],
    tmp_path: Path,
    options: dict[str, Any],
) -> None:
    options = options | {"max_train_steps": 4, "checkpointing_steps": 2, "gradient_accumulation_steps": 2}
    whole = build(output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    parts = tmp_path / "parts"
    first = build(output_dir=str(parts), **options)
    interrupt_after(first, 3)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = build(output_dir=str(parts), resume_from_checkpoint="latest", **options)
    second.train()
    for (name, value), other in zip(
        whole.unwrapped.state_dict().items(), second.unwrapped.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name
    if whole.average is not None:
        assert second.average is not None
        assert all(map(torch.equal, whole.average.ema.shadow_params, second.average.ema.shadow_params))
    assert (tmp_path / "whole" / "metrics.jsonl").read_text() == (parts / "metrics.jsonl").read_text()


def test_full_result_works_in_a_stock_pipeline(
    build: Callable[..., PRFLTrainer], pipeline_dir: Path, tmp_path: Path
) -> None:
    trainer = build()
    trainer.train()
    transformer = WanTransformer3DModel.from_pretrained(tmp_path / "out" / "transformer")
    assert all(
        torch.equal(value, transformer.state_dict()[name]) for name, value in trainer.unwrapped.state_dict().items()
    )
    pipeline = WanPipeline.from_pretrained(pipeline_dir, transformer=transformer)
    video = pipeline(
        prompt="a red circle", height=32, width=32, num_frames=5, num_inference_steps=2, max_sequence_length=16
    )
    assert video.frames.shape == (1, 5, 32, 32, 3)


def test_lora_result_works_in_a_stock_pipeline(
    build: Callable[..., PRFLTrainer], pipeline_dir: Path, tmp_path: Path
) -> None:
    trainer = build(lora_rank=2, lora_alpha=8.0)
    trainer.train()
    pipeline = WanPipeline.from_pretrained(pipeline_dir)
    pipeline.load_lora_weights(tmp_path / "out")
    inputs = torch.randn(1, 16, 2, 4, 4), torch.tensor([500.0]), torch.randn(1, 16, 32)
    with torch.no_grad():
        expected = trainer.unwrapped.eval()(*inputs).sample
        torch.testing.assert_close(pipeline.transformer(*inputs).sample, expected)
        pipeline.disable_lora()
        assert not torch.allclose(pipeline.transformer(*inputs).sample, expected)


def test_averaged_weights_are_what_is_saved(build: Callable[..., PRFLTrainer], tmp_path: Path) -> None:
    trainer = build(use_ema=True, ema_decay=0.5, max_train_steps=3)
    averages = snapshot(trainer.unwrapped)
    original = trainer.train_step

    def step_and_average() -> dict[str, torch.Tensor]:
        metrics = original()
        assert trainer.average is not None
        decay = trainer.average.ema.get_decay(trainer.average.ema.optimization_step)
        for name, value in trainer.unwrapped.named_parameters():
            averages[name] = decay * averages[name] + (1 - decay) * value.detach()
        return metrics

    trainer.train_step = step_and_average  # type: ignore[method-assign]
    trainer.train()
    saved = WanTransformer3DModel.from_pretrained(tmp_path / "out" / "transformer").state_dict()
    for name, value in averages.items():
        torch.testing.assert_close(saved[name], value, rtol=1e-5, atol=1e-6)
        assert not torch.equal(saved[name], trainer.unwrapped.get_parameter(name)), name


def test_validation_samples_are_fixed_scored_and_decoded(
    build: Callable[..., PRFLTrainer], tmp_path: Path, write_latents: Callable[..., Path]
) -> None:
    prompts = write_latents(tmp_path / "prompts", 3, prompts_only=True, shapes=((2, 4, 4), (2, 4, 6)))
    trainer = build(validation_dataset=str(prompts), validation_videos=True, validation_steps=2, max_train_steps=2)
    before = trainer.validate()
    assert before == trainer.validate()
    assert set(before) == {
        "reward",
        "reward_logit",
        "latents_std",
        *(f"reward/t{t}" for t in (201, 400, 600, 800, 1000)),
    }
    trainer.train()
    assert sorted(path.name for path in (tmp_path / "out" / "validation" / "step-2").iterdir()) == [
        "0000.mp4", "0001.mp4", "0002.mp4",
    ]  # fmt: skip
    assert trainer.validate() != before


def test_validation_videos_are_decoded_in_tiles_if_asked_to(
    build: Callable[..., PRFLTrainer],
    tmp_path: Path,
    write_latents: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    prompts = write_latents(tmp_path / "prompts", 1, prompts_only=True)
    build(validation_dataset=str(prompts), validation_videos=True, vae_tiling="on").validate()
    assert "The VAE works in tiles: to decode" in caplog.text


def test_prompts_are_dropped_and_long_captions_taken(build: Callable[..., PRFLTrainer]) -> None:
    trainer = build(prompt_dropout=0.25, long_prompt_probability=0.6)
    batch = LatentBatch(
        ids=["a"] * 4000, latents_shape=(1,), latents=None, image_embeds=None, condition=None,
        prompt_embeds=torch.zeros(4000, 1, 1), long_prompt_embeds=torch.ones(4000, 1, 1),
        null_prompt_embeds=torch.full((4000, 1, 1), 2.0), num_tokens=1,
    )  # fmt: skip
    chosen = trainer.choose_prompts(batch, trainer.generators(REWARD_NOISE, 0, 4000)).prompt_embeds.flatten()
    shares = [(chosen == value).float().mean().item() for value in (0, 1, 2)]
    assert shares == pytest.approx([0.75 * 0.4, 0.75 * 0.6, 0.25], abs=0.03)


def test_step_indices_cover_the_range_and_only_the_range(build: Callable[..., PRFLTrainer]) -> None:
    trainer = build(num_inference_steps=10, step_range=[3, 6])
    drawn = []
    for trainer.global_step in range(80):
        drawn += trainer.draw_step_indices(0)
    assert set(drawn) == {3, 4, 5, 6}


def test_several_step_indices_are_distinct_ascending_and_equally_likely(build: Callable[..., PRFLTrainer]) -> None:
    trainer = build(num_inference_steps=10, step_range=[3, 6], num_gradient_steps=2)
    pairs = []
    for trainer.global_step in range(1200):
        pairs.append(tuple(trainer.draw_step_indices(0)))
    counts = Counter(pairs)
    assert set(counts) == {(3, 4), (3, 5), (3, 6), (4, 5), (4, 6), (5, 6)}
    assert max(abs(count - 200) for count in counts.values()) < 60


def test_separate_prompt_dataset(
    build: Callable[..., PRFLTrainer], tmp_path: Path, write_latents: Callable[..., Path]
) -> None:
    prompts = write_latents(tmp_path / "prompts", 4, prompts_only=True, shapes=((3, 4, 6),))
    trainer = build(prompt_dataset=str(prompts))
    trainer.start_streams()
    assert next(trainer.flow_batches).latents_shape == (16, 2, 4, 4)
    assert next(trainer.reward_batches).latents_shape == (16, 3, 4, 6)
    trainer.train()
    with pytest.raises(ValueError, match="4 of 4 rows have no latents"):
        build(train_dataset=str(prompts), output_dir=str(tmp_path / "other"))


def test_image_to_video(
    build: Callable[..., PRFLTrainer], tmp_path: Path, i2v_pipeline_dir: Path, write_latents: Callable[..., Path]
) -> None:
    transformer = WanTransformer3DModel.from_pretrained(i2v_pipeline_dir, subfolder="transformer")
    WanRewardModel.from_transformer(transformer, num_layers=2).save_pretrained(tmp_path / "i2v_reward")
    options = {"pretrained_model_name_or_path": str(i2v_pipeline_dir), "reward_model": str(tmp_path / "i2v_reward")}
    with pytest.raises(ValueError, match=r"image_embeds_shape.*the model takes 32, got None"):
        build(**options)
    dataset = write_latents(tmp_path / "image", 4, image_to_video=True)
    trainer = build(train_dataset=str(dataset), **options)
    before = snapshot(trainer.unwrapped)
    trainer.train()
    assert not any(torch.equal(value, before[name]) for name, value in trainer.unwrapped.named_parameters())


def test_first_and_last_frame(
    build: Callable[..., PRFLTrainer],
    tmp_path: Path,
    flf2v_pipeline_dir: Path,
    write_video: Callable[..., Path],
) -> None:
    rows = [{"id": str(index), "video": str(write_video(tmp_path / f"{index}.mp4", seed=index))} for index in range(2)]
    (tmp_path / "clips.json").write_text(json.dumps([{**row, "caption": "a square moves"} for row in rows]))
    preprocess.main(
        ["--pretrained_model_name_or_path", str(flf2v_pipeline_dir), "--manifest", str(tmp_path / "clips.json")]
        + ["--output_dir", str(tmp_path / "clips"), "--num_frames", "9", "--buckets", "32x48"]
        + ["--max_sequence_length", "16", "--tensor_dtype", "float32"]
    )
    transformer = WanTransformer3DModel.from_pretrained(flf2v_pipeline_dir, subfolder="transformer")
    WanRewardModel.from_transformer(transformer, num_layers=2).save_pretrained(tmp_path / "flf_reward")
    trainer = build(
        pretrained_model_name_or_path=str(flf2v_pipeline_dir),
        reward_model=str(tmp_path / "flf_reward"),
        train_dataset=str(tmp_path / "clips"),
        validation_dataset=str(tmp_path / "clips"),
        train_batch_size=2,
        max_train_steps=1,
    )
    # What validation samples is what the stock pipeline samples from the same noise, images and prompt.
    assert trainer.evaluator is not None
    dataset = trainer.evaluator.dataset
    batch = collate_latents([table_to_rows(dataset[index])[0] for index in range(2)]).to(torch.device("cpu"))
    assert batch.image_embeds is not None
    assert batch.image_embeds.shape == (4, 5, 32)
    latents = trainer.evaluator._sample(trainer.unwrapped.eval(), batch)
    pipeline = WanImageToVideoPipeline.from_pretrained(flf2v_pipeline_dir)
    pipeline.scheduler = trainer.scheduler
    for index, row in enumerate(rows):
        frames = [Image.fromarray(image) for image in resize_and_crop(read_video(row["video"], 16, 9), 32, 48)]
        expected = pipeline(
            prompt="a square moves", image=frames[0], last_image=frames[-1], height=32, width=48, num_frames=9,
            num_inference_steps=trainer.config.num_inference_steps, guidance_scale=1.0, max_sequence_length=16,
            latents=row_noise(batch.ids[index], batch.latents_shape, seed=trainer.evaluator.seed)[None],
            output_type="latent",
        ).frames  # fmt: skip
        torch.testing.assert_close(latents[index : index + 1], expected, rtol=1e-4, atol=1e-4)
    before = snapshot(trainer.unwrapped)
    trainer.train()
    assert not any(torch.equal(value, before[name]) for name, value in trainer.unwrapped.named_parameters())


def test_half_precision_keeps_float32_masters(
    build: Callable[..., PRFLTrainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    trainer = build(lora_rank=2, max_train_steps=1)
    trainer.train()
    for name, value in trainer.unwrapped.named_parameters():
        if value.requires_grad:
            assert value.dtype == torch.float32, name
    assert trainer.unwrapped.blocks[0].attn1.to_q.base_layer.weight.dtype == torch.bfloat16
    assert trainer.reward.models[0].blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    full = build(max_train_steps=1, output_dir=str(tmp_path / "full"))
    full.train()
    assert {value.dtype for value in full.unwrapped.parameters()} == {torch.float32}


def test_reward_models_that_do_not_fit_are_refused(
    build: Callable[..., PRFLTrainer], tmp_path: Path, pipeline_dir: Path, i2v_pipeline_dir: Path, tiny_vae: str
) -> None:
    with pytest.raises((OSError, ValueError), match="nowhere"):
        build(reward_model="nowhere/reward")
    with pytest.raises(ValueError, match="expected a WanRewardModel, found a WanTransformer3DModel"):
        build(reward_model=str(pipeline_dir / "transformer"))
    transformer = WanTransformer3DModel.from_pretrained(i2v_pipeline_dir, subfolder="transformer")
    WanRewardModel.from_transformer(transformer, num_layers=1).save_pretrained(tmp_path / "i2v")
    with pytest.raises(ValueError, match=r"does not fit the generator: `in_channels` 36 against 16"):
        build(reward_model=str(tmp_path / "i2v"))
    transformer = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
    model = WanRewardModel.from_transformer(transformer, num_layers=1, vae_fingerprint="other")
    model.save_pretrained(tmp_path / "other_vae")
    with pytest.raises(
        ValueError, match="another VAE than the latents that the reward model was trained on: .* against other"
    ):
        build(reward_model=str(tmp_path / "other_vae"))
    model.register_to_config(base_num_layers=40, vae_fingerprint=tiny_vae)
    model.save_pretrained(tmp_path / "other_base")
    with pytest.raises(ValueError, match="`base_num_layers` 40 against 3"):
        build(reward_model=str(tmp_path / "other_base"))
    build(reward_model=str(tmp_path / "other_base"), allow_other_base=True)
