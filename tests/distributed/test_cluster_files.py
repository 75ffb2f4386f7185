"""The Slurm script and the Kubernetes manifest in docs/cluster."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from tests.test_docs import check_command

pytestmark = pytest.mark.filterwarnings(
    "ignore:the load_module.. method:DeprecationWarning"
)  # absl
FOLDER = Path(__file__).parents[2] / "docs" / "cluster"
EXPANSION = re.compile(r"\$\((\w+)\)")


def read_manifest() -> dict[str, dict]:
    """Return kind → object."""
    objects = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text(encoding="utf-8"))
    return {entry["kind"]: entry for entry in objects}


def test_the_manifest_conforms_to_the_schemas_of_kubernetes():
    for entry in read_manifest().values():
        kubernetes_validate.validate(entry, "1.31", strict=True)
    job = read_manifest()["Job"]
    del job["spec"]["template"]["spec"]["containers"][0]["name"]
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.31", strict=True)


def test_the_parts_of_the_manifest_fit_together(monkeypatch):
    service, job = read_manifest()["Service"], read_manifest()["Job"]
    name, count = job["metadata"]["name"], job["spec"]["completions"]
    pod = job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    arguments = container["args"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert job["spec"]["parallelism"] == count
    assert pod["subdomain"] == service["metadata"]["name"]
    assert f"--num_processes={count}" in arguments
    address = f"--coordinator={name}-0.{pod['subdomain']}:"
    assert sum(argument.startswith(address) for argument in arguments) == 1
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    rules = job["spec"]["podFailurePolicy"]["rules"]
    named = {rule["onExitCodes"]["containerName"] for rule in rules if "onExitCodes" in rule}
    assert named == {container["name"]}
    variables = {variable["name"] for variable in container["env"]}
    assert {*EXPANSION.findall(" ".join(arguments))} == variables
    command = ["python", "-m", "jaxvid", *(EXPANSION.sub("3", part) for part in arguments)]
    check_command(shlex.join(command), monkeypatch)


def test_the_slurm_script_is_valid(monkeypatch):
    path = FOLDER / "slurm.sh"
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    [command] = [line for line in text.splitlines() if line.startswith("srun ")]
    check_command(command, monkeypatch)


# Stands for srun and scontrol: it prints its name, and exits with $CODE if it is srun.
FAKE = f"""#!{sys.executable}
import os, sys
name = os.path.basename(sys.argv[0])
print(name, *sys.argv[1:2])
sys.exit(int(os.environ["CODE"]) if name == "srun" else 0)
"""


@pytest.mark.parametrize(
    ("code", "restarts", "is_requeued"),
    [(0, "0", False), (1, "0", False), (143, "99", True), (2, "9", True), (2, "10", False)],
)
def test_the_slurm_script_starts_again_after_a_loss(code, restarts, is_requeued, tmp_path):
    for name in ("srun", "scontrol"):
        (tmp_path / name).write_text(FAKE)
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CODE": str(code), "SLURM_JOB_ID": "7"}
    environment["SLURM_RESTART_COUNT"] = restarts
    done = subprocess.run(
        ["bash", str(FOLDER / "slurm.sh")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    lines = ["srun --kill-on-bad-exit=0", *["scontrol requeue"] * is_requeued]
    assert done.stdout.splitlines() == lines
