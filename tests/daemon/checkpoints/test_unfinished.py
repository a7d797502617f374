"""The names that tell of a download, a copy or a synchronised folder that is not finished: one table of the tools."""

import pytest

from daemon.checkpoints.unfinished import TEMPORARY, noted, unfinished

NAMES = {
    "aria2": ["x.safetensors.aria2", "x.safetensors.aria2__temp"],
    "lftp": ["x.safetensors.lftp-pget-status", ".in.x.safetensors"],
    "rsync": [".x.safetensors.Ab12Cd", ".config.json.zZ09aa"],
    "safetensors": [".tmpAb12Cd", "x.safetensors.tmpAb12cd"],
    "tempfile": ["x.tmpa1b2c3d4", "x.tmp"],
    "huggingface_hub": ["q1w2e3.abcdef.incomplete", "model.safetensors.6eF4bA2c.incomplete"],
    "Chromium": ["x.crdownload", "Unconfirmed 123456.crdownload", "x.crswap"],
    "Firefox": ["x.safetensors.part", "Ab12Cd.safetensors.part"],
    "Safari": ["x.safetensors.download"],
    "Opera": ["x.opdownload"],
    "Free Download Manager": ["x.fdmdownload"],
    "WinSCP": ["x.safetensors.filepart"],
    "yt-dlp": ["x.ytdl"],
    "rclone": ["x.safetensors.1a2b3c4d.partial"],
    "MinIO's mc": ["x.safetensors.part.minio"],
    "boto3": ["x.safetensors.6eF4bA2c"],
    "aws s3 cp": ["config.json.6eF4bA2c", "tokenizer.model.CAfe0123"],
    "azcopy": [".azDownload-7f3c-x.safetensors"],
    "gsutil": ["x.safetensors_.gstmp"],
    "Syncthing": [".syncthing.x.safetensors.tmp", "~syncthing~x.safetensors.tmp"],
    "Nextcloud": [".x.safetensors.~1a2b", "x.safetensors.ocTransferId123456.part"],
    "BitTorrent": ["x.safetensors.!qB", "x.safetensors.!ut", "x.safetensors.bc!", "x.safetensors.!sync"],
    "MEGA": [".getxfer.1234.mega"],
    "Windows": ["~x1234.tmp", "X.TMP"],
    "git": ["tmp_pack_Ab12Cd"],
    "Trainer": ["tmp-checkpoint-500"],
}
FINISHED = [
    *("model.safetensors", "x.safetensors.20240101", "config.json", "x.tmp.safetensors", "tmp", "part", "x.st"),
    *(
        "model-00001-of-00002.safetensors",
        "x~y",
        "x.parts",
        "deadbeef",
        "x.cafe0123",
        "partial",
        "README.md",
        "model.safetensors.original",
    ),
]
STAY = [
    ".gitattributes",
    ".DS_Store",
    ".env.sample",
    ".config.json.backup",
    "x.lock",
    "config.json~",
    ".config.json.swp",
    ".nfs000000000012a4",
]


@pytest.mark.parametrize(("tool", "name"), [(tool, name) for tool, names in NAMES.items() for name in names])
def test_no_tools_unfinished_file_counts_and_a_folder_waits_for_it(tool: str, name: str) -> None:
    assert TEMPORARY.fullmatch(name)
    assert unfinished(["model.safetensors", name]) == name
    assert unfinished(["model.safetensors", f"below/deeper/{name}"]) == f"below/deeper/{name}"


@pytest.mark.parametrize("name", FINISHED)
def test_a_finished_files_name_tells_nothing(name: str) -> None:
    assert not TEMPORARY.fullmatch(name)
    assert unfinished(["model.safetensors", name, f"below/{name}"]) is None


@pytest.mark.parametrize("name", STAY)
def test_what_stays_for_good_does_not_count_but_holds_no_folder_back(name: str) -> None:
    assert TEMPORARY.fullmatch(name)
    assert unfinished(["model.safetensors", name, f"below/{name}"]) is None


@pytest.mark.parametrize(
    "path",
    [
        ".cache/huggingface/download/q1w2e3.abcdef.incomplete",
        ".git/lfs/incomplete/4d7a2146",
        ".git/index.lock",
        ".~tmp~/model.safetensors",
        ".rsync-partial/model.safetensors",
        "._____temp/model.safetensors",
        "model.safetensors.st",
    ],
)
def test_where_a_file_lies_tells_too(path: str) -> None:
    assert unfinished(["model.safetensors", path]) == path


def test_what_a_finished_download_leaves_holds_nothing_back() -> None:
    hub = ["config.json.metadata", "config.json.lock", "model.safetensors.metadata", "model.safetensors.lock"]
    left = [".cache", ".cache/huggingface", ".cache/huggingface/.gitignore", ".cache/huggingface/CACHEDIR.TAG"]
    left += [f".cache/huggingface/download/{name}" for name in hub]
    assert unfinished(["model.safetensors", "config.json", *left, ".git/config", ".git/lfs/incomplete"]) is None


@pytest.mark.parametrize(
    "note",
    ["x.aria2", "x.st", "x.lftp-pget-status", "x.part", "x.crdownload", "x.aria2__temp", "x_.gstmp", "x.download"],
)
def test_a_note_is_about_the_file_beside_it(note: str) -> None:
    assert noted(["x", "y", note]) == {"x": note}
    assert noted(["y", note]) == {}


def test_locks_and_backups_are_about_nothing() -> None:
    assert noted(["x", "x.lock", "x~", "x.swp", "x.safetensors", "x.json"]) == {}
