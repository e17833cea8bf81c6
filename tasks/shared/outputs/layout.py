"""Every path of the workspace, relative to the repository's root, where all commands run."""

from pathlib import Path

STAGES = ("sizes", "prepare", "pretrain", "embed", "cluster", "linear", "adapt", "report")
ONCE = ("sizes", "prepare", "report")  # the others run once an encoder
SPLITS = ("train", "test")

PARAMS = Path("params.yaml")
ARTIFACTS = Path("artifacts")
METRICS = Path("metrics")
PLOTS = Path("plots")
STATE = Path("state")

SIZES = ARTIFACTS / "sizes" / "sizes.json"
PREPARED = ARTIFACTS / "prepare"
META = PREPARED / "meta.json"
REPORT = ARTIFACTS / "report" / "report.html"
COMPARISON = ARTIFACTS / "report" / "comparison.csv"
COSTS = ARTIFACTS / "report" / "costs.js"  # which DVC ignores


def out(stage: str, encoder: str | None = None) -> Path:
    """The folder that a stage writes, one per encoder where the stage runs once per encoder."""
    return ARTIFACTS / stage / encoder if encoder else ARTIFACTS / stage


def metrics(stage: str, encoder: str | None = None) -> Path:
    """The stage's metrics, in git."""
    return METRICS / stage / f"{encoder}.json" if encoder else METRICS / f"{stage}.json"


def curve(stage: str, encoder: str) -> Path:
    """The stage's curve as CSV, in git, for `dvc plots`."""
    return PLOTS / stage / f"{encoder}.csv"


def split(name: str) -> Path:
    """The labels and item list of `train` or `test`."""
    return PREPARED / name


def images(side: int) -> Path:
    """The folder of the prepared images of so many pixels a side: an array for each split."""
    return PREPARED / "images" / str(side)


def statistics(encoder: str) -> Path:
    """The description of the images that an encoder gets."""
    return PREPARED / "encoders" / f"{encoder}.json"


def embeddings(encoder: str, split_name: str) -> Path:
    """Features of one split, rows in data-set order."""
    return out("embed", encoder) / f"{split_name}.npy"


def state(stage: str, encoder: str | None = None) -> Path:
    """The folder in which an unfinished run of a stage keeps its state, in neither git nor DVC."""
    return STATE / stage / encoder if encoder else STATE / stage


def cost(stage: str, encoder: str | None = None) -> Path:
    """What the last run of a stage took, in neither git nor DVC."""
    return STATE / "costs" / stage / f"{encoder}.json" if encoder else STATE / "costs" / f"{stage}.json"


def preempted(stage: str, encoder: str | None = None) -> Path:
    """A marker file that exists if a signal stopped the stage's last run; run again, the stage continues."""
    return state(stage, encoder) / "preempted"


def runs(encoder: str) -> Path:
    """The states of unfinished pretraining runs, one folder each."""
    return state("pretrain", encoder) / "runs"


def last_good(encoder: str) -> Path:
    """The encoder of the last epoch without an alarm, kept until its run has ended."""
    return state("pretrain", encoder) / "last_good"


def predicting(encoder: str) -> list[Path]:
    """All that a prediction depends on; without labels there are no weights of a classifier, and clusters of an earlier
    version lack `clusters.safetensors`."""
    pretrain, cluster, linear = (out(stage, encoder) for stage in ("pretrain", "cluster", "linear"))
    return [
        *(pretrain / "encoder.safetensors", pretrain / "encoder.json", cluster / "centroids.npy"),
        *(cluster / "cluster.json", cluster / "clusters.safetensors"),
        *(linear / "classifier.json", linear / "classifier.safetensors"),
        statistics(encoder),
    ]


def stage_of(path: Path) -> str:
    """The stage that writes a file or folder of artifacts, metrics or plots, as DVC names it."""
    names = list(path.parts[1:3])
    if path.parts[0] != ARTIFACTS.name:
        names[-1] = Path(names[-1]).stem  # a file's; an encoder may have dots in its name
    return names[0] if names[0] in ONCE else "@".join(names)
