"""What a run reports: its metrics, its record and page in `output_dir`, trackers, and uploads to the Hub."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.tracking import get_available_trackers

from ..configs.base import TrainingConfig, check
from ..evaluation.tracking import announce_trackers, log_timestep_curves
from ..formats.pipeline_info import PipelineInfo
from ..hub import HubUploader
from ..hub.run_sources import SOURCES, run_sources
from ..pages.report import write_run_page
from ..runtime.atomic_writes import write_text
from ..runtime.device_memory import peak_device_memory
from ..runtime.distributed import gather_records
from ..runtime.provenance import (
    CONFIG_FILE,
    METRICS_FILE,
    RUN_FILE,
    finish_run_record,
    read_metric_lines,
    run_record,
    save_config,
    stop_run_record,
    write_run_record,
)


logger = get_logger(__name__)


def known_trackers(report_to: list[str]) -> list[str]:
    """Names of the trackers, without `none`. Raises a `ValueError` if one is not installed."""
    names = [name for name in report_to if name != "none"]
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        check(name in available, "report_to", name, f"`none` or one of the trackers installed here: {available}")
    return names


class Reports:
    """
    Writes into `output_dir` and to the trackers, and pushes to the Hub. All ranks call its methods.

    It is built before any model is loaded, so that a wrong token or repository costs no GPU time.

    Args:
        accelerator (`Accelerator`):
            Built with the trackers of `config.report_to`.
        config (`TrainingConfig`):
            Options of the run.

    Raises:
        ValueError: If `push_to_hub` is set but pushing is not possible, see [`~hy_prfl.hub.open_repo`].
    """

    def __init__(self, accelerator: Accelerator, config: TrainingConfig) -> None:
        self.accelerator = accelerator
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.uploader: HubUploader | None = None
        if config.push_to_hub and accelerator.is_main_process:
            repo_id = config.hub_model_id or self.output_dir.resolve().name
            self.uploader = HubUploader(self.output_dir, repo_id, private=config.hub_private_repo or None)

    def start(
        self,
        global_step: int,
        *,
        pipeline: PipelineInfo,
        checkpoint: Path | None = None,
        abandoned: Path | None = None,
    ) -> None:
        """
        Start the reports of a run that begins, or that resumes after `global_step` updates.

        Args:
            pipeline (`PipelineInfo`):
                The pipeline of the run.
            checkpoint (`Path`, *optional*):
                Checkpoint that the run resumes from.
            abandoned (`Path`, *optional*):
                Folder that the files of later steps were moved to.
        """
        config = self.config
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            save_config(config, self.output_dir / CONFIG_FILE)
            self._truncate_metrics(global_step)
            record = run_record(seed=config.seed, num_processes=self.accelerator.num_processes)
            if checkpoint is not None:
                record |= {"resumed_from": str(checkpoint), "resumed_step": global_step}
            if abandoned is not None:
                record["abandoned"] = abandoned.name
            record[SOURCES] = run_sources(dataclasses.asdict(config), pipeline)
            write_run_record(self.output_dir / RUN_FILE, record)
        options = {
            name: value if isinstance(value, (int, float, str, bool)) else str(value)
            for name, value in dataclasses.asdict(config).items()
        }
        name = {"name": self.output_dir.name}
        self.accelerator.init_trackers(
            config.tracker_project_name,
            config=options,
            init_kwargs={
                "wandb": {**name, "dir": str(self.output_dir)},
                "trackio": name,
                # Hides what an earlier start logged for steps that are repeated.
                "tensorboard": {"purge_step": global_step + 1} if checkpoint or abandoned else {},
            },
        )
        announce_trackers(self.accelerator)

    def log(
        self, values: dict[str, float], notes: Mapping[str, str] | None = None, *, global_step: int, prefix: str
    ) -> None:
        """Send scalars, named `prefix/name`, to the trackers, and append them and `notes` to `metrics.jsonl`."""
        entries = {f"{prefix}/{name}": value for name, value in values.items()}
        self.accelerator.log(entries, step=global_step)
        if self.accelerator.is_main_process:
            with (self.output_dir / METRICS_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": global_step, **entries, **(notes or {})}) + "\n")

    def log_validation(
        self, values: dict[str, float], notes: Mapping[str, str] | None = None, *, global_step: int
    ) -> None:
        """Like `log`, with curves of the metrics that were measured at several timesteps."""
        self.log(values, notes, global_step=global_step, prefix="validation")
        log_timestep_curves(self.accelerator, values, step=global_step, name="validation/by_timestep")

    def checkpoint_saved(self, checkpoint: Path, *, global_step: int) -> None:
        """Push in the background, if it is this checkpoint's turn."""
        every = self.config.checkpointing_steps * (self.config.hub_push_checkpoints or 0)
        if self.uploader is not None and every and global_step % every == 0:
            self.uploader.upload(commit_message=f"Step {global_step}", weights_dir=checkpoint)

    def note_result(self, *, global_step: int) -> None:
        """Record the step of the result and the peak memory, and write the run's page. A collective."""
        peaks = [peak for peak in gather_records([peak_device_memory(self.accelerator.device)]) if peak is not None]
        if self.accelerator.is_main_process:
            finish_run_record(self.output_dir / RUN_FILE, global_step, peak_gpu_memory=peaks)
            if self.config.write_report:
                write_run_page(self.output_dir)

    def note_stop(self, reason: str, *, global_step: int) -> None:
        """Record that and why the run ended before its last step, and write its page."""
        if self.accelerator.is_main_process:
            stop_run_record(self.output_dir / RUN_FILE, global_step, reason)
            if self.config.write_report:
                write_run_page(self.output_dir)

    def finish(self, *, global_step: int) -> None:
        """Push the result. The other ranks do not wait, as an upload may take long."""
        if self.uploader is not None:
            self.uploader.finish(commit_message=f"Step {global_step}, end of training")

    def _truncate_metrics(self, global_step: int) -> None:
        """Drop the lines of steps after the checkpoint that the run resumes from."""
        path = self.output_dir / METRICS_FILE
        lines = read_metric_lines(path)
        # A run that starts over also measures its start again.
        kept = [line for step, line in lines if 0 < global_step >= step]
        if len(kept) < len(lines):
            logger.info(
                "%s: dropped %d lines of steps after %d, which are repeated.", path, len(lines) - len(kept), global_step,
            )  # fmt: skip
        write_text(path, "".join(f"{line}\n" for line in kept))
