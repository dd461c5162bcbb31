"""Try the simulators: `python -m common.envs` renders a picture in each and reports what failed."""

import time

from common.config import cli, options
from common.envs import EnvConfig, make_environment
from common.errors import UserError

ONE_OF_EACH = (
    "demo",
    "demo-tasks",
    "metaworld:pick-place-v3",
    "aloha:transfer-cube",
    "aloha:insertion",
    "pusht",
)


@options
class Config:
    """Render a picture in every simulator."""


def main(config: Config) -> None:
    broken = []
    for name in ONE_OF_EACH:
        print(f"{name:<24} ", end="", flush=True)  # importing a simulator can take a minute
        try:
            environment = make_environment(EnvConfig(env=name), (96, 96))
            environment.reset(0, 0)
            environment.images()
            began = time.perf_counter()
            images = environment.images()
            milliseconds = 1000 * (time.perf_counter() - began)
            drawn = f"{', '.join(images)} drawn in {milliseconds:.0f} ms"
            print(f"{len(environment.state())} numbers, {drawn}", flush=True)
        except UserError as error:
            print(error, flush=True)
            broken.append(name)
    if broken:
        raise UserError(f"{', '.join(broken)} cannot be used here: see above.")
    print("all of them can be used")


if __name__ == "__main__":
    cli(main, Config)
