"""`make setup` finds a working Python and uv, and does not take an interrupted setup for a finished one."""

import ast
import functools
import http.server
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REAL_PATH = os.environ["PATH"]


@pytest.fixture
def setup(tmp_path, monkeypatch):
    """tools/setup.py, in a separate project on a machine without any Python or uv."""
    spec = importlib.util.spec_from_file_location("tools_setup", ROOT / "tools" / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    project = tmp_path / "project"
    project.mkdir()
    (project / "requirements.txt").write_text("numpy\n")
    monkeypatch.setattr(module, "ROOT", str(project))
    monkeypatch.setattr(module, "VENV", str(project / ".venv"))
    monkeypatch.setattr(module, "TOOLS", str(project / ".venv-tools"))
    monkeypatch.setattr(module, "PLACES", tuple(p for p in module.PLACES if p.startswith("~")))
    monkeypatch.setattr(module.sys, "executable", "/nowhere/python3")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", f"{tmp_path}/a{os.pathsep}{tmp_path}/b")
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    return module


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


THIS = sys.executable  # the tests hide it
PYTHON = f'exec "{THIS}" "$@"'
OTHER = 'echo "python: command not found" >&2; exit 127'  # like a version manager's shim


def test_a_python_that_fails_is_passed_over(setup, tmp_path):
    executable(tmp_path / "a" / "python3.12", OTHER)
    executable(tmp_path / "a" / "python3", "exit 0")  # starts, but is not a Python: accepts anything
    (tmp_path / "a" / "python").mkdir()
    (tmp_path / "a" / "python3").write_text("no program")
    good = executable(tmp_path / "b" / "python3", PYTHON)
    assert setup.find_python() == good


def test_a_python_off_the_path_is_found(setup, tmp_path):
    version = "{}.{}.1".format(*sys.version_info[:2])
    executable(tmp_path / "home" / ".pyenv" / "versions" / "3.11.7" / "bin" / "python3", OTHER)
    good = executable(tmp_path / "home" / ".pyenv" / "versions" / version / "bin" / "python3", PYTHON)
    assert setup.find_python() == good


def test_the_projects_own_environment_is_no_python_to_build_it_from(setup, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}/project/.venv/bin")
    executable(tmp_path / "project" / ".venv" / "bin" / "python3", PYTHON)
    assert setup.find_python() is None


@pytest.mark.parametrize(
    "answer",
    [
        "sys.version_info = (3, 11, 7)",
        "sys.version_info = (3, 99, 0)",
        "sys.implementation.name = 'pypy'",
        "sys.abiflags = 't'",
        "sys.modules['lzma'] = None",
    ],
)
def test_a_python_that_the_packages_do_not_work_with_is_passed_over(setup, tmp_path, answer):
    program = f"import sys; {answer}; exec(sys.argv[1])"
    executable(tmp_path / "a" / "python3", f'exec "{THIS}" -c "{program}" "$2"')
    assert setup.find_python() is None
    executable(tmp_path / "a" / "python3", f'exec "{THIS}" -c "import sys; exec(sys.argv[1])" "$2"')
    assert setup.find_python() is not None


def test_a_uv_that_works_is_used(setup, tmp_path):
    executable(tmp_path / "a" / "uv", OTHER)
    local = executable(tmp_path / "project" / ".venv-tools" / "bin" / "uv", "exit 0")
    assert setup.find_uv("/nowhere/python") == local
    system = executable(tmp_path / "a" / "uv", "exit 0")
    assert setup.find_uv("/nowhere/python") == system


# A Python with some modules, which can create environments and whose pip installs a working uv.
WITH_MODULES = """
case "$1 $2" in
  "-c import pip") [ "$HAS" = pip ] || [ -n "$PYTHONPATH" ];;
  "-c import ensurepip") [ "$HAS" = ensurepip ];;
  "-m venv") mkdir -p "$4/bin"; cp "$0" "$4/bin/python";;
  "-m pip") echo "$0 $PYTHONPATH" > "$TRACE"
            for word; do [ "$last" = --target ] && target="$word"; last="$word"; done
            mkdir -p "$target/bin"; printf '#!/bin/sh\\n' > "$target/bin/uv"; chmod +x "$target/bin/uv";;
  *) exit 1;;
esac
"""


@pytest.mark.parametrize("has", ["pip", "ensurepip", "a Debian package"])
def test_uv_is_installed_with_whatever_pip_there_is(setup, tmp_path, monkeypatch, has):
    monkeypatch.setenv(
        "PATH", f"{tmp_path}/a{os.pathsep}{os.environ['PATH']}{os.pathsep}/usr/bin{os.pathsep}/bin"
    )
    monkeypatch.setenv("HAS", has)
    monkeypatch.setenv("TRACE", str(tmp_path / "trace"))
    real_which = shutil.which
    monkeypatch.setattr(setup.shutil, "which", lambda name: None if name == "uv" else real_which(name))
    monkeypatch.setattr(
        setup.glob, "glob", lambda pattern: ["/wheels/pip.whl"] if "wheels" in pattern else []
    )
    python = executable(tmp_path / "a" / "python3", WITH_MODULES)
    monkeypatch.setattr(setup.sys, "executable", python)
    uv = setup.find_uv(None)
    assert uv == str(tmp_path / "project" / ".venv-tools" / "bin" / "uv")
    assert subprocess.call([uv, "--version"]) == 0
    used, _, path = (tmp_path / "trace").read_text().strip().partition(" ")
    assert ("pip" in Path(used).parts) == (has == "ensurepip")
    assert path == ("/wheels/pip.whl" if has == "a Debian package" else "")


def test_without_any_pip_the_way_out_is_named(setup, monkeypatch):
    monkeypatch.setattr(setup.glob, "glob", lambda pattern: [])
    with pytest.raises(SystemExit, match="neither uv nor pip: install one"):
        setup.find_uv(None)


# A uv that creates environments, records its arguments, and fails to install on demand.
UV = """
echo "$@ [$UV_DEFAULT_INDEX|$UV_INDEX|$SSL_CERT_FILE]" >> "$TRACE"
case "$1" in
  venv) for last; do :; done; mkdir -p "$last/bin"; cp "$FAKE_PYTHON" "$last/bin/python";;
  pip) [ -z "$FAIL" ];;
esac
"""


@pytest.fixture
def machine(setup, tmp_path, monkeypatch):
    """A machine with a Python and a uv; `calls` returns uv's new calls since the last look."""
    monkeypatch.setenv("PATH", f"{tmp_path}/a{os.pathsep}/usr/bin{os.pathsep}/bin")
    monkeypatch.setenv("TRACE", str(tmp_path / "trace"))
    monkeypatch.setenv("FAKE_PYTHON", executable(tmp_path / "a" / "python3.12", PYTHON))
    executable(tmp_path / "a" / "python3.13", PYTHON)
    executable(tmp_path / "a" / "uv", UV)

    def calls():
        lines = (tmp_path / "trace").read_text().splitlines()
        (tmp_path / "trace").write_text("")
        return [line for line in lines if not line.startswith("--version")]

    setup.calls = calls
    return setup


def test_a_cut_off_install_is_repeated_and_a_finished_one_brought_up_to_date(machine, monkeypatch):
    monkeypatch.setenv("FAIL", "1")
    (Path(machine.ROOT) / "requirements-sim.txt").touch()
    with pytest.raises(subprocess.CalledProcessError):
        machine.main(["requirements-sim.txt"])
    assert [call.split()[0] for call in machine.calls()] == ["venv", "pip"]
    kept = Path(machine.VENV) / "a-package-of-the-users-own"
    kept.write_text("")
    with pytest.raises(subprocess.CalledProcessError):  # still without a connection
        machine.main()
    assert kept.exists()
    machine.calls()
    monkeypatch.delenv("FAIL")
    machine.main()  # a package may be half copied
    (call,) = machine.calls()
    assert "--reinstall" in call
    assert "requirements-sim.txt" in call
    (Path(machine.VENV) / ".unfinished").write_text("")  # cut off before it was written
    machine.main()
    (call,) = machine.calls()
    assert "--reinstall" in call
    machine.main()
    (call,) = machine.calls()
    assert call.startswith("pip")
    assert not {"--reinstall", "requirements-sim.txt"} & {Path(word).name for word in call.split()}
    assert kept.exists()


def test_without_a_python_uv_is_told_to_download_one(machine, monkeypatch):
    monkeypatch.setattr(machine.sys, "executable", os.environ["FAKE_PYTHON"])
    monkeypatch.setattr(machine, "find_python", lambda: None)
    machine.main()
    assert "--managed-python --python 3.12" in machine.calls()[0]


def test_the_environment_has_a_pip_of_its_own(machine):
    machine.main()
    assert "--seed" in machine.calls()[0].split()


def test_settings_of_pip_reach_uv_and_are_not_written_down(machine, monkeypatch):
    listed = (
        "global.cert='/certs/file'\nglobal.index-url='https://name:secret@example.org/one'\n"
        "install.extra-index-url='\\nhttps://example.org/two\\nhttps://example.org/three'\n"
    )
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    real = subprocess.run

    def run(command, **options):
        if command[1:4] == ["-m", "pip", "config"]:
            return subprocess.CompletedProcess(command, 0, listed.encode())
        return real(command, **options)

    monkeypatch.setattr(machine.subprocess, "run", run)
    machine.main()
    expected = (
        "[https://name:secret@example.org/one|https://example.org/two https://example.org/three|/certs/file]"
    )
    assert machine.calls()[-1].endswith(expected)
    monkeypatch.setenv("PIP_INDEX_URL", "https://example.org/variable")
    machine.main()
    assert "[https://example.org/variable|" in machine.calls()[-1]
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://example.org/uv")
    machine.main()
    assert machine.calls()[-1].endswith("[https://example.org/uv||]")
    written = [path for path in Path(machine.ROOT).rglob("*") if path.is_file()]
    assert not any(b"example.org" in path.read_bytes() for path in written)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index on this machine; `offer(name, version)` adds a wheel."""
    folder = tmp_path / "index"

    def offer(name, version):
        (folder / name).mkdir(parents=True, exist_ok=True)
        about = f"{name}-{version}.dist-info"
        with zipfile.ZipFile(folder / name / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{about}/RECORD", f"{about}/METADATA,,\n{about}/WHEEL,,\n{about}/RECORD,,\n")

    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    monkeypatch.setattr(handler.func, "log_message", lambda *_: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("UV_DEFAULT_INDEX", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield offer
        server.shutdown()


@pytest.fixture
def no_gpu(setup, monkeypatch):
    """A machine without an NVIDIA GPU, and requirements like this project's."""
    monkeypatch.setattr(setup, "NVIDIA", ("/nowhere",))
    monkeypatch.delenv("CUDA", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    text = "torch>=2.11,<2.12   # and why\nnumpy\ntorchvision>=0.26,<0.27\n"
    (Path(setup.ROOT) / "requirements.txt").write_text(text)
    return setup


PLAIN, CPU, CUDA = ("2.11.1", "0.26.1"), ("2.11.1+cpu", "0.26.1+cpu"), ("2.11.1+cu130", "0.26.1+cu130")
NEWER = ("2.12.0+cpu", "0.27.0+cpu")


@pytest.mark.parametrize(
    ("offered", "gpu", "installed", "said"),
    [
        (
            (PLAIN, CPU, NEWER),
            "",
            CPU,
            "about 2 GB: PyTorch's CPU build, since this machine has no NVIDIA GPU",
        ),
        ((CPU, CUDA), "", CPU, "make setup CUDA=1"),
        ((CPU, CUDA), "told", CUDA, "about 6 GB with CUDA libraries)"),
        ((CPU, CUDA), "device", CUDA, "about 6 GB with CUDA libraries)"),
        ((CPU, CUDA), "cluster", CUDA, "about 6 GB with CUDA libraries)"),
        (
            (PLAIN, NEWER),
            "",
            PLAIN,
            "about 6 GB with CUDA libraries, since the package index has no CPU build",
        ),
    ],
)
def test_without_a_gpu_the_cpu_build_that_the_index_has_is_taken(
    no_gpu, index, tmp_path, monkeypatch, capfd, offered, gpu, installed, said
):
    uv = shutil.which("uv", path=f"{REAL_PATH}{os.pathsep}{ROOT}/.venv-tools/bin")
    if uv is None:
        pytest.skip("there is no uv: make setup installs it")
    monkeypatch.setattr(no_gpu, "find_uv", lambda python: uv)
    monkeypatch.setattr(no_gpu, "find_python", lambda: THIS)
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv-cache"))
    if gpu == "device":
        monkeypatch.setattr(no_gpu, "NVIDIA", ("/nowhere", os.devnull))
    if gpu == "cluster":
        executable(tmp_path / "a" / "sbatch", "exit 0")
    if gpu == "told":
        monkeypatch.setenv("CUDA", "1")
    index("numpy", "1.0")
    index("pip", "25.0")  # installed by `uv venv --seed`
    for versions in offered:
        for name, version in zip(("torch", "torchvision"), versions, strict=False):
            index(name, version)
    no_gpu.main()
    assert said in capfd.readouterr().out
    site = Path(no_gpu.VENV) / "lib" / "python{}.{}".format(*sys.version_info[:2]) / "site-packages"
    found = [next(site.glob(f"{name}-*.dist-info")).name for name in ("torch", "torchvision")]
    assert found == [f"torch-{installed[0]}.dist-info", f"torchvision-{installed[1]}.dist-info"]
    no_gpu.main()  # again: installed packages stay
    assert all((site / name).is_dir() for name in found)


ANSWERS = """
case "$1 $2 $*" in
  "pip compile"*--torch-backend*) [ "$REACHED" ] && printf 'torch==2.11.1+cpu\ntorchvision==0.26.1+cpu\n';;
  "pip compile"*) [ "$REACHED" = late ] && exec sleep 60
    read line; case "$line" in *+cpu*) exit 1;; *) printf 'torch==2.11.1\ntorchvision==0.26.1\n';; esac;;
esac
"""


@pytest.mark.parametrize(
    ("chosen", "reached", "backend"),
    [("", "1", True), ("UV_INDEX", "1", False), ("", "", False), ("", "late", True)],
)
def test_pytorchs_own_index_is_asked_where_none_was_chosen(
    no_gpu, machine, tmp_path, monkeypatch, chosen, reached, backend
):
    executable(tmp_path / "a" / "uv", UV + ANSWERS)
    bare = executable(tmp_path / "bare", f'case "$2" in *importlib*) exit 1;; esac; {PYTHON}')
    monkeypatch.setenv("FAKE_PYTHON", bare)
    monkeypatch.setenv("REACHED", reached)
    monkeypatch.setattr(machine, "ANSWER_SECONDS", 1 if reached == "late" else 60)
    if chosen:
        monkeypatch.setenv(chosen, "https://example.org/simple")
    machine.main()
    _, *asked, install = machine.calls()
    assert sum("--torch-backend cpu" in call for call in asked) == (not chosen)
    assert ("torch==2.11.1+cpu torchvision==0.26.1+cpu --torch-backend cpu" in install) == backend
    assert install.startswith("pip install --quiet")


def test_an_old_python_can_read_the_script():
    ast.parse((ROOT / "tools" / "setup.py").read_text(), feature_version=(3, 8))


@pytest.fixture
def make(tmp_path):
    """Returns what `make setup` would run in a copy of the project."""
    for name in ("Makefile", "requirements.txt", "tools/setup.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)

    def run(*goals, **environment):
        command = ["make", "-n", *(goals or ["setup"])]
        # If make runs these tests, its variables would affect the make below.
        env = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
        env |= environment
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)

    return run


def test_make_sets_up_once_and_again_when_the_requirements_change(make, tmp_path):
    assert "tools/setup.py" in make().stdout
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".installed").write_text("")
    assert "tools/setup.py" not in make().stdout
    later = (tmp_path / ".venv" / ".installed").stat().st_mtime + 10
    os.utime(tmp_path / "requirements.txt", (later, later))
    assert "tools/setup.py" in make().stdout


def test_the_demo_says_first_what_it_will_do_and_take(make):
    text = make("demo", "RUN=runs/mine").stdout
    before, _, after = text.partition("tools/setup.py")
    for words in (
        "about ten minutes",
        "2 GB for CPUs only or 6 GB with CUDA",
        "0.5 GB",
        "runs/mine/evaluation",
    ):
        assert words in before
    assert "train_vfp.py --config configs/train_vfp/demo.json --run-dir runs/mine" in after
    steps = json.loads((ROOT / "configs" / "train_vfp" / "demo.json").read_text())["config"]["optim"]["steps"]
    assert f"for {steps:,} steps" in before


def test_make_passes_over_a_python_that_does_not_start(make, tmp_path):
    executable(tmp_path / "a" / "python3", OTHER)
    good = executable(tmp_path / "home" / ".pyenv" / "versions" / "3.9.1" / "bin" / "python", PYTHON)
    folders = f"{tmp_path}/a{os.pathsep}{os.environ['PATH']}"
    answer = make(PATH=folders, HOME=str(tmp_path / "home")).stdout
    assert answer.startswith(
        ("/usr/bin/python3 tools/setup.py", "python tools/setup.py", f"{good} tools/setup.py")
    )
