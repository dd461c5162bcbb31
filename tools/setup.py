"""Make .venv with everything in requirements.txt, and in any further files given. For any Python >= 3.8.

Called by `make setup` and `make test`.

It looks for a Python that the packages work with by running each candidate, since names on the PATH can be
shims that fail; only if there is none, uv downloads one. uv itself is the system's, or is installed with pip,
which is fetched if missing. Settings of pip and uv (index, certificates) are used and never stored.

Without an NVIDIA device, PyTorch's CPU build is installed, if one is offered: see `cpu_build`.
"""

import ast
import glob
import os
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
TOOLS = os.path.join(ROOT, ".venv-tools")  # holds uv where the system has none
VERSIONS = ("3.12", "3.13")  # LeRobot needs at least the first; not every package has wheels beyond the last
PLACES = (
    "~/.pyenv/versions/{}*/bin/python3",
    "~/.local/share/uv/python/cpython-{}*/bin/python3",
    "~/*conda3/bin/python{}",
    "~/miniforge3/bin/python{}",
    "/opt/conda/bin/python{}",
    "/opt/homebrew/bin/python{}",
    "/opt/python/{}*/bin/python3",
    "/usr/local/bin/python{}",
)
USABLE = (  # ordinary CPython, with the modules that one built from source may lack
    "import sys, bz2, ctypes, lzma, ssl; assert '%d.%d' % sys.version_info[:2] in {}; "
    "assert sys.implementation.name == 'cpython' and 't' not in sys.abiflags"
)
NVIDIA = ("/dev/nvidiactl", "/dev/dxg")  # the driver, on Linux and on Windows' Linux
GPU_COMMANDS = ("nvidia-smi", "sbatch")  # a cluster's login node has no GPU, but its jobs have
PYTORCH = ("torch", "torchvision")  # both must be of the same build
NOT_CPU = "from importlib.metadata import version; assert '+cpu' not in version('torch')"
CPU_SIZE = (
    "2 GB: PyTorch's CPU build, since this machine has no NVIDIA GPU; for GPUs of other machines, run "
    "`rm -r .venv; make setup CUDA=1`"
)
ANSWER_SECONDS = 90  # for an index to answer
IMPATIENT = {"UV_HTTP_TIMEOUT": "10", "UV_HTTP_RETRIES": "0"}  # with an index that may be out of reach
PIP_TO_UV = {  # settings that pip's users have and uv does not read
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "cert": "SSL_CERT_FILE",
}


def works(python, code="pass"):
    """Whether an interpreter exists, starts, and runs a line of code."""
    silent = subprocess.DEVNULL
    try:
        return subprocess.call([python, "-c", code], stdin=silent, stdout=silent, stderr=silent) == 0
    except OSError:
        return False


def find_python():
    """Path of a usable Python of one of VERSIONS, or None."""
    folders = [folder for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    for version in VERSIONS:
        names = ("python" + version, "python3", "python")
        candidates = [os.path.join(folder, name) for folder in folders for name in names] + [sys.executable]
        for place in PLACES:
            candidates += sorted(glob.glob(os.path.expanduser(place.format(version))), reverse=True)
        for path in candidates:
            inside = os.path.abspath(path).startswith((VENV + os.sep, TOOLS + os.sep))
            if os.path.exists(path) and not inside and works(path, USABLE.format([version])):
                return path
    return None


def find_pip(python):
    """Command that runs pip, and variables it needs: an installed one, Python's own, or Debian's."""
    interpreters = [path for path in (python, sys.executable) if path]
    for path in interpreters:
        if works(path, "import pip"):
            return [path, "-m", "pip"], {}
    venv = os.path.join(TOOLS, "pip")
    for path in interpreters:
        if works(path, "import ensurepip") and subprocess.call([path, "-m", "venv", "--clear", venv]) == 0:
            return [os.path.join(venv, "bin", "python"), "-m", "pip"], {}
    wheels = glob.glob("/usr/share/python-wheels/pip-*.whl") or fetch_debian_wheel()
    if wheels:  # made for Debian's Python, which is the one that runs this
        return [sys.executable, "-m", "pip"], {"PYTHONPATH": wheels[0]}
    sys.exit("error: there is neither uv nor pip: install one of them, then run make again.")


def fetch_debian_wheel():
    """Debian and Ubuntu ship Python without pip: take its wheel from their package. Needs no root."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        return []
    print("pip is missing: fetching Debian's package of it", flush=True)
    os.makedirs(TOOLS, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=TOOLS) as folder:
        download = ["apt-get", "download", "-qq", "python3-pip-whl"]
        lists = ["-o", "Dir::State::Lists=" + folder, "-o", "Dir::Cache=" + folder]
        # The system's package lists may be missing; then it downloads its own.
        if subprocess.call(download, cwd=folder, stderr=subprocess.DEVNULL) != 0:
            subprocess.call(["apt-get", "update", "-qq", *lists], cwd=folder)
            subprocess.call([*download, *lists], cwd=folder)
        for package in glob.glob(os.path.join(folder, "*.deb")):
            subprocess.check_call(["dpkg-deb", "-x", package, TOOLS])
    return glob.glob(os.path.join(TOOLS, "usr", "share", "python-wheels", "pip-*.whl"))


def find_uv(python):
    """Path of uv: the system's, that of an earlier call, or one that pip installs inside the project."""
    local = os.path.join(TOOLS, "bin", "uv")
    for uv in (shutil.which("uv"), local):
        if uv and os.path.exists(uv):
            answer = subprocess.run([uv, "--version"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            if answer.returncode == 0:
                return uv
    pip, variables = find_pip(python)
    print("installing uv with pip", flush=True)
    options = ["--quiet", "--disable-pip-version-check", "--upgrade", "--target", TOOLS]
    variables["PIP_ROOT_USER_ACTION"] = "ignore"  # its warning is about installing into the system
    subprocess.check_call([*pip, "install", *options, "uv"], env=dict(os.environ, **variables))
    return local


def chose_index(environment):
    """Whether uv is told, by variables or a file, where packages come from."""
    files = ("~/.config/uv/uv.toml", "/etc/uv/uv.toml", environment.get("UV_CONFIG_FILE", ""))
    return any(os.path.exists(os.path.expanduser(file)) for file in files) or any(
        name.startswith("UV_") and "INDEX" in name for name in environment
    )


def uv_environment(python):
    """The environment for uv: the present one, with pip's settings where uv has none of its own."""
    environment = dict(os.environ)
    if chose_index(environment):
        return environment
    command = [python or sys.executable, "-m", "pip", "config", "list"]
    answer = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    listed = dict(line.split("=", 1) for line in answer.stdout.decode().splitlines() if "=" in line)
    for pip_name, uv_name in PIP_TO_UV.items():
        value = os.environ.get("PIP_" + pip_name.upper().replace("-", "_"))
        for key in ("install." + pip_name, "global." + pip_name):
            if not value and key in listed:
                value = ast.literal_eval(listed[key])
        if value:
            environment.setdefault(uv_name, " ".join(value.split()))
    if "UV_INDEX" in environment:  # as pip does it: the best version of all indexes
        environment.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")
    return environment


def wants_cuda():
    """Whether PyTorch is to use NVIDIA's GPUs: this machine's, or others', if `make setup CUDA=1` says so."""
    told = os.environ.get("CUDA") or os.environ.get("UV_TORCH_BACKEND")  # the second is uv's own choice
    return bool(told) or any(map(os.path.exists, NVIDIA)) or any(map(shutil.which, GPU_COMMANDS))


def cpu_build(uv, python, environment):
    """Arguments by which uv installs PyTorch's CPU build, in a version that requirements.txt allows, or [].

    The index in use is asked first. The public default index has no such build: if no index was chosen,
    PyTorch's own is tried, which uv knows. Those who chose an index want packages only from there. An index
    that does not answer counts as one that has none.
    """
    with open(os.path.join(ROOT, "requirements.txt")) as file:
        lines = [line.split("#")[0].strip() for line in file]
    wanted = [line for line in lines if re.split("[^a-z]", line)[0] in PYTORCH]

    def newest(requirements, *more, **settings):
        """The newest that an index has of each, as NAME==VERSION; [] if it lacks one."""
        if not requirements:
            return []
        options = ["--quiet", "--no-deps", "--no-header", "--no-annotate", "--python", python]
        try:
            answer = subprocess.run(
                [uv, "pip", "compile", *options, *more, "-"],
                input="\n".join(requirements).encode(),
                env=dict(environment, **settings),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=ANSWER_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return []
        return answer.stdout.decode().split() if answer.returncode == 0 else []

    found = newest([name.split("+")[0] + "+cpu" for name in newest(wanted)])
    if found or chose_index(environment):
        return found
    backend = ["--torch-backend", "cpu"]
    found = newest(wanted, *backend, **IMPATIENT)
    return [*found, *backend] if found else []


def read(path):
    """A file's text; empty if there is none."""
    if not os.path.exists(path):
        return ""
    with open(path) as file:
        return file.read()


def main(more=()):
    """Set up, or bring an existing .venv up to date.

    `more` are names of further requirements files.
    """
    python = find_python()
    uv = find_uv(python)
    environment = uv_environment(python)
    installed, unfinished = os.path.join(VENV, "bin", "python"), os.path.join(VENV, ".unfinished")
    again, had = os.path.exists(unfinished), read(unfinished).split()
    if not works(installed, USABLE.format(list(VERSIONS))):
        if os.path.lexists(VENV):
            print("making .venv again", flush=True)
            shutil.rmtree(VENV)
        choice = ["--python", python] if python else ["--managed-python", "--python", VERSIONS[0]]
        if python is None:
            print("no Python {} on this machine: uv downloads one".format(" or ".join(VERSIONS)), flush=True)
        # With pip: in an active .venv without one, `pip install` would install into another Python.
        subprocess.check_call([uv, "venv", "--quiet", "--seed", *choice, VENV], env=environment)
    # A package whose copy was interrupted can look installed: what has not been finished is installed again.
    files = ["requirements.txt", *more]
    files += [name for name in had if name not in files and os.path.exists(os.path.join(ROOT, name))]
    with open(unfinished, "w") as file:
        file.write("\n".join(files))
    size, build = "6 GB with CUDA libraries", []
    if sys.platform != "linux":
        size = "2 GB"
    elif not wants_cuda() and not works(installed, NOT_CPU):  # what is there already stays
        build = cpu_build(uv, installed, environment)
        size = CPU_SIZE if build else size + ", since the package index has no CPU build of PyTorch"
    there = works(installed, "import importlib.util as u; assert u.find_spec('torch')")
    cost = "" if there else f" (about {size}), which takes some minutes"
    print("installing {} into .venv{}".format(", ".join(files), cost), flush=True)
    flags = ([] if sys.stderr.isatty() else ["--quiet"]) + (["--reinstall"] if again else [])
    command = [uv, "pip", "install", *flags, *build, "--python", installed]
    for name in files:
        command += ["-r", os.path.join(ROOT, name)]
    subprocess.check_call(command, env=environment)
    os.remove(unfinished)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (subprocess.CalledProcessError, OSError) as error:
        sys.exit(f"error: setting up failed ({error}): see above, then run make setup again.")
    except KeyboardInterrupt:
        sys.exit(130)
