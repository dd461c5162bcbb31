"""Make .venv with everything in requirements.txt. Runs on any Python 3; called by `make setup`.

A Python >= 3.12 is looked for by running what might be one: names on the PATH can be shims that fail. Only if
there is none, uv downloads one. Index and certificate settings of pip and uv are left to them.
"""

import glob
import io
import os
import platform
import re
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request
import zipfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
TOOLS = os.path.join(ROOT, ".venv-tools")  # holds uv where the system has none
VERSIONS = ("3.12", "3.13")  # LeRobot needs at least the first; not every package has wheels beyond the last


def works(python, code="pass"):
    """Whether an interpreter exists, starts, and runs a line of code."""
    try:
        return (
            subprocess.call([python, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0
        )
    except OSError:
        return False


def find_python():
    """Path of a Python of one of VERSIONS, or None."""
    for version in VERSIONS:
        candidates = ["python" + version, "python3", "python", sys.executable]
        for pattern in (
            "~/.pyenv/versions/{}*/bin/python3",
            "~/.local/share/uv/python/*-{}*/bin/python3",
            "/usr/local/bin/python{}",
            "/opt/homebrew/bin/python{}",
            "/opt/python/{}*/bin/python3",
        ):
            candidates += sorted(glob.glob(os.path.expanduser(pattern.format(version))), reverse=True)
        for candidate in candidates:
            path = shutil.which(candidate)
            if path and works(
                path, f"import sys; assert '%d.%d' % sys.version_info[:2] == '{version}'"
            ):
                return path
    return None


def find_uv(python):
    """Path of uv: the system's, or one installed by pip, or its wheel unpacked where there is no pip."""
    uv = shutil.which("uv")
    if uv and subprocess.call([uv, "--version"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0:
        return uv
    uv = os.path.join(TOOLS, "bin", "uv")
    if os.path.exists(uv):
        return uv
    for candidate in (python, sys.executable):
        if candidate and works(candidate, "import pip"):
            print("installing uv with pip", flush=True)
            command = [candidate, "-m", "pip", "install", "-qqq", "--target", TOOLS, "--upgrade", "uv"]
            if subprocess.call(command) == 0 and os.path.exists(uv):
                return uv
    print("there is no pip: fetching uv's wheel", flush=True)
    unpack_uv_wheel(uv)
    return uv


def unpack_uv_wheel(target):
    """Take the uv program out of the newest wheel for this system; the index is pip's, else PyPI."""
    index = os.environ.get("PIP_INDEX_URL") or os.environ.get("UV_INDEX_URL") or "https://pypi.org/simple"
    url = index.rstrip("/") + "/uv/"
    with urllib.request.urlopen(url, timeout=60) as answer:
        links = re.findall(r'href="([^"#]+)', answer.read().decode())
    machine = platform.machine().lower().replace("amd64", "x86_64")
    system = "macosx" if sys.platform == "darwin" else "manylinux"
    wheels = [link for link in links if system in link and link.endswith(machine + ".whl")]
    if not wheels:
        sys.exit(
            f"error: PyPI has no uv for {system} {machine}: install uv by hand, then run make again."
        )
    with urllib.request.urlopen(urllib.parse.urljoin(url, wheels[-1]), timeout=300) as answer:
        wheel = zipfile.ZipFile(io.BytesIO(answer.read()))
    program = next(name for name in wheel.namelist() if name.endswith("/scripts/uv"))
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with open(target + ".part", "wb") as out:
        out.write(wheel.read(program))
    os.chmod(target + ".part", 0o755)
    os.rename(target + ".part", target)


def main():
    python = find_python()
    uv = find_uv(python)
    if python is None:
        print("no Python {} on this machine: uv downloads one".format(" or ".join(VERSIONS)), flush=True)
    choice = ["--python", python] if python else ["--managed-python", "--python", VERSIONS[0]]
    installed = os.path.join(VENV, "bin", "python")
    if not works(installed, "import sys; assert sys.version_info >= (3, 12)"):
        subprocess.check_call([uv, "venv", "--quiet", "--clear", *choice, VENV])
    requirements = os.path.join(ROOT, "requirements.txt")
    print("installing requirements.txt into .venv (about 6 GB with CUDA libraries)", flush=True)
    subprocess.check_call([uv, "pip", "install", "-qqq", "--python", installed, "-r", requirements])


if __name__ == "__main__":
    try:
        main()
    except (subprocess.CalledProcessError, OSError) as error:
        sys.exit(f"error: setting up failed ({error}): see above, then run make setup again.")
