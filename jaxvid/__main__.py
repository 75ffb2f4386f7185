"""`python -m jaxvid` is the same as `jaxvid`."""

from jaxvid.command import main

if __name__ == "__main__":
    main()
