"""Train and evaluate: see `python main.py --help`."""

if __name__ == "__main__":
    from jaxvid import entry_point

    entry_point.run("jaxvid.main", "; run the same command to continue")
elif __name__ == "__mp_main__":  # a worker process, which imports this file first
    from jaxvid import entry_point

    entry_point.ignore_signals()
