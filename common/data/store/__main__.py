"""`python -m common.data.store`: see `common/data/inspect.py`."""

from common.data.inspect import main

if __name__ == "__main__":
    main()
