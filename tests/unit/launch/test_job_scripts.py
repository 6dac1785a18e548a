"""The job scripts in bash, without Slurm: its commands and the interpreter are programs that record their call."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[3] / "slurm"
STAGES = {"rl_stage": "rl", "sft_stage": "sft"} | {name: name for name in ("annotate", "eval", "judge", "serve")}


class Site:
    """A folder with a checkout (job scripts and an interpreter), recorders of Slurm's commands and a run file."""

    def __init__(self, folder: Path, checkout: str = "repo") -> None:
        self.folder, self.repository = folder, folder / checkout
        self.slurm = self.repository / "slurm"
        self.slurm.mkdir(parents=True)
        for script in SCRIPTS.glob("*.sh"):
            if script.name != "site.sh":
                shutil.copy(script, self.slurm)
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name in ("sbatch", "srun"):
            self.record(self.bin / name)
        record = 'echo "JobId=7"; echo "   Command=$STUB_COMMAND"; echo "   WorkDir=/x"'
        self.script(self.bin / "scontrol", record)
        self.record(self.repository / ".venv" / "bin" / "python", "python")
        (folder / "run.toml").write_text("")

    @staticmethod
    def script(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    def record(self, path: Path, name: str | None = None) -> None:
        """A program that prints its name, where it is, and its arguments in brackets."""
        self.script(path, f'printf "%s in %s:" {name or path.name} "$PWD"; printf "[%s]" "$@"; echo')

    def call(self, *command: str | Path, command_of_job: str | None = None, **variables: str) -> tuple[int, str, str]:
        """(exit code, standard output, standard error) of a bash script. In a job when `command_of_job` is given."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "R1REWARD_"))}
        environment = {**inherited, "PATH": f"{self.bin}:{os.environ['PATH']}", **variables}
        if command_of_job is not None:
            environment |= {"SLURM_JOB_ID": "7", "STUB_COMMAND": command_of_job, "SLURM_SUBMIT_DIR": "/nowhere"}
        done = subprocess.run(
            ["bash", *map(str, command)],
            cwd=variables.get("PWD", self.folder),
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout.strip(), done.stderr.strip()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_every_script_finds_itself_in_the_same_way() -> None:
    """The lines that look for lib.sh cannot lie in lib.sh."""
    parts = set()
    for script in SCRIPTS.glob("*.sh"):
        if script.name not in ("lib.sh", "site.example.sh", "site.sh"):
            text = script.read_text()
            assert f"\nthis_script={script.name} here=" in text
            start, end = text.index("# Slurm runs a copy"), text.index('source "$here/lib.sh"\n')
            parts.add(text[start:end].replace(f"this_script={script.name}", ""))
    assert len(parts) == 1


@pytest.mark.parametrize("script", STAGES)
def test_a_job_runs_the_supervisor_of_its_checkout(site: Site, script: str) -> None:
    """As Slurm does it: a copy of the script in its spool folder, in the folder of the job."""
    spooled = site.folder / "spool" / "slurm_script"
    spooled.parent.mkdir()
    shutil.copy(site.slurm / f"{script}.sh", spooled)
    command = f"{site.slurm}/{script}.sh run.toml rl.steps=2"
    code, out, err = site.call(spooled, "run.toml", "rl.steps=2", command_of_job=command)
    arguments = f"[-m][megatron_r1reward.cli][launch][{STAGES[script]}][run.toml][rl.steps=2]"
    assert (code, out, err) == (0, f"python in {site.folder}:{arguments}", "")


@pytest.mark.parametrize("argument", ["run.toml", "a=b c", "x.y=[1, 2]"])
def test_a_checkout_whose_path_has_spaces(tmp_path: Path, argument: str) -> None:
    site = Site(tmp_path, "my  repo (old)")
    spooled = tmp_path / "slurm_script"
    shutil.copy(site.slurm / "rl_stage.sh", spooled)
    command = f"{site.slurm}/rl_stage.sh run.toml {argument}"
    code, out, err = site.call(spooled, "run.toml", argument, command_of_job=command)
    assert (code, err) == (0, "")
    assert out.endswith(f"[launch][rl][run.toml][{argument}]")


@pytest.mark.parametrize("command", ["/bin/bash", "/scratch/job.sh run.toml", "(null)", ""])
def test_inside_salloc_a_users_own_batch_script_or_wrap(site: Site, command: str) -> None:
    """The record of the job names something else; the script itself was called by its path."""
    code, out, err = site.call(site.slurm / "rl_stage.sh", "run.toml", command_of_job=command)
    assert (code, err) == (0, "")
    assert out.endswith("[launch][rl][run.toml]")


@pytest.mark.parametrize("in_a_job", [False, True])
def test_through_a_link(site: Site, in_a_job: bool) -> None:
    link = site.folder / "link.sh"
    link.symlink_to(site.slurm / "rl_stage.sh")
    code, out, err = site.call(link, "run.toml")
    assert (code, err) == (0, "")
    assert out == f"sbatch in {site.folder}:[{site.slurm}/rl_stage.sh][run.toml]"
    spooled = site.folder / "slurm_script"
    shutil.copy(link, spooled)
    code, out, err = site.call(spooled, "run.toml", command_of_job=f"{link} run.toml")
    assert (code, err) == (0, "")
    assert out.endswith("[launch][rl][run.toml]")


def test_a_copy_whose_original_is_unknown_says_so(site: Site) -> None:
    spooled = site.folder / "slurm_script"
    shutil.copy(site.slurm / "rl_stage.sh", spooled)
    code, out, err = site.call(spooled, "run.toml", command_of_job="(null)")
    assert (code, out) == (2, "")
    assert err.splitlines() == [
        "error: rl_stage.sh does not find lib.sh, which lies beside it: submit it by its path in the checkout's slurm "
        "folder"
    ]


@pytest.mark.parametrize(
    "options",
    [
        ["-p", "gpu", "-N", "1"],
        ["--nodes", "1"],
        ["-pgpu", "-N1", "--nodes=1"],
        ["--exclusive", "--partition", "gpu", "--requeue"],
        ["-vH", "-vN", "2"],
        ["--gres", "gpu:4", "-W"],
        ["-J", "-strange-name"],
        ["--comment", "two words"],
        ["-D", ".", "--hold"],
    ],
)
def test_options_are_taken_as_sbatch_takes_them(site: Site, options: list[str]) -> None:
    code, out, err = site.call(site.slurm / "sft_stage.sh", *options, "run.toml", "a.b=c")
    assert (code, err) == (0, "")
    words = "".join(f"[{word}]" for word in [*options, f"{site.slurm}/sft_stage.sh", "run.toml", "a.b=c"])
    assert out == f"sbatch in {site.folder}:{words}"


def test_an_option_without_its_value_and_options_inside_a_job_are_mistakes(site: Site) -> None:
    code, _, err = site.call(site.slurm / "rl_stage.sh", "--nodes")
    assert (code, err) == (2, "error: --nodes needs a value")
    code, out, err = site.call(site.slurm / "rl_stage.sh", "-N", "4", "run.toml", command_of_job="/bin/bash")
    assert (code, out) == (2, "")
    assert err.startswith("error: -N 4: this is job 7 already")


@pytest.mark.parametrize("script", STAGES)
def test_a_missing_run_file_is_found_out_before_the_queue(site: Site, script: str) -> None:
    code, out, err = site.call(site.slurm / f"{script}.sh", "-N", "1", "missing.toml")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: run file {site.folder}/missing.toml does not exist")
    code, out, err = site.call(site.slurm / f"{script}.sh")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: no run file; usage: slurm/{script}.sh [sbatch options] RUN.toml")


@pytest.mark.parametrize("option", [["-D"], ["--chdir"], ["--chdir="]])
def test_chdir_says_where_the_run_file_is_and_the_job_stays_there(site: Site, option: list[str]) -> None:
    project = site.folder / "proj"
    project.mkdir()
    (project / "here.toml").write_text("")
    given = [f"{option[0]}{project}"] if option[0].endswith("=") else [*option, str(project)]
    code, out, err = site.call(site.slurm / "rl_stage.sh", *given, "here.toml")
    assert (code, err) == (0, "")
    assert out.endswith("[here.toml]")
    assert site.call(site.slurm / "rl_stage.sh", "here.toml")[0] == 2
    command = f"{site.slurm}/rl_stage.sh here.toml"
    code, out, err = site.call(site.slurm / "rl_stage.sh", "here.toml", command_of_job=command, PWD=str(project))
    assert (code, err) == (0, "")
    assert out.startswith(f"python in {project}:")


@pytest.mark.parametrize(
    "line",
    [
        "[[ -d /nonexistent ]] && export X=1",
        'if [ "$PS1" ]; then :; fi',
        '[ "$PS1" ] && :',
        "false | true; grep x /dev/null",
    ],
)
def test_a_harmless_line_of_the_site_file_ends_nothing(site: Site, line: str) -> None:
    (site.slurm / "site.sh").write_text(f"{line}\nexport SBATCH_PARTITION=gpu R1REWARD_MOUNTS=/a:/a,/b:/b\n{line}\n")
    code, out, err = site.call(site.slurm / "rl_stage.sh", "run.toml")
    assert (code, err) == (0, "")
    assert out.startswith("sbatch ")
    code, out, err = site.call(site.slurm / "rl_stage.sh", "run.toml", command_of_job="/bin/bash")
    assert (code, err) == (0, "")
    assert out.endswith('[run.toml][cluster.container_mounts=["/a:/a","/b:/b"]]')


def test_a_site_file_that_is_no_script_is_named_with_its_line(site: Site) -> None:
    (site.slurm / "site.sh").write_text("export A=1\nif then\n")
    code, out, err = site.call(site.slurm / "rl_stage.sh", "run.toml")
    assert (code, out) == (2, "")
    assert f"{site.slurm}/site.sh: line 2: " in err
    assert err.splitlines()[-1].startswith(f"error: {site.slurm}/site.sh is not a bash script")
    code, _, err = site.call(site.slurm / "rl_stage.sh", "run.toml", R1REWARD_SITE="/no/site.sh")
    assert (code, err) == (2, "error: R1REWARD_SITE=/no/site.sh does not exist: name the site file, or unset it")


def test_the_pipeline_takes_the_same_options(site: Site) -> None:
    call = [
        site.slurm / "pipeline.sh",
        "--dry-run",
        "-N",
        "1",
        "--partition",
        "gpu",
        "run.toml",
        "-",
        "-",
        "run.toml",
        "a.b=c",
    ]
    code, out, err = site.call(*call)
    assert (code, err) == (0, "")
    first, second = out.splitlines()
    assert first.split()[:3] == ["sbatch", "--parsable", "--kill-on-invalid-dep=yes"]
    assert first.rstrip().endswith(f"-N 1 --partition gpu {site.slurm}/sft_stage.sh run.toml a.b=c")
    assert "dependency=afterok" in second
    code, out, err = site.call(site.slurm / "pipeline.sh", "-N", "1", "run.toml", "-", "gone.toml", "-")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: run file {site.folder}/gone.toml does not exist")
    assert site.call(site.slurm / "pipeline.sh", "run.toml")[0] == 2


def test_conversion_is_a_step_in_a_job_and_submits_itself_elsewhere(site: Site) -> None:
    code, out, err = site.call(site.slurm / "convert.sh", "-c", "4", "inspect", "folder")
    assert (code, out, err) == (0, f"sbatch in {site.folder}:[-c][4][{site.slurm}/convert.sh][inspect][folder]", "")
    python, program = site.repository / ".venv/bin/python", site.repository / "tools/convert_checkpoint.py"
    code, out, err = site.call(site.slurm / "convert.sh", "inspect", "folder", "--json", command_of_job="/bin/bash")
    assert (code, err) == (0, "")
    assert out == f"srun in {site.folder}:[--ntasks=1][{python}][{program}][inspect][folder][--json]"
    code, out, err = site.call(
        site.slurm / "convert.sh", "inspect", "f", command_of_job="/bin/bash", R1REWARD_CONTAINER="image.sqsh"
    )
    assert f"[--container-workdir={site.folder}]" in out
    assert out.endswith(f"[python3][{program}][inspect][f]")
