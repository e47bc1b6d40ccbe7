"""Fine-tuning as Cog runs it: a dataset and settings in, an adapter out, one training at a time.

`Finetuner` only adapts Cog's interface to `xgenmm finetune`, which it runs as a process of its own:
so a training that is cancelled, crashes or runs out of memory leaves the server, and the memory of
the GPU, as they were. Environment variables configure it:

    XGENMM_HOME          the folder that contains the checkpoints, see docs/weights.md
    XGENMM_FETCH_SECONDS, XGENMM_FETCH_BYTES, XGENMM_PRIVATE_ADDRESSES
                         limits on the download of the dataset
    XGENMM_DATASET_FILES, XGENMM_DATASET_UNPACKED_BYTES, XGENMM_DATASET_DATA_BYTES
                         limits on its content, see docs/finetuning.md

The form's text is in single literals, for the reason that predict.py gives.
"""

import itertools
import logging
import shutil
import tarfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path as LocalPath

from cog import BasePredictor, Input, Path, streaming

from serving.compat import Prediction, SlotWatch, set_up_watched, temporary_folder
from serving.inputs import check_url, read_url
from serving.settings import fetch_limits, limits
from serving.training import Training
from xgenmm import CheckpointError, InputError
from xgenmm.checkpoints.registry import resolve, search_folders
from xgenmm.finetuning.archive import ArchiveLimits, unpack
from xgenmm.preprocessing.fetch import FetchLimits

BASES = (
    "xgen-mm-phi3-mini-instruct-interleave-r-v1.5",
    "xgen-mm-phi3-mini-instruct-singleimg-r-v1.5",
    "xgen-mm-phi3-mini-instruct-dpo-r-v1.5",
    "demo",
)
FETCH_SECONDS = 900.0
FETCH_BYTES = 4_000_000_000
# The server is busy, and its worker idle, while the adapter is uploaded.
UPLOAD_SECONDS = 1800.0

logger = logging.getLogger(__name__)


class Finetuner(BasePredictor):
    """Trains the checkpoints that are on this machine.

    All that a training writes is below `folder`; the folder of each is removed when it ends, its
    result once Cog's server has taken it.
    """

    folder: LocalPath
    fetch_limits: FetchLimits
    archive_limits: ArchiveLimits

    def setup(self) -> None:
        """Check that there is something to train.

        Raises CheckpointError, naming the command to run, if there is no checkpoint, and InputError
        for a setting that is out of range or a missing package.
        """
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs each URL
        set_up_watched(self._prepare)

    def _prepare(self) -> SlotWatch:
        self.fetch_limits = fetch_limits(FETCH_SECONDS, FETCH_BYTES)
        self.archive_limits = limits("XGENMM_DATASET", ArchiveLimits())
        for package in ("accelerate", "peft"):
            if find_spec(package) is None:
                raise InputError(package, "is not installed; run `pip install 'xgenmm[finetune]'`")
        present = bases_present()
        if not present:
            looked = " or ".join(map(str, search_folders()))
            problem = f"no checkpoint to train in {looked}; run `xgenmm download {BASES[0]}`"
            raise CheckpointError(f"base: {problem}")
        logger.info("can train %s", ", ".join(present))
        self.folder = temporary_folder("finetune")
        self._numbers = itertools.count(1)
        return SlotWatch(1, UPLOAD_SECONDS, self.folder)

    @streaming
    def predict(
        self,
        dataset: Path = Input(
            description='A .zip, .tar or .tar.gz file with one data file and its images. The data file is JSON Lines, {"messages": [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "A mill."}], "images": ["images/mill.jpg"]}, or LLaVA JSON. Paths of images are relative to it. All of it is checked first.',
        ),
        base: str = Input(
            default="xgen-mm-phi3-mini-instruct-interleave-r-v1.5",
            choices=[
                "xgen-mm-phi3-mini-instruct-interleave-r-v1.5",
                "xgen-mm-phi3-mini-instruct-singleimg-r-v1.5",
                "xgen-mm-phi3-mini-instruct-dpo-r-v1.5",
                "demo",
            ],
            description="The checkpoint to start from. It must be in the image.",
        ),
        lora_rank: int = Input(
            default=16,
            ge=1,
            le=256,
            description="Width of LoRA's matrices. More can learn more, and needs more data.",
        ),
        learning_rate: float = Input(
            default=0.0001,
            ge=0.0000001,
            le=0.01,
            description="Highest learning rate. It rises in the first 3 % of the steps, and falls along a cosine.",
        ),
        epochs: int = Input(
            default=1,
            ge=1,
            le=1000,
            description="How often each sample is seen. A few hundred samples need several epochs.",
        ),
        batch_size: int = Input(
            default=16,
            ge=1,
            le=1024,
            description="Samples of one step. It does not change how much memory is needed.",
        ),
        seed: int = Input(
            default=42,
            ge=0,
            le=4294967295,
            description="Random seed of the order of the samples and of LoRA's first values.",
        ),
    ) -> Iterator[Path]:
        """Train an adapter on a dataset; yields it as a tar file, the only output.

        Progress is logged, which Cog sends to its clients. The tar is what `adapter` of predict.py,
        XGENMM_ADAPTER and COG_WEIGHTS take. Cog cancels by raising CancelationException.
        """
        with Prediction():
            checkpoint = find_base(base)
            work, result = self._new_folders()
            try:
                logger.info("fetching the dataset")
                url = check_url("dataset", dataset)
                content = read_url("dataset", url, self.fetch_limits, "archive")
                (work / "dataset").mkdir()
                data = unpack(content, work / "dataset", self.archive_limits)
                del content
                options = {
                    "--lora-rank": lora_rank,
                    "--learning-rate": learning_rate,
                    "--epochs": epochs,
                    "--batch-size": batch_size,
                    "--seed": seed,
                }
                training = Training(checkpoint, data, work, options)
                for name, value in training.run().items():
                    self.record_metric(name, value)
                result.mkdir()
                pack_folder(training.adapter, result / "adapter.tar")
            finally:
                shutil.rmtree(work, ignore_errors=True)
            size = (result / "adapter.tar").stat().st_size
            logger.info("done: adapter.tar, %.1f MB", size / 1e6)
            yield Path(result / "adapter.tar")

    def _new_folders(self) -> tuple[LocalPath, LocalPath]:
        """Return a new folder for the work, and the path of one for the result, which outlives it.

        Removes all older ones: Cog calls `predict` after it has taken the result before.
        """
        for old in self.folder.iterdir():
            shutil.rmtree(old, ignore_errors=True)
        number = next(self._numbers)
        work, result = self.folder / f"work-{number}", self.folder / f"result-{number}"
        work.mkdir()
        return work, result


# Cog leaves text alone, see serving/inputs.py.
Finetuner.predict.__annotations__["dataset"] = str


def bases_present() -> list[str]:
    """Return the checkpoints on this machine that can be trained."""
    present = []
    for name in BASES:
        try:
            resolve(name)
        except CheckpointError:
            continue
        present.append(name)
    return present


def find_base(name: str) -> LocalPath:
    """Return the folder of a checkpoint. Raises InputError, naming those that are here."""
    try:
        return resolve(name)
    except CheckpointError as error:
        present = ", ".join(bases_present())
        raise InputError("base", f"{name} is not on this server; it has {present}") from error


def pack_folder(folder: LocalPath, path: LocalPath) -> None:
    """Write the files of a folder into a tar, the same bytes for the same files."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.mtime = member.uid = member.gid = 0
        member.uname = member.gname = ""
        return member

    with tarfile.open(path, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.add(file, file.name, filter=plain)
