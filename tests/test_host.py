"""The set-up that quickstart.py and runtests.py share: cache, environment, ComfyUI tree, server, sheet, messages."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path, PurePosixPath

import pytest
from PIL import Image, ImageDraw

from host import cache, comfyui, environment, server, sheet, workflow
from host.commands import run_logged
from host.environment import EnvironmentSpec
from host.errors import HostError
from host.server import PACK, ComfyServer

REPOSITORY = PACK


# --- cache


def test_cache_is_where_the_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TADSR_CACHE", str(tmp_path / "new" / "cache"))
    assert cache.cache_directory() == (tmp_path / "new" / "cache").resolve()
    assert cache.cache_directory().is_dir()


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"HOME": "/h"}, "/h/.cache"),
        ("linux", {"HOME": "/h", "XDG_CACHE_HOME": "/x"}, "/x"),
        ("darwin", {"HOME": "/h"}, "/h/Library/Caches"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local"),
    ],
)
@pytest.mark.skipif(os.name != "posix", reason="sets HOME, which only POSIX reads")
def test_cache_follows_the_platform(
    platform: str, variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert cache._platform_cache() == Path(expected)


def test_lock_keeps_a_second_process_waiting_and_survives_a_crash(tmp_path: Path) -> None:
    target = tmp_path / "thing"
    code = (
        f"import sys, os, time; sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from pathlib import Path; from host.cache import exclusive\n"
        f"with exclusive(Path({str(target)!r})):\n"
        "    print('held', flush=True); time.sleep(1.0); os._exit(9)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with cache.exclusive(target):
        assert holder.wait(60) == 9, "the lock was given while another process held it"
    holder.stdout.close()


# --- commands and environments


def test_failed_command_says_what_it_was_its_last_lines_and_what_to_do(tmp_path: Path) -> None:
    code = "import sys; print('first'); print('the reason', file=sys.stderr); sys.exit(3)"
    with pytest.raises(HostError) as caught:
        run_logged([sys.executable, "-c", code], doing="Counting", advice="Try again.", log=tmp_path / "log")
    message = str(caught.value)
    for part in ("Counting failed (exit code 3)", sys.executable, "the reason", "Try again.", str(tmp_path / "log")):
        assert part in message
    assert (tmp_path / "log").read_text() == "first\nthe reason\n"


def test_missing_program_is_reported(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="cannot start no-such-program"):
        run_logged(["no-such-program"], doing="Counting", advice="Install it.", log=tmp_path / "log")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TADSR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(environment, "NEEDED_DISK_BYTES", 100 * 1024**2)
    return tmp_path / "cache"


def test_half_built_environment_is_built_again_and_a_complete_one_left_alone(tmp_path: Path, own_cache: Path) -> None:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("# nothing\n")
    spec = EnvironmentSpec((requirements,), pins=())
    witness = spec.directory / "witness"
    witness.parent.mkdir(parents=True)
    witness.touch()
    python = environment.ensure_environment(spec)
    assert spec.is_complete() and not witness.exists(), "the half-built environment was kept"
    code = "import sys; print(sys.prefix); print([type(finder).__name__ for finder in sys.meta_path])"
    prefix, finders = subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.splitlines()
    assert Path(prefix).resolve() == spec.directory.resolve()
    assert finders.count("_TorchImportHook") == 1, "Python does not run the import shim in this environment"
    witness.touch()
    environment.ensure_environment(spec)
    assert witness.exists(), "a complete environment was built again"


def test_environments_are_kept_apart_by_their_requirements(tmp_path: Path, own_cache: Path) -> None:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("a==1\n")
    spec = EnvironmentSpec((requirements,))
    first = spec.directory
    requirements.write_text("a==2\n")
    assert spec.directory != first
    assert spec.directory != EnvironmentSpec((requirements,), pins=("torch==1",)).directory


def test_environment_that_cannot_be_built_says_so_and_is_not_taken_for_complete(
    tmp_path: Path, own_cache: Path
) -> None:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("./no-such-folder-here\n")
    spec = EnvironmentSpec((requirements,), pins=())
    with pytest.raises(HostError, match=r"Installing packages failed(.|\n)*no-such-folder-here") as caught:
        environment.ensure_environment(spec)
    assert "pip install" in str(caught.value) and "run the same command again" in str(caught.value)
    assert not spec.is_complete()


def test_too_little_disk_is_said_before_anything_is_built(tmp_path: Path, own_cache: Path, monkeypatch) -> None:
    monkeypatch.setattr(environment, "NEEDED_DISK_BYTES", 1024**5)
    spec = EnvironmentSpec((), pins=())
    with pytest.raises(HostError, match="free disk space.*TADSR_CACHE"):
        environment.ensure_environment(spec)
    assert not spec.directory.exists()


def test_an_old_python_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 18, "final", 0))
    with pytest.raises(HostError, match="needs Python 3.10 or newer"):
        environment.require_python()


# --- ComfyUI trees


def test_fetched_tree_is_the_version_it_claims(comfyui_path: Path) -> None:
    assert comfyui.existing_comfyui(comfyui_path) == comfyui_path
    assert comfyui.fetch_comfyui(comfyui.DEFAULT_VERSION).name == comfyui.DEFAULT_VERSION


def test_unknown_version_is_refused() -> None:
    with pytest.raises(HostError, match=r"ComfyUI 9\.9\.9; known: 0\.16\.3"):
        comfyui.fetch_comfyui("9.9.9")


def test_folder_that_is_no_comfyui_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="is not a ComfyUI folder"):
        comfyui.existing_comfyui(tmp_path)


def make_tree(folder: Path, version: str, main: str = "") -> Path:
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").write_text(main)
    (folder / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    return folder


def test_comfyui_that_is_too_old_is_refused(tmp_path: Path) -> None:
    assert comfyui.existing_comfyui(make_tree(tmp_path / "new", "0.100.0"))
    with pytest.raises(HostError, match=r"is ComfyUI 0\.9\.2; 0\.16\.3 or newer is needed"):
        comfyui.existing_comfyui(make_tree(tmp_path / "old", "0.9.2"))


def test_python_of_an_existing_install_is_found(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "ComfyUI", "0.30.0")
    python = environment.interpreter(tree / "venv")
    python.parent.mkdir(parents=True)
    python.touch()
    assert comfyui.own_python(tree) == python


def test_only_the_wanted_files_of_an_archive_are_written(tmp_path: Path) -> None:
    archive = tmp_path / "a.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name in ("pack/tree/a/b.txt", "pack/other.txt", "pack/tree/../../../escaped.txt"):
            info = tarfile.TarInfo(name)
            info.size = 2
            tar.addfile(info, io.BytesIO(b"ok"))
    comfyui._extract(archive, PurePosixPath("pack/tree"), tmp_path / "out" / "tree")
    written = [path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert written == [Path("tree/a/b.txt")]
    assert not list(tmp_path.rglob("escaped.txt"))


# --- server


def test_server_that_cannot_start_shows_its_last_lines(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "ComfyUI", "0.30.0", "raise SystemExit('no engine here')")
    failing = ComfyServer(tree)
    with pytest.raises(HostError, match=r"ended while starting(.|\n)*no engine here"), failing:
        pass
    assert not failing.base.exists(), "the temporary folder was left behind"
    assert PACK.joinpath("host").is_dir(), "removing the temporary folder went through the link to the repository"


@pytest.mark.skipif(os.name != "posix", reason="kills as POSIX does")
@pytest.mark.parametrize("wait", [0.0, 0.3, 1.0])
def test_server_stops_when_the_program_that_started_it_is_killed(tmp_path: Path, wait: float) -> None:
    tree = make_tree(tmp_path / "ComfyUI", "0.30.0", "import time; time.sleep(60)")
    launcher = REPOSITORY / "host" / "launcher.py"
    code = (
        "import subprocess, sys, time\n"
        f"command = [sys.executable, {str(launcher)!r}, {str(tree)!r}]\n"
        "child = subprocess.Popen(command, stdin=subprocess.PIPE)\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    starter = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    child = int(starter.stdout.readline())
    time.sleep(wait)
    starter.kill()
    starter.wait()
    starter.stdout.close()
    assert gone_within(child, 60), "the server outlived the program that started it"


def gone_within(pid: int, seconds: float) -> bool:
    give_up_at = time.monotonic() + seconds
    while time.monotonic() < give_up_at:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        stat = Path(f"/proc/{pid}/stat")
        if stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True  # ended; nobody is there to collect it
        time.sleep(0.1)
    return False


def test_pack_is_linked_and_the_link_replaced_and_removed(tmp_path: Path) -> None:
    target = tmp_path / "tadsr"
    target.symlink_to(tmp_path / "elsewhere")
    server.link_pack(target)
    assert target.resolve() == PACK
    server.unlink_pack(target)
    assert not target.is_symlink() and (PACK / "host").is_dir()


def test_pack_is_copied_where_links_are_not_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("a required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    target = tmp_path / "tadsr"
    server.link_pack(target)
    server.link_pack(target)  # a copy that an earlier run left is replaced
    assert (target / "__init__.py").is_file() and not (target / ".git").exists()
    server.unlink_pack(target)
    assert not target.exists()


def test_what_the_user_put_in_custom_nodes_is_never_removed(tmp_path: Path) -> None:
    target = tmp_path / "tadsr"
    target.mkdir()
    (target / "mine.txt").touch()
    with pytest.raises(HostError, match="is in the way"):
        server.link_pack(target)
    server.unlink_pack(target)
    assert (target / "mine.txt").exists()


# --- workflow and sheet


def test_workflow_is_patched_by_class_and_checked() -> None:
    prompt = workflow.load_workflow()
    patched = workflow.with_inputs(prompt, {"TADSRUpscale": {"timestep": 7}})
    node = workflow.node_of_class(prompt, "TADSRUpscale")
    assert patched[node]["inputs"]["timestep"] == 7 and prompt[node]["inputs"]["timestep"] == 500
    with pytest.raises(HostError, match="TADSRUpscale has no input tmestep"):
        workflow.with_inputs(prompt, {"TADSRUpscale": {"tmestep": 7}})
    with pytest.raises(HostError, match="0 nodes of class Nothing"):
        workflow.with_inputs(prompt, {"Nothing": {}})


@pytest.mark.parametrize("size", [(640, 480), (300, 900), (33, 7), (1, 1)])
def test_sheet_is_drawn_for_any_shape(size: tuple[int, int]) -> None:
    before, after = Image.new("RGB", size, "grey"), Image.effect_noise(size, 40).convert("RGB")
    drawn = sheet.before_after_sheet([("before", before), ("after", after)])
    columns = 2 * (sheet.NARROWEST_COLUMN + sheet.MARGIN)
    assert drawn.width > columns and drawn.height > sheet.NARROWEST_COLUMN
    # The flat picture stands on the left, and the noisy one on the right, both below their labels.
    top, right = sheet.MARGIN + sheet.LABEL_HEIGHT, drawn.width // 2 + sheet.MARGIN
    whole = [drawn.crop((left, top + 4, left + 5, top + 9)) for left in (sheet.MARGIN + 4, right)]
    flat, noisy = (len(part.getcolors() or ()) for part in whole)
    assert flat == 1 and (noisy > 1 or size == (1, 1))


def test_richest_detail_is_where_the_edges_are() -> None:
    picture = Image.new("RGB", (400, 400), "white")
    draw = ImageDraw.Draw(picture)
    for offset in range(0, 60, 6):
        draw.line((250 + offset, 240, 250 + offset, 300), fill="black", width=2)
    left, top, right, bottom = sheet.richest_detail(picture)
    assert left <= 250 and right >= 304 and top <= 240 and bottom >= 300
