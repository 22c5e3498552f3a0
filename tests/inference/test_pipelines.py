"""What `load_pipeline` checks and where it puts the models; its LoRAs are in test_pipeline_loras.py."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

from hy_prfl.formats.pipeline_info import PipelineInfo
from hy_prfl.inference.pipelines import load_pipeline


def test_a_transformer_that_is_not_finite(pipeline_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(pipeline_dir, tmp_path / "pipeline")
    transformer = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
    transformer.proj_out.bias.data[0] = math.nan
    transformer.save_pretrained(tmp_path / "pipeline" / "transformer")
    tuned = str(tmp_path / "pipeline" / "transformer")
    with pytest.raises(ValueError, match=r"`transformer_path` '.*': 'proj_out\.bias' holds a NaN"):
        load_pipeline(str(pipeline_dir), transformer_path=tuned)
    with pytest.raises(ValueError, match=r"pipeline/transformer: 'proj_out\.bias' holds a NaN"):
        load_pipeline(str(tmp_path / "pipeline"))


def test_a_pipeline_that_has_been_read(i2v_pipeline_dir: Path) -> None:
    info = PipelineInfo.read(str(i2v_pipeline_dir))
    expected, loaded = (load_pipeline(each).transformer for each in (str(i2v_pipeline_dir), info))
    assert all(value.equal(loaded.get_parameter(name)) for name, value in expected.named_parameters())
    with pytest.raises(ValueError, match="`revision` must be that of the pipeline that was read, None, got 'v2'"):
        load_pipeline(info, revision="v2")
    # What was read decides.
    with pytest.raises(ValueError, match="is a `FluxPipeline`"):
        load_pipeline(replace(info, index={**info.index, "_class_name": "FluxPipeline"}))


def test_text_encoder_on_the_cpu(pipeline_dir: Path) -> None:
    # The meta device stands for a GPU: nothing but the place of weights is looked at.
    pipeline = load_pipeline(str(pipeline_dir), device="meta", text_encoder_on_cpu=True)
    assert {pipeline.transformer.device.type, pipeline.vae.device.type} == {"meta"}
    assert pipeline.text_encoder.device.type == "cpu"
    embeds, _ = pipeline.encode_prompt("a red circle", do_classifier_free_guidance=False, device="cpu")
    assert embeds.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_weights": ["transformer"]}, r"`shard_weights` \['transformer'\] needs `context_parallel`"),
        (
            {"text_encoder_on_cpu": True, "cpu_offload": "model", "device": "meta"},
            "`text_encoder_on_cpu` does not work with",
        ),
        # Before anything is loaded: there is no such transformer.
        (
            {"step_cache": "second_block", "transformer_path": "none"},
            "`step_cache` must be none, first_block, taylorseer or sea, got 'second_block'",
        ),
    ],
)
def test_what_does_not_go_together(pipeline_dir: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_pipeline(str(pipeline_dir), **options)


def test_a_scheduler_without_shift_is_seen_before_the_weights(pipeline_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(pipeline_dir, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    DDIMScheduler().save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="`flow_shift`: the pipeline's DDIMScheduler has no shift of flow matching"):
        load_pipeline(str(folder), flow_shift=7.0)


def test_another_solver(pipeline_dir: Path) -> None:
    pipeline = load_pipeline(str(pipeline_dir), sample_solver="euler", flow_shift=7.0)
    assert isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)
    assert pipeline.scheduler.config.shift == 7.0
