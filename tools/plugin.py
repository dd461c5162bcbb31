"""Make .venv-plugin: LeRobot, its simulators and our plug-ins, installed as a user would, and nothing else.

Called by `make plugin`, which then tries LeRobot's commands there (tests/test_installed.py).
"""

import os
import subprocess

import setup  # of this folder

VENV = os.path.join(setup.ROOT, ".venv-plugin")
OURS = ("lerobot_policy_flow", "lerobot_env_flow", "tests/lerobot_robot_paper")


def main():
    python = setup.find_python()
    uv = setup.find_uv(python)
    environment = dict(setup.uv_environment(python), VIRTUAL_ENV=VENV)
    if not os.path.exists(VENV):
        choice = ["--python", python] if python else ["--managed-python", "--python", setup.VERSIONS[0]]
        subprocess.check_call([uv, "venv", "--quiet", *choice, VENV], env=environment)
    folders = [os.path.join(setup.ROOT, folder) for folder in OURS]
    # The same version may hold other code now.
    again = [word for folder in OURS for word in ("--reinstall-package", os.path.basename(folder))]
    install = [uv, "pip", "install", "--quiet", *again, *folders, "lerobot[core_scripts]"]
    subprocess.check_call(install, env=environment)


if __name__ == "__main__":
    main()
