"""Makes environments next to .venv, each for one check; called by `make plugin` and `make lowest`.

plugin      .venv-plugin: LeRobot, its simulators and our plug-ins, installed as a user would; nothing else
lowest      .venv-lowest: the oldest versions that requirements.txt allows
"""

import os
import subprocess
import sys

import setup  # from this folder

OURS = ("lerobot_policy_flow", "lerobot_env_flow", "tests/lerobot_robot_paper")


def main(what="plugin"):
    python = setup.find_python()
    uv, venv = setup.find_uv(python), os.path.join(setup.ROOT, ".venv-" + what)
    environment = dict(setup.uv_environment(python), VIRTUAL_ENV=venv)
    if not os.path.exists(venv):
        choice = ["--python", python] if python else ["--managed-python", "--python", setup.VERSIONS[0]]
        subprocess.check_call([uv, "venv", "--quiet", *choice, venv], env=environment)
    install = [uv, "pip", "install", "--quiet"]
    if what == "lowest":
        install += ["--resolution", "lowest-direct", "-r", os.path.join(setup.ROOT, "requirements.txt")]
    else:
        for folder in OURS:  # the code may have changed under the same version
            install += ["--reinstall-package", os.path.basename(folder), os.path.join(setup.ROOT, folder)]
        install += ["lerobot[core_scripts]"]
    subprocess.check_call(install, env=environment)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: setting up failed ({error}): see above.")
