"""Uploads a run to the Hub while it trains. A failed upload never stops the run."""

import json
import logging
import os
import shlex
import shutil
import tempfile
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from huggingface_hub.utils import disable_progress_bars

from ..runtime.atomic_writes import write_text
from .files import add_card, run_files, stage
from .repositories import PENDING_FILE, SNAPSHOT_PREFIX, HubError, failure_reason, hub_api, open_repo, uploading


logger = logging.getLogger(__name__)


@dataclass
class _Upload:
    """A requested upload. `done` is set when it has ended; `reason` says why it failed."""

    commit_message: str
    snapshot: Path | None = None
    staged: dict[str, Path] = field(default_factory=dict)
    done: threading.Event = field(default_factory=threading.Event)
    reason: str | None = None


class HubUploader:
    """
    Pushes a run while it trains, one upload at a time, in the background. Only the main process uses it.

    An upload reads a snapshot of hard links, so checkpoints may be deleted or replaced during the upload. A new upload
    waits while another one runs. If one is waiting already, the new one replaces it. Failures are warnings, never
    errors: the run's `hub_pending.json` says what is missing on the Hub until an upload, or `hy-prfl push`, succeeds.

    Args:
        run_dir (`Path`):
            Output folder of the run.
        repo_id (`str`):
            `user/name`. For a bare `name`, the user is the token's account.
        private (`bool`, *optional*):
            Whether a new repository is private.

    Raises:
        ValueError: Before training starts, for mistakes of the user, see [`open_repo`]. A network failure is only a
            warning, and every upload tries again.
    """

    def __init__(self, run_dir: str | Path, repo_id: str, *, private: bool | None = None) -> None:
        self.run_dir = Path(run_dir)
        self.repo_id = repo_id
        self.private = private
        self._api = hub_api()
        self._is_open = False
        self._latest: _Upload | None = None
        self._future: Future[str] | None = None
        self._lock = threading.Lock()
        try:
            self._open()
        except HubError as error:
            logger.warning("%s Training continues, and every upload will try again.", error)
        # Delete snapshots of a run that was killed during an upload.
        for leftover in self.run_dir.glob(f"{SNAPSHOT_PREFIX}*"):
            try:
                shutil.rmtree(leftover)
            except OSError as error:
                logger.warning("%s, of an upload that was killed, could not be deleted: %s.", leftover, error)

    def upload(self, *, commit_message: str, weights_dir: Path | None = None) -> None:
        """
        Push the run as it is now, in the background.

        Args:
            commit_message (`str`):
                First line of the commit message.
            weights_dir (`Path`, *optional*):
                Checkpoint to take the weights from; see [`run_files`].
        """
        upload = _Upload(commit_message)
        with self._lock:
            self._latest = upload
        try:
            # Written first, so that the file exists even if the process dies during the upload.
            self._write_pending(upload, "the upload did not finish")
            upload.snapshot = Path(tempfile.mkdtemp(prefix=SNAPSHOT_PREFIX, dir=self.run_dir))
            upload.staged = stage(run_files(self.run_dir, weights_dir), upload.snapshot)
        except (OSError, ValueError) as error:
            self._end(upload, error)
            return
        if self._future is not None and self._future.cancel():
            logger.info("An upload is still waiting; '%s' replaces it.", commit_message)
        self._future = self._api.run_as_future(self._push, upload)
        self._future.add_done_callback(partial(self._after, upload))

    def finish(self, *, commit_message: str) -> bool:
        """
        Push the run's result and wait until the upload is complete or has failed.

        Returns:
            `bool`: whether everything is on the Hub. If not, the log says how to push it.
        """
        self.upload(commit_message=commit_message)
        assert self._latest is not None
        self._latest.done.wait()
        if self._latest.reason is not None:
            logger.warning(
                "The run is complete in %s, but not on the Hub. Fix the cause, then push it with:\n    %s",
                self.run_dir, shlex.join(["hy-prfl", "push", "--folder", str(self.run_dir)]),
            )  # fmt: skip
        return self._latest.reason is None

    def _open(self) -> None:
        self.repo_id = open_repo(self.repo_id, private=self.private)
        self._is_open = True

    def _push(self, upload: _Upload) -> str:
        """Runs in a background thread. `_after` handles its errors."""
        # The trainer has a progress bar of its own.
        disable_progress_bars()
        assert upload.snapshot is not None
        if not self._is_open:
            self._open()
        made = add_card(upload.staged, upload.snapshot, self.repo_id, self._api)
        with uploading(self.repo_id):
            commit = self._api.upload_folder(
                repo_id=self.repo_id, folder_path=upload.snapshot, commit_message=upload.commit_message
            )
        for name in made:
            (self.run_dir / name).parent.mkdir(exist_ok=True)
            os.replace(upload.snapshot / name, self.run_dir / name)
        return commit.commit_url

    def _after(self, upload: _Upload, future: "Future[str]") -> None:
        if not future.cancelled() and future.exception() is None:
            logger.info("Pushed '%s': %s", upload.commit_message, future.result())
        self._end(upload, None if future.cancelled() else future.exception())

    def _end(self, upload: _Upload, error: BaseException | None) -> None:
        """Clean up after an upload that ended, failed, or was replaced before it started."""
        if upload.snapshot is not None:
            shutil.rmtree(upload.snapshot, ignore_errors=True)
        try:
            with self._lock:
                if error is not None:
                    upload.reason = failure_reason(error)
                    logger.warning("'%s' is not on the Hub: %s.", upload.commit_message, upload.reason)
                if upload is self._latest and upload.reason is not None:
                    self._write_pending(upload, upload.reason)
                elif upload is self._latest:
                    (self.run_dir / PENDING_FILE).unlink(missing_ok=True)
        except OSError as disk_error:
            logger.warning("%s could not be written: %s.", self.run_dir / PENDING_FILE, disk_error)
        finally:
            upload.done.set()

    def _write_pending(self, upload: _Upload, reason: str) -> None:
        state = {"repo_id": self.repo_id, "private": self.private, "folder": str(self.run_dir)}
        state |= {"commit_message": upload.commit_message, "reason": reason}
        write_text(self.run_dir / PENDING_FILE, json.dumps(state, indent=2))
