"""The images that ship, as far as a machine without an engine can tell: linted, and their steps run in a folder."""

import difflib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import compose_spec
import pytest
import yaml

from tests.models import write_base, write_expert

ROOT = Path(__file__).parents[2]
CONTAINER = ROOT / "deploy/container"
DOCKERFILES = ("Dockerfile", "Dockerfile.cuda")
MOST_MEGABYTES = 950  # of /opt/mainstem on the CPU; Python's own image has about 130 more
NOBODY = "65534"


def instructions(name: str) -> Iterator[tuple[str, str]]:
    """A Dockerfile's instructions and what they say, in order."""
    text = re.sub(r"^#.*\n", "", (CONTAINER / name).read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    for line in filter(None, text.splitlines()):
        word, _, rest = line.partition(" ")
        yield word, rest


@pytest.mark.parametrize("name", DOCKERFILES)
def test_a_linter_finds_nothing(name: str) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, CONTAINER / name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_image_runs_as_nobody_special_and_is_probed(name: str) -> None:
    last = [line for number, line in _stages(name) if number == 2]
    assert ("USER", "10001:10001") in last
    assert next(rest for word, rest in last if word == "HEALTHCHECK").endswith('CMD ["mainstem", "health"]')
    assert not [rest for _, rest in last if re.search(r"\b(gcc|g\+\+|build-essential|-dev)\b", rest)]


def _stages(name: str) -> Iterator[tuple[int, tuple[str, str]]]:
    stage = 0
    for word, rest in instructions(name):
        stage += word == "FROM"
        yield stage, (word, rest)


def test_the_images_differ_by_torch_alone() -> None:
    one, other = ([" ".join(instruction) for instruction in instructions(name)] for name in DOCKERFILES)
    changed = [line for line in difflib.ndiff(one, other) if line[0] in "+-"]
    assert len(changed) == 4  # the index, and the environment
    assert all("TORCH_INDEX" in line or "MAINSTEM_HOME" in line for line in changed)


def test_only_what_is_built_goes_into_the_build() -> None:
    """What a COPY names is let through by .dockerignore, and nothing else of the repository."""
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    let_through = {line[1:] for line in ignored if line.startswith("!")}
    copied = {name for word, rest in instructions("Dockerfile") if word == "COPY" for name in rest.split()[:-1]}
    assert "*" in ignored
    assert let_through == {name for name in copied if not name.startswith(("--", "/"))}
    assert all((ROOT / name).exists() for name in let_through)


def test_compose_is_what_the_specification_says() -> None:
    text = (CONTAINER / "compose.yaml").read_text()
    compose_spec.PyCompose.from_yaml(text).validate()
    services = yaml.safe_load(text)["services"]
    assert set(services) == {"mainstem", "serve", "prometheus", "alertmanager", "grafana"}
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"], name
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name


def test_what_compose_mounts_is_there() -> None:
    for name, service in yaml.safe_load((CONTAINER / "compose.yaml").read_text())["services"].items():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source.startswith(".."):
                there = (CONTAINER / source).parent.is_dir()  # what another folder of deploy/ ships
                assert not there or (CONTAINER / source).exists(), f"{name}: {source}"


RULES = ROOT / "deploy/prometheus/rules.yml"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no Prometheus: `make system` installs it")
def test_prometheus_reads_its_configuration_for_compose(tmp_path: Path) -> None:
    for path in (CONTAINER / "prometheus.yml", RULES):
        shutil.copy(path, tmp_path)
    check = ["promtool", "check", "config", "prometheus.yml"]
    done = subprocess.run(check, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def build(root: Path) -> Path:
    """Runs the steps of the first stage under `root` instead of /; the folder that the second takes from it.

    torch comes from the index that pip has here, unless TORCH_INDEX says otherwise.
    """
    environment = {"PATH": f"{Path(sys.base_prefix) / 'bin'}:{os.environ['PATH']}", "HOME": str(root)}
    environment |= {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    folder = root
    for stage, (word, rest) in _stages("Dockerfile"):
        here = rest.replace("/opt/mainstem", str(root / "opt/mainstem"))
        if stage != 1:
            continue
        if word == "WORKDIR":
            folder = root / rest.lstrip("/")
            folder.mkdir()
        elif word == "ENV":
            environment |= dict(pair.split("=", 1) for pair in shlex.split(rest))
        elif word == "ARG":
            name, _, value = rest.partition("=")
            environment[name] = os.environ.get(name, "") if name == "TORCH_INDEX" else value
        elif word == "COPY":
            *names, target = rest.split()
            for name in names:
                to = folder / target / name if target.endswith("/") else folder / target
                (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, to)
        elif word == "RUN":
            (root / "opt").mkdir(exist_ok=True)
            done = subprocess.run(["sh", "-ec", here], cwd=folder, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{rest}\n{done.stdout}{done.stderr}"
    return root / "opt/mainstem"


CONFINED = """
python={python} built={built} data={data}
mount -t tmpfs tmpfs /mnt
mkdir /mnt/python /mnt/built /mnt/data
mount --bind $python /mnt/python
mount --bind $built /mnt/built
mount --bind $data /mnt/data
mount -t tmpfs -o mode=755 tmpfs /root
mount -t tmpfs -o mode=1777 tmpfs /tmp
mkdir -p $python $built $data
mount --move /mnt/python $python
mount --move /mnt/built $built
mount --move /mnt/data $data
for at in / /root $python $built; do mount -o remount,ro,bind $at; done
exec setpriv --reuid {nobody} --regid {nobody} --clear-groups --no-new-privs env --ignore-environment \\
    PATH=$built/bin:/usr/bin:/bin PYTHONDONTWRITEBYTECODE=1 MAINSTEM_HOME=$data/home sh -euc '{commands}'
"""
"""Everything but /tmp and the data is read-only, and what the user may not enter is out of the way."""

COMMANDS = """
mainstem init $MAINSTEM_HOME --base {data}/base.safetensors
! mainstem health
cp {data}/tune.safetensors $MAINSTEM_HOME/inbox/
mainstem run --port 0 2> {data}/log &
for _ in $(seq 300); do
    if mainstem health && grep -qx 000001 $MAINSTEM_HOME/published/main/LATEST; then break; fi
    sleep 0.2
done
mainstem health --json
kill $!; wait $!
cat $MAINSTEM_HOME/published/main/LATEST
touch /opt/x 2> /dev/null && echo "the root can be written"
true
"""


@pytest.mark.slow  # it installs torch
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a read-only tree and another user")
def test_what_the_steps_build_merges_as_nobody_in_a_tree_that_is_read_only(tmp_path: Path) -> None:
    built = build(tmp_path)
    size = int(subprocess.run(["du", "-sm", built], capture_output=True, text=True, check=True).stdout.split()[0])
    print(f"\n/opt/mainstem is {size} MB")
    assert size <= MOST_MEGABYTES
    assert not [path for path in (built / "bin").iterdir() if path.name in {"gcc", "cc", "pip"}]
    data = tmp_path / "data"
    data.mkdir()
    write_expert(data / "tune.safetensors", write_base(data / "base.safetensors", seed=1), seed=2)
    for path in (data, *data.iterdir()):
        path.chmod(0o755)
        os.chown(path, int(NOBODY), int(NOBODY))
    script = CONFINED.format(
        python=sys.base_prefix,
        built=built,
        data=data,
        nobody=NOBODY,
        commands=COMMANDS.format(data=data).replace("'", "'\\''"),
    )
    done = subprocess.run(["unshare", "--mount", "bash", "-euc", script], capture_output=True, text=True, check=False)
    log = (data / "log").read_text() if (data / "log").exists() else ""
    assert done.returncode == 0, done.stdout + done.stderr + log
    assert '"healthy": true' in done.stdout
    assert done.stdout.rstrip().endswith("000001"), done.stdout
